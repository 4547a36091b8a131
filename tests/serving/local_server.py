"""A server of `diffusers_leanvae.serving` on 127.0.0.1, in a thread of the test."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from diffusers_leanvae.models.video_autoencoder import VideoAutoencoder
from diffusers_leanvae.serving import Limits, create_app


@contextmanager
def serving(
    vae: VideoAutoencoder, limits: Limits | None = None, token: str | None = None, page: Path | None = None
) -> Iterator[str]:
    """Serve a model, and give the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(vae, limits, token, page), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()

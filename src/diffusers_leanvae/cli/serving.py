"""A model over HTTP: `serve`."""

import logging
import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from .. import bundled
from .common import Device, Dtype, Fuse, Model, load_model, say_demonstration


TOKEN = "LEANVAE_TOKEN"
LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


def serve(
    context: typer.Context,
    model: Model = bundled.DEFAULT,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 makes the server reachable from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes one that is free.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar=TOKEN,
            show_envvar=False,
            help=f"Password that clients must send, better given in the environment as {TOKEN}, which other users of "
            "the machine do not see. Without it everybody who reaches the server is served.",
        ),
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Maximum number of pixels in all frames of a request; bounds its time.")
    ] = 40_000_000,
    max_body: Annotated[str, typer.Option(help="Maximum size of what a request sends, such as 64MiB.")] = "256MiB",
    timeout: Annotated[
        float,
        typer.Option(min=0.001, help="Maximum seconds to wait for a request to arrive, and for its turn."),
    ] = 60.0,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Maximum number of requests that wait while one is computed.")
    ] = 1,
    page: Annotated[
        Path | None,
        typer.Option(help="Folder of a page, written by `leanvae page`, to show to browsers at the address."),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    fuse: Fuse = False,
) -> None:
    """Serve an autoencoder over HTTP, for `remote_decode` and `remote_encode` of diffusers."""
    try:
        import uvicorn

        from ..serving import Limits, check_page, create_app
    except ImportError as error:
        raise ImportError('Serving needs FastAPI and uvicorn: pip install "diffusers-leanvae[serve]".') from error
    from ..inference.memory import parse_memory

    if page is not None:
        check_page(page, "`--page`")
    limits = Limits(max_pixels, parse_memory(max_body, "--max-body"), timeout, max_waiting)
    with _listen(host, port) as listener:
        say_demonstration(context, model)
        vae = load_model(model, device, dtype, fuse)
        if vae.can_stream:
            vae.enable_tiling()  # exact, and memory does not grow with the size of what is asked for
        app = create_app(vae, limits, token, page)
        config = uvicorn.Config(app, log_level="warning")
        logging.getLogger("uvicorn.access").setLevel("INFO")  # one line for each request
        port = listener.getsockname()[1]
        typer.echo(f"http://{f'[{host}]' if ':' in host else host}:{port}  {model}, until interrupted", err=True)
        if token is None and host not in LOCAL_HOSTS:
            typer.echo(f"warning: everybody who reaches {host} is served; `--token` restricts that", err=True)
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Open the socket, so that a port which is taken shows before the model is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise ValueError(f"`--host` and `--port` must be free, got {host!r} and {port}: {reason}.") from None

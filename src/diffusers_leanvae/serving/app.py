"""The routes: `/decode`, `/encode`, `/info` and `/health`."""

import asyncio
import base64
import binascii
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles

from .._version import __version__
from ..checks import one_line
from ..description import public_config
from ..models.video_autoencoder import VideoAutoencoder
from .codec import decode, encode
from .protocol import Answer, DecodeQuery, EncodeQuery, Limits, Refusal, sentence_of
from .work_queue import WorkQueue


# A page may use several threads only if it is shut off from other pages.
_ISOLATION = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


def create_app(
    vae: VideoAutoencoder, limits: Limits | None = None, token: str | None = None, page: str | Path | None = None
) -> FastAPI:
    """Make the server of one model, for uvicorn or another server of ASGI applications.

    Args:
        vae: The model, on its device, in evaluation mode. Nobody else may use it at the same time.
        limits: How much the server takes upon itself.
        token: What a client must know for all but `/health`, as `Authorization: Bearer TOKEN`, or as the password of
            `Basic`, which `http://user:TOKEN@host` sends.
        page: A folder of files for browsers, as `leanvae page` writes it, to show at `/`.

    Raises:
        ValueError: If the token is empty, or has other characters than those of ASCII that print, or if the folder
            has no `index.html`.
    """
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise ValueError("`token` must be ASCII characters that print, without a space at an end, got another.")
    limits = Limits() if limits is None else limits
    queue = WorkQueue(limits.max_waiting, limits.timeout)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    app = FastAPI(title="LeanVAE", version=__version__, lifespan=lifespan, openapi_url=None)
    for kind in (Refusal, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    guarded = [] if token is None else [Depends(partial(_check_token, token.encode()))]

    @app.post("/decode", dependencies=guarded)
    async def post_decode(request: Request, query: Annotated[DecodeQuery, Query()]) -> Response:
        is_file_wanted = request.headers.get("accept", "").startswith("image/")
        query.check(vae, limits, is_file_wanted)
        with queue.place():
            body = await _read_body(request, query.num_bytes, limits)
            return await _compute(request, partial(decode, vae, query, body, is_file_wanted))

    @app.post("/encode", dependencies=guarded)
    async def post_encode(request: Request, query: Annotated[EncodeQuery, Query()]) -> Response:
        query.check(vae, limits)
        with queue.place():
            body = await _read_body(request, query.num_bytes, limits)
            return await _compute(request, partial(encode, vae, query, body, limits))

    async def _compute(request: Request, work: Any) -> Response:
        answer: Answer = await queue.run(work, request.is_disconnected)
        return Response(answer.content, media_type=answer.media_type, headers=answer.headers)

    @app.get("/info", dependencies=guarded)
    async def get_info() -> dict[str, Any]:
        return {
            "version": __version__,
            "class": type(vae).__name__,
            "config": public_config(vae.config),
            "dtype": str(vae.dtype).removeprefix("torch."),
            "latent_channels": vae.latent_channels,
            "temporal_compression_ratio": vae.temporal_compression_ratio,
            "spatial_compression_ratio": vae.spatial_compression_ratio,
            "limits": vars(limits),
        }

    @app.get("/health")
    async def get_health() -> dict[str, str]:
        return {"status": "ok"}

    if page is not None:
        check_page(page)
        pages = StaticFiles(directory=page, html=True)

        @app.api_route("/{path:path}", methods=["GET", "HEAD"], dependencies=guarded)
        async def get_page(request: Request, path: str) -> Response:
            response = await pages.get_response(path or ".", request.scope)
            response.headers.update(_ISOLATION)
            return response

    return app


def check_page(folder: str | Path, name: str = "`page`") -> None:
    """Refuse a folder without a page; `name` is where it was given, for the message."""
    if not (Path(folder) / "index.html").is_file():
        raise ValueError(f"{name} must be a folder that `leanvae page` has written, got {str(folder)!r}.")


async def _check_token(token: bytes, request: Request) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    found = given.encode()
    if scheme.lower() == "basic":
        try:
            found = base64.b64decode(found, validate=True).partition(b":")[2]
        except binascii.Error:
            found = b""
    if scheme.lower() not in ("basic", "bearer") or not hmac.compare_digest(found, token):
        raise Refusal(
            401,
            "The token of this server must be given, as `Authorization: Bearer TOKEN` or in the address, as "
            "http://user:TOKEN@host.",
            {"WWW-Authenticate": 'Basic realm="leanvae"'},
        )


async def _read_body(request: Request, num_bytes: int | None, limits: Limits) -> bytearray:
    """Read a body of so many bytes, or of any number up to the limit; refuse another as soon as that is known."""

    def check(length: int, is_all: bool) -> None:
        limits.check_body(length)
        if num_bytes is not None and (length > num_bytes or (is_all and length < num_bytes)):
            told = f"{length}" if is_all else f"{length} or more"
            raise Refusal(400, f"The body must have the {num_bytes} bytes of `shape` and `dtype`, got {told}.")

    if "content-length" in request.headers:
        check(int(request.headers["content-length"]), is_all=True)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.timeout):
            async for chunk in request.stream():
                body += chunk
                check(len(body), is_all=False)
    except TimeoutError:
        raise Refusal(408, f"The body must arrive within {limits.timeout:g} s.") from None
    except ClientDisconnect:
        raise Refusal(400, "The client went away before its body had arrived.") from None
    check(len(body), is_all=True)
    return body


async def _answer_error(_: Request, error: Exception) -> JSONResponse:
    """Put any error into one sentence: diffusers' client shows the JSON of an answer that is not OK."""
    if isinstance(error, Refusal):
        return JSONResponse({"error": error.sentence}, error.status, error.headers)
    if isinstance(error, RequestValidationError):
        return JSONResponse({"error": sentence_of(error)}, 400)
    if isinstance(error, HTTPException):
        sentence = f"{error.detail}; there are POST /decode, POST /encode, GET /info and GET /health."
        return JSONResponse({"error": sentence}, error.status_code, error.headers)
    return JSONResponse({"error": f"{type(error).__name__}: {one_line(error)}"}, 500)

"""The server as diffusers' own client meets it, and as clients meet it that send anything else."""

import gc
import inspect
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import diffusers
import pytest
import requests
import torch
import uvicorn
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode, remote_encode
from diffusers.video_processor import VideoProcessor
from local_server import serving
from PIL import Image
from processes import start
from tiny import make_latents, make_tiny, make_video
from typer.testing import CliRunner

from diffusers_leanvae import serving as serving_package
from diffusers_leanvae.cli import app
from diffusers_leanvae.cli.serving import serve
from diffusers_leanvae.inference.memory import parse_memory
from diffusers_leanvae.latents import denormalize_latents
from diffusers_leanvae.serving import Limits
from diffusers_leanvae.video_io import read_video, write_video
from diffusers_leanvae.video_io.pixels import as_sample, pixels_to_sample, sample_to_pixels


STATISTICS = {"latents_mean": [0.1, 0.2, -0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]}
SMALL = Limits(max_pixels=5 * 32 * 48, max_body=100_000)


@pytest.fixture(scope="module")
def vae() -> Any:
    return make_tiny("leanvae", **STATISTICS)


@pytest.fixture(scope="module")
def url(vae) -> Iterator[str]:
    with serving(vae) as address:
        yield address


@pytest.fixture(scope="module")
def small(vae) -> Iterator[str]:
    with serving(vae, SMALL) as address:
        yield address


@torch.no_grad()
def decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    return vae.decode(latents.to(vae.dtype)).sample


@torch.no_grad()
def encoded(vae: Any, sample: torch.Tensor) -> torch.Tensor:
    return vae.encode(sample.to(vae.dtype)).latent_dist.mode()


def pixels_of(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack(
        [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(*i.size[::-1], 3) for i in images]
    )


# --- Decoding, by the client of diffusers ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 4, 3, 4, 6), (2, 4, 2, 4, 4), (1, 4, 4, 6), (2, 4, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_client_gets_what_the_model_gives(vae, url, shape, dtype):
    latents = make_latents(*shape).to(dtype)
    sample = remote_decode(f"{url}/decode", latents, do_scaling=False, output_type="pt", return_type="pt")
    assert torch.equal(sample, decoded(vae, latents))


@pytest.mark.parametrize("family", ["wfvae", "ivvae"])
def test_siblings_are_served(family):
    sibling = make_tiny(family, torch.bfloat16)
    latents, image = make_latents(1, 4, 2, 4, 4, dtype=torch.bfloat16), make_video(1, 3, 32, 32)
    with serving(sibling) as url:
        sample = remote_decode(f"{url}/decode", latents, do_scaling=False, output_type="pt", return_type="pt")
        back = remote_encode(f"{url}/encode", image)
    assert sample.dtype == torch.bfloat16 and torch.equal(sample, decoded(sibling, latents))
    assert back.dtype == torch.bfloat16 and torch.equal(back, encoded(sibling, image).squeeze(2))


def test_client_may_scale_latents(vae, url):
    latents = make_latents(1, 4, 2, 4, 6)
    options: dict[str, Any] = {"output_type": "pt", "return_type": "pt"}
    scaled = remote_decode(f"{url}/decode", latents, scaling_factor=0.5, **options)
    assert torch.equal(scaled, decoded(vae, latents / 0.5))
    shifted = remote_decode(f"{url}/decode", latents, scaling_factor=0.5, shift_factor=-0.25, **options)
    assert torch.equal(shifted, decoded(vae, latents / 0.5 - 0.25))
    with pytest.warns(FutureWarning, match="do_scaling"):  # the client's default, of which it warns itself
        by_config = remote_decode(f"{url}/decode", latents, **options)
    assert torch.equal(by_config, decoded(vae, denormalize_latents(latents, vae.config)))
    with pytest.warns(FutureWarning, match="do_scaling"):
        image = remote_decode(f"{url}/decode", latents[:, :, 0].contiguous(), **options)
    assert torch.equal(image, decoded(vae, denormalize_latents(latents[:, :, :1], vae.config))[:, :, 0])


def test_videos_come_as_pictures(vae, url):
    latents = make_latents(1, 4, 3, 4, 6)
    expected = sample_to_pixels(decoded(vae, latents)[0]).permute(1, 2, 3, 0)
    ways: list[dict[str, Any]] = [
        {"output_type": "pil", "processor": VideoProcessor()},
        {"output_type": "pt", "processor": VideoProcessor()},
        {"output_type": "pt", "partial_postprocess": True},
    ]
    for way in ways:
        images: Any = remote_decode(f"{url}/decode", latents, do_scaling=False, return_type="pil", **way)
        assert torch.equal(pixels_of(images), expected), way


@pytest.mark.parametrize("shape", [(1, 4, 4, 6), (1, 4, 1, 4, 6)], ids=str)
def test_images_come_as_pictures(vae, url, tmp_path, shape):
    latents = make_latents(*shape)
    expected = sample_to_pixels(decoded(vae, latents).view(1, 3, 32, 48)).permute(0, 2, 3, 1)
    ways: list[dict[str, Any]] = [
        {"output_type": "pil", "image_format": "png"},
        {"output_type": "pt", "partial_postprocess": True},
    ]
    if len(shape) == 4:
        ways.append({"output_type": "pt", "processor": VaeImageProcessor()})
    for way in ways:
        image: Any = remote_decode(f"{url}/decode", latents, do_scaling=False, return_type="pil", **way)
        assert torch.equal(pixels_of([image]), expected), way
    image = remote_decode(f"{url}/decode", latents, do_scaling=False)
    assert image.format == "jpeg"
    write_video(tmp_path / "image.jpg", expected, fps=1)
    assert torch.equal(pixels_of([image]), read_video(tmp_path / "image.jpg")[0])


def test_videos_come_as_files(vae, url, tmp_path):
    latents = make_latents(1, 4, 3, 4, 6)
    path, same = tmp_path / "video.mp4", tmp_path / "same.mp4"
    for rate, fps in (("", 24), ("?fps=8", 8)):
        content: Any = remote_decode(
            f"{url}/decode{rate}", latents, do_scaling=False, output_type="mp4", return_type="mp4"
        )
        path.write_bytes(content)
        write_video(same, sample_to_pixels(decoded(vae, latents)[0]).permute(1, 2, 3, 0), fps=fps)
        frames, info = read_video(path)
        assert frames.shape == (9, 32, 48, 3) and info.fps == fps and info.codec == "h264"
        assert torch.equal(frames, read_video(same)[0])


@pytest.mark.skipif(not diffusers.__version__.startswith("0.42."), reason="docs/serving.md says it of diffusers 0.42")
def test_the_client_sends_numbers_as_they_lie_in_memory(vae, url):
    latents = make_latents(1, 4, 2, 4, 6)
    sample = remote_decode(f"{url}/decode", latents[:, :, 0], do_scaling=False, output_type="pt", return_type="pt")
    assert torch.equal(sample, decoded(vae, latents.flatten()[:96].view(1, 4, 4, 6)))


# --- Encoding, by the client of diffusers ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3, 9, 32, 48), (2, 3, 5, 32, 32), (2, 3, 32, 48), (1, 3, 1, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
def test_client_encodes_tensors(vae, url, shape, dtype):
    sample = make_video(*shape)
    sample = sample_to_pixels(sample) if dtype == torch.uint8 else sample.to(dtype)
    latents = remote_encode(f"{url}/encode", sample)
    expected = encoded(vae, as_sample(sample))
    assert torch.equal(latents, expected if len(shape) == 5 else expected.squeeze(2))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_images_are_encoded_from_files(vae, url, tmp_path, file_format):
    image = Image.effect_noise((48, 32), 90).convert("RGB")
    path = tmp_path / "image"
    image.save(path, file_format)
    if file_format == "PNG":
        latents = remote_encode(f"{url}/encode", image)
    else:
        response = requests.post(f"{url}/encode", data=path.read_bytes())
        latents = torch.frombuffer(bytearray(response.content), dtype=torch.float32).view(1, 4, 4, 6)
    sample = pixels_to_sample(read_video(path)[0][0]).permute(2, 0, 1)[None]
    assert torch.equal(latents, encoded(vae, sample).squeeze(2))


def test_client_may_scale_what_is_encoded(vae, url):
    sample = make_video(1, 3, 5, 32, 32)
    latents = remote_encode(f"{url}/encode", sample, scaling_factor=0.5, shift_factor=0.25)
    assert torch.equal(latents, (encoded(vae, sample) - 0.25) * 0.5)
    latents = remote_encode(f"{url}/encode", sample, shift_factor=0.25)
    assert torch.equal(latents, encoded(vae, sample) - 0.25)
    again = remote_decode(
        f"{url}/decode", latents, scaling_factor=1.0, shift_factor=0.25, output_type="pt", return_type="pt"
    )
    # Measured 4e-6: the shift is taken off and put on again.
    torch.testing.assert_close(again, decoded(vae, encoded(vae, sample)), rtol=0, atol=2e-5)


# --- What a bad client sends -----------------------------------------------------------------------------------------

SHAPE = {"shape": [1, 4, 2, 4, 6], "dtype": "float32"}  # of 768 bytes
IMAGE = {"shape": [1, 3, 32, 48], "dtype": "uint8"}  # of 4608 bytes
BAD_DECODES: dict[str, tuple[dict[str, Any], bytes, int, str]] = {
    "no parameters": ({}, bytes(768), 400, "`shape` must be given"),
    "no dtype": ({"shape": [1, 4, 2, 4, 6]}, bytes(768), 400, "`dtype` must be given"),
    "no body": (SHAPE, b"", 400, "must have the 768 bytes of `shape` and `dtype`, got 0"),
    "a shorter body": (SHAPE, bytes(767), 400, "must have the 768 bytes of `shape` and `dtype`, got 767"),
    "a longer body": (SHAPE, bytes(769), 400, "must have the 768 bytes of `shape` and `dtype`, got 769"),
    "a larger body": (SHAPE, bytes(100_001), 413, "at most 100000 bytes, got 100001"),
    "letters": (SHAPE | {"shape": [1, 4, "x", 4, 6]}, bytes(768), 400, "`shape` must be a valid integer"),
    "rank 3": (SHAPE | {"shape": [1, 32, 6]}, bytes(768), 400, "4 numbers for images or 5 for videos, got 3"),
    "rank 6": (SHAPE | {"shape": [1, 1, 4, 2, 4, 6]}, bytes(768), 400, "5 for videos, got 6"),
    "nothing": (SHAPE | {"shape": [0, 4, 2, 4, 6]}, b"", 400, "positive numbers, got [0, 4, 2, 4, 6]"),
    "negative": (SHAPE | {"shape": [-1, 4, 2, -4, 6]}, bytes(768), 400, "positive numbers"),
    "channels": (SHAPE | {"shape": [1, 5, 2, 4, 6]}, bytes(960), 400, "`shape` must have shape (batch_size, 4,"),
    "dtype": (SHAPE | {"dtype": "uint8"}, bytes(192), 400, "`dtype` must be 'float32', 'float16' or 'bfloat16', got"),
    "code": (SHAPE | {"dtype": "object"}, bytes(768), 400, "`dtype` must be 'float32', 'float16' or 'bfloat16', got"),
    "too many pixels": (SHAPE | {"shape": [1, 4, 2, 4, 7]}, bytes(896), 413, "at most 7680 pixels in all its frames"),
    "pixels beyond any integer": (SHAPE | {"shape": [1, 4, 10**18, 10**18, 6]}, b"", 413, "at most 7680 pixels"),
    "numbers beyond any float": (SHAPE | {"shape": ["9" * 5000, 4, 1, 1, 1]}, b"", 400, "`shape`"),
    "NaN": (SHAPE, bytes(764) + b"\x00\x00\xc0\x7f", 400, "finite numbers"),
    "factor 0": (
        SHAPE | {"scaling_factor": 0},
        bytes(768),
        400,
        "`scaling_factor` must be greater than or equal to 0.0000",
    ),
    "factor inf": (SHAPE | {"scaling_factor": "inf"}, bytes(768), 400, "`scaling_factor` must be a finite number"),
    "factor 1e308": (
        SHAPE | {"scaling_factor": 1e308},
        bytes(768),
        400,
        "`scaling_factor` must be less than",
    ),
    "shift -1e308": (SHAPE | {"scaling_factor": 1, "shift_factor": -1e308}, bytes(768), 400, "`shift_factor`"),
    "channels of no tensor": (SHAPE | {"shape": [1, 10**15, 2, 4, 6]}, b"", 400, "numbers of at most 2147483647"),
    "channels of no integer": (
        SHAPE | {"shape": [1, 10**18, 2, 4, 6]},
        b"",
        400,
        "numbers of at most 2147483647",
    ),
    "shift alone": (SHAPE | {"shift_factor": 1}, bytes(768), 400, "`shift_factor` must come with `scaling_factor`"),
    "packed": (SHAPE | {"height": 32, "width": 48}, bytes(768), 400, "for packed latents"),
    "output": (
        SHAPE | {"output_type": "gif"},
        bytes(768),
        400,
        "`output_type` must be 'mp4', 'pil' or 'pt', got 'gif'",
    ),
    "image format": (SHAPE | {"image_format": "bmp"}, bytes(768), 400, "`image_format` must be 'jpg' or 'png'"),
    "rate": (SHAPE | {"fps": 0}, bytes(768), 400, "`fps` must be greater than or equal to 0.001"),
    "another parameter": (SHAPE | {"strength": 1}, bytes(768), 400, "`strength` is no parameter of this route"),
    "two videos as a file": (
        {"shape": [2, 4, 1, 4, 6], "dtype": "float32", "output_type": "mp4"},
        bytes(768),
        400,
        "one video",
    ),
    "two images as a video": (
        {"shape": [2, 4, 4, 6], "dtype": "float32", "output_type": "mp4"},
        bytes(768),
        400,
        "got 2 images",
    ),
}
BAD_ENCODES: dict[str, tuple[dict[str, Any], bytes, int, str]] = {
    "no body": ({}, b"", 400, "PNG or JPEG file"),
    "a pickle": ({}, b"\x80\x04K\x01.", 400, "PNG or JPEG file"),
    "the beginning of a picture": ({}, b"\x89PNG\r\n\x1a\n", 400, "body"),
    "shape alone": ({"shape": [1, 3, 32, 48]}, bytes(4608), 400, "`shape` and `dtype` must be given for a tensor"),
    "dtype alone": ({"dtype": "uint8"}, bytes(4608), 400, "`shape` and `dtype` must be given for a tensor"),
    "a shorter body": (IMAGE, bytes(4607), 400, "must have the 4608 bytes"),
    "channels": (IMAGE | {"shape": [1, 4, 32, 32]}, bytes(4096), 400, "`shape` must have shape (batch_size, 3,"),
    "frames": (IMAGE | {"shape": [1, 3, 4, 32, 32]}, bytes(12288), 400, "`num_frames` must be 4 * n + 1"),
    "size": (IMAGE | {"shape": [1, 3, 33, 48]}, bytes(4752), 400, "multiples of 8, got 33 and 48"),
    "dtype": (IMAGE | {"dtype": "int32"}, bytes(18432), 400, "`dtype` must be 'float32', 'float16', 'bfloat16' or"),
    "too many pixels": (IMAGE | {"shape": [6, 3, 32, 48]}, bytes(27648), 413, "at most 7680 pixels"),
    "infinity": (IMAGE | {"dtype": "float16"}, bytes(9214) + b"\x00\x7c", 400, "finite numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DECODES)
def test_bad_requests_to_decode_end_in_a_sentence(small, case):
    parameters, body, status, sentence = BAD_DECODES[case]
    check_refused(requests.post(f"{small}/decode", data=body, params=parameters), status, sentence)


@pytest.mark.parametrize("case", BAD_ENCODES)
def test_bad_requests_to_encode_end_in_a_sentence(small, case):
    parameters, body, status, sentence = BAD_ENCODES[case]
    check_refused(requests.post(f"{small}/encode", data=body, params=parameters), status, sentence)


def check_refused(response: requests.Response, status: int, sentence: str) -> None:
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert sentence in error and error.endswith(".") and "\n" not in error


def test_bad_pictures_end_in_a_sentence(small, tmp_path):
    for size, status, sentence in (
        ((48, 30), 400, "multiples of 8"),
        ((800, 800), 413, "7680 pixels in all its frames"),
    ):
        path = tmp_path / f"{size[0]}.png"
        Image.new("RGB", size).save(path)
        check_refused(requests.post(f"{small}/encode", data=path.read_bytes()), status, sentence)
    damaged = (tmp_path / "48.png").read_bytes()[:60]
    check_refused(requests.post(f"{small}/encode", data=damaged), 400, "body")
    first, second = Image.new("RGB", (48, 32)), Image.new("RGB", (48, 32), "red")
    first.save(tmp_path / "a.png", save_all=True, append_images=[second])
    animation = (tmp_path / "a.png").read_bytes()
    check_refused(requests.post(f"{small}/encode", data=animation), 400, "one image, got an animation of 2 frames")


def test_the_client_shows_the_sentence(small):
    with pytest.raises(RuntimeError, match="must have a `processor` or one frame, got 5 frames"):
        remote_decode(f"{small}/decode", make_latents(1, 4, 2, 4, 6), do_scaling=False)
    assert requests.post(f"{small}/decode").json().keys() == {"error"}


def test_unknown_routes_name_the_known_ones(url):
    check_refused(requests.get(f"{url}/nothing"), 404, "POST /decode")
    check_refused(requests.get(f"{url}/decode"), 405, "POST /decode")


# --- Limits ----------------------------------------------------------------------------------------------------------


def send_head(url: str, path: str, **headers: object) -> socket.socket:
    """Send a request without its body."""
    address = urlsplit(url)
    connection = socket.create_connection((str(address.hostname), address.port or 0))
    lines = [f"POST {path} HTTP/1.1", "Host: x", *(f"{name.replace('_', '-')}: {headers[name]}" for name in headers)]
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    return connection


@pytest.mark.parametrize(
    ("path", "length", "status"),
    [
        ("/encode", 100_001, 413),
        ("/decode?shape=1&shape=4&shape=9&shape=4&shape=6&dtype=float32", 3456, 413),
        ("/decode?shape=1&shape=4&shape=1&shape=4&shape=6&dtype=float32", 385, 400),
    ],
)
def test_what_is_refused_is_refused_before_the_body_comes(small, path, length, status):
    with send_head(small, path, Content_Length=length) as connection:
        assert connection.recv(12) == f"HTTP/1.1 {status}".encode()


def test_a_body_of_unknown_length_is_cut_off(small):
    sent = []

    def endless() -> Iterator[bytes]:
        while len(sent) < 10_000:
            sent.append(1)
            yield bytes(10_000)

    check_refused(requests.post(f"{small}/encode", data=endless()), 413, "at most 100000 bytes")


def test_a_body_that_does_not_come_is_given_up(vae):
    with serving(vae, Limits(timeout=0.2)) as url, send_head(url, "/encode", Content_Length=10) as connection:
        assert connection.recv(12) == b"HTTP/1.1 408"
        assert requests.post(f"{url}/encode", data=b"no picture").status_code == 400  # its place is free again


class SlowModel:
    """Hold a model's calls of `decode` until they are let go, and count them."""

    def __init__(self, vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_begun, self.may_end, self.num_calls = threading.Event(), threading.Event(), 0
        real = vae.decode

        def decode(*arguments: Any, **options: Any) -> Any:
            self.num_calls += 1
            self.has_begun.set()
            assert self.may_end.wait(60)
            return real(*arguments, **options)

        monkeypatch.setattr(vae, "decode", decode)


def post(url: str) -> requests.Response:
    return requests.post(f"{url}/decode", data=bytes(768), params=SHAPE | {"output_type": "pt"})


def test_one_computes_one_waits_and_others_are_sent_away(vae, monkeypatch):
    slow = SlowModel(vae, monkeypatch)
    with serving(vae) as url, ThreadPoolExecutor(4) as pool:
        first = pool.submit(post, url)
        assert slow.has_begun.wait(60)
        others = [pool.submit(post, url) for _ in range(3)]
        statuses = []
        while len(statuses) < 2:  # two of the three find no place, whichever they are
            statuses = [other.result().status_code for other in others if other.done()]
            time.sleep(0.01)
        assert statuses == [503, 503]
        assert requests.get(f"{url}/health").json() == {"status": "ok"}  # while it computes
        slow.may_end.set()
        assert first.result().status_code == 200
        assert sorted(other.result().status_code for other in others) == [200, 503, 503]
        refused = next(other.result() for other in others if other.result().status_code == 503)
        check_refused(refused, 503, "busy")
        assert refused.headers["Retry-After"] == "1"
    assert slow.num_calls == 2


def test_waiting_ends(vae, monkeypatch):
    slow = SlowModel(vae, monkeypatch)
    with serving(vae, Limits(timeout=0.2)) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, url)
        assert slow.has_begun.wait(60)
        check_refused(post(url), 503, "waited for 0.2 s")
        slow.may_end.set()
        assert first.result().status_code == 200  # what runs is not interrupted, however long it takes
        assert post(url).status_code == 200
    assert slow.num_calls == 2


def test_nothing_is_computed_for_a_client_that_went_away(vae, monkeypatch):
    slow = SlowModel(vae, monkeypatch)
    with serving(vae, Limits(max_waiting=2)) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, url)
        assert slow.has_begun.wait(60)
        path = "/decode?shape=1&shape=4&shape=2&shape=4&shape=6&dtype=float32&output_type=pt"
        with send_head(url, path, Content_Length=768) as connection:
            connection.sendall(bytes(768))
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""  # the server has seen that nobody waits, and closed its side
        last = pool.submit(post, url)
        slow.may_end.set()
        assert first.result().status_code == last.result().status_code == 200
    assert slow.num_calls == 2


def test_nothing_is_left_of_a_request(url):
    def request_all() -> None:
        for _ in range(3):
            assert post(url).status_code == 200
            assert requests.post(f"{url}/encode", data=bytes(4608), params=IMAGE).status_code == 200
            assert requests.post(f"{url}/encode", data=bytes(4608)).status_code == 400

    request_all()
    before = find_tensors()
    request_all()
    assert find_tensors() <= before  # none is new; one of an earlier test may go meanwhile


def find_tensors() -> set[int]:
    """Find the tensors that are in use, by `id`, once the threads of answered requests have let go of theirs."""
    found: list[set[int]] = []
    while len(found) < 3 or found[-1] != found[-2] or found[-2] != found[-3]:
        time.sleep(0.05)
        gc.collect()
        found.append({id(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)})
    return found[-1]


def test_a_fault_of_the_model_is_answered_and_does_no_harm(vae, url, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("not enough\nmemory")

    with monkeypatch.context() as patch:
        patch.setattr(vae, "decode", fail)
        response = post(url)
    assert response.status_code == 500 and response.json() == {"error": "RuntimeError: not enough memory"}
    assert post(url).status_code == 200


# --- Token and information -------------------------------------------------------------------------------------------


def test_a_token_is_asked_for(vae):
    latents = make_latents(1, 4, 1, 4, 6)
    with serving(vae, token="s3cret/:") as url:
        host = url.removeprefix("http://")
        bearer = {"Authorization": b"Bearer s3cret/:"}
        assert requests.get(f"{url}/info", headers=bearer).status_code == 200
        sample = remote_decode(
            f"http://me:s3cret%2F%3A@{host}/decode", latents, do_scaling=False, output_type="pt", return_type="pt"
        )
        assert torch.equal(sample, decoded(vae, latents))
        for wrong in (
            "Bearer",
            "Bearer s3cret",
            "Bearer s3cret/:2",
            "Basic",
            "Basic &",
            "Basic caffè",
            "Basic bWU6eA==",
            "s3cret/:",
            "",
        ):
            for path in ("/decode", "/encode", "/decode?shape=x"):
                response = requests.post(f"{url}{path}", headers={"Authorization": wrong.encode()})
                check_refused(response, 401, "token of this server")
        assert requests.get(f"{url}/info").status_code == 401
        assert "Basic" in requests.get(f"{url}/info").headers["WWW-Authenticate"]
        assert requests.get(f"{url}/health").status_code == 200
        with send_head(url, "/encode", Content_Length=10**9) as connection:
            assert connection.recv(12) == b"HTTP/1.1 401"


def test_info_tells_of_model_and_limits(vae, small):
    info = requests.get(f"{small}/info").json()
    assert info["class"] == "AutoencoderKLLeanVAE" and info["config"]["latents_mean"] == STATISTICS["latents_mean"]
    assert not [key for key in info["config"] if key.startswith("_")]  # such as the path it was loaded from
    assert info["dtype"] == "float32" and info["limits"] == vars(SMALL)
    ratios = info["latent_channels"], info["temporal_compression_ratio"], info["spatial_compression_ratio"]
    assert ratios == (4, 4, 8)


# --- The command -----------------------------------------------------------------------------------------------------


def run_command(*arguments: str) -> None:
    # A job that a shell put in the background ignores interrupts, and its children do.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    app(list(arguments))


def test_command_serves_until_it_is_interrupted(vae, tmp_path):
    vae.save_pretrained(tmp_path / "model")
    said = tmp_path / "said.txt"
    options = ("--model", str(tmp_path / "model"), "--port", "0", "--max-pixels", "1536", "--token", "abc")
    process = start(run_command, "serve", *options, output=said)
    while "http://" not in (text := said.read_text() if said.exists() else ""):
        assert process.is_alive(), text
        time.sleep(0.05)
    host = text.split("http://")[1].split()[0]
    latents = make_latents(1, 4, 1, 4, 6)
    url = f"http://me:abc@{host}/decode"
    sample = remote_decode(url, latents, do_scaling=False, output_type="pt", return_type="pt")
    # The same sums in another process, with 1 to 8 threads and in tiles: no difference was measured.
    assert torch.equal(sample, decoded(vae, latents))
    with pytest.raises(RuntimeError, match="at most 1536 pixels"):
        remote_decode(url, make_latents(1, 4, 1, 4, 7), do_scaling=False)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    text = said.read_text()
    assert process.exitcode == 130 and "Traceback" not in text
    assert "POST /decode" in text and "200" in text and "abc" not in text


def test_command_has_the_limits_of_the_server():
    defaults = {name: parameter.default for name, parameter in inspect.signature(serve).parameters.items()}
    defaults["max_body"] = parse_memory(defaults["max_body"], "--max-body")
    assert {name: defaults[name] for name in vars(Limits())} == vars(Limits())


def test_command_computes_in_tiles_and_warns_of_an_open_door(vae, monkeypatch, tmp_path):
    vae.save_pretrained(tmp_path / "model")
    served, real = [], serving_package.create_app

    def create_app(model: Any, *arguments: Any) -> Any:
        served.append(model)
        return real(model, *arguments)

    monkeypatch.setattr(serving_package, "create_app", create_app)
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)  # ends at once
    options = ("serve", "--model", str(tmp_path / "model"), "--host", "0.0.0.0", "--port", "0")
    said = [CliRunner().invoke(app, [*options, *token]).stderr for token in ((), ("--token", "abc"))]
    assert ["everybody who reaches 0.0.0.0 is served" in text for text in said] == [True, False]
    assert len(served) == 2 and all(model.use_tiling for model in served)


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 1 and result.stdout == "", result.output
    return result.stderr


def test_command_refuses_what_cannot_be_served(vae, url, monkeypatch, tmp_path: Path):
    vae.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    port = str(urlsplit(url).port)
    assert f"`--host` and `--port` must be free, got '127.0.0.1' and {port}: " in refused("--port", port)
    assert "`--host` and `--port` must be free, got 'no.such.host.invalid'" in refused(
        "--host", "no.such.host.invalid"
    )
    assert "`--max-body` must be a size such as 2GiB" in refused("--max-body", "much")
    assert "`--token` must not be empty, got ''." in refused("--token", "")
    for token in ("caffè", "new\nline", " x"):
        assert "`--token` must be ASCII characters that print" in refused(
            "--token", token, "--model", model, "--port", "0"
        )
    assert "`--model` 'nothing' cannot be loaded" in refused("--model", "nothing", "--port", "0")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 'pip install "diffusers-leanvae[serve]"' in refused()


# --- A page ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path) -> Path:
    (tmp_path / "outside.txt").write_text("not for others")
    (tmp_path / "page" / "model").mkdir(parents=True)
    (tmp_path / "page" / "index.html").write_text("<title>page</title>")
    (tmp_path / "page" / "model" / "export.json").write_text("{}")
    return tmp_path / "page"


def test_a_page_stands_beside_the_routes(vae, page):
    with serving(vae, page=page) as url:
        answer = requests.get(url)
        assert answer.text == "<title>page</title>" and answer.headers["Content-Type"].startswith("text/html")
        # Without these a browser gives WebAssembly one thread.
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert requests.get(f"{url}/model/export.json").json() == {}
        assert requests.head(f"{url}/model/export.json").headers["Content-Length"] == "2"
        assert requests.get(f"{url}/health").json() == {"status": "ok"}
        assert requests.get(f"{url}/info").json()["class"] == "AutoencoderKLLeanVAE"
        for path in ("/nothing.js", "/..%2Foutside.txt", "/%2e%2e/outside.txt"):
            missing = requests.get(f"{url}{path}")
            assert missing.status_code == 404 and list(missing.json()) == ["error"], path


def test_a_page_needs_the_token_too(vae, page):
    with serving(vae, token="secret", page=page) as url:
        assert requests.get(url).status_code == 401
        assert requests.get(url, auth=("me", "secret")).text == "<title>page</title>"


def test_without_a_page_there_is_none(url):
    assert requests.get(url).status_code == 404


def test_a_folder_without_a_page_is_refused(vae, tmp_path):
    with pytest.raises(ValueError, match="`page` must be a folder that `leanvae page` has written, got"):
        serving_package.create_app(vae, page=tmp_path)

"""What requests and answers hold: parameters beside the address, tensors as bytes with shape and dtype told apart.

The protocol is that of `diffusers.utils.remote_utils`. There is nothing in it that could run code: a body is the bare
numbers of a tensor, or a PNG or JPEG file.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field

from ..checks import one_line
from ..models.video_autoencoder import VideoAutoencoder


FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
# So that latents divided by a factor, or times one, are float32 numbers.
Factor = Annotated[float, Field(allow_inf_nan=False, ge=1e-6, le=1e6)]
Shift = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
_MAX_NUMBER = 2**31 - 1  # of a shape


class Refusal(Exception):
    """A request that is not done, with the status and the sentence that its sender gets.

    Args:
        status: HTTP status code.
        sentence: The reason.
        headers: Headers of the answer.
    """

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Limits:
    """How much a server takes upon itself.

    Attributes:
        max_pixels: Pixels of all frames of a request, decoded or encoded. They bound the time of a computation, which
            nothing interrupts once it runs.
        max_body: Bytes of the body of a request.
        timeout: Seconds for the body to arrive, and again for the computations before this one to end.
        max_waiting: Requests that may wait while one is computed.
    """

    max_pixels: int = 40_000_000
    max_body: int = 256 * 2**20
    timeout: float = 60.0
    max_waiting: int = 1

    def check_pixels(self, num_pixels: int) -> None:
        """Refuse more pixels than are allowed."""
        if num_pixels > self.max_pixels:
            raise Refusal(
                413, f"A request must have at most {self.max_pixels} pixels in all its frames, got {num_pixels}."
            )

    def check_body(self, num_bytes: int) -> None:
        """Refuse a longer body than is allowed."""
        if num_bytes > self.max_body:
            raise Refusal(413, f"The body must have at most {self.max_body} bytes, got {num_bytes} or more.")


class Answer(NamedTuple):
    content: bytes
    media_type: str
    headers: dict[str, str]


class DecodeQuery(BaseModel):
    """Parameters of `/decode`; all but `fps` are those of `remote_decode`."""

    model_config = ConfigDict(extra="forbid")

    shape: list[int]
    dtype: Literal["float32", "float16", "bfloat16"]
    output_type: Literal["mp4", "pil", "pt"] = "pil"
    image_format: Literal["jpg", "png"] = "jpg"
    partial_postprocess: bool = False
    do_scaling: bool = False
    scaling_factor: Factor | None = None
    shift_factor: Shift | None = None
    height: int | None = None
    width: int | None = None
    fps: Annotated[float, Field(ge=0.001, le=1000)] = 24.0

    def check(self, vae: VideoAutoencoder, limits: Limits, is_file_wanted: bool) -> None:
        """Refuse, before the body is read, what cannot be decoded or answered.

        Args:
            vae: The model.
            limits: Of the server.
            is_file_wanted: Whether the answer to `output_type=pil` is to be an image file.
        """
        if self.height is not None or self.width is not None:
            raise Refusal(400, "`height` and `width` must not be given: they are for packed latents, of images only.")
        if self.shift_factor is not None and self.scaling_factor is None:
            raise Refusal(400, "`shift_factor` must come with `scaling_factor`.")
        batch_size, num_latent_frames, height, width = _check_shape(self.shape)
        ratio = vae.spatial_compression_ratio
        num_frames = vae.num_sample_frames(num_latent_frames)
        limits.check_pixels(batch_size * num_frames * height * ratio * width * ratio)
        with refusing_value_errors():
            vae.check_latents(_outline(self.shape, vae.dtype), "shape")
        is_bare = self.output_type == "pt" and not self.partial_postprocess
        if not is_bare and batch_size > 1 and len(self.shape) == 5:
            raise Refusal(400, f"`shape` must be of one video for pictures or a file, got {batch_size} videos.")
        if self.output_type == "mp4" and batch_size > 1:
            raise Refusal(400, f"`shape` must be of one video for a file, got {batch_size} images.")
        if self.output_type == "pil" and is_file_wanted and batch_size * num_frames > 1:
            raise Refusal(
                400,
                f"`output_type` 'pil' must have a `processor` or one frame, got {batch_size * num_frames} frames; "
                "'pt' and 'mp4' take any number.",
            )

    @property
    def num_bytes(self) -> int:
        return _num_bytes(self.shape, self.dtype)


class EncodeQuery(BaseModel):
    """Parameters of `/encode`, those of `remote_encode`; without shape and dtype the body is an image file."""

    model_config = ConfigDict(extra="forbid")

    shape: list[int] | None = None
    dtype: Literal["float32", "float16", "bfloat16", "uint8"] | None = None
    scaling_factor: Factor | None = None
    shift_factor: Shift | None = None

    def check(self, vae: VideoAutoencoder, limits: Limits) -> None:
        """Refuse, before the body is read, what cannot be encoded."""
        if (self.shape is None) != (self.dtype is None):
            raise Refusal(400, "`shape` and `dtype` must be given for a tensor, or neither of them for an image file.")
        if self.shape is not None:
            limits.check_pixels(math.prod(_check_shape(self.shape)))
            with refusing_value_errors():
                vae.check_sample(_outline(self.shape, vae.dtype), "shape")

    @property
    def num_bytes(self) -> int | None:
        """Bytes that the body must have; `None` for those of a file."""
        if self.shape is None or self.dtype is None:
            return None
        return _num_bytes(self.shape, self.dtype)


@contextmanager
def refusing_value_errors() -> Iterator[None]:
    """Make a `ValueError` the `Refusal` of the request."""
    try:
        yield
    except ValueError as error:
        raise Refusal(400, one_line(error)) from None


def tensor_of(body: bytearray, shape: Sequence[int], dtype: str) -> torch.Tensor:
    """Take a body for the numbers of a tensor; its length has been checked.

    Raises:
        Refusal: If a number is not finite.
    """
    tensor = torch.frombuffer(body, dtype=getattr(torch, dtype)).reshape(tuple(shape))
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise Refusal(400, "The body must hold finite numbers, got infinite ones or NaN.")
    return tensor


def answer_of(tensor: torch.Tensor) -> Answer:
    """Send a tensor: its numbers as the body, shape and dtype as headers."""
    tensor = tensor.cpu().contiguous()
    headers = {"shape": json.dumps(list(tensor.shape)), "dtype": str(tensor.dtype).removeprefix("torch.")}
    # Flat, as the strides of dimensions of size 1 may be anything, which a view as bytes does not take.
    return Answer(tensor.view(-1).view(torch.uint8).numpy().tobytes(), "tensor/binary", headers)


def sentence_of(error: RequestValidationError) -> str:
    """Put what is wrong with the parameters of a request into one sentence."""
    found: Any = error.errors()[0]
    name = found["loc"][1] if len(found["loc"]) > 1 else found["loc"][0]
    if found["type"] == "missing":
        return f"`{name}` must be given."
    if found["type"] == "extra_forbidden":
        return f"`{name}` is no parameter of this route."
    rule = found["msg"].replace("Input should be", "must be")
    return f"`{name}` {one_line(rule)}, got {one_line(repr(found['input']))}."


def _check_shape(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Return batch size, frames, height and width of a shape of images or videos."""
    if len(shape) not in (4, 5):
        raise Refusal(400, f"`shape` must have 4 numbers for images or 5 for videos, got {len(shape)}.")
    if min(shape) < 1:
        raise Refusal(400, f"`shape` must have positive numbers, got {list(shape)}.")
    if max(shape[0], shape[1]) > _MAX_NUMBER:  # other numbers are bounded with the pixels
        raise Refusal(400, f"`shape` must have numbers of at most {_MAX_NUMBER}, got {list(shape)}.")
    return shape[0], shape[2] if len(shape) == 5 else 1, shape[-2], shape[-1]


def _num_bytes(shape: Sequence[int], dtype: str) -> int:
    return math.prod(shape) * getattr(torch, dtype).itemsize


def _outline(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor without numbers, for the checks of the model."""
    shape = shape if len(shape) == 5 else [*shape[:2], 1, *shape[2:]]
    return torch.empty(1, dtype=dtype, device="meta").expand(*shape)

"""The file of latents that `leanvae encode` writes: one tensor, and what it takes to come back to a video."""

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import safetensors
import torch

from .._version import __version__
from ..atomic import partial_path, remove_stale_partials, replace_file
from ..video_io import VideoError
from ..video_io.containers import named_write_errors


_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_COPY_BYTES = 2**24  # moved at a time when a file is laid out
_END_BYTES = 2**20  # of a file's two ends, by which it is known again
_FINEST = 10**9  # parts of a second that time stamps are rounded to if they have no common unit


@dataclass(frozen=True)
class LatentsInfo:
    """Metadata of a file of latents: the model that made it, and the video that it came from.

    Attributes:
        model: Name, absolute path or Hub id of the autoencoder that made the latents.
        fps: Frame rate as a fraction, for instance `"30000/1001"`; the average where frames have times.
        num_frames: Frames of the video before padding.
        height: Height in pixels before padding.
        width: Width in pixels before padding.
        source: Name of the encoded file.
        is_image: Whether the source was a single image.
        version: Version of this package.
        revision: Commit of a model on the Hub.
        weights_sha256: Checksum of the model's weights, see [`weights_sha256`]; empty if not known.
        pixel_aspect_ratio: Width of a pixel over its height, as a fraction.
        start: Time of the first frame in the source, in seconds, as a fraction.
        time_unit: Unit of the times of frames in seconds, as a fraction; empty if the frame rate is constant.
        has_sound: Whether sound, subtitles, chapters or metadata of the source are kept with the latents.
        end: Seconds from the first frame to the end of the last one, as a fraction; empty if that one lasts `1 / fps`.
        fingerprint: Of the encoded file, see [`fingerprint`]; empty if not known.
    """

    model: str
    fps: str
    num_frames: int
    height: int
    width: int
    source: str
    is_image: bool
    version: str = __version__
    revision: str | None = None
    weights_sha256: str = ""
    pixel_aspect_ratio: str = "1"
    start: str = "0"
    time_unit: str = ""
    has_sound: bool = False
    end: str = ""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise TypeError(f"`{name}` must be a positive integer, got {value!r}")
        for name in ("fps", "pixel_aspect_ratio"):
            if not _fraction(value := getattr(self, name)) > 0:
                raise TypeError(f"`{name}` must be a positive fraction, got {value!r}")
        if not _fraction(self.start) >= 0:
            raise TypeError(f"`start` must be a fraction from 0 on, got {self.start!r}")
        for name in ("time_unit", "end"):
            if (value := getattr(self, name)) != "" and not _fraction(value) > 0:
                raise TypeError(f"`{name}` must be empty or a positive fraction, got {value!r}")

    def check_weights(self, checksum: str, source: str | Path, argument: str = "vae", advice: str = "") -> None:
        """Refuse weights with another checksum than those that encoded, if those are known.

        Args:
            checksum: [`weights_sha256`] of the model as it is stored.
            source: What to call the file of latents.
            argument: What to call the model.
            advice: The end of the sentence.
        """
        if self.weights_sha256 not in ("", checksum):
            raise ValueError(
                f"`{argument}` must have the weights that encoded {str(source)!r}, those of {self.model!r} with the "
                f"SHA-256 {self.weights_sha256[:12]}..., got others, {checksum[:12]}...{advice}."
            )


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, TypeError, ZeroDivisionError):
        return Fraction(-1)


@contextmanager
def open_latents(path: str | Path) -> Iterator[tuple[Any, LatentsInfo]]:
    """Open a file of latents.

    Yields:
        The latents `(1, z, t, h, w)`, of which only what is sliced out is read, and their metadata.

    Raises:
        ValueError: If the file is not one that `encode_video` wrote.
    """
    with ExitStack() as resources:
        with _named_errors(path):  # not of what the caller does with it
            file = resources.enter_context(safetensors.safe_open(path, "pt"))
            info = _read_info(file.metadata() or {})
            latents = file.get_slice("latents")
        yield latents, info


def _read_info(metadata: dict[str, str]) -> LatentsInfo:
    if "leanvae" not in metadata:
        raise TypeError("it must have metadata named 'leanvae', got none")
    values = json.loads(metadata["leanvae"])
    if not isinstance(values, dict):
        raise TypeError(f"its metadata 'leanvae' must be a mapping, got {values!r}")
    return LatentsInfo(**values)


@contextmanager
def _named_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"`path` must be a latents file of `leanvae encode`, got {str(path)!r} ({error}).") from None


def read_times(path: str | Path) -> list[Fraction] | None:
    """Read when each frame of an encoded video is shown, seconds from the first; `None` if the rate is constant.

    Raises:
        ValueError: If the file is not one that `encode_video` wrote.
    """
    with open_latents(path) as (_, info):
        if not info.time_unit:
            return None
        with _named_errors(path), safetensors.safe_open(path, "pt") as file:
            ticks = file.get_tensor("times")
            if ticks.dtype != torch.int64 or ticks.shape != (info.num_frames,):
                raise TypeError(
                    f"`times` must be int64, as many as frames, {info.num_frames}, got {ticks.dtype} of shape "
                    f"{tuple(ticks.shape)}"
                )
    return [Fraction(info.time_unit) * tick for tick in ticks.tolist()]


def fingerprint(path: str | Path) -> str:
    """Tell a file from others of its name: its size, and the SHA-256 of its first and its last MiB."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(_END_BYTES))
        file.seek(max(size - _END_BYTES, 0))
        digest.update(file.read(_END_BYTES))
    return f"{size}-{digest.hexdigest()}"


def copy_sound(path: str | Path, target: Path) -> None:
    """Write the Matroska file with the sound of an encoded video to `target`."""
    with _named_errors(path), safetensors.safe_open(path, "pt") as file:
        num_bytes = file.get_slice("sound").get_shape()[0]
    with open(target, "wb") as output:
        for begin in range(0, num_bytes, _COPY_BYTES):
            # Opened again for every piece: what was read of a mapped file stays in memory until it is closed.
            with _named_errors(path), safetensors.safe_open(path, "pt") as file:
                piece = file.get_slice("sound")[begin : begin + _COPY_BYTES]
            output.write(piece.numpy().data)


@torch.no_grad()
def weights_sha256(model: torch.nn.Module) -> str:
    """Compute a checksum of the weights of a model: of names, shapes and values, as float32.

    The same weights in a file of another layout, or of another dtype that holds them exactly, have the same checksum.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        if not tensor.is_floating_point():
            digest.update(str(tensor.tolist()).encode())
            continue
        digest.update(tensor.float().contiguous().cpu().numpy().data)
    return digest.hexdigest()


class LatentsWriter:
    """Write latents, chunk by chunk, to a safetensors file whose length is known only at the end; a context manager.

    Chunks are spooled, time first, to a hidden file in the same folder; `close` lays them out as `(1, z, t, h, w)`.
    The file appears under its name when it is complete.

    Raises:
        VideoError: If the folder cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._spool_path = partial_path(path, "spool")
        self._shape: tuple[int, ...] = ()
        self._num_latent_frames = 0
        self._dtype = torch.float32

    def __enter__(self) -> Self:
        remove_stale_partials(self.path)
        try:
            self._spool = open(self._spool_path, "wb")
        except OSError as error:
            raise VideoError(f"`target` must be writable, got {str(self.path)!r}: {error.strerror}.") from None
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # on a full disk what could not be written is tried once more
            self._spool.close()
        self._spool_path.unlink(missing_ok=True)

    def write(self, latents: torch.Tensor | None) -> None:
        """Append latents `(1, z, t, h, w)`; `None` is nothing to append.

        Raises:
            VideoError: If they are not finite, or the disk is full.
        """
        if latents is None:
            return
        if not latents.isfinite().all():
            raise VideoError("Latents must be finite, got others: the weights hold some, or their dtype overflows.")
        by_time = latents[0].transpose(0, 1).contiguous().cpu()  # (t, z, h, w)
        self._shape, self._dtype = tuple(by_time.shape[1:]), by_time.dtype
        self._num_latent_frames += by_time.shape[0]
        with named_write_errors(self.path):
            # Flat, as the strides of dimensions of size 1 may be anything, which a view as bytes does not take.
            self._spool.write(by_time.view(-1).view(torch.uint8).numpy().data)

    def close(
        self, info: LatentsInfo, times: Sequence[Fraction] | None = None, sound: Path | None = None
    ) -> LatentsInfo:
        """Finish the file and give it its name.

        Args:
            info: What is known of the video.
            times: When each frame is shown, seconds from the first; `None` if the rate is constant.
            sound: Matroska file with the sound, which is copied into the file.

        Returns:
            The metadata as they were written.

        Raises:
            VideoError: If nothing was written, or the file cannot be stored.
        """
        with named_write_errors(self.path):
            self._spool.close()
        if self._num_latent_frames == 0:
            raise VideoError(f"{info.source!r} must hold at least one frame, got none.")
        z, h, w = self._shape
        ticks, unit = _to_ticks(times or ())
        info = replace(info, time_unit="" if times is None else str(unit), has_sound=sound is not None)
        sizes = {  # the largest numbers first, so that all lie where processors want them
            "times": 8 * len(ticks),
            "latents": self._num_latent_frames * z * h * w * self._dtype.itemsize,
            "sound": 0 if sound is None else os.stat(sound).st_size,
        }
        kinds = {"times": "I64", "latents": _SAFETENSORS_DTYPES[self._dtype], "sound": "U8"}
        shapes = {"times": [len(ticks)], "latents": [1, z, self._num_latent_frames, h, w], "sound": [sizes["sound"]]}
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "leanvae": json.dumps(asdict(info))}}
        end = 0
        for name, size in sizes.items():
            if size:
                offsets = [end, end := end + size]
                header[name] = {"dtype": kinds[name], "shape": shapes[name], "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
        with (
            named_write_errors(self.path),
            replace_file(self.path) as partial,
            open(partial, "wb") as file,
            open(self._spool_path, "rb") as spool,
        ):
            file.write(struct.pack("<Q", len(text)) + text + struct.pack(f"<{len(ticks)}q", *ticks))
            start, plane = file.tell(), h * w * self._dtype.itemsize
            file.truncate(start + sizes["latents"])
            step = max(_COPY_BYTES // (z * plane), 1)  # frames at a time
            for begin in range(0, self._num_latent_frames, step):
                data = torch.frombuffer(bytearray(spool.read(step * z * plane)), dtype=torch.uint8)
                for channel, planes in enumerate(data.view(-1, z, plane).unbind(1)):
                    file.seek(start + (channel * self._num_latent_frames + begin) * plane)
                    file.write(planes.contiguous().numpy().data)
            if sound is not None:
                file.seek(start + sizes["latents"])
                with open(sound, "rb") as data:
                    shutil.copyfileobj(data, file, _COPY_BYTES)
        return info


def _to_ticks(times: Sequence[Fraction]) -> tuple[list[int], Fraction]:
    """Turn times into whole multiples of one unit, exactly unless there is no sensible one."""
    unit = Fraction(1, math.lcm(*{time.denominator for time in times}))
    if unit.denominator > _FINEST:
        unit = Fraction(1, _FINEST)
    return [round(time / unit) for time in times], unit

"""The file of latents that `leanvae encode` writes: one tensor, and what it takes to come back to a video."""

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import safetensors
import torch

from .._version import __version__
from ..atomic import partial_path, remove_stale_partials, replace_file
from ..video_io import VideoError


_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_COPY_BYTES = 2**24  # moved at a time when a file is laid out


@dataclass(frozen=True)
class LatentsInfo:
    """Metadata of a file of latents: the model that made it, and the video that it came from.

    Attributes:
        model: Name, path or Hub id of the autoencoder that made the latents.
        fps: Frame rate as a fraction, for instance `"30000/1001"`.
        num_frames: Frames of the video before padding.
        height: Height in pixels before padding.
        width: Width in pixels before padding.
        source: Name of the encoded file.
        is_image: Whether the source was a single image.
        version: Version of this package.
    """

    model: str
    fps: str
    num_frames: int
    height: int
    width: int
    source: str
    is_image: bool
    version: str = __version__


@contextmanager
def open_latents(path: str | Path) -> Iterator[tuple[Any, LatentsInfo]]:
    """Open a file of latents.

    Yields:
        The latents `(1, z, t, h, w)`, of which only what is sliced out is read, and their metadata.

    Raises:
        ValueError: If the file is not one that `encode_video` wrote.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            info = LatentsInfo(**json.loads((file.metadata() or {})["leanvae"]))
            yield file.get_slice("latents"), info
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"`path` must be a latents file of `leanvae encode`, got {str(path)!r} ({error}).") from None


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
        self._spool.close()
        self._spool_path.unlink(missing_ok=True)

    def write(self, latents: torch.Tensor | None) -> None:
        """Append latents `(1, z, t, h, w)`; `None` is nothing to append."""
        if latents is None:
            return
        by_time = latents[0].transpose(0, 1).contiguous().cpu()  # (t, z, h, w)
        self._shape, self._dtype = tuple(by_time.shape[1:]), by_time.dtype
        self._num_latent_frames += by_time.shape[0]
        self._spool.write(by_time.view(torch.uint8).numpy().data)

    def close(self, info: LatentsInfo) -> None:
        """Finish the file and give it its name.

        Raises:
            VideoError: If nothing was written.
        """
        self._spool.close()
        if self._num_latent_frames == 0:
            raise VideoError(f"{info.source!r} must hold at least one frame, got none.")
        z, h, w = self._shape
        num_bytes = self._num_latent_frames * z * h * w * self._dtype.itemsize
        header = {
            "__metadata__": {"format": "pt", "leanvae": json.dumps(asdict(info))},
            "latents": {
                "dtype": _SAFETENSORS_DTYPES[self._dtype],
                "shape": [1, z, self._num_latent_frames, h, w],
                "data_offsets": [0, num_bytes],
            },
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
        with (
            replace_file(self.path) as partial,
            open(partial, "wb") as file,
            open(self._spool_path, "rb") as spool,
        ):
            file.write(struct.pack("<Q", len(text)) + text)
            start, plane = file.tell(), h * w * self._dtype.itemsize
            file.truncate(start + num_bytes)
            step = max(_COPY_BYTES // (z * plane), 1)  # frames at a time
            for begin in range(0, self._num_latent_frames, step):
                data = torch.frombuffer(bytearray(spool.read(step * z * plane)), dtype=torch.uint8)
                for channel, planes in enumerate(data.view(-1, z, plane).unbind(1)):
                    file.seek(start + (channel * self._num_latent_frames + begin) * plane)
                    file.write(planes.contiguous().numpy().data)

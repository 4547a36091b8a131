"""From file to file through an autoencoder: reconstruct, encode, decode, in memory that does not grow with length.

Frames flow reader -> padding -> `StreamingEncoder` -> `StreamingDecoder` -> crop -> writer in small groups. Outputs
are written beside and renamed, so that whatever carries the final name is whole.
"""

import json
import struct
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import safetensors
import torch

from ._version import __version__
from .data import pixels_to_sample, resize_frames, short_side_size
from .evaluation.metrics import frame_psnr, frame_ssim
from .padding import pad_frames
from .streaming import StreamingDecoder, StreamingEncoder
from .video_io import (
    IMAGE_EXTENSIONS,
    VideoError,
    VideoWriter,
    iter_video,
    partial_path,
    probe_video,
    remove_stale_partials,
)


Progress = Callable[[int], Any]  # told how many frames were just finished

_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


@dataclass(frozen=True)
class LatentsInfo:
    r"""What an encoded file remembers, to come back to a video.

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


def parse_size(size: str) -> tuple[int, int] | int:
    r"""`"256"` is a short side, `"640x360"` a width and a height."""
    parts = size.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"`size` must be a short side such as 256 or WIDTHxHEIGHT such as 640x360, got {size!r}.")
    return int(parts[0]) if len(parts) == 1 else (int(parts[1]), int(parts[0]))


def _read_frames(
    path: str | Path, start: int, num_frames: int | None, size: str | None, chunk_size: int
) -> Iterator[torch.Tensor]:
    target = None if size is None else parse_size(size)
    for frames in iter_video(path, start=start, num_frames=num_frames, chunk_size=chunk_size):
        if target is not None:
            height, width = (
                short_side_size(frames.shape[1], frames.shape[2], target) if isinstance(target, int) else target
            )
            frames = resize_frames(frames, height, width)
        yield frames


def _to_sample(frames: torch.Tensor, vae: Any) -> torch.Tensor:
    r"""uint8 `(T, H, W, 3)` to a padded `(1, 3, T, H', W')` in `[-1, 1]` of the model's dtype."""
    sample = pixels_to_sample(frames.to(vae.device)).to(vae.dtype).permute(3, 0, 1, 2)[None]
    return pad_frames(sample, vae.spatial_compression_ratio)


def _to_unit(sample: torch.Tensor, height: int, width: int) -> torch.Tensor:
    r"""Network output to `(T, 3, H, W)` float32 in [0, 1], cut to size."""
    return sample[0, :, :, :height, :width].transpose(0, 1).float().add(1).div(2).clamp(0, 1)


def _to_pixels(unit: torch.Tensor) -> torch.Tensor:
    return unit.mul(255).round().byte().permute(0, 2, 3, 1).cpu()


@torch.inference_mode()
def reconstruct_video(
    vae: Any,
    source: str | Path,
    target: str | Path,
    *,
    start: int = 0,
    num_frames: int | None = None,
    size: str | None = None,
    side_by_side: bool = False,
    metrics: bool = False,
    num_frames_per_step: int = 16,
    progress: Progress | None = None,
    **writer_options: Any,
) -> dict[str, Any]:
    r"""Encode and decode a video or image file; any length, any size.

    Args:
        vae: The autoencoder, on its device, in its dtype.
        source: Video or image to read.
        target: File to write; sound is copied along when the whole clip is reconstructed.
        start: First frame.
        num_frames: Frames to take, all by default.
        size: Resize before encoding, see [`parse_size`].
        side_by_side: Write the original to the left of the reconstruction.
        metrics: Compute PSNR and SSIM.
        num_frames_per_step: Frames that pass the network at once.
        progress: Called with the number of frames just written.
        writer_options: For `VideoWriter` (`codec`, `crf`, ...).

    Returns:
        `num_frames`, `height`, `width`, `fps`; with `metrics` also `psnr_frame_mean_rgb` in dB and
        `ssim_frame_mean_rgb`, of the reconstruction before it is rounded and compressed.
    """
    info = probe_video(source)
    is_whole = start == 0 and num_frames is None and info.has_audio
    encoder = StreamingEncoder(vae, num_frames_per_step)
    decoder = StreamingDecoder(vae, num_frames_per_step // vae.temporal_compression_ratio)
    originals: deque[torch.Tensor] = deque()  # read, not yet reconstructed
    psnr: list[float] = []
    ssim: list[float] = []
    height = width = 0

    with VideoWriter(target, info.fps, audio_from=source if is_whole else None, **writer_options) as writer:

        def finish(output: torch.Tensor | None) -> None:
            if output is None:
                return
            unit = _to_unit(output, height, width)[: len(originals)]
            original = torch.stack([originals.popleft() for _ in range(len(unit))])
            if metrics:
                reference = original.to(unit.device).permute(0, 3, 1, 2).float().div(255)
                psnr.extend(frame_psnr(unit, reference).tolist())
                ssim.extend(frame_ssim(unit, reference).tolist())
            pixels = _to_pixels(unit)
            writer.write(torch.cat((original, pixels), dim=2) if side_by_side else pixels)
            if progress is not None:
                progress(len(unit))

        for frames in _read_frames(source, start, num_frames, size, num_frames_per_step):
            height, width = frames.shape[1:3]
            originals.extend(frames)
            latents = encoder.push(_to_sample(frames, vae))
            if latents is not None:
                finish(decoder.push(latents))
        latents = encoder.flush()
        if latents is not None:
            finish(decoder.push(latents))
        finish(decoder.flush())
        summary = {"num_frames": writer.num_frames, "height": height, "width": width, "fps": str(info.fps)}
    if metrics:
        summary |= {"psnr_frame_mean_rgb": sum(psnr) / len(psnr), "ssim_frame_mean_rgb": sum(ssim) / len(ssim)}
    return summary


@torch.inference_mode()
def encode_video(
    vae: Any,
    source: str | Path,
    target: str | Path,
    *,
    model: str,
    start: int = 0,
    num_frames: int | None = None,
    size: str | None = None,
    num_frames_per_step: int = 16,
    progress: Progress | None = None,
) -> LatentsInfo:
    r"""Encode a video or image file into `target`, a safetensors file with one tensor `latents` `(1, z, t, h, w)`.

    The latents are posterior means, not normalised. Arguments as of [`reconstruct_video`]; `model` is stored with
    them.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"`target` must end in .safetensors, got {str(target)!r}.")
    video = probe_video(source)
    encoder = StreamingEncoder(vae, num_frames_per_step)
    height = width = count = 0
    with _LatentsWriter(target) as writer:
        for frames in _read_frames(source, start, num_frames, size, num_frames_per_step):
            height, width = frames.shape[1:3]
            count += len(frames)
            writer.write(encoder.push(_to_sample(frames, vae)))
            if progress is not None:
                progress(len(frames))
        writer.write(encoder.flush())
        info = LatentsInfo(
            model=model,
            fps=str(video.fps),
            num_frames=count,
            height=height,
            width=width,
            source=Path(source).name,
            is_image=video.is_image and count == 1,
        )
        writer.close(info)
    return info


@torch.inference_mode()
def decode_video(
    vae: Any,
    source: str | Path,
    target: str | Path,
    *,
    num_frames_per_step: int = 16,
    progress: Progress | None = None,
    **writer_options: Any,
) -> LatentsInfo:
    r"""Decode what [`encode_video`] wrote to a video or image of the original size, length and frame rate."""
    step = max(1, num_frames_per_step // vae.temporal_compression_ratio)
    decoder = StreamingDecoder(vae, step)
    with open_latents(source) as (latents, info):
        if latents.get_shape()[1] != vae.latent_channels:
            raise ValueError(
                f"`vae` must have the {latents.get_shape()[1]} latent channels of {str(source)!r}, got "
                f"{vae.latent_channels}; made by model {info.model!r}."
            )
        num_latent_frames = latents.get_shape()[2]
        with VideoWriter(target, Fraction(info.fps), **writer_options) as writer:
            for begin in range(0, num_latent_frames + step, step):
                is_end = begin >= num_latent_frames
                chunk = None if is_end else latents[:, :, begin : begin + step].to(vae.device, vae.dtype)
                output = decoder.flush() if chunk is None else decoder.push(chunk)
                if output is None:
                    continue
                pixels = _to_pixels(_to_unit(output, info.height, info.width))[: info.num_frames - writer.num_frames]
                writer.write(pixels)
                if progress is not None:
                    progress(len(pixels))
    return info


@contextmanager
def open_latents(path: str | Path) -> Iterator[tuple[Any, LatentsInfo]]:
    r"""The lazily read `latents` of a file of [`encode_video`] (slice them), and what it remembers.

    Raises:
        ValueError: If the file is not one of ours.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            info = LatentsInfo(**json.loads((file.metadata() or {})["leanvae"]))
            yield file.get_slice("latents"), info
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"`path` must be a latents file of `leanvae encode`, got {str(path)!r} ({error}).") from None


class _LatentsWriter:
    r"""Streams latents into a safetensors file whose length is known only at the end.

    Chunks are spooled as they come (time first) beside the target; `close` lays them out as `(1, z, t, h, w)` through
    a memory map, and renames.
    """

    def __init__(self, path: Path):
        self.path = path
        remove_stale_partials(path)
        self.spool_path = partial_path(path, "spool")
        self.partial_path = partial_path(path, "partial")
        self.shape: tuple[int, ...] = ()
        self.num_latent_frames = 0
        self.dtype = torch.float32

    def __enter__(self) -> "_LatentsWriter":
        try:
            self.spool = open(self.spool_path, "wb")
        except OSError as error:
            raise VideoError(f"`target` must be writable, got {str(self.path)!r}: {error.strerror}.") from None
        return self

    def __exit__(self, *_: object) -> None:
        self.spool.close()
        self.spool_path.unlink(missing_ok=True)
        self.partial_path.unlink(missing_ok=True)

    def write(self, latents: torch.Tensor | None) -> None:
        if latents is None:
            return
        by_time = latents[0].transpose(0, 1).contiguous().cpu()  # (t, z, h, w)
        self.shape, self.dtype = tuple(by_time.shape[1:]), by_time.dtype
        self.num_latent_frames += by_time.shape[0]
        self.spool.write(by_time.view(torch.uint8).numpy().data)

    def close(self, info: LatentsInfo) -> None:
        self.spool.close()
        if self.num_latent_frames == 0:
            raise VideoError(f"{info.source!r} must hold at least one frame, got none.")
        z, h, w = self.shape
        num_bytes = self.num_latent_frames * z * h * w * self.dtype.itemsize
        header = {
            "__metadata__": {"format": "pt", "leanvae": json.dumps(asdict(info))},
            "latents": {
                "dtype": _SAFETENSORS_DTYPES[self.dtype],
                "shape": [1, z, self.num_latent_frames, h, w],
                "data_offsets": [0, num_bytes],
            },
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
        with open(self.partial_path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + num_bytes)
        size = 8 + len(text) + num_bytes
        storage: Any = torch.UntypedStorage.from_file(str(self.partial_path), shared=True, nbytes=size)
        target = torch.empty(0, dtype=torch.uint8).set_(storage)[8 + len(text) :].view(self.dtype)
        target = target.view(z, self.num_latent_frames, h, w)
        spool: Any = torch.UntypedStorage.from_file(str(self.spool_path), shared=False, nbytes=num_bytes)
        source = torch.empty(0, dtype=self.dtype).set_(spool).view(self.num_latent_frames, z, h, w)
        for begin in range(0, self.num_latent_frames, 64):
            target[:, begin : begin + 64] = source[begin : begin + 64].transpose(0, 1)
        del target, source, storage, spool  # unmap before the file gets its name
        self.partial_path.replace(self.path)


def default_suffix(path: str | Path) -> str:
    r"""The extension for the reconstruction of a file: `.png` for images, `.mp4` for videos."""
    is_still = Path(path).suffix.lower() in IMAGE_EXTENSIONS and Path(path).suffix.lower() != ".gif"
    return ".png" if is_still else ".mp4"

"""From file to file through an autoencoder: reconstruct, encode, decode, in memory that does not grow with length.

Frames flow reader -> padding -> `StreamingEncoder` -> `StreamingDecoder` -> crop -> writer in small groups. Outputs
appear under their names when they are complete.
"""

import gc
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..evaluation.metrics import frame_psnr, frame_ssim
from ..models.temporal_cache import TemporalCache
from ..models.video_autoencoder import VideoAutoencoder
from ..video_io import VideoInfo, VideoReader, VideoWriter
from ..video_io.pixels import (
    pixels_to_sample,
    pixels_to_unit,
    resize_frames,
    sample_to_unit,
    short_side_size,
    unit_to_pixels,
)
from ..video_io.reader import IMAGE_EXTENSIONS
from .latents_file import LatentsInfo, LatentsWriter, open_latents
from .memory import GARBAGE_BYTES, VideoJob, plan_streams
from .padding import pad_frames
from .streaming import StreamingDecoder, StreamingEncoder


Progress = Callable[[int], Any]  # told how many frames were just finished


@dataclass(frozen=True)
class Excerpt:
    """The part of a video to take, and its size.

    Attributes:
        start: First frame.
        num_frames: Frames to take, all by default.
        size: What to resize to before encoding: a short side such as `"256"`, or a width and a height as `"640x360"`.

    Raises:
        ValueError: If `size` has neither form.
    """

    start: int = 0
    num_frames: int | None = None
    size: str | None = None

    def __post_init__(self) -> None:
        parts = [] if self.size is None else self.size.lower().split("x")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(
                f"`size` must be a short side such as 256 or WIDTHxHEIGHT such as 640x360, got {self.size!r}."
            )

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width after resizing."""
        if self.size is None:
            return height, width
        edges = [int(part) for part in self.size.lower().split("x")]
        return short_side_size(height, width, edges[0]) if len(edges) == 1 else (edges[1], edges[0])

    def length(self, info: VideoInfo) -> int | None:
        """Return the number of frames to take as far as the header tells, or `None`."""
        in_file = None if info.num_frames is None else info.num_frames - self.start
        counts = [count for count in (self.num_frames, in_file) if count is not None]
        return max(min(counts), 1) if counts else None

    def read(self, video: VideoReader) -> Iterator[torch.Tensor]:
        """Yield the frames one by one, uint8 `(1, height, width, 3)`: a step's are collected as samples."""
        stop = None if self.num_frames is None else self.start + self.num_frames
        garbage = 0
        for frame in video.frames(self.start, stop, chunk_size=1):
            # Looking at the side data of a decoded frame makes a reference cycle, and Python's collector, which counts
            # objects and not bytes, would come after hundreds of frames. A decoded frame is half as large as RGB.
            garbage += frame.nbytes // 2
            if garbage > GARBAGE_BYTES:
                gc.collect()
                garbage = 0
            yield resize_frames(frame, *self.resized(*frame.shape[1:3]))


WHOLE = Excerpt()


@torch.inference_mode()
def reconstruct_video(
    vae: VideoAutoencoder,
    source: str | Path,
    target: str | Path,
    *,
    excerpt: Excerpt = WHOLE,
    side_by_side: bool = False,
    metrics: bool = False,
    num_frames_per_step: int = 16,
    max_memory: int | None = None,
    progress: Progress | None = None,
    **writer_options: Any,
) -> dict[str, Any]:
    """Encode and decode a video or image file; any length, any size.

    Args:
        vae: The autoencoder, on its device, in its dtype.
        source: Video or image to read.
        target: File to write; sound is copied along when the whole clip is reconstructed.
        excerpt: The part of `source` to take.
        side_by_side: Write the original to the left of the reconstruction.
        metrics: Compute PSNR and SSIM.
        num_frames_per_step: Frames that pass the network at once, at most.
        max_memory: Bytes that may be used above the weights. Steps and tiles are chosen to fit, whatever the model's
            tiling says; if needed the state of tiles is kept on disk next to `target`, and x264 does not look ahead
            (`preset="ultrafast"`, unless one is given). The pixels do not depend on it, up to float rounding.
        progress: Called with the number of frames just written.
        writer_options: For `VideoWriter` (`codec`, `crf`, ...).

    Returns:
        `num_frames`, `height`, `width`, `fps`; with `metrics` also `psnr_frame_mean_rgb` in dB and
        `ssim_frame_mean_rgb`, of the reconstruction before it is rounded and compressed.

    Raises:
        ValueError: If an argument or a file is not legal, or `max_memory` too small; it says what would do.
    """
    with VideoReader(source) as video:
        info = video.info
        height, width = excerpt.resized(info.height, info.width)
        keeps_originals = side_by_side or metrics
        job = VideoJob(excerpt.length(info), height, width, keeps_originals=keeps_originals, metrics=metrics)
        streams = _open_streams(vae, job, target, num_frames_per_step, max_memory, writer_options)
        is_whole = excerpt.start == 0 and excerpt.num_frames is None
        audio_from = source if is_whole and info.has_audio else None
        psnr, ssim = [], []
        with VideoWriter(target, info.fps, audio_from=audio_from, **streams.writer_options) as writer:
            frames = excerpt.read(video)
            for unit, original in reconstruct_frames(frames, streams.encoder, streams.decoder, keeps_originals):
                if metrics and original is not None:
                    reference = pixels_to_unit(original.to(unit.device)).permute(0, 3, 1, 2)
                    psnr += frame_psnr(unit, reference).tolist()
                    ssim += frame_ssim(unit, reference).tolist()
                writer.write(picture(unit, original if side_by_side else None))
                if progress is not None:
                    progress(1)
            video.close()  # before the target gets its name, which may be the source's
    summary = {"num_frames": writer.num_frames, "height": height, "width": width, "fps": str(info.fps)}
    if metrics:
        summary |= {"psnr_frame_mean_rgb": sum(psnr) / len(psnr), "ssim_frame_mean_rgb": sum(ssim) / len(ssim)}
    return summary


@torch.inference_mode()
def encode_video(
    vae: VideoAutoencoder,
    source: str | Path,
    target: str | Path,
    *,
    model: str,
    excerpt: Excerpt = WHOLE,
    num_frames_per_step: int = 16,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> LatentsInfo:
    """Encode a video or image file into `target`, a safetensors file with one tensor `latents` `(1, z, t, h, w)`.

    The latents are posterior means, not normalised. Arguments as of [`reconstruct_video`]; `model` is stored with
    them.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"`target` must end in .safetensors, got {str(target)!r}.")
    count = 0
    with VideoReader(source) as video:
        height, width = excerpt.resized(video.info.height, video.info.width)
        job = VideoJob(excerpt.length(video.info), height, width, decode=False)
        encoder = _open_streams(vae, job, target, num_frames_per_step, max_memory).encoder
        with LatentsWriter(target) as writer:
            for frame in excerpt.read(video):
                count += 1
                writer.write(encoder.push(_to_sample(frame, vae)))
                if progress is not None:
                    progress(1)
            writer.write(encoder.flush())
            info = LatentsInfo(
                model=model,
                fps=str(video.info.fps),
                num_frames=count,
                height=height,
                width=width,
                source=Path(source).name,
                is_image=video.info.is_image and count == 1,
            )
            writer.close(info)
    return info


@torch.inference_mode()
def decode_video(
    vae: VideoAutoencoder,
    source: str | Path,
    target: str | Path,
    *,
    num_frames_per_step: int = 16,
    max_memory: int | None = None,
    progress: Progress | None = None,
    **writer_options: Any,
) -> LatentsInfo:
    """Decode what [`encode_video`] wrote to a video or image of the original size, length and frame rate.

    Arguments as of [`reconstruct_video`].
    """
    with open_latents(source) as (latents, info):
        latent_channels = latents.get_shape()[1]
    if latent_channels != vae.latent_channels:
        raise ValueError(
            f"`vae` must have the {latent_channels} latent channels of {str(source)!r}, got {vae.latent_channels}; "
            f"made by model {info.model!r}."
        )
    job = VideoJob(info.num_frames, info.height, info.width, encode=False)
    streams = _open_streams(vae, job, target, num_frames_per_step, max_memory, writer_options)
    with VideoWriter(target, Fraction(info.fps), **streams.writer_options) as writer:
        units = _decode_frames(source, streams.decoder, info.height, info.width)
        for unit in itertools.islice(units, info.num_frames):
            writer.write(picture(unit))
            if progress is not None:
                progress(1)
    return info


def default_suffix(path: str | Path) -> str:
    """Return the extension for the reconstruction of a file: `.png` for images, `.mp4` for videos."""
    is_still = Path(path).suffix.lower() in IMAGE_EXTENSIONS and Path(path).suffix.lower() != ".gif"
    return ".png" if is_still else ".mp4"


# --- Frames through streams ------------------------------------------------------------------------------------------


class _Streams(NamedTuple):
    encoder: StreamingEncoder
    decoder: StreamingDecoder
    writer_options: dict[str, Any]


def _open_streams(
    vae: VideoAutoencoder,
    job: VideoJob,
    target: str | Path,
    num_frames_per_step: int,
    max_memory: int | None,
    writer_options: dict[str, Any] | None = None,
) -> _Streams:
    """Make encoder and decoder for one file, within `max_memory` where it is given."""
    writer_options = dict(writer_options or {})
    caches: list[TemporalCache | None] = [None, None]
    if max_memory is not None:
        is_free = writer_options.get("codec", "libx264") == "libx264" and "preset" not in writer_options
        plan, looks_ahead = plan_streams(
            vae,
            job,
            max_memory,
            num_frames_per_step=num_frames_per_step,
            looks_ahead=None if is_free else True,
        )
        if plan.overhead > 3:
            warnings.warn(
                f"`max_memory` leaves room for small tiles only: about {plan.overhead:.0f} times the work.",
                stacklevel=3,
            )
        if not looks_ahead:
            writer_options["preset"] = "ultrafast"
        num_frames_per_step = plan.num_frames_per_step
        # The state is parked in an unnamed file next to the output: there is room for large files, if anywhere.
        folder = Path(target).absolute().parent if plan.is_parked else None
        caches = [TemporalCache(folder, plan.layout) for _ in caches]
    encoder = StreamingEncoder(vae, num_frames_per_step, cache=caches[0])
    step = max(num_frames_per_step // vae.temporal_compression_ratio, 1)
    return _Streams(encoder, StreamingDecoder(vae, step, cache=caches[1]), writer_options)


def reconstruct_frames(
    frames: Iterable[torch.Tensor],
    encoder: StreamingEncoder,
    decoder: StreamingDecoder,
    keeps_originals: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Send frames through an encoder and a decoder; each comes out as soon as its step is done.

    Args:
        frames: uint8 `(1, height, width, 3)`, all of one size.
        encoder: A fresh stream.
        decoder: A fresh stream, with as many latent frames per step as the encoder gives.
        keeps_originals: Whether to keep frames in memory until their reconstructions come.

    Yields:
        For every frame, in order, its reconstruction `(1, 3, height, width)`, float32 in `[0, 1]`, and the frame
        itself, or `None` if it was not kept.
    """
    waiting: deque[torch.Tensor | None] = deque()  # for their reconstructions
    height = width = 0
    for frame in frames:
        height, width = frame.shape[1:3]
        waiting.append(frame if keeps_originals else None)
        latents = encoder.push(_to_sample(frame, encoder.vae))
        if latents is not None:
            yield from _with_originals(_unit_frames(decoder.push(latents), height, width), waiting)
    latents = encoder.flush()
    if latents is not None:
        yield from _with_originals(_unit_frames(decoder.push(latents), height, width), waiting)
    yield from _with_originals(_unit_frames(decoder.flush(), height, width), waiting)


def _with_originals(
    units: Iterator[torch.Tensor], waiting: deque[torch.Tensor | None]
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    while waiting and (unit := next(units, None)) is not None:  # the last frames may be padding
        yield unit, waiting.popleft()


def _decode_frames(source: str | Path, decoder: StreamingDecoder, height: int, width: int) -> Iterator[torch.Tensor]:
    """Yield the frames of a file of latents, `(1, 3, height, width)`, float32 in `[0, 1]`, with those of padding."""
    with open_latents(source) as (latents, _):
        num_latent_frames = latents.get_shape()[2]
    for begin in range(0, num_latent_frames, decoder.step):
        # Opened again for every step: what was read of a mapped file stays in memory until it is closed.
        with open_latents(source) as (latents, _):
            chunk = latents[:, :, begin : begin + decoder.step].to(decoder.vae.device, decoder.vae.dtype)
        yield from _unit_frames(decoder.push(chunk), height, width)
    yield from _unit_frames(decoder.flush(), height, width)


def _to_sample(frames: torch.Tensor, vae: VideoAutoencoder) -> torch.Tensor:
    """Turn uint8 `(T, H, W, 3)` into a padded `(1, 3, T, H', W')` in `[-1, 1]` of the model's dtype."""
    sample = pixels_to_sample(frames.to(vae.device)).to(vae.dtype).permute(3, 0, 1, 2)[None]
    return pad_frames(sample, vae.spatial_compression_ratio)


def _unit_frames(sample: torch.Tensor | None, height: int, width: int) -> Iterator[torch.Tensor]:
    """Cut decoded frames to size, one by one: all frames of a step once more as floats would double the memory."""
    for index in range(0 if sample is None else sample.shape[2]):
        assert sample is not None
        yield sample_to_unit(sample[0, :, index : index + 1, :height, :width].transpose(0, 1))


def picture(unit: torch.Tensor, original: torch.Tensor | None = None) -> torch.Tensor:
    """Round a frame `(1, 3, H, W)` in `[0, 1]` to uint8 `(1, H, W, 3)` on the CPU, right of `original` if given."""
    pixels = unit_to_pixels(unit).permute(0, 2, 3, 1).cpu()
    return pixels if original is None else torch.cat((original, pixels), dim=2)

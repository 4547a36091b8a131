"""From file to file through an autoencoder: reconstruct, encode, decode, in memory that does not grow with length.

Frames flow reader -> padding -> `StreamingEncoder` -> `StreamingDecoder` -> crop -> writer in small groups. Outputs
are written beside and renamed, so that whatever carries the final name is whole.
"""

import gc
import json
import os
import re
import struct
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import safetensors
import torch

from .._version import __version__
from ..atomic import commit, partial_path, remove_stale_partials
from ..evaluation.metrics import frame_psnr, frame_ssim
from ..models.leanvae_memory import OtherMemory, StreamPlan
from ..models.temporal_cache import TemporalCache
from ..video_io import VideoError, VideoInfo, VideoWriter, iter_video, probe_video
from ..video_io.pixels import (
    pixels_to_sample,
    pixels_to_unit,
    resize_frames,
    sample_to_unit,
    short_side_size,
    unit_to_pixels,
)
from ..video_io.reader import IMAGE_EXTENSIONS
from .padding import pad_frames
from .streaming import StreamingDecoder, StreamingEncoder


Progress = Callable[[int], Any]  # told how many frames were just finished

# Bytes per pixel that FFmpeg holds (`results/bench_memory.json`, cases `codec-*`, with a margin): a decoder, an
# encoder, each frame of x264's look-ahead, and what a thread of either adds.
_READER_BYTES, _WRITER_BYTES, _LOOKAHEAD_BYTES, _THREAD_BYTES = 20, 30, 4, 4
_LOOKAHEAD = 42  # frames, with those that wait to become B-frames
_WASTE_BYTES = 64 * 2**20  # decoded frames that wait for Python's collector
_LIBRARY_BYTES = 24 * 2**20  # buffers of PyTorch and FFmpeg at any size
_METRICS_BYTES = 12 * 16  # per pixel: float copies of a frame that PSNR and SSIM make

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
    path: str | Path, start: int, num_frames: int | None, size: tuple[int, int] | int | None
) -> Iterator[torch.Tensor]:
    r"""Frames one by one, `(1, H, W, 3)`: what a step needs is collected, already converted, in the stream."""
    waste = 0
    for frame in iter_video(path, start=start, num_frames=num_frames, chunk_size=1):
        # PyAV's frames refer to themselves once their side data were looked at, and Python's collector counts objects
        # and not bytes: by itself it comes after hundreds of frames. 4:2:0 is half of RGB.
        waste += frame.nbytes // 2
        if waste > _WASTE_BYTES:
            gc.collect()
            waste = 0
        yield frame if size is None else resize_frames(frame, *_resized(frame.shape[1], frame.shape[2], size))


def _resized(height: int, width: int, size: tuple[int, int] | int | None) -> tuple[int, int]:
    if isinstance(size, int):
        return short_side_size(height, width, size)
    return (height, width) if size is None else size


def parse_memory(text: str) -> int:
    r"""Bytes of `"2GiB"`, `"800MiB"`, `"1.5 GB"`, or a plain number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b?|b)?", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"`max_memory` must be a size such as 2GiB or 800MiB, got {text!r}.")
    unit = match[2] or "b"
    power = "bkmgt".index(unit[0])
    return int(float(match[1]) * (1024 if "i" in unit or len(unit) == 1 else 1000) ** power)


def plan_streams(
    vae: Any,
    num_frames: int | None,
    height: int,
    width: int,
    max_memory: int,
    *,
    num_frames_per_step: int = 16,
    encode: bool = True,
    decode: bool = True,
    keeps_originals: bool = False,
    metrics: bool = False,
    looks_ahead: bool | None = None,
) -> tuple[StreamPlan, bool]:
    r"""How the functions of this module keep within `max_memory` bytes above weights, and what they will take.

    Args:
        vae: The autoencoder.
        num_frames: Frames of the video, `None` if not known.
        height: Height of the video in pixels, after resizing.
        width: Width of the video in pixels, after resizing.
        max_memory: Bytes for the network, the streams' state, and all frames on their way, those in FFmpeg included.
        num_frames_per_step: Longest step to take.
        encode: Whether frames are read and encoded.
        decode: Whether latents are decoded and written.
        keeps_originals: Whether frames read are kept until their reconstruction comes.
        metrics: Whether PSNR and SSIM are computed.
        looks_ahead: Whether the video's encoder looks ahead; `None` chooses: not if that took more than an eighth.

    Returns:
        The plan, and whether the video's encoder looks ahead.

    Raises:
        ValueError: If nothing fits; it says what would.
    """
    vae.check_predicts_memory("max_memory")
    ratio = vae.spatial_compression_ratio

    def fit(looks_ahead: bool) -> tuple[StreamPlan, bool]:
        plan = vae.memory_model().fit_stream(
            (-(-height // ratio) * ratio, -(-width // ratio) * ratio),
            num_frames,
            vae.dtype.itemsize,
            max_memory,
            max_frames_per_step=num_frames_per_step,
            encode=encode,
            decode=decode,
            others=memory_beside_network(
                num_frames,
                height,
                width,
                encode=encode,
                decode=decode,
                keeps_originals=keeps_originals,
                metrics=metrics,
                looks_ahead=looks_ahead,
            ),
        )
        return plan, looks_ahead

    if looks_ahead is not None:
        return fit(looks_ahead)
    num_ahead = min(num_frames or _LOOKAHEAD, _LOOKAHEAD)
    if 8 * _LOOKAHEAD_BYTES * num_ahead * height * width <= max_memory:
        with suppress(ValueError):  # what does not fit with it may fit without
            return fit(True)
    return fit(False)


def memory_beside_network(
    num_frames: int | None,
    height: int,
    width: int,
    *,
    encode: bool = True,
    decode: bool = True,
    keeps_originals: bool = False,
    metrics: bool = False,
    looks_ahead: bool = True,
    num_threads: int | None = None,
) -> OtherMemory:
    r"""What FFmpeg and frames of 8 bits take; arguments as of [`plan_streams`], and FFmpeg's threads, one a core."""
    if num_threads is None:
        num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_pixels, threads = height * width, _THREAD_BYTES * num_threads
    fixed = _LIBRARY_BYTES + _METRICS_BYTES * metrics * num_pixels
    if encode:
        fixed += (_READER_BYTES + threads) * num_pixels
        fixed += min(_WASTE_BYTES, 3 * num_pixels // 2 * (num_frames or _WASTE_BYTES))
    return OtherMemory(
        fixed=fixed,
        per_step_frame=3 * num_pixels * keeps_originals,
        writer=(_WRITER_BYTES + threads) * num_pixels * (decode and num_frames != 1),
        per_written=_LOOKAHEAD_BYTES * num_pixels * (decode and looks_ahead),
        max_written=_LOOKAHEAD,
    )


class _Streams:
    r"""Encoder and decoder for one file, within `max_memory` where it is given."""

    def __init__(
        self,
        vae: Any,
        target: str | Path,
        size: tuple[int | None, int, int],
        num_frames_per_step: int,
        max_memory: int | None,
        writer_options: dict[str, Any],
        **what: bool,
    ):
        self.writer_options = dict(writer_options)
        caches: list[TemporalCache | None] = [None, None]
        if max_memory is not None:
            is_free = self.writer_options.get("codec", "libx264") == "libx264" and "preset" not in self.writer_options
            plan, looks_ahead = plan_streams(
                vae,
                *size,
                max_memory,
                num_frames_per_step=num_frames_per_step,
                looks_ahead=None if is_free else True,
                **what,
            )
            if plan.overhead > 3:
                warnings.warn(
                    f"`max_memory` leaves room for small tiles only: about {plan.overhead:.0f} times the work.",
                    stacklevel=3,
                )
            if not looks_ahead:
                self.writer_options["preset"] = "ultrafast"
            num_frames_per_step = plan.num_frames_per_step
            # The state is parked in an unnamed file beside the output: there is room for large files, if anywhere.
            folder = Path(target).absolute().parent if plan.is_parked else None
            caches = [TemporalCache(folder, plan.layout) for _ in caches]
        self.encoder = StreamingEncoder(vae, num_frames_per_step, cache=caches[0])
        step = max(num_frames_per_step // vae.temporal_compression_ratio, 1)
        self.decoder = StreamingDecoder(vae, step, cache=caches[1])


def _num_frames(info: VideoInfo, start: int, num_frames: int | None) -> int | None:
    r"""Frames that will be read, as far as the header tells."""
    counts = [n for n in (num_frames, None if info.num_frames is None else info.num_frames - start) if n is not None]
    return max(min(counts), 1) if counts else None


def _to_sample(frames: torch.Tensor, vae: Any) -> torch.Tensor:
    r"""uint8 `(T, H, W, 3)` to a padded `(1, 3, T, H', W')` in `[-1, 1]` of the model's dtype."""
    sample = pixels_to_sample(frames.to(vae.device)).to(vae.dtype).permute(3, 0, 1, 2)[None]
    return pad_frames(sample, vae.spatial_compression_ratio)


def reconstruct_frames(
    frames: Iterable[torch.Tensor], encoder: StreamingEncoder, decoder: StreamingDecoder
) -> Iterator[torch.Tensor]:
    r"""Frames through an encoder and a decoder, one by one, each as soon as its step is done.

    Args:
        frames: uint8 `(1, height, width, 3)`, all of one size.
        encoder: A fresh stream.
        decoder: A fresh stream, with as many latent frames per step as the encoder gives.

    Yields:
        For every frame, in order, its reconstruction `(1, 3, height, width)`, float32 in `[0, 1]`.
    """
    num_waiting = height = width = 0
    for frame in frames:
        height, width = frame.shape[1:3]
        num_waiting += 1
        latents = encoder.push(_to_sample(frame, encoder.vae))
        if latents is not None:
            for unit in _units(decoder.push(latents), height, width, num_waiting):
                num_waiting -= 1
                yield unit
    latents = encoder.flush()
    if latents is not None:
        for unit in _units(decoder.push(latents), height, width, num_waiting):
            num_waiting -= 1
            yield unit
    yield from _units(decoder.flush(), height, width, num_waiting)


def _units(sample: torch.Tensor | None, height: int, width: int, limit: int) -> Iterator[torch.Tensor]:
    r"""Frame by frame, for a step's frames once more as floats would double the memory. At most `limit`."""
    for index in range(0 if sample is None else min(sample.shape[2], limit)):
        assert sample is not None
        yield sample_to_unit(sample[0, :, index : index + 1, :height, :width].transpose(0, 1))


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
    max_memory: int | None = None,
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
        num_frames_per_step: Frames that pass the network at once, at most.
        max_memory: Bytes that may be used above the weights. Steps and tiles are chosen to fit, whatever the model's
            tiling says; if needed the state of tiles is kept on disk beside `target`, and x264 looks ahead no frames
            (`preset="ultrafast"`, unless one is given). The pixels do not depend on it, up to float rounding.
        progress: Called with the number of frames just written.
        writer_options: For `VideoWriter` (`codec`, `crf`, ...).

    Returns:
        `num_frames`, `height`, `width`, `fps`; with `metrics` also `psnr_frame_mean_rgb` in dB and
        `ssim_frame_mean_rgb`, of the reconstruction before it is rounded and compressed.

    Raises:
        ValueError: If an argument or a file is not legal, or `max_memory` too small; it says what would do.
    """
    info = probe_video(source)
    is_whole = start == 0 and num_frames is None and info.has_audio
    resize = None if size is None else parse_size(size)
    height, width = _resized(info.height, info.width, resize)
    streams = _Streams(
        vae,
        target,
        (_num_frames(info, start, num_frames), height, width),
        num_frames_per_step,
        max_memory,
        writer_options,
        keeps_originals=side_by_side or metrics,
        metrics=metrics,
    )
    originals: deque[torch.Tensor] = deque()  # read, not yet reconstructed

    def read() -> Iterator[torch.Tensor]:
        for frame in _read_frames(source, start, num_frames, resize):
            if side_by_side or metrics:
                originals.append(frame)
            yield frame

    psnr: list[float] = []
    ssim: list[float] = []
    audio_from = source if is_whole else None
    with VideoWriter(target, info.fps, audio_from=audio_from, **streams.writer_options) as writer:
        for unit in reconstruct_frames(read(), streams.encoder, streams.decoder):
            pixels = unit_to_pixels(unit).permute(0, 2, 3, 1).cpu()
            if originals:
                original = originals.popleft()
                if metrics:
                    reference = pixels_to_unit(original.to(unit.device)).permute(0, 3, 1, 2)
                    psnr += frame_psnr(unit, reference).tolist()
                    ssim += frame_ssim(unit, reference).tolist()
                if side_by_side:
                    pixels = torch.cat((original, pixels), dim=2)
            writer.write(pixels)
            if progress is not None:
                progress(1)
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
    max_memory: int | None = None,
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
    resize = None if size is None else parse_size(size)
    height, width = _resized(video.height, video.width, resize)
    length = _num_frames(video, start, num_frames)
    streams = _Streams(vae, target, (length, height, width), num_frames_per_step, max_memory, {}, decode=False)
    count = 0
    with _LatentsWriter(target) as writer:
        for frame in _read_frames(source, start, num_frames, resize):
            count += 1
            writer.write(streams.encoder.push(_to_sample(frame, vae)))
            if progress is not None:
                progress(1)
        writer.write(streams.encoder.flush())
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
    max_memory: int | None = None,
    progress: Progress | None = None,
    **writer_options: Any,
) -> LatentsInfo:
    r"""Decode what [`encode_video`] wrote to a video or image of the original size, length and frame rate.

    Arguments as of [`reconstruct_video`].
    """
    with open_latents(source) as (latents, info):
        _, latent_channels, num_latent_frames, *_ = latents.get_shape()
    if latent_channels != vae.latent_channels:
        raise ValueError(
            f"`vae` must have the {latent_channels} latent channels of {str(source)!r}, got {vae.latent_channels}; "
            f"made by model {info.model!r}."
        )
    size = (info.num_frames, info.height, info.width)
    streams = _Streams(vae, target, size, num_frames_per_step, max_memory, writer_options, encode=False)
    decoder = streams.decoder
    with VideoWriter(target, Fraction(info.fps), **streams.writer_options) as writer:

        def write(sample: torch.Tensor | None) -> None:
            for unit in _units(sample, *size[1:], info.num_frames - writer.num_frames):
                writer.write(unit_to_pixels(unit).permute(0, 2, 3, 1))
                if progress is not None:
                    progress(1)

        for begin in range(0, num_latent_frames, decoder.step):
            with open_latents(source) as (latents, _):  # anew: what was read of a mapped file stays until it is closed
                chunk = latents[:, :, begin : begin + decoder.step].to(vae.device, vae.dtype)
            write(decoder.push(chunk))
        write(decoder.flush())
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

    Chunks are spooled as they come (time first) beside the target; `close` lays them out as `(1, z, t, h, w)`, piece
    by piece, and renames.
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
        with open(self.partial_path, "wb") as file, open(self.spool_path, "rb") as spool:
            file.write(struct.pack("<Q", len(text)) + text)
            start, plane = file.tell(), h * w * self.dtype.itemsize
            file.truncate(start + num_bytes)
            step = max(2**24 // (z * plane), 1)  # frames at a time
            for begin in range(0, self.num_latent_frames, step):
                data = torch.frombuffer(bytearray(spool.read(step * z * plane)), dtype=torch.uint8)
                for channel, planes in enumerate(data.view(-1, z, plane).unbind(1)):
                    file.seek(start + (channel * self.num_latent_frames + begin) * plane)
                    file.write(planes.contiguous().numpy().data)
        commit(self.partial_path, self.path)


def default_suffix(path: str | Path) -> str:
    r"""The extension for the reconstruction of a file: `.png` for images, `.mp4` for videos."""
    is_still = Path(path).suffix.lower() in IMAGE_EXTENSIONS and Path(path).suffix.lower() != ".gif"
    return ".png" if is_still else ".mp4"

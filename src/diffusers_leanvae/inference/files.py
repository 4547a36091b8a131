"""From file to file through an autoencoder: reconstruct, encode, decode, in memory that does not grow with length.

Frames flow reader -> padding -> `StreamingEncoder` -> `StreamingDecoder` -> crop -> writer in small groups. Reader and
writer have threads of their own, beside the network in the caller's: a job takes as long as its slowest stage. Outputs
appear under their names when they are complete.
"""

import itertools
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..evaluation.metrics import frame_psnr, frame_ssim
from ..models.temporal_cache import TemporalCache
from ..models.video_autoencoder import VideoAutoencoder
from ..stages import ahead, in_thread
from ..video_io import VideoError, VideoInfo, VideoReader, VideoWriter
from ..video_io.formats import CONTAINERS, IMAGES, find_output
from ..video_io.inputs import IMAGE_EXTENSIONS, find_sequence, is_remote, local_file
from ..video_io.pixels import (
    pixels_to_sample,
    pixels_to_unit,
    resize_frames,
    sample_to_unit,
    short_side_size,
    unit_to_pixels,
)
from ..video_io.sound import copy_streams
from ..video_io.timing import at_constant_rate
from .latents_file import LatentsInfo, LatentsWriter, copy_sound, fingerprint, open_latents, read_times, weights_sha256
from .memory import VideoJob, frames_ahead, plan_streams
from .padding import pad_frames
from .streaming import StreamingDecoder, StreamingEncoder


Progress = Callable[[int, int | None], Any]  # told how many frames were just finished, and of how many, if known


@dataclass(frozen=True)
class Excerpt:
    """The part of a video to take, and how it is read.

    Attributes:
        start: First frame.
        num_frames: Frames to read, all by default.
        size: What to resize to before encoding: a short side such as `"256"`, or a width and a height as `"640x360"`.
        fps: Constant frame rate to bring the video to by repeating and dropping frames; the rate of numbered pictures.
            `None` keeps the time of each frame.
        square_pixels: Whether to stretch frames whose pixels are oblong.
        background: Colour behind transparent pixels, RGB in `[0, 255]`.

    Raises:
        ValueError: If `size` has neither form.
    """

    start: int = 0
    num_frames: int | None = None
    size: str | None = None
    fps: Fraction | None = None
    square_pixels: bool = False
    background: tuple[int, int, int] = (255, 255, 255)

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

    def pixel_aspect_ratio(self, info: VideoInfo) -> Fraction:
        """Return the ratio of width and height of a pixel with which the resized video looks as the source does."""
        height, width = self.resized(info.height, info.width)
        factor = Fraction(info.width * height, info.height * width)
        # Sizes are whole numbers: a difference within one pixel of the shorter side is rounding.
        return info.pixel_aspect_ratio * (1 if abs(factor - 1) <= Fraction(1, min(height, width)) else factor)

    def length(self, info: VideoInfo, is_resampled: bool) -> int | None:
        """Return the number of frames that come out as far as the header tells, or `None`.

        Args:
            info: Of the video.
            is_resampled: Whether frames are repeated and dropped for `fps`.
        """
        in_file = None if info.num_frames is None else info.num_frames - self.start
        counts = [count for count in (self.num_frames, in_file) if count is not None]
        if not counts:
            return None
        factor = self.fps / info.fps if self.fps is not None and is_resampled else 1
        return max(round(min(counts) * factor), 1)


WHOLE = Excerpt()


class _Source:
    """A video that is read for one job, and what its output needs to know.

    Attributes:
        info: Of the video.
        rate: Frames per second of what comes out; the average where frames have times.
        file: The file that is read, `None` for numbered pictures.
        sound: File with the sound, `None` for images.
        start: Time of the first frame that is read, in seconds from the first one in the file.
        times: When the frames that were read are shown, in seconds from the first; `None` for pictures and at a rate
            that was asked for.
        end: When the last frame ends, in seconds from the first one that was read, where that is the last of the file
            and the file tells; known when all are read, and `None` where there are no times.
    """

    def __init__(self, video: VideoReader, path: str | Path, excerpt: Excerpt, is_sequence: bool) -> None:
        self.video, self.excerpt, self.info = video, excerpt, video.info
        self.rate = excerpt.fps or self.info.fps
        self.file = None if is_sequence else path
        self.sound = None if is_sequence or self.info.is_image else path
        # Pictures have no time of their own: a rate is what they are shown at.
        self.is_resampled = excerpt.fps is not None and not is_sequence
        # Also where the header tells of a constant rate: it can be wrong, and sound keeps to the times.
        self.times: deque[Fraction] | None = deque() if excerpt.fps is None and not is_sequence else None
        self.end: Fraction | None = None
        self._last = Fraction(0)  # time of the last frame that was read, in seconds from the first
        self._frames = self._read()
        self._first = next(self._frames)
        self.start = self._first[1]

    def frames(self) -> Iterator[torch.Tensor]:
        """Yield the frames one by one, uint8 `(1, height, width, 3)`: a step's are collected as samples."""
        timed = self._timed()
        if self.is_resampled:
            yield from at_constant_rate(timed, self.rate, self._last_duration)
            return
        for frame, time in timed:
            if self.times is not None:
                self.times.append(time)
            yield frame
        if self.times is not None and (duration := self._last_duration()) is not None:
            self.end = self._last + duration

    def _timed(self) -> Iterator[tuple[torch.Tensor, Fraction]]:
        frames = itertools.chain((self._first,), self._frames)
        del self._first
        for frame, time in frames:
            self._last = time - self.start
            yield frame, self._last

    def _last_duration(self) -> Fraction | None:
        end = self.video.end
        return None if end is None else end - self.start - self._last

    def frames_ahead(self, num_ahead: int) -> AbstractContextManager[Iterator[torch.Tensor]]:
        """Give the frames as `frames` does, read ahead; those of pictures are not."""
        return ahead(self.frames(), 0 if self.video.has_pictures else num_ahead)

    def length(self, num_frames: int) -> Fraction:
        """Return the seconds that all frames take, the last one as long as it is shown."""
        if self.times is None:
            return num_frames / self.rate
        return self.times[-1] + 1 / self.rate if self.end is None else self.end

    @property
    def shown(self) -> Fraction:
        """Seconds from the first frame of the file to some time after the last one that was read has begun."""
        return self.start + self._last + 1 / self.info.fps / 2

    def _read(self) -> Iterator[tuple[torch.Tensor, Fraction]]:
        excerpt = self.excerpt
        stop = None if excerpt.num_frames is None else excerpt.start + excerpt.num_frames
        packed = excerpt.size is not None
        for frame, times in self.video.timed_frames(excerpt.start, stop, chunk_size=1, packed=packed):
            yield resize_frames(frame, *excerpt.resized(*frame.shape[1:3])), times[0]


@contextmanager
def _open_source(source: str | Path, excerpt: Excerpt) -> Iterator[_Source]:
    """Open a video by whatever name; what comes through a pipe is read once, for pictures and sound."""
    options: dict[str, Any] = {"square_pixels": excerpt.square_pixels, "background": excerpt.background}
    is_sequence = not is_remote(source) and (Path(source).is_dir() or find_sequence(source) is not None)
    if is_sequence:
        with VideoReader(source, **options) as video:
            yield _Source(video, source, excerpt, is_sequence)
        return
    with local_file(source) as path:
        try:
            with VideoReader(path, **options) as video:
                yield _Source(video, path, excerpt, is_sequence)
        except VideoError as error:
            if str(path) == str(source):
                raise
            raise VideoError(str(error).replace(str(path), str(source))) from error


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
        source: What to read: a file, numbered pictures (`f_%04d.png`), a folder of frames, `"-"` or an address.
        target: What to write, see `VideoWriter`. Sound, subtitles and chapters of the excerpt are copied along.
        excerpt: The part of `source` to take, and how it is read.
        side_by_side: Write the original to the left of the reconstruction.
        metrics: Compute PSNR and SSIM.
        num_frames_per_step: Frames that pass the network at once, at most.
        max_memory: Bytes that may be used above the weights. Steps and tiles are chosen to fit, whatever the model's
            tiling says; if needed the state of tiles is kept on disk next to `target`, and x264 does not look ahead
            (`preset="ultrafast"`, unless one is given). The pixels do not depend on it, up to float rounding.
        progress: Called with the number of frames just written, and with that of all as far as the header tells.
        writer_options: For `VideoWriter` (`codec`, `crf`, ...).

    Returns:
        `num_frames`, `height`, `width`, `fps`; with `metrics` also `psnr_frame_mean_rgb` in dB and
        `ssim_frame_mean_rgb`, of the reconstruction before it is rounded and compressed.

    Raises:
        ValueError: If an argument or a file is not legal, or `max_memory` too small; it says what would do.
    """
    with _open_source(source, excerpt) as clip:
        height, width = excerpt.resized(clip.info.height, clip.info.width)
        keeps_originals = side_by_side or metrics
        job = VideoJob(
            excerpt.length(clip.info, clip.is_resampled),
            height,
            width,
            keeps_originals=keeps_originals,
            metrics=metrics,
        )
        streams = _open_streams(vae, job, target, num_frames_per_step, max_memory, writer_options)
        psnr: list[float] = []
        ssim: list[float] = []
        options = _sound_options(clip.sound, clip.start) | streams.writer_options
        with VideoWriter(
            target, clip.rate, pixel_aspect_ratio=excerpt.pixel_aspect_ratio(clip.info), **options
        ) as writer:

            def writes(frames: Iterator[torch.Tensor]) -> Iterator[Callable[[], None]]:
                for unit, original in reconstruct_frames(frames, streams.encoder, streams.decoder, keeps_originals):
                    if metrics and original is not None:
                        reference = pixels_to_unit(original.to(unit.device)).permute(0, 3, 1, 2)
                        psnr.extend(frame_psnr(unit, reference).tolist())
                        ssim.extend(frame_ssim(unit, reference).tolist())
                    times = None if clip.times is None else [clip.times.popleft()]
                    yield partial(writer.write, picture(unit, original if side_by_side else None), times)

            with clip.frames_ahead(streams.num_ahead) as frames:
                _write(writes(frames), streams.num_ahead, progress, job.num_frames)
            _write_end(writer, height, (1 + side_by_side) * width, clip.end)
            clip.video.close()  # before the target gets its name, which may be the source's
    summary = {"num_frames": writer.num_frames, "height": height, "width": width, "fps": str(clip.rate)}
    if metrics and psnr:
        summary |= {"psnr_frame_mean_rgb": sum(psnr) / len(psnr), "ssim_frame_mean_rgb": sum(ssim) / len(ssim)}
    return summary


@torch.inference_mode()
def encode_video(
    vae: VideoAutoencoder,
    source: str | Path,
    target: str | Path,
    *,
    model: str,
    revision: str | None = None,
    checksum: str | None = None,
    excerpt: Excerpt = WHOLE,
    num_frames_per_step: int = 16,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> LatentsInfo:
    """Encode a video or image file into `target`, a safetensors file with one tensor `latents` `(1, z, t, h, w)`.

    The latents are posterior means, not normalised. Arguments as of [`reconstruct_video`]. Sound, subtitles,
    chapters and metadata of the excerpt are kept in the same file, as the tensor `sound`, a Matroska file.

    Args:
        model: Name of the model, which is stored with the latents.
        revision: Commit of a model on the Hub, stored as well.
        checksum: [`weights_sha256`] of the model as it is stored; by default that of `vae`, if it is in float32.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"`target` must end in .safetensors, got {str(target)!r}.")
    if checksum is None:
        checksum = weights_sha256(vae) if vae.dtype is torch.float32 else ""
    count = 0
    with _open_source(source, excerpt) as clip, tempfile.TemporaryDirectory(prefix="leanvae-") as folder:
        height, width = excerpt.resized(clip.info.height, clip.info.width)
        job = VideoJob(excerpt.length(clip.info, clip.is_resampled), height, width, decode=False)
        streams = _open_streams(vae, job, target, num_frames_per_step, max_memory)
        with LatentsWriter(target) as writer:
            with clip.frames_ahead(streams.num_ahead) as frames:
                for frame in frames:
                    count += 1
                    writer.write(streams.encoder.push(_to_sample(frame, vae)))
                    if progress is not None:
                        progress(1, job.num_frames)
            writer.write(streams.encoder.flush())
            sound = None
            if clip.sound is not None:
                sound = _keep_sound(clip, Path(folder, "sound.mkv"), clip.start + clip.length(count))
            info = LatentsInfo(
                model=model,
                fps=str(clip.rate),
                num_frames=count,
                height=height,
                width=width,
                source="stdin" if str(source) == "-" else Path(source).name,
                is_image=clip.info.is_image and count == 1,
                revision=revision,
                weights_sha256=checksum,
                pixel_aspect_ratio=str(excerpt.pixel_aspect_ratio(clip.info)),
                start=str(clip.start),
                end="" if clip.end is None else str(clip.end),
                fingerprint="" if clip.file is None else fingerprint(clip.file),
            )
            is_constant = clip.times is None or (
                all(time == i / clip.rate for i, time in enumerate(clip.times))
                and clip.end in (None, count / clip.rate)
            )
            info = writer.close(info, None if is_constant or clip.times is None else list(clip.times), sound)
    return info


@torch.inference_mode()
def decode_video(
    vae: VideoAutoencoder,
    source: str | Path,
    target: str | Path,
    *,
    checksum: str | None = None,
    audio_from: str | Path | None = None,
    num_frames_per_step: int = 16,
    max_memory: int | None = None,
    progress: Progress | None = None,
    **writer_options: Any,
) -> LatentsInfo:
    """Decode what [`encode_video`] wrote to a video or image of the original size, length and frame rate.

    Arguments as of [`reconstruct_video`].

    Args:
        checksum: [`weights_sha256`] of the model as it is stored; other weights than those that encoded are refused.
            By default it is not looked at.
        audio_from: File with the sound, in place of what is kept with the latents. Of the file that was encoded, which
            is known by its content, the part is taken that the latents are of, of any other file the beginning.
    """
    with open_latents(source) as (latents, info):
        shape = latents.get_shape()
    if len(shape) == 5 and shape[1] != vae.latent_channels:
        raise ValueError(
            f"`vae` must have the {shape[1]} latent channels of {str(source)!r}, got {vae.latent_channels}; "
            f"made by model {info.model!r}."
        )
    edge = vae.spatial_compression_ratio
    num_latent_frames = -(-(info.num_frames - 1) // vae.temporal_compression_ratio) + 1
    expected = [1, vae.latent_channels, num_latent_frames, -(-info.height // edge), -(-info.width // edge)]
    if shape != expected:
        raise ValueError(
            f"`source` must hold latents of shape {expected} for {info.num_frames} frames of "
            f"{info.width}x{info.height}, got {shape} in {str(source)!r}."
        )
    if checksum is not None:
        info.check_weights(checksum, source)
    times = read_times(source)
    job = VideoJob(info.num_frames, info.height, info.width, encode=False)
    streams = _open_streams(vae, job, target, num_frames_per_step, max_memory, writer_options)
    with _sound_of(source, info, audio_from) as sound:
        options = sound | streams.writer_options
        ratio = Fraction(info.pixel_aspect_ratio)
        with VideoWriter(target, Fraction(info.fps), pixel_aspect_ratio=ratio, **options) as writer:
            units = _decode_frames(source, streams.decoder, info.height, info.width)
            writes = (
                partial(writer.write, picture(unit), None if times is None else times[index : index + 1])
                for index, unit in enumerate(itertools.islice(units, info.num_frames))
            )
            _write(writes, streams.num_ahead, progress, info.num_frames)
            if times is not None:
                _write_end(writer, info.height, info.width, Fraction(info.end) if info.end else None)
    if audio_from is not None and not writer.has_sound:
        warnings.warn(f"{str(target)!r} has no sound: {str(audio_from)!r} has none at this time.", stacklevel=2)
    return info


def default_suffix(path: str | Path, name: str | None = None) -> str:
    """Return what follows the stem in the name of the reconstruction of a file.

    Args:
        path: The file to read.
        name: Format such as `"webm"` or `"png"`; `None` is `.png` for images and `.mp4` for videos.

    Returns:
        An extension; or, if `name` is one of images and the file a video, `/%06d` with it: a folder of frames.
    """
    suffix = None if name is None else f".{name}"
    if _is_still(Path(path)):
        return suffix if suffix in IMAGES else ".png"
    if suffix in IMAGES and suffix not in CONTAINERS:
        return f"/%06d{suffix}"
    return suffix or ".mp4"


def _is_still(path: Path) -> bool:
    """Tell by name, and by its first bytes where the name leaves it open, whether a file is a single picture."""
    suffix = path.suffix.lower()
    if suffix not in IMAGE_EXTENSIONS or suffix in (".gif", ".apng", ".avifs"):
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError:
        return True
    # PNG and WebP say at the start whether they are animated, and AVIF is either of two brands.
    if start[8:12] == b"WEBP" and start[12:16] == b"VP8X":
        return not start[20] & 2
    return not (b"acTL" in start if start[1:4] == b"PNG" else start[4:8] == b"ftyp" and b"avis" in start[8:64])


# --- Sound -----------------------------------------------------------------------------------------------------------


def _sound_options(path: str | Path | None, start: Fraction) -> dict[str, Any]:
    return {} if path is None else {"audio_from": path, "audio_start": start}


def _keep_sound(clip: _Source, target: Path, end: Fraction) -> Path | None:
    """Copy what accompanies the pictures to a Matroska file; `None` if there is nothing."""
    assert clip.sound is not None
    return target if copy_streams(clip.sound, target, clip.start, end, clip.shown) else None


@contextmanager
def _sound_of(source: str | Path, info: LatentsInfo, audio_from: str | Path | None) -> Iterator[dict[str, Any]]:
    """Give the options by which `VideoWriter` finds the sound for latents."""
    if audio_from is not None:
        with local_file(audio_from) as path, _naming_sound(path, repr(str(audio_from))):
            if info.fingerprint:
                is_source = fingerprint(path) == info.fingerprint
            else:  # of an earlier version
                is_source = Path(audio_from).name == info.source
            yield _sound_options(path, Fraction(info.start) if is_source else Fraction(0))
    elif info.has_sound:
        with tempfile.TemporaryDirectory(prefix="leanvae-") as folder:
            path = Path(folder, "sound.mkv")
            copy_sound(source, path)
            with _naming_sound(path, f"the sound in {str(source)!r}"):
                yield _sound_options(path, Fraction(0))
    else:
        yield {}


@contextmanager
def _naming_sound(path: Path, name: str) -> Iterator[None]:
    """Let errors call a file with sound, maybe a temporary copy, by the name of where it comes from."""
    try:
        yield
    except VideoError as error:
        text = str(error).replace(f"{str(path)!r} as a video or image", name).replace(repr(str(path)), name)
        raise VideoError(text) from error


# --- Frames through streams ------------------------------------------------------------------------------------------


class _Streams(NamedTuple):
    encoder: StreamingEncoder
    decoder: StreamingDecoder
    writer_options: dict[str, Any]
    num_ahead: int  # frames that are read ahead, and that wait to be written


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
    num_ahead = num_frames_per_step
    if max_memory is not None:
        names = ("codec", "crf", "pixel_format", "container")
        output = find_output(target, **{name: writer_options.get(name) for name in names}) if job.decode else None
        is_free = output is not None and output.codec == "libx264" and "preset" not in writer_options
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
        num_ahead = frames_ahead(job, plan, max_memory)
        # The state is parked in an unnamed file next to the output: there is room for large files, if anywhere.
        folder = Path(target).absolute().parent if plan.is_parked else None
        caches = [TemporalCache(folder, plan.layout) for _ in caches]
    encoder = StreamingEncoder(vae, num_frames_per_step, cache=caches[0])
    step = max(num_frames_per_step // vae.temporal_compression_ratio, 1)
    return _Streams(encoder, StreamingDecoder(vae, step, cache=caches[1]), writer_options, num_ahead)


def _write(
    writes: Iterable[Callable[[], None]], num_ahead: int, progress: Progress | None, num_frames: int | None
) -> None:
    """Write frames behind the network that makes them."""
    with closing(in_thread(writes, num_ahead)) as written:
        for _ in written:
            if progress is not None:
                progress(1, num_frames)


def _write_end(writer: VideoWriter, height: int, width: int, end: Fraction | None) -> None:
    """Tell when the last of the frames ends, which only their reader knows, and not before it is done."""
    if end is not None:
        writer.write(torch.empty(0, height, width, 3, dtype=torch.uint8), times=[], end=end)


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
            chunk = latents[:, :, begin : begin + decoder.step]
            if not chunk.isfinite().all():
                raise ValueError(f"`source` must hold finite latents, got infinite ones or NaN in {str(source)!r}.")
            chunk = chunk.to(decoder.vae.device, decoder.vae.dtype)
        yield from _unit_frames(decoder.push(chunk), height, width)
    yield from _unit_frames(decoder.flush(), height, width)


def _to_sample(frames: torch.Tensor, vae: VideoAutoencoder) -> torch.Tensor:
    """Turn uint8 `(T, H, W, 3)` into a padded `(1, 3, T, H', W')` in `[-1, 1]` of the model's dtype."""
    if vae.device.type == "cuda":  # it fetches by itself what lies in pinned memory
        frames = frames.pin_memory().to(vae.device, non_blocking=True)
    sample = pixels_to_sample(frames.to(vae.device)).to(vae.dtype).permute(3, 0, 1, 2)[None]
    return pad_frames(sample, vae.spatial_compression_ratio)


def _unit_frames(sample: torch.Tensor | None, height: int, width: int) -> Iterator[torch.Tensor]:
    """Cut decoded frames to size, one by one: all frames of a step once more as floats would double the memory."""
    for index in range(0 if sample is None else sample.shape[2]):
        assert sample is not None
        yield sample_to_unit(sample[0, :, index : index + 1, :height, :width].transpose(0, 1))


def picture(unit: torch.Tensor, original: torch.Tensor | None = None) -> torch.Tensor:
    """Round a frame `(1, 3, H, W)` in `[0, 1]` to uint8 `(1, H, W, 3)` on the CPU, right of `original` if given."""
    pixels = unit_to_pixels(unit).cpu()
    if original is not None:
        pixels = torch.cat((original.permute(0, 3, 1, 2), pixels), dim=3)
    return pixels.permute(0, 2, 3, 1)

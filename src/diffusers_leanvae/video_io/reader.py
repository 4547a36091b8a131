"""Video and image files -> uint8 RGB tensors `(num_frames, height, width, 3)`, read by PyAV or (faster) torchcodec.

What a decoded pixel is
- 8-bit RGB as FFmpeg's own `format=rgb24` filter gives it, which is bit for bit what torchcodec gives. The tagged
  matrix and range are used; an untagged file counts as BT.601, limited range, at every size (swscale's rule). More
  than 8 bits are scaled to 8; high dynamic range is not tone-mapped; an alpha channel is dropped, not composited.
- Upright: the display matrix (rotation and mirroring) is applied. Sample aspect ratio is not: one stored sample is
  one pixel.
- Progressive: frames flagged as interlaced go through `bwdif`, one frame out for one frame in.

Frame `i` is the `i`-th frame the decoder puts out, in presentation order. Nothing is doubled or dropped to make the
frame rate constant: a variable-rate file yields its frames, and `VideoInfo.fps` is their average rate.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, Self

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .containers import PathLike, VideoError, find_video_stream, named_errors, open_input
from .decoding import Damaged, Decoding, RgbConverter, display_matrix
from .inputs import IMAGE_EXTENSIONS as IMAGE_EXTENSIONS
from .inputs import VIDEO_EXTENSIONS as VIDEO_EXTENSIONS
from .inputs import list_videos as list_videos
from .seeking import SeekPoint, SeekPoints


if TYPE_CHECKING:  # PyTorch takes a second to import, and a header can be read without it
    import torch


# Degrees of a display matrix (a, b, c, d): x' = a x + c y, y' = b x + d y with y pointing down. Others mirror.
_CLOCKWISE = {(1, 0, 0, 1): 0, (0, 1, -1, 0): 90, (-1, 0, 0, -1): 180, (0, -1, 1, 0): 270}

Backend = Literal["pyav", "torchcodec"]
OnError = Literal["raise", "stop"]


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a file, from its header and its first decoded frame.

    Attributes:
        path: The file, as given.
        width: Pixels as displayed, after rotation.
        height: Pixels as displayed, after rotation.
        fps: Average frame rate in frames per second, exact (`Fraction(30000, 1001)`); 25 for a still image.
        num_frames: Frame count of the header, `None` where it has none. A header can be wrong: count what is read.
        duration: Seconds as in the header, `None` where it has none and for still images.
        rotation: Degrees clockwise (0, 90, 180, 270) by which stored frames are turned; already applied to `width`,
            `height` and to every frame read.
        has_audio: Whether there is an audio stream.
        codec: Name of the video codec, such as `"h264"`.
        pixel_format: FFmpeg's name of the stored pixel format, such as `"yuv420p10le"`.
        is_image: Whether the file is an image (still or animated) and not a video.
    """

    path: str
    width: int
    height: int
    fps: Fraction
    num_frames: int | None
    duration: float | None
    rotation: int
    has_audio: bool
    codec: str
    pixel_format: str
    is_image: bool


def probe_video(path: PathLike) -> VideoInfo:
    """Read the header and decode the first frame of a video or image.

    Raises:
        VideoError: If the file is missing, empty, not a video or image, or its first frame cannot be decoded.
    """
    with VideoReader(path) as video:
        return video.info


def read_video(
    path: PathLike, start: int = 0, num_frames: int | None = None, backend: Backend = "pyav"
) -> tuple[torch.Tensor, VideoInfo]:
    """Read frames `start` to `start + num_frames` of a video or image into memory.

    Args:
        path: A video or image file.
        start: Index of the first frame, from 0.
        num_frames: How many frames at most; `None` reads to the end. Fewer come back where the file ends earlier.
        backend: See `VideoReader`.

    Returns:
        RGB frames, uint8 in `[0, 255]`, shape `(num_frames, height, width, 3)`, and what `probe_video` returns.

    Raises:
        VideoError: As `iter_video`; damaged data always raises.
    """
    with VideoReader(path, backend) as video:
        return video.read(start, _stop(start, num_frames)), video.info


def iter_video(
    path: PathLike,
    start: int = 0,
    num_frames: int | None = None,
    chunk_size: int = 16,
    backend: Backend = "pyav",
    on_error: OnError = "raise",
) -> Iterator[torch.Tensor]:
    """Stream frames `start` to `start + num_frames` of a video or image, holding one chunk in memory.

    Args:
        path: A video or image file. It is opened and its first frame decoded before this function returns.
        start: Index of the first frame, from 0.
        num_frames: How many frames at most; `None` reads to the end. The file may end earlier.
        chunk_size: See `VideoReader.frames`.
        backend: See `VideoReader`.
        on_error: See `VideoReader.frames`.

    Yields:
        RGB frames, uint8 in `[0, 255]`, shape `(n, height, width, 3)` with `1 <= n <= chunk_size`.

    Raises:
        VideoError: As `VideoReader` and `VideoReader.frames`.
        ImportError: If `backend="torchcodec"` and torchcodec is not installed.
    """
    stop = _stop(start, num_frames)
    video = VideoReader(path, backend)
    chunks = video.frames(start, stop, chunk_size=chunk_size, on_error=on_error)

    def until_closed() -> Iterator[torch.Tensor]:
        with video:
            yield from chunks

    return until_closed()


def _stop(start: int, num_frames: int | None) -> int | None:
    if num_frames is not None and num_frames < 1:
        raise VideoError(f"`num_frames` must be 1 or more, or None, got {num_frames}.")
    return None if num_frames is None else start + num_frames


class VideoReader:
    """A video or image file that is opened once: its header, and any range of its frames; a context manager.

        with VideoReader("clip.mp4") as video:
            clip = video.read(100, 117)
            for frames in video.frames(200):
                ...

    A range holds, bit for bit, what decoding from the start would give. Ranges in ascending order continue where the
    last one ended. For others the reader jumps to the nearest picture from which this is certain. Where that cannot be
    proven of any, it starts over, for which it opens the file again.

    Args:
        path: A video or image file. It is opened, and its first frame decoded, at once.
        backend: `"torchcodec"` is faster at random access and gives the same pixels. It repairs damaged data without
            a word, so `on_error` says nothing there; interlaced or mirrored files and images are read by PyAV anyway.

    Attributes:
        info: What the header and the first frame say.

    Raises:
        VideoError: If the file is missing, empty, not a video or image, or its first frame cannot be decoded.
        ImportError: If `backend="torchcodec"` and torchcodec is not installed.
    """

    def __init__(self, path: PathLike, backend: Backend = "pyav") -> None:
        if backend not in ("pyav", "torchcodec"):
            raise VideoError(f"`backend` must be 'pyav' or 'torchcodec', got {backend!r}.")
        self._path = path
        self._resources = ExitStack()
        self._container: InputContainer
        self._stream: VideoStream
        self._decoding: Decoding | None = None  # `None` while the file stands at no known frame
        self._first_packet: SeekPoint | None = None
        self._torchcodec: Any = None  # class of decoders, if it is to read this file
        self._torchcodec_decoder: Any = None
        self._num_frames: int | None = None
        self._num_ranges = 0
        self._is_closed = False
        try:
            with named_errors(path):
                frame = self._open()
            self.info = _describe(path, self._container, self._stream, frame)
            is_alone = len(self._container.streams.video) == 1 and not self.info.is_image
            # What torchcodec reads alike, and where seeking may be exact.
            is_plain = is_alone and not frame.interlaced_frame and display_matrix(frame) in _CLOCKWISE
            self._seek_points = SeekPoints.of(self._container, self._stream) if is_plain else None
            if backend == "torchcodec":
                decoder_class = _import_torchcodec()
                self._torchcodec = decoder_class if is_plain else None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._is_closed = True
        self._decoding = self._torchcodec_decoder = None
        self._resources.close()

    def frames(
        self, start: int = 0, stop: int | None = None, *, chunk_size: int = 16, on_error: OnError = "raise"
    ) -> Iterator[torch.Tensor]:
        """Stream frames `start` to `stop`, holding one chunk in memory; a new range ends the one before.

        Args:
            start: Index of the first frame, from 0.
            stop: Index after the last frame; `None` reads to the end. The file may end earlier.
            chunk_size: Frames per yielded tensor; the last one may be shorter.
            on_error: What to do where data are damaged or the frame size changes: `"raise"`, or `"stop"` to end after
                the last good frame. A cut-off Matroska, WebM or MPEG-TS file looks like a shorter one to FFmpeg and
                just ends early in both cases.

        Yields:
            RGB frames, uint8 in `[0, 255]`, shape `(n, height, width, 3)` with `1 <= n <= chunk_size`.

        Raises:
            VideoError: If `start` lies beyond the end of the file, or (with `on_error="raise"`) its data are damaged
                or its frame size changes; the message then names the index of the frame reached.
        """
        if start < 0:
            raise VideoError(f"`start` must be 0 or more, got {start}.")
        if stop is not None and stop <= start:
            raise VideoError(f"`stop` must be more than `start`, {start}, or None, got {stop}.")
        if chunk_size < 1:
            raise VideoError(f"`chunk_size` must be 1 or more, got {chunk_size}.")
        if on_error not in ("raise", "stop"):
            raise VideoError(f"`on_error` must be 'raise' or 'stop', got {on_error!r}.")
        if self._is_closed:
            raise VideoError(f"Cannot read {str(self._path)!r}: the reader is closed.")
        self._num_ranges += 1
        if self._torchcodec is not None:
            return self._chunks_by_torchcodec(start, stop, chunk_size)
        return self._chunks(self._images(start, stop, on_error, self._num_ranges), chunk_size)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read frames `start` to `stop` into memory, as one tensor; see `frames`."""
        import torch

        return torch.cat(list(self.frames(start, stop)))

    def count_frames(self) -> int:
        """Return the number of frames in the header, which can be wrong, or count them where it has none."""
        if self._num_frames is None:
            self._num_frames = self.info.num_frames or sum(len(frames) for frames in self.frames())
        return self._num_frames

    @staticmethod
    def _chunks(images: Iterator[torch.Tensor], chunk_size: int) -> Iterator[torch.Tensor]:
        import torch

        while chunk := list(itertools.islice(images, chunk_size)):
            yield torch.stack(chunk)

    def _images(self, start: int, stop: int | None, on_error: OnError, number: int) -> Iterator[torch.Tensor]:
        converter = RgbConverter()
        # Deinterlacing looks one frame back, so one more is converted on the left; `out` counts what leaves the
        # converter.
        out = first_fed = max(0, start - 1)
        damage: Damaged | None = None
        with named_errors(self._path):
            decoding = self._go_to(first_fed)
            try:
                for frame in decoding.frames_from(first_fed):
                    for image in converter.push(frame):
                        if out >= start:
                            yield image
                            if self._is_closed or self._num_ranges != number:
                                raise VideoError(
                                    f"Cannot read on in {str(self._path)!r}: the reader was closed, or another range "
                                    "begun."
                                )
                        out += 1
                        if out == stop:
                            return
            except Damaged as error:
                damage = error
        for image in converter.push(None):
            if out >= start:
                yield image
            out += 1
            if out == stop:
                return
        index = decoding.next_index
        if damage is not None and on_error == "raise":
            raise VideoError(
                f"Cannot read {str(self._path)!r} past frame {index}: {damage}; `on_error='stop'` ends before it."
            )
        if index <= start:
            raise VideoError(
                f"`start` must be less than the number of frames of {str(self._path)!r}, {index}, got {start}."
            )

    def _chunks_by_torchcodec(self, start: int, stop: int | None, chunk_size: int) -> Iterator[torch.Tensor]:
        try:
            if self._torchcodec_decoder is None:
                path = os.fspath(self._path)
                self._torchcodec_decoder = self._torchcodec(path, dimension_order="NHWC", seek_mode="exact")
            decoder, total = self._torchcodec_decoder, len(self._torchcodec_decoder)
            if start >= total:
                raise VideoError(
                    f"`start` must be less than the number of frames of {str(self._path)!r}, {total}, got {start}."
                )
            stop = total if stop is None else min(total, stop)
            for first in range(start, stop, chunk_size):
                yield decoder.get_frames_in_range(first, min(first + chunk_size, stop)).data
        except (RuntimeError, IndexError) as error:
            raise VideoError(f"Cannot read {str(self._path)!r} with torchcodec: {error}") from error

    def _open(self) -> VideoFrame:
        """Open the file, for the first time or again, and return its first frame, which the decoding still has."""
        self._open_container()
        self._decoding = Decoding(self._packets(), self._stream, 0)
        try:
            frame = next(self._decoding.frames_from(0), None)
        except Damaged as damage:
            raise VideoError(
                f"Cannot read {str(self._path)!r}: its first frame cannot be decoded ({damage})."
            ) from damage
        if frame is None:
            raise VideoError(f"Cannot read {str(self._path)!r}: it holds no video frame.")
        return frame

    def _open_container(self) -> None:
        self._decoding = None
        self._resources.close()
        self._container = self._resources.enter_context(open_input(self._path))
        self._stream = find_video_stream(self._container, self._path)

    def _packets(self) -> Iterator[Packet]:
        for packet in self._container.demux(self._stream):
            if self._first_packet is None:
                self._first_packet = SeekPoint.of(0, packet)
            yield packet

    def _go_to(self, index: int) -> Decoding:
        """Return a decoding that still has frame `index` to give."""
        decoding = self._decoding
        if decoding is not None and decoding.first_index <= index <= decoding.next_index:
            return decoding
        point = self._find_seek_point(index)
        decoding = self._decoding  # unless the search has ended it
        if decoding is not None and decoding.next_index <= index:
            if point is None or point.index <= decoding.next_index:
                return decoding
        if point is not None and (decoding := self._seek(point)):
            return decoding
        self._open()
        assert self._decoding is not None
        return self._decoding

    def _seek(self, point: SeekPoint) -> Decoding | None:
        """Start a decoding at a seek point; `None` where the index of the container leads elsewhere."""
        self._decoding = None
        try:
            self._container.seek(point.pts, stream=self._stream)
            decoding = Decoding(self._packets(), self._stream, point.index)
            frame = next(decoding.frames_from(point.index), None)
        except (Damaged, FFmpegError):
            return None
        if frame is not None and frame.key_frame and frame.pts == point.pts:
            self._decoding = decoding
        return self._decoding

    def _find_seek_point(self, index: int) -> SeekPoint | None:
        """Return the last seek point at or before frame `index`; looking for it may end the decoding."""
        points = self._seek_points
        if points is None or self._first_packet is None:
            return None
        if not points.covers(index):
            self._decoding = None
            packets, first = self._packets_from(points.found[-1] if points.found else self._first_packet)
            points.extend(packets, first, index)
        return points.find(index)

    def _packets_from(self, point: SeekPoint) -> tuple[Iterator[Packet], int]:
        """Return the packets from a seek point on, or all if seeking leads elsewhere, and the number of the first."""
        try:
            self._container.seek(point.pts, stream=self._stream)
            packets = self._packets()
            packet = next(packets, None)
            if packet is not None and SeekPoint.of(point.index, packet) == point:
                return itertools.chain([packet], packets), point.index
        except FFmpegError:
            pass
        self._open_container()
        return self._packets(), 0


def _import_torchcodec() -> Any:
    try:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # RuntimeError: installed, but it finds no FFmpeg libraries
        raise ImportError(
            '`backend="torchcodec"` needs torchcodec and the FFmpeg libraries of the system: '
            'pip install "diffusers-leanvae[torchcodec]".'
        ) from error
    return VideoDecoder


def _describe(path: PathLike, container: InputContainer, stream: VideoStream, frame: VideoFrame) -> VideoInfo:
    is_still = container.format.name.endswith("_pipe") or container.format.name == "image2"
    duration: float | None = None
    if not is_still and stream.duration is not None and stream.time_base is not None:
        duration = float(stream.duration * stream.time_base)
    elif not is_still and container.duration is not None:
        duration = container.duration / av.time_base
    matrix = display_matrix(frame)
    width, height = frame.width, frame.height
    return VideoInfo(
        path=os.fspath(path),
        width=width if matrix[0] else height,
        height=height if matrix[0] else width,
        fps=Fraction(25) if is_still else stream.average_rate or stream.guessed_rate or Fraction(25),
        num_frames=1 if is_still else stream.frames or None,
        duration=duration,
        rotation=_CLOCKWISE.get(matrix, 0),
        has_audio=bool(container.streams.audio),
        codec=stream.codec_context.codec.canonical_name,
        pixel_format=frame.format.name,
        is_image=is_still or container.format.name in ("gif", "apng", "webp", "webp_anim"),
    )

"""Video and image files -> uint8 RGB tensors `(num_frames, height, width, 3)`.

What a decoded pixel is
- 8-bit RGB, BT.709 SDR, within half a level of what the tags of the file mean, rounded and without bias: matrix and
  range as tagged, an untagged file is BT.709 from HD sizes on and BT.601 below; HDR (PQ, HLG) is tone-mapped, wide
  gamut converted. `color` says how. More than 8 bits are rounded to 8. Stored RGB of 8 bits comes out bit for bit.
- Subsampled chroma is taken from the nearest sample, so that what is written from averaged chroma and read again stays
  the same, however often.
- Opaque: alpha is composed over a background, white by default.
- Upright: the display matrix (multiples of 90 degrees, mirroring) is applied; other angles are refused.
- One stored sample is one pixel, or pixels are made square (`square_pixels`); `VideoInfo.pixel_aspect_ratio` tells.
- Progressive: frames flagged as interlaced go through `bwdif`, one frame out for one frame in.

Pictures, animations and sequences of pictures are read by Pillow (`stills`), everything else by FFmpeg.

Frame `i` is the `i`-th frame the decoder puts out, in presentation order. Nothing is doubled or dropped to make the
frame rate constant: a variable-rate file yields its frames. `VideoInfo.fps` is their average rate,
`VideoReader.timed_frames` gives their times, and `timing.at_constant_rate` makes a constant rate of them.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..checks import is_integer
from .containers import PathLike, VideoError, check_path, find_video_stream, named_errors, open_input
from .decoding import CutOff, Damaged, Decoding, Picture, Progressive, RgbConverter, display_matrix
from .info import CLOCKWISE, VideoInfo, describe_images, describe_video, has_sample_table
from .inputs import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, find_sequence, list_frames, list_videos, local_file
from .rooms import Rooms
from .seeking import SeekPoint, SeekPoints
from .stills import ImageFrames, can_read
from .timing import Clock, LastEnd


if TYPE_CHECKING:  # these take a second to import, and a header can be read without them
    import numpy as np
    import torch

__all__ = [
    "IMAGE_EXTENSIONS",
    "VIDEO_EXTENSIONS",
    "TimedFrames",
    "VideoInfo",
    "VideoReader",
    "iter_video",
    "list_videos",
    "probe_video",
    "read_video",
]

# How far to look ahead for time stamps where the container has no table of them.
_NUM_AHEAD, _BYTES_AHEAD = 64, 1 << 22

Source = PathLike | Sequence[PathLike]
OnError = Literal["raise", "stop"]


class TimedFrames(NamedTuple):
    """Frames and when each is shown.

    Attributes:
        pixels: RGB frames, uint8 in `[0, 255]`, shape `(n, height, width, 3)`.
        times: `n` times in seconds from the first frame of the file on, strictly increasing.
    """

    pixels: torch.Tensor
    times: list[Fraction]


def probe_video(path: Source) -> VideoInfo:
    """Read the header and decode the first frame of a video or image.

    Raises:
        VideoError: If the file is missing, empty, not a video or image, or its first frame cannot be decoded.
    """
    with VideoReader(path) as video:
        return video.info


def read_video(
    path: Source,
    start: int = 0,
    num_frames: int | None = None,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
) -> tuple[torch.Tensor, VideoInfo]:
    """Read frames `start` to `start + num_frames` of a video or image into memory.

    Args:
        path: See `VideoReader`.
        start: Index of the first frame, from 0.
        num_frames: How many frames at most; `None` reads to the end. Fewer come back where the file ends earlier.
        background: See `VideoReader`.

    Returns:
        RGB frames, uint8 in `[0, 255]`, shape `(num_frames, height, width, 3)`, and what `probe_video` returns.

    Raises:
        VideoError: As `iter_video`; damaged data always raises.
    """
    with VideoReader(path, background=background) as video:
        return video.read(start, _stop(start, num_frames)), video.info


def iter_video(
    path: Source,
    start: int = 0,
    num_frames: int | None = None,
    chunk_size: int = 16,
    on_error: OnError = "raise",
    *,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Iterator[torch.Tensor]:
    """Stream frames `start` to `start + num_frames` of a video or image, holding one chunk in memory.

    Args:
        path: See `VideoReader`. It is opened and its first frame decoded before this function returns.
        start: Index of the first frame, from 0.
        num_frames: How many frames at most; `None` reads to the end. The file may end earlier.
        chunk_size: See `VideoReader.frames`.
        on_error: See `VideoReader.frames`.
        background: See `VideoReader`.

    Yields:
        RGB frames, uint8 in `[0, 255]`, shape `(n, height, width, 3)` with `1 <= n <= chunk_size`.

    Raises:
        VideoError: As `VideoReader` and `VideoReader.frames`.
    """
    stop = _stop(start, num_frames)
    video = VideoReader(path, background=background)
    chunks = video.frames(start, stop, chunk_size=chunk_size, on_error=on_error)

    def until_closed() -> Iterator[torch.Tensor]:
        with video:
            yield from chunks

    return until_closed()


def _stop(start: int, num_frames: int | None) -> int | None:
    _check_integers(start=start, num_frames=num_frames)
    if num_frames is not None and num_frames < 1:
        raise VideoError(f"`num_frames` must be 1 or more, or None, got {num_frames}.")
    return None if num_frames is None else start + num_frames


def _check_integers(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and not is_integer(value):
            raise VideoError(f"`{name}` must be an integer, got {value!r}.")


class VideoReader:
    """A video or image that is opened once: its header, and any range of its frames; a context manager.

        with VideoReader("clip.mp4") as video:
            clip = video.read(100, 117)
            for frames in video.frames(200):
                ...

    A range holds, bit for bit, what decoding from the start would give. Ranges in ascending order continue where the
    last one ended. For others the reader jumps to the nearest picture from which this is certain. Where that cannot be
    proven of any, it starts over, for which it opens the file again.

    Args:
        source: A video or image file; `"-"`, a named pipe, or an address (`inputs.local_file`); the pictures of one
            video as a pattern (`"f_%04d.png"`), as the folder that they are in, or as a list, at 25 frames per second.
            It is opened, and its first frame decoded, at once.
        square_pixels: Resize frames whose pixels are not square to `VideoInfo.display_size`.
        background: RGB colour in `[0, 255]` over which alpha is composed.

    Attributes:
        info: What the header and the first frame say.

    Raises:
        VideoError: If the file is missing, empty, not a video or image, of a kind that is not supported, or its first
            frame cannot be decoded.
    """

    def __init__(
        self,
        source: Source,
        *,
        square_pixels: bool = False,
        background: tuple[int, int, int] = (255, 255, 255),
    ) -> None:
        is_colour = isinstance(background, Sequence) and len(background) == 3
        if not is_colour or not all(isinstance(level, int) and 0 <= level <= 255 for level in background):
            raise VideoError(f"`background` must be three integers from 0 to 255, got {background!r}.")
        is_path = isinstance(source, str | os.PathLike)
        if not is_path and not isinstance(source, Sequence):
            raise VideoError(f"`source` must be a path or a list of paths, got {source!r}.")
        if not is_path and not source:
            raise VideoError("`source` must name at least one picture, got an empty list.")
        for path in [source] if is_path else source:
            check_path("source", path)
        self._name = os.fspath(source if is_path else source[0])
        self._background = background
        self._files = ExitStack()  # a temporary copy of what is no file
        self._resources = ExitStack()
        self._file: Path
        self._images: ImageFrames | None = None  # which then replaces all below
        self._container: InputContainer
        self._stream: VideoStream
        self._decoding: Decoding | None = None  # `None` while the file stands at no known frame
        self._first_packet: SeekPoint | None = None
        self._seek_points: SeekPoints | None = None
        self._first_stamp: int | None = None
        self._num_frames: int | None = None
        self._num_ranges = 0
        self._end: Fraction | None = None
        self._is_closed = False
        try:
            with named_errors(self._name):
                files = self._find_images(source)
                if files is not None:
                    self._images = self._files.enter_context(
                        ImageFrames(files, background=background, name=self._name)
                    )
                    self.info = describe_images(self._name, self._images)
                else:
                    self._open_video()
            self._stored_size = self.info.height, self.info.width
            self._is_resized = square_pixels and self.info.display_size != (self.info.width, self.info.height)
            if square_pixels:
                width, height = self.info.display_size
                self.info = replace(self.info, width=width, height=height, pixel_aspect_ratio=Fraction(1))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def has_pictures(self) -> bool:
        """Tell whether Pillow reads, which sets filters of warnings, of the whole process, while it does."""
        return self._images is not None

    @property
    def end(self) -> Fraction | None:
        """Seconds from the first frame of the file to the end of the last one, as far as the file tells.

        Known once a range has come to that frame. `None` before, and where the last frame lasts `1 / info.fps`.
        """
        return self._end

    def close(self) -> None:
        """Close the file."""
        self._is_closed = True
        self._decoding = None
        self._resources.close()
        self._files.close()

    def frames(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        chunk_size: int = 16,
        on_error: OnError = "raise",
        packed: bool = False,
    ) -> Iterator[torch.Tensor]:
        """Stream frames `start` to `stop`, holding one chunk in memory; a new range ends the one before.

        Args:
            start: Index of the first frame, from 0.
            stop: Index after the last frame; `None` reads to the end. The file may end earlier.
            chunk_size: Frames per yielded tensor; the last one may be shorter.
            on_error: What to do where data are damaged or the frame size changes: `"raise"`, or `"stop"` to end after
                the last good frame. A cut-off Matroska, WebM or MPEG-TS file looks like a shorter one to FFmpeg and
                just ends early in both cases.
            packed: Lay the three colours of a pixel next to each other in memory, from which `resize_frames` is
                fastest. By default they lie as they are had fastest: those of most videos in three planes per frame,
                of which the tensor is a permuted view.

        Yields:
            RGB frames, uint8 in `[0, 255]`, shape `(n, height, width, 3)`.

        Raises:
            VideoError: If `start` lies beyond the end of the file, or (with `on_error="raise"`) its data are damaged
                or its frame size changes; the message then names the index of the frame reached.
        """
        chunks = self.timed_frames(start, stop, chunk_size=chunk_size, on_error=on_error, packed=packed)
        return (chunk.pixels for chunk in chunks)

    def timed_frames(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        chunk_size: int = 16,
        on_error: OnError = "raise",
        packed: bool = False,
    ) -> Iterator[TimedFrames]:
        """Stream frames as `frames` does, with their times; see `timing.Clock` for what is made of time stamps."""
        _check_integers(start=start, stop=stop, chunk_size=chunk_size)
        if start < 0:
            raise VideoError(f"`start` must be 0 or more, got {start}.")
        if stop is not None and stop <= start:
            raise VideoError(f"`stop` must be more than `start`, {start}, or None, got {stop}.")
        if chunk_size < 1:
            raise VideoError(f"`chunk_size` must be 1 or more, got {chunk_size}.")
        if on_error not in ("raise", "stop"):
            raise VideoError(f"`on_error` must be 'raise' or 'stop', got {on_error!r}.")
        if self._is_closed:
            raise VideoError(f"Cannot read {self._name!r}: the reader is closed.")
        self._num_ranges += 1
        self._end = None
        if self._images is not None:
            frames = self._drawn_frames(self._images, start, stop, on_error, chunk_size)
        else:
            frames = self._decoded_frames(start, stop, on_error, packed or self._is_resized)
        return self._chunks(frames, None if stop is None else stop - start, chunk_size, self._num_ranges)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read frames `start` to `stop` into memory, as one tensor; see `frames`."""
        frames, *rest = self.frames(start, stop, chunk_size=sys.maxsize)
        assert not rest
        return frames

    def count_frames(self) -> int:
        """Return the number of frames in the header, which can be wrong, or count them where it has none."""
        if self._num_frames is None:
            self._num_frames = self.info.num_frames or self._count_decoded()
        return self._num_frames

    def _count_decoded(self) -> int:
        """Count by decoding, without making pixels; ends a range that is being read."""
        if self._is_closed:
            raise VideoError(f"Cannot read {self._name!r}: the reader is closed.")
        self._num_ranges += 1
        with named_errors(self._name):
            decoding = self._go_to(0)
            try:
                return sum(1 for _ in decoding.frames_from(0))
            except Damaged as damage:
                raise VideoError(f"Cannot read {self._name!r} past frame {decoding.next_index}: {damage}.") from damage

    # --- Frames ------------------------------------------------------------------------------------------------------

    def _chunks(
        self,
        frames: Iterator[tuple[Picture | np.ndarray, Fraction]],
        total: int | None,
        chunk_size: int,
        number: int,
    ) -> Iterator[TimedFrames]:
        """Write every frame once, into its chunk."""
        from .pixels import resize_frames

        rooms = Rooms(*self._stored_size)
        left = total
        while left is None or left > 0:
            size = chunk_size if left is None else min(left, chunk_size)
            times: list[Fraction] = []
            buffer: torch.Tensor | None = None
            for frame, time in itertools.islice(frames, size):
                if buffer is None or len(times) == len(buffer):
                    is_packed = frame.is_packed if isinstance(frame, Picture) else True
                    buffer = self._room(rooms, buffer, size, is_packed)
                if isinstance(frame, Picture):
                    with named_errors(self._name):
                        frame.write(buffer[len(times)])
                else:
                    buffer[len(times)].numpy()[...] = frame  # PyTorch's copy takes longer
                times.append(time)
            if buffer is None:
                return
            if len(times) < len(buffer):
                few = buffer[: len(times)]
                buffer = few.clone() if 2 * len(few) < len(buffer) else few  # who keeps few keeps no room for many
            if self._is_resized:
                buffer = resize_frames(buffer, self.info.height, self.info.width).contiguous()
            yield TimedFrames(buffer, times)
            del buffer
            if left is not None:
                left -= len(times)
            if left != 0 and (self._is_closed or self._num_ranges != number):
                raise VideoError(f"Cannot read on in {self._name!r}: the reader was closed, or another range begun.")

    def _room(self, rooms: Rooms, full: torch.Tensor | None, size: int, is_packed: bool) -> torch.Tensor:
        """Return room for up to `size` frames, fewer if a file may be much shorter, with those of a full one."""
        if full is not None:
            room = rooms.take(min(size, 2 * len(full)), is_packed)
            room[: len(full)] = full
            return room
        height, width = self._stored_size
        expected = min(self.info.num_frames or 0, (1 << 30) // (3 * height * width))
        return rooms.take(min(size, max(expected, 16)), is_packed)

    def _drawn_frames(
        self, images: ImageFrames, start: int, stop: int | None, on_error: OnError, chunk_size: int
    ) -> Iterator[tuple[Picture | np.ndarray, Fraction]]:
        if start >= images.num_frames:
            raise self._beyond_end(images.num_frames, start)
        try:
            for index, frame in enumerate(images.arrays_from(start, stop, chunk_size), start):
                if index == images.num_frames - 1 and images.is_animated:
                    self._end = images.duration
                yield frame, images.times[index]
        except VideoError:
            if on_error == "raise":
                raise

    def _decoded_frames(
        self, start: int, stop: int | None, on_error: OnError, is_packed: bool
    ) -> Iterator[tuple[Picture | np.ndarray, Fraction]]:
        progressive = Progressive(RgbConverter(self._background, is_packed))
        clock = Clock(self.info.fps, self._stream.time_base, self._first_stamp, self.info.is_variable_rate)
        # Deinterlacing looks one frame back, so one more is converted on the left; `out` counts what comes out.
        out = first_fed = max(0, start - 1)
        times: deque[Fraction] = deque()
        damage: Damaged | None = None
        last_end = self._last_end()
        with named_errors(self._name):
            decoding = self._go_to(first_fed)
            frames = decoding.frames_from(first_fed)
            for index in itertools.count(first_fed):
                try:
                    frame = next(frames, None)
                except Damaged as error:
                    frame, damage = None, error
                if frame is not None:
                    times.append(clock.time(index, _stamp(frame)))
                    last_end.push(times[-1], frame.duration)
                elif damage is None:
                    self._end = last_end.find()
                for picture in progressive.push(frame):  # `None` brings out what is still inside
                    time = times.popleft()
                    if out >= start:
                        yield picture, time
                    out += 1
                    if out == stop:
                        if out == self.info.num_frames:
                            self._end = last_end.find()
                        return
                if frame is None:
                    break
        index = decoding.next_index
        if damage is not None and on_error == "raise":
            raise VideoError(
                f"Cannot read {self._name!r} past frame {index}: {damage}; `on_error='stop'` ends before it."
            )
        if index <= start:
            raise self._beyond_end(index, start)

    def _last_end(self) -> LastEnd:
        total = self._stream.duration if has_sample_table(self._container) else None
        # Others that FFmpeg reads say nothing of a frame's duration, and it guesses.
        is_told = total is not None or "matroska" in self._container.format.name.split(",")
        tick = self._stream.time_base if is_told else None
        return LastEnd(self.info.fps, tick, self.info.is_variable_rate, total)

    def _beyond_end(self, num_frames: int, start: int) -> VideoError:
        return VideoError(
            f"`start` must be less than the number of frames of {self._name!r}, {num_frames}, got {start}."
        )

    # --- Opening and seeking -----------------------------------------------------------------------------------------

    def _find_images(self, source: Source) -> Path | list[Path] | None:
        """Return the picture, or the pictures, that `source` names; `None` for a video, whose file is then known."""
        if not isinstance(source, str | os.PathLike):
            return [Path(file) for file in source]
        sequence = find_sequence(source)
        if sequence is not None:
            return sequence
        if Path(source).is_dir():
            files = list_frames(source)
            if not files:
                raise VideoError(
                    f"Cannot read {self._name!r}: it is a folder without pictures, expected a video or image "
                    "file, or a folder of the frames of one video."
                )
            return files
        self._file = self._files.enter_context(local_file(source))
        # A stream of JPEG pictures begins as one of them does.
        is_stream = self._file.suffix.lower() in (".mjpg", ".mjpeg")
        return self._file if can_read(self._file) and not is_stream else None

    def _open_video(self) -> None:
        self._open_container()
        stamps, packets = self._look_ahead()
        frame = self._start(packets)
        self._first_stamp = _stamp(frame)
        matrix = display_matrix(frame)
        self.info = describe_video(self._name, self._container, self._stream, frame, matrix, stamps)
        # Where seeking may be exact; alpha of WebM is a stream of its own, with key frames of its own.
        is_alone = len(self._container.streams.video) == 1 and not self.info.is_image
        has_alpha_stream = "alpha_mode" in self._stream.metadata
        if is_alone and not has_alpha_stream and not frame.interlaced_frame and matrix in CLOCKWISE:
            self._seek_points = SeekPoints.of(self._container, self._stream)

    def _start(self, packets: Iterator[Packet]) -> VideoFrame:
        """Decode from the start on, and return the first frame, which the decoding still has."""
        self._decoding = Decoding(packets, self._stream, 0)
        try:
            frame = next(self._decoding.frames_from(0), None)
        except Damaged as damage:
            raise VideoError(f"Cannot read {self._name!r}: its first frame cannot be decoded ({damage}).") from damage
        if frame is None:
            raise VideoError(f"Cannot read {self._name!r}: it holds no video frame.")
        return frame

    def _open_container(self) -> None:
        self._decoding = None
        self._resources.close()
        self._container = self._resources.enter_context(open_input(self._file, self._name))
        self._stream = find_video_stream(self._container, self._name)

    def _look_ahead(self) -> tuple[list[int], Iterator[Packet]]:
        """Return ordered time stamps, all or the first ones, and the packets from the first on."""
        packets = self._packets(0)
        if has_sample_table(self._container):
            return sorted(entry.timestamp for entry in self._stream.index_entries if not entry.is_discard), packets
        seen: list[Packet] = []
        error: FFmpegError | CutOff | None = None
        is_whole = False
        try:
            for packet in packets:
                seen.append(packet)
                is_whole = not packet.size
                if len(seen) == _NUM_AHEAD or sum(packet.size for packet in seen) > _BYTES_AHEAD:
                    break
        except (FFmpegError, CutOff) as caught:
            error = caught
        stamps = sorted({packet.pts for packet in seen if packet.pts is not None})
        if not is_whole:
            # Frames that are shown before the last of these may still be to come.
            last = max((packet.dts for packet in seen if packet.dts is not None), default=None)
            stamps = stamps[:-16] if last is None else [stamp for stamp in stamps if stamp <= last]

        nothing = Packet()

        def replay() -> Iterator[Packet]:
            for index in range(len(seen)):
                yield seen[index]
                seen[index] = nothing
            if error is not None:
                raise error
            yield from packets

        return stamps, replay()

    def _packets(self, number: int) -> Iterator[Packet]:
        """Yield the packets from the present one, which has this number, on; raise `CutOff` where some are lost."""
        for packet in self._container.demux(self._stream):
            if self._first_packet is None:
                self._first_packet = SeekPoint.of(0, packet)
            if not packet.size and packet.pts is None and packet.dts is None:  # the end
                self._check_end(number)
            number += 1
            yield packet

    def _check_end(self, num_packets: int) -> None:
        # FFmpeg takes a file that ends between two packets for a whole one.
        entries = self._stream.index_entries
        if has_sample_table(self._container) and num_packets < len(entries):
            lost = entries[num_packets]
            if lost.pos + lost.size > self._file.stat().st_size:
                raise CutOff(lost.timestamp)

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
        self._open_container()
        self._start(self._packets(0))
        assert self._decoding is not None
        return self._decoding

    def _seek(self, point: SeekPoint) -> Decoding | None:
        """Start a decoding at a seek point; `None` where the index of the container leads elsewhere."""
        self._decoding = None
        try:
            self._container.seek(point.pts, stream=self._stream)
            decoding = Decoding(self._packets(point.index), self._stream, point.index)
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
            packets = self._packets(point.index)
            packet = next(packets, None)
            if packet is not None and SeekPoint.of(point.index, packet) == point:
                return itertools.chain([packet], packets), point.index
        except FFmpegError:
            pass
        self._open_container()
        return self._packets(0), 0


def _stamp(frame: VideoFrame) -> int | None:
    return frame.dts if frame.pts is None else frame.pts

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

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, cast

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.filter import Graph
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream


VIDEO_EXTENSIONS = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# Degrees of a display matrix (a, b, c, d): x' = a x + c y, y' = b x + d y with y pointing down. Others mirror.
_CLOCKWISE = {(1, 0, 0, 1): 0, (0, 1, -1, 0): 90, (-1, 0, 0, -1): 180, (0, -1, 1, 0): 270}

Backend = Literal["pyav", "torchcodec"]
OnError = Literal["raise", "stop"]
PathLike = str | os.PathLike[str]


class VideoError(ValueError):
    """A file cannot be read or written, or a range, size or option is not legal for it; the message says which."""


class _Damaged(Exception):
    """The stream cannot be decoded any further; the message says why."""


@dataclass(frozen=True)
class VideoInfo:
    """What the header and the first decoded frame say about a file.

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


def list_videos(folder: PathLike) -> list[Path]:
    """List all video and image files below `folder`, sorted by path; hidden files and folders are left out.

    Raises:
        VideoError: If `folder` is not a folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise VideoError(f"`folder` must be an existing folder, got {str(folder)!r}.")
    known = {*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS}
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in known
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    )


def probe_video(path: PathLike) -> VideoInfo:
    """Read the header and decode the first frame of a video or image.

    Raises:
        VideoError: If the file is missing, empty, not a video or image, or its first frame cannot be decoded.
    """
    return _probe(path)[0]


def read_video(
    path: PathLike, start: int = 0, num_frames: int | None = None, backend: Backend = "pyav"
) -> tuple[torch.Tensor, VideoInfo]:
    """Read frames `start` to `start + num_frames` of a video or image into memory.

    Args:
        path: A video or image file.
        start: Index of the first frame, from 0.
        num_frames: How many frames at most; `None` reads to the end. Fewer come back where the file ends earlier.
        backend: See `iter_video`.

    Returns:
        RGB frames, uint8 in `[0, 255]`, shape `(num_frames, height, width, 3)`, and what `probe_video` returns.

    Raises:
        VideoError: As `iter_video`; damaged data always raises.
    """
    return torch.cat(list(iter_video(path, start, num_frames, backend=backend))), probe_video(path)


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
        chunk_size: Frames per yielded tensor; the last one may be shorter.
        backend: `"torchcodec"` is faster at random access and gives the same pixels. It repairs damaged data without
            a word, so `on_error` says nothing there; interlaced or mirrored files and images are read by PyAV anyway.
        on_error: What to do where data are damaged or the frame size changes: `"raise"`, or `"stop"` to end after the
            last good frame. A file whose first frame cannot be decoded always raises. A cut-off Matroska, WebM or
            MPEG-TS file looks like a shorter one to FFmpeg and just ends early in both cases.

    Yields:
        RGB frames, uint8 in `[0, 255]`, shape `(n, height, width, 3)` with `1 <= n <= chunk_size`.

    Raises:
        VideoError: If the file cannot be read, `start` lies beyond its end, or (with `on_error="raise"`) its data are
            damaged or its frame size changes; the message then names the index of the frame reached.
        ImportError: If `backend="torchcodec"` and torchcodec is not installed.
    """
    if start < 0:
        raise VideoError(f"`start` must be 0 or more, got {start}.")
    if num_frames is not None and num_frames < 1:
        raise VideoError(f"`num_frames` must be 1 or more, or None, got {num_frames}.")
    if chunk_size < 1:
        raise VideoError(f"`chunk_size` must be 1 or more, got {chunk_size}.")
    if backend not in ("pyav", "torchcodec"):
        raise VideoError(f"`backend` must be 'pyav' or 'torchcodec', got {backend!r}.")
    if on_error not in ("raise", "stop"):
        raise VideoError(f"`on_error` must be 'raise' or 'stop', got {on_error!r}.")
    _, is_plain = _probe(path)
    if backend == "torchcodec":
        decoder_class = _torchcodec_decoder_class()
        if is_plain:
            return _iter_torchcodec(decoder_class, path, start, num_frames, chunk_size)
    return _iter_pyav(path, is_plain, start, num_frames, chunk_size, on_error)


@contextmanager
def open_input(path: PathLike) -> Iterator[InputContainer]:
    """Open a file for reading; everything that goes wrong, now or in the body, is a `VideoError` naming the file."""
    file = Path(path)
    try:
        if not file.exists():
            raise VideoError(f"Cannot read {str(path)!r}: the file does not exist.")
        if file.is_dir():
            raise VideoError(f"Cannot read {str(path)!r}: it is a folder, expected a video or image file.")
        if file.stat().st_size == 0:
            raise VideoError(f"Cannot read {str(path)!r}: the file is empty.")
        # An absolute path is never taken for a protocol ("a:b.mp4"), "pattern_type" stops "%d" in a name from being
        # expanded, and the whitelist keeps a playlist that calls itself a video off the network. Tags in a foreign
        # encoding are no reason to refuse a video.
        options = {"protocol_whitelist": "file"} | ({"pattern_type": "none"} if "%" in file.name else {})
        with av.open(str(file.absolute()), "r", options=options, metadata_errors="replace") as container:
            yield container
    except (FFmpegError, OSError) as error:
        reason = f"{getattr(error, 'strerror', None) or error}".rstrip(".")
        raise VideoError(
            f"Cannot read {str(path)!r} as a video or image: {reason} (damaged, truncated, not permitted or of an "
            "unknown format)."
        ) from error


def _video_stream(container: InputContainer, path: PathLike) -> VideoStream:
    # Cover art of a music file is a video stream to FFmpeg, "tty" renders text as a video, playlists name other files.
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams or container.format.name in ("tty", "hls", "concat", "dash"):
        kind = "only audio" if container.streams.audio else "no video or image"
        raise VideoError(f"Cannot read {str(path)!r}: it holds {kind}, expected a video stream.")
    stream = streams[0]
    if cast(Any, stream).codec_context is None:
        raise VideoError(f"Cannot read {str(path)!r}: there is no decoder for its video codec.")
    stream.codec_context.options = {"err_detect": "crccheck+explode"}  # report damage instead of concealing it
    stream.thread_type = "AUTO"
    return stream


def _probe(path: PathLike) -> tuple[VideoInfo, bool]:
    """`probe_video`, and whether the file is plain: one progressive video stream, not mirrored, not an image."""
    with open_input(path) as container:
        stream = _video_stream(container, path)
        try:
            frame = next(_decode(container, stream), None)
        except _Damaged as damage:
            raise VideoError(f"Cannot read {str(path)!r}: its first frame cannot be decoded ({damage}).") from damage
        if frame is None:
            raise VideoError(f"Cannot read {str(path)!r}: it holds no video frame.")
        is_still = container.format.name.endswith("_pipe") or container.format.name == "image2"
        is_image = is_still or container.format.name in ("gif", "apng", "webp", "webp_anim")
        duration: float | None = None
        if not is_still and stream.duration is not None and stream.time_base is not None:
            duration = float(stream.duration * stream.time_base)
        elif not is_still and container.duration is not None:
            duration = container.duration / av.time_base
        matrix = _display_matrix(frame)
        width, height = frame.width, frame.height
        info = VideoInfo(
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
            is_image=is_image,
        )
        is_rotated = matrix in _CLOCKWISE
        return info, not (is_image or frame.interlaced_frame or len(container.streams.video) > 1) and is_rotated


def _decode(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Yield frames in presentation order; raise `_Damaged` after the last one that is certainly good."""
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                break
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise _Damaged("the decoder marks the frame as corrupt")
                yield frame
        else:
            return
        # Cut off inside a packet. What the decoder still holds is good, but only up to this packet's decoding time is
        # it certain that no frame in between is missing.
        for frame in stream.decode(None):
            if frame.pts is None or packet.dts is None or frame.pts >= packet.dts:
                break
            yield frame
    except FFmpegError as error:
        raise _Damaged(error.strerror or str(error)) from error
    raise _Damaged("the file is truncated or a packet is damaged")


def _find_keyframe(path: PathLike, start: int) -> tuple[int, int] | None:
    """Find the last frame at or before `start` from which decoding is certain to give what it gives from the start.

    Returns its frame index and presentation timestamp, or `None` where there is no proof. The proof: an IDR picture
    (H.264, HEVC) or a VP9 key frame resets the decoder, and all packets before it are shown before it, so its frame
    index is the number of packets before it. That needs one packet per frame: these codecs in MP4, MOV or Matroska,
    progressive, starting on such a picture, and with no packet marked for discarding by an edit list.
    """
    with open_input(path) as container:
        stream = _video_stream(container, path)
        codec = stream.codec_context.codec.canonical_name
        extradata = stream.codec_context.extradata or b""
        if not {"mp4", "matroska"} & set(container.format.name.split(",")) or codec not in ("h264", "hevc", "vp9"):
            return None
        if codec != "vp9" and (len(extradata) < 23 and codec == "hevc" or len(extradata) < 7 or extradata[0] != 1):
            return None  # not in length-prefixed form
        length_size = 0 if codec == "vp9" else (extradata[4 if codec == "h264" else 21] & 3) + 1
        found: tuple[int, int] | None = None
        for index, packet in enumerate(container.demux(stream)):
            if index > start or not packet.size:
                break
            if packet.is_discard or packet.is_corrupt or packet.pts is None:
                return None
            if packet.is_keyframe and (codec == "vp9" or _is_idr(bytes(packet), codec, length_size)):
                found = (index, packet.pts)
            elif index == 0:
                return None
        return found


def _is_idr(data: bytes, codec: str, length_size: int) -> bool:
    """Whether an access unit of length-prefixed NAL units holds an IDR picture (H.264 type 5, HEVC 19 and 20)."""
    position = 0
    while position + length_size < len(data):
        header = data[position + length_size]
        if (header & 0x1F) == 5 if codec == "h264" else ((header >> 1) & 0x3F) in (19, 20):
            return True
        position += length_size + int.from_bytes(data[position : position + length_size])
    return False


@contextmanager
def _decode_from(path: PathLike, start: int, may_seek: bool) -> Iterator[tuple[int, Iterator[VideoFrame]]]:
    """Open `path` and yield the index of the first frame to come, at most `start`, and the frames from there on."""
    key = _find_keyframe(path, start) if may_seek and start > 0 else None
    if key is not None and key[0] > 0:
        with open_input(path) as container:
            stream = _video_stream(container, path)
            container.seek(key[1], stream=stream)
            frames = _decode(container, stream)
            try:
                first = next(frames, None)
            except _Damaged:
                first = None
            if first is not None and first.key_frame and first.pts == key[1]:  # else the container's index is off

                def rest() -> Iterator[VideoFrame]:
                    yield first
                    yield from frames

                yield key[0], rest()
                return
    with open_input(path) as container:
        yield 0, _decode(container, _video_stream(container, path))


class _RgbConverter:
    """Decoded frames -> upright, progressive RGB tensors, through a filter graph that is built when the first comes.

    The graph and not `frame.to_ndarray("rgb24")`: for more than 8 bits that one resamples chroma in another way than
    FFmpeg's filters and torchcodec do. Up to one frame stays inside while the source is interlaced; `push(None)`
    brings it out.
    """

    def __init__(self) -> None:
        self.graph: Graph | None = None
        self.key: tuple[Any, ...] = ()
        self.interlaced = False

    def push(self, frame: VideoFrame | None) -> list[torch.Tensor]:
        images: list[torch.Tensor] = []
        if frame is None:
            return self._flush()
        self.interlaced = self.interlaced or frame.interlaced_frame
        key = (frame.format.name, frame.colorspace, frame.color_range, _display_matrix(frame), self.interlaced)
        if key != self.key:
            images += self._flush()
            self.key = key
            self.graph = self._build(frame)
        assert self.graph is not None
        self.graph.vpush(frame)
        return images + self._pull()

    def _build(self, frame: VideoFrame) -> Graph:
        graph = Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 25)
        )
        nodes = [source, graph.add("format", "rgb24"), graph.add("buffersink")]
        if self.interlaced:
            nodes.insert(1, graph.add("bwdif", "mode=send_frame:deint=interlaced"))
        graph.link_nodes(*nodes).configure()
        return graph

    def _flush(self) -> list[torch.Tensor]:
        if self.graph is None:
            return []
        self.graph.vpush(None)
        images = self._pull()
        self.graph = None
        return images

    def _pull(self) -> list[torch.Tensor]:
        assert self.graph is not None
        images: list[torch.Tensor] = []
        while True:
            try:
                frame = self.graph.vpull()
            except (BlockingIOError, EOFError):
                return images
            a, b, c, d = self.key[3]
            pixels = torch.from_numpy(frame.to_ndarray())
            if a:
                flips = [0] * (d < 0) + [1] * (a < 0)
            else:
                pixels = pixels.transpose(0, 1)
                flips = [0] * (b < 0) + [1] * (c < 0)
            images.append(pixels.flip(flips) if flips else pixels)


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """The display matrix's `(a, b, c, d)` as signs, for a multiple of 90 degrees, with or without mirroring."""
    data: Any = cast(Any, frame.side_data).get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    m = np.frombuffer(bytes(data), dtype=np.int32)
    a, b, c, d = (int(m[i]) for i in (0, 1, 3, 4))
    if a == b == c == d == 0:
        return 1, 0, 0, 1
    if abs(a) >= abs(b):
        return (-1 if a < 0 else 1), 0, 0, (-1 if d < 0 else 1)
    return 0, (-1 if b < 0 else 1), (-1 if c < 0 else 1), 0


def _iter_pyav(
    path: PathLike, may_seek: bool, start: int, num_frames: int | None, chunk_size: int, on_error: OnError
) -> Iterator[torch.Tensor]:
    images = _iter_images(path, may_seek, start, num_frames, on_error)
    while chunk := list(itertools.islice(images, chunk_size)):
        yield torch.stack(chunk)


def _iter_images(
    path: PathLike, may_seek: bool, start: int, num_frames: int | None, on_error: OnError
) -> Iterator[torch.Tensor]:
    stop = None if num_frames is None else start + num_frames
    converter = _RgbConverter()
    # Deinterlacing looks one frame back, so one more is converted on the left; `out` counts what leaves the converter.
    out = first_fed = max(0, start - 1)
    size: tuple[int, int] | None = None
    damage: _Damaged | None = None
    with _decode_from(path, first_fed, may_seek) as (index, frames):
        try:
            for frame in frames:
                size = size or (frame.width, frame.height)
                if size != (frame.width, frame.height):
                    raise _Damaged(f"the frame size changes from {size[0]}x{size[1]} to {frame.width}x{frame.height}")
                if index >= first_fed:
                    for image in converter.push(frame):
                        if out >= start:
                            yield image
                        out += 1
                        if out == stop:
                            return
                index += 1
        except _Damaged as error:
            damage = error
    for image in converter.push(None):
        if out >= start:
            yield image
        out += 1
        if out == stop:
            return
    if damage is not None and on_error == "raise":
        raise VideoError(f"Cannot read {str(path)!r} past frame {index}: {damage}; `on_error='stop'` ends before it.")
    if index <= start:
        raise VideoError(f"`start` must be less than the number of frames of {str(path)!r}, {index}, got {start}.")


def _torchcodec_decoder_class() -> Any:
    try:
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # RuntimeError: installed, but it finds no FFmpeg libraries
        raise ImportError(
            '`backend="torchcodec"` needs torchcodec and the FFmpeg libraries of the system: '
            'pip install "diffusers-leanvae[torchcodec]".'
        ) from error
    return VideoDecoder


def _iter_torchcodec(
    decoder_class: Any, path: PathLike, start: int, num_frames: int | None, chunk_size: int
) -> Iterator[torch.Tensor]:
    try:
        decoder = decoder_class(os.fspath(path), dimension_order="NHWC", seek_mode="exact")
        total = len(decoder)
        if start >= total:
            raise VideoError(f"`start` must be less than the number of frames of {str(path)!r}, {total}, got {start}.")
        stop = total if num_frames is None else min(total, start + num_frames)
        for first in range(start, stop, chunk_size):
            yield decoder.get_frames_in_range(first, min(first + chunk_size, stop)).data
    except (RuntimeError, IndexError) as error:
        raise VideoError(f"Cannot read {str(path)!r} with torchcodec: {error}") from error

"""uint8 RGB tensors `(num_frames, height, width, 3)` -> video and image files, with the sound of another file."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
import torch
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.filter import Graph
from av.packet import Packet
from av.stream import Disposition
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..atomic import commit, partial_path, remove_stale_partials
from .containers import PathLike, VideoError, open_input


# Writable extensions, each with the codecs that its container really holds and players accept.
WRITABLE_VIDEO: dict[str, tuple[str, ...]] = {
    ".mp4": ("libx264", "libx265", "libvpx-vp9"),
    ".mkv": ("libx264", "libx265", "libvpx-vp9", "ffv1"),
    ".mov": ("libx264", "libx265"),
    ".webm": ("libvpx-vp9",),
}
# Extension -> codec, pixel format, encoder options. JPEG keeps full chroma and FFmpeg's best quality step.
WRITABLE_IMAGE: dict[str, tuple[str, str, dict[str, str]]] = {
    ".png": ("png", "rgb24", {}),
    ".jpg": ("mjpeg", "yuvj444p", {"qmin": "1", "qmax": "1"}),
    ".jpeg": ("mjpeg", "yuvj444p", {"qmin": "1", "qmax": "1"}),
    ".webp": ("libwebp", "bgra", {"lossless": "1"}),
}

_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
_COLORSPACES = {"bt709": 1, "bt470bg": 5}  # AVColorSpace
# Chroma is averaged over the pixels that share it, which is what the reader, repeating it, takes it to be.
_SCALE = "flags=area+accurate_rnd+full_chroma_int:out_color_matrix={}:out_range={}"


class VideoWriter:
    """Write uint8 RGB frames to a video file, or one frame to an image file; a context manager.

    The file appears under its name only when the writer is closed without an error: until then frames go to a hidden
    file in the same folder, which is removed when anything fails, and an older file of that name is kept.

    Colours are BT.709, limited range, and tagged so. Even sizes are stored as 4:2:0. A size with an odd side is stored
    as 4:4:4, which keeps every pixel but is played by fewer players. `codec="ffv1"` (`.mkv` only) stores RGB without
    any loss, as do `.png` and `.webp`.

    Args:
        path: The file to write. `.mp4`, `.mkv`, `.mov` or `.webm` for a video; `.png`, `.jpg`, `.jpeg` or `.webp` for
            an image, which takes exactly one frame and ignores all other arguments but `overwrite`.
        fps: Constant frame rate in frames per second, more than 0. A `Fraction` is kept exactly, a float becomes the
            nearest fraction with a denominator up to 1001.
        codec: `"libx264"`, `"libx265"`, `"libvpx-vp9"` (the only one for `.webm`) or `"ffv1"`.
        crf: Constant quality, 0 (best) to 51, or to 63 for VP9; unused by `ffv1`.
        preset: Speed preset of x264 and x265, `"ultrafast"` to `"veryslow"`; unused by the other codecs.
        audio_from: A file whose first audio stream is copied packet by packet, re-encoded (with a warning) only where
            the container cannot hold its codec. It keeps its place in time relative to that file's first frame. It is
            cut at the end of the written video, unless all of the source's frames were written: then nothing is cut.
        overwrite: Whether an existing file may be replaced.

    Raises:
        VideoError: If the extension, codec, rate or quality is not legal, the folder does not exist, the file exists
            and `overwrite` is false, `audio_from` cannot be read, or (on `close`) no frame was written.
    """

    def __init__(
        self,
        path: PathLike,
        fps: Fraction | float,
        *,
        codec: str = "libx264",
        crf: float = 16,
        preset: str = "medium",
        audio_from: PathLike | None = None,
        overwrite: bool = True,
    ) -> None:
        self.path = Path(path)
        self.num_frames = 0
        suffix = self.path.suffix.lower()
        if suffix not in WRITABLE_VIDEO and suffix not in WRITABLE_IMAGE:
            legal = ", ".join([*WRITABLE_VIDEO, *WRITABLE_IMAGE])
            raise VideoError(f"Cannot write {str(path)!r}: the extension must be one of {legal}, got {suffix!r}.")
        self._is_image = suffix in WRITABLE_IMAGE
        if not self._is_image and codec not in WRITABLE_VIDEO[suffix]:
            legal = ", ".join(WRITABLE_VIDEO[suffix])
            raise VideoError(
                f"Cannot write {str(path)!r}: `codec` must be one of {legal} for {suffix}, got {codec!r}."
            )
        max_crf = 63 if codec == "libvpx-vp9" else 51
        if not 0 <= crf <= max_crf:
            raise VideoError(f"`crf` must be 0 to {max_crf} for {codec}, got {crf}.")
        if preset not in _PRESETS:
            raise VideoError(f"`preset` must be one of {', '.join(_PRESETS)}, got {preset!r}.")
        if not 0 < fps < 100000:
            raise VideoError(f"`fps` must be more than 0 and less than 100000, got {fps}.")
        if self.path.is_dir():
            raise VideoError(f"Cannot write {str(path)!r}: it is a folder.")
        if not self.path.parent.is_dir():
            raise VideoError(f"Cannot write {str(path)!r}: the folder {str(self.path.parent)!r} does not exist.")
        if not overwrite and self.path.exists():
            raise VideoError(f"Cannot write {str(path)!r}: it exists and `overwrite` is false.")
        self._fps = Fraction(fps).limit_denominator(1001) if isinstance(fps, float) else Fraction(fps)
        self._codec, self._crf, self._preset = codec, crf, preset
        remove_stale_partials(self.path)
        self._partial = partial_path(self.path, "partial", suffix)
        self._resources = ExitStack()
        self._container: OutputContainer | None = None
        self._stream: VideoStream
        self._graph: Graph
        self._size = (0, 0)  # height, width
        self._audio: _AudioSource | None = None
        self._closed = False
        if audio_from is not None and not self._is_image:
            self._audio = self._resources.enter_context(_open_audio(audio_from))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is None:
            self.close()
        else:
            self.abort()

    def write(self, frames: torch.Tensor | np.ndarray) -> None:
        """Append frames.

        Args:
            frames: RGB, uint8 in `[0, 255]`, shape `(n, height, width, 3)`, on any device. The first call fixes
                `height` and `width` (any size); `n` may be 0.

        Raises:
            VideoError: If dtype, shape or size is not that, or the frames cannot be encoded or stored. The file is
                given up then.
        """
        if self._closed:
            raise VideoError(f"Cannot write to {str(self.path)!r}: the writer is closed.")
        array = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else frames
        try:
            if array.dtype != np.uint8:
                raise VideoError(f"`frames` must be uint8 in [0, 255], got {array.dtype}.")
            if array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape[1:]:
                raise VideoError(f"`frames` must have shape (n, height, width, 3), got {tuple(array.shape)}.")
            if self._container is not None and array.shape[1:3] != self._size:
                raise VideoError(f"`frames` must be {self._size} (height, width) as before, got {array.shape[1:3]}.")
            if self._is_image and self.num_frames + len(array) > 1:
                raise VideoError(f"Cannot write {str(self.path)!r}: an image file holds one frame, got more.")
            with self._named_errors():
                if self._container is None and len(array):
                    self._container = self._open(*array.shape[1:3])
                for image in array:
                    self._write_one(image)
        except BaseException:
            self.abort()
            raise

    def close(self) -> None:
        """Finish the file and give it its name; does nothing when the writer is closed already.

        Raises:
            VideoError: If no frame was written or the file cannot be stored; an older file is kept then.
        """
        if self._closed:
            return
        try:
            if self._container is None:
                raise VideoError(f"Cannot write {str(self.path)!r}: no frame was written.")
            with self._named_errors():
                self._container.mux(self._stream.encode(None))
                if self._audio is not None:
                    self._mux_audio(self._audio.limit(self.num_frames / self._fps, 1 / self._fps))
                self._resources.close()
                commit(self._partial, self.path)
            self._closed = True
        finally:
            self.abort()

    def abort(self) -> None:
        """Give the file up: remove what was written so far and leave an older file as it is."""
        if self._closed:
            return
        self._closed = True
        try:
            with self._named_errors():
                self._resources.close()
        except VideoError:  # a container that never got its header cannot be closed properly, and need not be
            pass
        self._partial.unlink(missing_ok=True)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (FFmpegError, OSError) as error:
            raise VideoError(f"Cannot write {str(self.path)!r}: {error}.") from error

    def _open(self, height: int, width: int) -> OutputContainer:
        suffix = self.path.suffix.lower()
        if self._is_image:
            codec, pixel_format, options = WRITABLE_IMAGE[suffix]
            # "update" makes the image writer take "%" in a name as it is.
            container = av.open(str(self._partial.absolute()), "w", format="image2", options={"update": "1"})
        else:
            codec, options = self._codec, {}
            pixel_format = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"
            if codec == "ffv1":
                pixel_format = "bgr0"
            elif codec == "libvpx-vp9":
                options = {"crf": f"{self._crf:g}", "b": "0", "row-mt": "1"}
            else:
                options = {"crf": f"{self._crf:g}", "preset": self._preset}
            if codec == "libx264":
                # One file on every processor. x264's own code for AVX-512 even reads memory that was never written, in
                # its macroblock trees: a file would differ in every call.
                options["x264-params"] = "cpu-independent=1"
            if codec == "libx265":
                options["x265-params"] = "log-level=error"
            container = av.open(str(self._partial.absolute()), "w")
        self._resources.enter_context(container)
        stream = container.add_stream(codec, rate=self._fps, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.time_base = 1 / self._fps
        if codec == "libx265" and suffix != ".mkv":
            stream.codec_context.codec_tag = "hvc1"  # the tag without which Apple's players refuse the file
        # JPEG is BT.601, full range, by definition.
        matrix, tagged = ("bt601", "bt470bg") if codec == "mjpeg" else ("bt709", "bt709")
        value_range = "pc" if codec == "mjpeg" else "tv"
        is_rgb = pixel_format in ("rgb24", "bgra", "bgr0")
        if not is_rgb:
            stream.codec_context.colorspace = _COLORSPACES[tagged]
            stream.codec_context.color_range = 2 if value_range == "pc" else 1
            if not self._is_image:
                stream.codec_context.color_primaries = stream.codec_context.color_trc = 1  # BT.709
        self._graph = Graph()
        source = self._graph.add_buffer(
            width=width, height=height, format=VideoFormat("rgb24"), time_base=1 / self._fps
        )
        convert = [] if is_rgb else [self._graph.add("scale", _SCALE.format(matrix, value_range))]
        last = self._graph.add("format", pixel_format)
        self._graph.link_nodes(source, *convert, last, self._graph.add("buffersink")).configure()
        self._stream, self._size = stream, (height, width)
        if self._audio is not None:
            self._audio.attach(container)
        return container

    def _write_one(self, image: np.ndarray) -> None:
        assert self._container is not None
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = self.num_frames, 1 / self._fps
        self._graph.vpush(frame)
        self._container.mux(self._stream.encode(self._graph.vpull()))
        self.num_frames += 1
        if self._audio is not None:  # in step with the video, or the muxer would hold all of it back
            self._mux_audio(self.num_frames / self._fps)

    def _mux_audio(self, until: Fraction | None) -> None:
        assert self._container is not None and self._audio is not None
        for packet in self._audio.packets_before(until):
            self._container.mux(packet)


class _AudioSource:
    """The packets of a file's first audio stream, in time relative to that file's first video frame."""

    def __init__(self, container: InputContainer, path: PathLike) -> None:
        self.path, self.container = path, container
        self.stream: AudioStream | None = next(iter(container.streams.audio), None)
        self.waiting: list[Packet] = []
        self.packets: Iterator[Packet] = iter(())
        self.video_duration: Fraction | None = None
        self.origin = Fraction(0)
        if self.stream is None:
            warnings.warn(f"{str(path)!r} has no audio stream; the video is written without sound.", stacklevel=4)
        videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        reference = videos[0] if videos else self.stream
        if reference is not None and reference.time_base is not None:
            self.origin = (reference.start_time or 0) * reference.time_base
            if videos and reference.duration is not None:
                self.video_duration = reference.duration * reference.time_base
            elif videos and container.duration is not None:
                self.video_duration = Fraction(container.duration, av.time_base)

    def attach(self, output: OutputContainer) -> None:
        """Add the audio stream to `output`, as it is or (where `output` cannot hold it) as AAC or Opus."""
        if self.stream is None:
            return
        codec = self.stream.codec_context.codec.canonical_name
        if codec in output.supported_codecs:
            self.packets = self._copy(output.add_stream_from_template(self.stream))
            return
        encoder = "libopus" if output.format.name == "webm" else "aac"
        warnings.warn(
            f"The audio of {str(self.path)!r} is re-encoded: {output.format.name} holds no {codec}.", stacklevel=6
        )
        target = output.add_stream(encoder, rate=48000 if encoder == "libopus" else self.stream.rate)
        assert isinstance(target, AudioStream)
        # Mono stays mono; all else becomes stereo. Encoders refuse a bare "2 channels", as AVI files have it.
        target.layout = "mono" if self.stream.layout.nb_channels == 1 else "stereo"
        self.packets = self._encode(target)

    def _copy(self, target: AudioStream) -> Iterator[Packet]:
        assert self.stream is not None
        for packet in self.container.demux(self.stream):
            if packet.size:  # the last one is empty and only means the end
                shift = round(self.origin / packet.time_base)
                packet.pts = None if packet.pts is None else packet.pts - shift
                packet.dts = None if packet.dts is None else packet.dts - shift
                packet.stream = target
                yield packet

    def _encode(self, target: AudioStream) -> Iterator[Packet]:
        assert self.stream is not None
        for frame in self.container.decode(self.stream):
            if frame.pts is not None and frame.time_base is not None:
                frame.pts -= round(self.origin / frame.time_base)
            yield from target.encode(frame)
        yield from target.encode(None)

    def packets_before(self, until: Fraction | None) -> Iterator[Packet]:
        """Yield the packets not yet yielded that start before `until` seconds; `None` yields all."""
        while packet := self.waiting.pop() if self.waiting else next(self.packets, None):
            time = packet.pts if packet.pts is not None else packet.dts
            if until is not None and time is not None and time * packet.time_base >= until:
                self.waiting.append(packet)
                return
            yield packet

    def limit(self, written: Fraction, frame_duration: Fraction) -> Fraction | None:
        """End of the sound of a video of `written` seconds: `None`, nowhere, where that is the whole source."""
        if self.video_duration is not None and written > self.video_duration - frame_duration:
            return None
        return written


@contextmanager
def _open_audio(path: PathLike) -> Iterator[_AudioSource]:
    with open_input(path) as container:
        yield _AudioSource(container, path)


def write_video(path: PathLike, frames: torch.Tensor | np.ndarray, fps: Fraction | float, **options: Any) -> None:
    """Write all of a video, or an image, at once.

    Args:
        path: See `VideoWriter`.
        frames: RGB, uint8 in `[0, 255]`, shape `(num_frames, height, width, 3)`.
        fps: Frames per second.
        options: The keyword arguments of `VideoWriter`.

    Raises:
        VideoError: As `VideoWriter`.
    """
    with VideoWriter(path, fps, **options) as writer:
        writer.write(frames)

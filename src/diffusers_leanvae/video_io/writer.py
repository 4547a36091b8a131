"""uint8 RGB tensors `(num_frames, height, width, 3)` -> video and image files, with the sound of another file."""

import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
import torch
from av.container import OutputContainer
from av.filter import Graph
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..atomic import commit, commit_files, partial_path, remove_stale_partials
from ..checks import is_number
from .containers import PathLike, VideoError, named_write_errors
from .decoding import planes_of
from .formats import CODECS, ON_GPU, PRESETS, check_output, is_rgb, is_subsampled
from .matroska import ROOM, set_pixel_aspect_ratio
from .sound import Accompaniment, cut_end
from .ticks import Ticks


_COLORSPACES = {"bt709": 1, "bt601": 5}  # AVColorSpace
# Chroma is averaged over the pixels that share it, which is what the reader, repeating it, takes it to be.
_SCALE = "flags=area+accurate_rnd+full_chroma_int:out_color_matrix={}:out_range={}"
MIN_RATE = Fraction(1, 100000)  # frames per second: about one a day
# More frames than x265 reorders.
_X265_DELAY = 8


class VideoWriter:
    """Write uint8 RGB frames to a video file, to images or to standard output; a context manager.

    The file appears under its name only when the writer is closed without an error: until then frames go to a hidden
    file in the same folder, which is removed when anything fails, and an older file of that name is kept. Images of a
    sequence get their names together at the end.

    Colours are BT.709, limited range, and tagged so. Even sizes are stored as 4:2:0. A size with an odd side is stored
    as 4:4:4, which keeps every pixel but is played by fewer players. Nothing is lost with `codec="ffv1"` (`.mkv`),
    which stores RGB, and in `.png`, `.apng`, `.bmp`, `.tif` and `.webp`.

    Args:
        path: What to write.

            - `.mp4`, `.m4v`, `.mkv`, `.mov` or `.webm`: a video, with sound.
            - `.gif`, `.webp` or `.apng`: an animation. A palette is made for every frame of a GIF, whose frames last
              at least 20 ms; those that come sooner are left out. `.webp` takes a single frame for a still image.
            - `.y4m`: uncompressed, for other programs. BT.601 below 720 lines and 1280 columns, BT.709 from there on,
              as programs take it, since the format has no tag for it.
            - `.png`, `.jpg`, `.jpeg`, `.bmp`, `.tif` or `.tiff`: an image, which takes exactly one frame.
            - A pattern such as `"f_%04d.png"`, or a folder (a name that ends in `/`, or that exists as one), which
              gets `000001.png` and so on: a sequence of images with numbers from 1. Images that a longer sequence of
              that name left are removed.
            - `"-"`: standard output, as it comes, for another program. When that one has seen enough, the `with`
              block ends without an error. A named pipe works alike.
        fps: Frame rate in frames per second, at least 0.00001. A `Fraction` is kept exactly, a float becomes the
            nearest fraction with a denominator up to 1001; one below 1, with a numerator up to 1001.
        codec: `"libx264"` (default of `.mp4`, `.mkv` and `.mov`), `"libx265"`, `"libvpx-vp9"` (default of `.webm`),
            `"libsvtav1"`, `"ffv1"` (`.mkv`), `"prores_ks"` (`.mov`), or `"h264_nvenc"` or `"hevc_nvenc"` with an
            NVIDIA GPU that encodes; unused by animations and images.
        crf: Constant quality, 0 (best) to 51, or to 63 for VP9 and AV1; by default 16, or 18 for AV1. With
            `"libx264"` and on a GPU, 0 stores pixels of `pixel_format` without loss. For an animated `.webp`, 0 (the
            default) to 100, where 0 is without loss. Unused by others.
        preset: Speed preset of x264, x265, SVT-AV1 and GPUs, `"ultrafast"` to `"veryslow"`; unused by others.
        pixel_format: FFmpeg's name of how pixels are stored, such as `"yuv444p"` or `"yuv420p10le"`; for `"libx264"`
            also `"rgb24"`.
        pixel_aspect_ratio: Width of a pixel divided by its height, for players; kept in videos.
        audio_from: A file whose sound tracks, subtitles, chapters and metadata are written too. Sound is copied packet
            by packet, and re-encoded only where the container cannot hold its codec. One warning says what was
            re-encoded and what was left out. It keeps its place in time relative to that file's first frame. It is
            cut at the end of the written video, unless the last frame of the source was reached: then nothing is cut.
        audio_start: Seconds from the first frame of `audio_from` to the first frame written; 0 without that file.
            Sound before it is cut.
        overwrite: Whether existing files may be replaced.
        container: For `"-"`, `"mkv"` (default), `"webm"` or `"y4m"`.

    Raises:
        VideoError: If the extension, codec, rate or quality is not legal, the folder does not exist, the file exists
            and `overwrite` is false, `audio_from` cannot be read, or (on `close`) no frame was written.
    """

    def __init__(
        self,
        path: PathLike,
        fps: Fraction | float,
        *,
        codec: str | None = None,
        crf: float | None = None,
        preset: str = "medium",
        pixel_format: str | None = None,
        pixel_aspect_ratio: Fraction = Fraction(1),
        audio_from: PathLike | None = None,
        audio_start: Fraction = Fraction(0),
        overwrite: bool = True,
        container: str | None = None,
    ) -> None:
        options: dict[str, Any] = {"codec": codec, "crf": crf, "pixel_format": pixel_format, "container": container}
        self._output = check_output(path, overwrite=overwrite, **options)
        self.path = Path(path)
        self.num_frames = 0
        if preset not in PRESETS:
            raise VideoError(f"`preset` must be one of {', '.join(PRESETS)}, got {preset!r}.")
        rate = _rate_of(fps)
        if rate is None:
            raise VideoError(f"`fps` must be at least 0.00001 and less than 100000, got {fps!r}.")
        if not (is_number(pixel_aspect_ratio) and pixel_aspect_ratio > 0):
            raise VideoError(f"`pixel_aspect_ratio` must be a number of more than 0, got {pixel_aspect_ratio!r}.")
        if not (is_number(audio_start) and audio_start >= 0):
            raise VideoError(f"`audio_start` must be a number of 0 or more, got {audio_start!r}.")
        if audio_start and audio_from is None:
            raise VideoError(f"`audio_start` must be 0 without `audio_from`, got {audio_start!r}.")
        self._fps = rate
        self._preset, self._aspect = preset, Fraction(pixel_aspect_ratio)
        self._is_image = self._output.kind in ("image", "sequence")
        self._partial: Path | None = None  # a hidden file, or a folder for images of a sequence
        self._num_images = self._num_packets = 0
        self._first_dts = self._last_dts = self._latest_pts = 0  # of the packets so far, in ticks of `_timing`
        if self._output.kind != "stream":
            self._partial = self._hidden_path()
        self._resources = ExitStack()
        self._container: OutputContainer | None = None
        self._encoder: VideoStream | VideoCodecContext | None = None
        self._graph: Graph
        self._is_planar = False  # what `_graph` takes
        self._size = (0, 0)  # height, width
        self._timing: Ticks | None = None
        self._ended = Fraction(0)  # seconds, of the frames so far
        self._sound: Accompaniment | None = None
        self._last_packet: Packet | None = None  # held back at a variable rate
        self._durations: dict[int, int] = {}  # of frames in the encoder, by time stamp
        self._closed = False
        self._is_broken = False  # a pipe whose reader went away
        if audio_from is not None and not self._is_image:
            self._sound = self._resources.enter_context(Accompaniment.open(audio_from, Fraction(audio_start)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> bool:
        if exc_type is None:
            self.close()
        else:
            self.abort()
        return self._is_broken and exc_type is not None and issubclass(exc_type, BrokenPipeError)

    def write(
        self,
        frames: torch.Tensor | np.ndarray,
        times: Sequence[Fraction | float] | torch.Tensor | np.ndarray | None = None,
        end: Fraction | float | None = None,
    ) -> None:
        """Append frames.

        Args:
            frames: RGB, uint8 in `[0, 255]`, shape `(n, height, width, 3)`, on any device. The first call fixes
                `height` and `width` (any size); `n` may be 0.
            times: Seconds from the start of the written video to each frame, ascending, for a variable rate; all
                calls give them, or none. Without them the frames follow each other at the rate `fps`. Images of a
                sequence have no times. `.y4m` has no variable rate, so there frames are repeated and left out.
            end: Seconds from the start to the end of the last of these frames, after its time; by default that one
                lasts `1 / fps`. Without times only animations and `.y4m` take it; images have no end.

        Raises:
            VideoError: If dtype, shape, size or times are not that, or the frames cannot be encoded or stored. The
                file is given up then.
            BrokenPipeError: If the reader of a pipe has seen enough; the `with` statement takes it for the end.
        """
        if self._closed:
            raise VideoError(f"Cannot write to {str(self.path)!r}: the writer is closed.")
        try:
            if not isinstance(frames, torch.Tensor | np.ndarray):
                raise VideoError(f"`frames` must be a tensor or an array, got {type(frames).__name__}.")
            if frames.dtype not in (torch.uint8, np.uint8):
                raise VideoError(f"`frames` must be uint8 in [0, 255], got {frames.dtype}.")
            array = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else frames
            if array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape[1:]:
                raise VideoError(f"`frames` must have shape (n, height, width, 3), got {tuple(array.shape)}.")
            if self._encoder is not None and array.shape[1:3] != self._size:
                raise VideoError(f"`frames` must be {self._size} (height, width) as before, got {array.shape[1:3]}.")
            if self._output.kind == "image" and self.num_frames + len(array) > 1:
                raise VideoError(f"Cannot write {str(self.path)!r}: an image file holds one frame, got more.")
            if end is not None and not is_number(end):
                raise VideoError(f"`end` must be a number of seconds or None, got {end!r}.")
            shown = _times_of(times)
            if shown is not None and len(shown) != len(array):
                raise VideoError(f"`times` must be one for each of {len(array)} frames, got {len(shown)}.")
            with self._named_errors():
                if self._encoder is None and len(array):
                    self._open(array, is_variable=shown is not None)
                for index, image in enumerate(array):
                    self._write_one(image, None if shown is None else shown[index])
            if end is not None and self._timing is not None:
                self._ended = self._timing.end_at(Fraction(end))
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
            if self._encoder is None or self._timing is None:
                raise VideoError(f"Cannot write {str(self.path)!r}: no frame was written.")
            with self._named_errors():
                for pts, frame, duration in self._timing.finish(self._ended):
                    self._encode(pts, frame, duration)
                self._graph.vpush(None)
                self._encode_waiting()
                self._store(self._encoder.encode(None))
                self._store_last()
                if self._sound is not None and self._container is not None:
                    shown = max(self._ended, self._timing.ended)  # as far as the last frame, however short it is
                    self._mux_sound(self._sound.rest(self._ended, shown - 1 / self._fps / 2))
                self._resources.close()
                if self._sound is not None and self._sound.overhangs:
                    self._cut_end(self._sound.timeline.delay + self._ended)
                if self._aspect != 1 and self._has_display_size and self._partial is not None:
                    set_pixel_aspect_ratio(self._partial, self._aspect)
                self._commit()
            self._closed = True
            self._warn()
        except BrokenPipeError:  # after the last frame there is nothing that it could stop
            pass
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
        except (VideoError, BrokenPipeError):  # a container that never got its header cannot be closed properly
            pass
        if self._partial is None:
            return
        if self._partial.is_dir():
            shutil.rmtree(self._partial, ignore_errors=True)
        else:
            self._partial.unlink(missing_ok=True)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        with named_write_errors(self.path):
            try:
                yield
            except BrokenPipeError:
                self._is_broken = True
                raise

    @property
    def has_sound(self) -> bool:
        """Whether any sound was written."""
        return self._sound is not None and self._sound.is_heard

    @property
    def _has_display_size(self) -> bool:
        """Whether the pixel aspect ratio is written by a display size, afterwards."""
        held = self._output.container
        return self._output.kind == "file" and held is not None and held.muxer in ("matroska", "webm")

    def _hidden_path(self) -> Path:
        """Return where to write until all is there, after removing what killed processes left."""
        path = self.path
        if self._output.kind == "sequence" and path.is_dir():
            path = path / "images"  # inside, since the folder itself may lie on a disk of its own
        remove_stale_partials(path)
        return partial_path(path, "partial", "" if self._output.kind == "sequence" else self._output.suffix)

    def _warn(self) -> None:
        """Say in one line what is not as in the source."""
        notes = [] if self._sound is None else self._sound.notes()
        if self._timing is not None and self._timing.num_left_out:
            notes.append(f"left out: {self._timing.num_left_out} frames, since GIF has at most 50 a second")
        if notes:
            warnings.warn(f"{str(self.path)!r}: {'; '.join(notes)}.", stacklevel=4)

    # --- Opening --------------------------------------------------------------------------------------------------

    def _open(self, frames: np.ndarray, is_variable: bool) -> None:
        output, (height, width) = self._output, frames.shape[1:3]
        kind = CODECS[output.codec]
        pixel_format = output.pixel_format or kind.pixel_format(height, width)
        if output.codec == "libx265" and (min(height, width) < 48 or max(height, width) < 64):
            # x265 writes beyond its memory there (seen with 33x47, 34x48 and 48x48).
            raise VideoError(f"`codec` libx265 needs a picture of at least 48 by 64, got {height} by {width}.")
        if is_subsampled(pixel_format) and ((width % 2) or (height % 2 and "420" in pixel_format)):
            raise VideoError(f"`pixel_format` {pixel_format} needs even sizes, got height {height} and width {width}.")
        held = output.container
        if held is None:
            encoder = av.CodecContext.create(output.codec, "w")
            assert isinstance(encoder, VideoCodecContext) and self._partial is not None
            encoder.options = self._codec_options(pixel_format)
            if output.kind == "sequence":
                self._partial.mkdir()
            context = encoder
        else:
            target = str(self._partial.absolute()) if self._partial is not None else _pipe_address(self.path)
            options = self._sound.muxer_options(held) if self._sound is not None else {}
            options |= {"webp": {"loop": "0"}, "apng": {"plays": "0"}}.get(held.muxer, {})  # for ever, as GIF does
            container = av.open(target, "w", format=held.muxer, container_options=options)
            self._container = self._resources.enter_context(container)
            name = _encoder_name(output.codec, pixel_format)
            encoder = container.add_stream(name, rate=self._fps, options=self._codec_options(pixel_format))
            assert isinstance(encoder, VideoStream)
            context = encoder.codec_context
            if output.codec in ("libx265", "hevc_nvenc") and held.muxer != "matroska":
                context.codec_tag = "hvc1"  # the tag without which Apple's players refuse the file
        context.width, context.height, context.pix_fmt = width, height, pixel_format
        self._timing = Ticks.choose(self._fps, held.muxer if held is not None else None, is_variable)
        context.time_base = self._timing.time_base
        if held is None:
            context.framerate = self._fps
        else:
            encoder.time_base = self._timing.time_base
        if self._aspect != 1:
            context.sample_aspect_ratio = self._aspect
            if self._has_display_size and isinstance(encoder, VideoStream):
                encoder.metadata["title"] = ROOM
        # JPEG is BT.601, full range, by definition. Y4M has no tag, so it gets what programs take for granted.
        is_full = output.codec == "mjpeg"
        is_601 = is_full or (output.codec == "rawvideo" and height < 720 and width < 1280)
        matrix = "bt601" if is_601 else "bt709"
        nodes: list[tuple[str, str]] = []
        if not is_rgb(pixel_format):
            context.colorspace, context.color_range = _COLORSPACES[matrix], 2 if is_full else 1
            if not self._is_image and not is_601:
                context.color_primaries = context.color_trc = 1  # BT.709
            nodes = [("scale", _SCALE.format(matrix, "pc" if is_full else "tv"))]
            if not is_601:
                nodes.append(("setparams", "colorspace=bt709:color_primaries=bt709:color_trc=bt709"))  # for ProRes
        # Frames as autoencoders give them, and the reader: permuted views of planes. Others are taken for packed.
        self._is_planar = frames.strides[3] > frames.strides[2]
        source_format = "gbrp" if self._is_planar else "rgb24"
        self._graph = _build_graph(height, width, source_format, pixel_format, nodes, self._timing.time_base)
        self._encoder, self._size = encoder, (height, width)
        if self._sound is not None and self._container is not None and held is not None:
            self._sound.attach(self._container, held, self._timing.time_base)
            self._timing.lead = round(self._sound.timeline.delay / self._timing.time_base)
        if output.codec == "libsvtav1":
            with _modest_svt():
                context.open()

    def _codec_options(self, pixel_format: str) -> dict[str, str]:
        codec, crf = self._output.codec, self._output.crf
        if codec in ("libx264", "libx265"):
            options = {"crf": f"{crf:g}", "preset": self._preset}
            if codec == "libx265":
                return options | {"x265-params": "log-level=error"}
            if crf == 0 and "10" in pixel_format:
                options["qp"] = options.pop("crf")  # at 10 bits, a quality of 0 is not yet without loss
            # One file on every processor. x264's own code for AVX-512 even reads memory that was never written, in
            # its macroblock trees: a file would differ in every call.
            return options | {"x264-params": "cpu-independent=1"}
        if codec in ON_GPU:
            preset = PRESETS[self._preset][1]
            if crf == 0:  # as `cq`, 0 would mean that the encoder chooses
                return {"preset": preset, "tune": "lossless"}
            return {"preset": preset, "rc": "vbr", "cq": f"{crf:g}", "b": "0"}
        if codec == "libvpx-vp9":
            return {"crf": f"{crf:g}", "b": "0", "row-mt": "1"}
        if codec == "libsvtav1":
            preset = f"{PRESETS[self._preset][0]}"
            return {
                "preset": preset,
                "svtav1-params": f"crf={crf:g}",
            }  # as option of its own, 0 would mean the default
        if codec == "prores_ks":
            return {"profile": "4444" if pixel_format.startswith("yuv444") else "hq", "vendor": "apl0"}
        if codec == "mjpeg":
            return {"qmin": "1", "qmax": "1"}  # FFmpeg's best quality step
        if codec == "libwebp":
            return {"lossless": "1"} if not crf else {"lossless": "0", "quality": f"{100 - crf:g}"}
        return {}

    # --- Frames ---------------------------------------------------------------------------------------------------

    def _write_one(self, image: np.ndarray, time: Fraction | None) -> None:
        assert self._timing is not None
        frame = _to_frame(image, self._is_planar)
        for pts, ready, duration in self._timing.push(frame, time):
            self._encode(pts, ready, duration)
        self.num_frames += 1
        self._ended = self._timing.ended

    def _encode(self, pts: int, frame: VideoFrame, duration: int | None) -> None:
        assert self._timing is not None
        frame.pts, frame.time_base = pts, self._timing.time_base
        if duration is not None:
            frame.duration = self._durations[pts] = duration
        self._graph.vpush(frame)
        self._encode_waiting()

    def _encode_waiting(self) -> None:
        assert self._encoder is not None
        while True:
            try:
                frame = self._graph.vpull()
            except (BlockingIOError, EOFError):
                return
            self._store(self._encoder.encode(frame))

    # --- Storing --------------------------------------------------------------------------------------------------

    def _store(self, packets: Sequence[Packet]) -> None:
        for packet in packets:
            if self._container is None:
                self._num_images += 1
                self._image_file(self._num_images).write_bytes(bytes(packet))
                continue
            self._num_packets += 1
            if self._output.codec == "libx265" and packet.pts is not None and packet.dts is not None:
                if not 0 <= packet.pts - packet.dts < 1 << 32:  # never set, with fewer frames than x265 reorders
                    packet.dts = self._num_packets - _X265_DELAY
            if self._num_packets == 1:
                self._first_dts = packet.dts or 0
            if self._timing is not None and self._timing.is_variable:
                if packet.pts in self._durations:  # encoders give the average, by which files would end late
                    packet.duration = self._durations.pop(packet.pts)
                self._last_packet, packet = packet, self._last_packet
                self._mux(packet)
            else:
                self._mux(packet)

    def _mux(self, packet: Packet | None) -> None:
        if packet is None or self._container is None:
            return
        time = Fraction(packet.dts or 0) * packet.time_base
        # Before the muxer converts them to ticks of its own.
        self._last_dts, self._latest_pts = packet.dts or 0, max(self._latest_pts, packet.pts or 0)
        self._container.mux(packet)
        if self._sound is not None:  # in step with the video, or the muxer would hold one of them back
            self._mux_sound(self._sound.packets_before(time))

    def _mux_sound(self, packets: Iterator[Packet]) -> None:
        assert self._container is not None and self._sound is not None
        self._sound.mux(self._container, packets)

    def _store_last(self) -> None:
        """Store the packet held back so that the video ends in time.

        MP4 counts its length in decoding times, which begin below 0 where frames are reordered.
        """
        packet, timing = self._last_packet, self._timing
        if packet is not None and timing is not None and packet.pts is not None and packet.dts is not None:
            reordered = min(self._first_dts - timing.lead, 0)
            held = self._output.container
            if packet.pts < self._latest_pts and held is not None and held.muxer in ("mp4", "mov"):
                # A B frame, after which another one is shown.
                packet.duration = max(timing.end_tick + reordered - packet.dts, 1)
            elif packet.pts >= self._latest_pts:
                packet.dts = min(max(packet.pts + reordered, self._last_dts + 1), packet.pts)
                packet.duration = timing.end_tick - packet.pts
        self._mux(packet)

    def _cut_end(self, end: Fraction) -> None:
        """Cut subtitles and chapters at the end, which was not known when they were written."""
        held = self._output.container
        if self._partial is None or held is None:
            return  # a stream is gone
        cut = partial_path(self.path, "cut", self._output.suffix)
        try:
            cut_end(self._partial, cut, held, end)
            os.replace(cut, self._partial)
        finally:
            cut.unlink(missing_ok=True)

    def _image_file(self, number: int) -> Path:
        assert self._partial is not None
        return self._partial / self._output.image_path(number).name if self._partial.is_dir() else self._partial

    def _commit(self) -> None:
        if self._partial is None:
            return
        if self._output.kind != "sequence":
            commit(self._partial, self.path)
            return
        folder = self._output.image_path(1).parent
        if not folder.exists():
            commit(self._partial, folder)
            return
        former = self._output.existing_images()
        commit_files(self._partial, folder)
        for number, file in former.items():
            if number > self._num_images or number < 1:
                file.unlink(missing_ok=True)


def _times_of(times: Any) -> list[Fraction] | None:
    """Return times of frames as exact numbers."""
    if times is None:
        return None
    listed = times.tolist() if isinstance(times, torch.Tensor | np.ndarray) else times
    listed = list(listed) if isinstance(listed, Iterable) else [listed]
    for time in listed:
        if not is_number(time):
            raise VideoError(f"`times` must be numbers of seconds, got {time!r}.")
    return [Fraction(time) for time in listed]


def _to_frame(image: np.ndarray, is_planar: bool) -> VideoFrame:
    """Copy RGB, uint8 `(height, width, 3)`, of any strides into a frame: `gbrp` if planar, else `rgb24`."""
    if not is_planar:
        return VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    frame = VideoFrame(image.shape[1], image.shape[0], "gbrp")
    for plane, channel in zip(planes_of(frame), (1, 2, 0), strict=True):
        plane[...] = image[..., channel]
    return frame


def _build_graph(
    height: int, width: int, source_format: str, pixel_format: str, nodes: list[tuple[str, str]], time_base: Fraction
) -> Graph:
    """Build the conversion of an RGB frame to what the encoder takes."""
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=VideoFormat(source_format), time_base=time_base)
    sink = graph.add("buffersink")
    if pixel_format == "pal8":
        split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single")
        used = graph.add("paletteuse", "new=1:dither=sierra2_4a")
        source.link_to(split)
        split.link_to(palette, 0, 0)
        split.link_to(used, 1, 0)
        palette.link_to(used, 0, 1)
        used.link_to(sink)
        graph.configure()
        return graph
    nodes = [("format", pixel_format)] if not nodes else [nodes[0], ("format", pixel_format), *nodes[1:]]
    graph.link_nodes(source, *[graph.add(name, arguments) for name, arguments in nodes], sink).configure()
    return graph


@contextmanager
def _modest_svt() -> Iterator[None]:
    """Keep SVT-AV1 from writing its settings to the standard error output, and from taking the processor for itself.

    Where it may, as it may for root in a container, it gives the calling thread and its own the highest real-time
    priority: for as long as they work, nothing else runs.
    """
    former = os.environ.get("SVT_LOG")
    os.environ["SVT_LOG"] = former or "1"  # errors only
    threads = _thread_ids()
    policy = (os.sched_getscheduler(0), os.sched_getparam(0)) if threads else None
    try:
        yield
    finally:
        if former is None:
            del os.environ["SVT_LOG"]
        else:
            os.environ["SVT_LOG"] = former
        if policy is not None:
            for thread in {0} | (_thread_ids() - threads):
                with suppress(OSError):  # that thread has ended
                    os.sched_setscheduler(thread, *policy)


def _thread_ids() -> set[int]:
    """Return the ids of this process's threads, or an empty set where the system has no such list."""
    try:
        return {int(name) for name in os.listdir("/proc/self/task")}
    except FileNotFoundError:
        return set()


def _rate_of(fps: Fraction | float) -> Fraction | None:
    """Return a legal frame rate as a fraction that formats hold, `None` for others."""
    if not is_number(fps) or not MIN_RATE <= fps < 100000:
        return None
    if not isinstance(fps, float):
        return Fraction(fps)
    # The time of a frame is a fraction where the rate is less than 1.
    return Fraction(fps).limit_denominator(1001) if fps >= 1 else 1 / (1 / Fraction(fps)).limit_denominator(1001)


def _encoder_name(codec: str, pixel_format: str) -> str:
    """Return FFmpeg's name of the encoder."""
    if codec == "libx264" and is_rgb(pixel_format):
        return "libx264rgb"
    return "wrapped_avframe" if codec == "rawvideo" else codec


def _pipe_address(path: Path) -> str:
    return "pipe:1" if str(path) == "-" else str(path.absolute())


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

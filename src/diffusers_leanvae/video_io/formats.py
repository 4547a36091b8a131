"""Kinds of output: which extension, container, codec, quality, pixel format and sound belong together.

`VideoWriter` and every command that writes look up here, so that an output that cannot be written is refused before
any work is done.
"""

import os
import stat
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
from av.codec.codec import UnknownCodecError
from av.error import FFmpegError
from av.video.codeccontext import VideoCodecContext

from ..atomic import MAX_NAME_BYTES
from ..checks import is_number
from .containers import PathLike, VideoError, check_path
from .inputs import is_pattern, numbered_files, numbered_name


Kind = Literal["file", "stream", "image", "sequence"]


@dataclass(frozen=True)
class Codec:
    """A way to compress pictures.

    Attributes:
        pixel_formats: All legal ones. The first is the default, for sizes with an odd side the first one without
            halved chroma.
        crf: Default quality; `None` where there is nothing to choose.
        max_crf: Worst quality.
    """

    pixel_formats: tuple[str, ...]
    crf: float | None = None
    max_crf: int | None = None

    def pixel_format(self, height: int, width: int) -> str:
        """Return the default pixel format for a picture size."""
        if height % 2 == width % 2 == 0:
            return self.pixel_formats[0]
        return next((name for name in self.pixel_formats if not is_subsampled(name)), self.pixel_formats[0])


@dataclass(frozen=True)
class Container:
    """What a kind of file can hold.

    Attributes:
        muxer: FFmpeg's name.
        codecs: Legal codecs of the pictures; the first is the default.
        sound: Sound codecs that are copied; a name that ends in `_` stands for all that begin so.
        sound_encoder: What other sound becomes; `None` where there is no room for sound.
        subtitles: Subtitle codecs that are copied.
        subtitle_encoder: What other subtitles of text become.
        is_streamable: Whether it can be written to a pipe.
        is_animation: Whether it is an image to most programs.
    """

    muxer: str
    codecs: tuple[str, ...]
    sound: tuple[str, ...] = ()
    sound_encoder: str | None = None
    subtitles: tuple[str, ...] = ()
    subtitle_encoder: str | None = None
    is_streamable: bool = False
    is_animation: bool = False

    def holds_sound(self, codec: str) -> bool:
        """Tell whether sound of a codec is copied."""
        return any(codec == name or (name.endswith("_") and codec.startswith(name)) for name in self.sound)


_YUV_8 = ("yuv420p", "yuv444p", "yuv422p")
_YUV_10 = ("yuv420p10le", "yuv444p10le", "yuv422p10le")
_YUV_12 = ("yuv420p12le", "yuv444p12le", "yuv422p12le")

CODECS: dict[str, Codec] = {
    "libx264": Codec((*_YUV_8, *_YUV_10, "rgb24"), crf=16, max_crf=51),
    "libx265": Codec((*_YUV_8, *_YUV_10, *_YUV_12, "gbrp"), crf=16, max_crf=51),
    "libvpx-vp9": Codec((*_YUV_8, "gbrp"), crf=16, max_crf=63),
    "libsvtav1": Codec(("yuv420p", "yuv420p10le"), crf=18, max_crf=63),
    "h264_nvenc": Codec(("yuv420p", "yuv444p"), crf=16, max_crf=51),
    "hevc_nvenc": Codec(("yuv420p", "yuv444p"), crf=16, max_crf=51),
    "ffv1": Codec(("bgr0", *_YUV_8, *_YUV_10, *_YUV_12, "gbrp10le", "gbrp12le")),
    "prores_ks": Codec(("yuv422p10le", "yuv444p10le")),
    "rawvideo": Codec(_YUV_8),
    "gif": Codec(("pal8",)),
    "apng": Codec(("rgb24",)),
    "libwebp": Codec(("bgra",), crf=0, max_crf=100),
    "png": Codec(("rgb24",)),
    "mjpeg": Codec(("yuvj444p", "yuvj422p", "yuvj420p")),
    "bmp": Codec(("bgr24",)),
    "tiff": Codec(("rgb24",)),
}

ON_GPU = ("h264_nvenc", "hevc_nvenc")  # whether there is one that encodes, only opening the encoder tells
_QUICKTIME_SOUND = ("aac", "mp3", "mp2", "ac3", "eac3", "dts", "alac")
_MP4 = Container(
    "mp4",
    ("libx264", "libx265", "libvpx-vp9", "libsvtav1", *ON_GPU),
    sound=_QUICKTIME_SOUND,
    sound_encoder="aac",
    subtitles=("mov_text", "dvd_subtitle"),
    subtitle_encoder="mov_text",
)
_MATROSKA = Container(
    "matroska",
    ("libx264", "libx265", "libvpx-vp9", "libsvtav1", "ffv1", *ON_GPU),
    sound=(
        *("aac", "mp3", "mp2", "ac3", "eac3", "dts", "truehd", "mlp", "flac", "opus", "vorbis", "alac", "tta"),
        *("wavpack", "wmav1", "wmav2", "wmapro", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_u8", "pcm_f32le"),
    ),
    sound_encoder="flac",
    subtitles=("subrip", "ass", "webvtt", "dvd_subtitle", "dvb_subtitle", "hdmv_pgs_subtitle", "text"),
    subtitle_encoder="subrip",
    is_streamable=True,
)
# Extension -> what a video file of that name holds.
CONTAINERS: dict[str, Container] = {
    ".mp4": _MP4,
    ".m4v": _MP4,
    ".mkv": _MATROSKA,
    ".mov": Container(
        "mov",
        ("libx264", "libx265", "prores_ks", *ON_GPU),
        sound=(*_QUICKTIME_SOUND, "pcm_"),
        sound_encoder="aac",
        subtitles=("mov_text",),
        subtitle_encoder="mov_text",
    ),
    ".webm": Container(
        "webm",
        ("libvpx-vp9", "libsvtav1"),
        sound=("opus", "vorbis"),
        sound_encoder="libopus",
        subtitles=("webvtt",),
        subtitle_encoder="webvtt",
        is_streamable=True,
    ),
    ".y4m": Container("yuv4mpegpipe", ("rawvideo",), is_streamable=True),
    ".gif": Container("gif", ("gif",), is_animation=True),
    ".webp": Container("webp", ("libwebp",), is_animation=True),
    ".apng": Container("apng", ("apng",), is_animation=True),
}
# Extension -> codec of an image file.
IMAGES: dict[str, str] = {
    ".png": "png",
    ".jpg": "mjpeg",
    ".jpeg": "mjpeg",
    ".webp": "libwebp",
    ".bmp": "bmp",
    ".tif": "tiff",
    ".tiff": "tiff",
}
# x264's names of speeds, from fast to slow, with SVT-AV1's number for each, and NVIDIA's.
PRESETS: dict[str, tuple[int, str]] = {
    "ultrafast": (12, "p1"),
    "superfast": (11, "p1"),
    "veryfast": (10, "p2"),
    "faster": (9, "p3"),
    "fast": (8, "p3"),
    "medium": (7, "p4"),
    "slow": (6, "p5"),
    "slower": (4, "p6"),
    "veryslow": (2, "p7"),
}


@dataclass(frozen=True)
class Output:
    """One output, with all that is known of it before the first frame.

    Attributes:
        path: As given.
        kind: `"file"`, or `"stream"` for a pipe or standard output, or `"image"`, or `"sequence"` for images with
            numbers, from 1.
        suffix: The extension, which for standard output is that of its container.
        codec: A key of `CODECS`.
        crf: Quality, `None` where the codec has none.
        pixel_format: As given; `None` for the default of the codec and size.
        container: `None` for images.
    """

    path: Path
    kind: Kind
    suffix: str
    codec: str
    crf: float | None
    pixel_format: str | None
    container: Container | None

    def image_path(self, number: int) -> Path:
        """Return the file of image `number` of a sequence."""
        return self._folder / numbered_name(self._pattern, number)

    def existing_images(self) -> dict[int, Path]:
        """Return the images of a sequence that exist, by number."""
        return numbered_files(self._folder, self._pattern) if self._folder.is_dir() else {}

    @property
    def _folder(self) -> Path:
        return self.path if self.is_folder else self.path.parent

    @property
    def _pattern(self) -> str:
        return f"%06d{self.suffix}" if self.is_folder else self.path.name

    @property
    def is_folder(self) -> bool:
        """Whether a sequence is named by its folder and not by a pattern."""
        return not is_pattern(self.path.name)


def is_rgb(pixel_format: str) -> bool:
    """Tell whether a pixel format stores red, green and blue."""
    return pixel_format.startswith(("rgb", "bgr", "gbr", "pal8"))


def is_subsampled(pixel_format: str) -> bool:
    """Tell whether a pixel format stores chroma for pairs of pixels."""
    return "420" in pixel_format or "422" in pixel_format


def is_sequence(path: PathLike) -> bool:
    """Tell whether an output is a sequence of images: a pattern such as `f_%04d.png`, or a folder."""
    path = os.fspath(path)
    suffix = Path(path).suffix.lower()
    if is_pattern(Path(path).name) and suffix in IMAGES:
        return True
    return path.endswith(("/", os.sep)) or (suffix not in {*CONTAINERS, *IMAGES} and Path(path).is_dir())


def find_output(
    path: PathLike,
    *,
    codec: str | None = None,
    crf: float | None = None,
    pixel_format: str | None = None,
    container: str | None = None,
) -> Output:
    """Work out what an output is, from its name and the wishes for it; does not look at what is there.

    Args:
        path: See `VideoWriter`.
        codec: See `VideoWriter`, as the following.
        crf: Quality.
        pixel_format: FFmpeg's name.
        container: Only for `"-"`.

    Raises:
        VideoError: If the extension, container, codec, quality or pixel format is not legal, or they do not fit.
    """
    kind, suffix = _find_kind(path, container)
    if kind in ("image", "sequence"):
        _check_names(codec, pixel_format)
        return Output(Path(path), kind, suffix, IMAGES[suffix], CODECS[IMAGES[suffix]].crf, None, None)
    held = CONTAINERS[suffix]
    if codec is not None and codec not in held.codecs and not held.is_animation:
        legal = ", ".join(held.codecs)
        raise VideoError(
            f"Cannot write {os.fspath(path)!r}: `codec` must be one of {legal} for {suffix}, got {codec!r}."
        )
    wished, codec = codec, codec if codec in held.codecs else held.codecs[0]
    properties = CODECS[codec]
    if properties.max_crf is None:
        crf = None
    elif crf is None:
        crf = properties.crf
    elif not (is_number(crf) and 0 <= crf <= properties.max_crf):
        raise VideoError(f"`crf` must be 0 to {properties.max_crf} for {codec}, got {crf!r}.")
    if held.is_animation:
        _check_names(wished, pixel_format)
        pixel_format = None
    elif pixel_format is not None and pixel_format not in properties.pixel_formats:
        legal = ", ".join(properties.pixel_formats)
        raise VideoError(f"`pixel_format` must be one of {legal} for {codec}, got {pixel_format!r}.")
    return Output(Path(path), kind, suffix, codec, crf, pixel_format, held)


def _check_names(codec: str | None, pixel_format: str | None) -> None:
    """Refuse names that nothing has, where there is no choice and they are unused."""
    if codec is not None and codec not in CODECS:
        raise VideoError(f"`codec` must be one of {', '.join(CODECS)}, got {codec!r}.")
    known = dict.fromkeys(name for properties in CODECS.values() for name in properties.pixel_formats)
    if pixel_format is not None and pixel_format not in known:
        raise VideoError(f"`pixel_format` must be one of {', '.join(known)}, got {pixel_format!r}.")


def _find_kind(path: PathLike, container: str | None) -> tuple[Kind, str]:
    """Return the kind of an output and its extension."""
    check_path("path", path)
    name = os.fspath(path)
    suffix = Path(path).suffix.lower()
    if name == "-":
        streamable = [key[1:] for key, value in CONTAINERS.items() if value.is_streamable]
        if container is not None and container not in streamable:
            raise VideoError(f"`container` must be one of {', '.join(streamable)} for '-', got {container!r}.")
        return "stream", f".{container or 'mkv'}"
    if container is not None and f".{container}" != suffix:
        raise VideoError(f"`container` must be None where the output is no '-', got {container!r} for {name!r}.")
    if is_sequence(path):
        return "sequence", suffix if suffix in IMAGES and not name.endswith("/") else ".png"
    if suffix in IMAGES and suffix not in CONTAINERS:
        return "image", suffix
    if suffix not in CONTAINERS:
        legal = ", ".join(dict.fromkeys([*CONTAINERS, *IMAGES]))
        raise VideoError(f"Cannot write {name!r}: the extension must be one of {legal}, got {suffix!r}.")
    if not _is_pipe(Path(path)):
        return "file", suffix
    if not CONTAINERS[suffix].is_streamable:
        raise VideoError(f"Cannot write {name!r}: it is a pipe, which needs .mkv, .webm or .y4m, got {suffix!r}.")
    return "stream", suffix


def check_output(
    path: PathLike,
    *,
    codec: str | None = None,
    crf: float | None = None,
    pixel_format: str | None = None,
    container: str | None = None,
    overwrite: bool = True,
    num_images: int | None = None,
    makes_folders: bool = False,
) -> Output:
    """Refuse an output that `VideoWriter` could not write, without touching anything.

    Args:
        path: See `VideoWriter`.
        codec: See `VideoWriter`, as the following.
        crf: Quality.
        pixel_format: FFmpeg's name.
        container: Only for `"-"`.
        overwrite: Whether an existing file, or existing images of a sequence, may be replaced.
        num_images: Number of frames that will be written, where it is known.
        makes_folders: Whether folders that are missing will be made before.

    Returns:
        What it is.

    Raises:
        VideoError: If anything is not legal or in the way; the message names it.
    """
    output = find_output(path, codec=codec, crf=crf, pixel_format=pixel_format, container=container)
    name = os.fspath(path)
    if output.codec in ON_GPU and not _can_encode(output.codec):
        raise VideoError(
            f"`codec` {output.codec} needs an NVIDIA GPU that encodes videos, with its driver, and FFmpeg finds none "
            "here; libx264 and libx265 need none."
        )
    if output.kind == "image" and num_images is not None and num_images > 1:
        raise VideoError(
            f"Cannot write {name!r}: an image file holds one frame, got {num_images}; a pattern such as "
            f"'{output.path.stem}_%04d{output.suffix}' writes one file for each."
        )
    if output.kind == "stream":
        return output
    file = output.image_path(num_images or 1) if output.kind == "sequence" else output.path
    if (length := len(os.fsencode(file.name))) > MAX_NAME_BYTES:
        raise VideoError(f"Cannot write {name!r}: a name may have {MAX_NAME_BYTES} bytes, got {length}.")
    if output.kind != "sequence" and file.is_dir():
        raise VideoError(f"Cannot write {name!r}: it is a folder.")
    folder = file.parent
    if output.kind == "sequence" and folder == output.path:
        if folder.exists() and not folder.is_dir():
            raise VideoError(f"Cannot write {name!r}: it is a file, expected a folder or a name that is free.")
        folder = folder if folder.exists() else folder.parent  # a folder of images is made, but not its parents
    if makes_folders:
        folder = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not folder.is_dir():
        reason = "is no folder" if folder.exists() else "does not exist"
        raise VideoError(f"Cannot write {name!r}: the folder {str(folder)!r} {reason}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VideoError(f"Cannot write {name!r}: the folder {str(folder)!r} is not writable.")
    if overwrite:
        return output
    if output.kind == "sequence":
        if existing := output.existing_images():
            first = str(existing[min(existing)])
            raise VideoError(f"Cannot write {name!r}: {first!r} exists and `overwrite` is false.")
    elif file.exists() or file.is_symlink():
        raise VideoError(f"Cannot write {name!r}: it exists and `overwrite` is false.")
    return output


def _can_encode(codec: str) -> bool:
    """Whether an encoder opens, with pictures that every one takes."""
    try:
        context = av.CodecContext.create(codec, "w")
        assert isinstance(context, VideoCodecContext)
        context.width, context.height, context.pix_fmt, context.time_base = 256, 256, "yuv420p", Fraction(1, 25)
        context.open()
    except (FFmpegError, UnknownCodecError):
        return False
    return True


def _is_pipe(file: Path) -> bool:
    try:
        mode = file.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)

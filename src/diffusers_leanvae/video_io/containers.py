"""Opening of media files, and the error that names them."""

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition, Stream
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream


PathLike = str | os.PathLike[str]


MAX_PIXELS = 1 << 28  # of a picture: 16384 x 16384; the largest camera of a phone has 200 million
MAX_FRAME_PIXELS = 1 << 27  # of a frame of a video, of which a decoder holds several: 8K has 33 million

# Report damage instead of concealing it, and allocate nothing for a size that comes up later.
_DECODING = {"err_detect": "crccheck+explode", "max_pixels": str(MAX_FRAME_PIXELS)}

# Tags in a foreign encoding are no reason to refuse a video. PyAV 18 must be told so; PyAV 19 has no such option, and
# gives bytes that are no UTF-8 as lone surrogates.
_TAG_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if hasattr(InputContainer, "metadata_errors") else {}


# Containers of PyAV and their streams refer to each other, so that decoders wait for Python's collector. In a forked
# process, such as a worker of a `DataLoader`, it must leave those of the parent alone: freeing one waits for its
# threads, which are not there, for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=gc.freeze)


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class VideoError(ValueError):
    """A file cannot be read or written, or a range, size or option is not legal for it; the message says which."""


def check_path(name: str, path: Any) -> None:
    """Refuse what names no file; of an empty name `Path` would make the current folder.

    Args:
        name: The argument, for the message.
        path: What came.

    Raises:
        VideoError: If it is no text or path, is empty, or holds a null character.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise VideoError(f"`{name}` must be a path that is not empty and has no null character, got {path!r}.")


class Unsupported(Exception):
    """A file is well, but of a kind that is not supported; the message is half a sentence: its ... is ..."""


@contextmanager
def open_input(path: PathLike, name: PathLike | None = None) -> Iterator[InputContainer]:
    """Open a file for reading; everything that goes wrong then is a `VideoError` that names the file.

    What goes wrong in the body may be of another file, such as that which is written: see `named_errors` for reading.

    Args:
        path: The file.
        name: What to call it, if not by its path.
    """
    file, path = Path(path), path if name is None else name
    with ExitStack() as resources:
        with named_errors(path):
            if not file.exists():
                raise VideoError(f"Cannot read {str(path)!r}: the file does not exist.")
            if file.is_dir():
                raise VideoError(f"Cannot read {str(path)!r}: it is a folder, expected a video or image file.")
            if file.stat().st_size == 0:
                raise VideoError(f"Cannot read {str(path)!r}: the file is empty.")
            # An absolute path is never taken for a protocol ("a:b.mp4"), "pattern_type" stops "%d" in a name from
            # being expanded, and the whitelist keeps a playlist that calls itself a video off the network.
            options = {"protocol_whitelist": "file", "max_pixels": str(MAX_FRAME_PIXELS)}
            if "%" in file.name:
                options["pattern_type"] = "none"
            container = resources.enter_context(av.open(str(file.absolute()), "r", options=options, **_TAG_OPTIONS))
        yield container


@contextmanager
def named_errors(path: PathLike) -> Iterator[None]:
    """Turn errors of FFmpeg and of the file system into a `VideoError` that names the file."""
    try:
        yield
    except Unsupported as error:
        raise VideoError(f"Cannot read {str(path)!r}: {error}.") from error
    except (FFmpegError, OSError) as error:
        reason = f"{getattr(error, 'strerror', None) or error}".rstrip(".")
        raise VideoError(
            f"Cannot read {str(path)!r} as a video or image: {reason} (damaged, truncated, not permitted or of an "
            "unknown format)."
        ) from error


@contextmanager
def named_write_errors(path: PathLike) -> Iterator[None]:
    """Turn errors of FFmpeg and of the file system into a `VideoError` that names the file that is written."""
    try:
        yield
    except BrokenPipeError:  # whose reader has seen enough
        raise
    except (FFmpegError, OSError) as error:
        raise VideoError(f"Cannot write {str(path)!r}: {error}.") from error


def find_pictures(container: InputContainer) -> VideoStream | None:
    """Return the video stream that counts: the first one that is no cover picture, as music files have it."""
    return next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)


def codec_name(stream: Stream) -> str:
    """Return the name of a stream's codec, `"unknown"` without a decoder for it."""
    context = cast(Any, stream).codec_context
    return "unknown" if context is None else context.codec.canonical_name


def find_video_stream(container: InputContainer, path: PathLike) -> VideoStream:
    """Return the video stream to read, set up to report damage and to use all threads.

    Raises:
        VideoError: If there is none, or no decoder for it.
    """
    stream = find_pictures(container)
    # "tty" renders text as a video, playlists name other files.
    if stream is None or container.format.name in ("tty", "hls", "concat", "dash"):
        kind = "only audio" if container.streams.audio else "no video or image"
        raise VideoError(f"Cannot read {str(path)!r}: it holds {kind}, expected a video stream.")
    if cast(Any, stream).codec_context is None:
        raise VideoError(f"Cannot read {str(path)!r}: there is no decoder for its video codec.")
    context = stream.codec_context
    if context.width * context.height > MAX_FRAME_PIXELS:
        raise VideoError(
            f"Cannot read {str(path)!r}: its header claims {context.width}x{context.height} pixels, expected at most "
            f"{MAX_FRAME_PIXELS}."
        )
    context.options = _DECODING
    stream.thread_type = "AUTO"
    return stream


def alpha_decoder(stream: VideoStream) -> VideoCodecContext | None:
    """Return a fresh decoder for VP8 and VP9 with alpha, which FFmpeg's own decoders leave out; `None` for others."""
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.codec.canonical_name)
    if name is None or stream.metadata.get("alpha_mode") != "1" or name not in av.codecs_available:
        return None
    decoder = cast(VideoCodecContext, av.CodecContext.create(name, "r"))
    decoder.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    return decoder

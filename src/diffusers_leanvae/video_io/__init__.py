"""Reading and writing video and image files: the only code that opens them."""

from typing import TYPE_CHECKING, Any

from .containers import VideoError
from .info import VideoInfo
from .inputs import list_videos
from .reader import TimedFrames, VideoReader, iter_video, probe_video, read_video
from .timing import at_constant_rate


if TYPE_CHECKING:
    from .writer import VideoWriter, write_video

__all__ = [
    "TimedFrames",
    "VideoError",
    "VideoInfo",
    "VideoReader",
    "VideoWriter",
    "at_constant_rate",
    "iter_video",
    "list_videos",
    "probe_video",
    "read_video",
    "write_video",
]


def __getattr__(name: str) -> Any:
    if name not in ("VideoWriter", "write_video"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import writer  # with PyTorch, which headers can be read without

    return getattr(writer, name)

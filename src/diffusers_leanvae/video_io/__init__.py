"""Reading and writing video and image files: the only code that opens them."""

from .containers import VideoError
from .reader import VideoInfo, VideoReader, iter_video, list_videos, probe_video, read_video
from .writer import VideoWriter, write_video


__all__ = [
    "VideoError",
    "VideoInfo",
    "VideoReader",
    "VideoWriter",
    "iter_video",
    "list_videos",
    "probe_video",
    "read_video",
    "write_video",
]

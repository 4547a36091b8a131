"""Reading and writing of video files: the only code that opens them."""

from .reader import VideoError, VideoInfo, VideoWriter, iter_video, list_videos, probe_video, read_video, write_video


__all__ = [
    "VideoError",
    "VideoInfo",
    "VideoWriter",
    "iter_video",
    "list_videos",
    "probe_video",
    "read_video",
    "write_video",
]

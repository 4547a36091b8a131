"""Videos and latents to train on: the i-th clip is a pure function of the seed and of i."""

from ..video_io.pixels import pixels_to_sample, resize_frames, short_side_size
from .datasets import (
    Clip,
    ClipDataset,
    StepBatches,
    StepSchedule,
    TrainingClips,
    VideoFolder,
    read_center_clip,
)
from .opening import open_training_data


__all__ = [
    "Clip",
    "ClipDataset",
    "StepBatches",
    "StepSchedule",
    "TrainingClips",
    "VideoFolder",
    "open_training_data",
    "pixels_to_sample",
    "read_center_clip",
    "resize_frames",
    "short_side_size",
]

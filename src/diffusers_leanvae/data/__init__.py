"""Videos and latents to train on; the i-th clip is a pure function of the seed and of i."""

from ..video_io.pixels import pixels_to_sample, resize_frames, short_side_size
from .cutting import ClipOptions
from .datasets import (
    Clip,
    ClipDataset,
    TrainingClips,
    VideoFolder,
    read_center_clip,
)
from .latent_cache import encode_dataset
from .latent_shards import LatentFolder
from .opening import open_clip_dataset, open_training_data
from .schedule import Share, StepBatches, StepSchedule


__all__ = [
    "Clip",
    "ClipDataset",
    "ClipOptions",
    "LatentFolder",
    "Share",
    "StepBatches",
    "StepSchedule",
    "TrainingClips",
    "VideoFolder",
    "encode_dataset",
    "open_clip_dataset",
    "open_training_data",
    "pixels_to_sample",
    "read_center_clip",
    "resize_frames",
    "short_side_size",
]

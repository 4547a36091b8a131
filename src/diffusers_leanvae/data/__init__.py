"""Videos and latents to train on; the i-th clip is a pure function of the seed and of i."""

from typing import TYPE_CHECKING, Any

from ..video_io.pixels import pixels_to_sample, resize_frames, short_side_size
from .cutting import ClipOptions
from .datasets import (
    Clip,
    ClipDataset,
    TrainingClips,
    VideoFolder,
    read_center_clip,
)
from .latent_shards import LatentFolder
from .opening import open_clip_dataset, open_training_data
from .schedule import Share, StepBatches, StepSchedule


if TYPE_CHECKING:
    from .latent_cache import encode_dataset

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


def __getattr__(name: str) -> Any:
    if name != "encode_dataset":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .latent_cache import encode_dataset  # with diffusers, which clips can be read without

    return encode_dataset

"""Training data; the i-th clip is a pure function of the seed and of i.

Nothing here remembers earlier draws. To resume is to start at a later step, and the clips of a step do not depend on
the number of workers (nor, for local files, of processes) that share them. Start from `open_training_data`;
`docs/data.md` describes its arguments.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..video_io import VideoError, VideoReader
from ..video_io.pixels import center_crop, pixels_to_sample, resize_frames, short_side_size
from .cutting import ClipOptions, Size, VideoOrder, VideoSet, fits, rescale
from .metadata import find_captions
from .procedural import draw_footage
from .schedule import ALONE, Share, StepBatches, StepSchedule
from .sources import FileSource, VideoSource


def read_center_clip(video: str | Path | VideoReader, num_frames: int, size: int) -> torch.Tensor:
    """Read the evaluation view of a video: its first frames, short side resized to `size`, centre crop.

    Args:
        video: A file, or a reader that has it open.
        num_frames: Frames of the clip.
        size: Height and width of the clip.

    Returns:
        Float32 clip in `[-1, 1]`, shape `(3, num_frames, size, size)`. The resampled values are clipped but not
        rounded to 256 levels, which alone would hide differences beyond 59 dB.
    """
    with nullcontext(video) if isinstance(video, VideoReader) else VideoReader(video) as reader:
        frames = reader.read(0, num_frames)
    if len(frames) < num_frames:
        raise VideoError(f"{reader.info.path!r} must have at least {num_frames} frames, got {len(frames)}.")
    height, width = short_side_size(frames.shape[1], frames.shape[2], size)
    frames = resize_frames(frames.float(), height, width)
    clip = center_crop(frames, size, size).permute(3, 0, 1, 2)
    return pixels_to_sample(clip).clamp_(-1.0, 1.0).contiguous()


class Clip(NamedTuple):
    """`pixels` are uint8, `(3, num_frames, height, width)`; PyTorch collates a batch to tensors of all fields.

    `video` is the number of the video, for `metadata`; -1 for procedural footage. `num_skipped` counts the unusable
    videos and parts of videos that were passed over in search of this clip.
    """

    pixels: torch.Tensor
    index: int
    video: int
    num_skipped: int


class ClipDataset(ABC, Dataset[Clip]):
    """Random clips without end: any index from 0 is valid. The subclass says which videos they come from.

    One size is drawn per step, so that a batch has one. A video that cannot be decoded, or is too short or too small
    for the clip, is passed over, with a warning where no clip fits at all, and the next one in the order takes its
    place.

    Args:
        options: The clips to cut.
        schedule: The steps.
        share: The part of a step that this process draws.
        seed: Everything random depends on this and on the index of the clip alone.

    Attributes:
        caption_column: The column of the metadata that holds captions; `None` for those of the usual names.
    """

    caption_column: str | None = None

    def __init__(self, options: ClipOptions, schedule: StepSchedule, share: Share = ALONE, seed: int = 0) -> None:
        self.options, self.schedule, self.share, self.seed = options, schedule, share, seed
        self.batches(0, 0)  # refuses a batch that does not divide

    @abstractmethod
    def locate(self, step: int, position: int) -> tuple[VideoOrder, int, int]:
        """Return the order that the clip at `position` of `step` comes from, and its step and position therein."""

    @abstractmethod
    def metadata(self, video: int) -> dict[str, Any]:
        """Return the metadata of a video: its `file_name` and, for instance, a `caption`; of -1, an empty one."""

    def captions(self, video: int) -> tuple[str, ...]:
        """Return the captions of a video."""
        return find_captions(self.metadata(video), self.caption_column)

    @abstractmethod
    def describe(self) -> str:
        """Describe the data in a few words, for a log."""

    @property
    @abstractmethod
    def num_skipped(self) -> int:
        """Number of unusable videos and images this process has found; `Clip.num_skipped` covers all workers."""

    def batches(self, start_step: int, num_steps: int) -> StepBatches:
        """Return the `batch_sampler` of this process, from `start_step` until before `num_steps`."""
        return StepBatches(self.schedule, start_step, num_steps, self.share)

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return a state that makes starting at `step` fast, for each process to save; clips do not need it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the `state_dict` of the same process of an equal run."""

    def close(self) -> None:
        """Remove temporary files."""

    def __getitem__(self, index: int) -> Clip:
        return self._clip(index, self.schedule.is_procedural(index))

    def cut_clip(self, index: int) -> Clip:
        """Return the clip of a video, also where procedural footage takes its place in training."""
        return self._clip(index, False)

    def _clip(self, index: int, is_procedural: bool) -> Clip:
        step, position = divmod(index, self.schedule.clips_per_step)
        order, order_step, order_position = self.locate(step, position)
        sizes, numbers = order.candidates(order_step, order_position)
        rng = np.random.default_rng([self.seed, 1, step])
        size = sizes[int(rng.integers(len(sizes)))]
        factor = self.options.rescale_factors[int(rng.integers(len(self.options.rescale_factors)))]
        if is_procedural:
            return Clip(draw_footage(rescale(size, factor), self.seed, index), index, -1, 0)
        num_skipped = 0
        for attempt, number in enumerate(numbers):
            with order.videos.open(number) as video:
                if video.shape is not None:
                    if not fits(video.shape, size):
                        continue
                    pixels = video.cut(size, factor, np.random.default_rng([self.seed, 2, index, attempt]))
                    if pixels is not None:
                        return Clip(pixels, index, self._video(step, number), num_skipped)
            num_skipped += 1
        raise ValueError(f"`clip_sizes` must fit a sound part of the {len(order.videos)} videos, got {list(size)}.")

    def _video(self, step: int, number: int) -> int:
        return number


class TrainingClips(ClipDataset):
    """Clips of local videos, in a folder or in tar shards.

    Args:
        source: The videos.
        options: The clips to cut.
        schedule: The steps.
        share: The part of a step that this process draws.
        seed: Everything random depends on this and on the index of the clip alone.
        images: Where image steps take their images from; `None` for random frames of the videos.
        cache_gib: Memory for decoded videos. They are decoded once, in the constructor, until this is spent; of the
            others each clip reads what it needs.
    """

    def __init__(
        self,
        source: VideoSource,
        options: ClipOptions,
        schedule: StepSchedule,
        share: Share = ALONE,
        seed: int = 0,
        images: VideoSource | None = None,
        cache_gib: float = 4.0,
    ) -> None:
        super().__init__(options, schedule, share, seed)
        self.videos = VideoSet(source, wanted_sizes(options, schedule, images is None), options)
        self.image_videos = self.videos if images is None else VideoSet(images, options.image_sizes, options)
        capacity = int(cache_gib * 2**30)
        for videos in self._video_sets:
            capacity = videos.fill_cache(capacity)
            if videos.num_skipped == len(videos):
                raise ValueError(f"`train` must hold at least one usable video, got {len(videos)} that were skipped.")
        self.video_order = VideoOrder(self.videos, options.sizes, schedule.batch_size, [self.seed, 0])
        self.image_order = None
        if schedule.image_ratio > 0:
            self.image_order = make_image_order(self.image_videos, schedule, [self.seed, 0])

    def __len__(self) -> int:
        """Number of videos, which is the length of an epoch; indices continue beyond it."""
        return len(self.videos)

    @property
    def num_cached(self) -> int:
        """Number of videos and images held in memory."""
        return sum(len(videos.cache) for videos in self._video_sets)

    @property
    def num_skipped(self) -> int:
        return sum(videos.num_skipped for videos in self._video_sets)

    def locate(self, step: int, position: int) -> tuple[VideoOrder, int, int]:
        num_image_steps = self.schedule.num_image_steps(step)
        if self.image_order is not None and self.schedule.is_image_step(step):
            return self.image_order, num_image_steps, position
        return self.video_order, step - num_image_steps, position

    def metadata(self, video: int) -> dict[str, Any]:
        return self.videos.source.metadata(video) if video >= 0 else {}

    def describe(self) -> str:
        images = "" if self.image_videos is self.videos else f" and {len(self.image_videos)} images"
        return f"{len(self)} videos{images}, {self.num_cached} in memory, {self.num_skipped} skipped"

    @property
    def _video_sets(self) -> list[VideoSet]:
        return [self.videos] if self.image_videos is self.videos else [self.videos, self.image_videos]


class VideoFolder(TrainingClips):
    """Random clips of the videos below a folder, for one process; the arguments are those of `open_training_data`.

    Args:
        folder: Searched recursively. With a metadata file in it (`metadata.jsonl`, `.csv` or `.parquet`), its
            `file_name` entries are the list of videos.
        clip_sizes: `(num_frames, height, width)` choices; one is drawn for every `batch_size` successive clips.
        batch_size: Clips of a step, which share a size.
        short_side: Scale videos down until the short side is at most this; `None` keeps them as they are.
        stride: Frame spacing, or `[lowest, highest]` to draw it per clip; less where a video is short.
        max_zoom_out: A clip is cut from a window 1 to `max_zoom_out` times its size and scaled down.
        flip: Mirror every other clip left to right.
        cache_gib: Memory for decoded videos.
        seed: Everything random depends on this and on the index of the clip alone.
    """

    def __init__(
        self,
        folder: str | Path,
        clip_sizes: Sequence[Sequence[int]] = ((17, 64, 64),),
        batch_size: int = 1,
        short_side: int | None = None,
        stride: int | Sequence[int] = 1,
        max_zoom_out: float = 1.0,
        flip: bool = True,
        cache_gib: float = 4.0,
        seed: int = 0,
    ) -> None:
        options = ClipOptions(clip_sizes, False, short_side, stride, max_zoom_out, flip)
        source = FileSource(Path(folder))
        super().__init__(source, options, StepSchedule(batch_size), seed=seed, cache_gib=cache_gib)
        self.paths = source.paths


def wanted_sizes(options: ClipOptions, schedule: StepSchedule, mixes_frames: bool) -> list[Size]:
    """Return the sizes that videos must hold; with `mixes_frames`, image steps take single frames of them too."""
    return [*options.sizes, *(options.image_sizes if mixes_frames and schedule.image_ratio > 0 else [])]


def make_image_order(videos: VideoSet, schedule: StepSchedule, seed: Sequence[int], num_shares: int = 1) -> VideoOrder:
    """Make the order of image steps; each of `num_shares` processes has an order of its own."""
    batch_size = schedule.batch_size * schedule.image_batch_factor // num_shares
    return VideoOrder(videos, videos.options.image_sizes, batch_size, seed, is_image=True)

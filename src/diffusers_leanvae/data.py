"""Video folders as training data: the i-th clip is a pure function of the seed and of i.

Nothing here remembers what was drawn before. Resuming is starting at a later index, and the clips of a step do not
depend on the number of processes or workers that share them.
"""

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Sampler

from .video_io import VideoError, iter_video, list_videos, probe_video, read_video


NUM_PASSES = 4  # over all videos in search of a sound part, before giving up


def pixels_to_sample(pixels: torch.Tensor) -> torch.Tensor:
    """`uint8` pixels to float32 in `[-1, 1]`, any shape, on whatever device they are."""
    return pixels.float().div_(127.5).sub_(1.0)


def resize_frames(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize `(num_frames, height, width, 3)` frames with antialiased bicubic weights; the dtype stays.

    `uint8` is rounded and clipped by the resampler, floating point is neither.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    # A THWC tensor seen as TCHW is channels-last, which is the layout of the fast uint8 resampler.
    resized = F.interpolate(frames.permute(0, 3, 1, 2), size=(height, width), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1)


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width after scaling the shorter of them to `short_side`, the aspect ratio kept."""
    scale = short_side / min(height, width)
    return max(short_side, round(height * scale)), max(short_side, round(width * scale))


def read_center_clip(path: str | Path, num_frames: int, size: int) -> torch.Tensor:
    r"""The evaluation view of a video: its first frames, short side resized to `size`, centre crop.

    Returns:
        Float32 clip in `[-1, 1]`, shape `(3, num_frames, size, size)`. The resampled values are clipped but not
        rounded to 256 levels, which alone would hide differences beyond 59 dB.
    """
    frames, _ = read_video(path, num_frames=num_frames)
    if len(frames) < num_frames:
        raise VideoError(f"{str(path)!r} must have at least {num_frames} frames, got {len(frames)}.")
    height, width = short_side_size(frames.shape[1], frames.shape[2], size)
    frames = resize_frames(frames.float(), height, width)
    top, left = (height - size) // 2, (width - size) // 2
    clip = frames[:, top : top + size, left : left + size].permute(3, 0, 1, 2)
    return clip.div(127.5).sub_(1.0).clamp_(-1.0, 1.0).contiguous()


class Clip(NamedTuple):
    """`pixels` are uint8, `(3, num_frames, height, width)`; PyTorch collates a batch to tensors of both."""

    pixels: torch.Tensor
    index: int


class VideoFolder(Dataset[Clip]):
    r"""Random clips of the videos below a folder, without end: any index from 0 is valid.

    Index `i` visits the videos in a new random order every epoch and cuts one clip: random start, stride, zoom,
    position and mirroring. A video that cannot be decoded, or is too short or too small for the clip, is skipped, with
    a warning where no clip fits at all, and the next one in the order takes its place.

    Args:
        folder: Searched recursively. With a `metadata.jsonl` in it, its `file_name` entries are the list of videos.
        clip_sizes: `(num_frames, height, width)` choices; one is drawn for every `clips_per_size` successive clips.
        clips_per_size: The number of successive clips that share a size: a multiple of the batch size.
        short_side: Scale videos down until the short side is at most this; `None` keeps them as they are.
        max_stride: Frames are taken 1 to `max_stride` apart, as far as the video is long enough.
        max_zoom_out: A clip is cut from a window 1 to `max_zoom_out` times its size and scaled down.
        flip: Mirror every other clip left to right.
        cache_gib: Memory for decoded videos. They are decoded once, in the constructor, until this is spent; of the
            others each clip reads what it needs.
        seed: Everything random depends on this and on the index alone.
    """

    def __init__(
        self,
        folder: str | Path,
        clip_sizes: Sequence[Sequence[int]] = ((17, 64, 64),),
        clips_per_size: int = 1,
        short_side: int | None = None,
        max_stride: int = 1,
        max_zoom_out: float = 1.0,
        flip: bool = True,
        cache_gib: float = 4.0,
        seed: int = 0,
    ) -> None:
        for size in clip_sizes:
            if len(size) != 3 or any(not isinstance(edge, int) or edge < 1 for edge in size):
                raise ValueError(f"`clip_sizes` must hold [num_frames, height, width] triples, got {list(size)}.")
        if not clip_sizes:
            raise ValueError("`clip_sizes` must hold at least one [num_frames, height, width], got none.")
        if max_stride < 1:
            raise ValueError(f"`max_stride` must be at least 1, got {max_stride}.")
        if max_zoom_out < 1.0:
            raise ValueError(f"`max_zoom_out` must be at least 1.0, got {max_zoom_out}.")
        self.clip_sizes = [(int(t), int(h), int(w)) for t, h, w in clip_sizes]
        self.clips_per_size = clips_per_size
        self.short_side = short_side
        self.max_stride = max_stride
        self.max_zoom_out = max_zoom_out
        self.flip = flip
        self.seed = seed
        self.paths = _listed_videos(Path(folder))
        self._shapes: dict[Path, tuple[int, int, int] | None] = {}  # frames, height, width; None for unusable videos
        self._cache: dict[Path, torch.Tensor] = {}
        self._epoch_order: tuple[int, np.ndarray] = (-1, np.empty(0))
        self._fill_cache(int(cache_gib * 2**30))
        if self.num_skipped == len(self.paths):
            raise ValueError(f"`folder` must hold at least one usable video, got {len(self.paths)} that were skipped.")

    def __len__(self) -> int:
        """The number of videos, which is the length of an epoch; indices go on beyond it."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Clip:
        group = np.random.default_rng([self.seed, 1, index // self.clips_per_size])
        size = self.clip_sizes[group.integers(len(self.clip_sizes))]
        epoch, position = divmod(index, len(self.paths))
        order = self._order(epoch)
        for attempt in range(NUM_PASSES * len(self.paths)):
            path = self.paths[order[(position + attempt) % len(self.paths)]]
            shape = self._shape(path)
            if shape is None or not _fits(shape, size):
                continue
            pixels = self._cut(path, shape, size, np.random.default_rng([self.seed, 2, index, attempt]))
            if pixels is not None:
                return Clip(pixels, index)
        raise ValueError(f"`clip_sizes` must fit a sound part of the {len(self.paths)} videos, got {list(size)}.")

    @property
    def num_cached(self) -> int:
        """Videos held in memory."""
        return len(self._cache)

    @property
    def num_skipped(self) -> int:
        """Videos found to be unusable so far; without a cache, and in workers, they are found as they are drawn."""
        return sum(shape is None for shape in self._shapes.values())

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch_order[0] != epoch:
            permutation = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.paths))
            self._epoch_order = (epoch, permutation)
        return self._epoch_order[1]

    def _shape(self, path: Path) -> tuple[int, int, int] | None:
        """Frames, height and width after scaling, or `None` (with one warning) for a video without a usable clip."""
        if path not in self._shapes:
            try:
                info = probe_video(path)
                num_frames = info.num_frames or sum(len(frames) for frames in iter_video(path))
                self._shapes[path] = shape = (num_frames, *self._scaled_size(info.height, info.width))
                if not any(_fits(shape, size) for size in self.clip_sizes):
                    raise VideoError(f"{str(path)!r} has {shape} frames, height, width and holds no clip.")
            except VideoError as error:
                self._skip(path, error)
        return self._shapes[path]

    def _skip(self, path: Path, error: Exception) -> None:
        self._shapes[path] = None
        warnings.warn(f"Skipping a video: {error}", stacklevel=2)

    def _scaled_size(self, height: int, width: int) -> tuple[int, int]:
        if self.short_side is None or min(height, width) <= self.short_side:
            return height, width
        return short_side_size(height, width, self.short_side)

    def _read(self, path: Path, start: int = 0, num_frames: int | None = None) -> torch.Tensor:
        chunks = iter_video(path, start, num_frames)
        return torch.cat([resize_frames(frames, *self._scaled_size(*frames.shape[1:3])) for frames in chunks])

    def _fill_cache(self, capacity: int) -> None:
        for path in self.paths if capacity > 0 else []:
            shape = self._shape(path)
            if shape is None:
                continue
            capacity -= 3 * math.prod(shape)
            if capacity < 0:
                break
            try:
                self._cache[path] = self._read(path)
                self._shapes[path] = (len(self._cache[path]), *shape[1:])  # headers can be wrong
            except VideoError as error:
                self._skip(path, error)

    def _cut(
        self, path: Path, shape: tuple[int, int, int], size: tuple[int, int, int], rng: np.random.Generator
    ) -> torch.Tensor | None:
        num_frames, height, width = size
        longest_stride = (shape[0] - 1) // (num_frames - 1) if num_frames > 1 else 1
        stride = int(rng.integers(1, min(self.max_stride, longest_stride) + 1))
        span = (num_frames - 1) * stride + 1
        start = int(rng.integers(shape[0] - span + 1))

        largest_zoom = min(self.max_zoom_out, shape[1] / height, shape[2] / width)
        zoom = float(np.exp(rng.uniform(0.0, np.log(largest_zoom))))
        window_height, window_width = int(height * zoom), int(width * zoom)
        top = int(rng.integers(shape[1] - window_height + 1))
        left = int(rng.integers(shape[2] - window_width + 1))
        mirrored = self.flip and rng.random() < 0.5

        if path in self._cache:
            frames = self._cache[path][start : start + span]
        else:
            try:
                frames = self._read(path, start, span)
                if len(frames) < span:
                    raise VideoError(f"{str(path)!r} ends before frame {start + span}, which its header promises.")
            except VideoError as error:
                # Other parts of the video may be sound: marking it would make clips depend on what was drawn before.
                warnings.warn(f"Skipping a part of a video: {error}", stacklevel=3)
                return None
        window = frames[::stride, top : top + window_height, left : left + window_width]
        clip = resize_frames(window, height, width)
        return (clip.flip(2) if mirrored else clip).permute(3, 0, 1, 2)


class StepBatches(Sampler[list[int]]):
    r"""The index lists of one process: step `s` uses the clips `s * batch_size` up to `(s + 1) * batch_size`.

    Args:
        batch_size: Clips of one optimizer step, over all processes and accumulation steps.
        start_step: The first step to draw, later ones when resuming.
        num_steps: The step to stop before.
        num_accumulation_steps: Batches per step and process.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        batch_size: int,
        start_step: int,
        num_steps: int,
        num_accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % (num_accumulation_steps * world_size):
            raise ValueError(
                f"`batch_size` must be a multiple of {num_accumulation_steps} accumulation steps times {world_size} "
                f"processes, got {batch_size}."
            )
        self.batch_size, self.start_step, self.num_steps = batch_size, start_step, num_steps
        self.num_accumulation_steps, self.rank, self.world_size = num_accumulation_steps, rank, world_size

    def __len__(self) -> int:
        return max(0, self.num_steps - self.start_step) * self.num_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        count = self.batch_size // (self.num_accumulation_steps * self.world_size)
        for step in range(self.start_step, self.num_steps):
            for part in range(self.rank, self.num_accumulation_steps * self.world_size, self.world_size):
                first = step * self.batch_size + part * count
                yield list(range(first, first + count))


def _fits(shape: tuple[int, int, int], size: tuple[int, int, int]) -> bool:
    return all(edge <= available for edge, available in zip(size, shape, strict=True))


def _listed_videos(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"`folder` must be an existing folder of videos, got {str(folder)!r}.")
    listing = folder / "metadata.jsonl"
    if not listing.is_file():
        paths = sorted(Path(path) for path in list_videos(folder))
    else:
        paths = []
        for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                if line.strip():
                    paths.append(folder / json.loads(line)["file_name"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"Every line of `metadata.jsonl` must be a JSON object with `file_name`, got {error!r} in line "
                    f"{number} of {str(listing)!r}."
                ) from error
    if not paths:
        raise ValueError(f"`folder` must hold at least one video, got none in {str(folder)!r}.")
    return paths

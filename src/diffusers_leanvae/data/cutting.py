"""Cutting of clips from the videos of a source: probing, caching, buckets of aspect ratios, and order."""

import math
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..video_io import VideoError, VideoReader
from ..video_io.pixels import resize_frames, short_side_size
from .sources import VideoSource


NUM_PASSES = 4  # over all videos in search of a sound part, before giving up

Size = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class ClipOptions:
    """Sizes, frame spacing and augmentation of clips; `open_training_data` describes the fields."""

    clip_sizes: Sequence[Sequence[int]] = ((17, 64, 64),)  # [num_frames, height, width]; one is drawn per step
    aspect_buckets: bool = False  # a step takes videos of one aspect ratio, and a size of that ratio
    short_side: int | None = None  # larger videos are scaled down to it
    stride: int | Sequence[int] = 1  # every n-th frame; [1, 4] draws n per clip
    max_zoom_out: float = 1.0  # clips are cut from a window of 1 to this many times their size, and scaled down
    flip: bool = True  # mirror every other clip
    rescale_factors: Sequence[float] = (1.0,)  # one is drawn per step; clips are scaled down by it

    def __post_init__(self) -> None:
        for size in self.clip_sizes:
            if len(size) != 3 or any(not isinstance(edge, int) or edge < 1 for edge in size):
                raise ValueError(f"`clip_sizes` must hold [num_frames, height, width] triples, got {list(size)}.")
        if not self.clip_sizes:
            raise ValueError("`clip_sizes` must hold at least one [num_frames, height, width], got none.")
        strides = [self.stride] * 2 if isinstance(self.stride, int) else list(self.stride)
        if len(strides) != 2 or not all(isinstance(n, int) for n in strides) or not 1 <= strides[0] <= strides[1]:
            raise ValueError(f"`stride` must be an integer from 1 or [lowest, highest] of them, got {self.stride}.")
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"`short_side` must be at least 1 or None, got {self.short_side}.")
        if self.max_zoom_out < 1.0:
            raise ValueError(f"`max_zoom_out` must be at least 1.0, got {self.max_zoom_out}.")
        if not self.rescale_factors or min(self.rescale_factors) <= 0:
            raise ValueError(f"`rescale_factors` must hold at least one positive number, got {self.rescale_factors}.")

    @property
    def sizes(self) -> list[Size]:
        return [(size[0], size[1], size[2]) for size in self.clip_sizes]

    @property
    def image_sizes(self) -> list[Size]:
        """The clip sizes with one frame, each once."""
        return list(dict.fromkeys((1, height, width) for _, height, width in self.sizes))

    @property
    def strides(self) -> tuple[int, int]:
        return (self.stride, self.stride) if isinstance(self.stride, int) else (self.stride[0], self.stride[1])


class VideoSet:
    """The videos of a source, and as many of them decoded in memory as fit.

    Args:
        source: The files.
        sizes: The clip sizes that are wanted; a video which holds none of them is unusable.
        options: The clips to cut.
    """

    def __init__(self, source: VideoSource, sizes: Sequence[Size], options: ClipOptions) -> None:
        self.source, self.sizes, self.options = source, list(sizes), options
        self.cache: dict[int, torch.Tensor] = {}
        self.shapes: dict[int, Size | None] = {}  # after scaling; None for unusable videos

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_skipped(self) -> int:
        return sum(shape is None for shape in self.shapes.values())

    @contextmanager
    def open(self, number: int) -> Iterator["OpenVideo"]:
        """Yield a video, whose file is opened once and only if something must be read of it."""
        with ExitStack() as resources:
            yield OpenVideo(self, number, resources)

    def shape(self, number: int) -> Size | None:
        """Return the shape of a video, see `OpenVideo.shape`."""
        with self.open(number) as video:
            return video.shape

    def fill_cache(self, capacity: int) -> int:
        """Decode videos into memory, the first ones first, until `capacity` bytes are spent; return what is left."""
        for number in range(len(self)) if capacity > 0 else ():
            with self.open(number) as video:
                shape = video.shape
                if shape is None:
                    continue
                if 3 * math.prod(shape) > capacity:
                    break
                try:
                    frames = video.read()
                    capacity -= frames.numel()
                    self.cache[number] = frames
                    self.shapes[number] = (len(frames), *shape[1:])  # headers can be wrong
                except Exception as error:
                    self.skip(video, error)
        return capacity

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        short_side = self.options.short_side
        if short_side is None or min(height, width) <= short_side:
            return height, width
        return short_side_size(height, width, short_side)

    def skip(self, video: "OpenVideo", error: Exception) -> None:
        if isinstance(error, ConnectionError):  # which says nothing of the video
            raise error
        self.shapes[video.number] = None
        warnings.warn(f"Skipping a video: {video.reason(error)}", stacklevel=4)


class OpenVideo:
    """A video to cut clips from; `VideoSet.open` gives it."""

    def __init__(self, videos: VideoSet, number: int, resources: ExitStack) -> None:
        self.videos, self.number = videos, number
        self._resources = resources
        self._path: Path | None = None  # maybe of a temporary copy

    @property
    def shape(self) -> Size | None:
        """Frames, height and width after scaling, or `None` (with one warning) for a video without a usable clip."""
        videos, number = self.videos, self.number
        if number not in videos.shapes:
            try:
                height, width = videos.scaled_size(self._reader.info.height, self._reader.info.width)
                videos.shapes[number] = shape = (self._reader.count_frames(), height, width)
                if not any(fits(shape, size) for size in videos.sizes):
                    raise VideoError(
                        f"{videos.source.name(number)!r} has {shape} frames, height, width and holds no clip."
                    )
            except Exception as error:
                # Whatever a foreign file does to the reader must not end a run of days.
                videos.skip(self, error)
        return videos.shapes[number]

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return scaled frames, uint8 `(num_frames, height, width, 3)`."""
        if self.number in self.videos.cache:
            return self.videos.cache[self.number][start:stop]
        stored = self._reader.info.height, self._reader.info.width
        size = self.videos.scaled_size(*stored)
        if size == stored:
            return self._reader.read(start, stop)
        chunks = self._reader.frames(start, stop, packed=True)
        # Joined as (num_frames, 3, height, width), a layout that PyTorch keeps, whichever of the two it is.
        chunks = [resize_frames(frames, *size).permute(0, 3, 1, 2) for frames in chunks]
        return torch.cat(chunks).permute(0, 2, 3, 1)

    def cut(self, size: Size, factor: float, rng: np.random.Generator) -> torch.Tensor | None:
        """Return a random clip, uint8 `(3, num_frames, height, width)`, or `None` where the video cannot be read.

        Args:
            size: Frames, height and width of the window at zoom 1, which must fit into `shape`.
            factor: As of `rescale`.
            rng: Source of everything random.
        """
        shape, options = self.shape, self.videos.options
        assert shape is not None
        num_frames, height, width = size
        longest = (shape[0] - 1) // (num_frames - 1) if num_frames > 1 else 1
        lowest, highest = (min(stride, longest) for stride in options.strides)
        stride = int(rng.integers(lowest, highest + 1))
        span = (num_frames - 1) * stride + 1
        start = int(rng.integers(shape[0] - span + 1))

        largest_zoom = min(options.max_zoom_out, shape[1] / height, shape[2] / width)
        zoom = float(np.exp(rng.uniform(0.0, np.log(largest_zoom))))
        window_height, window_width = int(height * zoom), int(width * zoom)
        top = int(rng.integers(shape[1] - window_height + 1))
        left = int(rng.integers(shape[2] - window_width + 1))
        mirrored = options.flip and rng.random() < 0.5

        try:
            frames = self.read(start, start + span)
            if frames.shape[:3] != (span, *shape[1:]):
                raise VideoError(
                    f"{self.videos.source.name(self.number)!r} ends before frame {start + span} or changes its size, "
                    "against what its header promises."
                )
        except ConnectionError:  # which says nothing of the video
            raise
        except Exception as error:
            # Other parts of the video may be sound: marking it would make clips depend on what was drawn before.
            warnings.warn(f"Skipping a part of a video: {self.reason(error)}", stacklevel=2)
            return None
        window = frames[::stride, top : top + window_height, left : left + window_width]
        clip = resize_frames(window, *rescale(size, factor)[1:])
        return (clip.flip(2) if mirrored else clip).permute(3, 0, 1, 2)

    def reason(self, error: Exception) -> str:
        """Return the text of an error, in which the video has the name that its source gives it."""
        return str(error).replace(str(self._path), self.videos.source.name(self.number)) if self._path else str(error)

    @cached_property
    def _reader(self) -> VideoReader:
        self._path = self._resources.enter_context(self.videos.source.open(self.number))
        return self._resources.enter_context(VideoReader(self._path))


class VideoOrder:
    """The order of the videos: buckets of them, each visited in a new random order every epoch.

    An epoch is one visit to every video of every bucket; a bucket takes whole steps, and what its videos do not fill
    is carried over to the next epoch.

    Args:
        videos: The videos.
        sizes: The clip sizes to choose from.
        batch_size: Clips of one step.
        seed: Entropy of the orders.
        is_image: Whether clips are single frames, which are drawn in another order.
    """

    def __init__(
        self, videos: VideoSet, sizes: Sequence[Size], batch_size: int, seed: Sequence[int], is_image: bool = False
    ) -> None:
        self.videos, self.batch_size, self.seed, self.is_image = videos, batch_size, list(seed), is_image
        self.buckets: list[tuple[list[Size], np.ndarray]] = [(list(sizes), np.arange(len(videos)))]
        if videos.options.aspect_buckets:
            self.buckets = _aspect_buckets(videos, sizes)
            if not self.buckets:
                raise ValueError(f"`clip_sizes` must fit at least one of the {len(videos)} videos, got {list(sizes)}.")
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # the newest order of each bucket, and its epoch
        self._plan: tuple[int, np.ndarray] = (-1, np.empty(0))

    def candidates(self, step: int, position: int) -> tuple[list[Size], Iterator[int]]:
        """Return the sizes to choose from, and the videos in order, for a clip at a position of a step."""
        bucket, step_of_bucket = self._locate(step)
        sizes, members = self.buckets[bucket]
        epoch, first = divmod(step_of_bucket * self.batch_size + position, len(members))
        order = self._order(bucket, epoch)
        numbers = (int(order[(first + i) % len(order)]) for i in range(NUM_PASSES * len(order)))
        return sizes, numbers

    def _locate(self, step: int) -> tuple[int, int]:
        """Return the bucket of a step, and the number of earlier steps of that bucket."""
        if len(self.buckets) == 1:
            return 0, step
        epoch = step * self.batch_size // sum(len(members) for _, members in self.buckets)
        while sum(self._steps_before(epoch)) > step:
            epoch -= 1
        while sum(self._steps_before(epoch + 1)) <= step:
            epoch += 1
        before = self._steps_before(epoch)
        if self._plan[0] != epoch:
            counts = [end - begin for begin, end in zip(before, self._steps_before(epoch + 1), strict=True)]
            plan = np.repeat(np.arange(len(counts)), counts)
            rng = np.random.default_rng([*self.seed, epoch, 2 * len(counts) + self.is_image])
            self._plan = (epoch, rng.permutation(plan))
        plan, offset = self._plan[1], step - sum(before)
        bucket = int(plan[offset])
        return bucket, before[bucket] + int((plan[:offset] == bucket).sum())

    def _steps_before(self, epoch: int) -> list[int]:
        return [epoch * len(members) // self.batch_size for _, members in self.buckets]

    def _order(self, bucket: int, epoch: int) -> np.ndarray:
        if self._orders.get(bucket, (-1,))[0] != epoch:
            rng = np.random.default_rng([*self.seed, epoch, 2 * bucket + self.is_image])
            self._orders[bucket] = (epoch, rng.permutation(self.buckets[bucket][1]))
        return self._orders[bucket][1]


def _aspect_buckets(videos: VideoSet, all_sizes: Sequence[Size]) -> list[tuple[list[Size], np.ndarray]]:
    """Group clip sizes by aspect ratio, each group with the videos whose own ratio is nearest to it and that fit."""
    ratios = list(dict.fromkeys(Fraction(height, width) for _, height, width in all_sizes))
    sizes = [[size for size in all_sizes if Fraction(size[1], size[2]) == ratio] for ratio in ratios]
    with ThreadPoolExecutor() as pool:  # FFmpeg works outside the interpreter lock
        shapes = list(pool.map(videos.shape, range(len(videos))))
    members: list[list[int]] = [[] for _ in ratios]
    for number, shape in enumerate(shapes):
        possible = [i for i in range(len(ratios)) if shape and any(fits(shape, size) for size in sizes[i])]
        if shape and possible:
            distances = [abs(math.log(ratios[i] * shape[2] / shape[1])) for i in possible]
            members[possible[distances.index(min(distances))]].append(number)
    return [(sizes[i], np.array(members[i])) for i in range(len(ratios)) if members[i]]


def rescale(size: Size, factor: float) -> Size:
    """Divide height and width by a factor; they are then rounded to multiples of 16, unless the factor is 1."""
    if factor == 1.0:
        return size
    num_frames, *edges = size
    height, width = (max(16, 16 * round(edge / factor / 16)) for edge in edges)
    return num_frames, height, width


def fits(shape: Size, size: Size) -> bool:
    """Whether a video of this shape holds a clip of this size."""
    return all(edge <= available for edge, available in zip(size, shape, strict=True))

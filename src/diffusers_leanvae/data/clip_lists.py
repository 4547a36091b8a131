"""Finite lists of numbered clips, cut from any source, as `encode_dataset` encodes them."""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..checks import check_choice
from .cutting import ClipOptions, VideoSet
from .metadata import LABEL_KEYS, list_captions, number_labels
from .named import NAMED_DATASETS, NamedDataset, Sampling, open_named_dataset
from .scenes import MovingScenes
from .shapes import MovingShapes
from .sources import open_source
from .streams import BlockReader, is_stream, open_stream


Flip = Literal["auto", "none", "random", "both"]
_DRAWN: dict[str, type[MovingShapes] | type[MovingScenes]] = {"shapes": MovingShapes, "scenes": MovingScenes}
# Of the names, labels and captions of the videos. There are none of what is drawn, nor of a stream, which has no list.
CHECKSUMS = ("clip_names_sha256", "clip_labels_sha256", "clip_captions_sha256")
_BLOCK_SIZE = 64  # examples of a stream that are on disk at once


@dataclass(frozen=True)
class ClipSelection:
    """Clips of a source, and the way they are cut.

    Args:
        source: `"shapes"` or `"scenes"`; a named data set as `"ucf101:folder"` (`named.NAMED_DATASETS`); or what
            `open_training_data` takes: a folder, tar shards, or a stream.
        clip_size: `[num_frames, height, width]`; square for named data sets.
        num_crops: Clips per video, each at a random place and time (named data sets: time).
        flip: `"none"`; `"random"`: mirror every other clip; `"both"`: every clip as it is, for the user of the list to
            mirror; `"auto"`: what is usual for a named data set, else `"none"`. What is drawn is never mirrored.
        sampling: Of named data sets, see `open_named_dataset`.
        stride: Frame spacing; 3 for named data sets and 1 for others by default.
        short_side: Scale larger videos down to it before cutting (not for named data sets, which have their own rule).
        num_clips: Maximum number of clips; required for a stream, 10,000 by default for shapes and scenes.
        seed: Seed of everything random.
        caption_column: The column of the metadata that holds captions, see `open_training_data`.
        num_captions: Descriptions of each clip of scenes.
    """

    source: str
    clip_size: Sequence[int] = (17, 256, 256)
    num_crops: int = 1
    flip: Flip = "auto"
    sampling: Sampling = "exact"
    stride: int | None = None
    short_side: int | None = None
    num_clips: int | None = None
    seed: int = 0
    caption_column: str | None = None
    num_captions: int = 1

    def __post_init__(self) -> None:
        for name in ("num_crops", "num_clips", "num_captions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.num_captions > 1 and self.source != "scenes":
            raise ValueError(f"`num_captions` must be 1 for all but scenes, got {self.num_captions}.")
        if len(self.clip_size) != 3 or min(self.clip_size) < 1:
            raise ValueError(f"`clip_size` must be [num_frames, height, width], got {list(self.clip_size)}.")
        check_choice("flip", self.flip, get_args(Flip))


class SourceClip(NamedTuple):
    """A clip to encode: pixels `(3, num_frames, height, width)`, uint8 or in `[-1, 1]`, and its metadata."""

    pixels: torch.Tensor
    class_label: int | None
    captions: tuple[str, ...]
    name: str


class ClipList(Protocol):
    """Clips by number, each a function of its number; `None` in place of one that cannot be used."""

    class_names: tuple[str, ...] | None
    has_captions: bool | None  # whether any clip has one; `None` where only reading tells
    checksums: dict[str, str]  # see `CHECKSUMS`

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """Return the name of a clip: its video and the number of its cut."""
        ...

    def read(self, numbers: range) -> Iterator[SourceClip | None]:
        """Yield the clips of ascending numbers, in order."""
        ...


def open_clip_list(selection: ClipSelection, num_workers: int = 0) -> ClipList:
    """Open the clips of a selection.

    Args:
        selection: The clips.
        num_workers: Processes that decode videos ahead.

    Raises:
        ValueError: If the source holds nothing of the kind, or the selection is not legal for it.
    """
    source, flip, num_clips, seed = selection.source, selection.flip, selection.num_clips, selection.seed
    num_frames, height, width = selection.clip_size
    if source in _DRAWN:
        if flip not in ("auto", "none") or selection.num_crops > 1:
            raise ValueError(
                f"`flip` and `num_crops` must be 'none' and 1 for {source}, which are known by their directions, got "
                f"{flip!r} and {selection.num_crops}."
            )
        if selection.caption_column is not None:
            raise ValueError(
                f"`caption_column` must be None for {source}, which describe themselves, got "
                f"{selection.caption_column!r}."
            )
        clips = _DRAWN[source](num_frames, height, width, seed, num_clips or 10_000)
        if isinstance(clips, MovingScenes):
            clips.num_captions = selection.num_captions
        return _DrawnClips(source, clips, num_workers)
    name, _, folder = source.partition(":")
    if name in NAMED_DATASETS:
        if height != width or selection.short_side is not None:
            raise ValueError(
                f"`clip_size` must be square and `short_side` None for {name}, got {list(selection.clip_size)} and "
                f"{selection.short_side}."
            )
        named = open_named_dataset(
            name,
            folder,
            num_frames,
            height,
            selection.sampling,
            seed,
            sample_stride=selection.stride or 3,
            flip={"auto": None, "random": True}.get(flip, False),
            num_draws=selection.num_crops,
            caption_column=selection.caption_column,
        )
        return _NamedClips(named, num_clips, num_workers)
    if is_stream(source):
        return _StreamClips(selection)
    return _FileClips(selection, num_workers)


def _clip_options(selection: ClipSelection) -> ClipOptions:
    return ClipOptions(
        [list(selection.clip_size)],
        short_side=selection.short_side,
        stride=selection.stride or 1,
        flip=selection.flip == "random",
    )


class _MapClips(Dataset[SourceClip | None]):
    """Clips that can be asked for in any order, so that workers can share them."""

    def __init__(
        self, num_clips: int, class_names: tuple[str, ...] | None, has_captions: bool, num_workers: int
    ) -> None:
        self.num_clips, self.class_names = num_clips, class_names
        self.has_captions: bool | None = has_captions
        self.num_workers = num_workers
        self.checksums: dict[str, str] = {}

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, number: int) -> SourceClip | None:
        raise NotImplementedError

    def name(self, number: int) -> str:
        raise NotImplementedError

    def read(self, numbers: range) -> Iterator[SourceClip | None]:
        yield from DataLoader(
            self, sampler=numbers, batch_size=None, num_workers=self.num_workers, collate_fn=_as_it_is
        )


def _checksums(*columns: Iterable[Any]) -> dict[str, str]:
    texts = (json.dumps(list(column)).encode() for column in columns)
    return {key: hashlib.sha256(text).hexdigest() for key, text in zip(CHECKSUMS, texts, strict=True)}


def _as_it_is(clip: Any) -> Any:
    return clip  # PyTorch would turn captions into a list


class _DrawnClips(_MapClips):
    def __init__(self, source: str, clips: MovingShapes | MovingScenes, num_workers: int) -> None:
        super().__init__(len(clips), clips.class_names, True, num_workers)
        self.source, self.clips = source, clips

    def __getitem__(self, number: int) -> SourceClip:
        clip = self.clips[number]
        label, captions = getattr(clip, "class_label", None), tuple(self.clips.captions(number))
        return SourceClip(clip.pixels, label, captions, self.name(number))

    def name(self, number: int) -> str:
        return f"{self.source}-{self.clips.seed}#{number}"


class _NamedClips(_MapClips):
    def __init__(self, clips: NamedDataset, num_clips: int | None, num_workers: int) -> None:
        num_clips = min(len(clips), num_clips or len(clips))
        super().__init__(num_clips, clips.class_names, any(map(clips.captions, range(num_clips))), num_workers)
        self.clips = clips
        videos = clips.videos[: -(-num_clips // clips.num_draws)]
        labels = [*(video.class_label for video in videos), clips.class_names]
        self.checksums = _checksums((video.name for video in videos), labels, (video.captions for video in videos))

    def __getitem__(self, number: int) -> SourceClip | None:
        clip = self.clips.clip_or_none(number)
        return None if clip is None else SourceClip(*clip, self.name(number))

    def name(self, number: int) -> str:
        return f"{self.clips.metadata(number)['file_name']}#{number % self.clips.num_draws}"


class _FileClips(_MapClips):
    """Clips of the files of a folder or of shards, as many of each as there are crops."""

    def __init__(self, selection: ClipSelection, num_workers: int) -> None:
        source = open_source(selection.source)
        rows = [source.metadata(number) for number in range(len(source))]
        self.labels, class_names = number_labels(rows)
        self.names, self.captions = [row["file_name"] for row in rows], list_captions(rows, selection.caption_column)
        total = len(source) * selection.num_crops
        num_clips = min(total, selection.num_clips or total)
        num_videos = -(-num_clips // selection.num_crops)
        super().__init__(num_clips, class_names, any(self.captions[:num_videos]), num_workers)
        labels = [*self.labels[:num_videos], class_names]
        self.checksums = _checksums(self.names[:num_videos], labels, self.captions[:num_videos])
        options = _clip_options(selection)
        self.videos = VideoSet(source, options.sizes, options)
        self.num_crops, self.seed = selection.num_crops, selection.seed

    def __getitem__(self, number: int) -> SourceClip | None:
        video = number // self.num_crops
        pixels = _cut(self.videos, video, [self.seed, number])
        if pixels is None:
            return None
        return SourceClip(pixels, self.labels[video], self.captions[video], self.name(number))

    def name(self, number: int) -> str:
        video, crop = divmod(number, self.num_crops)
        return f"{self.names[video]}#{crop}"


class _StreamClips:
    """Clips of a stream. Every process reads all of it, from its start, so that the clips depend on nothing else.

    At the end of the stream it starts over, with other crops.
    """

    has_captions: bool | None = None

    def __init__(self, selection: ClipSelection) -> None:
        if selection.num_clips is None:
            raise ValueError("`num_clips` must be given for a stream, got None.")
        self.checksums: dict[str, str] = {}
        self.num_clips, self.num_crops, self.seed = selection.num_clips, selection.num_crops, selection.seed
        self.caption_column = selection.caption_column
        self.options = _clip_options(selection)
        stream = open_stream(selection.source)
        self.folder = tempfile.TemporaryDirectory(prefix="leanvae-stream-")
        self.reader = BlockReader(stream, _BLOCK_SIZE, Path(self.folder.name), self.seed)
        columns = stream.features or {}
        names = next((columns[key].names for key in LABEL_KEYS if hasattr(columns.get(key), "names")), None)
        self.class_names = None if names is None else tuple(names)

    def __len__(self) -> int:
        return self.num_clips

    def name(self, number: int) -> str:
        example, crop = divmod(number, self.num_crops)
        return f"{example}#{crop}"

    def read(self, numbers: range) -> Iterator[SourceClip | None]:
        opened, videos, rows, captions = -1, None, [], []
        for number in numbers:
            block, place = divmod(number // self.num_crops, _BLOCK_SIZE)
            if videos is None or block != opened:
                opened = block
                videos = VideoSet(self.reader.open(block), self.options.sizes, self.options)
                self.reader.forget_before(block)
                rows = [videos.source.metadata(place) for place in range(len(videos))]
                captions = list_captions(rows, self.caption_column)
            pixels = _cut(videos, place, [self.seed, number])
            if pixels is None:
                yield None
                continue
            (label,), names = number_labels([rows[place]])
            if names is not None:
                raise ValueError(f"Labels of a stream must be numbers, got {names[0]!r}.")
            yield SourceClip(pixels, label, captions[place], self.name(number))


def _cut(videos: VideoSet, number: int, seed: list[int]) -> torch.Tensor | None:
    with videos.open(number) as video:
        return None if video.shape is None else video.cut(videos.sizes[0], 1.0, np.random.default_rng(seed))

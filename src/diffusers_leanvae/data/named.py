"""Video data sets by name, cut exactly, or as in the training of Latte (arXiv 2401.03048) on LeanVAE latents.

A clip is a pure function of the seed and of its index. Published models were trained with `sampling="reference"`,
faults included; `"exact"` does what was meant. `docs/data.md` compares the two.
"""

import re
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from ..checks import check_choice
from ..video_io import VideoError, VideoReader, list_videos, read_video
from ..video_io.inputs import IMAGE_EXTENSIONS
from ..video_io.pixels import center_crop, pixels_to_sample, resize_frames, short_side_size
from .metadata import find_metadata, list_captions, number_labels, read_captions
from .sources import FileSource


Sampling = Literal["exact", "reference"]


@dataclass(frozen=True)
class _Rules:
    """Properties of a named data set: files or folders of frames, mirrored or not, and the reference's crop."""

    has_frame_folders: bool
    is_mirrored: bool
    spatial: Literal["resize_then_crop", "crop_then_resize", "none"]
    has_classes: bool = False
    needs_more_than_window: bool = False  # else a folder of frames must only reach the last frame of a clip


_RULES = {
    "ucf101": _Rules(False, True, "resize_then_crop", has_classes=True),
    "skytimelapse": _Rules(True, False, "crop_then_resize", needs_more_than_window=True),
    "ffs": _Rules(False, True, "resize_then_crop"),
    "taichi": _Rules(True, True, "none"),
    "videofolder": _Rules(False, False, "resize_then_crop"),
}
NAMED_DATASETS = tuple(_RULES)


class NamedClip(NamedTuple):
    """`pixels` are `(3, num_frames, size, size)`, uint8, or float32 in `[-1, 1]` where the reference resamples so."""

    pixels: torch.Tensor
    class_label: int | None
    captions: tuple[str, ...]


@dataclass(eq=False)
class NamedDataset(Dataset[NamedClip]):
    """Clips of a named data set; `open_named_dataset` makes it and describes the fields."""

    name: str
    videos: "list[_Video]"
    class_names: tuple[str, ...] | None
    num_frames: int
    size: int
    sampling: Sampling
    seed: int
    sample_stride: int
    flip: bool
    num_draws: int

    def __len__(self) -> int:
        return len(self.videos) * self.num_draws

    def __getitem__(self, index: int) -> NamedClip:
        """Return the clip of an index, or, with a warning, of the next video that can be used."""
        return self.find(index)[0]

    def find(self, index: int) -> tuple[NamedClip, int]:
        """Return the clip of an index, or, with a warning, of the next video that can be used; and how many cannot."""
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be from 0 to {len(self) - 1}, got {index}.")
        for attempt in range(len(self)):
            clip = self.clip_or_none((index + attempt) % len(self))
            if clip is not None:
                return clip, attempt
        raise ValueError(f"`folder` must hold at least one usable video, got {len(self.videos)} that are not.")

    def clip_or_none(self, index: int) -> NamedClip | None:
        """Return the clip of an index, or, with a warning, `None` if its video cannot be used."""
        try:
            return self.clip(index)
        except VideoError as error:
            warnings.warn(f"Skipping a video: {error}", stacklevel=2)
            return None

    def metadata(self, index: int) -> dict[str, Any]:
        """Return `file_name`, `class_label`, `class_name` and `captions` of the video of a clip."""
        video = self.videos[index // self.num_draws]
        name = None
        if self.class_names is not None and video.class_label is not None:
            name = self.class_names[video.class_label]
        return {
            "file_name": video.name,
            "class_label": video.class_label,
            "class_name": name,
            "captions": video.captions,
        }

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of the video of a clip."""
        return self.videos[index // self.num_draws].captions

    def clip(self, index: int) -> NamedClip:
        """Return the clip of an index.

        Raises:
            VideoError: If its video cannot be read, or is too short.
        """
        video = self.videos[index // self.num_draws]
        rng = np.random.default_rng([self.seed, index])
        sample = _sample_reference if self.sampling == "reference" else _sample_exact
        with nullcontext() if video.frames is not None else VideoReader(video.path) as reader:
            num_frames = len(video.frames or ()) if reader is None else reader.count_frames()
            places = sample(num_frames, self.num_frames, self.sample_stride, reader is None, rng)
            if places is None:
                raise VideoError(f"{str(video.path)!r} must have more frames for a clip, got {num_frames}.")
            frames = video.read(places, reader)
        if self.flip and rng.random() < 0.5:
            frames = frames.flip(2)
        if self.sampling == "exact":
            pixels = _square(frames, self.size)
        else:
            pixels = _square_as_reference(frames, self.size, _RULES[self.name].spatial, video.path)
        return NamedClip(pixels.permute(3, 0, 1, 2).contiguous(), video.class_label, video.captions)


def open_named_dataset(
    name: str,
    folder: str | Path,
    num_frames: int = 17,
    size: int = 256,
    sampling: Sampling = "exact",
    seed: int = 0,
    *,
    sample_stride: int = 3,
    flip: bool | None = None,
    num_draws: int = 1,
    caption_column: str | None = None,
) -> NamedDataset:
    """Open a data set that lies on disk as it was published.

    Args:
        name: `"ucf101"`: video files in a folder per class; `"ffs"` (FaceForensics): video files; `"skytimelapse"`,
            `"taichi"`: any folder that directly holds frames is a video, sorted by the number behind the last `_` of
            their names; `"videofolder"`: what `metadata.jsonl`, `.csv` or `.parquet` lists, with columns `label` and
            `caption`, or else all video files, of which those in folders belong to the class that the first folder
            names; the captions of `clip.mp4` are then the lines of `clip.txt`, if there is one.
        folder: Where it lies. Classes are numbered by name.
        num_frames: Frames of a clip.
        size: Height and width of a clip.
        sampling: `"exact"`: frames exactly `sample_stride` apart, any start equally likely, antialiased resize of
            the short side, centre crop, uint8. `"reference"`: as published models were trained (`docs/data.md`).
        seed: Seed of everything random; a clip depends on this and its index alone.
        sample_stride: Frame spacing; in video files the reference uses it for the length of a window,
            `num_frames * sample_stride`, over which it spreads the frames.
        flip: Mirror every other clip; `None` for what is usual for the data set: not for SkyTimelapse and videofolder.
        num_draws: Clips per video; a data set has this many times as many clips as videos.
        caption_column: Of the metadata file of a videofolder: the column with the captions, a text or a list of
            texts; `None` for the first of `caption`, `text`, `txt` and `captions` that is not empty.

    Raises:
        ValueError: If `folder` holds no such data set, or an argument is not legal.
    """
    check_choice("name", name, NAMED_DATASETS)
    check_choice("sampling", sampling, ("exact", "reference"))
    counts = {"num_frames": num_frames, "size": size, "sample_stride": sample_stride, "num_draws": num_draws}
    for argument, value in counts.items():
        if value < 1:
            raise ValueError(f"`{argument}` must be at least 1, got {value}.")
    if caption_column is not None and name != "videofolder":
        raise ValueError(f"`caption_column` must be None for {name}, which has no captions, got {caption_column!r}.")
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"`folder` must be an existing folder, got {str(folder)!r}.")
    rules, class_names = _RULES[name], None
    if rules.has_frame_folders:
        shortest = (num_frames - 1) * sample_stride + 1
        if rules.needs_more_than_window and sampling == "reference":
            shortest = num_frames * sample_stride + 1
        videos = _frame_folders(root, shortest)
    elif name == "videofolder" and find_metadata(root) is not None:
        videos, class_names = _listed_videos(root, caption_column)
    else:
        videos, class_names = _class_folders(root, rules.has_classes, name in ("ucf101", "videofolder"))
        if name == "videofolder":
            if caption_column is not None:
                raise ValueError(
                    f"`caption_column` must be None for a folder without a metadata file, got {caption_column!r} for "
                    f"{str(folder)!r}."
                )
            videos = [replace(video, captions=read_captions(video.path)) for video in videos]
    if not videos:
        kind = f"folder of {shortest} frames" if rules.has_frame_folders else "video"
        raise ValueError(f"`folder` must hold at least one {kind} for {name!r}, got none in {str(folder)!r}.")
    flip = rules.is_mirrored if flip is None else flip
    return NamedDataset(name, videos, class_names, num_frames, size, sampling, seed, sample_stride, flip, num_draws)


# --- Files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Video:
    """A video file, or a folder with its frames in order."""

    path: Path
    name: str
    class_label: int | None = None
    captions: tuple[str, ...] = ()
    frames: tuple[Path, ...] | None = None

    def read(self, places: np.ndarray, reader: VideoReader | None) -> torch.Tensor:
        """Read frames at ascending `places`, uint8 `(len(places), height, width, 3)`; `reader` has the file open."""
        if reader is None:
            assert self.frames is not None
            frames = [read_video(self.frames[place], num_frames=1)[0] for place in places]
            if len({frame.shape for frame in frames}) > 1:
                raise VideoError(f"The frames in {str(self.path)!r} must have one size, got several.")
            return torch.cat(frames)
        first, span = int(places[0]), int(places[-1] - places[0]) + 1
        frames = reader.read(first, first + span)
        if len(frames) < span:
            raise VideoError(f"{str(self.path)!r} ends before frame {first + span}, against what its header promises.")
        return frames[torch.from_numpy(places - first)]


def _frame_folders(root: Path, shortest: int) -> list[_Video]:
    folders: dict[Path, list[Path]] = {}
    for path in list_videos(root):
        if path.suffix.lower() in IMAGE_EXTENSIONS:
            folders.setdefault(path.parent, []).append(path)
    return [
        _Video(folder, folder.relative_to(root).as_posix(), frames=tuple(sorted(frames, key=_frame_number)))
        for folder, frames in sorted(folders.items())
        if len(frames) >= shortest
    ]


def _frame_number(path: Path) -> tuple[int, str]:
    digits = re.findall(r"\d+", path.stem.rpartition("_")[2])
    return int(digits[-1]) if digits else -1, path.name


def _listed_videos(root: Path, caption_column: str | None) -> tuple[list[_Video], tuple[str, ...] | None]:
    source = FileSource(root)
    rows = [source.metadata(number) for number in range(len(source))]
    labels, names = number_labels(rows)
    videos = [
        _Video(path, row["file_name"], label, captions)
        for path, row, label, captions in zip(
            source.paths, rows, labels, list_captions(rows, caption_column), strict=True
        )
    ]
    return videos, names


def _class_folders(root: Path, needs: bool, has: bool) -> tuple[list[_Video], tuple[str, ...] | None]:
    paths = [path for path in list_videos(root) if path.suffix.lower() not in IMAGE_EXTENSIONS]
    parts = [path.relative_to(root).parts for path in paths]
    loose = [path for path, part in zip(paths, parts, strict=True) if len(part) == 1]
    if needs and loose:
        raise ValueError(f"`folder` must have a folder per class and no videos next to them, got {str(loose[0])!r}.")
    if not has or loose:
        return [_Video(path, "/".join(part)) for path, part in zip(paths, parts, strict=True)], None
    names = sorted({part[0] for part in parts})
    numbers = {name: number for number, name in enumerate(names)}
    videos = [_Video(path, "/".join(part), numbers[part[0]]) for path, part in zip(paths, parts, strict=True)]
    return videos, tuple(names) or None


# --- Time ------------------------------------------------------------------------------------------------------------


def _sample_exact(
    total: int, num_frames: int, stride: int, is_folder: bool, rng: np.random.Generator
) -> np.ndarray | None:
    span = (num_frames - 1) * stride + 1
    if total < span:
        return None
    return int(rng.integers(total - span + 1)) + stride * np.arange(num_frames)


def _sample_reference(
    total: int, num_frames: int, stride: int, is_folder: bool, rng: np.random.Generator
) -> np.ndarray | None:
    window = num_frames * stride
    start = int(rng.integers(max(0, total - window - 1) + 1))
    if is_folder:
        places = start + stride * np.arange(num_frames)
        return places if places[-1] < total else None
    end = min(start + window, total)
    # Spread over the window from its first to its last frame, so 50 / 16 = 3.125 apart for 17 frames of stride 3.
    return np.linspace(start, end - 1, num_frames).astype(np.int64) if end - start >= num_frames else None


# --- Space -----------------------------------------------------------------------------------------------------------


def _square(frames: torch.Tensor, size: int) -> torch.Tensor:
    """Resize the short side to `size`, antialiased, and crop the centre."""
    height, width = short_side_size(frames.shape[1], frames.shape[2], size)
    return center_crop(resize_frames(frames, height, width), size, size, rounding="even")


def _square_as_reference(frames: torch.Tensor, size: int, spatial: str, path: Path) -> torch.Tensor:
    """Resize bilinearly without antialiasing, to floats in `[-1, 1]` that are not rounded."""
    height, width = frames.shape[1:3]
    side = min(height, width)
    if spatial == "none":
        if (height, width) != (size, size):
            raise ValueError(f"`size` must be that of the frames, {height} x {width} in {str(path)!r}, got {size}.")
        return pixels_to_sample(frames)
    if spatial == "crop_then_resize":
        frames = center_crop(frames, side, side, rounding="even")
    images = frames.permute(0, 3, 1, 2).float()
    if spatial == "resize_then_crop" and int(side * (size / side)) == size:
        images = F.interpolate(images, scale_factor=(size / side, size / side), mode="bilinear", align_corners=False)
    else:  # also for the few sides which rounding would leave one pixel short
        target = (max(size, int(edge * (size / side))) for edge in images.shape[2:])
        images = F.interpolate(images, size=tuple(target), mode="bilinear", align_corners=False)
    return pixels_to_sample(center_crop(images.permute(0, 2, 3, 1), size, size, rounding="even"))

"""Moving shapes: a procedural data set of labelled clips, drawn when asked for.

A clip shows one shape of one colour that moves evenly in one direction over a dark gradient; position, size, speed,
shade and background vary. It is a pure function of the seed, the index and the size. Small enough for a generator to
be trained on a laptop, and simple enough for `shapes_detector` to say whether a generated clip shows what was asked.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..checks import check_choice
from .drawing import EXTENTS, HUES, VELOCITIES, dark_gradient, hsv_color, shape_coverage, straight_path, write_clips


# Chosen so that an autoencoder of 8 x 8 pixels leaves them apart: corners of squares and greens do not survive it.
SHAPES = ("circle", "triangle", "cross")
COLORS = ("red", "yellow", "blue")
DIRECTIONS = ("left", "right", "up", "down")
NUM_CLASSES = len(SHAPES) * len(COLORS) * len(DIRECTIONS)

# Of the shorter side of the clip. The widest shape on the longest way, 0.44 * 1.2 + 0.45, still fits.
_SIZES = (0.34, 0.44)
_WAYS = (0.25, 0.45)


class ShapesItem(NamedTuple):
    """`pixels` are float32 in `[-1, 1]`, `(3, num_frames, height, width)`; PyTorch collates batches of it."""

    pixels: torch.Tensor
    class_label: int
    caption: str


def class_label(shape: str, color: str, direction: str) -> int:
    """The class of a shape, colour and direction: `((shape * 3) + color) * 4 + direction`."""
    for name, value, legal in (
        ("shape", shape, SHAPES),
        ("color", color, COLORS),
        ("direction", direction, DIRECTIONS),
    ):
        check_choice(name, value, legal)
    index = SHAPES.index(shape) * len(COLORS) + COLORS.index(color)
    return index * len(DIRECTIONS) + DIRECTIONS.index(direction)


def class_parts(label: int) -> tuple[str, str, str]:
    """Shape, colour and direction of a class."""
    if not 0 <= label < NUM_CLASSES:
        raise ValueError(f"`label` must be from 0 to {NUM_CLASSES - 1}, got {label}.")
    index, direction = divmod(int(label), len(DIRECTIONS))
    shape, color = divmod(index, len(COLORS))
    return SHAPES[shape], COLORS[color], DIRECTIONS[direction]


def caption(label: int) -> str:
    """Describe a clip of the class, for instance `"a red circle moving left"`."""
    shape, color, direction = class_parts(label)
    return f"a {color} {shape} moving {direction}"


CLASS_NAMES = tuple(f"{color} {shape} {direction}" for shape, color, direction in map(class_parts, range(NUM_CLASSES)))


def draw_clip(
    label: int, num_frames: int = 17, height: int = 64, width: int = 64, seed: int = 0, index: int = 0
) -> torch.Tensor:
    """Draw clip number `index` of a class.

    The way of the shape over the whole clip is a quarter to almost half of the shorter side, whatever the length.

    Args:
        label: From 0 to `NUM_CLASSES - 1`.
        num_frames: Any number from 1.
        height, width: Any size from 16.
        seed, index: Position, size, speed, shade and background depend on these and on `label`.

    Returns:
        Float32 in `[-1, 1]`, shape `(3, num_frames, height, width)`.
    """
    shape, color, direction = class_parts(label)
    if num_frames < 1:
        raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
    if min(height, width) < 16:
        raise ValueError(f"`height` and `width` must be at least 16, got {height} and {width}.")
    rng = np.random.default_rng([seed, index, label])
    side = min(height, width)
    size, way = rng.uniform(*_SIZES) * side, rng.uniform(*_WAYS) * side
    extent_x, extent_y = (size * extent for extent in EXTENTS[shape])
    toward_x, toward_y = VELOCITIES[direction]
    x = straight_path(rng, extent_x, way * toward_x, width, num_frames)
    y = straight_path(rng, extent_y, way * toward_y, height, num_frames)
    foreground = hsv_color(HUES[color] + rng.uniform(-8, 8), rng.uniform(0.7, 0.85), rng.uniform(0.8, 0.95))
    background = dark_gradient(rng, height, width)
    coverage = shape_coverage(shape, extent_x, extent_y, x, y, height, width)
    pixels = background[:, None] + coverage * (foreground[:, None, None, None] - background[:, None])
    return torch.from_numpy(pixels.astype(np.float32)).mul_(2.0).sub_(1.0)


class MovingShapes(Dataset[ShapesItem]):
    """Moving shapes; every `NUM_CLASSES` successive clips show each class once.

    Args:
        num_frames, height, width, seed: As of `draw_clip`.
        num_clips: How many clips an epoch has.
    """

    class_names = CLASS_NAMES

    def __init__(
        self, num_frames: int = 17, height: int = 64, width: int = 64, seed: int = 0, num_clips: int = 10_000
    ) -> None:
        if num_clips < 1:
            raise ValueError(f"`num_clips` must be at least 1, got {num_clips}.")
        draw_clip(0, min(num_frames, 1), height, width)  # refuses what cannot be drawn
        self.num_frames, self.height, self.width = num_frames, height, width
        self.seed, self.num_clips = seed, num_clips

    def __len__(self) -> int:
        return self.num_clips

    def label(self, index: int) -> int:
        """The class of a clip, without drawing it."""
        block, place = divmod(index, NUM_CLASSES)
        return int(np.random.default_rng([self.seed, block]).permutation(NUM_CLASSES)[place])

    def captions(self, index: int) -> list[str]:
        """Describe a clip, without drawing it."""
        return [caption(self.label(index))]

    def __getitem__(self, index: int) -> ShapesItem:
        if not 0 <= index < self.num_clips:
            raise IndexError(f"`index` must be from 0 to {self.num_clips - 1}, got {index}.")
        label = self.label(index)
        pixels = draw_clip(label, self.num_frames, self.height, self.width, self.seed, index)
        return ShapesItem(pixels, label, caption(label))


def write_shapes(folder: str | Path, clips: MovingShapes, fps: int = 8, crf: float = 12) -> None:
    """Write clips as a video folder: `000000.mp4` and so on, and `metadata.jsonl` with `label` and `caption`.

    Existing files are kept, so that a killed call resumes where it stopped.
    """
    rows = [{"label": clips.label(index), "caption": caption(clips.label(index))} for index in range(len(clips))]
    write_clips(folder, rows, lambda index: clips[index].pixels, fps, crf)

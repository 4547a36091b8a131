"""Drawing of moving shapes: coverage of pixels, straight paths, colours, soft backgrounds, and clips as files."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..atomic import replace_file
from ..video_io import write_video
from ..video_io.pixels import sample_to_pixels


# Width and height of a shape of size 1. Areas are equal, so that size does not give the shape away.
EXTENTS = {"circle": (1.0, 1.0), "square": (0.886, 0.886), "triangle": (1.2, 1.1), "cross": (1.15, 1.15)}
HUES = {"red": 0.0, "yellow": 55.0, "blue": 230.0}  # degrees
VELOCITIES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y down
_CROSS_ARM = 0.36  # width, of the width of the whole
NUM_SAMPLES = 4  # per pixel and axis


def straight_path(rng: np.random.Generator, extent: float, way: float, length: float, num_frames: int) -> np.ndarray:
    """Centres `(num_frames,)` along one axis, all of them such that the shape is inside."""
    first = rng.uniform(extent / 2 + max(0.0, -way), length - extent / 2 - max(0.0, way))
    return first + way * np.arange(num_frames) / max(1, num_frames - 1)


def dark_gradient(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A dark, almost grey gradient `(3, height, width)` in a random direction."""
    colors = [hsv_color(rng.uniform(0, 360), rng.uniform(0, 0.2), rng.uniform(0.05, 0.4)) for _ in range(2)]
    angle = rng.uniform(0, 2 * math.pi)
    ramp_y = np.linspace(-0.5, 0.5, height)[:, None] * math.sin(angle)
    ramp_x = np.linspace(-0.5, 0.5, width)[None] * math.cos(angle)
    ramp = (ramp_y + ramp_x) / (abs(math.sin(angle)) + abs(math.cos(angle))) + 0.5
    return colors[0][:, None, None] * (1 - ramp) + colors[1][:, None, None] * ramp


def shape_coverage(
    shape: str, extent_x: float, extent_y: float, x: np.ndarray, y: np.ndarray, height: int, width: int
) -> np.ndarray:
    """The covered share of every pixel, `(num_frames, height, width)`, from `NUM_SAMPLES` squared samples."""
    coverage = np.zeros((len(x), height, width), np.float32)
    # Only where the shape ever is. Sample positions are in units of the shape: -1 and 1 are its sides.
    columns, u = _samples(x, extent_x, width)
    rows, v = _samples(y, extent_y, height)
    u, v = u[:, None], v[..., None]
    inside = is_inside(shape, u, v)
    blocks = inside.reshape(len(x), rows.stop - rows.start, NUM_SAMPLES, columns.stop - columns.start, NUM_SAMPLES)
    coverage[:, rows, columns] = blocks.mean((2, 4), dtype=np.float32)
    return coverage


def is_inside(shape: str, u: Any, v: Any) -> Any:
    """Tell which points are inside a shape.

    Args:
        shape: A key of `EXTENTS`.
        u, v: Horizontal and vertical places, from -1 to 1 inside the box around the shape: arrays of NumPy or tensors,
            which broadcast to each other.
    """
    if shape == "circle":
        return u * u + v * v <= 1
    if shape == "triangle":
        return (abs(u) <= (v + 1) / 2) & (v <= 1)  # the tip is at the top
    box = (abs(u) <= 1) & (abs(v) <= 1)
    return box if shape == "square" else box & ((abs(u) <= _CROSS_ARM) | (abs(v) <= _CROSS_ARM))


def _samples(centers: np.ndarray, extent: float, length: int) -> tuple[slice, np.ndarray]:
    """The pixels along one axis that the shape touches in any frame, and where their samples are."""
    first = max(0, math.floor(centers.min() - extent / 2))
    last = min(length, math.ceil(centers.max() + extent / 2))
    places = first + (np.arange((last - first) * NUM_SAMPLES) + 0.5) / NUM_SAMPLES
    return slice(first, last), ((places - centers[:, None]) / (extent / 2)).astype(np.float32)


def hsv_color(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB in `[0, 1]` of a hue in degrees."""
    steps = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    return value - value * saturation * np.clip(np.minimum(steps, 4 - steps), 0, 1)


def write_clips(
    folder: str | Path, rows: Sequence[dict[str, Any]], draw: Callable[[int], torch.Tensor], fps: int, crf: float
) -> None:
    """Write clips as a video folder: `000000.mp4` and so on, and `metadata.jsonl`; existing videos are kept.

    Args:
        folder: The folder, which is made if it is not there.
        rows: Metadata of each clip.
        draw: Returns the pixels of a clip in `[-1, 1]`, `(3, num_frames, height, width)`.
        fps: Frames per second.
        crf: Quality of the videos.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    named = [{"file_name": f"{index:06d}.mp4"} | row for index, row in enumerate(rows)]
    for index, row in enumerate(named):
        path = root / row["file_name"]
        if not path.exists():
            write_video(path, sample_to_pixels(draw(index)).permute(1, 2, 3, 0), fps=fps, crf=crf)
    with replace_file(root / "metadata.jsonl") as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in named), encoding="utf-8")

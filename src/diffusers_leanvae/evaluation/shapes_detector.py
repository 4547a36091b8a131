"""A detector of shape, colour and direction in clips of moving shapes, measured and not learned.

Only the names of shapes, colours and directions are shared with the renderer. The background is a plane fitted to the
pixels with little colour, and the object is what differs from it. Its hue gives the colour, angular moments give the
shape, and the path of its centroid gives the direction. Whatever is not clearly one of the known values is `None`.
"""

import math
from typing import NamedTuple

import torch

from ..data.shapes import class_label as label_of
from ..video_io.pixels import sample_to_unit


_HUES = {"red": 0.0, "yellow": 60.0, "blue": 240.0}


class Detection(NamedTuple):
    """The three properties, each `None` where it is not clear; `class_label` is given only if all three are."""

    shape: str | None
    color: str | None
    direction: str | None
    class_label: int | None


def detect(video: torch.Tensor) -> Detection:
    """Find the shape, colour and direction of the one object of a clip.

    Args:
        video: Floating point, in `[-1, 1]` (what is beyond is clipped), shape `(3, num_frames, height, width)`.
    """
    pixels = unit_video(video)
    weight, mean = _segment(pixels)
    if weight is None:
        return Detection(None, None, None, None)
    mass = weight.sum((1, 2))
    y = torch.arange(video.shape[2], dtype=weight.dtype)
    x = torch.arange(video.shape[3], dtype=weight.dtype)
    center_x, center_y = weight.sum(1) @ x / mass, weight.sum(2) @ y / mass
    offset_x, offset_y = torch.broadcast_tensors(
        (x - center_x[:, None])[:, None, :], (y - center_y[:, None])[:, :, None]
    )
    shape = _shape(weight, mass, torch.complex(offset_x, offset_y))
    color = _color(mean)
    direction = _direction(center_x, center_y, min(video.shape[2:]))
    if shape is None or color is None or direction is None:
        return Detection(shape, color, direction, None)
    return Detection(shape, color, direction, label_of(shape, color, direction))


def unit_video(video: torch.Tensor) -> torch.Tensor:
    """Return a video `(3, num_frames, height, width)` in `[0, 1]`, on the CPU.

    Raises:
        ValueError: If it is not one, or not floating point.
    """
    if video.ndim != 4 or video.shape[0] != 3 or not video.is_floating_point():
        raise ValueError(
            "`video` must be floating point, of shape (3, num_frames, height, width), got "
            f"{str(video.dtype).removeprefix('torch.')} of shape {tuple(video.shape)}."
        )
    return sample_to_unit(video.detach().cpu())


def _segment(pixels: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Weight of each pixel in the object, `(num_frames, height, width)` in `[0, 1]`, and the object's colour.

    The weights are `None` where a frame has no coloured pixels.
    """
    height, width = pixels.shape[2:]
    chroma = pixels.amax(0) - pixels.amin(0)
    peak = _inside(chroma)
    if peak.min() < 0.2:
        return None, pixels.mean((1, 2, 3))
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    basis = torch.stack([torch.ones_like(x), x, y])
    is_background = (chroma < 0.3 * peak).float()
    gram = torch.einsum("thw,ihw,jhw->tij", is_background, basis, basis)
    values = torch.einsum("thw,ihw,cthw->tic", is_background, basis, pixels)
    planes = torch.linalg.lstsq(gram, values).solution  # (num_frames, 3, 3)
    difference = pixels - torch.einsum("tic,ihw->cthw", planes, basis)
    distance = difference.square().sum(0)
    is_core = distance > 0.5 * _inside(distance)
    # Brightness is sharper than colour after compression, so both count: the share of the way to the core's mean.
    way = (difference * is_core).sum((2, 3)) / is_core.sum((1, 2))
    share = torch.einsum("cthw,ct->thw", difference, way) / way.square().sum(0)[:, None, None]
    return (2 * share - 0.5).clamp(0, 1), (pixels * is_core).sum((1, 2, 3)) / is_core.sum()


def _inside(values: torch.Tensor) -> torch.Tensor:
    """A value inside the object in every frame; values are higher there, on more than a twentieth of the frame."""
    flat = values.flatten(1)
    return flat.kthvalue(math.ceil(0.97 * flat.shape[1]), dim=1).values[:, None, None]


def _shape(weight: torch.Tensor, mass: torch.Tensor, offsets: torch.Tensor) -> str | None:
    """Find the shape by moments of `z = x + iy` about the centroid, the median over frames of each.

    `E|z|^2 / area` is 0.16 for a disc and 0.19 for a triangle or cross, and more for what is in pieces. `E[z^3]`
    vanishes but for the triangle, where it is 0.8 of `(E|z|^2)^1.5`. `E[z^4]` is 0.7 of `(E|z|^2)^2` for the cross.
    """

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (weight * values).sum((1, 2)) / mass

    squares = offsets * offsets
    variance = mean(squares.abs())
    spread = (variance / mass).median().item()
    third = (mean((squares * offsets).imag) / variance**1.5).median().item()
    fourth = (mean((squares * squares).real) / variance**2).median().item()
    if spread > 0.23:
        return None
    if abs(third) > 0.27:
        return "triangle"
    if fourth > 0.27:
        return "cross"
    return "circle" if fourth > -0.27 else None


def _color(mean: torch.Tensor) -> str | None:
    return nearest_hue(mean, _HUES, 28)


def nearest_hue(color: torch.Tensor, hues: dict[str, float], bound: float) -> str | None:
    """Return the name of the hue nearest to that of an RGB colour; `None` if it is more than `bound` degrees away."""
    red, green, blue = color.tolist()
    hue = math.degrees(math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    distances = {name: abs((hue - other + 180) % 360 - 180) for name, other in hues.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] <= bound else None


def _direction(x: torch.Tensor, y: torch.Tensor, side: int) -> str | None:
    """Find the direction by fitting a straight line to the centroids of the clip."""
    if len(x) < 2:
        return None
    way_x, way_y = straight_way(x), straight_way(y)
    longer, shorter = max(abs(way_x), abs(way_y)), min(abs(way_x), abs(way_y))
    return None if longer < 0.1 * side or shorter > 0.5 * longer else direction_of(way_x, way_y)


def straight_way(places: torch.Tensor) -> float:
    """Return how far places `(num_frames,)` move from the first frame to the last, by a straight line through all."""
    time = torch.arange(len(places), dtype=places.dtype) - (len(places) - 1) / 2
    return (time @ places / (time @ time)).item() * (len(places) - 1)


def direction_of(way_x: float, way_y: float) -> str:
    """Return the name of the direction of a way, x to the right and y down."""
    if abs(way_x) > abs(way_y):
        return "right" if way_x > 0 else "left"
    return "down" if way_y > 0 else "up"

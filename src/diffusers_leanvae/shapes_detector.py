"""What a clip of moving shapes shows, measured and not learned.

Only the names of shapes, colours and directions are shared with the renderer. The object is what has colour; its hue
says which one, angular moments say its shape, and the way of its centroid says its direction. Anything that is not
clearly one of the known things is `None`.
"""

import math
from typing import NamedTuple

import torch

from .shapes import class_label as label_of


_HUES = {"red": 0.0, "green": 120.0, "blue": 240.0}


class Detection(NamedTuple):
    r"""What was found, each `None` where nothing clear was; `class_label` only where all three were."""

    shape: str | None
    color: str | None
    direction: str | None
    class_label: int | None


def detect(video: torch.Tensor) -> Detection:
    r"""Find the shape, colour and direction of the one object of a clip.

    Args:
        video: Floating point, in `[-1, 1]` (what is beyond is clipped), shape `(3, num_frames, height, width)`.
    """
    if video.ndim != 4 or video.shape[0] != 3 or not video.is_floating_point():
        raise ValueError(
            "`video` must be floating point, of shape (3, num_frames, height, width), got "
            f"{str(video.dtype).removeprefix('torch.')} of shape {tuple(video.shape)}."
        )
    pixels = video.detach().double().cpu().clamp(-1, 1).add(1).div(2)
    chroma = pixels.amax(0) - pixels.amin(0)  # (num_frames, height, width)
    # The object covers more than a twentieth of a frame, so this quantile lies inside it.
    peak = torch.quantile(chroma.flatten(1), 0.97, dim=1)
    if peak.min() < 0.3:
        return Detection(None, None, None, None)
    weight = (2 * chroma / peak[:, None, None] - 0.5).clamp(0, 1)
    mass = weight.sum((1, 2))
    y = torch.arange(video.shape[2], dtype=weight.dtype)
    x = torch.arange(video.shape[3], dtype=weight.dtype)
    center_x = (weight.sum(1) @ x) / mass
    center_y = (weight.sum(2) @ y) / mass

    offsets = torch.complex((x - center_x[:, None])[:, None, :] + 0 * y[:, None], (y - center_y[:, None])[..., None] + 0 * x)
    shape = _shape(weight, mass, offsets)
    color = _color((pixels * weight).sum((1, 2, 3)) / mass.sum())
    direction = _direction(center_x, center_y, min(video.shape[2:]))
    if shape is None or color is None or direction is None:
        return Detection(shape, color, direction, None)
    return Detection(shape, color, direction, label_of(shape, color, direction))


def _shape(weight: torch.Tensor, mass: torch.Tensor, offsets: torch.Tensor) -> str | None:
    """By moments of `z = x + iy` about the centroid, the median over frames of each.

    `E|z|^2 / area` is 0.159 for a disc, 0.167 for a square, 0.192 for an equilateral triangle, and far more for what is in
    pieces. `E[z^3]` vanishes but for the triangle, `E[z^4]` does for the disc and is -0.6 (E|z|^2)^2 for the square.
    """

    def moment(power: int) -> torch.Tensor:
        return (weight * offsets**power).sum((1, 2)) / mass

    variance = (weight * offsets.abs().square()).sum((1, 2)) / mass
    spread = (variance / mass).median().item()
    third = (moment(3).imag / variance**1.5).median().item()
    fourth = (moment(4).real / variance**2).median().item()
    if spread > 0.23:
        return None
    if abs(third) > 0.25:
        return "triangle"
    return "square" if fourth < -0.3 else "circle"


def _color(mean: torch.Tensor) -> str | None:
    red, green, blue = mean.tolist()
    hue = math.degrees(math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    distances = {name: abs((hue - other + 180) % 360 - 180) for name, other in _HUES.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] <= 40 else None


def _direction(x: torch.Tensor, y: torch.Tensor, side: int) -> str | None:
    """From the ways that straight lines through the centroids take over the clip."""
    time = torch.arange(len(x), dtype=x.dtype) - (len(x) - 1) / 2
    if len(x) < 2:
        return None
    way_x, way_y = ((time @ position / (time @ time)).item() * (len(x) - 1) for position in (x, y))
    if max(abs(way_x), abs(way_y)) < 0.1 * side or min(abs(way_x), abs(way_y)) > 0.5 * max(abs(way_x), abs(way_y)):
        return None
    if abs(way_x) > abs(way_y):
        return "right" if way_x > 0 else "left"
    return "down" if way_y > 0 else "up"

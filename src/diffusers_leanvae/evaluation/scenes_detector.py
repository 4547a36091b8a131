"""A detector of everything a scene of two objects shows, measured and not learned.

Only the names of the properties and the bounds between their values are shared with the renderer. The background is a
plane fitted to the border of each frame, and objects are connected regions that differ from it. Colour comes from an
object's mean, shape from its angular moments, size from its area, direction and speed from the path of its centroid.
Whatever is not clearly one of the known values is `None`.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..data.scenes import SIZE_RANGES, WAY_RANGES, Scene
from .shapes_detector import direction_of, nearest_hue, straight_way, unit_video


_MIN_DISTANCE = 0.2  # of RGB in [0, 1], between an object and the background
_LARGER_DISTANCES = (0.3, 0.4)  # where blur joins two objects that are near each other
_HUES = {"red": 0.0, "yellow": 57.0, "blue": 225.0}
_GROUND_HUES = {"green": 130.0}
_SIZE_BOUND = (SIZE_RANGES["small"][1] + SIZE_RANGES["large"][0]) / 2
_WAY_BOUND = (WAY_RANGES["slow"][1] + WAY_RANGES["fast"][0]) / 2
_LONGEST_WAY = 1.4 * WAY_RANGES["fast"][1]


class ObjectDetection(NamedTuple):
    """The properties of an object, each `None` where it is not clear; names as of `scenes.SceneObject`."""

    shape: str | None
    color: str | None
    size: str | None
    direction: str | None
    speed: str | None


class SceneDetection(NamedTuple):
    """What a clip shows: the object above or to the left first; `None` for objects that are not there."""

    first: ObjectDetection | None
    second: ObjectDetection | None
    relation: str | None
    background: str | None


def detect_scene(video: torch.Tensor) -> SceneDetection:
    """Find the two objects of a clip and everything about them.

    Args:
        video: Floating point, in `[-1, 1]` (what is beyond is clipped), shape `(3, num_frames, height, width)`.
    """
    pixels = unit_video(video)
    ground, background = _fit_ground(pixels)
    tracks = _follow(pixels - ground)
    if tracks is None:
        return SceneDetection(None, None, None, background)
    side = min(video.shape[2:])
    found = [_measure(pixels, weight, side) for weight in tracks]
    (one, (x_one, y_one)), (other, (x_other, y_other)) = found
    away_x, away_y = x_other - x_one, y_other - y_one
    if max(abs(away_x), abs(away_y)) < 0.1 * side or 0.8 < abs(away_x / (away_y or 1e-9)) < 1.25:
        relation = None
    else:
        relation = "left of" if abs(away_x) > abs(away_y) else "above"
    # Where they lie diagonally both relations hold, and the order is that of the longer way.
    if (away_x if abs(away_x) > abs(away_y) else away_y) < 0:
        one, other = other, one
    return SceneDetection(one, other, relation, background)


def count_matches(scene: Scene, detection: SceneDetection, ignore: frozenset[str] = frozenset()) -> tuple[int, int]:
    """Count the objects of a scene whose properties were all found: of the first and second, in their places.

    Args:
        scene: What was asked for.
        detection: What was found.
        ignore: Properties that were not asked for, such as `"size"` and `"speed"`.

    Returns:
        1 or 0 for the first object, and for the second.
    """

    def agrees(item: object, found: ObjectDetection | None) -> int:
        return int(
            found is not None
            and all(getattr(item, name) == value for name, value in found._asdict().items() if name not in ignore)
        )

    return agrees(scene.first, detection.first), agrees(scene.second, detection.second)


def _fit_ground(pixels: torch.Tensor) -> tuple[torch.Tensor, str | None]:
    """Fit a plane to each frame's background, by ever fewer pixels; return it and the background's name."""
    height, width = pixels.shape[2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    basis = torch.stack([torch.ones_like(x), x, y])
    middle = pixels.flatten(2).median(dim=2).values[:, :, None, None]
    is_ground = ((pixels - middle).square().sum(0).sqrt() < 1.5 * _MIN_DISTANCE).float()
    plane = middle.expand_as(pixels)
    for _ in range(2):
        gram = torch.einsum("thw,ihw,jhw->tij", is_ground, basis, basis) + 1e-3 * torch.eye(3)
        values = torch.einsum("thw,ihw,cthw->tic", is_ground, basis, pixels)
        plane = torch.einsum("tic,ihw->cthw", torch.linalg.solve(gram, values), basis)
        is_ground = ((pixels - plane).square().sum(0).sqrt() < 0.5 * _MIN_DISTANCE).float()
    red, green, blue = plane.mean((1, 2, 3)).tolist()
    value, chroma = max(red, green, blue), max(red, green, blue) - min(red, green, blue)
    if chroma > 0.1:
        name = nearest_hue(plane.mean((1, 2, 3)), _GROUND_HUES, 35)
    else:
        name = "black" if value < 0.17 else "gray" if 0.25 < value < 0.55 else None
    return plane, name


def _follow(difference: torch.Tensor) -> list[torch.Tensor] | None:
    """Find the two objects in every frame: weights `(num_frames, height, width)` in `[0, 1]` of each, or `None`."""
    distance = difference.square().sum(0).sqrt()
    labels = _label(distance > _MIN_DISTANCE)
    tracks: list[list[torch.Tensor]] = [[], []]
    centers: list[tuple[float, float]] = []
    for frame, label in zip(distance, labels, strict=True):
        masks = _two_largest(label)
        for bound in _LARGER_DISTANCES:
            masks = masks or _two_largest(_label(frame[None] > bound)[0])
        if masks is None:
            return None
        # The rim belongs to an object as far as it differs from the background, relative to the object's inside.
        weights = []
        for mask in masks:
            near = F.max_pool2d(mask[None, None], 3, 1, 1)[0, 0]
            inside = (frame * mask).flatten().topk(max(1, int(mask.sum().item()) // 2)).values.median()
            weights.append((near * frame / inside).clamp(0, 1))
        found = [_center(weight) for weight in weights]
        if centers:  # the same two, by the shortest way
            straight = sum(math.dist(a, b) for a, b in zip(found, centers, strict=True))
            crossed = sum(math.dist(a, b) for a, b in zip(found[::-1], centers, strict=True))
            if crossed < straight:
                found, weights = found[::-1], weights[::-1]
        centers = found
        for track, weight in zip(tracks, weights, strict=True):
            track.append(weight)
    return [torch.stack(track) for track in tracks]


def _two_largest(label: torch.Tensor) -> list[torch.Tensor] | None:
    """Return the masks of the two largest regions of a frame; `None` if there is one only, or much besides them."""
    numbers, counts = label[label > 0].unique(return_counts=True)
    large = counts.argsort(descending=True)[:2]
    smallest = 0.002 * label.numel()
    if len(large) < 2 or counts[large[1]] < smallest or (counts.sum() - counts[large].sum()) > 0.3 * counts.sum():
        return None
    return [(label == numbers[place]).float() for place in large]


def _label(mask: torch.Tensor) -> torch.Tensor:
    """Number the connected regions of masks `(num_frames, height, width)`: pixels take the largest number around."""
    number = torch.arange(1, mask[0].numel() + 1, dtype=torch.float32).view(1, *mask.shape[1:])
    labels = number * mask
    while True:
        spread = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(spread, labels):
            return labels
        labels = spread


def _center(weight: torch.Tensor) -> tuple[float, float]:
    y = torch.arange(weight.shape[-2], dtype=weight.dtype)
    x = torch.arange(weight.shape[-1], dtype=weight.dtype)
    mass = weight.sum()
    return (weight.sum(-2) @ x / mass).item(), (weight.sum(-1) @ y / mass).item()


def _measure(pixels: torch.Tensor, weight: torch.Tensor, side: int) -> tuple[ObjectDetection, tuple[float, float]]:
    """Measure an object; also return its mean place."""
    path = torch.tensor([_center(frame) for frame in weight], dtype=torch.float64)
    mean_x, mean_y = path.mean(0).tolist()
    area = weight.sum((1, 2)).median().item()
    shape = _shape(weight, path)
    core = weight > 0.9
    mean = (pixels * core).sum((1, 2, 3)) / core.sum().clamp(min=1)
    direction, speed = _motion(path, side)
    extent = math.sqrt(area / (0.66 if shape == "triangle" else 0.785)) / side
    size = ("small" if extent < _SIZE_BOUND else "large") if 0.1 < extent < 0.38 else None
    return ObjectDetection(shape, _color(mean), size, direction, speed), (mean_x, mean_y)


def _shape(weight: torch.Tensor, path: torch.Tensor) -> str | None:
    """Find the shape by moments of `z = x + iy` about the centroid, the median over frames of each.

    `E[z^3]` vanishes but for the triangle, where it is 0.8 of `(E|z|^2)^1.5`. `E[z^4]` is 0.7 of `(E|z|^2)^2` for the
    cross, 0 for the circle and -0.6 for the square. Small shapes are blurred, and all of these smaller.
    """
    y = torch.arange(weight.shape[1], dtype=torch.float64)
    x = torch.arange(weight.shape[2], dtype=torch.float64)
    offset_x, offset_y = torch.broadcast_tensors((x - path[:, :1])[:, None, :], (y - path[:, 1:])[:, :, None])
    z, mass = torch.complex(offset_x, offset_y), weight.double().sum((1, 2))

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (weight * values).sum((1, 2)) / mass

    variance = mean(z.abs().square())
    third = (mean((z**3).imag) / variance**1.5).median().item()
    fourth = (mean((z**4).real) / variance**2).median().item()
    if (variance / mass).median().item() > 0.26:
        return None
    if abs(third) > 0.25:
        return "triangle"
    if fourth > 0.25:
        return "cross"
    return "circle" if fourth > -0.28 else "square"


def _color(mean: torch.Tensor) -> str | None:
    red, green, blue = mean.tolist()
    value, chroma = max(red, green, blue), max(red, green, blue) - min(red, green, blue)
    if chroma < 0.25:
        return "white" if value > 0.75 else None
    return nearest_hue(mean, _HUES, 28)


def _motion(path: torch.Tensor, side: int) -> tuple[str | None, str | None]:
    """Find direction and speed by fitting a straight line to the centroids of the clip."""
    if len(path) < 2:
        return None, None
    way_x, way_y = (straight_way(places) / side for places in path.unbind(1))
    longer, shorter = max(abs(way_x), abs(way_y)), min(abs(way_x), abs(way_y))
    if not 0.5 * WAY_RANGES["slow"][0] < longer < _LONGEST_WAY or shorter > 0.5 * longer:
        return None, None
    return direction_of(way_x, way_y), "slow" if longer < _WAY_BOUND else "fast"

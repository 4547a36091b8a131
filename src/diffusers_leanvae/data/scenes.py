"""Scenes of two moving objects: a procedural data set with captions in plain English, drawn when asked for.

A clip shows two objects, one above the other or side by side. Each has a shape, a colour, a size, a direction and a
speed of its own, and they move over a background of one colour. Every clip is a pure function of the seed, the index
and the size. Captions name all of it or a part, in one of several orders. `scenes_detector` judges what a clip shows.

A text-to-video model is trained on `MovingScenes(...)` and asked for what it never saw: `HELD_OUT` objects, whose
shapes, colours and directions are all known from other objects, appear only with `held_out=True`.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..checks import check_choice
from .drawing import EXTENTS, VELOCITIES, hsv_color, shape_coverage, straight_path, write_clips


SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "yellow", "blue", "white")
SIZES = ("small", "large")
DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slow", "fast")
RELATIONS = ("above", "left of")  # of the first object to the second
BACKGROUNDS = ("black", "gray", "green")

# Of the shorter side of a clip. The widest object on its longest way, 0.29 * 1.2 + 0.15, fits into half of that side.
SIZE_RANGES = {"small": (0.18, 0.2), "large": (0.27, 0.29)}
WAY_RANGES = {"slow": (0.04, 0.055), "fast": (0.12, 0.15)}  # over the whole clip, whatever its length
_FOREGROUNDS = {"red": (0.0, 0.85, 0.9), "yellow": (55.0, 0.85, 0.95), "blue": (225.0, 0.85, 0.95), "white": (0, 0, 1)}
_GROUNDS = {"black": (0.0, 0.0, 0.06), "gray": (0.0, 0.0, 0.4), "green": (130.0, 0.6, 0.35)}  # hue, saturation, value


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene; each field is one of the values above."""

    shape: str
    color: str
    size: str
    direction: str
    speed: str

    @property
    def look(self) -> tuple[str, str, str]:
        """Shape, colour and direction: what `HELD_OUT` lists."""
        return self.shape, self.color, self.direction


@dataclass(frozen=True)
class Scene:
    """What a clip shows: the first object is `relation` the second."""

    first: SceneObject
    second: SceneObject
    relation: str
    background: str

    def __post_init__(self) -> None:
        for item in (self.first, self.second):
            for name, legal in (
                ("shape", SHAPES),
                ("color", COLORS),
                ("size", SIZES),
                ("direction", DIRECTIONS),
                ("speed", SPEEDS),
            ):
                check_choice(name, getattr(item, name), legal)
        check_choice("relation", self.relation, RELATIONS)
        check_choice("background", self.background, BACKGROUNDS)


class ObjectLayout(NamedTuple):
    """Size of an object in pixels, its centres `(num_frames,)`, and its colour `(3,)` in `[0, 1]`."""

    extent_x: float
    extent_y: float
    x: np.ndarray
    y: np.ndarray
    color: np.ndarray


class SceneLayout(NamedTuple):
    """All that is random about the pixels of a scene: its objects, the background's mean colour, and its ramp."""

    ground: np.ndarray
    angle: float
    objects: list[ObjectLayout]


class ScenesItem(NamedTuple):
    """`pixels` are float32 in `[-1, 1]`, `(3, num_frames, height, width)`; PyTorch collates batches of it."""

    pixels: torch.Tensor
    caption: str


def _choose_held_out() -> frozenset[tuple[str, str, str]]:
    """Choose eight of the 64 looks, such that each shape, colour and direction is in two of them."""
    rng = np.random.default_rng(20261126)
    looks = []
    for _ in range(2):
        colors, directions = rng.permutation(COLORS), rng.permutation(DIRECTIONS)
        looks += [(shape, str(colors[i]), str(directions[i])) for i, shape in enumerate(SHAPES)]
    return frozenset(looks)


HELD_OUT = _choose_held_out()
_KNOWN: list[tuple[str, str, str]] = [
    look for look in itertools.product(SHAPES, COLORS, DIRECTIONS) if look not in HELD_OUT
]


def draw_scene(
    scene: Scene, num_frames: int = 17, height: int = 64, width: int = 64, seed: int = 0, index: int = 0
) -> torch.Tensor:
    """Draw a scene.

    Args:
        scene: What to show.
        num_frames: Any number from 1; the way over the whole clip depends on the speed alone.
        height, width: Any size from 48.
        seed, index: Positions, exact sizes, ways and shades depend on these.

    Returns:
        Float32 in `[-1, 1]`, shape `(3, num_frames, height, width)`.
    """
    if num_frames < 1:
        raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
    if min(height, width) < 48:
        raise ValueError(f"`height` and `width` must be at least 48, got {height} and {width}.")
    layout = lay_out_scene(scene, num_frames, height, width, seed, index)
    ground = _paint_ground(layout, height, width)
    pixels = np.broadcast_to(ground[:, None], (3, num_frames, height, width))
    for item, place in zip((scene.first, scene.second), layout.objects, strict=True):
        coverage = shape_coverage(item.shape, place.extent_x, place.extent_y, place.x, place.y, height, width)
        pixels = pixels + coverage * (place.color[:, None, None, None] - pixels)
    return torch.from_numpy(pixels.astype(np.float32)).mul_(2.0).sub_(1.0)


def lay_out_scene(scene: Scene, num_frames: int, height: int, width: int, seed: int, index: int) -> SceneLayout:
    """Draw at random what a scene leaves open: positions, exact sizes, ways, shades; arguments as of `draw_scene`."""
    rng = np.random.default_rng([seed, index, 1])
    side = min(height, width)
    ways = [_draw_way(rng, item, side) for item in (scene.first, scene.second)]
    # Until nobody could say that the other relation holds; one try in three does.
    while True:
        paths = [_place(rng, way, place, scene.relation, num_frames, height, width) for place, way in enumerate(ways)]
        away_x, away_y = (abs(float(np.mean(paths[1][axis]) - np.mean(paths[0][axis]))) for axis in (0, 1))
        near, far = (away_x, away_y) if scene.relation == "above" else (away_y, away_x)
        if near < 0.6 * far:
            break
    hue, saturation, value = _GROUNDS[scene.background]
    ground = hsv_color(hue + rng.uniform(-6, 6), saturation, value * rng.uniform(0.9, 1.1))
    angle = rng.uniform(0, 2 * np.pi)
    objects = []
    for item, way, (x, y) in zip((scene.first, scene.second), ways, paths, strict=True):
        hue, saturation, value = _FOREGROUNDS[item.color]
        color = hsv_color(hue + rng.uniform(-6, 6), saturation, value * rng.uniform(0.94, 1))
        objects.append(ObjectLayout(way.extent_x, way.extent_y, x, y, color))
    return SceneLayout(ground, angle, objects)


def describe_scene(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene in a sentence or two, which name both objects, and size, speed and background or not."""
    names_size, names_speed, names_ground = rng.random(3) < (0.75, 0.75, 0.6)
    swapped = rng.random() < 0.5
    one, other = (scene.second, scene.first) if swapped else (scene.first, scene.second)
    between = _BETWEEN[scene.relation][int(swapped)]
    ground = f"a {scene.background} background"
    form = int(rng.integers(4))
    noun_one, noun_other = (_noun(item, bool(names_size)) for item in (one, other))
    if form == 0:  # a red circle moves left above a blue square moving down
        text = f"{noun_one} {_verb(one, names_speed, rng)} {_pick(rng, between)} {noun_other} "
        text += _participle(other, names_speed, rng)
    elif form == 1:  # a red circle moving left, above a blue square that moves down
        text = f"{noun_one} {_participle(one, names_speed, rng)}, {_pick(rng, between)} {noun_other} that "
        text += _verb(other, names_speed, rng)
    elif form == 2:  # above a blue square moving down, a red circle moves left
        text = f"{_pick(rng, between)} {noun_other} {_participle(other, names_speed, rng)}, {noun_one} "
        text += _verb(one, names_speed, rng)
    else:  # a red circle moves left. it is above a blue square, which moves down
        text = f"{noun_one} {_verb(one, names_speed, rng)}. It is {_pick(rng, between)} {noun_other}, which "
        text += _verb(other, names_speed, rng)
    if names_ground:
        text = f"on {ground}, {text}" if form != 3 and rng.random() < 0.4 else f"{text}, on {ground}"
    return text[0].upper() + text[1:] + "." if rng.random() < 0.5 else text


_BETWEEN = {
    "above": (("above", "over"), ("below", "under")),
    "left of": (("to the left of",), ("to the right of",)),
}
_VERBS = (("moves", "moving"), ("goes", "going"), ("travels", "travelling"))
_ADVERBS = {"slow": ("slowly",), "fast": ("quickly", "fast")}


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _noun(item: SceneObject, names_size: bool) -> str:
    return f"a {item.size} {item.color} {item.shape}" if names_size else f"a {item.color} {item.shape}"


def _verb(item: SceneObject, names_speed: bool, rng: np.random.Generator, form: int = 0) -> str:
    verb = _VERBS[int(rng.integers(len(_VERBS)))][form]
    direction = item.direction
    if direction in ("left", "right") and rng.random() < 0.3:
        direction = f"to the {direction}"
    if not names_speed:
        return f"{verb} {direction}"
    adverb = _pick(rng, _ADVERBS[item.speed])
    comes_first = adverb != "fast" and rng.random() < 0.3
    return f"{adverb} {verb} {direction}" if comes_first else f"{verb} {direction} {adverb}"


def _participle(item: SceneObject, names_speed: bool, rng: np.random.Generator) -> str:
    return _verb(item, names_speed, rng, form=1)


class MovingScenes(Dataset[ScenesItem]):
    """Scenes of two objects; every clip is another scene, drawn at random.

    Args:
        num_frames, height, width, seed: As of `draw_scene`.
        num_clips: How many clips an epoch has.
        num_captions: How many ways of describing it a clip comes with, see `captions`.
        held_out: `False`: no object is one of `HELD_OUT`. `True`: at least one is.
    """

    class_names = None

    def __init__(
        self,
        num_frames: int = 17,
        height: int = 64,
        width: int = 64,
        seed: int = 0,
        num_clips: int = 10_000,
        *,
        num_captions: int = 1,
        held_out: bool = False,
    ) -> None:
        for name, value in (("num_clips", num_clips), ("num_captions", num_captions)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.num_frames, self.height, self.width = num_frames, height, width
        self.seed, self.num_clips, self.held_out = seed, num_clips, held_out
        self.num_captions = num_captions
        draw_scene(self.scene(0), min(num_frames, 1), height, width)  # refuses what cannot be drawn

    def __len__(self) -> int:
        return self.num_clips

    def scene(self, index: int) -> Scene:
        """The scene of a clip, without drawing it."""
        rng = np.random.default_rng([self.seed, index, 0])
        looks = [_KNOWN, _KNOWN]
        if self.held_out:
            looks[int(rng.integers(2))] = sorted(HELD_OUT)
        items = []
        for choices in looks:
            shape, color, direction = choices[int(rng.integers(len(choices)))]
            items.append(SceneObject(shape, color, _pick(rng, SIZES), direction, _pick(rng, SPEEDS)))
        return Scene(items[0], items[1], _pick(rng, RELATIONS), _pick(rng, BACKGROUNDS))

    def captions(self, index: int, count: int | None = None) -> list[str]:
        """Describe a clip in `count` ways, by default `num_captions`, of which some may be equal.

        The first ones do not depend on how many are asked for.
        """
        rng = np.random.default_rng([self.seed, index, 2])
        scene = self.scene(index)
        return [describe_scene(scene, rng) for _ in range(count or self.num_captions)]

    def __getitem__(self, index: int) -> ScenesItem:
        if not 0 <= index < self.num_clips:
            raise IndexError(f"`index` must be from 0 to {self.num_clips - 1}, got {index}.")
        pixels = draw_scene(self.scene(index), self.num_frames, self.height, self.width, self.seed, index)
        return ScenesItem(pixels, self.captions(index, 1)[0])


def write_scenes(
    folder: str | Path, clips: MovingScenes, num_captions: int = 1, fps: int = 8, crf: float = 12
) -> None:
    """Write clips as a video folder: `000000.mp4` and so on, and `metadata.jsonl` with `caption`, or `captions`.

    Existing files are kept, so that a killed call resumes where it stopped.
    """
    captions = [clips.captions(index, num_captions) for index in range(len(clips))]
    rows = [{"caption": texts[0]} if num_captions == 1 else {"captions": texts} for texts in captions]
    write_clips(folder, rows, lambda index: clips[index].pixels, fps, crf)


class _Way(NamedTuple):
    """Size of an object in pixels, and how far it moves from the first frame to the last."""

    extent_x: float
    extent_y: float
    way_x: float
    way_y: float


def _draw_way(rng: np.random.Generator, item: SceneObject, side: int) -> _Way:
    size, way = rng.uniform(*SIZE_RANGES[item.size]) * side, rng.uniform(*WAY_RANGES[item.speed]) * side
    (wide, high), (toward_x, toward_y) = EXTENTS[item.shape], VELOCITIES[item.direction]
    return _Way(size * wide, size * high, way * toward_x, way * toward_y)


def _place(
    rng: np.random.Generator, way: _Way, place: int, relation: str, num_frames: int, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the path of an object, `x` and `y` of its centres, within its half: so none ever hides the other."""
    is_above = relation == "above"
    half_height, half_width = (height / 2, width) if is_above else (height, width / 2)
    x = straight_path(rng, way.extent_x, way.way_x, half_width, num_frames)
    y = straight_path(rng, way.extent_y, way.way_y, half_height, num_frames)
    return x + place * (width - half_width), y + place * (height - half_height)


def _paint_ground(layout: SceneLayout, height: int, width: int) -> np.ndarray:
    """Paint a background `(3, height, width)`: one colour, somewhat brighter towards a random side."""
    ramp_y = np.linspace(-1, 1, height)[:, None] * np.sin(layout.angle)
    ramp_x = np.linspace(-1, 1, width)[None] * np.cos(layout.angle)
    return layout.ground[:, None, None] * (1 + 0.1 * (ramp_y + ramp_x))

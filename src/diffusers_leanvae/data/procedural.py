"""Procedural footage: clips of what small autoencoders fail at, drawn when asked for, to be mixed into training data.

About half of the clips are readouts: digits, mostly on a plate, that are others in most frames, which a few numbers
for four frames must tell apart. The others are one shot, or two with a cut or a dissolve between them. A shot has a
background (a flat colour, a gradient, a checkerboard, or patches of saturated colours, a texture or a page of text
under a moving camera) and up to two things in front (thin lines, a counter, words, a shape); fades and grain come on
top.
"""

import math
import string
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .cutting import Size
from .drawing import EXTENTS, hsv_color, shape_coverage, straight_path


READOUT_SHARE = 0.55  # of the clips
_LETTERS = np.array(list(string.ascii_letters + string.digits + "&?!%#"))


class Shot(NamedTuple):
    """A key of `BACKGROUNDS`, keys of `OVERLAYS` from back to front, and whether a readout is in front of them."""

    background: str
    overlays: tuple[str, ...] = ()
    has_readout: bool = False


class Footage(NamedTuple):
    """What a clip shows: one shot without a `change`, or two with one."""

    shots: tuple[Shot, ...]
    change: Literal["cut", "dissolve"] | None = None
    has_fade: bool = False
    has_grain: bool = False


def draw_footage(size: Size, seed: int = 0, index: int = 0) -> torch.Tensor:
    """Draw a clip of procedural footage.

    Args:
        size: Frames, height and width; any numbers from 1.
        seed, index: What is shown depends on these.

    Returns:
        Pixels, uint8, shape `(3, num_frames, height, width)`.
    """
    if min(size) < 1:
        raise ValueError(f"`size` must be three numbers from 1, got {tuple(size)}.")
    rng = np.random.default_rng([seed, 6, index])
    return compose(plan_footage(rng, size[0]), rng, size)


def plan_footage(rng: np.random.Generator, num_frames: int) -> Footage:
    """Draw what a clip shows; an image has no changes."""
    if rng.random() < READOUT_SHARE:
        shot = Shot(str(rng.choice(list(BACKGROUNDS))), has_readout=True)
        return Footage((shot,), has_grain=bool(rng.random() < 0.2))
    change: Literal["cut", "dissolve"] | None = None
    drawn = rng.random()
    if num_frames > 1 and drawn < 0.4:
        change = "cut" if drawn < 0.3 else "dissolve"
    shots = []
    for _ in range(1 if change is None else 2):
        overlays = rng.permutation(list(OVERLAYS))[: rng.choice(3, p=(0.3, 0.45, 0.25))]
        shots.append(Shot(str(rng.choice(list(BACKGROUNDS))), tuple(map(str, overlays))))
    has_fade, has_grain = rng.random(2) < (0.2 * (num_frames > 1), 0.3)
    return Footage(tuple(shots), change, bool(has_fade), bool(has_grain))


def compose(footage: Footage, rng: np.random.Generator, size: Size) -> torch.Tensor:
    """Draw what a plan says; the result is that of `draw_footage`, and what the plan leaves open is random."""
    num_frames, height, width = size
    if footage.change == "cut":
        cut = int(rng.integers(1, num_frames))
        lengths = (cut, num_frames - cut)
        parts = [
            draw_shot(shot, rng, (length, height, width)) for shot, length in zip(footage.shots, lengths, strict=True)
        ]
        levels = np.concatenate(parts, axis=1)
    else:
        levels = draw_shot(footage.shots[0], rng, size)
        if footage.change == "dissolve":
            length = int(rng.integers(2, num_frames + 1))
            start = int(rng.integers(num_frames - length + 1))
            ramp = np.clip((np.arange(num_frames) - start) / (length - 1), 0, 1).astype(np.float32)
            levels += ramp[:, None, None] * (draw_shot(footage.shots[1], rng, size) - levels)
    if footage.has_fade:  # slow ones too, that end on the way
        start, end = rng.uniform(0, 1, 2).tolist()
        ramp = np.linspace(start, end, num_frames, dtype=np.float32)[:, None, None]
        levels += ramp * (_colors(rng, 1)[0][:, None, None, None] - levels)
    if footage.has_grain:
        grain = rng.standard_normal((int(rng.choice((1, 3))), *size), dtype=np.float32)
        levels += float(np.exp(rng.uniform(0, 3.4))) * grain  # a deviation of 1 to 30 levels
    return torch.from_numpy(np.rint(np.clip(levels, 0, 255, out=levels), out=levels).astype(np.uint8))


def draw_shot(shot: Shot, rng: np.random.Generator, size: Size) -> np.ndarray:
    """Draw a shot: float32 levels from 0 to 255, `(3, num_frames, height, width)`."""
    levels = np.empty((3, *size), np.float32)
    levels[:] = BACKGROUNDS[shot.background](rng, size)
    for name in shot.overlays:
        _paint(levels, OVERLAYS[name](rng, size), _colors(rng, 1)[0])
    if shot.has_readout:
        _add_readout(levels, rng)
    return levels


def _paint(levels: np.ndarray, coverage: np.ndarray, color: np.ndarray) -> None:
    """Lay a colour over levels, in place."""
    for channel, level in zip(levels, color, strict=True):
        channel += coverage * (level - channel)


# --- Backgrounds: levels that broadcast to `(3, num_frames, height, width)` ------------------------------------------


def _draw_flat(rng: np.random.Generator, size: Size) -> np.ndarray:
    return _colors(rng, 1)[0][:, None, None, None]


def _draw_gradient(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Two colours and all between them, in a direction that stays or turns."""
    turn = rng.uniform(-2, 2) * (rng.random() < 0.5)
    angle = (rng.uniform(0, 2 * math.pi) + turn * _unit_time(size[0])).astype(np.float32)[:, None, None]
    sin, cos = np.sin(angle), np.cos(angle)
    y, x = (np.linspace(-0.5, 0.5, edge, dtype=np.float32) for edge in size[1:])
    ramp = (y[:, None] * sin + x * cos) / (abs(sin) + abs(cos)) + 0.5
    return _mix(_colors(rng, 2), ramp[None])


def _draw_checkerboard(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Cells of 1 to 16 pixels, which stand still or move by parts of a pixel; the average over each pixel is exact."""
    cell, moves = int(rng.integers(1, 17)), rng.random() < 0.5
    waves = []
    for edge in size[1:]:
        places = rng.integers(2 * cell) + moves * rng.uniform(-1.5, 1.5) * np.arange(size[0])
        places = (places[:, None] + np.arange(edge + 1)) % (2 * cell)
        waves.append(np.diff(-abs(places - cell)).astype(np.float32))  # its integral is a wave of triangles
    share = 0.5 + 0.5 * waves[0][:, :, None] * waves[1][:, None]
    return _mix(_colors(rng, 2), share[None])


def _draw_patches(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Rectangles of saturated colours next to each other."""
    height, width = _picture_size(size)
    labels = np.zeros((height, width), np.int64)
    for axis, edge in enumerate((height, width)):
        count = int(rng.integers(2, 7))
        bounds = np.sort(rng.integers(0, edge, count))
        stripe = np.searchsorted(bounds, np.arange(edge), side="right") * (axis * 6 + 1)
        labels += stripe[:, None] if axis == 0 else stripe
    palette = _colors(rng, 8)[rng.integers(8, size=int(labels.max()) + 1)]
    return film(rng, np.moveaxis(palette[labels], 2, 0), size)


def _draw_texture(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Noise of several sizes, soft like clouds or hard like blots, of two colours or of many."""
    height, width = _picture_size(size)
    noise = np.zeros((int(rng.choice((1, 3))), height, width), np.float32)
    roughness = rng.uniform(0.4, 1.0)
    for octave in range(1, 6):
        cell = 2**octave
        coarse = rng.standard_normal((len(noise), height // cell + 2, width // cell + 2), np.float32)
        noise += roughness ** (5 - octave) * _enlarge(_enlarge(coarse, cell, height, 1), cell, width, 2)
    gain = float(np.exp(rng.uniform(-1.6, 1.0)))
    return film(rng, _mix(_colors(rng, 2), np.clip(0.5 + gain * noise, 0, 1)), size)


def _draw_page(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Lines of small letters."""
    height, width = _picture_size(size)
    font_size = int(rng.integers(7, 20))
    num_lines, num_letters = 1 + height // font_size, 1 + 2 * width // font_size
    text = "\n".join(_random_word(rng, num_letters, gaps=0.2) for _ in range(num_lines))
    return film(rng, _mix(_colors(rng, 2), _write(text, 1, 0, font_size, height, width)[None]), size)


BACKGROUNDS: dict[str, Callable[[np.random.Generator, Size], np.ndarray]] = {
    "flat": _draw_flat,
    "gradient": _draw_gradient,
    "checkerboard": _draw_checkerboard,
    "patches": _draw_patches,
    "texture": _draw_texture,
    "page": _draw_page,
}


# --- Overlays: the covered share of every pixel, `(num_frames, height, width)` ---------------------------------------


def _cover_lines(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Thin lines and rings, which move, turn and grow."""
    side = min(size[1:])
    time = _unit_time(size[0])[:, None, None]
    y, x = np.arange(size[1], dtype=np.float32)[:, None] - size[1] / 2, np.arange(size[2]) - np.float32(size[2] / 2)
    coverage = np.zeros(size, np.float32)
    for _ in range(int(rng.integers(1, 6))):
        place, way = rng.uniform(-0.5, 0.5, (2, 2)) * side
        if rng.random() < 0.7:
            angle = (rng.uniform(0, math.pi) + rng.uniform(-0.5, 0.5) * time).astype(np.float32)
            distance = (y * np.sin(angle) - (place[0] + way[0] * time).astype(np.float32)) + x * np.cos(angle)
        else:
            center_y, center_x = ((place[axis] + way[axis] * time).astype(np.float32) for axis in (0, 1))
            radius = np.float32(rng.uniform(0.05, 0.4) * side)
            distance = np.sqrt((y - center_y) ** 2 + (x - center_x) ** 2) - radius
        half_width = np.float32(rng.uniform(0.5, 1.5))
        distance = np.subtract(half_width + 0.5, np.abs(distance, out=distance), out=distance)
        np.maximum(coverage, np.clip(distance, 0, 1, out=distance), out=coverage)
    return coverage


def _cover_counter(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Digits that count, at any place in a group of frames and more than once in it."""
    num_digits, hold = int(rng.integers(1, 6)), int(rng.integers(1, 7))
    return _show(rng, _hold(rng, lambda count: _count(rng, num_digits, (-1, 1, 7), count), hold, size[0]), size)


def _cover_words(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Letters that run along by parts of a pixel, or are others after some frames."""
    num_frames, height, width = size
    if rng.random() < 0.5:
        font_size = _font_size(rng, size)
        text, y = _random_word(rng, 20, gaps=0.15), rng.uniform(0, max(1, height - font_size))
        free = width - _load_font(font_size).getlength(text)  # in its middle place, no more of it is outside than must
        places = rng.uniform(min(0, free), max(0, free)) + rng.uniform(-1, 1) * width * (_unit_time(num_frames) - 0.5)
        return np.stack([_write(text, x, y, font_size, height, width) for x in places])
    hold, length = int(rng.integers(1, 7)), int(rng.integers(1, 8))
    words = _hold(rng, lambda count: [_random_word(rng, length) for _ in range(count)], hold, num_frames)
    return _show(rng, words, size)


def _cover_shape(rng: np.random.Generator, size: Size) -> np.ndarray:
    """A shape on a straight path."""
    num_frames, height, width = size
    shape, side = str(rng.choice(list(EXTENTS))), min(height, width)
    extent_x, extent_y = (rng.uniform(0.1, 0.4) * side * extent for extent in EXTENTS[shape])
    way_y, way_x = rng.uniform(-0.5, 0.5, 2) * side
    x = straight_path(rng, extent_x, way_x, width, num_frames)
    y = straight_path(rng, extent_y, way_y, height, num_frames)
    return shape_coverage(shape, extent_x, extent_y, x, y, height, width)


OVERLAYS: dict[str, Callable[[np.random.Generator, Size], np.ndarray]] = {
    "lines": _cover_lines,
    "counter": _cover_counter,
    "words": _cover_words,
    "shape": _cover_shape,
}


# --- Readouts --------------------------------------------------------------------------------------------------------


def _add_readout(levels: np.ndarray, rng: np.random.Generator) -> None:
    """Put digits that change, mostly with every frame, and some letters that stay in front of levels, in place.

    They are thin or bold, sharp or soft, and mostly on a plate.
    """
    num_frames, height, width = levels.shape[1:]
    hold = int(rng.choice((1, 2, 3), p=(0.6, 0.2, 0.2)))
    texts = _hold(rng, lambda count: _readings(rng, count), hold, num_frames)
    font_size = max(7, round(min(height, width) * rng.uniform(0.2, 0.7)))
    stroke_width = font_size * rng.uniform(0, 0.06) if rng.random() < 0.7 else 0.0
    blur_radius = rng.uniform(0, 0.8) if rng.random() < 0.6 else 0.0
    length = _load_font(font_size).getlength(texts[0])
    x, y = (
        rng.uniform(min(0, room - extent), max(1, room - extent))
        for room, extent in ((width, length), (height, font_size))
    )
    ink, plate = _colors(rng, 2)
    if rng.random() < 0.5:
        ink, plate = (np.full(3, level, np.float32) for level in rng.permutation((0, 255)))
    if rng.random() < 0.7:
        margin = font_size * rng.uniform(0.05, 0.4)
        bounds = (y - margin, y + 1.1 * font_size + margin), (x - margin, x + length + margin)
        rows, columns = (slice(max(0, round(first)), max(0, round(last))) for first, last in bounds)
        levels[:, :, rows, columns] = plate[:, None, None, None]
    coverage = _write_each(texts, lambda text: _write(text, x, y, font_size, height, width, stroke_width, blur_radius))
    _paint(levels, coverage, ink)


def _readings(rng: np.random.Generator, count: int) -> list[str]:
    """Readings of a counter, or numbers of as many digits without an order, with what stands around them."""
    num_digits, place = int(rng.integers(1, 6)), int(rng.integers(3))
    if rng.random() < 0.6:
        numbers = _count(rng, num_digits, (-1, 1, 7, 31), count)
    else:
        numbers = ["".join(map(str, rng.integers(0, 10, num_digits))) for _ in range(count)]
    mark, end = str(rng.choice(("", "", ".", ":"))), str(rng.choice(("", ".000", "%", " s")))
    return [number[:place] + mark + number[place:] + end for number in numbers]


# --- Colours, cameras and letters ------------------------------------------------------------------------------------


def _pure_colors(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw up to eight different colours `(count, 3)` whose channels are 0 or 255."""
    return 255 * (rng.permutation(8)[:count, None] >> np.arange(3) & 1).astype(np.float32)


def _colors(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw different colours `(count, 3)`, in two of three cases pure ones and else saturated ones of any hue."""
    if rng.random() < 2 / 3:
        return _pure_colors(rng, count)
    hues = rng.uniform(0, 360) + np.arange(count) * rng.uniform(40, 180)
    colors = [hsv_color(hue, rng.uniform(0.7, 1), rng.uniform(0.3, 1)) for hue in hues]
    return 255 * np.stack(colors).astype(np.float32)


def _mix(colors: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Blend two colours `(2, 3)` to levels `(3, ...)`, by the share of the second in each channel, `(1 or 3, ...)`."""
    first, second = colors.reshape(2, 3, *[1] * (share.ndim - 1))
    return first + share * (second - first)


def _unit_time(num_frames: int) -> np.ndarray:
    """Places of the frames from 0 to 1: motion over the whole clip is the same whatever its length."""
    return np.linspace(0, 1, num_frames, dtype=np.float32)


def _picture_size(size: Size) -> tuple[int, int]:
    """Height and width of a picture that a camera moves over."""
    return size[1] * 3 // 2, size[2] * 3 // 2


def _enlarge(x: np.ndarray, cell: int, length: int, axis: int) -> np.ndarray:
    """Interpolate along an axis: each value of `x` is `cell` places from the next."""
    whole, rest = divmod(np.arange(length), cell)
    shape = [1] * x.ndim
    shape[axis] = length
    first, second = x.take(whole, axis), x.take(whole + 1, axis)
    return first + (rest / np.float32(cell)).astype(np.float32).reshape(shape) * (second - first)


def film(rng: np.random.Generator, picture: np.ndarray, size: Size) -> np.ndarray:
    """Film a picture `(3, height, width)` with a camera that pans, zooms and turns, by parts of a pixel, or stands.

    It never shrinks the picture, which would need a filter, and sees it mirrored beyond its borders.
    """
    num_frames, height, width = size
    pans, zooms, turns = rng.random(3) < 0.4
    if num_frames == 1 or not (pans or zooms or turns):
        return picture[:, None, :height, :width]
    time = torch.from_numpy(_unit_time(num_frames))[:, None, None] - 0.5
    way_y, way_x = (pans * rng.uniform(-0.5, 0.5, 2) * (height, width)).tolist()
    near, far = (zooms * rng.uniform(-1, 0, 2)).tolist()
    angle = turns * rng.uniform(-1.2, 1.2) * time
    scale = (near + (far - near) * (time + 0.5)).exp()
    y = torch.arange(height)[:, None] + 0.5 - height / 2
    x = torch.arange(width) + 0.5 - width / 2
    sin, cos = scale * angle.sin(), scale * angle.cos()
    places = torch.stack((x * cos - y * sin + way_x * time, x * sin + y * cos + way_y * time), dim=3)
    places *= 2 / torch.tensor(picture.shape[:0:-1])  # from -1 to 1 over the picture, x first
    pictures = torch.from_numpy(np.ascontiguousarray(picture)).expand(num_frames, -1, -1, -1)
    filmed = F.grid_sample(pictures, places, padding_mode="reflection", align_corners=False)
    return filmed.transpose(0, 1).numpy()


@lru_cache
def _load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _font_size(rng: np.random.Generator, size: Size) -> int:
    return max(6, round(min(size[1:]) * rng.uniform(0.12, 0.5)))


def _random_word(rng: np.random.Generator, length: int, gaps: float = 0.0) -> str:
    """Draw letters, a share of which are spaces."""
    letters = rng.choice(_LETTERS, length)
    return "".join(np.where(rng.random(length) < gaps, " ", letters))


def _count(rng: np.random.Generator, num_digits: int, paces: tuple[int, ...], count: int) -> list[str]:
    """Numbers from any one on, at one of the paces, with leading zeros."""
    start, pace = int(rng.integers(10**num_digits)), int(rng.choice(paces))
    return [f"{(start + pace * index) % 10**num_digits:0{num_digits}d}" for index in range(count)]


def _hold(rng: np.random.Generator, texts: Callable[[int], list[str]], hold: int, num_frames: int) -> list[str]:
    """A text for each frame, of those that `texts` gives for a count, each for `hold` frames or, at an end, fewer."""
    phase = int(rng.integers(hold))
    shown = texts((num_frames + phase - 1) // hold + 1)
    return [shown[(frame + phase) // hold] for frame in range(num_frames)]


def _write(
    text: str,
    x: float,
    y: float,
    font_size: int,
    height: int,
    width: int,
    stroke_width: float = 0.0,
    blur_radius: float = 0.0,
) -> np.ndarray:
    """The share of every pixel `(height, width)` that letters cover, their left upper corner at `(x, y)` in pixels."""
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).text((x, y), text, fill=255, font=_load_font(font_size), stroke_width=stroke_width)
    if blur_radius > 0:
        image = image.filter(ImageFilter.GaussianBlur(blur_radius))
    return np.asarray(image, np.float32) / 255


def _write_each(texts: list[str], write: Callable[[str], np.ndarray]) -> np.ndarray:
    """What each frame's text covers, `(num_frames, height, width)`; `write` gives that of one, `(height, width)`."""
    written = {text: write(text) for text in set(texts)}
    return np.stack([written[text] for text in texts])


def _show(rng: np.random.Generator, texts: list[str], size: Size) -> np.ndarray:
    """Show one text in each frame, all at one place such that, if it is small enough, the first is inside."""
    _, height, width = size
    font_size = _font_size(rng, size)
    x = rng.uniform(0, max(1, width - _load_font(font_size).getlength(texts[0])))
    y = rng.uniform(0, max(1, height - font_size))
    return _write_each(texts, lambda text: _write(text, x, y, font_size, height, width))

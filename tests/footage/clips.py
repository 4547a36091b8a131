"""Small clips that are known in every pixel, frame and sample, made by PyAV alone.

A picture is 6 x 4 patches of 16 x 16 pixels: greys, primaries, skin, and in the last row the number of the frame, one
bit a patch, and a patch that flashes. A flash comes with a click in the sound. Planes are filled with the codes that
the matrix gives, rounded once, and not by a scaler: what a reader should make of them is known as a float.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


PATCH, NUM_COLUMNS, NUM_ROWS = 16, 6, 4
WIDTH, HEIGHT = NUM_COLUMNS * PATCH, NUM_ROWS * PATCH
INSET = 4  # pixels next to another patch, where chroma of less than full resolution may mix
FLASH_EVERY, FIRST_FLASH = 8, 4
CLICK_SECONDS = 0.005
VARIABLE_TICKS = (0, 1, 2, 5, 6, 9, 10, 11, 12, 16, 17, 18, 20, 21, 22, 25, 26, 27, 28, 33, 34, 35, 36, 37)

GREYS = [(level,) * 3 for level in (0, 51, 102, 153, 204, 255)]
PRIMARIES = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255), (255, 0, 255), (255, 255, 0)]
SKIN = [(255, 224, 196), (224, 172, 105), (141, 85, 36), (66, 36, 20), (96, 128, 64), (30, 60, 120)]

# Weights of red and blue in luma; AVColorSpace, primaries and transfer.
MATRICES = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
TAGS = {"bt601": (6, 6, 6), "bt709": (1, 1, 1), "bt2020": (9, 1, 1)}
WIDE_GAMUT = (9, 14)  # primaries and transfer of BT.2020
# Chromaticities of red, green, blue and white.
CHROMATICITIES = {
    "bt709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), (0.3127, 0.3290)),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), (0.3127, 0.3290)),
}


@dataclass(frozen=True)
class Footage:
    """A kind of clip.

    Attributes:
        extension: Of the file; it chooses the container.
        codec: FFmpeg's encoder.
        pixel_format: FFmpeg's name.
        rate: Frames per second.
        is_variable: Whether frames are shown for 1 to 5 ticks of `1 / rate`, as `VARIABLE_TICKS` says.
        sound: FFmpeg's encoder of the sound track, or `None`.
        matrix: Of the codes: a key of `MATRICES`.
        is_full_range: Whether codes fill their whole range.
        is_tagged: Whether matrix and range are written into the file.
        is_wide: Whether colours are tagged as those of BT.2020's primaries.
        num_frames: Length.
        size: Width and height; the patches are in the corner at the top left.
        scale: How many times larger patches are.
        options: For the encoder.
        sample_rate: Of the sound.
    """

    extension: str
    codec: str
    pixel_format: str
    rate: Fraction = Fraction(25)
    is_variable: bool = False
    sound: str | None = None
    matrix: str = "bt601"
    is_full_range: bool = False
    is_tagged: bool = False
    is_wide: bool = False
    num_frames: int = 20
    size: tuple[int, int] = (WIDTH, HEIGHT)
    scale: int = 1
    options: tuple[tuple[str, str], ...] = ()
    sample_rate: int = 48000

    @property
    def ticks(self) -> list[int]:
        """Time of each frame in ticks of `1 / rate`."""
        return list(VARIABLE_TICKS[: self.num_frames] if self.is_variable else range(self.num_frames))

    @property
    def times(self) -> list[Fraction]:
        """Time of each frame in seconds."""
        return [tick / self.rate for tick in self.ticks]

    @property
    def duration(self) -> Fraction:
        """Seconds from the first frame to the end of the last."""
        return (self.ticks[-1] + 1) / self.rate

    @property
    def flashes(self) -> list[int]:
        """Indices of the frames that flash."""
        return list(range(FIRST_FLASH, self.num_frames, FLASH_EVERY))

    @property
    def is_rgb(self) -> bool:
        """Whether pixels are stored as red, green and blue."""
        return self.pixel_format.startswith(("rgb", "bgr", "gbr", "argb", "pal"))


def patches(index: int, flashes: Sequence[int]) -> np.ndarray:
    """The colours of a frame as meant, `(4, 6, 3)`, 0 to 255."""
    bits = [(255,) * 3 if index >> bit & 1 else (0,) * 3 for bit in range(NUM_COLUMNS - 1)]
    flash = [(255,) * 3 if index in flashes else (0,) * 3]
    return np.array([GREYS, PRIMARIES, SKIN, [*bits, *flash]], dtype=np.float64)


def as_drawn(frames: np.ndarray, footage: Footage) -> np.ndarray:
    """Take one pixel for each that was drawn before patches were made larger, of frames `(..., height, width, 3)`."""
    middle = footage.scale // 2
    return frames[..., middle :: footage.scale, middle :: footage.scale, :]


def frame_number(frame: np.ndarray) -> int:
    """Read the number of a frame, `(height, width, 3)`, from its pixels."""
    return sum(int(patch > 128) << bit for bit, patch in enumerate(patch_means(frame)[3, : NUM_COLUMNS - 1, 1]))


def is_flash(frame: np.ndarray) -> bool:
    """Whether a frame, `(height, width, 3)`, flashes."""
    return bool(patch_means(frame)[3, NUM_COLUMNS - 1, 1] > 128)


def interiors(frame: np.ndarray) -> np.ndarray:
    """The inner pixels of each patch of a frame: `(4, 6, 8, 8, 3)`."""
    corner = frame[:HEIGHT, :WIDTH].reshape(NUM_ROWS, PATCH, NUM_COLUMNS, PATCH, 3).swapaxes(1, 2)
    return corner[:, :, INSET:-INSET, INSET:-INSET].astype(np.float64)


def patch_means(frame: np.ndarray) -> np.ndarray:
    """The mean colour of each patch of a frame: `(4, 6, 3)`."""
    return interiors(frame).mean((2, 3))


# --- Codes and what they mean ----------------------------------------------------------------------------------------


def to_codes(rgb: np.ndarray, footage: Footage, bits: int) -> np.ndarray:
    """Turn RGB, 0 to 255, into rounded codes of luma, blue and red difference (or green, blue, red)."""
    unit = rgb / 255
    if footage.is_rgb:
        return np.rint(unit * (2**bits - 1))
    red, blue = MATRICES[footage.matrix]
    luma = unit @ [red, 1 - red - blue, blue]
    differences = [(unit[..., 2] - luma) / (2 - 2 * blue), (unit[..., 0] - luma) / (2 - 2 * red)]
    offset, of_luma, of_chroma, middle = _scales(footage, bits)
    codes = [offset + of_luma * luma, *(middle + of_chroma * difference for difference in differences)]
    return np.clip(np.rint(np.stack(codes, -1)), 0, 2**bits - 1)


def from_codes(codes: np.ndarray, footage: Footage, bits: int) -> np.ndarray:
    """Turn codes into RGB, 0 to 255, not rounded: the reference."""
    if footage.is_rgb:
        return codes / (2**bits - 1) * 255
    offset, of_luma, of_chroma, middle = _scales(footage, bits)
    luma = (codes[..., 0] - offset) / of_luma
    if footage.pixel_format.startswith("gray"):
        return np.clip(np.stack([luma] * 3, -1), 0, 1) * 255
    red, blue = MATRICES[footage.matrix]
    blueness, redness = ((codes[..., channel] - middle) / of_chroma for channel in (1, 2))
    r, b = luma + (2 - 2 * red) * redness, luma + (2 - 2 * blue) * blueness
    g = (luma - red * r - blue * b) / (1 - red - blue)
    return np.clip(np.stack([r, g, b], -1), 0, 1) * 255


def _scales(footage: Footage, bits: int) -> tuple[float, float, float, float]:
    step = 2 ** (bits - 8)
    if footage.is_full_range:
        return 0, 2**bits - 1, 2**bits - 1, 128 * step
    return 16 * step, 219 * step, 224 * step, 128 * step


def expected_patches(footage: Footage, index: int) -> np.ndarray:
    """The colours that a reader should find in a frame, `(4, 6, 3)`, 0 to 255, not rounded."""
    bits = av.VideoFormat(footage.pixel_format).components[0].bits
    if footage.pixel_format == "pal8":
        bits = 8
    colours = from_codes(to_codes(patches(index, footage.flashes), footage, bits), footage, bits)
    return narrowed(colours) if footage.is_wide else colours


def narrowed(rgb: np.ndarray) -> np.ndarray:
    """Turn colours of BT.2020's primaries into those of BT.709, by the light of a display of gamma 2.4 (BT.1886)."""
    to_xyz = {name: _to_xyz(points) for name, points in CHROMATICITIES.items()}
    light = (rgb / 255) ** 2.4 @ (np.linalg.inv(to_xyz["bt709"]) @ to_xyz["bt2020"]).T
    return np.clip(light, 0, 1) ** (1 / 2.4) * 255


def _to_xyz(points: tuple[tuple[float, float], ...]) -> np.ndarray:
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in points]).T
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])


# --- Writing ---------------------------------------------------------------------------------------------------------


def make_clip(path: Path, footage: Footage) -> Path:
    """Write the clip of a kind, one tag after the other, sound and pictures interleaved."""
    # Or encoders' delays shift the pictures of an AVI file, which has no stamps, by whole frames.
    options = {"avoid_negative_ts": "disabled"} if footage.extension == ".avi" else {}
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(footage.codec, rate=footage.rate, options=dict(footage.options))
        stream.width, stream.height = footage.size
        stream.pix_fmt = footage.pixel_format
        stream.time_base = 1 / footage.rate
        context = stream.codec_context
        if footage.is_tagged:
            matrix, primaries, transfer = TAGS[footage.matrix]
            if footage.is_wide:
                primaries, transfer = WIDE_GAMUT
            context.colorspace, context.color_primaries, context.color_trc = matrix, primaries, transfer
            context.color_range = 2 if footage.is_full_range else 1
        sound: Any = None
        if footage.sound:
            sound = container.add_stream(footage.sound, rate=footage.sample_rate, layout=_layout(footage))
            sound.format = sound.codec_context.codec.audio_formats[0]
            if footage.sound == "wmav2":
                sound.bit_rate = 128000  # it has no default
            sound.codec_context.options = {"strict": "-2"}  # FFmpeg calls its Vorbis experimental
        for index, tick in enumerate(footage.ticks):
            frame = make_frame(footage, index)
            frame.pts, frame.time_base = tick, 1 / footage.rate
            if footage.is_tagged:
                frame.colorspace, frame.color_range = context.colorspace, context.color_range
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            audio = av.AudioFrame.from_ndarray(clicks(footage)[None], format="fltp", layout="mono")
            audio.sample_rate, audio.pts = footage.sample_rate, 0
            container.mux(sound.encode(audio))
            container.mux(sound.encode(None))
    return path


def _layout(footage: Footage) -> str:
    return "stereo" if footage.sound == "vorbis" or footage.extension == ".dv" else "mono"  # they know nothing else


def make_frame(footage: Footage, index: int) -> av.VideoFrame:
    """Fill the planes of a frame."""
    width, height = footage.size
    frame = av.VideoFrame(width, height, footage.pixel_format)
    colours = patches(index, footage.flashes)
    if footage.pixel_format == "pal8":
        palette = np.array([*GREYS, *PRIMARIES, *SKIN])
        numbers = (colours[:, :, None] == palette).all(-1).argmax(-1)
        _fill(frame.planes[0], _spread(numbers, footage), 1)
        entries = np.zeros((256, 4), np.uint8)
        entries[:, 3] = 255
        entries[: len(palette), :3] = palette[:, ::-1]
        frame.planes[1].update(entries.tobytes())
        return frame
    format = av.VideoFormat(footage.pixel_format)
    bits = format.components[0].bits
    codes = _spread(to_codes(colours, footage, bits), footage)
    if not format.is_planar or format.name.startswith("nv"):  # packed: none but 8-bit RGB, with or without alpha
        channels = {"r": codes[..., 0], "g": codes[..., 1], "b": codes[..., 2]}
        channels |= dict.fromkeys("a0", np.full((height, width), 255))
        if format.name == "gray" or format.name.startswith("gray"):
            _fill(frame.planes[0], codes[..., 0], (bits + 7) // 8)
        else:
            packed = np.stack([channels[letter] for letter in format.name if letter in channels], -1)
            _fill(frame.planes[0], packed.reshape(height, -1), 1)
        return frame
    order = (1, 2, 0) if format.name.startswith("gbr") else (0, 1, 2)
    for number, plane in enumerate(frame.planes[:3]):
        values = codes[..., order[number]]
        down, across = height // plane.height, width // plane.width
        _fill(plane, values[::down, ::across], (bits + 7) // 8)
    return frame


def _spread(colours: np.ndarray, footage: Footage) -> np.ndarray:
    edge = PATCH * footage.scale
    picture = colours.repeat(edge, 0).repeat(edge, 1)
    height, width = (whole - part for whole, part in zip(footage.size[::-1], picture.shape, strict=False))
    rest = [(0, height), (0, width), *[(0, 0)] * (picture.ndim - 2)]
    return np.pad(picture, rest, mode="edge")


def _fill(plane: Any, values: np.ndarray, num_bytes: int) -> None:
    rows = np.zeros((plane.height, plane.line_size), np.uint8)
    data = values.astype("u1" if num_bytes == 1 else "<u2").view(np.uint8)
    rows[:, : data.shape[1]] = data
    plane.update(rows.tobytes())


# --- Sound -----------------------------------------------------------------------------------------------------------


def clicks(footage: Footage) -> np.ndarray:
    """The sound of a clip as floats: silence, and where a flash begins a click of 5 ms at 1.5 kHz."""
    rate = footage.sample_rate
    wave = np.zeros(int(footage.duration * rate), np.float32)
    length = int(CLICK_SECONDS * rate)
    click = 0.9 * np.hanning(length) * np.sin(2 * np.pi * 1500 * np.arange(length) / rate)
    for index in footage.flashes:
        start = round(footage.times[index] * rate)
        wave[start : start + length] += click[: len(wave) - start].astype(np.float32)
    return wave


def find_clicks(path: Path, track: int = 0) -> list[float]:
    """Times in seconds, from the first picture on, at which the clicks of a file begin."""
    samples: list[np.ndarray] = []
    rate, start = 1, None
    with av.open(str(path)) as container:
        video = next(iter(container.decode(video=0)))
        assert video.time is not None
        origin = video.time
    with av.open(str(path)) as container:
        for frame in container.decode(audio=track):
            wave = frame.to_ndarray().astype(np.float64)
            if not frame.format.is_planar:
                wave = wave.reshape(-1, frame.layout.nb_channels).T
            if frame.format.name.startswith("u8"):
                wave -= 128
            rate = frame.sample_rate
            if frame.time is not None:
                start = frame.time if start is None else start
                missing = round((frame.time - start) * rate) - sum(map(len, samples))
                if missing > rate / 100:  # a gap in the stamps is silence
                    samples.append(np.zeros(missing))
            samples.append(np.abs(wave).max(0))
    if start is None or not samples:
        return []
    envelope = np.convolve(np.concatenate(samples), np.ones(rate // 500), "same")
    loud = np.flatnonzero(envelope > envelope.max() / 3)
    groups = np.split(loud, np.flatnonzero(np.diff(loud) > rate / 40) + 1)
    centres = [float(np.average(group, weights=envelope[group])) for group in groups if len(group)]
    return [start + centre / rate - CLICK_SECONDS / 2 - origin for centre in centres]

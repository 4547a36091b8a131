"""Colour: what the tags of a frame mean, and the conversion to BT.709 SDR of frames that are something else.

Tags
- Matrix and range are those of the frame. Without a tag the matrix is BT.709 for a height of 720 and more or a width
  of 1280 and more, else BT.601, as players take it, and the range is limited. RGB, grey, palette and `yuvj` formats
  are of full range by definition, grey unless it is tagged limited.
- Constant-luminance BT.2020, ICtCp and the chromaticity-derived matrices are refused.

High dynamic range: PQ (`smpte2084`) and HLG (`arib-std-b67`) are mapped to SDR, frame by frame with one fixed curve,
so that a frame's pixels depend on no other frame and on no metadata:

1. To light in cd/m2: the PQ curve of ST 2084; or the inverse HLG curve and the OOTF of BT.2100 for a display of
   1000 cd/m2 (system gamma 1.2).
2. From the tagged primaries to BT.709's, in linear light; what is outside the gamut is clipped at zero.
3. Relative to the reference white of BT.2408, 203 cd/m2: `m`, the largest of R, G and B, becomes

       f(m) = m                                                        for m <= k
       f(m) = k + (1 - k) * t * (1 + t / T**2) / (1 + t)               for k < m <= P
       f(m) = 1                                                        for m > P

   with `k = 0.75`, `P = 1000 / 203`, `t = (m - k) / (1 - k)`, `T = (P - k) / (1 - k)`: extended Reinhard above a knee,
   of continuous slope. R, G and B are scaled alike, by `f(m) / m`, so that hues stay. Everything up to 152 cd/m2 keeps
   its brightness, reference white comes out at 87.5 % of the light (level 241 of 255), 1000 cd/m2 and more at white.
4. To the signal by the inverse of BT.1886: the power 1 / 2.4.

SDR of wide gamut (BT.2020, DCI-P3 and Display P3 primaries) is converted to BT.709 primaries in linear light, with the
power 2.4 of BT.1886 both ways; what is outside the gamut is clipped. The primaries of BT.601 (SMPTE 170M, BT.470 B/G)
count as those of BT.709, as players take them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from av.video.format import VideoFormat
from av.video.frame import VideoFrame

from .containers import Unsupported


if TYPE_CHECKING:  # PyTorch takes a second to import, and a header can be read without it
    import torch

# FFmpeg's numbers of AVColorSpace; the weights of red and blue in luma.
_MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 8: "ycgco", 9: "bt2020"}
_REFUSED = {10: "bt2020c", 11: "smpte2085", 12: "chroma-derived-nc", 13: "chroma-derived-c", 14: "ictcp"}
LUMA_WEIGHTS = {
    "bt709": (0.2126, 0.0722),
    "bt601": (0.299, 0.114),
    "bt2020": (0.2627, 0.0593),
    "smpte240m": (0.212, 0.087),
    "fcc": (0.30, 0.11),
}

# Numbers of AVColorPrimaries and AVColorTransferCharacteristic.
_PRIMARIES = {4: "bt470m", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "film", 9: "bt2020", 10: "smpte428"}
_PRIMARIES |= {1: "bt709", 11: "smpte431", 12: "smpte432", 22: "ebu3213"}
_TRANSFERS = {1: "bt709", 4: "gamma22", 5: "gamma28", 6: "smpte170m", 7: "smpte240m", 8: "linear", 9: "log100"}
_TRANSFERS |= {10: "log316", 11: "iec61966-2-4", 12: "bt1361", 13: "srgb", 14: "bt2020-10", 15: "bt2020-12"}
_TRANSFERS |= {16: "smpte2084", 17: "smpte428", 18: "arib-std-b67"}

# Chromaticities of red, green, blue and white.
_D65 = (0.3127, 0.3290)
CHROMATICITIES = {
    "bt709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), _D65),
    "bt2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),
    "smpte431": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    "smpte432": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),
}

REFERENCE_WHITE = 203.0  # cd/m2 (BT.2408)
PEAK = 1000.0  # cd/m2: what comes out white
KNEE = 0.75  # of reference white


@dataclass(frozen=True)
class Color:
    """How the samples of a frame are to be taken, tags and defaults together.

    Attributes:
        matrix: `"rgb"`, `"grey"`, `"ycgco"` or a key of `LUMA_WEIGHTS`.
        primaries: FFmpeg's name; `"bt709"` where there is no tag.
        transfer: FFmpeg's name; `"bt709"` where there is no tag.
        is_full: Whether samples use their full range.
    """

    matrix: str
    primaries: str
    transfer: str
    is_full: bool

    @property
    def is_hdr(self) -> bool:
        return self.transfer in ("smpte2084", "arib-std-b67")

    @property
    def is_foreign(self) -> bool:
        """Tell whether BT.709 SDR takes more than a matrix."""
        return self.is_hdr or self.primaries in CHROMATICITIES.keys() - {"bt709"}


def is_grey(format: VideoFormat) -> bool:
    """Return whether a pixel format holds grey values alone, or with alpha."""
    return format.name.startswith(("gray", "ya8", "ya16", "yaf"))


def color_of(frame: VideoFrame) -> Color:
    """Return how a frame's samples are to be taken.

    Raises:
        Unsupported: If its matrix is one that cannot be converted.
    """
    name = frame.format.name
    tag = int(frame.colorspace)
    if tag in _REFUSED:
        raise Unsupported(f"its colour matrix is {_REFUSED[tag]}, and only {', '.join(LUMA_WEIGHTS)} are supported")
    primaries = _PRIMARIES.get(int(frame.color_primaries), "bt709")
    transfer = _TRANSFERS.get(int(frame.color_trc), "bt709")
    if frame.format.is_rgb or frame.format.has_palette or name.startswith(("mono", "xyz")):
        return Color("rgb", primaries, transfer, True)
    if is_grey(frame.format):
        return Color("grey", primaries, transfer, int(frame.color_range) != 1)
    default = "bt709" if frame.height >= 720 or frame.width >= 1280 else "bt601"
    is_full = name.startswith("yuvj") or int(frame.color_range) == 2
    return Color(_MATRICES.get(tag, default), primaries, transfer, is_full)


def yuv_to_rgb(
    y: torch.Tensor, u: torch.Tensor | None, v: torch.Tensor | None, depth: int, color: Color
) -> torch.Tensor:
    """Convert samples of `depth` bits, one plane each and of one size, to a signal `(3, height, width)`, float32.

    0 is black and 1 white; what a matrix takes outside stays there. Without `u` and `v` the frame is grey. Samples in
    float32 are overwritten.
    """
    import torch

    unit = 1 << (depth - 8)
    black, luma, chroma = (0, 2**depth - 1, 2**depth - 1) if color.is_full else (16 * unit, 219 * unit, 224 * unit)
    y = y.float().sub_(black).div_(luma)
    if u is None or v is None:
        return y.expand(3, *y.shape).clone()
    u, v = (plane.float().sub_(128 * unit).div_(chroma) for plane in (u, v))
    if color.matrix == "ycgco":  # `u` is Cg, `v` is Co
        return torch.stack((y - u + v, y + u, y - u - v))
    red, blue = LUMA_WEIGHTS[color.matrix]
    green = 1 - red - blue
    return torch.stack(
        (
            y.add(v, alpha=2 * (1 - red)),
            y.sub(u, alpha=2 * (1 - blue) * blue / green).sub_(v, alpha=2 * (1 - red) * red / green),
            y.add(u, alpha=2 * (1 - blue)),
        )
    )


def to_sdr(signal: torch.Tensor, color: Color) -> torch.Tensor:
    """Convert an R'G'B' signal `(3, height, width)` to BT.709 SDR, in `[0, 1]`; see the module. It is overwritten."""
    import torch

    if not color.is_foreign:
        return signal.clamp_(0, 1)
    if color.transfer == "smpte2084":
        light = _pq_to_light(signal.clamp_(0, 1)).div_(REFERENCE_WHITE)
    elif color.transfer == "arib-std-b67":
        light = _hlg_to_light(signal.clamp_(0, 1)).div_(REFERENCE_WHITE)
    else:
        light = signal.clamp_(0, 1).pow_(2.4)
    if color.primaries in CHROMATICITIES and color.primaries != "bt709":
        matrix = torch.tensor(primaries_matrix(color.primaries), dtype=light.dtype)
        light = (matrix @ light.flatten(1)).view_as(light)
    light = light.clamp_(min=0)
    if color.is_hdr:
        largest = light.amax(0).clamp_(min=1e-6)
        light *= _compress(largest) / largest
    return light.clamp_(max=1).pow_(1 / 2.4)


def _pq_to_light(signal: torch.Tensor) -> torch.Tensor:
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = signal.pow(1 / m2)
    return (power - c1).clamp_(min=0).div_(power.mul_(-c3).add_(c2)).pow_(1 / m1).mul_(10000)


def _hlg_to_light(signal: torch.Tensor) -> torch.Tensor:
    import torch

    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = torch.where(signal <= 0.5, signal.square() / 3, (((signal - c) / a).exp() + b) / 12)
    red, blue = LUMA_WEIGHTS["bt2020"]
    luminance = red * scene[0] + (1 - red - blue) * scene[1] + blue * scene[2]
    return scene * (1000 * luminance.pow(0.2))


def _compress(light: torch.Tensor) -> torch.Tensor:
    import torch

    t = ((light - KNEE) / (1 - KNEE)).clamp_(min=0)
    limit = (PEAK / REFERENCE_WHITE - KNEE) / (1 - KNEE)
    above = KNEE + (1 - KNEE) * t * (1 + t / limit**2) / (1 + t)
    return torch.where(light <= KNEE, light, above.clamp_(max=1))


@cache
def primaries_matrix(primaries: str) -> list[list[float]]:
    """Return the matrix from linear RGB of some primaries to linear RGB of BT.709, white to white (Bradford)."""
    import numpy as np

    def to_xyz(name: str) -> np.ndarray:
        xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in CHROMATICITIES[name]]).T
        return xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])

    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    source, target = to_xyz(primaries), to_xyz("bt709")
    gains = (bradford @ target.sum(1)) / (bradford @ source.sum(1))
    adapt = np.linalg.inv(bradford) @ np.diag(gains) @ bradford
    return (np.linalg.inv(target) @ adapt @ source).tolist()

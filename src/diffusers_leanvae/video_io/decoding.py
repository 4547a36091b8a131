"""From packets to upright, progressive RGB frames."""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

from av.error import FFmpegError
from av.filter import Graph
from av.packet import Packet
from av.sidedata.sidedata import SideDataContainer, Type
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .color import LUMA_WEIGHTS, Color, color_of, to_sdr, yuv_to_rgb
from .containers import Unsupported, alpha_decoder


if TYPE_CHECKING:  # PyTorch takes a second to import, and a header can be read without it
    import numpy as np
    import torch

Matrix = tuple[int, int, int, int]

_EXACT = "flags=accurate_rnd+full_chroma_int+neighbor"


class Damaged(Exception):
    """The stream cannot be decoded any further; the message says why."""


class CutOff(Exception):
    """The file ends before this packet.

    Attributes:
        dts: When it would be decoded, in the ticks of the stream.
    """

    def __init__(self, dts: int) -> None:
        super().__init__(dts)
        self.dts = dts


class Decoding:
    """Frames from one place of a file on, one after the other; the last two are kept.

    So a range can begin where another ended: it is read from one frame earlier on, and deinterlacing the other may
    have taken one frame more.

    Attributes:
        next_index: Index of the frame that is decoded next.
    """

    def __init__(self, packets: Iterable[Packet], stream: VideoStream, index: int) -> None:
        self.next_index = index
        self._frames = _decode(packets, stream)
        self._recent: deque[VideoFrame] = deque(maxlen=2)
        self._size: tuple[int, int] | None = None
        self._damage: Damaged | None = None

    @property
    def first_index(self) -> int:
        """Index of the first frame that can still be had."""
        return self.next_index - len(self._recent)

    def frames_from(self, index: int) -> Iterator[VideoFrame]:
        """Yield the frames from `index` on; raise `Damaged` after the last good one, this time and every time."""
        yield from [frame for number, frame in enumerate(self._recent, self.first_index) if number >= index]
        while (frame := self._next()) is not None:
            if self.next_index > index:
                yield frame

    def _next(self) -> VideoFrame | None:
        if self._damage is not None:
            raise self._damage
        try:
            frame = next(self._frames, None)
            if frame is None:
                return None
            size = frame.width, frame.height
            self._size = self._size or size
            if size != self._size:
                before = f"{self._size[0]}x{self._size[1]}"
                raise Damaged(f"the frame size changes from {before} to {size[0]}x{size[1]}")
        except Damaged as damage:
            self._damage = damage
            raise
        self._recent.append(frame)
        self.next_index += 1
        return frame


def _decode(packets: Iterable[Packet], stream: VideoStream) -> Iterator[VideoFrame]:
    """Yield frames in presentation order; raise `Damaged` after the last one that is certainly good."""
    decoder = alpha_decoder(stream)
    decode = stream.decode if decoder is None else decoder.decode
    try:
        try:
            for packet in packets:
                if packet.is_corrupt:
                    dts = packet.dts
                    break
                for frame in decode(packet):
                    if frame.is_corrupt:
                        raise Damaged("the decoder marks the frame as corrupt")
                    yield frame
            else:
                return
        except CutOff as cut:
            dts = cut.dts
        # Cut off, inside a packet or before one. What the decoder still holds is good, but only up to this packet's
        # decoding time is it certain that no frame in between is missing.
        for frame in decode(None):
            if frame.pts is None or dts is None or frame.pts >= dts:
                break
            yield frame
    except FFmpegError as error:
        raise Damaged(error.strerror or str(error)) from error
    raise Damaged("the file is truncated or a packet is damaged")


class Picture:
    """A decoded, progressive frame that is still to become RGB.

    Attributes:
        matrix: Its display matrix, as `display_matrix` returns it.
    """

    def __init__(self, frame: VideoFrame, matrix: Matrix, color: Color, converter: RgbConverter) -> None:
        self._frame, self._color, self.matrix, self._converter = frame, color, matrix, converter

    @property
    def is_packed(self) -> bool:
        """Whether it becomes packed pixels, the three colours of each in a row, and not planes of one colour each."""
        return self._converter.is_packed or self._frame.format.name == "rgb24"

    def write(self, target: torch.Tensor) -> None:
        """Write RGB, uint8 `(height, width, 3)`, upright, alpha composed over the background.

        Args:
            target: Of any strides; fastest are those that `is_packed` says.
        """
        a, b, c, d = self.matrix
        if a:
            flips = (d < 0, a < 0)
        else:
            target = target.transpose(0, 1)
            flips = (c < 0, b < 0)
        view = target.numpy()  # which can be flipped without a copy
        view = view[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1]
        pixels = self._converter.convert(self._frame, self._color)
        if isinstance(pixels, list):
            for channel, plane in enumerate(pixels):
                view[..., channel] = plane
        else:
            view[...] = pixels


class Progressive:
    """Decoded frames -> progressive ones of planar formats, through a filter graph where one is needed.

    One frame out for one frame in. Up to one frame stays inside while the source is interlaced; `push(None)` brings it
    out.
    """

    def __init__(self, converter: RgbConverter) -> None:
        self._converter = converter
        self._graph: Graph | None = None
        self._key: tuple[Any, ...] = ()
        self._interlaced = False

    def push(self, frame: VideoFrame | None) -> list[Picture]:
        if frame is None:
            return self._flush()
        self._interlaced = self._interlaced or frame.interlaced_frame
        matrix, color = display_matrix(frame), color_of(frame)
        planar = planar_format(frame.format, color)
        if color.matrix == "grey" and not planar.startswith("gray"):
            color = replace(color, matrix="rgb")
        is_flipped = frame.planes[0].line_size < 0  # it lies upside down in memory, and has to be copied
        if not self._interlaced and planar == frame.format.name and not is_flipped:
            return [*self._flush(), Picture(frame, matrix, color, self._converter)]
        pictures: list[Picture] = []
        key = (frame.format.name, matrix, color, self._interlaced, is_flipped)
        if self._graph is None or key != self._key:
            pictures += self._flush()
            nodes = [("copy", "")] if is_flipped else []
            if self._interlaced:
                nodes.append(("bwdif", "mode=send_frame:deint=interlaced"))
            if planar != frame.format.name:
                # Range and matrix are named so that they stay: samples are only laid out anew.
                same = "in_range=pc:out_range=pc:in_color_matrix=bt709:out_color_matrix=bt709"
                nodes += [("scale", f"{same}:{_EXACT}"), ("format", planar)]
            self._key, self._graph = key, make_graph(frame, *nodes)
        self._graph.vpush(frame)
        return pictures + self._pull()

    def _flush(self) -> list[Picture]:
        if self._graph is None:
            return []
        self._graph.vpush(None)
        pictures = self._pull()
        self._graph = None
        return pictures

    def _pull(self) -> list[Picture]:
        assert self._graph is not None
        pictures: list[Picture] = []
        while True:
            try:
                frame = self._graph.vpull()
            except (BlockingIOError, EOFError):
                return pictures
            pictures.append(Picture(frame, self._key[1], self._key[2], self._converter))


class RgbConverter:
    """Frames of `Progressive` -> 8-bit RGB, within half a level of what their matrix says, rounded.

    8 to 16 bits of luma and chroma of limited range, and 8 bits of full range, are what swscale does exactly, with
    `accurate_rnd`; the nearest chroma sample is taken, so that reading what was written from averaged chroma gives the
    same. Everything else is computed in float32: full range above 8 bits, RGB above 8 bits, grey of limited range,
    other primaries and transfer curves.

    Args:
        background: The RGB colour over which alpha is composed.
        is_packed: Convert to packed pixels where swscale makes them, which is faster than to put planes together.
    """

    def __init__(self, background: tuple[int, int, int], is_packed: bool = False) -> None:
        self.is_packed = is_packed
        self._background = background
        self._graph: Graph | None = None
        self._key: tuple[Any, ...] = ()

    def convert(self, frame: VideoFrame, color: Color) -> np.ndarray | list[np.ndarray]:
        """Convert a frame to 8-bit RGB.

        Returns:
            Pixels, uint8 `(height, width, 3)`, or the planes of red, green and blue, uint8 `(height, width)` each.
            Either may be views of `frame` itself.
        """
        if frame.format.name == "rgb24":
            return packed_pixels(frame)
        if frame.format.name == "rgba":
            *rgb, alpha = packed_pixels(frame).transpose(2, 0, 1)
            return self._compose(rgb, alpha, 8)
        depth = frame.format.components[0].bits
        planes = planes_of(frame)
        alpha = planes.pop() if frame.format.components[-1].is_alpha else None
        if color.matrix == "grey" and depth == 8 and color.is_full and not color.is_foreign:
            rgb = [planes[0]] * 3
        elif _is_exact_in_swscale(color, depth, planes):
            is_packed = self.is_packed and alpha is None  # what is to be composed is, as planes
            scaled = self._scale(frame, color, is_packed)
            if is_packed:
                return packed_pixels(scaled)
            rgb = _rgb_planes(scaled)
        else:
            rgb = _convert_in_float(planes, depth, color)
        return rgb if alpha is None else self._compose(rgb, alpha, depth)

    def _scale(self, frame: VideoFrame, color: Color, is_packed: bool) -> VideoFrame:
        """Convert to planes, or if packed pixels are asked for to those, `gbrp` or `rgb24`."""
        key = (frame.format.name, frame.width, frame.height, color, is_packed)
        if self._graph is None or key != self._key:
            arguments = f"in_color_matrix={color.matrix}:in_range={'pc' if color.is_full else 'tv'}:{_EXACT}"
            # By way of GBRP: the conversion to packed RGB is six times as slow. Interleaving takes swscale less time
            # than it takes NumPy.
            packing = [("scale", "flags=neighbor"), ("format", "rgb24")] if is_packed else []
            self._graph = make_graph(frame, ("scale", arguments), ("format", "gbrp"), *packing)
            self._key = key
        self._graph.vpush(frame)
        return self._graph.vpull()

    def _compose(self, rgb: list[np.ndarray], alpha: np.ndarray, depth: int) -> list[np.ndarray]:
        import numpy as np

        weight = alpha.astype(np.float32) / (2**depth - 1)
        levels = np.array(self._background, dtype=np.float32)
        planes = zip(rgb, levels, strict=True)
        return [
            np.rint(level + (plane.astype(np.float32) - level) * weight).astype(np.uint8) for plane, level in planes
        ]


def _is_exact_in_swscale(color: Color, depth: int, planes: list[np.ndarray]) -> bool:
    if color.matrix not in LUMA_WEIGHTS or color.is_foreign or (color.is_full and depth > 8):
        return False
    if color.is_full:
        return True
    # swscale's integers overflow from twice white on, which only samples outside the legal range reach: then bright
    # blue would come out black.
    red, blue = LUMA_WEIGHTS[color.matrix]
    unit = 1 << (depth - 8)
    reach = max(
        (int(plane.max()) / unit - 128) / 112 * (1 - weight) for plane, weight in ((planes[1], blue), (planes[2], red))
    )
    return reach < 0.9 or (int(planes[0].max()) / unit - 16) / 219 + reach < 1.99


def _convert_in_float(planes: list[np.ndarray], depth: int, color: Color) -> list[np.ndarray]:
    """Convert planes to RGB, in bands: what stays in the processor's cache takes half the time, and little memory."""
    import numpy as np

    height, width = planes[0].shape
    rgb = np.empty((3, height, width), np.uint8)
    rows = max((1 << 16) // width // 4, 1) * 4  # as chroma has at least every fourth row
    for top in range(0, height, rows):
        band = planes[0][top : top + rows]
        bands = [band]
        for plane in planes[1:]:
            down, across = -(-height // plane.shape[0]), -(-width // plane.shape[1])
            chroma = plane[top // down : -(-(top + len(band)) // down)]
            bands.append(chroma.repeat(down, 0).repeat(across, 1)[: len(band), :width])
        rgb[:, top : top + rows] = _convert_band(bands, depth, color)
    return list(rgb)


def _convert_band(planes: list[np.ndarray], depth: int, color: Color) -> np.ndarray:
    import torch

    samples = [torch.from_numpy(plane.astype("float32")) for plane in planes]
    if color.matrix == "rgb":
        green, blue, red = samples
        signal = torch.stack((red, green, blue)).div_(2**depth - 1)
    else:
        y, u, v = samples if len(samples) == 3 else (samples[0], None, None)
        signal = yuv_to_rgb(y, u, v, depth, color)
    return to_sdr(signal, color).mul_(255).round_().byte().numpy()


def planar_format(format: VideoFormat, color: Color) -> str:
    """Return the name of the format in which a frame is converted: its own, or one with the same samples."""
    name, depth = format.name, format.components[0].bits
    has_alpha = format.components[-1].is_alpha or format.has_palette
    is_deep = depth > 8 or "f32" in name or "f16" in name
    if color.matrix == "rgb":
        if is_deep or color.is_foreign:
            depth = {8: 8, 10: 10, 12: 12, 14: 14}.get(depth, 16)
            return ("gbrap" if has_alpha else "gbrp") + (f"{depth}le" if depth > 8 else "")
        return "rgba" if has_alpha else "rgb24"
    if color.matrix == "grey":
        if has_alpha:
            return "gbrap16le" if is_deep else "rgba"
        return name if not is_deep or (name.endswith("le") and "f" not in name) else "gray16le"
    if format.is_planar and name.startswith("yuv") and "msb" not in name and (depth == 8 or name.endswith("le")):
        return name
    across, down = format.chroma_width(16), format.chroma_height(16)
    sampling = {(8, 8): "420", (8, 16): "422", (16, 16): "444", (4, 16): "411", (16, 8): "440", (4, 4): "410"}
    depth = {8: 8, 9: 9, 10: 10, 12: 12, 14: 14}.get(depth, 16)
    return f"yuv{'a' if has_alpha else ''}{sampling[across, down]}p" + (f"{depth}le" if depth > 8 else "")


def make_graph(frame: VideoFrame, *nodes: tuple[str, str]) -> Graph:
    """Return a graph of filters, given as names and arguments, one after the other, for frames such as this one."""
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 25)
    )
    graph.link_nodes(source, *(graph.add(*node) for node in nodes), graph.add("buffersink")).configure()
    return graph


def packed_pixels(frame: VideoFrame) -> np.ndarray:
    """Return a view of a packed 8-bit frame, `(height, width, channels)`."""
    import numpy as np

    channels = len(frame.format.components)
    plane = frame.planes[0]
    rows = np.frombuffer(cast(Any, plane), np.uint8).reshape(-1, plane.line_size)
    return rows[: frame.height, : frame.width * channels].reshape(frame.height, frame.width, channels)


def planes_of(frame: VideoFrame) -> list[np.ndarray]:
    """Return views of the planes of a planar frame, uint8 or uint16."""
    import numpy as np

    dtype = np.dtype("<u2" if frame.format.components[0].bits > 8 else np.uint8)
    return [
        np.frombuffer(cast(Any, plane), dtype).reshape(-1, plane.line_size // dtype.itemsize)[
            : plane.height, : plane.width
        ]
        for plane in frame.planes
    ]


def _rgb_planes(frame: VideoFrame) -> list[np.ndarray]:
    """Return views of the planes of red, green and blue of a `gbrp` frame."""
    green, blue, red = planes_of(frame)
    return [red, green, blue]


def display_matrix(frame: VideoFrame) -> Matrix:
    """The display matrix's `(a, b, c, d)` as signs, for a multiple of 90 degrees, with or without mirroring.

    Raises:
        Unsupported: If the picture is to be turned by another angle.
    """
    data = _matrix_bytes(frame)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack_from("5i", data)
    if a == b == c == d == 0:
        return 1, 0, 0, 1
    # A hundredth is half a degree, and what is left of a sine that was rounded.
    if max(abs(b), abs(c)) <= 0.01 * min(abs(a), abs(d)):
        return (-1 if a < 0 else 1), 0, 0, (-1 if d < 0 else 1)
    if max(abs(a), abs(d)) <= 0.01 * min(abs(b), abs(c)):
        return 0, (-1 if b < 0 else 1), (-1 if c < 0 else 1), 0
    angle = math.degrees(math.atan2(b, a)) % 360
    raise Unsupported(f"its picture is to be turned by {angle:.1f} degrees, and only multiples of 90 are supported")


def _matrix_bytes(frame: VideoFrame) -> bytes | None:
    # Not `frame.side_data`, which keeps a reference to itself in the frame: a cycle, so that megabytes would wait for
    # Python's collector.
    try:
        known = cast(Any, SideDataContainer)(frame)
    except ValueError:
        # PyAV's table of types lags FFmpeg's, and one that it does not know (EXIF, the view of spatial video) makes
        # everything unreadable. FFmpeg itself removes those.
        foreign = sorted(set(range(64)) - {kind.value for kind in Type})
        graph = make_graph(frame, *(("sidedata", f"mode=delete:type={number}") for number in foreign))
        graph.vpush(frame)
        known = cast(Any, SideDataContainer)(graph.vpull())
    data = known.get("DISPLAYMATRIX")
    return None if data is None else bytes(data)

"""From packets to upright, progressive RGB frames."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

from av.error import FFmpegError
from av.filter import Graph
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream


if TYPE_CHECKING:  # PyTorch takes a second to import, and a header can be read without it
    import torch


class Damaged(Exception):
    """The stream cannot be decoded any further; the message says why."""


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
    try:
        for packet in packets:
            if packet.is_corrupt:
                break
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise Damaged("the decoder marks the frame as corrupt")
                yield frame
        else:
            return
        # Cut off inside a packet. What the decoder still holds is good, but only up to this packet's decoding time is
        # it certain that no frame in between is missing.
        for frame in stream.decode(None):
            if frame.pts is None or packet.dts is None or frame.pts >= packet.dts:
                break
            yield frame
    except FFmpegError as error:
        raise Damaged(error.strerror or str(error)) from error
    raise Damaged("the file is truncated or a packet is damaged")


class RgbConverter:
    """Decoded frames -> upright, progressive RGB tensors, through a filter graph that is built when the first comes.

    The graph and not `frame.to_ndarray("rgb24")`: for more than 8 bits that one resamples chroma in another way than
    FFmpeg's filters and torchcodec do. Up to one frame stays inside while the source is interlaced; `push(None)`
    brings it out.
    """

    def __init__(self) -> None:
        self.graph: Graph | None = None
        self.key: tuple[Any, ...] = ()
        self.interlaced = False

    def push(self, frame: VideoFrame | None) -> list[torch.Tensor]:
        images: list[torch.Tensor] = []
        if frame is None:
            return self._flush()
        self.interlaced = self.interlaced or frame.interlaced_frame
        key = (frame.format.name, frame.colorspace, frame.color_range, display_matrix(frame), self.interlaced)
        if key != self.key:
            images += self._flush()
            self.key = key
            self.graph = self._build(frame)
        assert self.graph is not None
        self.graph.vpush(frame)
        return images + self._pull()

    def _build(self, frame: VideoFrame) -> Graph:
        graph = Graph()
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 25)
        )
        nodes = [source, graph.add("format", "rgb24"), graph.add("buffersink")]
        if self.interlaced:
            nodes.insert(1, graph.add("bwdif", "mode=send_frame:deint=interlaced"))
        graph.link_nodes(*nodes).configure()
        return graph

    def _flush(self) -> list[torch.Tensor]:
        if self.graph is None:
            return []
        self.graph.vpush(None)
        images = self._pull()
        self.graph = None
        return images

    def _pull(self) -> list[torch.Tensor]:
        import torch

        assert self.graph is not None
        images: list[torch.Tensor] = []
        while True:
            try:
                frame = self.graph.vpull()
            except (BlockingIOError, EOFError):
                return images
            a, b, c, d = self.key[3]
            pixels = torch.from_numpy(frame.to_ndarray())
            if a:
                flips = [0] * (d < 0) + [1] * (a < 0)
            else:
                pixels = pixels.transpose(0, 1)
                flips = [0] * (b < 0) + [1] * (c < 0)
            images.append(pixels.flip(flips) if flips else pixels)


def display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """The display matrix's `(a, b, c, d)` as signs, for a multiple of 90 degrees, with or without mirroring."""
    data: Any = cast(Any, frame.side_data).get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack_from("5i", bytes(data))
    if a == b == c == d == 0:
        return 1, 0, 0, 1
    if abs(a) >= abs(b):
        return (-1 if a < 0 else 1), 0, 0, (-1 if d < 0 else 1)
    return 0, (-1 if b < 0 else 1), (-1 if c < 0 else 1), 0

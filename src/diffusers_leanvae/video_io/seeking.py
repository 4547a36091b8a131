"""Proof of where in a file decoding may begin: seeking that cannot change a frame."""

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple, Self

from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.stream import VideoStream

from .decoding import CutOff


class SeekPoint(NamedTuple):
    """A frame's index, and time, place in the file and size of its packet, which tell the packet from all others."""

    index: int
    pts: int
    position: int | None
    size: int

    @classmethod
    def of(cls, index: int, packet: Packet) -> Self:
        return cls(index, 0 if packet.pts is None else packet.pts, packet.pos, packet.size)


class SeekPoints:
    """Frames from which decoding is certain to give what it gives from the start, as far as packets were read.

    The proof: an IDR picture (H.264, HEVC) or a VP9 key frame resets the decoder, and all packets before it are shown
    before it, so its frame index is the number of packets before it. That needs one packet per frame: these codecs in
    MP4, MOV or Matroska, progressive, starting on such a picture, and with no packet marked for discarding by an edit
    list.
    """

    @classmethod
    def of(cls, container: InputContainer, stream: VideoStream) -> Self | None:
        """Return an empty list to fill, or `None` for a container or codec in which nothing can be proven."""
        codec = stream.codec_context.codec.canonical_name
        extradata = stream.codec_context.extradata or b""
        if not {"mp4", "matroska"} & set(container.format.name.split(",")) or codec not in ("h264", "hevc", "vp9"):
            return None
        if codec == "vp9":
            return cls(codec, 0)
        if len(extradata) < (23 if codec == "hevc" else 7) or extradata[0] != 1:
            return None  # not in length-prefixed form
        return cls(codec, (extradata[4 if codec == "h264" else 21] & 3) + 1)

    def __init__(self, codec: str, length_size: int) -> None:
        self.found: list[SeekPoint] = []
        self._codec, self._length_size = codec, length_size
        self._num_packets = 0  # read so far, and as the proof needs them
        self._is_whole = False  # whether these are all packets
        self._is_broken = False  # whether the packet after these is not as the proof needs it

    def covers(self, index: int) -> bool:
        """Return whether `find` can answer for frame `index` without reading more packets."""
        return index < self._num_packets or self._is_whole or self._is_broken

    def find(self, index: int) -> SeekPoint | None:
        """Return the last one at or before frame `index`, or `None` where there is no proof."""
        if index >= self._num_packets and not self._is_whole:
            return None
        count = bisect_right(self.found, index, key=lambda point: point.index)
        return self.found[count - 1] if count else None

    def extend(self, packets: Iterable[Packet], first: int, index: int) -> None:
        """Look at packets, which begin with number `first` of the stream, up to that of frame `index`."""
        try:
            for number, packet in enumerate(packets, first):
                if number > index:
                    return
                if number < self._num_packets:
                    continue
                if not packet.size:  # the last one is empty and only means the end
                    self._is_whole = True
                    return
                is_reset = packet.is_keyframe and self._is_reset(packet)
                if packet.is_discard or packet.is_corrupt or packet.pts is None or not (is_reset or number):
                    self._is_broken = True
                    return
                if is_reset:
                    self.found.append(SeekPoint.of(number, packet))
                self._num_packets += 1
        except (FFmpegError, CutOff):
            self._is_broken = True

    def _is_reset(self, packet: Packet) -> bool:
        return self._codec == "vp9" or _is_idr(bytes(packet), self._codec, self._length_size)


def _is_idr(data: bytes, codec: str, length_size: int) -> bool:
    """Return whether length-prefixed NAL units hold an IDR picture (H.264 type 5, HEVC types 19 and 20)."""
    position = 0
    while position + length_size < len(data):
        header = data[position + length_size]
        if (header & 0x1F) == 5 if codec == "h264" else ((header >> 1) & 0x3F) in (19, 20):
            return True
        position += length_size + int.from_bytes(data[position : position + length_size])
    return False

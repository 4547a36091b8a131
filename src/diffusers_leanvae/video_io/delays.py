"""Delays of the frames of animations, exactly as their files give them."""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from PIL import Image


def _as_browsers(delay: Fraction) -> Fraction:
    return delay if delay > Fraction(1, 100) else Fraction(1, 10)


def walk_png(path: Path) -> tuple[list[Fraction], bytes | None, bool]:
    """Check the sums of all chunks, which Pillow does not, and find the delays and the EXIF block.

    Returns:
        Delays of the frames of an APNG, empty for others; EXIF; whether the first picture is none of them.
    """
    delays: list[Fraction] = []
    exif, is_animated, is_apart, has_data = None, False, False, False
    with path.open("rb") as file:
        file.seek(8)
        while True:
            head = file.read(8)
            if len(head) < 8:
                raise ValueError("it ends before its end is marked")
            length, kind = struct.unpack(">I4s", head)
            total, left, data = zlib.crc32(kind), length, b""
            while left:
                block = file.read(min(left, 1 << 20))
                if not block:
                    raise ValueError("it ends within a chunk")
                total, left = zlib.crc32(block, total), left - len(block)
                if kind in (b"fcTL", b"eXIf"):
                    data += block
            if file.read(4) != struct.pack(">I", total):
                raise ValueError(f"the check sum of a chunk {kind.decode('latin-1')!r} is wrong")
            if kind == b"IEND":
                return (delays if is_animated else []), exif, is_apart
            if kind == b"acTL":
                is_animated = True
            elif kind == b"IDAT" and not has_data:
                has_data, is_apart = True, is_animated and not delays
            elif kind == b"eXIf":
                exif = b"Exif\0\0" + data
            elif kind == b"fcTL" and length >= 24:
                numerator, denominator = struct.unpack(">HH", data[20:24])
                delays.append(_as_browsers(Fraction(numerator, denominator or 100)))


def gif_delays(data: bytes) -> list[Fraction]:
    """Find the delays of the frames of a GIF file in its blocks."""
    delays: list[Fraction] = []
    place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    delay = 0
    while place < len(data) and data[place] != 0x3B:
        if data[place] == 0x21:  # an extension
            if data[place + 1 : place + 3] == b"\xf9\x04":
                delay = int.from_bytes(data[place + 4 : place + 6], "little")
            place += 2
        elif data[place] == 0x2C and place + 9 < len(data):  # a frame
            delays.append(_as_browsers(Fraction(delay, 100)))
            delay = 0
            flags = data[place + 9]
            place += 11 + (3 << (flags & 7) + 1 if flags & 128 else 0)
        else:  # as decoders do, go on to what looks like a block
            place += 1
            continue
        while place < len(data) and data[place]:
            place += 1 + data[place]
        place += 1
    return delays


def webp_delays(data: bytes) -> list[Fraction]:
    """Find the delays of the frames of a WebP file in its chunks."""
    delays: list[Fraction] = []
    place = 12
    while place + 8 <= len(data):
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        if data[place : place + 4] == b"ANMF":
            delays.append(_as_browsers(Fraction(int.from_bytes(data[place + 20 : place + 23], "little"), 1000)))
        place += 8 + length + length % 2
    return delays


def avif_delays(path: Path, image: Image.Image) -> list[Fraction]:
    """Find the delays of the frames of an AVIF sequence, exactly from FFmpeg's demuxer."""
    count = getattr(image, "n_frames", 1)
    if count < 2:
        return []
    import av

    options = {"protocol_whitelist": "file"}
    with av.open(str(path.absolute()), "r", options=options) as container:
        for stream in container.streams.video:
            if stream.time_base is None or stream.frames != count:
                continue
            packets = [packet for packet in container.demux(stream) if packet.pts is not None]
            times = sorted(int(packet.pts or 0) for packet in packets)
            if len(times) != count:
                break
            last = int(packets[-1].duration or times[-1] - times[-2])
            steps = [after - before for before, after in zip(times, [*times[1:], times[-1] + last], strict=True)]
            if min(steps) > 0:
                return [step * stream.time_base for step in steps]
            break
    return [Fraction(1, 25)] * count

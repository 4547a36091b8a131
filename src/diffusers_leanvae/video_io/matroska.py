"""Display size of the video in a Matroska or WebM file, which PyAV cannot set."""

import zlib
from fractions import Fraction
from pathlib import Path


# Name of the track that makes room for the display size. Nobody sees it: it is removed again.
ROOM = "room for the display size"

_TRACKS, _TRACK, _VIDEO, _NAME = b"\x16\x54\xae\x6b", b"\xae", b"\xe0", b"\x53\x6e"
_CRC, _VOID = b"\xbf", b"\xec"
_WIDTH, _HEIGHT = b"\xb0", b"\xba"
_DISPLAY_WIDTH, _DISPLAY_HEIGHT, _DISPLAY_UNIT = b"\x54\xb0", b"\x54\xba", b"\x54\xb2"
_MAX_HEADER_BYTES = 1 << 20


def set_pixel_aspect_ratio(path: Path, aspect: Fraction) -> None:
    """Give the pixels of a video their width to height, in a file whose video track is named `ROOM`."""
    with path.open("r+b") as file:
        header = file.read(_MAX_HEADER_BYTES)
        end = header.index(ROOM.encode())
        begin = header.rindex(_TRACKS, 0, end)
        size, length = _size(header, begin + 4)
        content = header[begin + 4 + length : begin + 4 + length + size]
        tracks = [(key, _rebuilt(data, aspect) if key == _TRACK else data) for key, data in _elements(content)]
        rest = b"".join(_element(key, data) for key, data in tracks if key != _CRC)
        has_checksum = any(key == _CRC for key, _ in tracks)
        rest += _void(size - len(rest) - 6 * has_checksum)
        if has_checksum:
            rest = _element(_CRC, zlib.crc32(rest).to_bytes(4, "little")) + rest
        file.seek(begin + 4 + length)
        file.write(rest)


def _rebuilt(track: bytes, aspect: Fraction) -> bytes:
    """Return the content of a track with the display size instead of the name."""
    elements = _elements(track)
    if (_NAME, ROOM.encode()) not in elements:
        return track
    elements.remove((_NAME, ROOM.encode()))
    index = next(index for index, (key, _) in enumerate(elements) if key == _VIDEO)
    video = [(key, data) for key, data in _elements(elements[index][1]) if key != _DISPLAY_UNIT]
    width, height = (int.from_bytes(dict(video)[key], "big") for key in (_WIDTH, _HEIGHT))
    shown = _display_size(width, height, aspect)
    video += [(_DISPLAY_WIDTH, _number(shown[0])), (_DISPLAY_HEIGHT, _number(shown[1]))]
    elements[index] = _VIDEO, b"".join(_element(*element) for element in video)
    return b"".join(_element(*element) for element in elements)


def _display_size(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """Return a width and height in square pixels, of just that ratio where it is near the size of the picture."""
    shown = (Fraction(width), height / aspect) if aspect < 1 else (width * aspect, Fraction(height))
    shape = width * aspect / height
    scale = round(shown[1] / shape.denominator)
    if abs(scale * shape.denominator - shown[1]) <= shown[1] / 2:
        return scale * shape.numerator, scale * shape.denominator
    return round(shown[0]), round(shown[1])


def _elements(content: bytes) -> list[tuple[bytes, bytes]]:
    """Split the content of an element into its children: identifier, content."""
    found, position = [], 0
    while position < len(content):
        length = 9 - content[position].bit_length()
        key = content[position : position + length]
        size, size_length = _size(content, position + length)
        position += length + size_length
        found.append((key, content[position : position + size]))
        position += size
    return found


def _size(content: bytes, position: int) -> tuple[int, int]:
    """Return the size written at a position, and the number of bytes it takes."""
    length = 9 - content[position].bit_length()
    number = int.from_bytes(content[position : position + length], "big")
    return number & ((1 << (7 * length)) - 1), length


def _element(key: bytes, content: bytes) -> bytes:
    length = next(length for length in range(1, 9) if len(content) < (1 << (7 * length)) - 1)
    return key + (len(content) | 1 << (7 * length)).to_bytes(length, "big") + content


def _void(length: int) -> bytes:
    """Return an element without a meaning of so many bytes, 2 or more."""
    size = (0x80 | (length - 2)).to_bytes(1, "big") if length < 128 else b"\x01" + (length - 9).to_bytes(7, "big")
    return (_VOID + size).ljust(length, b"\0")


def _number(value: int) -> bytes:
    return value.to_bytes((value.bit_length() + 7) // 8, "big")

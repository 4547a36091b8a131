"""Pictures for tests, written byte by byte, and read as a whole."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_leanvae.video_io.stills import ImageFrames


def noise(height: int = 20, width: int = 30, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def read(path: Path, **options: Any) -> np.ndarray:
    with ImageFrames(path, **options) as frames:
        (frame,) = frames.arrays_from(0)
        (again,) = frames.arrays_from(0)
    np.testing.assert_array_equal(frame, again)
    assert frame.dtype == np.uint8 and frame.shape == (frames.height, frames.width, 3)
    return frame


def read_all(path: Path, **options: Any) -> list[np.ndarray]:
    with ImageFrames(path, **options) as frames:
        return list(frames.arrays_from(0))


def tiff(width: int, height: int, strip: bytes, bits: int, photometric: int) -> bytes:
    """A little-endian grey TIFF of one strip without compression."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, bits: int = 8, kind: int = 2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))

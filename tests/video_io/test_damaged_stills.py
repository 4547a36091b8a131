"""Pictures that are damaged, cut off, or claim more pixels than there can be."""

import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import noise, png_chunk, png_header, read, read_all, tiff
from PIL import Image

from diffusers_leanvae.video_io import VideoError
from diffusers_leanvae.video_io.stills import MAX_PIXELS, ImageFrames


DAMAGE: list[tuple[str, dict[str, Any]]] = [
    ("x.png", {}),
    ("x.jpg", {}),
    ("x.gif", {"save_all": True}),
    ("x.webp", {"lossless": True}),
    ("anim.webp", {"save_all": True}),
    ("anim.png", {"save_all": True}),
    ("x.tif", {}),
    ("x.tif", {"compression": "tiff_lzw"}),
    ("x.bmp", {}),
    ("x.tga", {}),
    ("x.qoi", {}),
    ("x.jp2", {}),
    ("x.avif", {}),
    ("anim.avif", {"save_all": True}),
    ("x.ppm", {}),
    ("x.sgi", {}),
    ("x.pcx", {}),
]


class TestDamage:
    @pytest.mark.parametrize(("name", "options"), DAMAGE)
    @pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
    def test_truncated(self, tmp_path: Path, name: str, options: dict[str, Any], share: float):
        path = tmp_path / name
        if options.get("save_all"):
            options = options | {"append_images": [Image.fromarray(noise(seed=seed)) for seed in (1, 2)]}
        Image.fromarray(noise()).save(path, **options)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(VideoError, match=r"^Cannot read '[^\n]*\.$"), warnings.catch_warnings():
            warnings.simplefilter("error")
            if len(read_all(path)) < 3 and options.get("save_all"):  # a shorter animation
                raise VideoError("Cannot read 'it' as it was.")

    @pytest.mark.parametrize(("name", "options"), DAMAGE)
    def test_flipped_bits(self, tmp_path: Path, name: str, options: dict[str, Any]):
        path = tmp_path / name
        if options.get("save_all"):
            options = options | {"append_images": [Image.fromarray(noise(seed=seed)) for seed in (1, 2)]}
        Image.fromarray(noise()).save(path, **options)
        content = path.read_bytes()
        rng = np.random.default_rng(0)
        for _ in range(40):
            changed = bytearray(content)
            for place in rng.integers(0, len(content), 4):
                changed[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    read_all(path)
                except VideoError as error:
                    assert str(error).startswith("Cannot read '") and "\n" not in str(error)

    def test_every_bit_of_a_png_counts(self, tmp_path: Path):
        Image.fromarray(noise(4, 5)).save(tmp_path / "x.png")
        content = (tmp_path / "x.png").read_bytes()
        for place in range(8, len(content)):
            changed = bytearray(content)
            changed[place] ^= 16
            (tmp_path / "x.png").write_bytes(changed)
            with pytest.raises(VideoError, match="Cannot read"):
                read(tmp_path / "x.png")

    @pytest.mark.parametrize(
        "suffix", [".png", ".tif", ".webp", ".bmp", ".tga", ".qoi", ".ppm", ".jp2", ".avif", ".sgi"]
    )
    def test_bombs(self, tmp_path: Path, suffix: str):
        side = 100_000
        Image.fromarray(noise()).save(tmp_path / f"x{suffix}")
        content = bytearray((tmp_path / f"x{suffix}").read_bytes())
        if suffix == ".png":
            content = bytearray(png_header(side, side) + png_chunk(b"IDAT", b"x") + png_chunk(b"IEND", b""))
        elif suffix == ".tif":
            content = bytearray(tiff(side, side, b"x", 8, 1))
        elif suffix == ".webp":
            extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (side - 1).to_bytes(3, "little") * 2
            content = bytearray(b"RIFF" + struct.pack("<I", 4 + len(extended)) + b"WEBP" + extended)
        elif suffix == ".bmp":
            content[18:26] = struct.pack("<ii", side, side)
        elif suffix == ".tga":
            side = 65_535
            content[12:16] = struct.pack("<HH", side, side)
        elif suffix == ".qoi":
            content[4:12] = struct.pack(">II", side, side)
        elif suffix == ".ppm":
            content = bytearray(f"P6 {side} {side} 255\n".encode() + bytes(100))
        elif suffix == ".jp2":
            place = content.index(b"ihdr") + 4
            content[place : place + 8] = struct.pack(">II", side, side)
        elif suffix == ".avif":
            place = content.index(b"ispe") + 8
            content[place : place + 8] = struct.pack(">II", side, side)
        elif suffix == ".sgi":
            side = 65_535
            content[6:10] = struct.pack(">HH", side, side)
        (tmp_path / f"x{suffix}").write_bytes(content)
        expected = rf"its header claims {side}x{side} pixels, expected at most {MAX_PIXELS}\.$"
        with pytest.raises(VideoError, match=expected), warnings.catch_warnings():
            warnings.simplefilter("error")
            ImageFrames(tmp_path / f"x{suffix}")

    @pytest.mark.parametrize(
        "make",
        [
            lambda: (
                b"GIF89a"
                + struct.pack("<HH", 65_535, 65_535)
                + b"\0\0\0,"
                + struct.pack("<HHHH", 0, 0, 65_535, 65_535)
                + b"\0\2\2\x4c\1\0;"
            ),
            lambda: (
                b"\xff\xd8\xff\xc0\0\x11\x08"
                + struct.pack(">HH", 65_500, 65_500)
                + bytes.fromhex("03011100021101031101")
                + b"\xff\xd9"
            ),
        ],
        ids=["gif", "jpeg"],
    )
    def test_bombs_by_hand(self, tmp_path: Path, make: Callable[[], bytes]):
        (tmp_path / "x").write_bytes(make())
        with pytest.raises(VideoError, match="its header claims 65[0-9]{3}x65[0-9]{3} pixels"):
            ImageFrames(tmp_path / "x")

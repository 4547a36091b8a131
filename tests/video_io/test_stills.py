"""Pictures and animations, made here with Pillow and PyAV or byte by byte."""

import io
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from pictures import noise, png_chunk, png_header, read, read_all, tiff
from PIL import Image, ImageCms

from diffusers_leanvae.video_io import VideoError, stills
from diffusers_leanvae.video_io.stills import ImageFrames, can_read


Transpose = Image.Transpose
# What EXIF says has to be done with the stored pixels.
UPRIGHT = {
    1: [],
    2: [Transpose.FLIP_LEFT_RIGHT],
    3: [Transpose.ROTATE_180],
    4: [Transpose.FLIP_TOP_BOTTOM],
    5: [Transpose.TRANSPOSE],
    6: [Transpose.ROTATE_270],  # Pillow counts counter-clockwise
    7: [Transpose.TRANSVERSE],
    8: [Transpose.ROTATE_90],
}


def wide_noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 65536, shape).astype(np.uint16)


def to_8_bits(wide: np.ndarray) -> np.ndarray:
    return np.rint(wide / 257).astype(np.uint8)


def over(pixels: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(pixels * share + np.array(background) * (1 - share)).astype(np.uint8)


def write_by_ffmpeg(path: Path, codec: str, pixels: np.ndarray, pixel_format: str) -> None:
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream(codec, rate=1)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = pixel_format
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=pixel_format)
        container.mux([*stream.encode(frame), *stream.encode()])


class TestFormats:
    @pytest.mark.parametrize(
        ("name", "options", "codec"),
        [
            ("x.png", {}, "png"),
            ("x.bmp", {}, "bmp"),
            ("x.tif", {}, "tiff"),
            ("x.tiff", {"compression": "tiff_lzw"}, "tiff"),
            ("x.tif", {"compression": "tiff_deflate"}, "tiff"),
            ("x.tif", {"compression": "packbits"}, "tiff"),
            ("x.ppm", {}, "ppm"),
            ("x.qoi", {}, "qoi"),
            ("x.sgi", {}, "sgi"),
            ("x.pcx", {}, "pcx"),
            ("x.tga", {}, "tga"),
            ("x.tga", {"compression": "tga_rle"}, "tga"),
            ("x.webp", {"lossless": True}, "webp"),
            ("x.jp2", {}, "jpeg2000"),
            ("x.j2k", {}, "jpeg2000"),
            ("x.gif", {}, "gif"),
        ],
    )
    def test_lossless(self, tmp_path: Path, name: str, options: dict[str, Any], codec: str):
        pixels = noise()
        if codec == "gif":  # 256 colours
            pixels = np.repeat(pixels[..., :1], 3, axis=-1)
        Image.fromarray(pixels).save(tmp_path / name, **options)
        assert can_read(tmp_path / name)
        with ImageFrames(tmp_path / name) as frames:
            assert (frames.codec, frames.width, frames.height, frames.num_frames) == (codec, 30, 20, 1)
            assert (frames.times, frames.duration, frames.is_animated) == ([Fraction(0)], None, False)
        np.testing.assert_array_equal(read(tmp_path / name), pixels)

    @pytest.mark.parametrize(("suffix", "bound"), [(".jpg", 16), (".avif", 12)])  # measured 4 and 3
    def test_lossy(self, tmp_path: Path, suffix: str, bound: int):
        pixels = np.asarray(Image.fromarray(noise(5, 8)).resize((80, 50), Image.Resampling.BICUBIC))
        path = tmp_path / f"x{suffix}"
        Image.fromarray(pixels).save(path, quality=100, subsampling="4:4:4")
        assert np.abs(read(path).astype(int) - pixels).max() <= bound

    def test_png_and_jpeg_as_ffmpeg(self, tmp_path: Path):
        def read_by_ffmpeg(path: Path) -> np.ndarray:
            with av.open(str(path)) as container:
                return next(container.decode(video=0)).to_ndarray(format="rgb24")

        pixels = np.asarray(Image.fromarray(noise(5, 8)).resize((80, 50), Image.Resampling.BICUBIC))
        for suffix in (".png", ".jpg"):
            path = tmp_path / f"x{suffix}"
            Image.fromarray(pixels).save(path, quality=90, subsampling="4:4:4")
            difference = np.abs(read(path).astype(int) - read_by_ffmpeg(path)).max()
            assert difference <= {".png": 0, ".jpg": 8}[suffix]  # another IDCT, and swscale's rounding: measured 2

    @pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate"])
    def test_first_page_of_a_tiff(self, tmp_path: Path, compression: str | None):
        pages = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
        pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:], compression=compression)
        np.testing.assert_array_equal(read(tmp_path / "x.tif"), noise(seed=0))

    def test_content_decides(self, tmp_path: Path):
        Image.fromarray(noise()).save(tmp_path / "x.jpg", quality=100)
        (tmp_path / "x.png").write_bytes((tmp_path / "x.jpg").read_bytes())
        np.testing.assert_array_equal(read(tmp_path / "x.png"), read(tmp_path / "x.jpg"))
        for name, content in {
            "text.png": b"no picture at all",
            "empty.png": b"",
            "clip.mp4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(40),
            "film.heic": b"\0\0\0\x18ftyphevc\0\0\0\0msf1hevc" + bytes(40),
            "film.mj2": b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypmjp2" + bytes(40),
            "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        }.items():
            (tmp_path / name).write_bytes(content)
            assert not can_read(tmp_path / name), name
            with pytest.raises(VideoError, match=rf"^Cannot read '.*{name}': it is no picture of a known format\.$"):
                ImageFrames(tmp_path / name)
        assert not can_read(tmp_path / "missing.png")
        assert not can_read(tmp_path)
        with pytest.raises(VideoError, match="the file does not exist"):
            ImageFrames(tmp_path / "missing.png")

    def test_heic_without_its_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        path = tmp_path / "photo.heic"
        for brand in (b"heic", b"mif1"):
            path.write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(40))
            assert can_read(path)  # or FFmpeg would take a tile for the picture
            with pytest.raises(VideoError, match=r"need pillow-heif: pip install \"diffusers-leanvae\[heif\]\"\.$"):
                ImageFrames(path)

    def test_heic(self, tmp_path: Path):
        heif = pytest.importorskip("pillow_heif", reason="the extra `heif` is not installed")
        pixels = np.asarray(Image.fromarray(noise(5, 8)).resize((160, 100), Image.Resampling.BICUBIC))
        heif.from_bytes("RGB", (160, 100), pixels.tobytes()).save(tmp_path / "x.heic", quality=100, chroma=444)
        with ImageFrames(tmp_path / "x.heic") as frames:
            assert (frames.codec, frames.pixel_format, frames.rotation) == ("heif", "rgb24", 0)
        assert np.abs(read(tmp_path / "x.heic").astype(int) - pixels).max() <= 20  # measured 5
        content = (tmp_path / "x.heic").read_bytes()
        (tmp_path / "x.heic").write_bytes(content[: len(content) // 2])
        with pytest.raises(VideoError, match="Cannot read"):
            read(tmp_path / "x.heic")

    def test_high_dynamic_range_is_left_to_ffmpeg(self, tmp_path: Path):
        for suffix in (".avif", ".png"):
            Image.fromarray(noise()).save(tmp_path / f"x{suffix}")
        avif, png = (tmp_path / "x.avif").read_bytes(), (tmp_path / "x.png").read_bytes()
        place = avif.index(b"colrnclx") + 10
        for transfer in (13, 16, 18):  # sRGB, PQ and HLG
            changed = avif[:place] + struct.pack(">H", transfer) + avif[place + 2 :]
            (tmp_path / "x.avif").write_bytes(changed)
            (tmp_path / "x.png").write_bytes(png[:33] + png_chunk(b"cICP", bytes([9, transfer, 0, 1])) + png[33:])
            assert can_read(tmp_path / "x.avif") == can_read(tmp_path / "x.png") == (transfer == 13)


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize(
        ("suffix", "options"),
        [
            (".jpg", {"quality": 100}),
            (".png", {}),
            (".webp", {"lossless": True}),
            (".tif", {}),
            (".tif", {"compression": "tiff_lzw"}),
            (".avif", {}),
        ],
    )
    def test_upright(self, tmp_path: Path, suffix: str, options: dict[str, Any], orientation: int):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(noise()).save(tmp_path / f"plain{suffix}", **options)
        Image.fromarray(noise()).save(tmp_path / f"turned{suffix}", exif=exif, **options)
        expected = Image.fromarray(read(tmp_path / f"plain{suffix}"))
        for step in UPRIGHT[orientation]:
            expected = expected.transpose(step)
        with ImageFrames(tmp_path / f"turned{suffix}") as frames:
            assert (frames.width, frames.height) == expected.size
            assert frames.rotation == {3: 180, 6: 90, 8: 270}.get(orientation, 0)
        np.testing.assert_array_equal(read(tmp_path / f"turned{suffix}"), np.asarray(expected))

    def test_exif_behind_the_pixels_of_a_png(self, tmp_path: Path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(noise()).save(tmp_path / "x.png")
        content = (tmp_path / "x.png").read_bytes()
        chunk = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        (tmp_path / "x.png").write_bytes(content[:-12] + chunk + content[-12:])
        np.testing.assert_array_equal(read(tmp_path / "x.png"), np.rot90(noise(), -1))

    def test_broken_exif_does_not_matter(self, tmp_path: Path):
        for suffix in (".png", ".webp"):
            Image.fromarray(noise()).save(
                tmp_path / f"x{suffix}", lossless=True, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"
            )
            np.testing.assert_array_equal(read(tmp_path / f"x{suffix}"), noise())


class TestBits:
    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_16_bits(self, tmp_path: Path, suffix: str, channels: int):
        order = {".png": "be", ".tif": "le"}[suffix]
        wide = wide_noise(20, 30, channels)
        wide[0, :4] = np.array([0, 128, 129, 65535])[:, None]  # 129 is the first that is nearer to 257
        pixel_format = {1: "gray16", 3: "rgb48", 4: "rgba64"}[channels] + order
        path = tmp_path / f"x{suffix}"
        write_by_ffmpeg(
            path, suffix[1:] + "f" * (suffix == ".tif"), wide.squeeze(-1) if channels == 1 else wide, pixel_format
        )
        narrow = to_8_bits(wide)
        expected = over(narrow[..., :3], narrow[..., 3], (1, 2, 3)) if channels == 4 else np.tile(narrow, 3)[..., :3]
        np.testing.assert_array_equal(read(path, background=(1, 2, 3)), expected)
        with ImageFrames(path) as frames:
            assert frames.pixel_format == ("gray16le" if channels == 1 else pixel_format)

    def test_16_bits_turned(self, tmp_path: Path):
        wide = wide_noise(20, 30, 3)
        write_by_ffmpeg(tmp_path / "x.png", "png", wide, "rgb48be")
        content, exif = (tmp_path / "x.png").read_bytes(), Image.Exif()
        exif[0x0112] = 8
        chunk = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        (tmp_path / "x.png").write_bytes(content[:33] + chunk + content[33:])
        np.testing.assert_array_equal(read(tmp_path / "x.png"), np.rot90(to_8_bits(wide)))

    def test_16_bits_with_alpha_in_gray(self, tmp_path: Path):
        wide = wide_noise(20, 30, 2)
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
        content = png_header(30, 20, 16, 4) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
        (tmp_path / "x.png").write_bytes(content)
        narrow = to_8_bits(wide)
        expected = over(np.repeat(narrow[..., :1], 3, axis=-1), narrow[..., 1], (255, 255, 255))
        np.testing.assert_array_equal(read(tmp_path / "x.png"), expected)

    @pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3)])
    def test_16_bits_with_a_transparent_color(self, tmp_path: Path, kind: int, channels: int):
        wide = wide_noise(20, 30, channels)
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
        key = png_chunk(b"tRNS", wide[3, 4].astype(">u2").tobytes())
        content = (
            png_header(30, 20, 16, kind) + key + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
        )
        (tmp_path / "x.png").write_bytes(content)
        expected = np.tile(to_8_bits(wide), 3)[..., :3]
        expected[(wide == wide[3, 4]).all(axis=-1)] = (9, 8, 7)
        np.testing.assert_array_equal(read(tmp_path / "x.png", background=(9, 8, 7)), expected)

    def test_gray_of_a_tiff(self, tmp_path: Path):
        wide = wide_noise(4, 6)
        (tmp_path / "black_is_zero.tif").write_bytes(tiff(6, 4, wide.astype("<u2").tobytes(), 16, 1))
        (tmp_path / "white_is_zero.tif").write_bytes(tiff(6, 4, wide.astype("<u2").tobytes(), 16, 0))
        np.testing.assert_array_equal(read(tmp_path / "black_is_zero.tif")[..., 1], to_8_bits(wide))
        np.testing.assert_array_equal(read(tmp_path / "white_is_zero.tif")[..., 1], to_8_bits(65535 - wide))
        # Two numbers of 12 bits in three bytes: 0, 4095, 2048, 1
        (tmp_path / "12_bits.tif").write_bytes(tiff(4, 1, bytes.fromhex("000fff800001"), 12, 1))
        np.testing.assert_array_equal(read(tmp_path / "12_bits.tif")[0, :, 0], [0, 255, 128, 0])

    def test_one_bit_and_large_numbers(self, tmp_path: Path):
        Image.fromarray(noise(channels=1)).convert("1").save(tmp_path / "x.png")
        assert set(np.unique(read(tmp_path / "x.png"))) == {0, 255}
        (tmp_path / "x.pgm").write_bytes(b"P5 2 1 1023\n" + struct.pack(">HH", 1023, 512))
        np.testing.assert_array_equal(read(tmp_path / "x.pgm")[0, :, 0], [255, 128])
        for mode in ("I", "F"):
            Image.new(mode, (4, 3), 1).save(tmp_path / "x.tif")
            with pytest.raises(VideoError, match="numbers of which none is white, expected 16 bits"):
                ImageFrames(tmp_path / "x.tif")


class TestTransparency:
    @pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    @pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
    def test_alpha(self, tmp_path: Path, mode: str, suffix: str, background: tuple[int, int, int]):
        pixels = noise(channels=len(mode))
        pixels[0, :, -1] = 0  # colours that are hidden
        Image.fromarray(pixels).save(tmp_path / f"x{suffix}", lossless=True, exact=True)
        colors = pixels[..., :3] if mode == "RGBA" else np.repeat(pixels[..., :1], 3, axis=-1)
        expected = over(colors, pixels[..., -1], background)
        np.testing.assert_array_equal(read(tmp_path / f"x{suffix}", background=background), expected)
        assert (expected[0] == background).all()

    def test_transparent_colors(self, tmp_path: Path):
        gray = np.arange(12, dtype=np.uint8).reshape(3, 4)
        expected = np.repeat(gray[..., None], 3, axis=-1)
        expected[1, 1] = 77
        for mode in ("L", "RGB"):
            key = 5 if mode == "L" else (5, 5, 5)
            Image.fromarray(gray).convert(mode).save(tmp_path / "x.png", transparency=key)
            np.testing.assert_array_equal(read(tmp_path / "x.png", background=(77, 77, 77)), expected)
        image = Image.fromarray(gray).convert("P", palette=Image.Palette.ADAPTIVE)
        index = image.getpixel((1, 1))
        for suffix in (".png", ".gif"):
            image.save(tmp_path / f"x{suffix}", transparency=index)
            np.testing.assert_array_equal(read(tmp_path / f"x{suffix}", background=(77, 77, 77)), expected)
        alpha = np.full(256, 255, np.uint8)
        alpha[index] = 128
        image.save(tmp_path / "x.png", transparency=alpha.tobytes())
        expected[1, 1] = round((5 * 128 + 77 * 127) / 255)
        np.testing.assert_array_equal(read(tmp_path / "x.png", background=(77, 77, 77)), expected)

    @pytest.mark.parametrize("background", [(1, 2), (256, 0, 0), (0.5, 0, 0)])
    def test_background_is_checked(self, tmp_path: Path, background: Any):
        with pytest.raises(VideoError, match="`background` must be three whole numbers from 0 to 255, got"):
            ImageFrames(tmp_path / "x.png", background=background)


def matrix_profile(primaries: np.ndarray, gamma: float = 2.2) -> bytes:
    """An ICC profile of a display: columns of `primaries` are XYZ (D50) of red, green and blue."""
    number = lambda value: struct.pack(">i", round(value * 65536))  # noqa: E731
    white = np.array([0.9642, 1.0, 0.8249])
    points = {b"wtpt": white, b"rXYZ": primaries[:, 0], b"gXYZ": primaries[:, 1], b"bXYZ": primaries[:, 2]}
    tags = {name: b"XYZ \0\0\0\0" + b"".join(map(number, point)) for name, point in points.items()}
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags |= {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(78 + 1)
    tags[b"cprt"] = b"text\0\0\0\0none\0\0\0\0"
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    size = place + len(body)
    header = struct.pack(">I4sI4s4s4s12x4s4s", size, b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp", b"MSFT")
    header = header.ljust(68, b"\0") + b"".join(map(number, white))
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


class TestColor:
    def test_profile_is_applied(self, tmp_path: Path):
        srgb = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
        wide = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])  # Display P3
        pixels = noise(seed=3) // 2 + 60
        linear = (pixels / 255) ** (563 / 256) @ (np.linalg.inv(srgb) @ wide).T
        linear = linear.clip(0, 1)
        encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        for name in ("x.png", "x.tif", "x.webp"):
            Image.fromarray(pixels).save(tmp_path / name, icc_profile=matrix_profile(wide), lossless=True)
            converted = read(tmp_path / name).astype(int)
            assert np.abs(converted - 255 * encoded).max() <= 2.2  # measured 0.54
            assert np.abs(converted - pixels).max() > 20  # so that this test can fail

    def test_profile_with_alpha_and_16_bits(self, tmp_path: Path):
        wide = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
        profile = matrix_profile(wide)
        Image.fromarray(noise()).save(tmp_path / "rgb.png", icc_profile=profile)
        opaque = read(tmp_path / "rgb.png")
        pixels = np.dstack([noise(), noise(channels=1, seed=2)])
        Image.fromarray(pixels).save(tmp_path / "rgba.png", icc_profile=profile)
        expected = over(opaque, pixels[..., 3], (255, 255, 255))
        np.testing.assert_array_equal(read(tmp_path / "rgba.png"), expected)

    def test_transform_is_built_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        profile = matrix_profile(np.array([[0.5, 0.3, 0.16], [0.25, 0.68, 0.07], [0.0, 0.04, 0.78]]))
        paths = [tmp_path / f"{number}.png" for number in range(3)]
        for path in paths:
            Image.fromarray(noise()).save(path, icc_profile=profile)
        build, calls = ImageCms.buildTransform, []
        monkeypatch.setattr(ImageCms, "buildTransform", lambda *args: calls.append(args[2]) or build(*args))
        with ImageFrames(paths) as frames:
            first, *others = frames.arrays_from(0)
        assert calls == ["RGB"] and all(np.array_equal(first, other) for other in others)
        assert np.abs(first.astype(int) - noise()).max() > 5

    @pytest.mark.parametrize("kind", ["sRGB", "broken", "of other pixels"])
    def test_profile_is_left_out(self, tmp_path: Path, kind: str):
        profile = ImageCms.ImageCmsProfile(
            ImageCms.createProfile("LAB" if kind == "of other pixels" else "sRGB")
        ).tobytes()
        Image.fromarray(noise()).save(tmp_path / "x.png", icc_profile=profile[:200] if kind == "broken" else profile)
        np.testing.assert_array_equal(read(tmp_path / "x.png"), noise())

    def test_cmyk(self, tmp_path: Path):
        ink = np.zeros((16, 80, 4), np.uint8)  # flat squares, which JPEG keeps
        for number, color in enumerate(
            [(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255), (40, 90, 200, 30), (0, 255, 255, 0)]
        ):
            ink[:, 16 * number : 16 * (number + 1)] = color
        expected = np.rint((255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:]) / 255)
        image = Image.frombytes("CMYK", (80, 16), ink.tobytes())
        for name in ("x.tif", "x.jpg"):  # Pillow writes JPEG as Adobe does, inverted
            image.save(tmp_path / name, quality=100, subsampling=0)
            with ImageFrames(tmp_path / name) as frames:
                assert frames.pixel_format == "cmyk"
            assert np.abs(read(tmp_path / name) - expected).max() <= {"x.tif": 0, "x.jpg": 4}[name]  # measured 0

    def test_lab_and_ycbcr(self, tmp_path: Path):
        colors = np.array([[(255, 255, 255), (0, 0, 0), (119, 119, 119), (200, 30, 40)]], np.uint8)
        image = Image.fromarray(colors.repeat(8, axis=0).repeat(8, axis=1))
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        in_lab = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
        assert in_lab is not None
        in_lab.save(tmp_path / "lab.tif")
        image.convert("YCbCr").save(tmp_path / "ycbcr.tif")
        for name in ("lab.tif", "ycbcr.tif"):
            assert np.abs(read(tmp_path / name).astype(int) - np.asarray(image)).max() <= 8  # measured 2


def animation(count: int = 4, channels: int = 3) -> list[Image.Image]:
    frames = []
    for number in range(count):
        pixels = np.zeros((24, 32, channels), np.uint8)
        pixels[..., :3] = (0, 60 * number, 255)
        pixels[4:12, 6 * number : 6 * number + 8, :3] = (255, 0, 0)
        if channels == 4:
            pixels[..., 3] = 255
            pixels[16:, :, 3] = 0
        frames.append(Image.fromarray(pixels))
    return frames


class TestAnimation:
    @pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".avif"])
    @pytest.mark.parametrize("channels", [3, 4])
    def test_frames_and_delays(self, tmp_path: Path, suffix: str, channels: int):
        pictures, path = animation(channels=channels), tmp_path / f"x{suffix}"
        delays = [40, 100, 250, 60]
        options = {".webp": {"lossless": True}, ".avif": {"quality": 100, "subsampling": "4:4:4"}}.get(suffix, {})
        if suffix == ".gif":
            options = {"disposal": 2}
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=delays, **options)
        with ImageFrames(path, background=(20, 30, 40)) as frames:
            assert frames.is_animated and frames.num_frames == 4
            assert frames.times == [Fraction(0), Fraction(40, 1000), Fraction(140, 1000), Fraction(390, 1000)]
            assert frames.duration == Fraction(450, 1000)
            found = list(frames.arrays_from(0))
            for index in (2, 0, 3):  # in any order
                for frame, expected in zip(frames.arrays_from(index), found[index:], strict=True):
                    np.testing.assert_array_equal(frame, expected)
        bound = 12 if suffix == ".avif" else 0  # measured 3
        for frame, picture in zip(found, pictures, strict=True):
            expected = np.asarray(picture)
            if channels == 4:
                expected = over(expected[..., :3], expected[..., 3], (20, 30, 40))
            assert np.abs(frame.astype(int) - expected).max() <= bound

    @pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
    @pytest.mark.parametrize(("delay", "expected"), [(0, 100), (10, 100), (20, 20)])
    def test_short_delays(self, tmp_path: Path, suffix: str, delay: int, expected: int):
        pictures, path = animation(), tmp_path / f"x{suffix}"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=delay)
        with ImageFrames(path) as frames:
            assert frames.times == [Fraction(number * expected, 1000) for number in range(4)]

    def test_exact_times_of_avif(self, tmp_path: Path):
        # 30 frames per second, which whole milliseconds cannot say.
        with av.open(str(tmp_path / "x.avif"), "w", format="avif") as container:
            stream = container.add_stream("libsvtav1", rate=30)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for level in (10, 100, 200, 250):
                container.mux(
                    stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), "rgb24"))
                )
            container.mux(stream.encode())
        with ImageFrames(tmp_path / "x.avif") as frames:
            assert frames.times == [Fraction(number, 30) for number in range(4)]
            assert frames.duration == Fraction(4, 30)
            levels = [float(frame.mean()) for frame in frames.arrays_from(0)]
        np.testing.assert_allclose(levels, [10, 100, 200, 250], rtol=0, atol=4)  # measured 1

    def test_first_picture_of_an_apng_may_stand_apart(self, tmp_path: Path):
        pictures, path = animation(), tmp_path / "x.png"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], default_image=True, duration=50)
        with ImageFrames(path) as frames:
            assert frames.num_frames == 3
            found = list(frames.arrays_from(0))
        for frame, picture in zip(found, pictures[1:], strict=True):
            np.testing.assert_array_equal(frame, np.asarray(picture))

    def test_frames_outside_of_the_screen_of_a_gif(self, tmp_path: Path):
        pictures = animation()
        pictures[0].save(tmp_path / "x.gif", save_all=True, append_images=pictures[1:], duration=50)
        content = bytearray((tmp_path / "x.gif").read_bytes())
        content[6:10] = struct.pack("<HH", 16, 12)  # the first frame makes room for itself, as in browsers
        (tmp_path / "x.gif").write_bytes(content)
        assert {frame.shape for frame in read_all(tmp_path / "x.gif")} == {(24, 32, 3)}


class TestSequence:
    def test_pictures_in_order(self, tmp_path: Path):
        paths = [tmp_path / name for name in ("b.png", "a.bmp", "c.webp")]
        for seed, path in enumerate(paths):
            Image.fromarray(noise(seed=seed)).save(path, lossless=True)
        with ImageFrames(paths) as frames:
            assert (frames.num_frames, frames.is_animated) == (3, False)
            assert frames.times == [Fraction(number, 25) for number in range(3)]
            assert frames.duration == Fraction(3, 25)
            for start in (0, 2):
                for seed, frame in enumerate(frames.arrays_from(start), start):
                    np.testing.assert_array_equal(frame, noise(seed=seed))

    def test_sizes_must_agree(self, tmp_path: Path):
        Image.fromarray(noise()).save(tmp_path / "a.png")
        Image.fromarray(noise(8, 9)).save(tmp_path / "b.png")
        with ImageFrames([tmp_path / "a.png", tmp_path / "b.png"]) as frames:
            images = frames.arrays_from(0)
            next(images)
            with pytest.raises(VideoError, match=r"b\.png': it has 9x8 pixels, expected 30x20 as in '.*a\.png'\.$"):
                next(images)
        with pytest.raises(VideoError, match="`files` must name at least one picture, got none"):
            ImageFrames([])

    @pytest.mark.parametrize("stop", [None, 6])
    @pytest.mark.parametrize("num_at_once", [1, 2, 4])
    def test_threads_change_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_at_once: int, stop: int | None
    ):
        monkeypatch.setattr(stills, "count_cores", lambda: 4)
        paths = [tmp_path / f"{number}.png" for number in range(9)]
        pictures = [noise(seed=number) for number in range(9)]
        for path, pixels in zip(paths, pictures, strict=True):
            Image.fromarray(pixels).save(path)
        paths[7].write_bytes(b"damaged")
        num_before = threading.active_count()
        with ImageFrames(paths) as frames:
            arrays = frames.arrays_from(2, stop, num_at_once)
            for number in range(2, stop or 7):
                np.testing.assert_array_equal(next(arrays), pictures[number])
                assert threading.active_count() == num_before  # nothing works while the caller does
            with pytest.raises(
                VideoError if stop is None else StopIteration
            ):  # when its turn has come, and not before
                next(arrays)
            assert list(frames.arrays_from(9, None, num_at_once)) == []

    def test_threads_are_as_many_as_fit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        for number in range(5):
            Image.fromarray(noise(seed=number)).save(tmp_path / f"{number}.png")
        used = []

        def note(self: ImageFrames, numbers: range, num_threads: int, num_at_once: int) -> Iterator[np.ndarray]:
            used.append(num_threads)
            return map(self._read, numbers)

        monkeypatch.setattr(ImageFrames, "_read_by_threads", note)
        monkeypatch.setattr(stills, "count_cores", lambda: 8)
        with ImageFrames(sorted(tmp_path.iterdir())) as frames:
            for at_once, num_bytes in ((16, 1 << 30), (3, 1 << 30), (16, 35 * 600 * 2), (1, 1 << 30), (16, 1)):
                monkeypatch.setattr(stills, "_BYTES_AT_ONCE", num_bytes)
                next(frames.arrays_from(0, None, at_once))
        assert used == [4, 3, 2]

    def test_closed(self, tmp_path: Path):
        Image.fromarray(noise()).save(tmp_path / "a.png")
        frames = ImageFrames(tmp_path / "a.png")
        frames.close()
        with pytest.raises(VideoError, match="the reader is closed"):
            next(frames.arrays_from(0))


def test_large_pictures_are_read_without_a_warning(tmp_path: Path):
    # More than Pillow warns of, and less than `MAX_PIXELS`: what a phone takes.
    Image.new("1", (16_000, 12_000)).save(tmp_path / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ImageFrames(tmp_path / "x.png") as frames:
            assert (frames.width, frames.height) == (16_000, 12_000)


def test_threads(tmp_path: Path):
    pictures = animation(channels=4)
    pictures[0].save(tmp_path / "x.webp", save_all=True, append_images=pictures[1:], lossless=True)
    Image.fromarray(noise()).save(tmp_path / "x.png", icc_profile=io.BytesIO(matrix_profile(np.eye(3))).getvalue())
    expected = {name: read_all(tmp_path / name) for name in ("x.webp", "x.png")}
    with ThreadPoolExecutor(4) as pool:
        for name in ("x.webp", "x.png"):
            for frames in pool.map(read_all, [tmp_path / name] * 24):
                for frame, other in zip(frames, expected[name], strict=True):
                    np.testing.assert_array_equal(frame, other)

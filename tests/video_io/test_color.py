"""Colours of what is read, against formulas in float64 that are written down here once more."""

import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from diffusers_leanvae.video_io import VideoError, VideoReader, probe_video, read_video
from diffusers_leanvae.video_io.color import Color, to_sdr
from diffusers_leanvae.video_io.decoding import Progressive, RgbConverter


WEIGHTS = {"bt709": (0.2126, 0.0722), "bt601": (0.299, 0.114), "bt2020": (0.2627, 0.0593), "smpte240m": (0.212, 0.087)}
TAGS = {"bt709": 1, "bt601": 5, "bt2020": 9, "smpte240m": 7}
# BT.2020 to BT.709 in linear light: BT.2087, with more digits.
TO_709 = np.array(
    [
        [1.66049100, -0.58764114, -0.07284986],
        [-0.12455047, 1.13289990, -0.00834942],
        [-0.01815076, -0.10057890, 1.11872966],
    ]
)


def patches(depth: int, seed: int = 0) -> list[np.ndarray]:
    """Random codes of three planes, constant in 4x4 blocks, illegal ones among them, and a grey ramp."""
    codes = np.random.default_rng(seed).integers(0, 1 << depth, (3, 32, 32))
    codes[:, 0] = np.stack([np.linspace(0, (1 << depth) - 1, 32).astype(int), *[np.full(32, 128 << (depth - 8))] * 2])
    return [plane.repeat(4, 0).repeat(4, 1) for plane in codes]


def frame_of(pixel_format: str, planes: list[np.ndarray], size: tuple[int, int] | None = None) -> av.VideoFrame:
    height, width = size or planes[0].shape
    frame = av.VideoFrame(width, height, pixel_format)
    dtype = np.dtype(np.uint8 if frame.format.components[0].bits == 8 else "<u2")
    for plane, codes in zip(frame.planes, planes, strict=True):
        rows, columns = height // plane.height, width // plane.width
        padded = np.zeros((plane.height, plane.line_size // dtype.itemsize), dtype)
        padded[:, : plane.width] = codes[::rows, ::columns][: plane.height, : plane.width]
        plane.update(padded.tobytes())
    frame.pts, frame.time_base = 0, Fraction(1, 25)
    return frame


def expected(planes: list[np.ndarray], depth: int, matrix: str, is_full: bool) -> np.ndarray:
    """Levels that need not be whole, from the definitions of BT.601, BT.709 and BT.2020."""
    unit, top = 2.0 ** (depth - 8), 2**depth - 1
    y, cb, cr = (plane.astype(np.float64) for plane in planes)
    y = y / top if is_full else (y - 16 * unit) / (219 * unit)
    cb, cr = ((plane - 128 * unit) / (top if is_full else 224 * unit) for plane in (cb, cr))
    kr, kb = WEIGHTS[matrix]
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    return np.clip(np.stack([red, green, blue], -1), 0, 1) * 255


def converted(frame: av.VideoFrame) -> np.ndarray:
    progressive = Progressive(RgbConverter((255, 255, 255)))
    (picture,) = progressive.push(frame) + progressive.push(None)
    out = torch.empty(frame.height, frame.width, 3, dtype=torch.uint8)  # none is turned here
    picture.write(out)
    return out.numpy().astype(np.float64)


class TestMatrixAndRange:
    @pytest.mark.parametrize(
        ("depth", "sampling"),
        [*itertools.product([8, 10, 12], ["420", "422", "444"]), (9, "420"), (14, "444"), (16, "444")],
    )
    @pytest.mark.parametrize("matrix", WEIGHTS)
    @pytest.mark.parametrize("is_full", [False, True])
    def test_within_half_a_level(self, depth: int, sampling: str, matrix: str, is_full: bool):
        planes = patches(depth)
        frame = frame_of(f"yuv{sampling}p" + (f"{depth}le" if depth > 8 else ""), planes)
        frame.colorspace, frame.color_range = TAGS[matrix], 2 if is_full else 1
        difference = converted(frame) - expected(planes, depth, matrix, is_full)
        assert np.abs(difference).max() < 0.52  # 0.505 measured: rounded
        assert abs(difference.mean()) < 0.04  # no bias; 0.01 measured

    @pytest.mark.parametrize(
        ("planar", "packed"),
        [
            ("yuv420p", "nv12"),
            ("yuv422p", "uyvy422"),
            ("yuv422p", "yuyv422"),
            ("yuv420p10le", "p010le"),
            ("yuv422p10le", "y210le"),
            ("yuv444p12le", "xv36le"),
            ("yuv420p10le", "yuv420p10be"),
        ],
    )
    def test_other_layouts(self, planar: str, packed: str):
        depth = av.VideoFormat(planar).components[0].bits
        planes = patches(depth)
        graph = av.filter.Graph()
        frame = frame_of(planar, planes)
        source = graph.add_buffer(width=128, height=128, format=planar, time_base=Fraction(1, 25))
        same = "in_range=pc:out_range=pc:in_color_matrix=bt709:out_color_matrix=bt709:flags=accurate_rnd+neighbor"
        graph.link_nodes(source, graph.add("scale", same), graph.add("format", packed), graph.add("buffersink"))
        graph.configure()
        graph.vpush(frame)
        frame = graph.vpull()
        assert frame.format.name == packed
        frame.colorspace, frame.color_range = 9, 1
        assert np.abs(converted(frame) - expected(planes, depth, "bt2020", False)).max() < 0.52

    @pytest.mark.parametrize(
        ("size", "matrix"), [((48, 64), "bt601"), ((576, 720), "bt601"), ((720, 64), "bt709"), ((48, 1280), "bt709")]
    )
    def test_untagged(self, tmp_path: Path, size: tuple[int, int], matrix: str):
        planes = [np.full(size, code) for code in (120, 90, 180)]
        path = write(tmp_path / "a.mkv", frame_of("yuv420p", planes, size))
        difference = read_video(path)[0][0].numpy() - expected(planes, 8, matrix, False)
        assert np.abs(difference).max() < 0.52
        info = probe_video(path)
        assert (info.matrix, info.color_range, info.primaries, info.transfer) == (matrix, "limited", "bt709", "bt709")

    def test_full_range_formats(self):
        planes = patches(8)
        assert np.abs(converted(frame_of("yuvj420p", planes)) - expected(planes, 8, "bt601", True)).max() < 0.52

    @pytest.mark.parametrize("depth", [8, 10, 16])
    @pytest.mark.parametrize("is_full", [False, True])
    def test_grey(self, depth: int, is_full: bool):
        plane = patches(depth)[:1]
        frame = frame_of("gray" + (f"{depth}le" if depth > 8 else ""), plane)
        frame.color_range = 0 if is_full else 1
        neutral = np.full_like(plane[0], 128 << (depth - 8))
        assert np.abs(converted(frame) - expected([*plane, neutral, neutral], depth, "bt709", is_full)).max() < 0.51

    @pytest.mark.parametrize("depth", [10, 12, 16])
    def test_deep_rgb(self, depth: int):
        planes = patches(depth)
        out = converted(frame_of(f"gbrp{depth}le", planes))
        assert np.abs(out - np.stack([planes[2], planes[0], planes[1]], -1) * 255 / (2**depth - 1)).max() < 0.51

    def test_stored_rgb_is_exact(self):
        pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
        for pixel_format in ("rgb24", "bgr24", "gbrp", "rgb0", "bgra"):
            frame = av.VideoFrame.from_ndarray(pixels).reformat(format=pixel_format)
            frame.pts, frame.time_base = 0, Fraction(1, 25)
            assert np.array_equal(converted(frame), pixels)

    def test_ycgco(self):
        y, cg, co = patches(8)
        frame = frame_of("yuv444p", [y, cg, co])
        frame.colorspace, frame.color_range = 8, 2
        cg, co = cg - 128.0, co - 128.0
        want = np.clip(np.stack([y - cg + co, y + cg, y - cg - co], -1), 0, 255)
        assert np.abs(converted(frame) - want).max() < 0.51

    def test_unsupported_matrix(self, tmp_path: Path):
        path = write(tmp_path / "a.mkv", frame_of("yuv420p", patches(8)), colorspace=14)
        with pytest.raises(VideoError, match="a.mkv': its colour matrix is ictcp, and only"):
            probe_video(path)


def write(path: Path, frame: av.VideoFrame, codec: str = "ffv1", **tags: int) -> Path:
    """Write frames without loss; tags as attributes of the codec."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
            setattr(frame, name, value)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_chain_is_stable(tmp_path: Path):
    """Ten passes of reading, averaging chroma, a lossless codec."""
    y, x = np.mgrid[0:96, 0:128]
    start = np.stack([x * 2, y * 2.6, 255 - x - y], -1).clip(0, 255)
    start[:48] = (x * 2)[:48, :, None]  # a grey ramp
    frames = torch.from_numpy(start.astype(np.uint8))[None]
    first = None
    for number in range(10):
        frame = av.VideoFrame.from_ndarray(frames[0].numpy())
        graph = av.filter.Graph()
        source = graph.add_buffer(width=128, height=96, format="rgb24", time_base=Fraction(1, 25))
        scale = "out_color_matrix=bt601:out_range=tv:flags=accurate_rnd+full_chroma_int+full_chroma_inp+area"
        graph.link_nodes(source, graph.add("scale", scale), graph.add("format", "yuv420p"), graph.add("buffersink"))
        frame.time_base = Fraction(1, 25)
        graph.configure()
        graph.vpush(frame)
        frame = graph.vpull()
        frame.pts = 0
        frames = read_video(write(tmp_path / f"{number}.mkv", frame))[0]
        first = frames if first is None else first
    assert first is not None
    assert abs(float(frames.double().mean() - start.mean())) < 0.1
    assert (frames.int() - first.int()).abs().max() <= 2


# --- High dynamic range and wide gamut -------------------------------------------------------------------------------


def pq(light: np.ndarray) -> np.ndarray:
    """The inverse EOTF of ST 2084, light in cd/m2."""
    y = (light / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


def hlg_display(signal: np.ndarray) -> np.ndarray:
    """Light in cd/m2 of an HLG signal `(..., 3)` on a display of 1000 cd/m2 (BT.2100)."""
    a, b, c = 0.17883277, 1 - 4 * 0.17883277, 0.5 - 0.17883277 * np.log(4 * 0.17883277)
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593])
    return 1000 * luminance[..., None] ** 0.2 * scene


def tone_mapped(light: np.ndarray) -> np.ndarray:
    """Levels of BT.2020 light `(..., 3)` in cd/m2, as the documentation says."""
    light = np.maximum(light / 203 @ TO_709.T, 0)
    largest = np.maximum(light.max(-1, keepdims=True), 1e-9)
    t = np.maximum((largest - 0.75) / 0.25, 0)
    limit = (1000 / 203 - 0.75) / 0.25
    mapped = np.where(largest <= 0.75, largest, np.minimum(0.75 + 0.25 * t * (1 + t / limit**2) / (1 + t), 1))
    return (light * mapped / largest).clip(0, 1) ** (1 / 2.4) * 255


def levels(signal: np.ndarray, transfer: str) -> np.ndarray:
    rgb = torch.from_numpy(signal.astype(np.float32)).T[:, None].contiguous()
    out = to_sdr(rgb, Color("bt2020", "bt2020", transfer, False))
    return out[:, 0].T.double().numpy() * 255


class TestToSdr:
    def test_pq_curve(self):
        light = np.random.default_rng(0).uniform(0, 1, (4000, 3)) ** 3 * 2000
        difference = levels(pq(light), "smpte2084") - tone_mapped(light)
        assert np.abs(difference).max() < 1  # 0.25 measured, near black, where the power is steep; 1e-3 elsewhere
        assert np.abs(difference[tone_mapped(light) > 10]).max() < 0.5  # 0.12 measured, in float32

    def test_hlg_curve(self):
        signal = np.random.default_rng(0).uniform(0, 1, (4000, 3))
        want = tone_mapped(hlg_display(signal))
        difference = levels(signal, "arib-std-b67") - want
        assert np.abs(difference).max() < 1
        assert np.abs(difference[want > 10]).max() < 0.02

    @pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
    def test_grey_stays_grey_and_in_order(self, transfer: str):
        out = levels(np.linspace(0, 1, 1024)[:, None].repeat(3, 1), transfer)
        assert np.ptp(out, axis=1).max() < 0.01
        assert np.diff(out[:, 0]).min() > -1e-4
        assert out[0].max() < 0.01 and out[-1].min() > 254.99

    def test_white_and_middle(self):
        out = levels(np.stack([pq(np.full(3, light)) for light in (100.0, 152.0, 203.0, 1000.0)]), "smpte2084")[:, 0]
        want = [(100 / 203) ** (1 / 2.4), (152 / 203) ** (1 / 2.4), 0.876 ** (1 / 2.4), 1]
        assert np.abs(out - np.array(want) * 255).max() < 0.1
        assert abs(levels(np.full((1, 3), 0.75), "arib-std-b67")[0, 0] - out[2]) < 0.5  # HLG's white is 203 as well

    @pytest.mark.parametrize("transfer", [16, 18])
    def test_file(self, tmp_path: Path, transfer: int):
        """A grey ramp in 10 bits of limited range comes out as the curve says."""
        codes = np.linspace(64, 940, 64).round().astype(int)[None].repeat(64, 0)
        planes = [codes, np.full_like(codes, 512), np.full_like(codes, 512)]
        tags = {"colorspace": 9, "color_primaries": 9, "color_trc": transfer, "color_range": 1}
        path = write(tmp_path / "a.mkv", frame_of("yuv420p10le", planes), **tags)
        with VideoReader(path) as video:
            assert video.info.transfer == {16: "smpte2084", 18: "arib-std-b67"}[transfer]
            assert (video.info.matrix, video.info.primaries) == ("bt2020", "bt2020")
            out = video.read()[0].numpy()
        signal = ((codes[0] - 64) / 876)[:, None].repeat(3, 1)
        light = hlg_display(signal) if transfer == 18 else pq_light(signal)
        assert np.abs(out[10] - tone_mapped(light)).max() < 0.75
        assert (np.diff(out[10].astype(int), axis=0) >= 0).all()

    def test_picture(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """AVIF in PQ, which Pillow would take for SDR."""
        monkeypatch.setenv("SVT_LOG", "1")  # errors only; it is looked at once in a process
        planes = [np.full((64, 64), code) for code in (502, 512, 512)]  # half of the signal, 92 cd/m2
        tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 16, "color_range": 1}
        path = write(tmp_path / "a.avif", frame_of("yuv420p10le", planes), "libsvtav1", **tags)
        frames, info = read_video(path)
        assert (info.is_image, info.num_frames, info.duration, info.transfer) == (True, 1, None, "smpte2084")
        want = tone_mapped(pq_light(np.full((1, 3), (502 - 64) / 876)))
        assert np.abs(frames[0].numpy() - want).max() < 4  # 1 measured: a lossy codec

    def test_wide_gamut(self):
        signal = np.random.default_rng(0).uniform(0, 1, (1000, 3))
        out = levels(signal, "bt709")
        want = (signal**2.4 @ TO_709.T).clip(0, 1) ** (1 / 2.4) * 255
        # Near black the power is steep, and BT.2087 gives four digits.
        assert np.abs(out**2.4 - want**2.4).max() / 255**2.4 < 4e-4
        grey = levels(np.linspace(0, 1, 256)[:, None].repeat(3, 1), "bt709")
        assert np.abs(grey - np.arange(256)[:, None]).max() < 0.01


def pq_light(signal: np.ndarray) -> np.ndarray:
    table = np.linspace(0, 1, 200001)
    return np.interp(signal, pq(table**4 * 10000), table**4 * 10000)

"""Metrics against independent implementations on a real clip, and their order under known degradations."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import _compute_fid

from diffusers_leanvae.bundled import clip_path
from diffusers_leanvae.data import read_center_clip
from diffusers_leanvae.evaluation.features import I3DFeatures, TransformerFeatures, distance_metric
from diffusers_leanvae.evaluation.ffmpeg_metrics import VmafStream, XpsnrStream, find_vmaf
from diffusers_leanvae.evaluation.frechet import frechet_distance
from diffusers_leanvae.evaluation.measures import KINDS, Measures, MetricOptions, make_measures
from diffusers_leanvae.evaluation.metrics import (
    flat_std,
    frame_grid,
    frame_ms_ssim,
    frame_psnr,
    frame_ssim,
    frame_ssim_pair,
)
from diffusers_leanvae.evaluation.temporal import flicker, ghost_sums, warp_error
from diffusers_leanvae.video_io.pixels import unit_to_pixels


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    """Frames of a real video, `(6, 3, 192, 192)` in `[0, 1]`."""
    return (read_center_clip(clip_path(), 6, 192).transpose(0, 1) + 1) / 2


@pytest.fixture(scope="module")
def noisy(clip: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    return (clip + 0.04 * noise).clamp(0, 1)


# --- Single frames ---------------------------------------------------------------------------------------------------


def test_psnr_and_ssim_are_those_of_scikit_image(clip: torch.Tensor, noisy: torch.Tensor):
    metrics = pytest.importorskip("skimage.metrics", reason="needs scikit-image")
    pairs = [[x.permute(1, 2, 0).double().numpy() for x in pair] for pair in zip(clip, noisy, strict=True)]
    expected = [metrics.peak_signal_noise_ratio(*pair, data_range=1.0) for pair in pairs]
    np.testing.assert_allclose(frame_psnr(noisy, clip).numpy(), expected, rtol=0, atol=1e-5)  # measured: 1.3e-6
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = [metrics.structural_similarity(*pair, channel_axis=-1, **options) for pair in pairs]
    mirrored, valid = frame_ssim_pair(noisy, clip)
    np.testing.assert_allclose(valid.numpy(), expected, rtol=0, atol=2e-5)  # measured: 4.1e-6
    assert (mirrored - valid).abs().min() > 1e-5  # the two conventions are two


def test_ssim_is_that_of_torchmetrics_in_float64(clip: torch.Tensor, noisy: torch.Tensor):
    pair = noisy[:2].double(), clip[:2].double()
    expected = structural_similarity_index_measure(*pair, data_range=1.0, reduction="none")
    torch.testing.assert_close(frame_ssim(*pair).double(), expected, rtol=0, atol=4e-6)
    expected = multiscale_structural_similarity_index_measure(*pair, data_range=1.0, reduction="none")
    torch.testing.assert_close(frame_ms_ssim(*pair).double(), expected, rtol=0, atol=4e-6)


# --- FFmpeg's filters ------------------------------------------------------------------------------------------------


def run_filter(tmp_path: Path, decoded: torch.Tensor, original: torch.Tensor, graph: str) -> None:
    """Run the FFmpeg of imageio-ffmpeg over two files of raw frames, decoded first."""
    inputs = []
    for name, frames in (("decoded", decoded), ("original", original)):
        (tmp_path / name).write_bytes(unit_to_pixels(frames).permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        size = f"{frames.shape[3]}x{frames.shape[2]}"
        inputs += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", size, "-framerate", "25", "-i", name]
    command = [find_vmaf(), "-loglevel", "error", *inputs, "-lavfi", graph, "-f", "null", "-"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)


def test_filters_give_what_ffmpeg_gives_for_files(clip: torch.Tensor, noisy: torch.Tensor, tmp_path: Path):
    pytest.importorskip("imageio_ffmpeg", reason="needs imageio-ffmpeg")
    yuv = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int+bicubic,format=yuv420p"
    graph = f"[0:v]{yuv},split[a][c];[1:v]{yuv},split[b][d];[a][b]libvmaf=log_fmt=json:log_path=vmaf.json,nullsink;"
    run_filter(tmp_path, noisy, clip, f"{graph}[c][d]xpsnr=stats_file=xpsnr.txt")
    expected = [frame["metrics"]["vmaf"] for frame in json.loads((tmp_path / "vmaf.json").read_text())["frames"]]
    stream = VmafStream(find_vmaf(), 192, 192)
    for part in (slice(0, 4), slice(4, 6)):
        stream.write(noisy[part], clip[part])
    values = stream.finish()
    assert values == pytest.approx(expected, abs=1e-6, rel=0) and len(values) == 6 and 5 < min(values) < 95
    lines = [line for line in (tmp_path / "xpsnr.txt").read_text().splitlines() if line.startswith("n:")]
    expected = [float(line.partition("XPSNR y:")[2].split()[0]) for line in lines]
    xpsnr = XpsnrStream(192, 192)
    for part in (slice(0, 1), slice(1, 6)):
        xpsnr.write(noisy[part], clip[part])
    # Measured: 4.8e-5, the rounding of the file.
    assert xpsnr.finish() == pytest.approx(expected, abs=5e-4, rel=0) and len(expected) == 6


@pytest.mark.parametrize("height, width", [(44, 46), (22, 92), (18, 112)])
def test_frames_that_ffmpeg_dies_of_are_refused(height: int, width: int):
    """XPSNR's blocks have no side below 2025 pixels, and FFmpeg divides by it: sizes with two more columns work."""
    xpsnr = make_measures(["xpsnr"]).clips["xpsnr"]
    with pytest.raises(ValueError, match=f"needs frames of at least 2025 pixels, got {height}x{width}"):
        xpsnr.start(height, width)
    original = torch.rand(2, 3, height, width + 2, generator=torch.Generator().manual_seed(0))
    xpsnr.start(height, width + 2)
    xpsnr.update(original * 0.9, original)
    assert 5 < xpsnr.finish()["xpsnr_y_frame_mean"] < 50


def test_vmaf_of_the_smallest_frames():
    pytest.importorskip("imageio_ffmpeg", reason="needs imageio-ffmpeg")
    vmaf = make_measures(["vmaf"]).clips["vmaf"]
    for size in ((16, 64), (64, 16), (17, 64)):
        with pytest.raises(ValueError, match="needs frames with even sides of at least 18, got"):
            vmaf.start(*size)
    original = torch.rand(2, 3, 18, 18, generator=torch.Generator().manual_seed(0))
    vmaf.start(18, 18)
    vmaf.update(original * 0.9, original)
    assert list(vmaf.finish()) == ["vmaf_v0_6_1_frame_mean"]


# --- Frechet distance ------------------------------------------------------------------------------------------------


def draw_features(num_samples: int, num_features: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
    mean = torch.randn(num_features, generator=generator, dtype=torch.float64)
    return torch.randn(num_samples, num_features, generator=generator, dtype=torch.float64) @ mixing + mean


def test_frechet_distance_is_that_of_scipy_and_torchmetrics():
    linalg = pytest.importorskip("scipy.linalg", reason="needs scipy")
    a, b = draw_features(300, 24, 0), draw_features(200, 24, 1)
    for ddof in (0, 1):
        covariances = [torch.cov(x.T, correction=ddof) for x in (a, b)]
        root = linalg.sqrtm((covariances[0] @ covariances[1]).numpy())
        means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
        expected = (means + sum(c.trace() for c in covariances) - 2 * root.real.trace()).item()
        assert frechet_distance(a, b, ddof) == pytest.approx(expected, rel=1e-12)
        theirs = _compute_fid(a.mean(dim=0), covariances[0], b.mean(dim=0), covariances[1]).item()
        assert frechet_distance(a, b, ddof) == pytest.approx(theirs, rel=1e-12)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-14)


def test_frechet_distance_of_fewer_samples_than_features():
    a = draw_features(12, 40, 0)
    assert frechet_distance(a, a) < 1e-9 * a.square().sum().item()
    assert frechet_distance(a, a + 0.5) == pytest.approx(40 * 0.25, rel=1e-12)  # the covariances agree
    trace = torch.cov(a.T, correction=0).trace().item()
    assert frechet_distance(a, 2 * a - a.mean(dim=0)) == pytest.approx(trace, rel=1e-12)
    values = torch.arange(6.0).reshape(3, 2)
    with pytest.raises(ValueError, match=r"`others` must be \(num_samples, num_features\) .* got \(1, 2\)"):
        frechet_distance(values, values[:1])
    with pytest.raises(ValueError, match="`features` must be finite, got 1 values that are not"):
        frechet_distance(values.where(values != 3, torch.inf), values)


class Script(torch.nn.Module):
    """Takes what StyleGAN-V's I3D takes; its features are means of four parts of the clip, rescaled as there."""

    def forward(self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        if rescale:
            x = x * 2 / 255 - 1
        if not resize or not return_features:
            x = x * 0
        return torch.nn.functional.adaptive_avg_pool3d(x.mean(dim=1), [1, 2, 2]).flatten(1)


def test_i3d_gets_pixels_as_stylegan_v_gives_them(clip: torch.Tensor, tmp_path: Path):
    torch.jit.script(Script()).save(str(tmp_path / "i3d.pt"))
    features = I3DFeatures(tmp_path / "i3d.pt")
    pixels = unit_to_pixels(clip)
    expected = F.adaptive_avg_pool2d(pixels.double().mean(dim=(0, 1))[None], 2).flatten() * 2 / 255 - 1
    torch.testing.assert_close(features(pixels).double(), expected, rtol=0, atol=1e-5)
    assert distance_metric(features, is_reconstruction=True).label == "rFVD" and features.name == "i3d_styleganv"
    (tmp_path / "other.pt").write_bytes(b"no script")
    with pytest.raises(ValueError, match="`i3d` must be the torchscript file https://www.dropbox.com"):
        I3DFeatures(tmp_path / "other.pt")


def test_features_of_transformers(clip: torch.Tensor, tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    video = transformers.VideoMAEModel(transformers.VideoMAEConfig(image_size=32, num_frames=6, **sizes)).eval()
    video.save_pretrained(tmp_path / "VideoMAE tiny")
    image = transformers.ViTModel(transformers.ViTConfig(image_size=32, **sizes)).eval()
    image.save_pretrained(tmp_path / "vit")
    pixels = unit_to_pixels(clip)
    frames = F.interpolate(pixels / 255, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    frames = (frames - mean) / std
    with torch.no_grad():
        of_video = video(pixel_values=frames[None]).last_hidden_state.mean(dim=(0, 1))
        of_images = image(pixel_values=frames).last_hidden_state.mean(dim=(0, 1))
    features = TransformerFeatures(tmp_path / "VideoMAE tiny")
    assert features.name == "videomae_tiny_mean_of_tokens" and features.num_frames == 6
    torch.testing.assert_close(features(pixels), of_video, rtol=0, atol=1e-6)
    features = TransformerFeatures(tmp_path / "vit")
    assert features.num_frames is None
    torch.testing.assert_close(features(pixels), of_images, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="`feature_model` must be a folder or Hub id .* got"):
        TransformerFeatures(tmp_path / "none")


# --- Changes from frame to frame -------------------------------------------------------------------------------------


def test_flicker_is_the_error_of_changes(clip: torch.Tensor):
    assert flicker(clip, clip).tolist() == [0.0] * 5
    brighter = clip * 0.5
    brighter[3] += 0.1  # there and back again
    expected = [255 * (0.5 * (clip[i + 1] - clip[i]) + (0.0, 0.0, -0.1, 0.1, 0.0)[i]).abs().mean() for i in range(5)]
    torch.testing.assert_close(flicker(brighter, clip), torch.stack(expected), rtol=0, atol=2e-5)  # measured: 1.9e-6


def test_errors_that_move_with_the_picture_are_no_warp_error():
    generator = torch.Generator().manual_seed(0)
    wide = F.interpolate(torch.rand(2, 3, 24, 24, generator=generator), (96, 96), mode="bicubic").clamp(0, 1)
    windows = [(slice(10 + 2 * t, 74 + 2 * t), slice(20 - 3 * t, 84 - 3 * t)) for t in range(4)]
    moving, error = (torch.stack([x[:, rows, columns] for rows, columns in windows]) for x in wide)
    decoded = (moving + 0.2 * error).clamp(0, 1)
    sums, counts = warp_error(decoded, moving)
    assert (counts >= 8).all()  # blocks that came into view are not found again
    assert (sums / counts).max() < 0.05 * flicker(decoded, moving).mean()
    still, _ = warp_error((moving + 0.2 * error[:1]).clamp(0, 1), moving)  # an error that stays where it is
    assert (still / counts).min() > 1
    with pytest.raises(ValueError, match="`frames` must have sides of at least 16"):
        warp_error(decoded[..., :8], moving[..., :8])


# --- Grids -----------------------------------------------------------------------------------------------------------


def lattice(cell: int, side: int) -> torch.Tensor:
    """A dot in the middle of every cell, of sample variance 1 within it."""
    dot = torch.zeros(cell, cell)
    dot[cell // 2, cell // 2] = 1
    dot = (dot - dot.mean()) / dot.std()
    return dot.repeat(side // cell, side // cell)


@pytest.mark.parametrize("cell", [8, 16])
def test_a_grid_is_told_from_noise_by_its_variance(cell: int):
    generator = torch.Generator().manual_seed(0)
    original = 0.1 + 0.6 * torch.rand(6, 3, 256, 256, generator=generator)
    noise = torch.randn(original.shape, generator=generator)
    assert frame_grid(original, original, cell).tolist() == [1.0] * 6
    assert frame_grid(original + 0.2, original, cell).sub(1).abs().max() < 1e-4  # rounding of float32
    for deviation in (0.5, 4.0):  # in levels of 255
        for variance in (0.0, 0.2, 3.0):
            error = deviation * noise + variance**0.5 * lattice(cell, 256)
            expected = 1 + 2 * variance / (deviation**2 + 1 / 12)
            found = frame_grid(original + error / 255, original, cell).mean().item()
            assert found == pytest.approx(expected, rel=0.03), (deviation, variance)
    alone = frame_grid(original + lattice(cell, 256) / 255, original, cell)
    torch.testing.assert_close(alone, torch.full((6,), 25.0), rtol=0, atol=1e-2)
    other = lattice(cell, 264 if cell == 8 else 272)[..., 3:259, 5:261]  # wherever the cells begin
    torch.testing.assert_close(frame_grid(original + other / 255, original, cell), alone, rtol=0, atol=1e-2)


def test_straight_edges_and_other_periods_are_no_grid():
    generator = torch.Generator().manual_seed(0)
    original = torch.full((8, 3, 250, 250), 0.5)
    stripes = 0.02 * torch.randn(8, 3, 1, 250, generator=generator)  # upright: each the same all the way down
    for error in (stripes, stripes.mT):
        # Measured: 1.15, as the mean of ratios of few independent values; along an axis neighbours are equal.
        assert 0.9 < frame_grid(original + error, original, 8).mean() < 1.3
    blocks = lattice(10, 250) / 255  # of another compression
    assert frame_grid(original + blocks, original, 8).mean() < 1.1
    assert frame_grid(original + blocks, original, 10).mean() > 20


def test_flat_patches_are_those_of_the_original():
    original = torch.rand(2, 3, 40, 70, generator=torch.Generator().manual_seed(0))
    assert len(flat_std(original, original)) == 0
    original[0, :, 16:32, 32:48] = torch.tensor([0.9, 0.0, 0.5]).view(3, 1, 1)
    original[1, :, :16, 16:32] = 0.2
    original[1, :, ::2, 16:32] += 1 / 255
    original[1, :, 16:32, 16:32] = 0.2
    original[1, 2, 20, 20] += 2 / 255  # not flat
    decoded = original.clone()
    decoded[0, 0, 16:32, 32:48] += 3 / 255 * lattice(8, 16)  # of one channel in three
    decoded[1, :, :16, 16:32] += 0.1  # another colour, but as flat
    expected = torch.tensor([3 * (63 / 64 / 3) ** 0.5, 0.5])
    torch.testing.assert_close(flat_std(decoded, original), expected, rtol=0, atol=2e-5)


# --- Ghosts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Two drawings of bars, `(2, 3, 64, 64)`, white on black and in other places."""
    drawn = torch.zeros(2, 3, 64, 64)
    for picture, (row, column) in enumerate(((8, 12), (21, 17))):
        drawn[picture, :, row : row + 40, column : column + 6] = 1
        drawn[picture, :, row : row + 6, column : column + 30] = 1
        drawn[picture, :, row + 20 : row + 25, column : column + 22] = 1
    return drawn


def ghosts(decoded: torch.Tensor, original: torch.Tensor) -> list[float]:
    sums = ghost_sums(decoded, original)
    assert sums is not None
    return sums.weight().tolist()


def blurred(frames: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(frames, 3, stride=1, padding=1, count_include_pad=False)


def test_the_weight_of_another_frame_is_found(pictures: torch.Tensor):
    turns, once = pictures[[0, 1, 0, 1]], pictures[[0, 0, 1, 1]]
    after, both = pictures[[0, 0, 0, 1]], once.mean(dim=0, keepdim=True).expand_as(once)
    cases = [
        (turns, turns, [0.0] * 4),
        (0.75 * turns + 0.25 * turns.roll(1, dims=0), turns, [0.25] * 4),
        (0.75 * once + 0.25 * after, once, [0, 0, 0.25, 0]),
        (both, once, [0.5] * 4),
    ]
    for decoded, original, expected in cases:
        assert ghosts(decoded, original) == pytest.approx(expected, abs=1e-6, rel=0)
        # A blur is no ghost, and hides none, but weakens its thin strokes. Measured: 0.023, and 0.21 for 0.25.
        assert ghosts(blurred(decoded), original) == pytest.approx(expected, abs=0.03, rel=0.3)
    assert ghosts(once.roll(2, dims=0), once) == pytest.approx([1] * 4, abs=1e-6)
    sums = ghost_sums(both, once)
    assert sums is not None and sums.mean_error().tolist() == pytest.approx([127.5] * 4, abs=1e-6)


def test_a_cut_between_flat_pictures_has_a_ghost():
    cut = torch.tensor([0.1, 0.1, 0.9, 0.9]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    assert ghosts(0.7 * cut + 0.3 * cut.flip(0), cut) == pytest.approx([0.3] * 4, abs=1e-6)
    flash = torch.tensor([0.0, 0.4, 0.2, 0.0]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    assert ghosts(flash, flash) == [0.0] * 4  # the last frame has nothing to tell it from the first


def test_frames_that_hardly_change_have_no_ghost(pictures: torch.Tensor):
    faint = 0.2 * pictures[[0, 0, 1, 1]]  # 51 levels
    assert ghost_sums(faint, faint) is None
    dot = torch.zeros(4, 3, 64, 64)
    dot[2:, 0, :7, :9] = 1  # 63 pixels
    assert ghost_sums(dot, dot) is None
    dot[2:, 0, 7, 0] = 1
    assert ghost_sums(dot, dot) is not None


def test_ghosts_of_a_clip_by_place_and_piece(pictures: torch.Tensor):
    original = pictures[[0] + [0, 0, 1, 1] * 2 + [0, 0, 0, 0] + [1, 1]]  # the third group is still, the last not whole
    decoded = original.clone()
    decoded[3] = 0.6 * pictures[1] + 0.4 * pictures[0]
    decoded[7] = 0.8 * pictures[1] + 0.2 * pictures[0]
    decoded[13:] = 0.5
    measure = make_measures(["ghost"], ratio=4).clips["ghost"]
    found = []
    for sizes in ([15], [5, 4, 4, 2], [1] * 15, [7, 8]):
        measure.start(64, 64)
        for piece in zip(decoded.split(sizes), original.split(sizes), strict=True):
            measure.update(*piece)
        found.append(measure.finish())
    assert all(figures == found[0] for figures in found) and found[0].keys() == measure.metrics.keys()
    expected = {"ghost_weight": 0.075, "ghost_weight_worst": 0.4, "ghost_mae_255": 0.075 * 255}
    for place in range(1, 5):
        weight = 0.3 if place == 3 else 0.0
        expected |= {f"ghost_weight_group_{place}": weight, f"ghost_mae_255_group_{place}": 255 * weight}
    assert found[0] == pytest.approx(expected, abs=1e-5)
    measure.start(64, 64)
    measure.update(original[:5], original[:1].expand(5, -1, -1, -1))
    assert measure.finish() == {}  # nothing changed in the original


# --- All together ----------------------------------------------------------------------------------------------------


def figures(measures: Measures, decoded: torch.Tensor, original: torch.Tensor) -> dict[str, float]:
    found = {}
    for measure in measures.clips.values():
        measure.start(*original.shape[2:])
        for part in (slice(0, 2), slice(2, None)):
            measure.update(decoded[part], original[part])
        found |= measure.finish()
    return found


def test_a_place_in_a_group_has_one_name_whatever_the_ratio():
    """Subjects of all ratios share the columns of a table."""
    for kind in ("psnr_in_group", "grid", "ghost"):
        few, many = (make_measures([kind], ratio=ratio, cell=4 * ratio).metrics.items() for ratio in (2, 4))
        assert few <= many and (kind == "grid") == (few == many)


@pytest.mark.parametrize("is_learned", [False, True])
def test_degradations_order_every_metric(clip: torch.Tensor, is_learned: bool):
    pytest.importorskip("imageio_ffmpeg", reason="needs imageio-ffmpeg")
    # Grids and ghosts are degradations of one kind each, which the tests above put in order.
    single = ("rfvd_i3d", "rfvd_features", "grid", "ghost")
    kinds = [kind for kind in KINDS if kind not in single and kind.startswith("lpips") == is_learned]
    clip = clip[..., 64:128, 64:128] if is_learned else clip  # networks take long
    side = clip.shape[-1]
    measures = make_measures(kinds, MetricOptions(vgg16="seed:0", alexnet="seed:0"))
    assert not measures.missing
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(clip.shape, generator=generator)

    def blurred(size: int) -> torch.Tensor:
        small = F.interpolate(clip, (side // size, side // size), mode="bicubic", antialias=True)
        return F.interpolate(small, (side, side), mode="bicubic").clamp(0, 1)

    ladders = {
        "noise": [(clip + 0.02 * noise).clamp(0, 1), (clip + 0.1 * noise).clamp(0, 1)],
        "blur": [blurred(2), blurred(6)],
        "dropped frames": [clip[[0, 1, 2, 2, 4, 5]], clip[[0, 0, 0, 0, 0, 0]]],
        "shuffled frames": [clip[[0, 1, 3, 2, 4, 5]], clip[[5, 2, 4, 0, 3, 1]]],
    }
    perfect = figures(measures, clip, clip)
    for ladder, steps in ladders.items():
        values = [perfect, *(figures(measures, decoded, clip) for decoded in steps)]
        for name, metric in measures.metrics.items():
            column = [value[name] for value in values]
            if "drop" in ladder or "shuffle" in ladder:
                if name.startswith("psnr_frame_mean_rgb_"):
                    continue  # whether a place is hit is chance
            assert column == sorted(column, reverse=metric.better == "higher"), (ladder, name, column)
            assert abs(column[2] - column[0]) > 1e-6, (ladder, name, column)


def test_metrics_without_weights_are_named(monkeypatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    kinds = ["psnr", "lpips_vgg16", "lpips_alexnet", "rfvd_i3d", "rfvd_features", "vmaf", "xpsnr"]
    measures = make_measures(kinds, MetricOptions(vgg16=str(tmp_path / "vgg16.pth")))
    assert list(measures.clips) == ["psnr", "xpsnr"] and not measures.features
    sentences = {
        "lpips_vgg16": "`vgg16` .*https://huggingface.co/timm/vgg16.tv_in1k/",
        "lpips_alexnet": "`alexnet` .*https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "rfvd_i3d": "`i3d` .*i3d_torchscript.pt",
        "rfvd_features": "`feature_model` .*videomae-base",
        "vmaf": r'pip install "diffusers-leanvae\[vmaf\]"',
    }
    assert measures.missing.keys() == sentences.keys()
    for kind, pattern in sentences.items():
        assert re.search(pattern, measures.missing[kind])
    with pytest.raises(ValueError, match="`metrics` must be one of 'psnr'"):
        make_measures(["fvd"])


# --- Illegal frames --------------------------------------------------------------------------------------------------

METRICS = {
    "psnr": frame_psnr,
    "ssim": frame_ssim,
    "ms_ssim": frame_ms_ssim,
    "grid": lambda *pair: frame_grid(*pair, 8),
    "flat": flat_std,
    "flicker": flicker,
    "warp": warp_error,
    "ghost": ghost_sums,
}
metrics = pytest.mark.parametrize("name", METRICS)
VALUES = r"`frames` must have values in \[0, 1\], got"


@metrics
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x[:1], r"`reference` must have the shape \(1, 3, 192, 192\) of `frames`, got \(6, 3, 192, 192\)"),
        (
            lambda x: x[:, :1],
            r"`reference` must have the shape \(6, 1, 192, 192\) of `frames`, got \(6, 3, 192, 192\)",
        ),
        (lambda x: x[0], r"`frames` must have shape \(num_frames, 3, height, width\), got \(3, 192, 192\)"),
        (lambda x: x[..., :0], r"`frames` must have shape \(num_frames, 3, height, width\), got \(6, 3, 192, 0\)"),
        (unit_to_pixels, "`frames` must be a floating-point tensor, got torch.uint8"),
        (lambda x: x.numpy(), "`frames` must be a floating-point tensor, got ndarray"),
        (lambda x: 255 * x, rf"{VALUES} 0 to 255"),
        (lambda x: 2 * x - 1, rf"{VALUES} -1 to 1"),
        (lambda x: x.where(x < 0.5, torch.inf), rf"{VALUES} 0 to inf"),
    ],
)
def test_illegal_frames(clip: torch.Tensor, name: str, change, message: str):
    clip = (clip - clip.min()) / (clip.max() - clip.min())
    with pytest.raises(ValueError, match=f"^{message}\\.$"):
        METRICS[name](change(clip), clip)


@metrics
def test_nan_is_not_hidden(clip: torch.Tensor, name: str):
    broken = clip.clone()
    broken[:, 0, :, 5] = torch.nan
    if name in ("flat", "warp", "ghost"):
        with pytest.raises(ValueError, match=rf"^{VALUES} NaN\.$"):
            METRICS[name](broken, clip)
    else:
        assert METRICS[name](broken, clip).isnan().any()


def test_frames_of_less_than_two_cells(clip: torch.Tensor):
    with pytest.raises(ValueError, match=r"^`frames` must have sides of at least 16, got \(15, 192\)\.$"):
        frame_grid(clip[:, :, :15], clip[:, :, :15], 8)
    with pytest.raises(ValueError, match=r"^`cell` must be a positive integer, got 0\.$"):
        frame_grid(clip, clip, 0)

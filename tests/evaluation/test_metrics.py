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
from diffusers_leanvae.evaluation.measures import KINDS, GroupPsnr, Measures, MetricOptions, make_measures
from diffusers_leanvae.evaluation.metrics import frame_ms_ssim, frame_psnr, frame_ssim, frame_ssim_pair
from diffusers_leanvae.evaluation.temporal import flicker, warp_error
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
    decoded = (moving + 0.2 * error).clamp(0, 1.2)
    sums, counts = warp_error(decoded, moving)
    assert (counts >= 8).all()  # blocks that came into view are not found again
    assert (sums / counts).max() < 0.05 * flicker(decoded, moving).mean()
    still, _ = warp_error(moving + 0.2 * error[:1], moving)  # an error that stays where it is
    assert (still / counts).min() > 1
    with pytest.raises(ValueError, match="`frames` must have sides of at least 16"):
        warp_error(decoded[..., :8], moving[..., :8])


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
    assert GroupPsnr(1).metrics.items() < GroupPsnr(4).metrics.items()


@pytest.mark.parametrize("is_learned", [False, True])
def test_degradations_order_every_metric(clip: torch.Tensor, is_learned: bool):
    pytest.importorskip("imageio_ffmpeg", reason="needs imageio-ffmpeg")
    kinds = [kind for kind in KINDS if not kind.startswith("rfvd") and kind.startswith("lpips") == is_learned]
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

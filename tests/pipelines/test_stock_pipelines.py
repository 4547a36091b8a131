"""Autoencoders of this package in pipelines of diffusers, and those of diffusers in pipelines of this package."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import logging
from tiny import make_tiny, make_video, seeded

from diffusers_leanvae.generation.autoencoders import LatentLayout
from diffusers_leanvae.latents import denormalize_latents, normalize_latents


ROOT = Path(__file__).resolve().parents[2]
STATISTICS = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.0, 2.0, 3.0, 0.5], "scaling_factor": 0.8}
STOCK = (
    "WanPipeline",
    "WanImageToVideoPipeline",
    "WanVideoToVideoPipeline",
    "WanVACEPipeline",
    "SkyReelsV2Pipeline",
    "HunyuanVideoPipeline",
    "HunyuanVideo15Pipeline",
    "CogVideoXPipeline",
    "CogVideoXImageToVideoPipeline",
    "CogVideoXVideoToVideoPipeline",
)
# Those that cannot, and how it shows; docs/diffusers_pipelines.md says why.
IMPOSSIBLE = {
    "LTXPipeline": "'NoneType' object has no attribute 'view'",
    "MochiPipeline": "gives 5 frames",
    "LattePipeline": "gives 3 frames",
    "AllegroPipeline": "gives 3 frames",
}
families = pytest.mark.parametrize("family", ["leanvae", "wfvae", "ivvae"])


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/stock_pipelines.py`, which measures the table of the documentation."""
    if not diffusers.utils.is_transformers_available():
        pytest.skip("diffusers' pipelines of texts need transformers")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import stock_pipelines  # pyright: ignore[reportMissingImports]

    monkeypatch.setitem(sys.modules, "stock_pipelines", stock_pipelines)
    return stock_pipelines


# --- Ours in theirs --------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("name", STOCK)
def test_it_runs_and_undoes_the_statistics_once(stock: ModuleType, name: str, family: str):
    assert stock.try_out(name, make_tiny(family, **STATISTICS)) == "runs"


@families
def test_a_given_video_is_normalised_once(stock: ModuleType, family: str):
    vae = make_tiny(family, **STATISTICS)
    pipeline = stock.build("WanVideoToVideoPipeline", vae)
    video = make_video(1, 3, 9, 16, 24)
    pipeline.scheduler.set_timesteps(2)
    timestep, sigma = pipeline.scheduler.timesteps[-1:], pipeline.scheduler.sigmas[-2]
    sizes = {"batch_size": 1, "num_channels_latents": 4, "height": 16, "width": 24, "dtype": torch.float32}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        noised = pipeline.prepare_latents(video, **sizes, device="cpu", generator=generator, timestep=timestep)
        encoded = normalize_latents(vae.encode(video).latent_dist.mode(), vae.config)
    noise = torch.randn(noised.shape, generator=generator.manual_seed(0))
    torch.testing.assert_close(noised, sigma * noise + (1 - sigma) * encoded, rtol=0, atol=1e-5)


def test_compression_of_16_in_space(stock: ModuleType):
    vae = make_tiny("leanvae", patch_size=(2, 8, 8), **STATISTICS)
    for name in ("WanPipeline", "WanVideoToVideoPipeline", "CogVideoXVideoToVideoPipeline"):
        assert stock.try_out(name, vae) == "runs"


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_those_that_cannot_fail_as_documented(stock: ModuleType, name: str):
    assert IMPOSSIBLE[name] in stock.try_out(name, make_tiny("leanvae", latent_channels=12))


def test_the_table_is_of_these(stock: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = {
        row["pipeline"]: row for row in json.loads((ROOT / "results" / "stock_pipelines.json").read_text())["rows"]
    }
    assert tuple(rows) == (*STOCK, *IMPOSSIBLE) == tuple(stock.STOCK)
    for name, row in rows.items():
        for model in stock.SMALL:
            assert row[model] == "runs" if name in STOCK else IMPOSSIBLE[name] in row[model]
    monkeypatch.setattr(stock, "STOCK", {"WanPipeline": stock.STOCK["WanPipeline"]})
    monkeypatch.setattr(sys, "argv", ["stock_pipelines.py", "--output", str(tmp_path / "rows.json")])
    stock.main()
    again = json.loads((tmp_path / "rows.json").read_text())
    assert again["rows"] == [rows["WanPipeline"]] and again["provenance"]["command"].startswith("stock_pipelines.py")


# --- Theirs in ours --------------------------------------------------------------------------------------------------


def make_stock_vae(name: str) -> Any:
    """A small autoencoder of diffusers with lively latents: 4 channels, 4x8x8, all normalised in its own way."""
    blocks = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    mean_std = {name: STATISTICS[name] for name in ("latents_mean", "latents_std")}
    config: dict[str, Any] = {
        "AutoencoderKLWan": {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1} | mean_std,
        "AutoencoderKLCogVideoX": blocks | {"scaling_factor": 0.7},
        "AutoencoderKLHunyuanVideo": blocks | {"scaling_factor": 0.5},
    }[name]
    with seeded(0):
        vae = getattr(diffusers, name)(**config)
    return vae.eval()


THEIRS = ("AutoencoderKLWan", "AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo")
theirs = pytest.mark.parametrize("name", THEIRS)


@pytest.mark.parametrize("kind, name", [*(("class", name) for name in THEIRS), ("text", "AutoencoderKLWan")])
def test_our_pipelines_take_autoencoders_of_diffusers(
    kind: str, name: str, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    case = request.getfixturevalue(f"{kind}_case")
    vae = make_stock_vae(name)
    pipeline = case.pipeline(vae=vae)
    videos, latents = case.run(pipeline), case.run(pipeline, output_type="latent")
    assert videos.shape == (1, 9, 3, 32, 32) and latents.shape == (1, 4, 3, 4, 4)
    if name == "AutoencoderKLWan":
        mean, std = (torch.tensor(vae.config[key]).view(1, 4, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    else:
        mean, std = 0, 1 / vae.config.scaling_factor
    with torch.no_grad():
        decoded = vae.decode(latents * std + mean).sample
    expected = pipeline.video_processor.postprocess_video(decoded, output_type="pt")
    torch.testing.assert_close(videos, expected, rtol=0, atol=1e-5)
    assert torch.equal(torch.cat(list(pipeline.decode_stream(latents)), dim=1), videos)

    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = case.run(pipeline, image=image, output_type="latent")
    encoded = normalize_latents(vae.encode(image.unsqueeze(2) * 2 - 1).latent_dist.mode(), vae.config)
    torch.testing.assert_close(given[:, :, :1], encoded, rtol=0, atol=1e-5)

    pipeline.save_pretrained(tmp_path)
    logging.enable_propagation()
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    logging.disable_propagation()
    assert "Expected types" not in caplog.text and type(loaded.vae) is type(vae)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(case.run(loaded), videos)


@theirs
def test_windows_of_autoencoders_of_diffusers(class_case, name: str):
    pipeline = class_case.pipeline(vae=make_stock_vae(name))
    arguments = {"num_frames": 17, "num_overlap_latent_frames": 1}
    pieces = []
    callback = {"callback_on_frames": lambda _, start, frames: pieces.append((start, frames))}
    frames = class_case.run(pipeline, **arguments, reencode_overlap=False, **callback)
    assert frames.shape[1] == 17
    ((start, piece),) = pieces  # all at the end
    assert start == 0 and torch.equal(piece, frames)
    class_case.run(pipeline, **arguments, reencode_overlap=False, output_type="latent", **callback)
    torch.testing.assert_close(pieces[1][1], frames, rtol=0, atol=1e-4)
    with pytest.raises(
        ValueError, match=f"`reencode_overlap` must be False for an {name}, which decodes whole videos"
    ):
        class_case.run(pipeline, **arguments, reencode_overlap=True)
    if name == "AutoencoderKLCogVideoX":  # four latent frames would come out as 16 frames
        with pytest.raises(ValueError, match=r"`num_frames` must be 8 \* n \+ 1 \(1, 9, ...\), got 13"):
            class_case.run(pipeline, num_frames=13, reencode_overlap=False)


@theirs
def test_their_layout_is_what_they_do(name: str):
    vae = make_stock_vae(name)
    layout = LatentLayout.of(vae)
    video = torch.zeros(1, layout.in_channels, 9, 16, 32)
    latents = vae.encode(video).latent_dist.mode()
    assert latents.shape == (1, layout.latent_channels, layout.num_latent_frames(9), 2, 4)
    assert layout[2:4] == (4, 8) and layout.num_sample_frames(3) == 9
    assert vae.decode(latents).sample.shape == video.shape
    normalised = normalize_latents(latents, vae.config)
    torch.testing.assert_close(denormalize_latents(normalised, vae.config), latents, rtol=0, atol=1e-5)


def test_wan_22_and_others():
    config = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True, "scale_factor_spatial": 16}
    wan = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **config)
    assert LatentLayout.of(wan) == (3, 4, 4, 16, 4)
    with pytest.raises(ValueError, match="`vae` must be a video autoencoder .* got an `AutoencoderTiny`"):
        LatentLayout.of(diffusers.AutoencoderTiny())

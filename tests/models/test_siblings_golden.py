"""WF-VAE and IV-VAE against tensors recorded from the reference implementations (random weights, float32)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_weights import recipe_weights
from safetensors import safe_open

from diffusers_leanvae import AutoencoderKLIVVAE, AutoencoderKLWFVAE, TemporalCache
from diffusers_leanvae.conversion import ivvae, wfvae
from diffusers_leanvae.latents import denormalize_latents, normalize_latents


FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden tensors are not at {GOLDEN}")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])

WF_TINY = [
    "wfvae_tiny_8ch",
    "wfvae_tiny_4ch_t17",
    "wfvae_tiny_16ch_connect2",
    "wfvae_tiny_nearest_noattn",
    "wfvae_tiny_8x8x8",
]
WF_OFFICIAL = {  # and their parameters, without those of the encoder that are the constants of wavelets
    "wfvae_official_S_4ch_recipe": 146_496_836 - 128,
    "wfvae_official_S_8ch_recipe": 147_347_788 - 128,
    "wfvae_official_L_16ch_recipe": 317_081_372 - 128,
    "wfvae_official_M_32ch_8x8x8_recipe": 227_035_816 - 192,
}
IV_TINY = ["ivvae_tiny_z4", "ivvae_tiny_z8_t17", "ivvae_tiny_z16_res1"]
IV_OFFICIAL = {
    "ivvae_official_z4_dim64_recipe": 107_170_842,
    "ivvae_official_z8_dim64_recipe": 107_379_150,
    "ivvae_official_z16_dim64_recipe": 107_798_550,
    "ivvae_official_z16_dim96_recipe": 241_854_742,
}


def assert_matches(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Measured: at most 4e-6 of the largest value for WF-VAE, 1e-5 for IV-VAE, whichever the dtype.
    assert actual.shape == expected.shape and expected.std() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5 * expected.abs().max().item())


def read(path: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Arguments of the reference, other metadata, stored weights, all other tensors."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    weights = {k.removeprefix("state_dict."): v for k, v in tensors.items() if k.startswith("state_dict.")}
    others = {k: v for k, v in tensors.items() if not k.startswith("state_dict.")}
    return json.loads(metadata["config"]), metadata, weights, others


def wf_config(args: dict[str, Any]) -> dict[str, Any]:
    """Our config of the reference's arguments alone."""
    config = {ours: args[original] for original, ours in wfvae.CONFIG_MAP.items()}
    names = {"layernorm": "layer_norm", "groupnorm": "group_norm", "trilinear": "linear"}
    config = {key: names.get(value, value) if isinstance(value, str) else value for key, value in config.items()}
    return config | {"temporal_compression_ratio": 4 if args["l1_dowmsample_block"] == "Downsample" else 8}


def load_wf(path: Path, dtype: torch.dtype) -> tuple[AutoencoderKLWFVAE, dict[str, torch.Tensor], dict[str, str]]:
    args, metadata, weights, golden = read(path)
    model: Any = AutoencoderKLWFVAE(**wf_config(args))
    config = dict(model.config)
    if not weights:
        weights = recipe_weights(wfvae.to_original(model.state_dict(), config), int(metadata["seed"]))
    model.load_state_dict(wfvae.from_original(weights, config), strict=True)
    model = torch.nn.Module.to(model, dtype).eval()
    return model, {key: value.to(dtype) for key, value in golden.items()}, metadata


def check_wf(model: AutoencoderKLWFVAE, golden: dict[str, torch.Tensor]) -> None:
    _, *subbands = model.encoder.levels_and_subbands(golden["video"])
    assert_matches(model.encoder(golden["video"]), golden["enc.moments"])
    assert_matches(model.encode(golden["video"]).latent_dist.mean, golden["enc.mean"])
    sample, *predicted = model.decoder.frames_and_subbands(model.decoder(golden["latent"], part="whole"))
    assert_matches(sample, golden["dec.sample"])
    for index, level in enumerate(("l1", "l2")):
        assert_matches(subbands[index], golden[f"enc.{level}_coeffs"])
        assert_matches(predicted[index], golden[f"dec.{level}_coeffs"])
    assert_matches(model.encode(golden["video"]).latent_dist.logvar, golden["enc.logvar"])
    assert_matches(model(golden["video"]).sample, golden["recon_from_mean"])
    assert_matches(model.encode(golden["image"]).latent_dist.parameters, golden["image.enc.moments"])
    assert_matches(model.decode(golden["image.latent"]).sample, golden["image.dec.sample"])


@needs_golden
@dtypes
@pytest.mark.parametrize("name", [*WF_TINY, "wfvae_recipe_groupnorm"])
@torch.no_grad()
def test_wf(name: str, dtype: torch.dtype):
    model, golden, _ = load_wf(GOLDEN / f"{name}.safetensors", dtype)
    check_wf(model, golden)


@needs_golden
@pytest.mark.parametrize("name", WF_TINY)
@torch.no_grad()
def test_wf_in_chunks(name: str):
    model, golden, metadata = load_wf(GOLDEN / f"{name}.safetensors", torch.float32)
    auto = json.loads(metadata.get("auto_chunks") or "{}")
    for key, expected in golden.items():
        if not key.startswith("tiled."):
            continue
        _, sizes, part, _ = key.split(".")
        num_frames, num_latent_frames = (
            (auto["enc"], auto["dec"]) if sizes == "auto" else map(int, sizes[1:].split("d"))
        )
        is_encoder = part == "enc"
        x, size = (golden["video"], num_frames) if is_encoder else (golden["latent"], num_latent_frames)
        chunks, cache, outputs = [x[:, :, :1], *x[:, :, 1:].split(size, dim=2)], TemporalCache(), []
        for chunk in chunks:
            cache.is_last = chunk is chunks[-1]
            if is_encoder:
                outputs.append(model.encode(chunk, cache=cache).latent_dist.parameters)
            else:
                outputs.append(model.decode(chunk, cache=cache).sample)
        assert_matches(torch.cat(outputs, dim=2), expected)


@needs_golden
@torch.no_grad()
def test_wf_activations():
    model, golden, _ = load_wf(GOLDEN / "wfvae_tiny_8ch.safetensors", torch.float32)
    modules = {
        "encoder.down1": model.encoder.levels[0].downsample,
        "encoder.down2": model.encoder.levels[1].downsample,
        "encoder.mid": model.encoder.mid,
        "decoder.conv_in": model.decoder.conv_in,
        "decoder.mid": model.decoder.mid,
        "decoder.up2": model.decoder.levels[0],
        "decoder.up1": model.decoder.levels[1],
        "decoder.layer": model.decoder.resnets_out,
    }
    seen: dict[str, torch.Tensor] = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, args, output, name=name: seen.__setitem__(name, output))
    model.encode(golden["video"])
    model.decode(golden["latent"])
    for name in modules:
        assert_matches(seen[name], golden[f"act.{name}"])


@needs_golden
@torch.no_grad()
def test_wf_of_open_sora_plan_1_3():
    path = GOLDEN / "wfvae_legacy_osp13_keys.safetensors"
    args, _, weights, golden = read(path)
    config = wfvae.config_from_original({}, weights)
    assert config.items() <= wf_config(args).items() | {("temporal_compression_ratio", 4)}
    model: Any = AutoencoderKLWFVAE(**config)
    model.load_state_dict(wfvae.from_original(weights, config), strict=True)
    assert_matches(model.eval().encode(golden["video"]).latent_dist.parameters, golden["enc.moments"])
    assert_matches(model.decode(golden["latent"]).sample, golden["dec.sample"])


@needs_golden
@pytest.mark.slow
@pytest.mark.parametrize("name", WF_OFFICIAL)
@torch.no_grad()
def test_wf_at_full_size(name: str):
    model, golden, _ = load_wf(GOLDEN / f"{name}.safetensors", torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == WF_OFFICIAL[name]
    check_wf(model, golden)


def load_iv(path: Path, dtype: torch.dtype) -> tuple[AutoencoderKLIVVAE, dict[str, torch.Tensor]]:
    args, metadata, weights, golden = read(path)
    model: Any = AutoencoderKLIVVAE(
        latent_channels=args["z_dim"],
        base_channels=args["dim"],
        channel_multipliers=args["dim_mult"],
        num_layers=args["num_res_blocks"],
        scaling_factor=args["scale_factor"],
        latents_mean=[args["shift_factor"]] * args["z_dim"],
        latents_std=[1.0] * args["z_dim"],
    )
    if not weights:
        weights = recipe_weights(ivvae.to_original(model.state_dict()), int(metadata["seed"]))
    model.load_state_dict(ivvae.from_original(weights), strict=True)
    model = torch.nn.Module.to(model, dtype).eval()
    return model, {key: value.to(dtype) for key, value in golden.items()}


def check_iv(model: AutoencoderKLIVVAE, golden: dict[str, torch.Tensor]) -> None:
    posterior = model.encode(golden["video"]).latent_dist
    assert_matches(posterior.mean, golden["enc.mean"])
    assert_matches(posterior.logvar, golden["enc.logvar"])
    latents = normalize_latents(posterior.mean, model.config)
    assert_matches(latents, golden["enc.scaled_mode"])
    assert_matches(model.decode(denormalize_latents(latents, model.config)).sample, golden["recon_from_mode"])
    assert_matches(model.decode(denormalize_latents(golden["latent"], model.config)).sample, golden["dec.sample"])
    image = model.encode(golden["image"]).latent_dist
    assert_matches(image.mean, golden["image.enc.mean"])
    assert_matches(image.logvar, golden["image.enc.logvar"])
    latents = denormalize_latents(golden["image.latent"], model.config)
    assert_matches(model.decode(latents).sample, golden["image.dec.sample"])


@needs_golden
@dtypes
@pytest.mark.parametrize("name", IV_TINY)
@torch.no_grad()
def test_iv(name: str, dtype: torch.dtype):
    model, golden = load_iv(GOLDEN / f"{name}.safetensors", dtype)
    check_iv(model, golden)


@needs_golden
@pytest.mark.slow
@pytest.mark.parametrize("name", IV_OFFICIAL)
@torch.no_grad()
def test_iv_at_full_size(name: str):
    model, golden = load_iv(GOLDEN / f"{name}.safetensors", torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == IV_OFFICIAL[name]
    check_iv(model, golden)


@torch.no_grad()
def test_fixture_of_wf():
    model, golden, _ = load_wf(FIXTURES / "wfvae_tiny.safetensors", torch.float32)
    assert_matches(model.encode(golden["video"]).latent_dist.parameters, golden["enc.moments"])
    assert_matches(model.decode(golden["latent"]).sample, golden["dec.sample"])


@torch.no_grad()
def test_fixture_of_iv():
    model, golden = load_iv(FIXTURES / "ivvae_tiny.safetensors", torch.float32)
    assert_matches(model.encode(golden["video"]).latent_dist.mean, golden["enc.mean"])
    assert_matches(model.decode(denormalize_latents(golden["latent"], model.config)).sample, golden["dec.sample"])

"""The port against tensors recorded from the reference implementation (shared/golden, random weights, float32)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from diffusers_leanvae.conversion.leanvae import from_original
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.models.temporal_cache import TemporalCache


GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden tensors are not at {GOLDEN}")
NAMES = ["leanvae_4ch", "leanvae_16ch", "leanvae_iter4_16ch"]


def load(name: str, dtype: torch.dtype) -> tuple[AutoencoderKLLeanVAE, dict[str, torch.Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        args = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    state_dict = {k.removeprefix("state_dict."): v for k, v in tensors.items() if k.startswith("state_dict.")}
    model = AutoencoderKLLeanVAE(
        latent_channels=args["latent_dim"],
        low_freq_dim=args["l_dim"],
        high_freq_dim=args["h_dim"],
        num_branch_layers=args["sep_num_layer"],
        num_fusion_layers=args["fusion_num_layer"],
        num_ista_iterations=args["ista_iter_num"],
        num_ista_layers=args["ista_layer_num"],
    )
    model.load_state_dict(from_original(state_dict), strict=True)
    return model.to(dtype).eval(), {k: v.to(dtype) for k, v in tensors.items() if not k.startswith("state_dict.")}


def assert_matches(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(expected.abs().max().item(), 1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_stage(name: str, dtype: torch.dtype):
    model, golden = load(name, dtype)
    video, image = golden["video"] * 2, golden["image"] * 2  # public pixels are twice the reference's

    subbands = model.analyze(video)
    assert_matches(subbands.image, golden["dwt.image"])
    assert_matches(subbands.video, golden["dwt.video"])
    assert_matches(model.synthesize(subbands), video)

    features = model.encoder(video[:, :, :1], video[:, :, 1:])
    assert_matches(features, golden["encoder.features"])
    posterior = model.encode(video).latent_dist
    assert_matches(posterior.mean, golden["latent_mean"])
    assert_matches(posterior.logvar, golden["latent_logvar"].clamp(-30, 20))

    latent_in = golden["latent_in"]
    features = model.bottleneck(latent_in.permute(0, 2, 3, 4, 1), reconstruct=True)
    assert_matches(features, golden["bottleneck.features"])
    subbands = model.decode_subbands(latent_in)
    assert_matches(subbands.image, golden["decoder.dwt.image"])
    assert_matches(subbands.video, golden["decoder.dwt.video"])
    assert_matches(model.decode(latent_in).sample / 2, golden["decoded"])
    assert_matches(model(video).sample / 2, golden["reconstruction"])

    assert_matches(model.encode(image).latent_dist.mean, golden["image.latent_mean"])
    assert_matches(model(image).sample / 2, golden["image.reconstruction"])
    assert_matches(model(image.unsqueeze(2)).sample / 2, golden["image.reconstruction"].unsqueeze(2))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_chunks(name: str):
    model, golden = load(name, torch.float32)
    for key, expected in golden.items():
        if not key.startswith("chunk"):
            continue
        length = int(key.removeprefix("chunk").split(".")[0])
        cache, outputs = TemporalCache(), []
        if key.endswith("latent_mean"):
            first, *later = golden["video"][:, :, :length], *golden["video"][:, :, length:].split(length - 1, dim=2)
            outputs = [model.encode(chunk * 2, cache=cache).latent_dist.mean for chunk in (first, *later)]
            assert_matches(torch.cat(outputs, dim=2), expected)
        else:
            outputs = [
                model.decode(chunk, cache=cache).sample / 2 for chunk in golden["latent_in"].split(length, dim=2)
            ]
            assert_matches(torch.cat(outputs, dim=2), expected)


@pytest.mark.parametrize("layout", ["release", "lightning"])
@torch.no_grad()
def test_checkpoint_files(layout: str):
    model = AutoencoderKLLeanVAE.from_single_file(GOLDEN / f"leanvae_4ch_{layout}.ckpt")
    _, golden = load("leanvae_4ch", torch.float32)
    assert_matches(model.encode(golden["video"] * 2).latent_dist.mean, golden["latent_mean"])
    assert_matches(model.decode(golden["latent_in"]).sample / 2, golden["decoded"])
    assert model.config.scaling_factor == 0.7744

"""Loss terms: against the reference's recorded values, and their edge cases."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers_leanvae.training.train_vae import VAETrainingModule
from safetensors import safe_open
from tiny import make_fresh

from diffusers_leanvae.conversion.leanvae import from_original
from diffusers_leanvae.losses.objectives import LeanVAEObjective
from diffusers_leanvae.losses.reconstruction import kl_divergence, log_mse, reconstruction_terms
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE


GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


def tiny_vae() -> AutoencoderKLLeanVAE:
    return make_fresh("leanvae", num_fusion_layers=1, num_ista_iterations=2)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden tensors are not at {GOLDEN}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", ["leanvae_4ch", "leanvae_16ch"])
def test_terms_are_those_of_the_reference(name: str, dtype: torch.dtype):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        arguments = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    vae = AutoencoderKLLeanVAE(
        latent_channels=arguments["latent_dim"],
        low_freq_dim=arguments["l_dim"],
        high_freq_dim=arguments["h_dim"],
        num_branch_layers=arguments["sep_num_layer"],
        num_fusion_layers=arguments["fusion_num_layer"],
        num_ista_iterations=arguments["ista_iter_num"],
        num_ista_layers=arguments["ista_layer_num"],
    )
    weights = {k.removeprefix("state_dict."): v for k, v in tensors.items() if k.startswith("state_dict.")}
    vae.load_state_dict(from_original(weights), strict=True)
    vae.to(dtype)
    sample = tensors["video"].to(dtype) * 2  # the reference's pixels are in [-0.5, 0.5]

    loss, terms, _ = VAETrainingModule(vae)(sample, tensors["loss.noise"].to(dtype))

    expected = {term: tensors[f"loss.{term}"] for term in ("l1_pixel", "l1_low", "l1_high", "kl")}
    torch.testing.assert_close({term: terms[term] for term in expected}, expected, rtol=5e-6, atol=0)
    weights = asdict(LeanVAEObjective())
    assert not any(weight for term, weight in weights.items() if term not in expected)
    weighted = sum(weights[term] * value for term, value in expected.items())
    torch.testing.assert_close(loss.detach().float(), weighted, rtol=5e-6, atol=0)


def test_kl_sums_over_everything_but_the_batch():
    mean, logvar = torch.full((2, 4, 3, 2, 2), 0.5), torch.full((2, 4, 3, 2, 2), -1.0)
    per_value = 0.5 * (0.25 + torch.exp(torch.tensor(-1.0)) - 1.0 + 1.0)
    torch.testing.assert_close(kl_divergence(mean, logvar), per_value * 4 * 3 * 2 * 2, rtol=1e-6, atol=0)
    assert kl_divergence(torch.zeros(1, 4), torch.zeros(1, 4)) == 0.0


def test_terms_are_float32_whatever_comes():
    image, video = torch.ones(1, 12, 1, 4, 4).bfloat16(), torch.ones(1, 24, 2, 4, 4).bfloat16()
    sample, moment = torch.zeros(1, 3, 5, 8, 8).bfloat16(), torch.zeros(1, 4, 2, 1, 1).bfloat16()
    terms = reconstruction_terms(sample, sample + 1, (image, video), (image * 0, video * 3), moment, moment, 0.5)
    assert {name: (term.dtype, term.item()) for name, term in terms.items()} == {
        "l1_pixel": (torch.float32, 0.5),
        "l1_low": (torch.float32, 1.0 + 2.0),
        "l1_high": (torch.float32, 1.0 + 2.0),
        "kl": (torch.float32, 0.0),
        "log_mse": (torch.float32, pytest.approx(math.log(0.25 + 1e-6))),
    }


def test_log_mse_is_psnr_up_to_a_factor():
    sample = torch.zeros(2, 3, 1, 8, 8)
    reconstruction = torch.tensor([0.2, 0.02]).reshape(2, 1, 1, 1, 1).expand_as(sample)  # 20 and 40 dB
    expected = math.log(10) / -10 * (20 + 40) / 2
    torch.testing.assert_close(log_mse(sample, reconstruction, 0.5), torch.tensor(expected), rtol=0, atol=0.06)


def test_single_images_have_image_terms_only():
    module = VAETrainingModule(tiny_vae())
    sample = torch.rand(2, 3, 1, 16, 16) * 2 - 1
    loss, terms, _ = module(sample)
    assert torch.isfinite(loss) and all(torch.isfinite(term) for term in terms.values())
    band = module.vae.analyze(sample).image[:, :3]
    predicted = module.vae.decode_subbands(module.vae.encode(sample).latent_dist.mean).image[:, :3]
    torch.testing.assert_close(terms["l1_low"], (band - predicted).abs().mean().detach(), rtol=0, atol=1e-6)


def test_no_noise_decodes_the_mean_and_every_parameter_learns():
    module = VAETrainingModule(tiny_vae())
    sample = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    zeros = torch.zeros(1, 4, 2, 2, 2)
    assert torch.equal(module(sample)[0], module(sample, zeros)[0])
    loss, *_ = module(sample, torch.randn(1, 4, 2, 2, 2))
    loss.backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []

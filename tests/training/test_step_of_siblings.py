"""The step of `train_vae.py` for WF-VAE, against the recorded losses of the reference, and for IV-VAE."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers_leanvae.training.train_vae import Recipe, VAETrainingModule
from processes import run_ranks
from tiny import make_tiny, make_video
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from wfvae_losses import read_recording, squared_error

from diffusers_leanvae.losses.adversarial import DiscriminatorTrainingModule, PatchDiscriminator3d
from diffusers_leanvae.losses.objectives import IVVAEObjective, Objective, WFVAEObjective, objective_of
from diffusers_leanvae.losses.reconstruction import kl_divergence
from diffusers_leanvae.losses.regularizers import latent_consistency
from diffusers_leanvae.trainer.autoencoder_terms import PerceptualTerms
from diffusers_leanvae.trainer.discriminators import AdversarialRecipe


class Recorded(nn.Module):
    """A WF-VAE whose answers are those of the recording, and whose only weight is that of the last layer."""

    def __init__(self, golden: dict[str, torch.Tensor], share: slice) -> None:
        super().__init__()
        self.golden, self.share = golden, share
        self.decoder = nn.Module()
        self.decoder.conv_out = nn.Conv3d(4, 3, 1, bias=False)
        self.decoder.conv_out.weight.data.copy_(golden["last_layer"])

    def encode(self, sample: torch.Tensor, return_dict: bool) -> tuple[DiagonalGaussianDistribution]:
        return (DiagonalGaussianDistribution(self.golden["moments"][self.share]),)

    def decode_subbands(self, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features, *subbands = (self.golden[name][self.share] for name in ("features", "dec_l1", "dec_l2"))
        return self.decoder.conv_out(features), *subbands

    def analyze(self, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.golden["enc_l1"][self.share], self.golden["enc_l2"][self.share]


def recorded_step(share: slice = slice(None), with_discriminator: bool = True) -> dict[str, torch.Tensor]:
    """A step on some of the two recorded videos: loss and terms of both sides, and the gradient of the last layer."""
    config, golden, discriminator = read_recording()
    judge = DiscriminatorTrainingModule(discriminator, "hinge", lecam_weight=0.0, generator_kind="hinge").eval()
    objective = WFVAEObjective(
        lpips=config["perceptual_weight"], kl=config["kl_weight"], wavelet=config["wavelet_weight"]
    )
    vae: Any = Recorded(golden, share)
    module: Any = VAETrainingModule(
        vae,
        objective,
        perceptual=PerceptualTerms(objective, squared_error, "all"),
        adversarial=AdversarialRecipe(weight=config["disc_weight"], is_adaptive=True),
    )
    module = DistributedDataParallel(module) if dist.is_initialized() else module
    loss, terms, (judged,) = module(golden["inputs"][share], discriminators=[judge] if with_discriminator else [])
    loss.backward()
    judge_loss, judge_terms = judge(judged.real, judged.fake)
    result = {"loss": loss.detach(), "judge_loss": judge_loss.detach(), **terms, **judge_terms}
    return result | {"gradient": vae.decoder.conv_out.weight.grad}


def golden_step(moment: str) -> dict[str, torch.Tensor]:
    return {key.split(".")[-1]: x.squeeze() for key, x in read_recording().tensors.items() if moment in key}


def assert_is_recorded(step: dict[str, torch.Tensor], with_discriminator: bool = True) -> None:
    golden = golden_step("gen.after" if with_discriminator else "gen.before")

    def assert_matches(actual: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)  # measured: 1.2e-7

    for name in ("rec_loss", "nll_loss"):  # with a log-variance of 0 they are the same
        assert_matches(step["l1"] + step["lpips"], golden[name])
    assert_matches(step["kl"], golden["kl_loss"])
    assert_matches(step["wavelet"], golden["wl_loss"])
    assert_matches(step["loss"], golden["total_loss"])
    if with_discriminator:
        assert_matches(step["adversarial"], golden["g_loss"])
        plain = step["l1"] + step["lpips"] + 1e-6 * step["kl"] + 0.1 * step["wavelet"]
        assert_matches((step["loss"] - plain) / step["adversarial"], golden["d_weight"])
        assert_matches(step["judge_loss"], golden_step("disc.loss_hinge")["loss_hinge"])


@pytest.mark.parametrize("with_discriminator", [False, True])
def test_a_step_of_wfvae_is_the_recorded_one(with_discriminator: bool):
    assert_is_recorded(recorded_step(with_discriminator=with_discriminator), with_discriminator)


def half_the_batch(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(recorded_step(slice(rank, rank + 1)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_make_the_recorded_step_too(tmp_path: Path):
    run_ranks(half_the_batch, str(tmp_path), num_processes=2, output=tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    gradients = [step.pop("gradient") for step in (first, second)]
    assert first["l1"] != second["l1"]
    assert_is_recorded({name: (first[name] + second[name]) / 2 for name in first})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    expected = recorded_step()["gradient"]
    tolerance = 2e-6 * expected.abs().max().item()  # measured: 3e-7
    torch.testing.assert_close(gradients[0], expected, rtol=0, atol=tolerance)


def test_posteriors_are_the_recorded_ones():
    tensors = read_recording().tensors
    moments, kl = tensors["moments"], tensors["posterior.kl"]
    clamped = {key.split(".")[-1]: x for key, x in tensors.items() if "posterior.clamp" in key}
    for index in range(2):
        posterior = DiagonalGaussianDistribution(moments[index : index + 1])
        actual = kl_divergence(posterior.mean, posterior.logvar)
        torch.testing.assert_close(actual, kl[index], rtol=1e-6, atol=0)
    posterior = DiagonalGaussianDistribution(clamped["moments"])
    torch.testing.assert_close(posterior.logvar, clamped["logvar"], rtol=0, atol=0)
    torch.testing.assert_close(posterior.std, clamped["std"], rtol=1e-6, atol=0)
    actual = kl_divergence(posterior.mean, posterior.logvar)
    torch.testing.assert_close(actual, clamped["kl"].squeeze(), rtol=1e-6, atol=0)


# --- Real models -----------------------------------------------------------------------------------------------------


def test_sub_bands_of_wfvae_are_those_of_its_encoder():
    vae, sample = make_tiny("wfvae"), make_video(1, 3, 9, 32, 48)
    _, *expected = vae.encoder.levels_and_subbands(sample)
    for actual, band in zip(vae.analyze(sample), expected, strict=True):
        torch.testing.assert_close(actual, band, rtol=0, atol=0)
    z = vae.encode(sample).latent_dist.mean
    reconstruction, *subbands = vae.decode_subbands(z)
    torch.testing.assert_close(reconstruction, vae.decode(z).sample, rtol=0, atol=1e-6)
    assert [band.shape for band in subbands] == [band.shape for band in expected]


@pytest.mark.parametrize("family", ["wfvae", "ivvae"])
@pytest.mark.parametrize("num_frames", [1, 9])
def test_every_weight_gets_a_gradient(family: str, num_frames: int):
    vae = make_tiny(family).train()
    loss, terms, ((real, fake),) = VAETrainingModule(vae)(make_video(1, 3, num_frames, 32, 32))
    loss.backward()
    left_out = {name for name, parameter in vae.named_parameters() if parameter.grad is None}
    # An image leaves out what is between the frames of a group alone.
    assert all("time_conv" in name for name in left_out) and bool(left_out) == (family == "ivvae" and num_frames == 1)
    assert real.shape == fake.shape and not fake.requires_grad
    names = {"wfvae": {"l1", "kl", "wavelet"}, "ivvae": {"l1_pixel", "kl", "log_mse"}}
    assert set(terms) == names[family]


def test_the_objective_of_ivvae_is_a_weighted_sum():
    vae, sample = make_tiny("ivvae").train(), make_video(2, 3, 5, 32, 32)
    objective = IVVAEObjective(l1_pixel=2.0, kl=1e-3, lpips=0.5, log_mse=0.1)
    module = VAETrainingModule(vae, objective, perceptual=PerceptualTerms(objective, squared_error, "all"))
    loss, terms, ((_, fake),) = module(sample)
    torch.testing.assert_close(terms["l1_pixel"], F.l1_loss(fake, sample), rtol=1e-6, atol=0)
    torch.testing.assert_close(terms["lpips"], F.mse_loss(fake, sample), rtol=1e-6, atol=0)
    posterior = vae.encode(sample).latent_dist
    expected = kl_divergence(posterior.mean, posterior.logvar).detach()
    torch.testing.assert_close(terms["kl"], expected, rtol=1e-6, atol=0)
    expected = 2.0 * terms["l1_pixel"] + 1e-3 * terms["kl"] + 0.5 * terms["lpips"] + 0.1 * terms["log_mse"]
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["leanvae", "wfvae", "ivvae"])
@pytest.mark.parametrize("num_frames", [1, 9])
def test_latent_consistency_joins_in_every_family(family: str, num_frames: int):
    vae, sample = make_tiny(family).train(), make_video(2, 3, num_frames, 32, 32)
    objective = objective_of(type(vae))
    plain, step = (VAETrainingModule(vae, objective(latent_consistency=weight))(sample) for weight in (0.0, 0.5))
    (_, fake), mean = step.judged[0], vae.encode(sample).latent_dist.mean
    expected = latent_consistency(vae, fake, mean).detach()
    torch.testing.assert_close(step.terms["latent_consistency"], expected, rtol=1e-6, atol=0)
    assert set(step.terms) - set(plain.terms) == {"latent_consistency"} and expected > 0.01
    torch.testing.assert_close(step.loss, plain.loss + 0.5 * expected, rtol=1e-6, atol=0)  # measured: 0

    alone = VAETrainingModule(vae, objective(**dict.fromkeys(asdict(objective()), 0.0) | {"latent_consistency": 1.0}))
    gradients = []
    for _ in range(2):
        vae.zero_grad()
        alone(sample).loss.backward()
        gradients.append({name: p.grad for name, p in vae.named_parameters() if p.grad is not None})
        vae.enable_gradient_checkpointing()
    assert {name.split(".")[0] for name, gradient in gradients[0].items() if gradient.any()} >= {"encoder", "decoder"}
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)  # measured: 0


@pytest.mark.parametrize(("family", "factor"), [("leanvae", 0.5), ("ivvae", 1.0)])
def test_charbonnier_joins(family: str, factor: float):
    vae, sample = make_tiny(family).train(), make_video(2, 3, 5, 32, 32)
    objective = objective_of(type(vae))
    loss, terms, ((_, fake),) = VAETrainingModule(vae, objective(charbonnier=2.0))(sample)
    expected = ((factor * (fake - sample)).square() + 1e-6).sqrt().mean()
    torch.testing.assert_close(terms["charbonnier"], expected, rtol=1e-6, atol=0)
    plain = VAETrainingModule(vae, objective())(sample)
    torch.testing.assert_close(loss, plain.loss + 2.0 * expected, rtol=1e-6, atol=0)


def test_the_variance_of_pixels_scales_their_terms():
    vae, sample = make_tiny("wfvae").train(), make_video(2, 3, 5, 32, 32)

    def step(**weights: float) -> Any:
        objective = WFVAEObjective(kl=0.0, wavelet=0.0, lpips=1.0, **weights)
        return VAETrainingModule(vae, objective, perceptual=PerceptualTerms(objective, squared_error, "all"))(sample)

    plain, wide = step(), step(logvar=0.5)
    torch.testing.assert_close(wide.terms["l1"], plain.terms["l1"], rtol=0, atol=0)
    constant = 0.5 * 3 * 32 * 32
    torch.testing.assert_close(wide.loss, plain.loss * torch.tensor(-0.5).exp() + constant, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("family", "objective"), [("wfvae", WFVAEObjective()), ("ivvae", IVVAEObjective())])
def test_the_adaptive_weight_knows_the_last_layers(family: str, objective: Objective):
    vae, sample = make_tiny(family).train(), make_video(1, 3, 5, 32, 32)
    torch.manual_seed(0)
    judge = DiscriminatorTrainingModule(PatchDiscriminator3d(num_layers=1, num_filters=4), generator_kind="hinge")
    last = [p for name, p in vae.decoder.named_parameters() if objective.is_last_layer(name)]
    assert [p.shape[0] for p in last] == {"wfvae": [24], "ivvae": [3, 3]}[family]

    def gradient(judges: list, is_adaptive: bool = False) -> torch.Tensor:
        adversarial = AdversarialRecipe(weight=0.5, is_adaptive=is_adaptive)
        loss = VAETrainingModule(vae, objective, adversarial=adversarial)(sample, discriminators=judges).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, last)])

    reconstruction = gradient([])
    adaptive = gradient([judge], is_adaptive=True) - reconstruction
    torch.testing.assert_close(adaptive.norm(), 0.5 * reconstruction.norm(), rtol=1e-4, atol=0)  # measured: 2e-5


# --- Recipes ---------------------------------------------------------------------------------------------------------


def recipe_with(**changes: Any) -> Recipe:
    data = {"data": SimpleNamespace(train="clips"), "output": "runs/x"}
    return Recipe(**(data | changes))  # type: ignore[arg-type]


def test_losses_are_those_of_the_type():
    assert recipe_with(model={"type": "wfvae"}, loss={"lpips": 1}).loss == {
        "l1": 1.0,
        "lpips": 1.0,
        "ms_ssim": 0.0,
        "kl": 1e-6,
        "wavelet": 0.1,
        "latent_consistency": 0.0,
        "logvar": 0.0,
    }
    assert recipe_with().loss["l1_low"] == 0.2
    with pytest.raises(ValueError, match=r"Unknown recipe key `loss\.l1_low`: legal keys here are l1, lpips, "):
        recipe_with(model={"type": "wfvae"}, loss={"l1_low": 1.0})
    with pytest.raises(ValueError, match="`model.type` must be one of 'leanvae', 'wfvae', 'ivvae', got 'vae'"):
        recipe_with(model={"type": "vae"})
    with pytest.raises(ValueError, match="`model.type` must be 'leanvae' for `init: pca`, got 'ivvae'"):
        recipe_with(model={"type": "ivvae"}, init="pca")

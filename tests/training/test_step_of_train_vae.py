"""The step of `train_vae.py`: what each switch adds to the loss, against the functions that compute it."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_leanvae.training.train_vae import VAETrainingModule
from tiny import make_fresh
from torch import nn

from diffusers_leanvae.losses.adversarial import DiscriminatorTrainingModule, PatchDiscriminator2d
from diffusers_leanvae.losses.alignment import AlignmentWeights, alignment_terms
from diffusers_leanvae.losses.objectives import LeanVAEObjective
from diffusers_leanvae.losses.perceptual import reference_frames
from diffusers_leanvae.losses.reconstruction import reconstruction_terms
from diffusers_leanvae.losses.regularizers import (
    draw_mask_ratio,
    equivariance_transform,
    latent_consistency,
    local_correlation,
    low_pass_consistency,
)
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.trainer.autoencoder_terms import PerceptualTerms, Regularization
from diffusers_leanvae.trainer.discriminators import AdversarialRecipe


@pytest.fixture
def vae() -> AutoencoderKLLeanVAE:
    return make_fresh("leanvae", num_fusion_layers=1, num_ista_iterations=2)


@pytest.fixture
def sample() -> torch.Tensor:
    return torch.rand(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def judge(seed: int = 0) -> DiscriminatorTrainingModule:
    torch.manual_seed(seed)
    return DiscriminatorTrainingModule(PatchDiscriminator2d(num_layers=1, num_filters=4))


def test_plain_weights_give_plain_terms(vae: AutoencoderKLLeanVAE, sample: torch.Tensor):
    loss, terms, judged = VAETrainingModule(vae)(sample)
    assert set(terms) == {"l1_pixel", "l1_low", "l1_high", "kl", "log_mse"}
    weights = LeanVAEObjective()
    expected = sum(getattr(weights, name) * term for name, term in terms.items())
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    ((real, fake),) = judged
    assert real is sample and not fake.requires_grad
    torch.testing.assert_close(fake, vae(sample).sample.detach(), rtol=0, atol=1e-6)


def test_a_transformed_step_decodes_transformed_latents(vae: AutoencoderKLLeanVAE, sample: torch.Tensor):
    """The reconstruction terms compare `decode(transform(latents))` with `transform(sample)`; KL stays as it was."""
    switches = Regularization(equivariance_probability=1.0, equivariance_min_scale=0.5)
    _, terms, ((real, fake),) = VAETrainingModule(vae, regularization=switches)(sample, seed=(5, 4))
    rng = np.random.default_rng([5, 4, 0])
    rng.random()  # whether to transform at all
    transform = equivariance_transform(rng, (4, 3, 4, 4), min_scale=0.5)
    assert (transform.size, transform.flip, transform.quarter_turns) != ((4, 4), False, 0)
    target = transform.apply_to_sample(sample)
    posterior = vae.encode(sample).latent_dist
    bands = vae.decode_subbands(transform.apply_to_latents(posterior.mean))
    expected = reconstruction_terms(
        target, vae.synthesize(bands), vae.analyze(target), bands, posterior.mean, posterior.logvar, 0.5
    )
    torch.testing.assert_close(terms, {name: term.detach() for name, term in expected.items()}, rtol=1e-5, atol=0)
    torch.testing.assert_close(real, target, rtol=0, atol=0)
    torch.testing.assert_close(fake, vae.synthesize(bands).detach(), rtol=0, atol=1e-6)


def test_the_latents_of_a_transformed_reconstruction_are_to_be_the_transformed_means(
    vae: AutoencoderKLLeanVAE, sample: torch.Tensor
):
    """Also where noise was added to what was decoded, or some of it hidden."""
    switches = Regularization(equivariance_probability=1.0, equivariance_min_scale=0.5, mask_latents=True)
    module = VAETrainingModule(vae, LeanVAEObjective(latent_consistency=1.0), switches)
    noise = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    seed = next(number for number in range(99) if draw_mask_ratio(np.random.default_rng([number, 1])) == 0.5)
    _, terms, ((_, fake),) = module(sample, noise, seed=(seed,))
    rng = np.random.default_rng([seed, 0])
    rng.random()
    transform = equivariance_transform(rng, (4, 3, 4, 4), min_scale=0.5)
    expected = latent_consistency(vae, fake, transform.apply_to_latents(vae.encode(sample).latent_dist.mean))
    torch.testing.assert_close(terms["latent_consistency"], expected.detach(), rtol=1e-5, atol=0)


def test_equivariance_comes_in_its_share_of_the_steps(vae: AutoencoderKLLeanVAE):
    module = VAETrainingModule(vae, regularization=Regularization(equivariance_probability=0.25))
    clip = torch.rand(1, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = [module(clip, seed=(0, step)).judged[0].real is clip for step in range(100)]
    assert plain.count(False) == pytest.approx(25, abs=13)  # three standard deviations


def test_regularisers_of_latents_join_with_their_weights(vae: AutoencoderKLLeanVAE, sample: torch.Tensor):
    plain = VAETrainingModule(vae)(sample)
    switches = Regularization(local_correlation=0.5, low_pass=2.0)
    loss, terms, _ = VAETrainingModule(vae, regularization=switches)(sample)
    mean = vae.encode(sample).latent_dist.mean
    correlation, low = local_correlation(mean).detach(), low_pass_consistency(vae, sample, mean).detach()
    assert correlation > 0 and low > 0
    torch.testing.assert_close(terms["local_correlation"], correlation, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms["low_pass"], low, rtol=1e-5, atol=0)
    torch.testing.assert_close((loss - plain.loss).detach(), 0.5 * correlation + 2.0 * low, rtol=1e-4, atol=0)


def test_masks_hide_latents_in_some_steps(vae: AutoencoderKLLeanVAE, sample: torch.Tensor):
    module = VAETrainingModule(vae, regularization=Regularization(mask_latents=True))
    with torch.no_grad():
        plain = VAETrainingModule(vae)(sample).terms["l1_pixel"]
        errors = torch.stack([module(sample, seed=(0, step)).terms["l1_pixel"] for step in range(20)])
    num_plain = int((errors == plain).sum())
    assert 8 <= num_plain <= 19  # seven in ten draws hide nothing


class FrameDistance(nn.Module):
    """A distance of frames that keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: list[torch.Tensor] = []

    def forward(self, frames: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        self.seen.append(frames)
        return self.scale * (frames - reconstruction).abs().mean(dim=(1, 2, 3))


@pytest.mark.parametrize(("frames", "count"), [("reference", 5), ("all", 9)])
def test_perceptual_terms_look_at_the_frames_of_the_recipe(
    frames: str, count: int, vae: AutoencoderKLLeanVAE, sample: torch.Tensor
):
    distance, weights = FrameDistance(), LeanVAEObjective(lpips=4.0)
    module = VAETrainingModule(vae, weights, perceptual=PerceptualTerms(weights, distance, frames))
    loss, terms, _ = module(sample, seed=(7,))
    index = reference_frames(9, np.random.default_rng([7, 2])) if frames == "reference" else range(9)
    expected = torch.stack([sample[clip, :, i] for clip in range(2) for i in index])
    assert len(expected) == 2 * count and torch.equal(distance.seen[0], expected)
    plain = VAETrainingModule(vae)(sample).loss
    torch.testing.assert_close(loss - plain, 4.0 * terms["lpips"], rtol=1e-4, atol=0)
    assert "scale" not in "".join(module.state_dict())  # neither saved nor trained with the model


def test_adversarial_terms_reach_the_model_alone(vae: AutoencoderKLLeanVAE, sample: torch.Tensor):
    module, discriminator = VAETrainingModule(vae, adversarial=AdversarialRecipe(weight=0.5)), judge()
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    plain = module(sample).loss
    loss, terms, _ = module(sample, discriminators=[discriminator])
    torch.testing.assert_close(loss - plain, 0.5 * terms["adversarial"], rtol=1e-4, atol=0)
    loss.backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert all(torch.equal(value, before[name]) for name, value in discriminator.state_dict().items())
    assert all(parameter.grad is not None for parameter in vae.decoder.parameters())


def test_the_adaptive_weight_levels_the_gradients_of_the_last_layers(vae: AutoencoderKLLeanVAE, sample: torch.Tensor):
    weights, discriminator = LeanVAEObjective(kl=0.0), judge()
    last = [p for name, p in vae.decoder.named_parameters() if name.split(".")[0].endswith("_proj")]
    assert len(last) == 8

    def gradient(judges: list, is_adaptive: bool = False) -> torch.Tensor:
        adversarial = AdversarialRecipe(weight=1.0, is_adaptive=is_adaptive)
        module = VAETrainingModule(vae, weights, adversarial=adversarial)
        return torch.cat([g.flatten() for g in torch.autograd.grad(module(sample, discriminators=judges).loss, last)])

    reconstruction = gradient([])
    adversarial = gradient([discriminator]) - reconstruction
    adaptive = gradient([discriminator], is_adaptive=True) - reconstruction
    torch.testing.assert_close(adaptive.norm(), reconstruction.norm(), rtol=1e-3, atol=0)
    cosine = torch.nn.functional.cosine_similarity(adaptive, adversarial, dim=0)
    assert cosine > 0.999


def test_a_teacher_adds_its_terms_and_a_second_pair(vae: AutoencoderKLLeanVAE, sample: torch.Tensor):
    latents = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    module = VAETrainingModule(vae, LeanVAEObjective(ms_ssim=1.0), adversarial=AdversarialRecipe(weight=0.5))
    judges = [judge(0), judge(1)]
    plain = module(sample, discriminators=judges[:1])
    loss, terms, judged = module(sample, teacher_latents=latents, discriminators=judges)
    mean = vae.encode(sample).latent_dist.mean
    torch.testing.assert_close(terms["align_latents"], (mean - latents).abs().mean().detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(judged[1].fake, vae.decode(latents).sample.detach(), rtol=0, atol=1e-6)
    weights = {"align_pixel": 4, "align_latents": 2, "align_low": 0.2, "align_high": 0.4, "align_ms_ssim": 1}
    added = sum(weight * terms[name] for name, weight in (weights | {"align_adversarial": 0.5}).items())
    torch.testing.assert_close(loss - plain.loss, added, rtol=1e-4, atol=0)


def test_latents_can_be_compared_on_other_videos(vae: AutoencoderKLLeanVAE, sample: torch.Tensor):
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 4, 2, 2, 2, generator=generator)
    others = torch.rand(1, 3, 5, 16, 16, generator=generator) * 2 - 1
    module = VAETrainingModule(vae)
    loss, terms, judged = module(sample, teacher_latents=latents, teacher_sample=others)
    aligned = alignment_terms(vae, latents, vae.encode(others).latent_dist.mean, others, normalise=False)
    for name, term in aligned.terms.items():
        torch.testing.assert_close(terms[name], term.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(judged[1].fake, aligned.reconstruction.detach(), rtol=0, atol=0)
    assert judged[1].real is others
    # Nothing else changes: what is added to the loss, and to every gradient, is the alignment alone.
    added = sum(weight * aligned.terms[name] for name, weight in asdict(AlignmentWeights()).items())
    weights = list(vae.parameters())
    whole, plain, extra = (
        torch.cat([g.flatten() for g in torch.autograd.grad(value, weights, materialize_grads=True)])
        for value in (loss, module(sample).loss, added)
    )
    torch.testing.assert_close(whole, plain + extra, rtol=1e-4, atol=1e-6 * whole.abs().max().item())
    assert extra.norm() > 1e-3 * whole.norm()


def test_what_is_missing_is_named(vae: AutoencoderKLLeanVAE):
    with pytest.raises(ValueError, match="`lpips` must be given"):
        VAETrainingModule(vae, LeanVAEObjective(lpips=1.0))
    frames: Any = "none"
    with pytest.raises(ValueError, match="`frames` must be .*'reference'.*'all'.*, got 'none'"):
        PerceptualTerms(LeanVAEObjective(), frames=frames)

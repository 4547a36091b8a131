"""Objectives of latent diffusion: the reference's numbers, and what each must do by its definition."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers_leanvae.training.train_lvdm import LatentDiffusionTrainingModule
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_leanvae.conversion.latte import config_from_original, from_original, to_original
from diffusers_leanvae.generation.schedulers import make_scheduler
from diffusers_leanvae.losses.diffusion import EpsilonObjective, FlowMatchingObjective
from diffusers_leanvae.models.transformer_latte import LeanVAELatteTransformer3DModel


GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


def golden(name: str) -> dict[str, torch.Tensor]:
    """Golden tensors, those of latents with channels before frames as ours."""
    path = GOLDEN / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return {key: x.transpose(1, 2).contiguous() if x.ndim == 5 else x for key, x in load_file(path).items()}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- The reference ---------------------------------------------------------------------------------------------------


def test_loss_and_gradient_are_those_of_the_reference():
    tensors = golden("latte_diffusion")
    latents, noise, timesteps = (tensors[f"loss.{name}"] for name in ("x0", "noise", "t"))
    assert {0, 1} < set(timesteps.tolist())
    output = tensors["loss.model_output"].requires_grad_()
    objective = EpsilonObjective()
    noisy = objective.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy, tensors["loss.x_t"], rtol=0, atol=1e-6)
    terms = objective.loss(output, latents, noise, timesteps)
    for name in ("mse", "vb", "loss"):
        torch.testing.assert_close(terms[name], tensors[f"loss.{name}"], rtol=1e-6, atol=1e-7)
    terms["loss"].mean().backward()
    torch.testing.assert_close(output.grad, tensors["loss.grad_model_output"], rtol=0, atol=1e-8)


def test_the_models_distribution_is_that_of_the_reference():
    tensors = golden("latte_diffusion")
    found = EpsilonObjective().model_distribution(tensors["loss.model_output"], tensors["loss.x_t"], tensors["loss.t"])
    for name, values in zip(("mean", "log_variance", "pred_xstart"), found, strict=True):
        torch.testing.assert_close(values, tensors[f"step1000.{name}"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1].exp(), tensors["step1000.variance"], rtol=1e-6, atol=0)


def test_coefficients_are_the_tables_of_the_reference():
    tensors = golden("latte_diffusion")
    timesteps, ones, zeros = torch.arange(1000), torch.ones(1000, 1), torch.zeros(1000, 1)
    objective = EpsilonObjective()

    def distribution(epsilon: torch.Tensor, value: torch.Tensor, noisy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return objective.model_distribution(torch.cat((epsilon, value), dim=1), noisy, timesteps)

    low = distribution(zeros, -ones, ones)
    high = distribution(-ones, ones, zeros)
    predicted_from_noisy, predicted_from_noise = low[2], high[2]
    found = {
        "sqrt_alphas_cumprod": objective.add_noise(ones, zeros, timesteps),
        "sqrt_one_minus_alphas_cumprod": objective.add_noise(zeros, ones, timesteps),
        "sqrt_recip_alphas_cumprod": predicted_from_noisy,
        "sqrt_recipm1_alphas_cumprod": predicted_from_noise,
        "posterior_mean_coef1": high[0] / predicted_from_noise,
        "posterior_mean_coef2": low[0] - high[0] / predicted_from_noise * predicted_from_noisy,
        "posterior_log_variance_clipped": low[1],
        "betas": high[1].exp(),
    }
    for name, values in found.items():
        expected = tensors[f"table1000.{name}"]
        torch.testing.assert_close(values[:, 0].double(), expected, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("name", ["latte_uncond_c4", "latte_class_c4", "latte_class_c16"])
def test_a_training_step_is_that_of_the_reference(name: str):
    tensors = golden(name)
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        heads = json.loads(file.metadata()["config"])["num_heads"]
    original = {k.removeprefix("state_dict."): x for k, x in tensors.items() if k.startswith("state_dict.")}
    transformer = LeanVAELatteTransformer3DModel(**config_from_original(original, heads)).train()
    transformer.load_state_dict(from_original(original), strict=True)
    objective, labels = EpsilonObjective(), tensors.get("train.y")
    batch = [tensors[f"train.{name}"] for name in ("x0", "noise", "t")]
    noisy = objective.add_noise(*batch)
    torch.testing.assert_close(noisy, tensors["train.x_t"], rtol=0, atol=1e-6)
    terms = objective.loss(transformer(noisy, batch[2], labels).sample, *batch)
    for term in ("mse", "vb", "loss"):
        torch.testing.assert_close(terms[term], tensors[f"train.{term}"], rtol=1e-5, atol=1e-6)
    loss, means = LatentDiffusionTrainingModule(transformer, objective)(*batch, labels)
    torch.testing.assert_close(means["vb"], terms["vb"].mean(), rtol=0, atol=1e-7)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in transformer.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    torch.testing.assert_close(norm, tensors["train.grad_norm"].float().view(()), rtol=1e-5, atol=0)
    tables = {name: torch.zeros_like(buffer) for name, buffer in transformer.named_buffers()}
    ours = to_original(gradients | tables)
    expected = {key.removeprefix("train.grad."): x for key, x in tensors.items() if key.startswith("train.grad.")}
    assert len(expected) >= 3
    for key, gradient in expected.items():
        torch.testing.assert_close(ours[key], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


# --- Epsilon ---------------------------------------------------------------------------------------------------------


def test_the_bound_reaches_the_variance_alone():
    latents, noise, timesteps = draw(3, 4, 2, 4, 4), draw(3, 4, 2, 4, 4, seed=1), torch.tensor([0, 1, 700])
    output = draw(3, 8, 2, 4, 4, seed=2).requires_grad_()
    terms = EpsilonObjective().loss(output, latents, noise, timesteps)
    (grad,) = torch.autograd.grad(terms["vb"].sum(), output, retain_graph=True)
    assert grad[:, :4].abs().max() == 0 and (grad[:, 4:].abs().amax((1, 2, 3, 4)) > 0).all()
    (grad,) = torch.autograd.grad(terms["mse"].sum(), output)
    assert grad[:, 4:].abs().max() == 0 and (grad[:, :4].abs().amax((1, 2, 3, 4)) > 0).all()


def test_a_perfect_answer_has_no_loss():
    latents, noise, timesteps = draw(2, 4, 2, 4, 4), draw(2, 4, 2, 4, 4, seed=1), torch.tensor([1, 999])
    terms = EpsilonObjective().loss(torch.cat((noise, -torch.ones_like(noise)), dim=1), latents, noise, timesteps)
    torch.testing.assert_close(terms["loss"], torch.zeros(2), rtol=0, atol=1e-5)


def test_min_snr_weighs_the_squared_error():
    latents, noise, output = draw(3, 4, 2, 4, 4), draw(3, 4, 2, 4, 4, seed=1), draw(3, 8, 2, 4, 4, seed=2)
    timesteps = torch.tensor([5, 400, 900])
    plain = EpsilonObjective().loss(output, latents, noise, timesteps)
    weighted = EpsilonObjective(min_snr_gamma=5.0).loss(output, latents, noise, timesteps)
    signal = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[timesteps]
    snr = signal / (1 - signal)
    expected = (plain["mse"] * snr.clamp(max=5) / snr).float()
    torch.testing.assert_close(weighted["loss"] - weighted["vb"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weighted["mse"], plain["mse"], rtol=0, atol=0)
    assert snr[0] > 5 > snr[1]


def test_timesteps_cover_all_steps_evenly():
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    assert EpsilonObjective().timesteps(uniform).bincount().tolist() == [10] * 1000
    edges = torch.tensor([0.0, 1.0 - 2**-24])
    for sampling in ("uniform", "logit_normal"):
        timesteps = EpsilonObjective(sampling=sampling).timesteps(edges)
        assert timesteps.dtype == torch.int64 and timesteps[0] == 0 and 990 <= timesteps[1] <= 999


# --- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective", [EpsilonObjective(min_snr_gamma=5.0), FlowMatchingObjective()], ids=["epsilon", "flow"]
)
def test_what_has_no_weight_does_not_count(objective):
    latents, noise = draw(3, 4, 3, 4, 4), draw(3, 4, 3, 4, 4, seed=1)
    is_flow = isinstance(objective, FlowMatchingObjective)
    output = draw(3, 4 if is_flow else 8, 3, 4, 4, seed=2).requires_grad_()
    timesteps = torch.tensor([0.0, 400.0, 900.0]) if is_flow else torch.tensor([0, 400, 900])
    plain = objective.loss(output, latents, noise, timesteps)
    ones = objective.loss(output, latents, noise, timesteps, torch.ones(3, 1, 1, 1, 1, dtype=torch.bool))
    counts = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])[:, None, :, None, None]
    weighted = objective.loss(output, latents, noise, timesteps, counts)
    for name in plain:
        torch.testing.assert_close(ones[name], plain[name], rtol=1e-6, atol=0)
        for number in range(3):  # as if the frames were not there
            rest = [x[number : number + 1, :, number:] for x in (output, latents, noise)]
            alone = objective.loss(*rest, timesteps[number : number + 1])[name]
            torch.testing.assert_close(weighted[name][number : number + 1], alone, rtol=1e-5, atol=0)
    assert (weighted["loss"][1:] - plain["loss"][1:]).abs().min() > 1e-3
    (gradient,) = torch.autograd.grad(weighted["loss"].sum(), output)
    assert not gradient[1, :, :1].any() and not gradient[2, :, :2].any() and gradient[2, :, 2].abs().min() > 0
    double = objective.loss(output, latents, noise, timesteps, 2.0 * counts)
    torch.testing.assert_close(double["loss"], weighted["loss"], rtol=1e-6, atol=0)


# --- Flow ------------------------------------------------------------------------------------------------------------


def test_flow_leads_from_latents_to_noise():
    latents, noise = draw(3, 4, 2, 4, 4), draw(3, 4, 2, 4, 4, seed=1)
    objective = FlowMatchingObjective()
    timesteps = torch.tensor([0.0, 250.0, 1000.0])
    noisy = objective.add_noise(latents, noise, timesteps)
    expected = torch.stack((latents[0], 0.75 * latents[1] + 0.25 * noise[1], noise[2]))
    torch.testing.assert_close(noisy, expected, rtol=0, atol=1e-6)
    assert objective.loss(noise - latents, latents, noise, timesteps)["loss"].tolist() == [0.0, 0.0, 0.0]
    off = objective.loss(noise - latents + 2.0, latents, noise, timesteps)["loss"]
    torch.testing.assert_close(off, torch.full((3,), 4.0), rtol=0, atol=1e-5)


def test_levels_are_uniform_or_logit_normal():
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    assert torch.equal(FlowMatchingObjective().timesteps(uniform), uniform * 1000)
    levels = FlowMatchingObjective("logit_normal").timesteps(uniform) / 1000
    logits = torch.logit(levels.double())
    torch.testing.assert_close(logits.mean(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits.std(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-3)
    assert math.isfinite(FlowMatchingObjective("logit_normal").timesteps(torch.zeros(1)).item())


def test_shifted_levels_are_those_of_the_scheduler():
    scheduler = make_scheduler("flow", shift=5.0)  # whose steps are, until it is told others, all of training's
    levels = torch.arange(1000, 0, -1) / 1000
    timesteps = FlowMatchingObjective(shift=5.0).timesteps(levels)
    torch.testing.assert_close(timesteps, scheduler.timesteps.float(), rtol=0, atol=2e-4)  # three ulp of 1000
    assert (timesteps > 900).float().mean() > 0.35 > 3 * (levels > 0.9).float().mean()


def test_levels_outside_are_those_at_the_ends():
    levels = torch.tensor([-0.2, 0.0, 1.0, 1.2])
    assert EpsilonObjective().timesteps_at(levels).tolist() == [0, 0, 999, 999]
    assert FlowMatchingObjective().timesteps_at(levels).tolist() == [0.0, 0.0, 1000.0, 1000.0]


def test_what_cannot_be_is_refused():
    latents, timesteps = draw(1, 4, 2, 4, 4), torch.tensor([3])
    with pytest.raises(ValueError, match="`model_output` must have 8 channels, noise and variance, got 4"):
        EpsilonObjective().loss(latents, latents, latents, timesteps)
    with pytest.raises(ValueError, match=r"`model_output` must have the shape of the latents, \(1, 4, 2, 4, 4\), got"):
        FlowMatchingObjective().loss(draw(1, 8, 2, 4, 4), latents, latents, timesteps)
    with pytest.raises(ValueError, match="`min_snr_gamma` must be positive or None, got 0"):
        EpsilonObjective(min_snr_gamma=0)
    with pytest.raises(ValueError, match="`shift` must be positive, got 0"):
        FlowMatchingObjective(shift=0)
    with pytest.raises(ValueError, match="`sampling` must be one of 'uniform', 'logit_normal', got 'cosine'"):
        FlowMatchingObjective("cosine")  # pyright: ignore[reportArgumentType]

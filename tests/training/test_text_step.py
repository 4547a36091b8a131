"""What a step of training on texts minimises: loss and gradients of a reference in float64, written another way."""

import math
from typing import Any

import pytest
import torch
from diffusers import LatteTransformer3DModel
from diffusers_leanvae.training import train_lvdm
from tiny import LATTE_TEXT, enliven, make_latents, seeded

from diffusers_leanvae.data.latent_samples import LatentBatch
from diffusers_leanvae.text_encoders import TextEmbeddings, TextEncoder, make_text_encoder
from diffusers_leanvae.trainer.text_conditioning import Captions


pytest.importorskip("transformers", reason="transformers is an optional dependency")

CAPTIONS = ["a red circle moves left", "a blue square", "a circle"]
DROP = torch.tensor([False, False, True])
GIVEN = torch.tensor([0, 2, 1])
OBJECTIVES = {
    "flow": (train_lvdm.FlowMatchingObjective, torch.tensor([100.0, 501.5, 980.0])),
    "epsilon": (train_lvdm.EpsilonObjective, torch.tensor([1, 300, 950])),
}
SIGNAL = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


@pytest.fixture
def encoder() -> TextEncoder:
    with seeded(0):
        small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
        made = make_text_encoder(CAPTIONS, small, max_length=9)
    enliven(made.model).double()
    return made


def make_module(name: str, text_encoder: Any) -> Any:
    with seeded(0):
        transformer = LatteTransformer3DModel(**(LATTE_TEXT | {"out_channels": 4 if name == "flow" else 8}))
    transformer = torch.nn.Module.to(enliven(transformer), torch.float64)
    return train_lvdm.LatentDiffusionTrainingModule(transformer, OBJECTIVES[name][0](), text_encoder=text_encoder)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(make_latents(3, 4, 3, 4, 4, dtype=torch.float64, seed=seed) for seed in (3, 4))


def prepared(encoder: TextEncoder) -> TextEmbeddings:
    captions = Captions(encoder, torch.device("cpu"), is_trained=True)
    videos = torch.zeros(3, 1)
    return captions.prepare(LatentBatch(videos, None, None, torch.arange(3), 0, captions=list(CAPTIONS)), DROP)


def reference_loss(name: str, module: Any, encoder: TextEncoder) -> torch.Tensor:
    """Each sample by itself, its text without padding and masks, its frames that count alone."""
    losses = []
    for number, (clean, noise) in enumerate(zip(*batch(), strict=True)):
        text = "" if DROP[number] else CAPTIONS[number]
        ids = torch.tensor([encoder.tokenizer(text).input_ids])
        hidden = encoder.model(input_ids=ids)[0]
        timestep = OBJECTIVES[name][1][number]
        given = int(GIVEN[number])
        if name == "flow":
            level = timestep.double() / 1000
            noisy = clean + level * (noise - clean)
        else:
            noisy = SIGNAL[timestep].sqrt() * clean + (1 - SIGNAL[timestep]).sqrt() * noise
        seen = torch.cat([clean[:, :given], noisy[:, given:]], dim=1)
        output = module.transformer(seen[None], timestep[None], encoder_hidden_states=hidden).sample[0]
        clean, noise, noisy, output = (x[:, given:] for x in (clean, noise, noisy, output))
        if name == "flow":
            losses.append((output - noise + clean).square().mean())
        else:
            losses.append(epsilon_loss(output, clean, noise, noisy, int(timestep)))
    return torch.stack(losses).mean()


def epsilon_loss(output: Any, clean: Any, noise: Any, noisy: Any, timestep: int) -> torch.Tensor:
    """Squared error of the noise, and the divergence in bits between the Gaussians of a reverse step."""
    epsilon, value = output.chunk(2)
    signal, before = SIGNAL[timestep], SIGNAL[timestep - 1]
    beta = 1 - signal / before

    def posterior_mean(start: torch.Tensor) -> torch.Tensor:
        on_start = before.sqrt() * beta / (1 - signal)
        return on_start * start + (signal / before).sqrt() * (1 - before) / (1 - signal) * noisy

    variance = beta * (1 - before) / (1 - signal)
    log_variance = (value + 1) / 2 * beta.log() + (1 - value) / 2 * variance.log()
    predicted = (noisy - (1 - signal).sqrt() * epsilon.detach()) / signal.sqrt()
    distance = (posterior_mean(clean) - posterior_mean(predicted)).square()
    divergence = log_variance - variance.log() - 1 + (variance + distance) / log_variance.exp()
    return (noise - epsilon).square().mean() + divergence.mean() / 2 / math.log(2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_are_those_of_the_reference(name: str, encoder: TextEncoder):
    module = make_module(name, encoder.model)
    parameters = dict(module.named_parameters())
    loss, terms = module(*batch(), OBJECTIVES[name][1], text=prepared(encoder), num_given=GIVEN)
    found = torch.autograd.grad(loss, list(parameters.values()))
    expected = reference_loss(name, module, encoder)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # the objective computes in float32
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    largest = max(gradient.abs().max() for gradient in gradients)
    for key, ours, theirs in zip(parameters, found, gradients, strict=True):
        bound = 2e-5 * theirs.abs().max() + 1e-6 * largest
        assert (ours - theirs).abs().max() <= bound, (key, (ours - theirs).abs().max(), theirs.abs().max())
    assert all(parameters[key].grad is None for key in parameters)
    assert {key.split(".")[0] for key in parameters} == {"transformer", "text_encoder"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_given_frames_are_seen_clean_and_do_not_count(name: str, encoder: TextEncoder):
    module = make_module(name, encoder.model)
    latents, noise = batch()
    seen = []
    module.transformer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    losses = []
    for change in (0.0, 5.0):
        other = noise.clone()
        other[1, :, :2] += change
        other[2, :, :1] -= change
        losses.append(module(latents, other, OBJECTIVES[name][1], text=prepared(encoder), num_given=GIVEN).loss.item())
    assert losses[0] == losses[1] and torch.equal(*seen)
    noisy = module.objective.add_noise(latents, noise, OBJECTIVES[name][1])
    for number, given in enumerate(GIVEN.tolist()):
        assert torch.equal(seen[0][number, :, :given], latents[number, :, :given])
        assert torch.equal(seen[0][number, :, given:], noisy[number, :, given:])
    free = module(latents, noise, OBJECTIVES[name][1], text=prepared(encoder)).loss.item()
    assert abs(free - losses[0]) > 1e-3
    none = torch.zeros(3, dtype=torch.long)
    assert module(latents, noise, OBJECTIVES[name][1], text=prepared(encoder), num_given=none).loss == free


def test_padding_has_no_influence(encoder: TextEncoder):
    module = make_module("flow", encoder.model)
    timesteps, text = OBJECTIVES["flow"][1], prepared(encoder)
    assert text.mask.sum(1).tolist() == [6, 4, 1]
    other = text._replace(embeds=torch.where(text.mask == 1, text.embeds, 4))
    found = [module(*batch(), timesteps, text=one).loss for one in (text, other)]
    assert found[0].item() == found[1].item()
    (gradient,) = torch.autograd.grad(found[0], encoder.model.get_input_embeddings().weight)
    assert gradient[encoder.tokenizer.pad_token_id].abs().max() == 0
    assert gradient[encoder.tokenizer.eos_token_id].abs().max() > 0

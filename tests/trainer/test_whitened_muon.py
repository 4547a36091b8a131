"""Muon on whitened inputs: bounded answers, AdamW's numbers elsewhere, resume; and the fast depthwise gradients."""

import pytest
import torch
import torch.nn.functional as F
from tiny import make_fresh
from torch import nn

from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.models.leanvae_blocks import CausalDepthwiseConv3d
from diffusers_leanvae.trainer.whitened_muon import WhitenedMuon, orthogonalize


@pytest.mark.parametrize("shape", [(100, 30), (30, 100), (80, 50)])
def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values(shape: tuple[int, int]):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * 37
    update = orthogonalize(matrix)
    values = torch.linalg.svdvals(update)
    assert 0.6 < values.min() and values.max() < 1.25
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.t() @ update @ right.t()  # diagonal: the singular vectors are the same
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-4)


def tiny_vae() -> AutoencoderKLLeanVAE:
    return make_fresh("leanvae", seed=1, num_fusion_layers=1)


def smooth_clips(seed: int) -> torch.Tensor:
    grid = torch.rand(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(grid, size=(5, 32, 32), mode="trilinear")


def train(vae: AutoencoderKLLeanVAE, optimizer: torch.optim.Optimizer, steps: range, num_passes: int = 1) -> None:
    for step in steps:
        sample = smooth_clips(step)
        optimizer.zero_grad()
        for _ in range(num_passes):
            reconstruction = vae.decode(vae.encode(sample).latent_dist.mean).sample
            ((reconstruction - sample).square().mean() / num_passes).backward()
        optimizer.step()


def test_steps_are_bounded_by_what_the_layer_answers():
    """Inputs as lopsided as tokens are: one direction a thousand times the others. All outputs still move by `lr`."""
    torch.manual_seed(5)
    layer = nn.Linear(16, 16, bias=False).train()
    inputs = torch.randn(512, 16) * torch.tensor([1000.0] + [1.0] * 15)
    optimizer = WhitenedMuon(layer, lr=1e-3, damping=1e-7)
    before = layer.weight.detach().clone()
    moved = []
    for _ in range(6):
        optimizer.zero_grad()
        (layer(inputs) * torch.randn(512, 16)).sum().backward()
        optimizer.step()
        moved.append(inputs @ (layer.weight.detach() - before).t())
        before = layer.weight.detach().clone()
    assert all(change.abs().max() == 0 for change in moved[:3])  # too few looks at the inputs
    for change in moved[3:]:
        assert change.square().mean().sqrt().item() == pytest.approx(1e-3, rel=0.25)
        # The strong direction and the weak ones contribute alike, instead of a million to one.
        strong, weak = (inputs[:, part].square().mean() for part in (slice(0, 1), slice(1, None)))
        assert strong > 1e5 * weak


def test_what_is_no_linear_map_moves_as_with_adamw():
    vae, reference = tiny_vae(), tiny_vae()
    ours = WhitenedMuon(vae, lr=1e-1, adamw_factor=0.1, betas=(0.9, 0.95))
    others = {parameter for group in ours.param_groups if group["kind"] == "adamw" for parameter in group["params"]}
    names = [name for name, parameter in vae.named_parameters() if parameter in others]
    assert {name.rpartition(".")[2] for name in names} == {"weight", "bias", "step_size", "threshold"}
    assert all("norm" in name or "logvar" in name for name in names if name.endswith("weight"))
    theirs = torch.optim.AdamW(
        [parameter for name, parameter in reference.named_parameters() if name in names],
        lr=1e-2,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    generator = torch.Generator().manual_seed(2)
    vae.decode(vae.encode(torch.rand(1, 3, 5, 16, 16)).latent_dist.mean)  # a look at the inputs
    for _ in range(3):
        for mine, other in zip(vae.parameters(), reference.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        ours.step()
        theirs.step()
    for (name, mine), other in zip(vae.named_parameters(), reference.parameters(), strict=True):
        if name in names:
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_it_lowers_the_loss_and_continues_from_its_state_dict():
    straight = tiny_vae()
    straight_optimizer = WhitenedMuon(straight, lr=1e-3)
    sample = smooth_clips(99)
    before = (straight(sample).sample - sample).square().mean().item()
    train(straight, straight_optimizer, range(40))
    assert (straight(sample).sample - sample).square().mean().item() < 0.6 * before

    first, second = tiny_vae(), tiny_vae()
    optimizer = WhitenedMuon(first, lr=1e-3)
    train(first, optimizer, range(11))
    second.load_state_dict(first.state_dict())
    resumed = WhitenedMuon(second, lr=1e-3)
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, range(11, 40))
    torch.testing.assert_close(second.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_accumulated_passes_count_as_one_look():
    once, twice = tiny_vae(), tiny_vae()
    train(once, WhitenedMuon(once, lr=1e-3), range(6))
    train(twice, WhitenedMuon(twice, lr=1e-3), range(6), num_passes=2)
    torch.testing.assert_close(twice.state_dict(), once.state_dict(), rtol=0, atol=2e-5)


def test_frozen_parts_stay_and_compiled_passes_are_refused():
    vae = tiny_vae()
    vae.encoder.requires_grad_(False)
    frozen = {name: tensor.clone() for name, tensor in vae.encoder.state_dict().items()}
    train(vae, WhitenedMuon(vae), range(5))
    torch.testing.assert_close(dict(vae.encoder.state_dict()), frozen, rtol=0, atol=0)
    with pytest.raises(ValueError, match="`module` must have parameters that require a gradient, got none."):
        WhitenedMuon(vae.requires_grad_(False))
    layer = nn.Linear(2, 2).eval()  # as a compiled pass: the hook sees nothing
    optimizer = WhitenedMuon(layer)
    layer(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="saw no inputs"):
        optimizer.step()


def test_depthwise_gradients_are_those_of_the_plain_convolution():
    torch.manual_seed(4)
    conv = CausalDepthwiseConv3d(6).double()
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.double, requires_grad=True)
    parameters = (x, conv.weight, conv.bias)
    upstream = torch.randn_like(x)
    ours = torch.autograd.grad(conv(x), parameters, upstream)  # type: ignore[arg-type]
    padded = F.pad(x.permute(0, 4, 1, 2, 3), (0, 0, 0, 0, 2, 0))
    plain = F.conv3d(padded, conv.weight, conv.bias, padding=(0, 1, 1), groups=6).permute(0, 2, 3, 4, 1)
    expected = torch.autograd.grad(plain, parameters, upstream)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)

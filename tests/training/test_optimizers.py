"""Muon beside AdamW: orthogonal updates, AdamW's numbers elsewhere, resume; and the fast depthwise gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.models.naf import CausalDepthwiseConv3d
from diffusers_leanvae.optimizers import MuonAdamW, is_hidden_matrix, orthogonalize


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
    torch.manual_seed(1)
    sizes = {"num_branch_layers": 1, "num_fusion_layers": 1, "num_ista_iterations": 1, "num_ista_layers": 1}
    return AutoencoderKLLeanVAE(low_freq_dim=8, high_freq_dim=24, **sizes)


def test_muon_moves_the_feed_forwards_and_adamw_the_rest_as_torch_does():
    vae, reference = tiny_vae(), tiny_vae()
    chosen = {name for name, parameter in vae.named_parameters() if is_hidden_matrix(name, parameter)}
    assert len(chosen) == 2 * 8  # two matrices in each of the 8 blocks
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    ours = MuonAdamW(vae.named_parameters(), **settings)
    others = [parameter for name, parameter in reference.named_parameters() if name not in chosen]
    theirs = torch.optim.AdamW(others, **settings)
    generator = torch.Generator().manual_seed(2)
    before = {name: parameter.detach().clone() for name, parameter in vae.named_parameters()}
    for _ in range(3):
        for mine, other in zip(vae.parameters(), reference.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        ours.step()
        theirs.step()
    for (name, mine), other in zip(vae.named_parameters(), reference.parameters(), strict=True):
        if name in chosen:
            step = (mine - before[name]).square().mean().sqrt().item() / (3 * settings["lr"])
            assert 0.05 < step < 0.35, (name, step)  # an AdamW step has a root mean square of about 0.2
        else:
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_muon_continues_from_its_state_dict():
    def run(num_steps: int, state: dict | None = None, weight: torch.Tensor | None = None):
        torch.manual_seed(3)
        layer = nn.Linear(4, 6)
        if weight is not None:
            layer.load_state_dict(weight)  # type: ignore[arg-type]
        optimizer = MuonAdamW(layer.named_parameters(), select=lambda name, parameter: parameter.ndim == 2)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(num_steps):
            optimizer.zero_grad()
            layer(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        return layer.state_dict(), optimizer.state_dict()

    straight, _ = run(4)
    weight, state = run(2)
    resumed, _ = run(2, state, weight)  # type: ignore[arg-type]
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match="`select` must choose matrices, got a parameter of shape"):
        MuonAdamW(nn.Linear(2, 2).named_parameters(), select=lambda name, parameter: True)


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

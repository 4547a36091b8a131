"""The schedule-free optimizer is what its paper writes down, and it finds the least of a function."""

import copy

import pytest
import torch
from torch import nn

from diffusers_leanvae.trainer.schedule_free import ScheduleFreeAdamW


def gradient(y: torch.Tensor) -> torch.Tensor:
    """Of a function whose least is at 0.3, of different steepness along each axis."""
    return (y - 0.3) * torch.tensor([1.0, 10.0, 0.1], dtype=y.dtype)


def test_it_is_algorithm_1_of_the_paper() -> None:
    """Sequences z, x and y are kept apart here, in float64; rates rise as in a warm-up."""
    beta1, beta2, weight_decay, eps = 0.8, 0.95, 0.01, 1e-8
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    parameter = nn.Parameter(start.clone())
    optimizer = ScheduleFreeAdamW([parameter], betas=(beta1, beta2), weight_decay=weight_decay, eps=eps)
    z, x, v, total = start.clone(), start.clone(), torch.zeros_like(start), 0.0
    for step in range(1, 31):
        rate = 0.05 * min(1, step / 5)
        optimizer.param_groups[0]["lr"] = rate
        y = (1 - beta1) * z + beta1 * x
        torch.testing.assert_close(parameter.data, y, rtol=1e-12, atol=1e-14)
        parameter.grad = gradient(parameter.data)
        optimizer.step()
        v = beta2 * v + (1 - beta2) * gradient(y).square()
        gamma = rate * (1 - beta2**step) ** 0.5
        z = z - gamma * (gradient(y) / (v.sqrt() + eps) + weight_decay * y)
        total += gamma**2
        x = (1 - gamma**2 / total) * x + gamma**2 / total * z
        torch.testing.assert_close(optimizer.averages([parameter])[0], x, rtol=1e-12, atol=1e-14)


def test_the_average_comes_nearer_than_adamw_at_the_same_rate() -> None:
    errors = []
    for kind in (ScheduleFreeAdamW, torch.optim.AdamW):
        generator = torch.Generator().manual_seed(0)
        parameter = nn.Parameter(torch.ones(1000))  # as many runs with noise of their own
        optimizer = kind([parameter], lr=0.05, weight_decay=0.0)
        for _ in range(1000):
            parameter.grad = parameter.data - 0.3 + torch.randn(1000, generator=generator)
            optimizer.step()
        found = optimizer.averages([parameter])[0] if isinstance(optimizer, ScheduleFreeAdamW) else parameter.data
        errors.append((found - 0.3).square().mean().sqrt().item())
    assert errors[0] < 0.55 * errors[1], errors  # measured: 0.52


def test_it_goes_on_from_its_state() -> None:
    parameters = [nn.Parameter(torch.tensor([1.0, -2.0, 0.5])) for _ in range(2)]
    optimizers = [ScheduleFreeAdamW([parameter], lr=0.05) for parameter in parameters]

    def take(index: int) -> None:
        parameters[index].grad = gradient(parameters[index].data)
        optimizers[index].step()

    for _ in range(3):
        take(0)
    parameters[1].data.copy_(parameters[0].data)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for index in (0, 1):
        take(index)
    assert torch.equal(parameters[0], parameters[1])
    assert torch.equal(*(optimizers[i].averages([parameters[i]])[0] for i in (0, 1)))


def test_what_is_not_trained_stays_as_it_is() -> None:
    trained, never, frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = ScheduleFreeAdamW([trained, frozen], lr=0.1)
    for _ in range(2):
        trained.grad, frozen.grad = torch.ones(2), torch.ones(2)
        optimizer.step()
    frozen.requires_grad_(False)
    averages = optimizer.averages([trained, never, frozen])
    assert not torch.equal(averages[0], trained)
    assert torch.equal(averages[1], never) and torch.equal(averages[2], frozen)


def test_it_refuses_a_beta_that_hides_the_average() -> None:
    with pytest.raises(ValueError, match=r"^The first of `betas` must be above 0 .* got 0.0\.$"):
        ScheduleFreeAdamW([nn.Parameter(torch.ones(1))], betas=(0.0, 0.9))

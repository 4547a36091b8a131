"""An average put together from checkpoints counts steps as a power function does, and nothing is lost of them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from diffusers_leanvae.trainer.checkpoints import MARK
from diffusers_leanvae.trainer.post_hoc import average_post_hoc, misfit, shares_of_averages
from diffusers_leanvae.trainer.sharding import WeightAverage


def profile(num_steps: int, up_to: int, exponent: float) -> torch.Tensor:
    """How much each step counts in the average by a power function at the step `up_to`."""
    edges = torch.arange(up_to + 1, dtype=torch.float64) / up_to
    counts = torch.zeros(num_steps, dtype=torch.float64)
    counts[:up_to] = edges.pow(exponent + 1).diff()
    return counts


@pytest.mark.parametrize("other", [0.0, 3.0, 6.94, 16.97])
def test_shares_make_another_profile(other: float) -> None:
    """Each interval counts in all as the function wants, within it by the one of the training."""
    steps = list(range(10, 401, 10))
    shares = shares_of_averages(steps, 6.94, other)
    found = sum(share * profile(400, step, 6.94) for share, step in zip(shares, steps, strict=True))
    wanted = profile(400, 400, other)
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(found.unfold(0, 10, 10).sum(1), wanted.unfold(0, 10, 10).sum(1), rtol=0, atol=1e-12)
    # After the first half, where one step of an interval counts much more than another, both are nearly the same.
    assert (found - wanted)[200:].abs().max() < 0.16 * wanted.max()  # measured: 0.158
    if other == 6.94:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("other", [0.0, 3.0, 6.94, 16.97, 60.0])
@pytest.mark.parametrize("steps", [[4000], [500, 500, 4000], list(range(200, 4001, 200))])
def test_the_misfit_is_what_counts_for_other_steps(steps: list[int], other: float) -> None:
    shares = shares_of_averages(steps, 6.94, other)
    found = sum(share * profile(4000, step, 6.94) for share, step in zip(shares, steps, strict=True))
    expected = (found - profile(4000, 4000, other)).abs().sum().item() / 2
    assert misfit(steps, 6.94, other) == pytest.approx(expected, abs=5e-6)  # measured: 2e-6


def run(folder: Path, exponent: float | None = 6.94) -> tuple[WeightAverage, list[nn.Parameter], list[torch.Tensor]]:
    """Average a walk of two parameters, the second of which is frozen in its course; checkpoints on the way."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    ema, seen = WeightAverage(parameters, exponent, decay=0.5, foreach=True), []
    for step in range(1, 121):
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=generator)
        if step == 100:
            parameters[1].requires_grad_(False)
        ema.step(parameters)
        seen.append(parameters[0].detach().clone())
        if step % 5 == 0:
            checkpoint = folder / f"step-{step:07d}"
            checkpoint.mkdir()
            torch.save(ema.state_dict(), checkpoint / MARK)
    return ema, parameters, seen


@pytest.mark.parametrize("other", [3.0, 16.97])
def test_the_average_is_that_of_the_weights_on_the_way(tmp_path: Path, other: float) -> None:
    ema, parameters, seen = run(tmp_path)
    before = [weight.clone() for weight in ema.shadow_params]
    average_post_hoc(ema, parameters, sorted(tmp_path.iterdir()), other)
    wanted = (profile(120, 120, other)[:, None] * torch.stack(seen)).sum(0)
    spread = torch.stack(seen)[-40:].std(0).mean()
    # By the profile that the intervals leave room for; the average of the training is several times farther away.
    assert (ema.shadow_params[0] - wanted).abs().max() < 0.03 * spread  # measured: 0.024
    assert (before[0] - wanted).abs().max() > 0.5 * spread
    assert torch.equal(ema.shadow_params[1], before[1])  # frozen: what the others have learned from


def test_the_same_exponent_changes_nothing(tmp_path: Path) -> None:
    ema, parameters, _ = run(tmp_path)
    before = ema.shadow_params[0].clone()
    average_post_hoc(ema, parameters, sorted(tmp_path.iterdir()), 6.94)
    torch.testing.assert_close(ema.shadow_params[0], before, rtol=1e-6, atol=1e-6)


def test_steps_that_were_skipped_count_once() -> None:
    shares = shares_of_averages([5, 5, 10], 6.94, 3.0)
    assert shares[0] == 0 and shares[1:] == shares_of_averages([5, 10], 6.94, 3.0)


def test_it_refuses_averages_of_another_kind(tmp_path: Path) -> None:
    ema, parameters, _ = run(tmp_path)
    checkpoints = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"^The last checkpoint must be of step 120, got steps \[5, .*100\]\.$"):
        average_post_hoc(ema, parameters, checkpoints[:20], 3.0)
    ema.exponent = 3.0
    with pytest.raises(ValueError, match=r"^`ema_power` must be that of all checkpoints .* got 3.0 and 6.94 there\.$"):
        average_post_hoc(ema, parameters, checkpoints, 16.97)

"""Averages of the weights over another length than they were averaged over in training (arXiv 2312.02696)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoints import MARK
from .sharding import WeightAverage


MAX_MISFIT = 0.2  # 30 checkpoints at equal distances have 0.11 for the average of all steps, from an exponent of 6.94


def average_post_hoc(
    ema: WeightAverage, parameters: Sequence[nn.Parameter], checkpoints: Sequence[Path], exponent: float
) -> float:
    """Put the average by another power function together from the averages in the checkpoints of a run.

    Between two checkpoints steps count as they do in training, and each such interval counts in all as the power
    function wants it: the interval's mean follows from the averages at both its ends. (The paper fits the function by
    least squares to averages over two lengths.)

    Args:
        ema: The average at the end of the run, by a power function; it is replaced.
        parameters: What is averaged. Those that are not trained are left as they are in `ema`.
        checkpoints: Folders, from the first to that of the last step. The more, the better the function is met.
        exponent: Of the power function to meet.

    Returns:
        Of [`misfit`].

    Raises:
        ValueError: If the checkpoints do not hold averages by the power function of `ema`, up to its step.
    """
    states = check_exponents(checkpoints, ema.exponent)
    steps = [state["optimization_step"] for state in states]
    if not steps or steps[-1] != ema.optimization_step:
        raise ValueError(f"The last checkpoint must be of step {ema.optimization_step}, got steps {steps}.")
    assert ema.exponent is not None
    shares = shares_of_averages(steps, ema.exponent, exponent)
    trained = [index for index, parameter in enumerate(parameters) if parameter.requires_grad]
    for index in trained:
        total = torch.zeros_like(ema.shadow_params[index], dtype=torch.float64, device="cpu")
        for share, state in zip(shares, states, strict=True):
            total.add_(state["shadow_params"][index].to(total), alpha=share)
        ema.shadow_params[index].copy_(total)
    return misfit(steps, ema.exponent, exponent)


def check_exponents(checkpoints: Sequence[Path], exponent: float | None) -> list[dict[str, Any]]:
    """Return the averages in checkpoints, mapped and not read; refuse those that are not of an exponent."""
    states = [
        torch.load(checkpoint / MARK, map_location="cpu", weights_only=True, mmap=True) for checkpoint in checkpoints
    ]
    found = {state.get("exponent") for state in states}
    if exponent is None or found - {exponent}:
        raise ValueError(
            f"`ema_power` must be that of all checkpoints for `post_hoc_power`, got {exponent} and "
            f"{', '.join(sorted(map(str, found)))} there."
        )
    return states


def check_steps(steps: Sequence[int], exponent: float, other: float) -> None:
    """Refuse checkpoints, by their steps, that are too few for another average; arguments as of [`misfit`]."""
    share = misfit(steps, exponent, other)
    if share > MAX_MISFIT:
        raise ValueError(
            f"`post_hoc_power` must be nearer to `ema_power`, or `save_every` smaller and `keep_checkpoints` larger, "
            f"got {other} of {exponent} from {len(steps)} checkpoints: {share:.2f} of such an average would count for "
            f"other steps, {MAX_MISFIT} is the most."
        )


def shares_of_averages(steps: Sequence[int], exponent: float, other: float) -> list[float]:
    """How much each average over the steps `1, ..., steps[i]` counts; the shares are 1 together.

    Args:
        steps: From 1, none before another that is less.
        exponent: Of the averages: step `j` counts by `j ** (exponent + 1) - (j - 1) ** (exponent + 1)` in them.
        other: Of the function to meet, which is the same but for this exponent.
    """
    last, shares, previous = steps[-1], [0.0] * len(steps), 0
    for index, step in enumerate(steps):
        if step == previous:  # all steps since then were skipped
            shares[index], shares[index - 1] = shares[index - 1], 0.0
            continue
        # How much all steps up to one count, in terms of the last: the interval's mean is that of the average at its
        # end, without what the average at its start has told already.
        mass = (step / last) ** (other + 1) - (previous / last) ** (other + 1)
        told = (previous / step) ** (exponent + 1)
        shares[index] += mass / (1 - told)
        if index:
            shares[index - 1] -= mass * told / (1 - told)
        previous = step
    return shares


def misfit(steps: Sequence[int], exponent: float, other: float) -> float:
    """How much of an average put together counts for steps that the function to meet gives it to others.

    Args:
        steps, exponent, other: As of [`shares_of_averages`].

    Returns:
        From 0, where the function is met, to 1.
    """
    if exponent == other:
        return 0.0
    total, last = 0.0, steps[-1]
    for start, stop in zip((0, *steps), steps, strict=False):
        if start == stop:
            continue
        # Within an interval, from `ratio` to 1, both have a density of their own, and these cross once.
        ratio, powers = start / stop, (exponent + 1, other + 1)
        masses = [1 - ratio**power for power in powers]
        crossing = (powers[1] * masses[0] / (powers[0] * masses[1])) ** (1 / (exponent - other))
        before = [(crossing**power - ratio**power) / mass for power, mass in zip(powers, masses, strict=True)]
        total += (stop / last) ** powers[1] * masses[1] * abs(before[0] - before[1])
    return total

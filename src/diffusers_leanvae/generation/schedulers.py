"""Sampling with any scheduler of diffusers; and as the reference Latte does it: step lists, settings, guidance.

The reference (and so the released weights) diffuses over 1000 steps with linear betas 1e-4 .. 0.02, predicts epsilon
and a variance between its bounds, and never clips. Which of diffusers' schedulers gives its numbers is not obvious:
see [`make_scheduler`].
"""

import math
import reprlib
from collections.abc import Sequence
from inspect import signature
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers.schedulers import (
    DDPMParallelScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from ..checks import check_choice, check_integer, is_number


NUM_TRAIN_TIMESTEPS = 1000
_BETAS: dict[str, Any] = {
    "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
SCHEDULERS = ("ddpm", "ddim", "dpm++", "flow")
LEARNED_VARIANCES = ("learned", "learned_range")

# Any scheduler of diffusers: they have methods in common, but no type that declares these.
Scheduler = Any


def make_scheduler(
    name: str, shift: float = 1.0
) -> DDPMScheduler | DPMSolverMultistepScheduler | FlowMatchEulerDiscreteScheduler:
    """Make a scheduler with the settings of Latte.

    Args:
        name:
            `"ddpm"`: ancestral sampling with the learned variance; `step` takes the whole output, `2 * C` channels.
            `"ddim"`: DDIM without noise. It is the first-order DPM solver, for `DDIMScheduler` goes to step
            `t - 1000 // n` and not to the next listed one. `step` takes the epsilon half of the output.
            `"dpm++"`: second-order DPM-Solver++, for few steps. `step` takes the epsilon half.
            `"flow"`: Euler steps of flow matching, for models trained so. `step` takes the velocity.
        shift: Of `"flow"`: above 1, more of the steps are at high noise; that of the training.

    The three diffusion schedulers take the reference's steps by `set_timesteps(timesteps=respaced_timesteps(n))`.
    """
    check_choice("name", name, SCHEDULERS)
    if name == "ddpm":
        return DDPMScheduler(**_BETAS, variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    if name in ("ddim", "dpm++"):
        order = 1 if name == "ddim" else 2
        return DPMSolverMultistepScheduler(
            **_BETAS, algorithm_type="dpmsolver++", solver_order=order, final_sigmas_type="zero"
        )
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=shift)


def respaced_timesteps(num_steps: int, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> list[int]:
    """Return the steps that the reference keeps for `num_steps` steps, in the order of sampling: descending.

    Args:
        num_steps: 1 to `num_train_timesteps`.
        num_train_timesteps: Steps of training.
    """
    check_integer("num_steps", num_steps)
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"`num_steps` must be between 1 and {num_train_timesteps}, got {num_steps}.")
    stride = (num_train_timesteps - 1) / max(num_steps - 1, 1)
    position, steps = 0.0, []
    for _ in range(num_steps):
        steps.append(round(position))
        # Added up as the reference does: its rounding errors decide some of the steps, for instance of 21, 43 or 91.
        position += stride
    return steps[::-1]


def guide_noise(
    conditional: torch.Tensor,
    unconditional: torch.Tensor,
    guidance_scale: float,
    latent_channels: int,
    num_guided_channels: int | None = None,
) -> torch.Tensor:
    """Apply classifier-free guidance to the first epsilon channels; the others and the variance stay conditional.

    Args:
        conditional: Model output with the label, `(B, C, F, h, w)`, or `(B, 2 * C, F, h, w)` with a variance half.
        unconditional: Model output for the same latents with the null class, of the same shape.
        guidance_scale: 1 is no guidance: the conditional output.
        latent_channels: `C`.
        num_guided_channels: 1 to `C`, all if `None`. The reference guides 4 channels whatever `C` is: pass 4 to repeat
            its numbers for the 16-channel weights.

    Returns:
        The guided output, shaped like `conditional`.
    """
    if num_guided_channels is None:
        num_guided_channels = latent_channels
    check_integer("num_guided_channels", num_guided_channels)
    if not 1 <= num_guided_channels <= latent_channels:
        raise ValueError(f"`num_guided_channels` must be between 1 and {latent_channels}, got {num_guided_channels}.")
    noise_cond, rest = conditional.tensor_split((num_guided_channels,), dim=1)
    noise_uncond = unconditional[:, :num_guided_channels]
    return torch.cat((noise_uncond + guidance_scale * (noise_cond - noise_uncond), rest), dim=1)


def set_timesteps(
    scheduler: Scheduler,
    num_inference_steps: int,
    device: torch.device,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> torch.Tensor:
    """Set a scheduler's steps by their number, or by a list of timesteps or of sigmas; return its timesteps.

    Raises:
        ValueError: If both lists are given, or one that the scheduler does not take or that cannot be sampled by.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("`timesteps` and `sigmas` must not be given together, got both.")
    for name, steps in (("timesteps", timesteps), ("sigmas", sigmas)):
        if steps is None:
            continue
        if name not in signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"`{name}` must be None for a {type(scheduler).__name__}, which takes none, got a list.")
        scheduler.set_timesteps(**{name: _step_list(name, steps, scheduler)}, device=device)
        return scheduler.timesteps
    scheduler.set_timesteps(num_inference_steps, device=device)
    return scheduler.timesteps


def _step_list(name: str, steps: Any, scheduler: Scheduler) -> list[float]:
    """Return a list of timesteps or sigmas, which must be descending and within the scheduler's range."""
    last = math.inf
    if name == "timesteps":
        last = scheduler.config.get("num_train_timesteps", math.inf)
        if hasattr(scheduler, "alphas_cumprod"):  # a table, not the interpolation of flow matching
            last -= 1
    values = steps.tolist() if isinstance(steps, (torch.Tensor, np.ndarray)) else steps
    is_list = isinstance(values, Sequence) and len(values) > 0
    if (
        not is_list
        or not all(is_number(value) and 0 <= value <= last for value in values)
        or any(following >= value for value, following in pairwise(values))
    ):
        span = f"from 0 to {last}" if last < math.inf else "from 0 on"
        raise ValueError(
            f"`{name}` must be a list of at least one number {span}, each less than the one before, got "
            f"{reprlib.repr(values)}."
        )
    return list(values)


def choose_timesteps(scheduler: Scheduler, steps: dict[str, Any], strength: float | None) -> torch.Tensor:
    """Set a scheduler's steps as [`set_timesteps`] does; with a `strength`, only that share of them, the last ones."""
    timesteps = set_timesteps(scheduler, **steps)
    if strength is None:
        return timesteps
    order = scheduler.order
    num_steps = -(-len(timesteps) // order)  # a step of second order has two entries, the last one only one
    start = num_steps - round(num_steps * strength)
    if start == num_steps:
        raise ValueError(f"`strength` must leave at least one of {num_steps} steps, got {strength}.")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * order)
    return timesteps[start * order :]


def takes_variance(scheduler: Scheduler) -> bool:
    """Tell whether `step` wants the variance half of a model output: only DDPM has a use for it."""
    is_learned = scheduler.config.get("variance_type") in LEARNED_VARIANCES
    return is_learned and isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler))


def prepare_scheduler(scheduler: Scheduler) -> Scheduler:
    """Return the scheduler to sample with: the given one, or a copy where its setting of the variance would do harm.

    The DPM solvers with `variance_type="learned_range"`, which their config inherits from a DDPM scheduler's, keep the
    first *three* channels of what they get, a constant for RGB. The copy has no such setting and gets epsilon alone.
    """
    is_learned = scheduler.config.get("variance_type") in LEARNED_VARIANCES
    if not is_learned or takes_variance(scheduler):
        return scheduler
    return type(scheduler).from_config({**scheduler.config, "variance_type": None})


def check_scheduler(scheduler: Scheduler, has_given: bool) -> None:
    """Check that a scheduler can be used as the pipelines use it.

    Args:
        scheduler: Any.
        has_given: Whether frames are given, as by an image, a video or the window before.

    Raises:
        ValueError: If it takes more for a step than output, timestep and sample, or cannot add noise to given frames.
    """
    name = type(scheduler).__name__
    needed = [p.name for p in signature(scheduler.step).parameters.values() if p.default is p.empty]
    others = [argument for argument in needed[3:] if argument != "kwargs"]
    if others:
        raise ValueError(
            f"`scheduler` must make a step of output, timestep and sample, got a {name}, which needs "
            f"{' and '.join(f'`{other}`' for other in others)}."
        )
    if has_given and not (hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")):
        raise ValueError(
            f"`scheduler` must have `add_noise` or `scale_noise` for an image, a video or several windows, got a "
            f"{name}."
        )


def add_noise(
    scheduler: Scheduler, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Bring latents to a timestep of the scheduler's list: diffused, or interpolated for flow matching."""
    timesteps = timestep.reshape(1)  # for all videos: not every scheduler takes one for each
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(latents, timesteps, noise)
    return scheduler.add_noise(latents, noise, timesteps)

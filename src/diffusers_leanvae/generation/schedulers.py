"""Sampling as the reference Latte does it, with diffusers' schedulers: step lists, scheduler settings, guidance.

The reference (and so the released weights) diffuses over 1000 steps with linear betas 1e-4 .. 0.02, predicts epsilon
and a variance between its bounds, and never clips. Which of diffusers' schedulers gives its numbers is not obvious:
see [`make_scheduler`].
"""

from typing import Any

import torch
from diffusers.schedulers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from ..checks import check_choice


NUM_TRAIN_TIMESTEPS = 1000
_BETAS: dict[str, Any] = {
    "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
SCHEDULERS = ("ddpm", "ddim", "dpm++", "flow")


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
    if not 1 <= num_guided_channels <= latent_channels:
        raise ValueError(f"`num_guided_channels` must be between 1 and {latent_channels}, got {num_guided_channels}.")
    noise_cond, rest = conditional.tensor_split((num_guided_channels,), dim=1)
    noise_uncond = unconditional[:, :num_guided_channels]
    return torch.cat((noise_uncond + guidance_scale * (noise_cond - noise_uncond), rest), dim=1)

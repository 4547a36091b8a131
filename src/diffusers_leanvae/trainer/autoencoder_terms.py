"""Parts of a step of `training/train_vae.py`: what the decoder is given, perceptual terms, the adversarial weight."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from ..checks import check_choice
from ..losses.adversarial import adaptive_weight
from ..losses.objectives import Objective
from ..losses.perceptual import LPIPS, ms_ssim, reference_frames
from ..losses.regularizers import draw_mask_ratio, equivariance_transform, mask_latents
from ..models.video_autoencoder import VideoAutoencoder
from .recipe import check_amounts, check_shares


@dataclass
class Regularization:
    """Switches that make latents easier to model, all off by default. Numbers are weights unless stated otherwise."""

    equivariance_probability: float = 0.0  # EQ-VAE (2502.09509): share of steps that decode transformed latents
    equivariance_in_time: bool = True  # ours: those steps also play half of the clips at twice the speed
    equivariance_min_scale: float = 0.25  # smallest size of transformed clips, relative to the clip
    local_correlation: float = 0.0  # SSVAE (2512.05394), whose authors weigh it with 0.02
    mask_latents: bool = False  # SSVAE (2512.05394): hide some latents from the decoder in some steps
    low_pass: float = 0.0  # the aim of LC-VAE (2604.16479): low frequencies of latents hold those of the video

    def __post_init__(self) -> None:
        check_shares(self, "equivariance_probability", "equivariance_min_scale", prefix="regularization.")
        check_amounts(self, "local_correlation", "low_pass", prefix="regularization.")


class DecoderTask(NamedTuple):
    """Input of the decoder; the videos in `[-1, 1]` that it should return, and the posterior means of these."""

    target: torch.Tensor
    latents: torch.Tensor
    mean: torch.Tensor


def decoder_task(
    regularization: Regularization,
    sample: torch.Tensor,
    latents: torch.Tensor,
    mean: torch.Tensor,
    seed: Sequence[int],
) -> DecoderTask:
    """Pair the latents with their videos: both as they are, or both transformed; some latents perhaps hidden.

    Args:
        regularization: The switches and the shares of the steps.
        sample: Videos in `[-1, 1]`, shape `(batch_size, 3, num_frames, height, width)`.
        latents: Their latents.
        mean: Posterior means, of which `latents` are samples or which they are; transformed along.
        seed: What is drawn follows from these numbers alone.
    """
    rng = np.random.default_rng([*seed, 0])
    if rng.random() < regularization.equivariance_probability:
        in_time, min_scale = regularization.equivariance_in_time, regularization.equivariance_min_scale
        transform = equivariance_transform(rng, latents.shape, temporal=in_time, min_scale=min_scale)
        sample = transform.apply_to_sample(sample)
        latents, mean = transform.apply_to_latents(latents), transform.apply_to_latents(mean)
    if regularization.mask_latents:
        rng = np.random.default_rng([*seed, 1])
        latents = mask_latents(latents, draw_mask_ratio(rng), rng)
    return DecoderTask(sample, latents, mean)


@dataclass
class PerceptualRecipe:
    """Settings of `loss.lpips` and `loss.ms_ssim`."""

    frames: Literal["reference", "all"] = "reference"  # "reference": the first and one group of four
    vgg16: str = "timm/vgg16.tv_in1k"  # file or Hub repository of the standard weights
    linear_heads: str | None = None  # file; null: those that come with torchmetrics


class PerceptualTerms:
    """Unweighted perceptual terms of frames; those of weight 0 are left out, and cost nothing.

    This is no module: one which holds it neither trains nor saves the network of LPIPS.

    Args:
        objective: Its `lpips` and `ms_ssim` are the weights.
        lpips: Distance of frames `(num_frames, 3, height, width)` on the device of the videos, needed if
            `objective.lpips` is not 0.
        frames: `"reference"`: the first frame and one group of four, as the reference takes; `"all"`: every frame.
    """

    def __init__(
        self,
        objective: Objective,
        lpips: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        frames: str = "reference",
    ) -> None:
        if objective.lpips and lpips is None:
            raise ValueError(f"`lpips` must be given for `objective.lpips` of {objective.lpips}, got None.")
        check_choice("frames", frames, ("reference", "all"))
        self.objective, self.lpips, self.frames = objective, lpips, frames

    @classmethod
    def from_recipe(cls, objective: Objective, recipe: PerceptualRecipe, device: torch.device) -> "PerceptualTerms":
        """Load the network of LPIPS, if it has a weight."""
        lpips = LPIPS.from_weights(recipe.vgg16, recipe.linear_heads).to(device) if objective.lpips else None
        return cls(objective, lpips, recipe.frames)

    def __call__(
        self, sample: torch.Tensor, reconstruction: torch.Tensor, seed: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Compare two videos; which frames are taken follows from the seed alone."""
        if not (self.objective.lpips or self.objective.ms_ssim):
            return {}
        if self.frames == "reference":
            index = reference_frames(sample.shape[2], np.random.default_rng([*seed, 2]))
            sample, reconstruction = sample[:, :, index], reconstruction[:, :, index]
        frames = [video.float().transpose(1, 2).flatten(0, 1) for video in (sample, reconstruction)]
        terms = {}
        if self.objective.lpips and self.lpips is not None:
            terms["lpips"] = self.lpips(*frames).mean()
        if self.objective.ms_ssim:
            terms["ms_ssim"] = ms_ssim(*frames)
        return terms


def weight_at_last_layers(
    vae: VideoAutoencoder, objective: Objective, loss: torch.Tensor, adversarial: dict[str, torch.Tensor]
) -> torch.Tensor | float:
    """Weight that makes the adversarial gradient at the decoder's last layers as long as that of the loss.

    Args:
        vae: The autoencoder.
        objective: It tells the last layers, and how large the weight may be.
        loss: The weighted loss without adversarial terms.
        adversarial: The adversarial terms, unweighted.

    Returns:
        The weight, as of `adaptive_weight`; 1 without adversarial terms, and where no gradients are computed.
    """
    if not adversarial or not torch.is_grad_enabled():
        return 1.0
    adversarial_loss = torch.stack(list(adversarial.values())).sum()
    return adaptive_weight(loss, adversarial_loss, last_layers(vae, objective), objective.max_adaptive_weight)


def last_layers(vae: VideoAutoencoder, objective: Objective) -> list[torch.nn.Parameter]:
    """List the trained parameters of the decoder's last layers, which an adaptive weight is measured at.

    Raises:
        ValueError: If there are none.
    """
    parameters = [
        parameter
        for name, parameter in vae.get_submodule("decoder").named_parameters()
        if objective.is_last_layer(name) and parameter.requires_grad
    ]
    if not parameters:
        raise ValueError(
            "`adversarial.is_adaptive` must be false where the decoder's last layers are frozen, got true."
        )
    return parameters

"""Training losses as pure functions of tensors, and the one module that a training step calls.

Terms are unweighted and in float32. Pixel and sub-band terms are measured in the model's own pixel range
(`sample * pixel_factor`), so that the published weights keep their meaning for every `pixel_factor`.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F


NUM_LOW_CHANNELS = 3  # the lowest sub-band of an RGB clip comes first in both sub-band tensors


@dataclass
class LossWeights:
    """Weights of the reference (its wavelet terms are `4 * 0.05` and `4 * 0.1`); names are those of the terms."""

    l1_pixel: float = 4.0
    l1_low: float = 0.2
    l1_high: float = 0.4
    kl: float = 1e-7
    log_mse: float = 0.0  # ours: PSNR itself, up to a factor; relative errors of easy and of hard clips weigh the same


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    r"""Divergence from the standard normal distribution: the sum over each posterior, averaged over the batch.

    Args:
        mean: Posterior means, shape `(batch_size, ...)`.
        logvar: Posterior log-variances, clamped by the caller, same shape.
    """
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum() / mean.shape[0]


def log_mse(sample: torch.Tensor, reconstruction: torch.Tensor, pixel_factor: float) -> torch.Tensor:
    r"""Mean over the clips of the logarithm of their mean squared error, which stops to count below 1e-6 (60 dB)."""
    error = (reconstruction.float() - sample.float()) * pixel_factor
    return (error.square().mean(dim=(1, 2, 3, 4)) + 1e-6).log().mean()


def reconstruction_terms(
    sample: torch.Tensor,
    reconstruction: torch.Tensor,
    target_bands: tuple[torch.Tensor, torch.Tensor | None],
    predicted_bands: tuple[torch.Tensor, torch.Tensor | None],
    mean: torch.Tensor,
    logvar: torch.Tensor,
    pixel_factor: float,
) -> dict[str, torch.Tensor]:
    r"""The four unweighted terms of the objective as float32 scalars.

    Args:
        sample: Videos in `[-1, 1]`, shape `(batch_size, 3, num_frames, height, width)`.
        reconstruction: Their reconstruction, same shape, not clamped.
        target_bands: Sub-bands `(image, video)` of `sample` in the model's pixel range; `video` is `None` for
            single images.
        predicted_bands: The decoder's sub-bands, laid out alike.
        mean: Posterior means, shape `(batch_size, latent_channels, num_latent_frames, ...)`.
        logvar: Posterior log-variances, same shape.
        pixel_factor: The factor from `[-1, 1]` to the model's pixel range.
    """
    l1_low = l1_high = sample.new_zeros((), dtype=torch.float32)
    for target, predicted in zip(target_bands, predicted_bands, strict=True):
        if target is None or predicted is None:
            continue
        low, high = predicted.float().tensor_split([NUM_LOW_CHANNELS], dim=1)
        target_low, target_high = target.float().tensor_split([NUM_LOW_CHANNELS], dim=1)
        l1_low = l1_low + F.l1_loss(low, target_low)
        l1_high = l1_high + F.l1_loss(high, target_high)
    return {
        "l1_pixel": F.l1_loss(reconstruction.float(), sample.float()) * pixel_factor,
        "l1_low": l1_low,
        "l1_high": l1_high,
        "kl": kl_divergence(mean, logvar),
        "log_mse": log_mse(sample, reconstruction, pixel_factor),
    }


class VAETrainingModule(nn.Module):
    r"""A video autoencoder together with its losses.

    Wrap this module (not the autoencoder) for distributed training: gradients are synchronised only for what runs
    inside the wrapped `forward`. Terms that need more networks (perceptual, adversarial) join here: the network in
    `__init__`, its term in `forward`, its weight in `LossWeights`.
    """

    def __init__(self, vae: nn.Module, weights: LossWeights | None = None) -> None:
        super().__init__()
        # This layer knows no model class: anything with `analyze`, `encode`, `decode_subbands`, `synthesize` will do.
        self.vae: Any = vae
        self.weights = LossWeights() if weights is None else weights

    def forward(
        self, sample: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        r"""The weighted loss and its detached, unweighted terms.

        Args:
            sample: Videos in `[-1, 1]`, shape `(batch_size, 3, num_frames, height, width)`.
            noise: Standard normal noise of the posterior sample, shape of the latents; `None` decodes the means.
        """
        target_bands = self.vae.analyze(sample)
        posterior = self.vae.encode(sample).latent_dist
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        predicted_bands = self.vae.decode_subbands(latents)
        # Under autocast the network answers in bfloat16; the synthesis is a sum of sub-bands and deserves float32.
        predicted_bands = type(predicted_bands)(*(None if band is None else band.float() for band in predicted_bands))
        reconstruction = self.vae.synthesize(predicted_bands)
        terms = reconstruction_terms(
            sample,
            reconstruction,
            target_bands,
            predicted_bands,
            posterior.mean,
            posterior.logvar,
            self.vae.config.pixel_factor,
        )
        loss = sum((weight * terms[name] for name, weight in asdict(self.weights).items()), sample.new_zeros(()))
        return loss, {name: term.detach() for name, term in terms.items()}

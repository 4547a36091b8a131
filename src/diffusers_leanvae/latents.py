"""Latents between the autoencoder and a diffusion model: normalised by what the autoencoder's config says."""

from typing import Any

import torch


def normalize_latents(latents: torch.Tensor, config: Any) -> torch.Tensor:
    r"""Latents of the autoencoder to latents for diffusion: `(latents - latents_mean) / latents_std * scaling_factor`.

    Args:
        latents: `(batch_size, latent_channels, num_latent_frames, latent_height, latent_width)`.
        config: Config of the autoencoder; without `latents_mean` and `latents_std` only the factor is applied, as for
            the released LeanVAE weights (0.7744 with 4 channels, 1.0 with 16).
    """
    mean, std = _statistics(latents, config)
    return (latents - mean) / std * config.scaling_factor


def denormalize_latents(latents: torch.Tensor, config: Any) -> torch.Tensor:
    r"""Invert [`normalize_latents`]."""
    mean, std = _statistics(latents, config)
    return latents / config.scaling_factor * std + mean


def _statistics(latents: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if config.latents_mean is None or config.latents_std is None:
        return latents.new_zeros(()), latents.new_ones(())
    mean, std = latents.new_tensor(config.latents_mean), latents.new_tensor(config.latents_std)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

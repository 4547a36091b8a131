"""Latents between an autoencoder and a diffusion model: encoding, statistics, and normalisation by the config."""

from collections.abc import Iterator
from typing import Any

import torch

from .models.video_autoencoder import VideoAutoencoder
from .video_io.pixels import as_sample


def normalize_latents(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """Normalise latents for diffusion: `(latents - latents_mean) / latents_std * scaling_factor`.

    Args:
        latents: `(batch_size, latent_channels, num_latent_frames, latent_height, latent_width)`.
        config: Config of the autoencoder; without `latents_mean` and `latents_std` only the factor is applied. The
            released LeanVAE weights have a factor alone (0.7744 with 4 channels, 1.0 with 16), models trained with
            this package have mean and deviation, IV-VAE has all three.
    """
    mean, std = _statistics(latents, config)
    return (latents - mean) / std * config.scaling_factor


def denormalize_latents(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """Invert [`normalize_latents`]."""
    mean, std = _statistics(latents, config)
    return latents / config.scaling_factor * std + mean


def _statistics(latents: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # Items, not attributes: our configs answer to the latter for diffusers' pipelines even where nothing is set.
    if config["latents_mean"] is None or config["latents_std"] is None:
        return latents.new_zeros(()), latents.new_ones(())
    mean, std = latents.new_tensor(config["latents_mean"]), latents.new_tensor(config["latents_std"])
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


@torch.no_grad()
def encode_batch(vae: VideoAutoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """Encode clips, uint8 or floats in `[-1, 1]`, to posterior means, not normalised; autocast does not reach them."""
    sample = as_sample(pixels)
    with torch.autocast(sample.device.type, enabled=False):
        return vae.encode(sample, return_dict=False)[0].mode()


def measure_statistics(latents: Iterator[torch.Tensor], num_channels: int) -> tuple[list[float], list[float]]:
    """Measure mean and standard deviation of every channel of batches `(B, C, F, h, w)`, in float64."""
    total = squares = torch.zeros(num_channels, dtype=torch.float64)
    count = 0
    for batch in latents:
        values = batch.transpose(0, 1).flatten(1).cpu().double()
        total, squares, count = total + values.sum(1), squares + values.square().sum(1), count + values.shape[1]
    mean = total / count
    return mean.tolist(), (squares / count - mean.square()).clamp(min=0).sqrt().tolist()

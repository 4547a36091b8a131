"""Losses of pixels, sub-bands and posteriors as pure functions of tensors; `objectives` says who is trained by which.

Terms are unweighted and in float32. Those of LeanVAE compare pixels and sub-bands in the model's own pixel range
(`sample * pixel_factor`), so that the published weights keep their meaning for every `pixel_factor`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


Bands = tuple[torch.Tensor | None, torch.Tensor | None]  # of the image frame, and of the video after it
NUM_LOW_CHANNELS = 3  # the lowest sub-band of an RGB clip comes first in both sub-band tensors


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """Divergence from the standard normal distribution: the sum over each posterior, averaged over the batch.

    Args:
        mean: Posterior means, shape `(batch_size, ...)`.
        logvar: Posterior log-variances, clamped by the caller, same shape.
    """
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum() / mean.shape[0]


def log_mse(sample: torch.Tensor, reconstruction: torch.Tensor, pixel_factor: float) -> torch.Tensor:
    """Mean over the clips of the logarithm of their mean squared error, which has no effect below 1e-6 (60 dB)."""
    error = (reconstruction.float() - sample.float()) * pixel_factor
    return (error.square().mean(dim=(1, 2, 3, 4)) + 1e-6).log().mean()


def charbonnier(sample: torch.Tensor, reconstruction: torch.Tensor, pixel_factor: float) -> torch.Tensor:
    """Mean of `sqrt(error^2 + 1e-6)`, which is L1 but for errors about 1e-3 and below, where it is smooth."""
    error = (reconstruction.float() - sample.float()) * pixel_factor
    return (error.square() + 1e-6).sqrt().mean()


def band_l1(target: Bands, predicted: Bands) -> tuple[torch.Tensor, torch.Tensor]:
    """L1 distances of the lowest sub-bands and of all others, as float32 scalars, summed over image and video.

    Args:
        target: Sub-bands `(image, video)`, each `(batch_size, channels, num_frames, height, width)` with the lowest
            one first; one of the two may be `None`.
        predicted: Sub-bands of the same shapes.
    """
    pairs = [(a, b) for a, b in zip(target, predicted, strict=True) if a is not None and b is not None]
    low = high = pairs[0][0].new_zeros((), dtype=torch.float32)
    for bands in pairs:
        (target_low, target_high), (predicted_low, predicted_high) = (
            x.float().tensor_split([NUM_LOW_CHANNELS], dim=1) for x in bands
        )
        low = low + F.l1_loss(predicted_low, target_low)
        high = high + F.l1_loss(predicted_high, target_high)
    return low, high


def reconstruction_terms(
    sample: torch.Tensor,
    reconstruction: torch.Tensor,
    target_bands: Bands,
    predicted_bands: Bands,
    mean: torch.Tensor,
    logvar: torch.Tensor,
    pixel_factor: float,
) -> dict[str, torch.Tensor]:
    """The unweighted terms of the objective as float32 scalars.

    Args:
        sample: Videos in `[-1, 1]`, shape `(batch_size, 3, num_frames, height, width)`.
        reconstruction: Their reconstruction, same shape, not clamped.
        target_bands: Sub-bands `(image, video)` of `sample` in the model's pixel range; `video` is `None` for
            single images.
        predicted_bands: The decoder's sub-bands, of the same shapes.
        mean: Posterior means, shape `(batch_size, latent_channels, num_latent_frames, ...)`.
        logvar: Posterior log-variances, same shape.
        pixel_factor: The factor from `[-1, 1]` to the model's pixel range.
    """
    l1_low, l1_high = band_l1(target_bands, predicted_bands)
    return {
        "l1_pixel": F.l1_loss(reconstruction.float(), sample.float()) * pixel_factor,
        "l1_low": l1_low,
        "l1_high": l1_high,
        "kl": kl_divergence(mean, logvar),
        "log_mse": log_mse(sample, reconstruction, pixel_factor),
    }


def summed_l1(sample: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """L1 distance of WF-VAE: the sum over channels, height and width, averaged over all frames.

    Args:
        sample: Videos `(batch_size, channels, num_frames, height, width)`.
        reconstruction: Their reconstruction, same shape.
    """
    error = (reconstruction.float() - sample.float()).abs()
    return error.sum() / (sample.shape[0] * sample.shape[2])


def wavelet_l1(target: Sequence[torch.Tensor], predicted: Sequence[torch.Tensor]) -> torch.Tensor:
    """L1 distance of sub-bands of WF-VAE: the sum over all levels and all their values, averaged over the batch.

    Args:
        target: Sub-bands of each level, `(batch_size, channels, num_frames, height, width)`.
        predicted: Those of the decoder, of the same shapes.
    """
    batch_size = target[0].shape[0]
    distances = [(b.float() - a.float()).abs().sum() for a, b in zip(target, predicted, strict=True)]
    return torch.stack(distances).sum() / batch_size

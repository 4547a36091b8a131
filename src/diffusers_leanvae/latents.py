"""Latents between an autoencoder and a diffusion model: encoding, statistics, and normalisation by the config."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, AutoModel

from .checks import reason_of
from .conversion.checkpoints import is_hub_reference
from .models.pretrained import check_is_object
from .models.video_autoencoder import VideoAutoencoder
from .video_io.pixels import as_sample


# Mean and deviation of each channel of the latents of Wan2.2's VAE, as its config on the Hub has them. Those of Wan2.1
# are the defaults of `AutoencoderKLWan`.
WAN_22_MEAN = """
    -0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 0.0542 0.2813 0.0891
    0.1570 -0.0098 0.0375 -0.1825 -0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502
    -0.2055 -0.0322 0.1109 0.1567 -0.0729 0.0899 -0.2799 -0.1230 -0.0313 -0.1649 0.0117 0.0723
    -0.2839 -0.2083 -0.0520 0.3748 0.0152 0.1957 0.1433 -0.2944 0.3573 -0.0548 -0.1681 -0.0667
"""
WAN_22_STD = """
    0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901
    0.6885 0.6165 0.8454 0.4978 0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659
    0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093 0.5709 0.6065 0.6415 0.4944
    0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744
"""


def normalize_latents(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """Normalise latents for diffusion: `(latents - latents_mean) / latents_std * scaling_factor`.

    Args:
        latents: `(batch_size, latent_channels, num_latent_frames, latent_height, latent_width)`.
        config: Config of the autoencoder, of this package or of diffusers. Without `latents_mean` and `latents_std`
            only the factor is applied, without `scaling_factor` only those. The released LeanVAE weights have a factor
            alone (0.7744 with 4 channels, 1.0 with 16), models trained with this package have mean and deviation,
            IV-VAE has all three.
    """
    mean, std, factor = _statistics(latents, config)
    return (latents - mean) / std * factor


def denormalize_latents(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """Invert [`normalize_latents`]."""
    mean, std, factor = _statistics(latents, config)
    return latents / factor * std + mean


def _statistics(latents: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    # Items, not attributes: our configs answer to the latter for diffusers' pipelines even where nothing is set.
    mean, std, factor = config.get("latents_mean"), config.get("latents_std"), config.get("scaling_factor", 1.0)
    if mean is None or std is None:
        return latents.new_zeros(()), latents.new_ones(()), factor
    mean, std = (latents.new_tensor(values).view(1, -1, 1, 1, 1) for values in (mean, std))
    return mean, std, factor


def statistics_of(name: str, teacher: str) -> dict[str, Any]:
    """Read how the latents of an autoencoder are normalised, for one that was trained to make the same latents.

    Args:
        name: The argument, for the error.
        teacher: `"wan2.1"`, `"wan2.2"`; the folder or `config.json` of an autoencoder, or its Hub id `user/repo`, with
            the sub-folder of a pipeline behind it if it is in one.

    Returns:
        Config values that replace all of the student's: `latents_mean` and `latents_std`, `None` if the teacher has a
        factor alone, and `scaling_factor`, 1.0 if it has none.

    Raises:
        ValueError: If there is none, or its config has neither statistics nor a factor.
    """
    if teacher == "wan2.1":
        defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
        return {key: list(defaults[key].default) for key in ("latents_mean", "latents_std")} | {"scaling_factor": 1.0}
    if teacher == "wan2.2":
        mean, std = ([float(value) for value in values.split()] for values in (WAN_22_MEAN, WAN_22_STD))
        return {"latents_mean": mean, "latents_std": std, "scaling_factor": 1.0}
    is_here = Path(teacher).exists()
    if not is_here and not is_hub_reference(teacher):
        raise ValueError(
            f"`{name}` must be 'wan2.1', 'wan2.2', or the folder, config.json or Hub id of an autoencoder, got "
            f"{teacher!r}, which does not exist."
        )
    user, repository, *folders = teacher.split("/") if not is_here else (teacher, "")
    place = teacher if is_here else f"{user}/{repository}"
    try:
        config: Any = AutoModel.load_config(place, subfolder="/".join(folders) or None)
    except OSError as error:
        raise ValueError(f"`{name}` must be an autoencoder, got {teacher!r}: {reason_of(error)}.") from None
    check_is_object(config, teacher)
    statistics = {key: config.get(key) for key in ("latents_mean", "latents_std")}
    factor = config.get("scaling_factor")
    missing = [f"`{key}`" for key, value in statistics.items() if value is None]
    if len(missing) == 1 or (missing and factor is None):
        raise ValueError(
            f"`{name}` must be an autoencoder with statistics, got {teacher!r} without {' and '.join(missing)}."
        )
    numbers = {key: value and [float(number) for number in value] for key, value in statistics.items()}
    return numbers | {"scaling_factor": 1.0 if factor is None else float(factor)}


@torch.no_grad()
def encode_batch(vae: VideoAutoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """Encode clips, uint8 or floats in `[-1, 1]`, to posterior means, not normalised; autocast does not reach them."""
    sample = as_sample(pixels)
    with torch.autocast(sample.device.type, enabled=False):
        return vae.encode(sample, return_dict=False)[0].mode()


def measure_statistics(latents: Iterator[torch.Tensor], num_channels: int) -> tuple[list[float], list[float]]:
    """Measure mean and standard deviation of every channel of batches `(B, C, F, h, w)`, in float64.

    A channel that never changes has a deviation of 1, as latents are divided by it.

    Raises:
        ValueError: If there is no batch, or a latent is not finite.
    """
    total = squares = torch.zeros(num_channels, dtype=torch.float64)
    count = 0
    for batch in latents:
        values = batch.transpose(0, 1).flatten(1).cpu().double()
        total, squares, count = total + values.sum(1), squares + values.square().sum(1), count + values.shape[1]
    if not count:
        raise ValueError("`latents` must hold at least one batch, got none.")
    if not squares.isfinite().all():
        raise ValueError("`latents` must be finite, got infinite ones or NaN.")
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean.tolist(), torch.where(std > 1e-6 * mean.abs(), std, 1.0).tolist()  # below is rounding

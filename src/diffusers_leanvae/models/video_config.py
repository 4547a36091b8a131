"""The config of the video autoencoders, and the names derived from it that pipelines of diffusers read."""

import math
from collections.abc import Mapping
from typing import Any, Self

from diffusers.configuration_utils import FrozenDict

from ..checks import is_number


def check_factor(name: str, value: Any) -> None:
    if not is_number(value) or value <= 0:
        raise ValueError(f"`{name}` must be a finite number above 0, got {value!r}.")


def check_statistics(
    latent_channels: int, latents_mean: list[float] | None, latents_std: list[float] | None, scaling_factor: float
) -> None:
    check_factor("scaling_factor", scaling_factor)
    for name, statistics, limit in (("latents_mean", latents_mean, -math.inf), ("latents_std", latents_std, 0)):
        if statistics is None:
            continue
        if len(statistics) != latent_channels:
            raise ValueError(f"`{name}` must have {latent_channels} entries, got {len(statistics)}.")
        for value in statistics:
            if not is_number(value) or value <= limit:
                numbers = "finite numbers" if limit else "finite numbers above 0"
                raise ValueError(f"`{name}` must hold {numbers}, got {value!r}.")
    if (latents_mean is None) != (latents_std is None):
        missing = "latents_mean" if latents_mean is None else "latents_std"
        raise ValueError(f"`latents_mean` and `latents_std` must be given together, got no `{missing}`.")


class VideoAutoencoderConfig(FrozenDict):
    """The config, which also answers to the derived names that diffusers' pipelines for videos read.

    Those are attributes only: they are neither items of the config nor stored. The attributes `latents_mean` and
    `latents_std` hold all that there is, `scaling_factor` included, so that the `(latents - mean) / std` of pipelines
    which know no factor is the same as [`latents.normalize_latents`]; the items `config["latents_mean"]` and
    `config["latents_std"]` are what is set.
    """

    z_dim: int
    scale_factor_temporal: int
    scale_factor_spatial: int
    temporal_compression_ratio: int
    spatial_compression_ratio: int
    block_out_channels: tuple[int, ...]  # pipelines count them: one more than the halvings of the size
    invert_scale_latents: bool

    @classmethod
    def of(cls, values: Mapping[str, Any], latent_channels: int, ratio_t: int, ratio_s: int) -> Self:
        """The config of a model, with the names derived from its channels and its ratios of time and space."""
        config = cls(values)
        derived: dict[str, Any] = {
            "z_dim": latent_channels,
            "scale_factor_temporal": ratio_t,
            "scale_factor_spatial": ratio_s,
            "temporal_compression_ratio": ratio_t,
            "spatial_compression_ratio": ratio_s,
            "block_out_channels": (latent_channels,) * (1 + round(math.log2(ratio_s))),
            "invert_scale_latents": False,
        }
        mean, std, factor = config["latents_mean"], config["latents_std"], config["scaling_factor"]
        if mean is None or std is None:
            mean, std = [0.0] * latent_channels, [1.0] * latent_channels
        derived["latents_mean"], derived["latents_std"] = mean, [value / factor for value in std]
        config.__dict__.update(derived)
        return config

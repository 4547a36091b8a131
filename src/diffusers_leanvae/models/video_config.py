"""The config of the video autoencoders, and the names derived from it that pipelines of diffusers read."""

import math
from collections.abc import Mapping
from typing import Any, NoReturn, Self

from diffusers.configuration_utils import FrozenDict

from ..checks import check_choice, check_positive, is_integer, is_number


def check_sizes(**sizes: Any) -> None:
    """Refuse channels and widths that are no positive integers."""
    for name, size in sizes.items():
        check_positive(name, size)


def check_counts(**counts: Any) -> None:
    """Refuse numbers of layers, of which there may be none."""
    for name, count in counts.items():
        if not is_integer(count) or count < 0:
            raise ValueError(f"`{name}` must be an integer of at least 0, got {count!r}.")


def check_switches(**switches: Any) -> None:
    """Refuse what is neither true nor false."""
    for name, switch in switches.items():
        check_choice(name, switch, (True, False))


def check_factor(name: str, value: Any) -> None:
    if not is_number(value) or value <= 0:
        raise ValueError(f"`{name}` must be a finite number above 0, got {value!r}.")


STATISTICS = ("latent_channels", "latents_mean", "latents_std", "scaling_factor")  # what `check_statistics` takes


def check_statistics(
    latent_channels: int, latents_mean: list[float] | None, latents_std: list[float] | None, scaling_factor: float
) -> None:
    check_factor("scaling_factor", scaling_factor)
    for name, statistics, limit in (("latents_mean", latents_mean, -math.inf), ("latents_std", latents_std, 0)):
        if statistics is None:
            continue
        if not hasattr(statistics, "__len__"):
            raise ValueError(f"`{name}` must be a list of {latent_channels} numbers, got {statistics!r}.")
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

    A model makes it anew for everyone who asks, so a change would be lost, and is refused. Values of copies may be
    changed.
    """

    z_dim: int
    scale_factor_temporal: int
    scale_factor_spatial: int
    temporal_compression_ratio: int
    spatial_compression_ratio: int
    block_out_channels: tuple[int, ...]  # pipelines count them: one more than the halvings of the size
    invert_scale_latents: bool
    _is_of_model = False

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
        config.__dict__.update(derived, _is_of_model=True)
        return config

    def __reduce__(self) -> Any:
        # That of a dictionary with attributes would set the items last, when nothing may be set any more.
        return _restore, (type(self), dict(self), {**self.__dict__, "_is_of_model": False})

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "`config` must be changed by `register_to_config` of the model, such as "
            "`vae.register_to_config(scaling_factor=0.5)`, got a change that would be lost."
        )

    __delattr__ = __delitem__ = __ior__ = clear = move_to_end = pop = popitem = setdefault = update = _refuse

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse() if self._is_of_model else super().__setattr__(name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        self._refuse() if self._is_of_model else super().__setitem__(name, value)


def _restore(
    config_class: type[VideoAutoencoderConfig], values: dict[str, Any], attributes: dict[str, Any]
) -> VideoAutoencoderConfig:
    config = config_class(values)
    config.__dict__.update(attributes)
    return config

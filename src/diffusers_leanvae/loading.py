"""The video autoencoders of this package, found by what a folder, a file or a Hub id holds."""

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .checks import CHECKPOINT_SUFFIXES
from .conversion import ivvae, leanvae, wfvae
from .models.autoencoder_kl_ivvae import AutoencoderKLIVVAE
from .models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from .models.autoencoder_kl_wfvae import AutoencoderKLWFVAE


class Family(NamedTuple):
    r"""A model class, and the module that knows its original checkpoints."""

    model_class: Any
    layout: ModuleType


FAMILIES = (
    Family(AutoencoderKLLeanVAE, leanvae),
    Family(AutoencoderKLWFVAE, wfvae),
    Family(AutoencoderKLIVVAE, ivvae),
)


def family_of_checkpoint(path: str | Path) -> Family:
    r"""The family of an original checkpoint, told from its keys; LeanVAE's, whose errors say more, if of none."""
    keys = leanvae.read_keys(path)
    for family in FAMILIES:
        if any(key == family.layout.ANCHOR or key.endswith(f".{family.layout.ANCHOR}") for key in keys):
            return family
    return FAMILIES[0]


def family_of_class(name: str | None) -> Family:
    r"""The family of a `_class_name` of a config.

    Raises:
        ValueError: If it is of none.
    """
    for family in FAMILIES:
        if family.model_class.__name__ == name:
            return family
    names = ", ".join(family.model_class.__name__ for family in FAMILIES)
    raise ValueError(f"`_class_name` of the config must be one of {names}, got {name!r}.")


def load_autoencoder(name: str | Path, torch_dtype: torch.dtype | None = None) -> Any:
    r"""Load an autoencoder of whatever family.

    Args:
        name: A folder or Hub id for `from_pretrained`; an original checkpoint, as a file, Hub file or URL.
        torch_dtype: Dtype to cast the weights to; as stored if `None`.

    Raises:
        ValueError: If there is none.
    """
    if Path(name).suffix in CHECKPOINT_SUFFIXES:
        path = leanvae.resolve_checkpoint(name)
        return family_of_checkpoint(path).model_class.from_single_file(path, torch_dtype=torch_dtype)
    config: Any = AutoencoderKLLeanVAE.load_config(name)
    return family_of_class(config.get("_class_name")).model_class.from_pretrained(name, torch_dtype=torch_dtype)

"""Models and pipelines by a bundled name, a folder, an original checkpoint, or the Hub: everything is loaded here.

What a folder or a file holds is found out from it, and what is of another kind is refused.
"""

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from diffusers import AutoModel, DiffusionPipeline

from . import bundled
from .conversion import ivvae, latte, leanvae, wfvae
from .conversion.checkpoints import (
    CONFIG_NAME,
    HUB_ARGUMENTS,
    has_anchor,
    is_checkpoint_reference,
    is_hub_reference,
    read_keys,
    resolve_checkpoint,
)
from .models.autoencoder_kl_ivvae import AutoencoderKLIVVAE
from .models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from .models.autoencoder_kl_wfvae import AutoencoderKLWFVAE
from .models.transformer_latte import LeanVAELatteTransformer3DModel
from .models.video_autoencoder import VideoAutoencoder


class Family(NamedTuple):
    """A model class, and the module that knows its original checkpoints."""

    model_class: Any
    conversion: ModuleType


AUTOENCODERS = (
    Family(AutoencoderKLLeanVAE, leanvae),
    Family(AutoencoderKLWFVAE, wfvae),
    Family(AutoencoderKLIVVAE, ivvae),
)
TRANSFORMERS = (Family(LeanVAELatteTransformer3DModel, latte),)
FAMILIES = AUTOENCODERS + TRANSFORMERS


def load_autoencoder(
    source: str | Path, dtype: torch.dtype | None = None, *, subfolder: str | None = None, **options: Any
) -> VideoAutoencoder:
    """Load an autoencoder of whatever family.

    Args:
        source: The name of a bundled model or pipeline; a folder of `save_pretrained`, of a model or of a pipeline
            with one; an original checkpoint, or a folder with one; each of these on the Hub: `user/repo`, or
            `user/repo/file` for an original checkpoint, or its URL.
        dtype: Dtype to cast the weights to; as stored if `None`.
        subfolder: Folder of the model inside `source`; `vae` by default in that of a pipeline.
        options: `revision`, `variant`, `token`, `cache_dir`, `force_download` and `local_files_only` as of diffusers;
            any other is a config value, such as the `pixel_factor` that an original file does not tell.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: If there is no autoencoder of this package.
    """
    if source in bundled.PIPELINES:
        source = bundled.PIPELINES[str(source)].model
    if source in bundled.MODELS:
        source = bundled.model_path(str(source))
    return _load(source, AUTOENCODERS, bundled.MODELS, "vae", dtype, subfolder, options)


def load_transformer(
    source: str | Path, dtype: torch.dtype | None = None, *, subfolder: str | None = None, **options: Any
) -> LeanVAELatteTransformer3DModel:
    """Load a class-conditional or unconditional Latte transformer.

    Args:
        source: As of [`load_autoencoder`].
        dtype: Dtype to cast the weights to; as stored if `None`.
        subfolder: Folder of the model inside `source`; `transformer` by default in that of a pipeline.
        options: As of [`load_autoencoder`]; `num_attention_heads` for an original file of none of the usual sizes.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: If there is no such transformer.
    """
    if source in bundled.PIPELINES:
        source = bundled.pipeline_path(str(source))
    return _load(source, TRANSFORMERS, bundled.PIPELINES, "transformer", dtype, subfolder, options)


def load_diffusion_pipeline(source: str | Path, dtype: torch.dtype | None = None, **options: Any) -> DiffusionPipeline:
    """Load a pipeline of diffusers or of this package, whatever its class.

    Args:
        source: The name of a bundled pipeline, a folder of `save_pretrained`, or a Hub id `user/repo`.
        dtype: Dtype to cast the weights to; as stored if `None`.
        options: As of `DiffusionPipeline.from_pretrained`: `revision`, `variant`, components, ...

    Raises:
        ValueError: If there is none.
    """
    if source in bundled.PIPELINES:
        name = str(source)
        vae = load_autoencoder(bundled.PIPELINES[name].model, dtype)
        source, options = bundled.pipeline_path(name), {"vae": vae} | options
    elif not Path(source).exists() and len(Path(source).parts) != 2:
        legal = ", ".join(map(repr, bundled.PIPELINES))
        raise ValueError(
            f"`source` must be a bundled pipeline ({legal}), the folder of one, or a Hub id 'user/repo', got "
            f"{str(source)!r}, which does not exist."
        )
    try:
        return DiffusionPipeline.from_pretrained(str(source), dtype=dtype, **options)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"`source` must be a pipeline, got {str(source)!r}: {_sentence(error)}") from None


def family_of_checkpoint(path: str | Path, families: tuple[Family, ...] = FAMILIES) -> Family:
    """Find the family of an original checkpoint by its keys, without reading its tensors.

    Raises:
        ValueError: If it is of none of `families`, or no readable file.
    """
    keys = read_keys(path)
    for family in families:
        if has_anchor(keys, family.conversion.ANCHOR):
            return family
    names = ", ".join(family.conversion.NAME for family in families)
    raise ValueError(f"`path` must be an original checkpoint of {names}, got {str(path)!r} without the keys of any.")


def family_of_config(config: dict[str, Any], source: str | Path, families: tuple[Family, ...] = FAMILIES) -> Family:
    """Find the family that a config is of: by `_class_name`, or by an argument of the original.

    Raises:
        ValueError: If it is of none of `families`.
    """
    for family in families:
        if config.get("_class_name") == family.model_class.__name__ or is_original_config(config, family):
            return family
    names = ", ".join(family.model_class.__name__ for family in families)
    found = config.get("_class_name")
    raise ValueError(f"`source` must hold a model of the class {names}, got {str(source)!r} with {found!r}.")


def is_original_config(config: dict[str, Any], family: Family) -> bool:
    """Tell whether a config stands beside an original checkpoint of a family, and not in a folder of ours."""
    anchor = family.conversion.CONFIG_ANCHOR
    return anchor is not None and anchor in config


def check_source(name: str, source: str | Path, legal_names: Iterable[str]) -> None:
    """Refuse a source that is not there and cannot be on the Hub.

    Args:
        name: The argument, for the message.
        source: What came.
        legal_names: Names that stand for something else, for the message.
    """
    legal_names = tuple(legal_names)
    if source not in legal_names and not Path(source).exists() and not is_hub_reference(str(source)):
        raise ValueError(
            f"`{name}` must be {', '.join(map(repr, legal_names))}, a folder of `save_pretrained`, an original "
            f"checkpoint file, or one of the two on the Hub, got {str(source)!r}, which does not exist."
        )


def _load(
    source: str | Path,
    families: tuple[Family, ...],
    names: Iterable[str],
    component: str,
    dtype: torch.dtype | None,
    subfolder: str | None,
    options: dict[str, Any],
) -> Any:
    """See [`load_autoencoder`]; `component` is the sub-folder in a pipeline, `names` are legal and bundled."""
    check_source("source", source, names)
    place = str(source)
    hub = {name: options[name] for name in HUB_ARGUMENTS if name in options}
    try:
        if not is_checkpoint_reference(place):
            if not Path(source).exists() and place.count("/") > 1:  # a folder in a repository
                user, repository, folder = place.split("/", 2)
                place, subfolder = f"{user}/{repository}", f"{folder}/{subfolder or ''}".rstrip("/")
            subfolder, config = _find_config(place, component, subfolder, hub)
            if config is not None:
                family = family_of_config(config, place, families)
                if not is_original_config(config, family):
                    load = family.model_class.from_pretrained
                    return load(place, torch_dtype=dtype, subfolder=subfolder, **options)
            place = place if subfolder is None else f"{place}/{subfolder}"
        path = resolve_checkpoint(place, **hub)
        load = family_of_checkpoint(path, families).model_class.from_single_file
        return load(path, torch_dtype=dtype, **{key: options[key] for key in options.keys() - set(HUB_ARGUMENTS)})
    except OSError as error:
        raise ValueError(f"`source` must be there and readable, got {str(source)!r}: {_sentence(error)}") from None


def _find_config(
    place: str, component: str, subfolder: str | None, hub: dict[str, Any]
) -> tuple[str | None, dict[str, Any] | None]:
    """Read the config of a model in a folder or repository, or in its `component` if it is that of a pipeline.

    Returns:
        The sub-folder, and the config if there is one.
    """
    for folder in (None, component) if subfolder is None else (subfolder,):
        if Path(place).is_dir() and not Path(place, folder or "", CONFIG_NAME).is_file():
            continue  # diffusers would take the one above a sub-folder
        try:
            config: Any = AutoModel.load_config(place, subfolder=folder, **hub)
        except OSError:
            continue
        return folder, config
    return subfolder, None


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())

"""Load models and pipelines by a bundled name, from a folder, from an original checkpoint or from the Hub.

The class of a model is found from its config or from the keys of its weights; models of other classes are refused.
"""

import json
import os
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.utils import is_accelerate_available, is_transformers_available
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from . import bundled
from .checks import reason_of, suggestion
from .conversion.checkpoints import (
    CONFIG_NAME,
    HUB_ARGUMENTS,
    has_anchor,
    is_checkpoint_reference,
    is_here,
    is_hub_reference,
    read_keys,
    resolve_checkpoint,
)
from .description import INDEX_NAME, class_of_index, read_json
from .hub_errors import hub_reason
from .models.autoencoder_kl_ivvae import AutoencoderKLIVVAE
from .models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from .models.autoencoder_kl_wfvae import AutoencoderKLWFVAE
from .models.pretrained import PretrainedModel, check_is_object, read_own_config
from .models.transformer_latte import LeanVAELatteTransformer3DModel
from .models.video_autoencoder import VideoAutoencoder
from .registration import PIPELINES, SHIM


AUTOENCODERS = (AutoencoderKLLeanVAE, AutoencoderKLWFVAE, AutoencoderKLIVVAE)
TRANSFORMERS = (LeanVAELatteTransformer3DModel,)
MODEL_CLASSES = AUTOENCODERS + TRANSFORMERS

ModelClasses = tuple[type[PretrainedModel], ...]


def load_autoencoder(
    source: str | Path, dtype: torch.dtype | None = None, *, subfolder: str | None = None, **options: Any
) -> VideoAutoencoder:
    """Load an autoencoder of whatever family.

    Args:
        source: The name of a bundled model or pipeline, unless there is a folder of that name in the working
            directory; a folder of `save_pretrained`, of a model or of a pipeline with one; an original checkpoint, or
            a folder with one; each of these on the Hub: `user/repo`, or `user/repo/file` for an original checkpoint,
            or its URL.
        dtype: Dtype to cast the weights to; as stored if `None`.
        subfolder: Folder of the model inside `source`; `vae` by default in that of a pipeline.
        options: `revision`, `variant`, `token`, `cache_dir`, `force_download` and `local_files_only` as of diffusers;
            any other is a config value, such as the `pixel_factor` that an original file does not tell.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: If there is no autoencoder of this package.
    """
    if bundled.is_bundled(source, bundled.PIPELINES):
        options = bundled.latent_statistics(str(source)) | options
    return _load(resolve_bundled(source), AUTOENCODERS, bundled.MODELS, "vae", dtype, subfolder, options)


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
    if bundled.is_bundled(source, bundled.PIPELINES):
        source = bundled.pipeline_path(str(source))
    names = [name for name, pipeline in bundled.PIPELINES.items() if not pipeline.takes_text]
    return _load(source, TRANSFORMERS, names, "transformer", dtype, subfolder, options)


def load_model(
    source: str | Path, dtype: torch.dtype | None = None, *, subfolder: str | None = None, **options: Any
) -> PretrainedModel:
    """Load a model of any class of this package; from a pipeline, its autoencoder.

    Args:
        source: As of [`load_autoencoder`].
        dtype: Dtype to cast the weights to; as stored if `None`.
        subfolder: Folder of the model inside `source`.
        options: As of [`load_autoencoder`].

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: If there is none.
    """
    return _load(resolve_bundled(source), MODEL_CLASSES, bundled.MODELS, "vae", dtype, subfolder, options)


def load_diffusion_pipeline(source: str | Path, dtype: torch.dtype | None = None, **options: Any) -> DiffusionPipeline:
    """Load a pipeline of diffusers or of this package, whatever its class.

    Args:
        source: The name of a bundled pipeline, before which comes a folder of that name; a folder of
            `save_pretrained`, or a Hub id `user/repo`.
        dtype: Dtype to cast the weights to; as stored if `None`.
        options: As of `DiffusionPipeline.from_pretrained`: `revision`, `variant`, components, ...

    Raises:
        ImportError: If a bundled text-to-video pipeline is asked for without transformers.
        ValueError: If there is none.
    """
    options = {"dtype": dtype} | _memory_options() | options
    is_there = str(source) in bundled.PIPELINES or is_here(source)
    if not is_there and not (is_hub_reference(str(source)) and str(source).count("/") == 1):
        legal = ", ".join(map(repr, bundled.PIPELINES))
        raise ValueError(
            f"`source` must be a bundled pipeline ({legal}), the folder of one, or a Hub id 'user/repo', got "
            f"{str(source)!r}, which does not exist{suggestion(source, bundled.PIPELINES)}."
        )
    try:
        place, options = resolve_pipeline(source, options)
        return _class_of_pipeline(place, options).from_pretrained(place, **options)
    except Exception as error:  # huggingface_hub lets errors of its HTTP client through
        reason = hub_reason(error, f"model {str(source)!r}", options.get("revision"))
        if reason is None and not isinstance(error, (OSError, ValueError, AttributeError)):
            raise
        reason = reason or reason_of(error)
        raise ValueError(f"`source` must be a pipeline, got {str(source)!r}: {reason}.") from None


def resolve_pipeline(source: str | os.PathLike | None, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Replace the name of a bundled pipeline by its folder, and nothing else.

    Args:
        source: What `from_pretrained` of a pipeline was given; a folder of such a name comes first.
        options: Its further arguments.

    Returns:
        Folder and arguments, which then hold the autoencoder, whose weights are in the package only once.

    Raises:
        ImportError: If a bundled text-to-video pipeline is asked for without transformers.
    """
    name = str(source)
    if not bundled.is_bundled(name, bundled.PIPELINES):
        return name, options
    if bundled.PIPELINES[name].takes_text and not is_transformers_available():
        raise ImportError(f'{name!r} needs transformers: pip install "diffusers-leanvae[text]".')
    if "vae" not in options:
        dtype = options.get("dtype") or options.get("torch_dtype")
        if isinstance(dtype, dict):  # of components
            dtype = dtype.get("vae", dtype.get("default"))
        options = options | {"vae": load_autoencoder(name, dtype)}
    return str(bundled.pipeline_path(name)), options


def _class_of_pipeline(source: str, options: dict[str, Any]) -> Any:
    """Return our class where the index of a pipeline names it with the module in its repository, which is not run."""
    hub = {name: options[name] for name in HUB_ARGUMENTS if name in options}
    index: Any = DiffusionPipeline.load_config(source, **hub)
    check_is_object(index, source, name=INDEX_NAME)
    name = class_of_index(index)
    is_ours = index.get("_class_name") == [SHIM, name] and name in PIPELINES
    return getattr(import_module(PIPELINES[name]), name) if is_ours else DiffusionPipeline


def class_of_checkpoint(
    path: str | Path, classes: ModelClasses = MODEL_CLASSES, name: str = "path"
) -> type[PretrainedModel]:
    """Find the class for an original checkpoint by its keys, without reading its tensors.

    Weights of `save_pretrained` are of the class that the config next to them says; `name` is that of the argument.

    Raises:
        ValueError: If it is none of `classes`, or the file cannot be read.
    """
    keys = read_keys(path)
    for model_class in classes:
        if has_anchor(keys, model_class.conversion.ANCHOR):
            return model_class
    for model_class in classes:
        if (read_own_config(model_class, Path(path)) or {}).get("_class_name") == model_class.__name__:
            return model_class
    names = ", ".join(model_class.conversion.NAME for model_class in classes)
    raise ValueError(f"`{name}` must be an original checkpoint of {names}, got {str(path)!r} without the keys of any.")


def class_of_config(config: dict[str, Any], source: str | Path, classes: ModelClasses) -> type[PretrainedModel]:
    """Find the class that a config is of: by its `_class_name`, or by an argument of the original.

    Args:
        config: What a `config.json` holds.
        source: Where it lies, for the error.
        classes: Those that are looked for.

    Raises:
        ValueError: If it is none of `classes`.
    """
    for model_class in classes:
        if config.get("_class_name") == model_class.__name__ or model_class.is_original_config(config):
            return model_class
    names = ", ".join(model_class.__name__ for model_class in classes)
    found = config.get("_class_name")
    raise ValueError(f"`source` must hold a model of the class {names}, got {str(source)!r} with {found!r}.")


def check_source(name: str, source: str | Path, legal_names: Iterable[str]) -> None:
    """Refuse a source that is not there and cannot be on the Hub.

    Args:
        name: The argument, for the message.
        source: What came.
        legal_names: Names that stand for something else, for the message.
    """
    legal_names = tuple(legal_names)
    if source not in legal_names and not is_here(source) and not is_hub_reference(str(source)):
        raise ValueError(
            f"`{name}` must be {', '.join(map(repr, legal_names))}, a folder of `save_pretrained`, an original "
            f"checkpoint file, or one of the two on the Hub, got {str(source)!r}, which does not exist"
            f"{suggestion(source, legal_names)}."
        )


def resolve_bundled(source: str | Path) -> str | Path:
    """Replace the name of a bundled model or pipeline by the folder of its autoencoder, and nothing else.

    A folder of such a name in the working directory comes first.
    """
    if not bundled.is_bundled(source):
        return source
    name = str(source)
    return bundled.model_path(bundled.PIPELINES[name].model if name in bundled.PIPELINES else name)


def portable_reference(source: str | Path) -> tuple[str, str | None]:
    """Name a model so that it is found again from any folder, and later.

    Args:
        source: As of [`load_autoencoder`]; it has been loaded.

    Returns:
        The bundled name, the absolute path, or the Hub reference; and of the last the commit it was loaded from, as
        `revision` of [`load_autoencoder`], where the cache of the Hub tells.
    """
    text = str(source)
    if bundled.is_bundled(source):
        return text, None
    if Path(source).exists():
        return str(Path(source).resolve()), None
    if not is_hub_reference(text) or ":" in text:  # an address names its revision
        return text, None
    repository = repo_folder_name(repo_id="/".join(text.split("/")[:2]), repo_type="model")
    try:
        return text, (Path(constants.HF_HUB_CACHE) / repository / "refs" / "main").read_text().strip() or None
    except OSError:
        return text, None


def _load(
    source: str | Path,
    classes: ModelClasses,
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
                model_class = class_of_config(config, place, classes)
                if not model_class.is_original_config(config):
                    options = _memory_options() | options
                    return model_class.from_pretrained(place, torch_dtype=dtype, subfolder=subfolder, **options)
            place = place if subfolder is None else f"{place}/{subfolder}"
        path = resolve_checkpoint(place, **hub)
        config_values = {name: value for name, value in options.items() if name not in HUB_ARGUMENTS}
        return class_of_checkpoint(path, classes, "source").from_single_file(path, torch_dtype=dtype, **config_values)
    except Exception as error:  # huggingface_hub lets errors of its HTTP client through
        reason = hub_reason(error, f"model {place!r}", hub.get("revision"))
        if reason is None and not isinstance(error, OSError):
            raise
        reason = reason or reason_of(error)
        raise ValueError(f"`source` must be there and readable, got {str(source)!r}: {reason}.") from None


def _memory_options() -> dict[str, bool]:
    """Ask for the memory that diffusers would take anyway: without accelerate it warns before each model."""
    return {"low_cpu_mem_usage": is_accelerate_available()}


def _find_config(
    place: str, component: str, subfolder: str | None, hub: dict[str, Any]
) -> tuple[str | None, dict[str, Any] | None]:
    """Read the config of a model in a folder or repository, or in its `component` if it is that of a pipeline.

    Where the Hub cannot be reached, `hub` asks for files of its cache alone from then on.

    Returns:
        The sub-folder, and the config if there is one.
    """
    for folder in (None, component) if subfolder is None else (subfolder,):
        if Path(place).is_dir():  # where diffusers would take the one above a sub-folder
            path = Path(place, folder or "", CONFIG_NAME)
            if path.is_file():
                return folder, read_json(path)
            continue
        try:
            config: Any = AutoModel.load_config(place, subfolder=folder, **hub)
        except OSError as error:
            if isinstance(error.__context__, (json.JSONDecodeError, UnicodeDecodeError)):
                raise ValueError(f"`source` must have a `{CONFIG_NAME}` of valid JSON, got {place!r}.") from None
            if isinstance(error.__context__, LocalEntryNotFoundError):
                hub["local_files_only"] = True  # the Hub cannot be reached: to wait for it once is enough
            continue
        check_is_object(config, place, folder)
        return folder, config
    return subfolder, None

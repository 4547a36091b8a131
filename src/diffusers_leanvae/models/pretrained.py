"""Base class of the models: loads saved models and original checkpoints, and refuses those of other classes.

diffusers builds the class that it is asked for from any config, with defaults for missing values, and leaves weights
that the file does not have at random values. [`PretrainedModel`] checks the config before that.
"""

import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from ..checks import reason_of
from ..conversion.checkpoints import (
    HUB_ARGUMENTS,
    has_anchor,
    is_checkpoint_reference,
    is_hub_reference,
    read_keys,
    read_tensors,
    resolve_checkpoint,
)
from ..conversion.headers import CONFIG_NAME, WEIGHTS_NAME


# Arguments of `from_single_file` that are not config values: those of `huggingface_hub` and those of diffusers. Of
# these, `low_cpu_mem_usage` is always on, and some may only be `None`.
FILE_ARGUMENTS = (
    *HUB_ARGUMENTS,
    "config",
    "config_revision",
    "subfolder",
    "dtype",
    "device",
    "disable_mmap",
    "low_cpu_mem_usage",
    "proxies",
    "original_config",
    "quantization_config",
    "device_map",
)


class PretrainedModel(ModelMixin, ConfigMixin):
    """Base of our models: `load_config`, and with it `from_pretrained`, takes a config of its class only."""

    conversion: ClassVar[ModuleType]  # the one in `conversion` that knows the original checkpoints

    if TYPE_CHECKING:  # diffusers wraps it so that type checkers lose its arguments

        def to(self, *args: Any, **kwargs: Any) -> Self: ...

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | Path, torch_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Self:
        """Load one file of weights, see [`load_single_file`]."""
        raise NotImplementedError

    @classmethod
    def is_original_config(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether a config is one of the original model, whose weights lie next to it, and not one of ours."""
        return cls.conversion.CONFIG_ANCHOR is not None and cls.conversion.CONFIG_ANCHOR in config

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load a config as diffusers does, and check that it describes a model of this class.

        Raises:
            ValueError: If it is of another class or of an original model; if no such model can be built, or only one
                of far more parameters than there are weights next to the config, or bytes of memory.
        """
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        source = str(pretrained_model_name_or_path)
        _check_class(cls, config, source)
        _check_size(cls, config, source, kwargs.get("subfolder"))
        return loaded


def load_single_file(
    model_class: type[PretrainedModel],
    reference: str | Path,
    read: Callable[[Path], tuple[dict[str, Any], dict[str, torch.Tensor]]],
    torch_dtype: torch.dtype | None = None,
    values: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Load an original checkpoint, or weights of `save_pretrained`, for every `from_single_file`.

    Args:
        model_class: Class of the model.
        reference: What [`resolve_checkpoint`] takes.
        read: Reads config and weights of an original checkpoint.
        torch_dtype: Dtype to cast the weights to; as stored if `None`.
        values: Config values that replace those of the file and of `config`.
        options: Arguments of [`FILE_ARGUMENTS`].

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: If there is no such checkpoint, it is not complete, or an argument is not legal.
    """
    options = dict(options or {})
    for name in ("proxies", "original_config", "quantization_config", "device_map"):
        if options.get(name) is not None:
            hint = ", which `huggingface_hub` takes from HTTPS_PROXY" if name == "proxies" else ""
            raise ValueError(f"`{name}` must be None for a model of this package, got {options[name]!r}{hint}.")
    hub = {name: options[name] for name in HUB_ARGUMENTS if name in options}
    subfolder, config = options.get("subfolder"), options.get("config")
    if subfolder is not None and config is None and not is_checkpoint_reference(str(reference)):
        reference = f"{reference}/{subfolder}"  # of a folder or repository
    path = resolve_checkpoint(reference, **hub)
    kind = model_class.conversion.NAME
    own = read_own_config(model_class, path)
    if config is not None:
        hub |= {"revision": options["config_revision"]} if "config_revision" in options else {}
        given = _read_config(model_class, config, subfolder, hub)
        is_own = _is_own(model_class, path, given)
    else:
        is_own = own is not None and _is_own(model_class, path, own)
        given = model_class.load_config(path.parent) if is_own else {}
    if is_own:
        found, state_dict = given, read_tensors(path, kind)[1]
        wanted = f"hold the weights of the `{model_class.__name__}` that its config describes"
    else:
        found, state_dict = _read_original(model_class, path, read)
        found, wanted = found | given, f"be a complete {kind} checkpoint"
    model = _build(model_class, found | dict(values or {}))
    torch_dtype = options.get("dtype") or torch_dtype
    if torch_dtype is not None:
        state_dict = {key: tensor.to(torch_dtype) for key, tensor in state_dict.items()}
    if options.get("disable_mmap"):
        state_dict = {key: tensor.clone() for key, tensor in state_dict.items()}
    try:
        model.load_state_dict(state_dict, strict=True, assign=True)
    except RuntimeError as error:
        reason = reason_of(error)
        raise ValueError(f"`pretrained_model_link_or_path` must {wanted}: {reason}.") from None
    return model.eval() if options.get("device") is None else model.eval().to(options["device"])


def _build(model_class: type[PretrainedModel], config: Mapping[str, Any]) -> PretrainedModel:
    """Build a model without values, all of which come from a file."""
    legal = inspect.signature(model_class.__init__).parameters
    with torch.device("meta"):
        return model_class(**{name: value for name, value in config.items() if name in legal})


def _is_own(model_class: type[PretrainedModel], path: Path, config: Mapping[str, Any]) -> bool:
    """Tell weights of `save_pretrained`, whose config may be this, from an original checkpoint."""
    keys = read_keys(path)
    if not has_anchor(keys, model_class.conversion.ANCHOR):
        return True
    try:  # the anchor of Latte is a key of ours, too
        return keys <= _build(model_class, config).state_dict().keys()
    except (RuntimeError, TypeError, ValueError, OverflowError):
        return False


def _read_config(
    model_class: type[PretrainedModel], config: Any, subfolder: str | None, hub: dict[str, Any]
) -> dict[str, Any]:
    """Read the `config` of `from_single_file`: values, a file, or a folder here or on the Hub."""
    if isinstance(config, Mapping):
        _check_class(model_class, config, "config")
        return dict(config)
    folder = Path(config, subfolder or "")
    is_here = Path(config).is_file() or (folder / CONFIG_NAME).is_file()
    reason = f"without a `{CONFIG_NAME}`" if Path(config).exists() else "which does not exist"
    if is_here or (not Path(config).exists() and is_hub_reference(str(config))):
        place = folder if Path(config).is_dir() else config
        try:
            return dict(model_class.load_config(place, subfolder=None if is_here else subfolder, **hub))
        except OSError as error:
            reason = reason_of(error)
    raise ValueError(
        f"`config` must be a folder or Hub repository with a `{CONFIG_NAME}`, such a file, or its values, got "
        f"{str(config)!r}, {reason}."
    )


def read_own_config(model_class: type[PretrainedModel], path: Path) -> dict[str, Any] | None:
    """Read the config of `save_pretrained` next to a file of weights, if there is one."""
    try:
        config = json.loads(path.with_name(CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_own = isinstance(config, dict) and "_class_name" in config and not model_class.is_original_config(config)
    return config if is_own else None


def _read_original(
    model_class: type[PretrainedModel],
    path: Path,
    read: Callable[[Path], tuple[dict[str, Any], dict[str, torch.Tensor]]],
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        return read(path)
    except ValueError as error:
        if path.name.startswith(Path(WEIGHTS_NAME).stem) and not path.with_name(CONFIG_NAME).exists():
            raise ValueError(
                f"`config` must be given for weights of `save_pretrained` without a `{CONFIG_NAME}` next to them, got "
                f"{str(path)!r}."
            ) from error
        raise


def _check_class(model_class: type[PretrainedModel], config: Mapping[str, Any], source: str) -> None:
    name, found = model_class.__name__, config.get("_class_name")
    if model_class.is_original_config(config):
        raise ValueError(
            f"`{name}.from_pretrained` must be given a folder of `save_pretrained`, got {source!r}, an original "
            f"{model_class.conversion.NAME} model: call `{name}.from_single_file({source!r})`."
        )
    if found is not None and found not in {base.__name__ for base in model_class.__mro__}:
        raise ValueError(
            f"`{name}.from_pretrained` must be given an `{name}`, got {source!r}, an `{found}`: call "
            f"`{found}.from_pretrained`, or for any autoencoder of this package "
            "`diffusers_leanvae.loading.load_autoencoder`."
        )


def _check_size(
    model_class: type[PretrainedModel], config: Mapping[str, Any], source: str, subfolder: str | None
) -> None:
    try:
        model = _build(model_class, config)  # in which nothing is allocated, whatever the widths are
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = reason_of(error)
        raise ValueError(f"`config.json` of {source!r} must describe an `{model_class.__name__}`: {reason}.") from None
    count = sum(parameter.numel() for parameter in model.parameters())
    folder = Path(source, subfolder or "")
    num_bytes = sum(file.stat().st_size for file in folder.glob("*") if file.suffix in (".safetensors", ".bin"))
    if num_bytes and count > 2 * num_bytes:  # half a byte for each: nobody stores less
        have = f"{num_bytes} bytes of weights next to it"
    elif not num_bytes and count > (memory := _machine_memory()):
        have = f"{memory} bytes of memory"
    else:
        return
    raise ValueError(
        f"`config.json` of {source!r} must describe the model that is stored, got {count} parameters for {have}."
    )


def _machine_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no POSIX system
        return 2**40

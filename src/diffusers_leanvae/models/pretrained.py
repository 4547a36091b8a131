"""Base class of the models: loads saved models and original checkpoints, and refuses those of other classes.

diffusers builds the class that it is asked for from any config, with defaults for missing values, and leaves weights
that the file does not have at random values. [`PretrainedModel`] checks the config before that.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from ..conversion.checkpoints import resolve_checkpoint


class PretrainedModel(ModelMixin, ConfigMixin):
    """Base of our models: `load_config`, and with it `from_pretrained`, takes a config of its class only."""

    conversion: ClassVar[ModuleType]  # the one in `conversion` that knows the original checkpoints

    if TYPE_CHECKING:  # diffusers wraps it so that type checkers lose its arguments

        def to(self, *args: Any, **kwargs: Any) -> Self: ...

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | Path, torch_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Self:
        """Load an original checkpoint."""
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


def load_original(
    model_class: type[PretrainedModel],
    reference: str | Path,
    read: Callable[[Path], tuple[dict[str, Any], dict[str, torch.Tensor]]],
    torch_dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
    hub_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Load an original checkpoint, for every `from_single_file`.

    Args:
        model_class: Class of the model.
        reference: What [`resolve_checkpoint`] takes.
        read: Reads config and weights of the file.
        torch_dtype: Dtype to cast the weights to; as stored if `None`.
        config: Config values that replace those of the file.
        hub_kwargs: Arguments for `huggingface_hub`.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: If there is no such checkpoint, or it is not complete.
    """
    found, state_dict = read(resolve_checkpoint(reference, **(hub_kwargs or {})))
    with torch.device("meta"):  # every value comes from the file
        model = model_class(**(found | dict(config or {})))
    if torch_dtype is not None:
        state_dict = {key: tensor.to(torch_dtype) for key, tensor in state_dict.items()}
    try:
        model.load_state_dict(state_dict, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rstrip(". ")
        kind = model_class.conversion.NAME
        raise ValueError(f"`pretrained_model_link_or_path` must be a complete {kind} checkpoint: {reason}.") from None
    return model.eval()


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
    legal = inspect.signature(model_class.__init__).parameters
    # On the meta device nothing is allocated, whatever the widths are.
    try:
        with torch.device("meta"):
            model = model_class(**{key: value for key, value in config.items() if key in legal})
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split()).rstrip(". ")
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

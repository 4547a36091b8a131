"""Base class of the models: loads saved models and original checkpoints, and refuses those of other classes.

diffusers builds the class that it is asked for from any config, with defaults for missing values, and leaves weights
that the file does not have at random values. [`PretrainedModel`] checks the config before that.
"""

import inspect
import json
import os
import pickle
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import constants
from safetensors import SafetensorError

from .. import bundled
from ..checks import CHECKPOINT_SUFFIXES, reason_of
from ..conversion.checkpoints import (
    HUB_ARGUMENTS,
    has_anchor,
    is_checkpoint_reference,
    is_hub_reference,
    list_repository,
    pickle_reason,
    read_keys,
    read_tensors,
    resolve_checkpoint,
)
from ..conversion.headers import CONFIG_NAME, WEIGHTS_NAME
from ..description import list_shards, parse_weights_name
from ..hub import pushing
from ..hub_errors import hub_reason


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
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Load a saved model as diffusers does, also by the name of a bundled one.

        Args:
            pretrained_model_name_or_path: A folder of `save_pretrained`, a Hub id `user/repo`, or the name of a
                bundled model, before which comes a folder of that name.
            kwargs: As of diffusers: `torch_dtype`, `subfolder`, `revision`, `variant`, `token`, ...; any other is a
                config value.

        Raises:
            OSError: If it is not there or cannot be read, in one sentence.
            ValueError: If it is none of this class, or its weights are not all that its config describes.
        """
        source: Any = pretrained_model_name_or_path
        if not isinstance(source, str | os.PathLike) or not str(source):
            raise ValueError(
                "`pretrained_model_name_or_path` must be a folder of `save_pretrained`, a Hub id 'user/repo', or the "
                f"name of a bundled model, got {source!r}."
            )
        if bundled.is_bundled(source, bundled.MODELS):
            source = bundled.model_path(str(source))
        if constants.HF_HUB_OFFLINE:  # diffusers would ask the Hub for shards
            kwargs.setdefault("local_files_only", True)
        try:
            return super().from_pretrained(source, **kwargs)
        except Exception as error:  # huggingface_hub lets errors of its HTTP client through
            sentence = _unreadable(cls, str(pretrained_model_name_or_path), kwargs, error)
            if sentence is None:
                raise
            raise OSError(sentence) from error

    @classmethod
    def _load_pretrained_model(cls, *args: Any, **kwargs: Any) -> Any:
        # diffusers leaves weights that are not there as it finds them in memory, and drops the others with a warning.
        given = inspect.signature(super()._load_pretrained_model).bind(*args, **kwargs).arguments
        if given.get("hf_quantizer") is None:  # quantised weights have other keys
            files = given["resolved_model_file"]
            keys = given["loaded_keys"] if given["state_dict"] is not None else _read_shards(files)
            if keys is not None:
                name = Path(files[0]).name + (f" and {len(files) - 1} other shards" if len(files) > 1 else "")
                _check_keys(given["model"], keys, name, str(given["pretrained_model_name_or_path"]))
        return super()._load_pretrained_model(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save the model as diffusers does, and remove former weights that would be loaded in place of its own.

        Raises:
            ValueError: If it has adapters, or weights that are not in memory, or the folder is a file; nothing is
                written then.
        """
        check_saveable(self)
        if os.path.isfile(save_directory):  # of which diffusers only makes a note in the log
            raise ValueError(f"`save_directory` must be a folder, got {str(save_directory)!r}, which is a file.")
        super().save_pretrained(save_directory, *args, **kwargs)
        given = inspect.signature(super().save_pretrained).bind(save_directory, *args, **kwargs).arguments
        if given.get("is_main_process", True) and not given.get("use_flashpack"):
            suffix = ".safetensors" if given.get("safe_serialization", True) else ".bin"
            _remove_former(Path(save_directory), suffix, given.get("variant"))

    # Pipelines look into it for the arguments that they may hand on.
    save_pretrained.__signature__ = inspect.signature(ModelMixin.save_pretrained)  # type: ignore[attr-defined]

    def push_to_hub(self, repo_id: str, commit_message: str | None = None, **options: Any) -> str:
        """Push the model to the Hub with a card: [`hub.push_to_hub`], where the arguments are described."""
        return pushing.push_to_hub(self, repo_id, commit_message=commit_message, **options)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load a config as diffusers does, and check that it describes a model of this class.

        Raises:
            ValueError: If it is no JSON object, of another class or of an original model; if no such model can be
                built, or only one of far more parameters than there are weights next to the config, or bytes of
                memory.
        """
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        source = str(pretrained_model_name_or_path)
        check_is_object(config, source, kwargs.get("subfolder"))
        config.pop("auto_map", None)  # which is for `AutoModel`
        _check_class(cls, config, source)
        _check_weights(cls, config, source, kwargs.get("subfolder"))
        return loaded


def _unreadable(
    model_class: type[PretrainedModel], source: str, kwargs: Mapping[str, Any], error: Exception
) -> str | None:
    """Say in a sentence why there is no model at a source; `None` if the error is of another kind."""
    subfolder = kwargs.get("subfolder")
    reason = hub_reason(error, f"model {source!r}", kwargs.get("revision"))
    index_reason = _index_reason(error)
    if reason is None and index_reason is None and not isinstance(error, OSError):
        return None
    found = _find_originals(source, subfolder, kwargs)
    name = model_class.__name__
    if found:
        place = "/".join(filter(None, (source, subfolder, found[0])))
        return (
            f"`{name}.from_pretrained` must be given a folder of `save_pretrained`, got {source!r} with "
            f"{', '.join(found)} and no `{CONFIG_NAME}`: for an original checkpoint call "
            f"`{name}.from_single_file({place!r})`."
        )
    reason = reason or index_reason or _weights_reason(error) or reason_of(str(error).split("\n")[0])
    return f"`{name}.from_pretrained` must be given a model that can be read, got {source!r}: {reason}."


def _index_reason(error: Exception) -> str | None:
    """Say what is wrong with an index of shards, in which diffusers looks up what it needs without a check."""
    calls = [call.name for call in traceback.extract_tb(error.__traceback__)]
    if "_get_checkpoint_shard_files" not in calls or isinstance(error, OSError):  # of a shard that is not there
        return None
    return f"its index of shards is damaged ({type(error).__name__}: {reason_of(error)})"


def _weights_reason(error: BaseException) -> str | None:
    """Say what is wrong with a file of weights, which diffusers leaves to the errors that led to its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (pickle.UnpicklingError, SafetensorError)):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    if isinstance(cause, SafetensorError):
        return f"its weights are damaged ({reason_of(cause)})"
    return f"its weights are no pickle of tensors alone, {pickle_reason(cause)}"


def _find_originals(source: str, subfolder: str | None, kwargs: Mapping[str, Any]) -> list[str]:
    """List the checkpoints in a folder or repository that has no config, and so was not saved by diffusers."""
    try:
        if Path(source).is_dir():
            names = [path.name for path in Path(source, subfolder or "").iterdir()]
        else:
            options = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            names = list_repository(source, subfolder or "", **options)
    except Exception:  # why it is not there is told by the error that led here
        return []
    return [] if CONFIG_NAME in names else sorted(name for name in names if name.endswith(CHECKPOINT_SUFFIXES))


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
    if not isinstance(reference, str | os.PathLike):
        raise ValueError(
            f"`pretrained_model_link_or_path` must be a path, a file on the Hub or its URL, got {reference!r}."
        )
    options = dict(options or {})
    for name in ("proxies", "original_config", "quantization_config", "device_map"):
        if options.get(name) is not None:
            hint = ", which `huggingface_hub` takes from HTTPS_PROXY" if name == "proxies" else ""
            raise ValueError(f"`{name}` must be None for a model of this package, got {options[name]!r}{hint}.")
    dtype = torch_dtype if options.get("dtype") is None else options["dtype"]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`torch_dtype` must be a floating-point `torch.dtype` or None, got {dtype!r}.")
    try:
        device = None if options.get("device") is None else torch.device(options["device"])
    except (RuntimeError, TypeError):
        raise ValueError(
            f"`device` must be one of torch such as 'cpu' or 'cuda:0', or None, got {options['device']!r}."
        ) from None
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
    try:
        model = _build(model_class, found | dict(values or {}))
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"`config` must describe an `{model_class.__name__}`: {reason_of(error)}.") from None
    if dtype is not None:
        state_dict = {key: tensor.to(dtype) for key, tensor in state_dict.items()}
    if options.get("disable_mmap"):
        state_dict = {key: tensor.clone() for key, tensor in state_dict.items()}
    try:
        model.load_state_dict(state_dict, strict=True, assign=True)
    except RuntimeError as error:
        reason = reason_of(error)
        raise ValueError(f"`pretrained_model_link_or_path` must {wanted}: {reason}.") from None
    return model.eval() if device is None else model.eval().to(device)


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


def check_saveable(model: torch.nn.Module) -> None:
    """Refuse to save a model with adapters, or one whose weights offloading has left on a disk, or that has none.

    Raises:
        ValueError: In one sentence.
    """
    # peft renames the weights of layers with adapters, so that they could not be loaded.
    adapted = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    if adapted:
        raise ValueError(
            "`save_pretrained` must be called on a model without adapters, got one with adapters in "
            f"{len(adapted)} layers, for instance {adapted[0]!r}: call its `fuse_lora()` and `unload_lora()` "
            "before, or save the adapter alone with `save_lora`."
        )
    registries = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    hooks = [registry.get_hook("group_offloading") for registry in registries if registry is not None]
    is_on_disk = any(hook is not None and hook.group.offload_to_disk_path for hook in hooks)
    # A model of transformers fetches what its map of devices has left elsewhere.
    is_on_meta = isinstance(model, ModelMixin) and any(parameter.is_meta for parameter in model.parameters())
    if is_on_disk or is_on_meta:
        place = "offloaded to a disk" if is_on_disk else "offloaded by accelerate or on the meta device"
        raise ValueError(
            "`save_pretrained` must be called on a model with its weights in memory, got one with weights "
            f"{place}: save it before, or load it again."
        )


def _remove_former(folder: Path, suffix: str, variant: str | None) -> None:
    """Remove former weights of a variant that diffusers would load in place of those that were just saved to a folder.

    It removes former shards, but neither their index nor, for a `.bin`, the safetensors that it prefers to one.
    """
    plain = Path(WEIGHTS_NAME).stem
    dotted = "" if variant is None else f".{variant}"
    index = folder / f"{plain}{suffix}.index{dotted}.json"
    try:
        shards = list_shards(index)
    except (OSError, ValueError):  # none, or a former one
        shards = []
    is_sharded = bool(shards) and all((folder / name).is_file() for name in shards)
    saved = {index.name, *shards} if is_sharded else {f"{plain}{dotted}{suffix}"}
    for path in folder.iterdir():
        parsed = parse_weights_name(path.name)
        is_preferred = suffix == ".bin" or suffix in path.suffixes
        if parsed is not None and parsed[:2] == (plain, variant) and is_preferred and path.name not in saved:
            path.unlink()


def check_is_object(config: Any, source: str, subfolder: str | None = None, name: str = CONFIG_NAME) -> None:
    """Refuse a config that is some other JSON than an object."""
    if not isinstance(config, Mapping):
        place = "/".join(filter(None, (source, subfolder)))
        raise ValueError(f"`{name}` of {place!r} must hold a JSON object, got a {type(config).__name__}.")


def _check_class(model_class: type[PretrainedModel], config: Mapping[str, Any], source: str) -> None:
    name, found = model_class.__name__, config.get("_class_name")
    if model_class.is_original_config(config):
        raise ValueError(
            f"`{name}.from_pretrained` must be given a folder of `save_pretrained`, got {source!r}, an original "
            f"{model_class.conversion.NAME} model: call `{name}.from_single_file({source!r})`."
        )
    if not isinstance(found, str | None):
        raise ValueError(f"`_class_name` of {source!r} must be a name, got {found!r}.")
    if found is not None and found not in {base.__name__ for base in model_class.__mro__}:
        raise ValueError(
            f"`{name}.from_pretrained` must be given an `{name}`, got {source!r}, an `{found}`: call "
            f"`{found}.from_pretrained`, or for any autoencoder of this package "
            "`diffusers_leanvae.loading.load_autoencoder`."
        )


def _check_weights(
    model_class: type[PretrainedModel], config: Mapping[str, Any], source: str, subfolder: str | None
) -> None:
    try:
        model = _build(model_class, config)  # in which nothing is allocated, whatever the widths are
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
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


def _read_shards(files: Iterable[str]) -> set[str] | None:
    """Read the keys in files of weights; `None` if one is damaged, which is told when the weights are read."""
    try:
        return set().union(*map(read_keys, files))
    except ValueError:
        return None


def _check_keys(model: PretrainedModel, keys: Collection[str], name: str, source: str) -> None:
    """Refuse weights that are not all of a model, or that are more of it, such as layers that its config leaves out.

    What is of no part of the model at all, such as what a subclass has added, is no mistake.
    """
    expected = model.state_dict().keys()
    missing = sorted(expected - set(keys))
    parts = {key.split(".")[0] for key in expected}
    unknown = sorted(key for key in keys if key not in expected and key.split(".")[0] in parts)
    if missing or unknown:
        some = missing or unknown
        raise ValueError(
            f"`{name}` of {source!r} must hold the weights that its config describes, got a file "
            f"{'without' if missing else 'with'} {len(some)} {'of them' if missing else 'others'}, for instance "
            f"{', '.join(map(repr, some[:3]))}."
        )


def _machine_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no POSIX system
        return 2**40

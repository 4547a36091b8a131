"""Low-rank adapters (LoRA, arXiv 2106.09685) of the transformers: load, weigh, fuse and save as diffusers does."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import LatteTransformer3DModel
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin

from ..conversion.checkpoints import is_here, is_hub_reference


# The one video transformer of diffusers 0.42 without this base. A subclass of ours would be another class to saved
# pipelines, to `pickle` and to `type(...) is`, so the class itself gets what it lacks: methods, and no state.
if not issubclass(LatteTransformer3DModel, PeftAdapterMixin):
    LatteTransformer3DModel.__bases__ += (PeftAdapterMixin,)


class LoraLoaderMixin(CogVideoXLoraLoaderMixin):
    """`load_lora_weights`, `set_adapters`, `fuse_lora`, `unload_lora_weights` and so on of a pipeline's `transformer`.

    diffusers has such a class for each of its pipelines, which differ in the names of the components and in the
    foreign formats that they take; this one fits every pipeline whose only adapted component is its `transformer`.
    """

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> Any:
        """Read the weights of an adapter; see `load_lora_weights` of diffusers for the arguments.

        Raises:
            ValueError: If there are none for a transformer: diffusers would go on without.
        """
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, str | os.PathLike) and not (is_here(source) or is_hub_reference(str(source))):
            raise ValueError(
                "`pretrained_model_name_or_path_or_dict` must be a folder, a file, a Hub id 'user/repo' or weights, "
                f"got {str(source)!r}, which does not exist."
            )
        result = super().lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        weights = result[0] if isinstance(result, tuple) else result
        if not any(name.startswith(f"{cls.transformer_name}.") for name in weights):
            names = ", ".join([*weights][:2]) or "none"
            raise ValueError(
                f"The weights of a LoRA must have names that begin with `{cls.transformer_name}.`, got {names}."
            )
        return result

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: dict[str, torch.Tensor],
        transformer: Any,
        adapter_name: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Add an adapter to a transformer; see `load_lora_weights` of diffusers for the arguments.

        Raises:
            ValueError: If it was made for another transformer: diffusers would load what fits, and warn. If its
                weights are not finite, or `adapter_name` is no name.
        """
        if adapter_name is not None and (not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name):
            raise ValueError(f"`adapter_name` must be a name without dots or None, got {adapter_name!r}.")
        _check_fits(state_dict, transformer, cls.transformer_name)
        super().load_lora_into_transformer(state_dict, transformer, adapter_name, *args, **kwargs)


def _check_fits(state_dict: Mapping[str, torch.Tensor], transformer: Any, component: str) -> None:
    """Refuse an adapter whose layers are not those of a transformer."""
    layers = dict(transformer.named_modules())
    parts: dict[str, set[str]] = {}
    for key, weight in state_dict.items():
        name, _, part = key.removeprefix(f"{component}.").rpartition(".lora_")
        layer = layers.get(name)
        layer = getattr(layer, "base_layer", layer)
        if not hasattr(layer, "weight"):
            raise ValueError(f"The adapter must be one of this transformer, got {key!r} of a layer that it lacks.")
        if not weight.isfinite().all():
            raise ValueError(f"The weights of the adapter must be finite, got others in {key!r}.")
        for side, axis, attribute in (("A.", 1, "in_features"), ("B.", 0, "out_features")):
            if not part.startswith(side):
                continue
            parts.setdefault(name, set()).add(side)
            # Not the shape of the layer's weight, which is another in quantised layers.
            width = getattr(layer, attribute, None)
            if weight.ndim > 1 and width is not None and weight.shape[axis] != width:
                raise ValueError(
                    f"The adapter must be one of this transformer, whose {name!r} has {width} {attribute}, got "
                    f"weights of {tuple(weight.shape)} for {key!r}."
                )
    for name, found in parts.items():
        if len(found) < 2:
            raise ValueError(f"The adapter must have two matrices for each layer, got one for {name!r}.")


def save_lora(transformer: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Save an adapter of a transformer in the form that `load_lora_weights` reads.

    Args:
        transformer: The transformer.
        folder: Where `pytorch_lora_weights.safetensors` is written.
        adapter_name: Which of its adapters.

    Raises:
        ValueError: If it has no such adapter, or `folder` is a file: diffusers would save nothing.
    """
    from peft import get_peft_model_state_dict

    adapters = getattr(transformer, "peft_config", {})
    if adapter_name not in adapters:
        raise ValueError(f"`adapter_name` must be one of {', '.join(adapters) or 'none'}, got {adapter_name!r}.")
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"`folder` must be a folder or not exist, got the file {str(folder)!r}.")
    layers: Any = get_peft_model_state_dict(transformer, adapter_name=adapter_name)
    LoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=adapters[adapter_name].to_dict(),
    )

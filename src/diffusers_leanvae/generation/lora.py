"""Low-rank adapters (LoRA, arXiv 2106.09685) of the transformers: load, weigh, fuse and save as diffusers does."""

from pathlib import Path
from typing import Any

from diffusers import LatteTransformer3DModel
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin


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
        result = super().lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        weights = result[0] if isinstance(result, tuple) else result
        if not any(name.startswith(f"{cls.transformer_name}.") for name in weights):
            names = ", ".join([*weights][:2]) or "none"
            raise ValueError(
                f"The weights of a LoRA must have names that begin with `{cls.transformer_name}.`, got {names}."
            )
        return result


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

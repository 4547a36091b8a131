"""Start training from any LeanVAE, and choose which of its weights are trained."""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import bundled
from ..conversion.checkpoints import is_checkpoint_reference
from ..loading import check_source, load_autoencoder
from ..models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE


# What makes the latents: with these frozen, they stay those of the model that training started from. The sensing
# matrix `phi` also takes part in decoding, but it is what the latents are measured with.
ENCODER_PARAMETERS = ("encoder.", "logvar_proj.", "bottleneck.phi", "bottleneck.compress.")


def load_vae(init: str, config: dict[str, Any]) -> AutoencoderKLLeanVAE:
    """Make or load the model that training starts from, in float32.

    Args:
        init: `"spec"` or `"pca"`: a new model by `config`; the name of a bundled model; a folder of `save_pretrained`;
            an original checkpoint file; a Hub repository `user/name`; or a Hub file `user/name/file.ckpt`.
        config: Arguments of `AutoencoderKLLeanVAE`; for a loaded model only such as it has.
    """
    legal = [name for name in inspect.signature(AutoencoderKLLeanVAE.__init__).parameters if name != "self"]
    for key in config:
        if key not in legal:
            raise ValueError(f"Unknown recipe key `model.{key}`: legal keys here are {', '.join(legal)}.")
    if init in ("spec", "pca"):
        return AutoencoderKLLeanVAE(**config)
    check_source("init", init, ("spec", "pca", *bundled.MODELS))
    # Only the user can know whether an original file is of a Wan-aligned model: its pixel range is not stored.
    is_told = is_checkpoint_reference(init) and "pixel_factor" in config
    options = {"pixel_factor": config["pixel_factor"]} if is_told else {}
    vae = load_autoencoder(init, torch.float32, **options)
    if not isinstance(vae, AutoencoderKLLeanVAE):
        raise ValueError(
            f"`init` must be an AutoencoderKLLeanVAE, the only one that is trained here, got {init!r}, an "
            f"{type(vae).__name__}."
        )
    for key, value in config.items():
        if json.dumps(vae.config[key]) != json.dumps(value):
            raise ValueError(f"`model.{key}` must agree with `init`, which has {vae.config[key]!r}, got {value!r}.")
    return vae


def freeze_encoder(vae: AutoencoderKLLeanVAE) -> None:
    """Freeze the weights that determine the latents, so that models trained on these latents stay valid."""
    for name, parameter in vae.named_parameters():
        if name.startswith(ENCODER_PARAMETERS):
            parameter.requires_grad_(False)


@dataclass
class LoraRecipe:
    """Low-rank adapters (arXiv 2106.09685)."""

    rank: int = 16
    alpha: float = 16.0  # the adapters' output is scaled by `alpha / rank`
    targets: list[str] = field(default_factory=lambda: ["up_proj", "down_proj"])  # ends of the layers' names


@dataclass
class TransformerLoraRecipe(LoraRecipe):
    """Low-rank adapters of a transformer's attention."""

    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])


def add_lora(vae: AutoencoderKLLeanVAE, recipe: LoraRecipe) -> Any:
    """Freeze a model and add low-rank adapters to its linear layers, in place.

    Args:
        vae: The model; it still works by itself, adapters included.
        recipe: The adapters.

    Returns:
        The `peft.PeftModel` around `vae`, which saves and merges the adapters.
    """
    with _saying_what_fits(recipe):
        from peft import get_peft_model

        model: Any = vae  # peft asks for a model of transformers, and takes any module
        return get_peft_model(model, _lora_config(recipe))


def add_transformer_lora(transformer: Any, recipe: LoraRecipe) -> None:
    """Freeze a transformer and add low-rank adapters to it, in place; `generation.lora.save_lora` saves them.

    Args:
        transformer: The transformer, a model of diffusers with `add_adapter`.
        recipe: The adapters.
    """
    with _saying_what_fits(recipe):
        transformer.add_adapter(_lora_config(recipe))


def _lora_config(recipe: LoraRecipe) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=recipe.targets)  # pyright: ignore[reportArgumentType]


@contextmanager
def _saying_what_fits(recipe: LoraRecipe) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError('`tune: lora` needs peft: pip install "diffusers-leanvae[lora]"') from error
    except ValueError as error:
        raise ValueError(f"`lora` must fit the model, got {recipe.targets} of rank {recipe.rank}: {error}") from error

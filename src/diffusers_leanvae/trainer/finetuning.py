"""Start training from any autoencoder of this package, and choose which of its weights are trained."""

import inspect
import json
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import bundled
from ..checks import check_choice
from ..conversion.checkpoints import is_checkpoint_reference
from ..loading import check_source, load_autoencoder
from ..models.autoencoder_kl_ivvae import AutoencoderKLIVVAE
from ..models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from ..models.autoencoder_kl_wfvae import AutoencoderKLWFVAE
from ..models.transformer_latte import latte_variant
from ..models.video_autoencoder import VideoAutoencoder
from .recipe import check_counts, check_positives


# What `model.type` of a recipe may be.
TYPES: dict[str, type[VideoAutoencoder]] = {
    "leanvae": AutoencoderKLLeanVAE,
    "wfvae": AutoencoderKLWFVAE,
    "ivvae": AutoencoderKLIVVAE,
}
NEW_MODELS = ("spec", "pca", "image")  # starting points, as `init` names them, of models that are made by their config

# What makes the latents: with these frozen, they stay those of the model that training started from. The sensing
# matrix `phi` of LeanVAE also takes part in decoding, but it is what the latents are measured with. Of WF-VAE and
# IV-VAE it is the encoder.
ENCODER_PARAMETERS = ("encoder.", "logvar_proj.", "bottleneck.phi", "bottleneck.compress.")


def type_of(init: str, config: dict[str, Any]) -> type[VideoAutoencoder] | None:
    """Return the class that a recipe asks for; `None` where only the model that is loaded can tell.

    Args:
        init: As of [`load_vae`].
        config: As of [`load_vae`].
    """
    kind = config.get("type", "leanvae" if init in NEW_MODELS else None)
    if kind is None:
        return None
    check_choice("model.type", kind, tuple(TYPES))
    return TYPES[kind]


def load_vae(init: str, config: dict[str, Any]) -> VideoAutoencoder:
    """Make or load the model that training starts from, in float32.

    Args:
        init: `"spec"`, `"pca"` or `"image"`: a new model by `config`; the name of a bundled model; a folder of
            `save_pretrained`; an original checkpoint file; a Hub repository `user/name`; or a Hub file
            `user/name/file.ckpt`.
        config: Arguments of the model, and `type`, one of [`TYPES`]: by default a new model is a LeanVAE, and a loaded
            one may be of any type. Arguments of a loaded model only such as it has.
    """
    expected = type_of(init, config)
    config = {key: value for key, value in config.items() if key != "type"}
    if expected is not None:
        check_keys(expected, config)  # before anything is loaded
        if init in NEW_MODELS:
            return expected(**config)
    check_source("init", init, (*NEW_MODELS, *bundled.MODELS))
    # Only the user can know whether an original file is of a Wan-aligned model: its pixel range is not stored.
    is_told = is_checkpoint_reference(init) and "pixel_factor" in config
    options = {"pixel_factor": config["pixel_factor"]} if is_told else {}
    vae = load_autoencoder(init, torch.float32, **options)
    if expected is not None and not isinstance(vae, expected):
        raise ValueError(
            f"`init` must be an {expected.__name__} by `model.type`, got {init!r}, an {type(vae).__name__}."
        )
    check_keys(type(vae), config)
    check_agreement(vae, config)
    return vae


def check_keys(model_class: type, config: dict[str, Any]) -> None:
    """Refuse a section `model` with what is no argument of the class."""
    legal = [name for name in inspect.signature(model_class.__init__).parameters if name != "self"]
    for key in config:
        if key not in legal:
            raise ValueError(f"Unknown recipe key `model.{key}`: legal keys here are {', '.join(legal)}.")


def check_agreement(model: Any, config: dict[str, Any]) -> None:
    """Refuse a section `model` that says something else than the model that `init` has given."""
    for key, value in config.items():
        if json.dumps(model.config[key]) != json.dumps(value):
            raise ValueError(f"`model.{key}` must agree with `init`, which has {model.config[key]!r}, got {value!r}.")


def check_variant(variant: str, given: Container[str], config: Mapping[str, Any]) -> None:
    """Refuse a `variant` that the transformer of `init` is not, by its config.

    Args:
        variant: A key of the named sizes.
        given: What the section `model` says, which comes before the variant, as of a new model.
        config: Of the transformer; its layers are counted as of a `LeanVAELatteTransformer3DModel`.
    """
    for name, value in latte_variant(variant).items():
        if name not in given and config[name] != value:
            raise ValueError(
                f"`variant` must be null or that of `init`, which has `{name}` {config[name]}, got {variant!r} with "
                f"{value}."
            )


def freeze_encoder(vae: VideoAutoencoder) -> None:
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

    def __post_init__(self) -> None:
        check_counts(self, "rank", prefix="lora.")
        check_positives(self, "alpha", prefix="lora.")


@dataclass
class TransformerLoraRecipe(LoraRecipe):
    """Low-rank adapters of a transformer's attention."""

    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])


def add_lora(vae: VideoAutoencoder, recipe: LoraRecipe) -> Any:
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

"""Conditioning on texts in training: the way from captions to hidden states, and the transformer that takes them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, LatteTransformer3DModel
from diffusers.utils import logging
from torch import nn

from .. import bundled
from ..checks import parse_dtype, reason_of
from ..data.latent_samples import LatentBatch, LatentData
from ..data.text_cache import check_text_encoder, differing_setting
from ..description import public_config
from ..text_encoders import (
    TextEmbeddings,
    TextEncoder,
    encode_tokens,
    freeze_unused,
    load_text_encoder,
    make_text_encoder,
    tokenize,
)
from .recipe import check_counts, check_shares


logger = logging.get_logger(__name__)


@dataclass
class TextRecipe:
    """Conditioning on texts, by diffusers' `LatteTransformer3DModel`."""

    # A text encoder of transformers or a pipeline's, folder or Hub repository | "new": a small T5 that knows the words
    # of the captions | null: that of the pipeline in `init`, or else of the cached embeddings.
    encoder: str | None = None
    config: dict[str, Any] = field(default_factory=dict)  # of "new": arguments of `transformers.T5Config`
    max_length: int | None = None  # tokens; null: 120, or as many as the tokenizer takes ("new": 48)
    # Of a frozen encoder; null: that of the cached embeddings, or else float32.
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    train_text_encoder: bool = False
    caption_dropout: float = 0.1  # share of samples that get the empty text

    def __post_init__(self) -> None:
        check_shares(self, "caption_dropout", prefix="text.")
        check_counts(self, "max_length", prefix="text.")
        if self.encoder == "new" and not self.train_text_encoder:
            raise ValueError("`text.train_text_encoder` must be true with `text.encoder: new`, got false.")
        if self.encoder != "new" and self.config:
            raise ValueError(f"`text.config` must be empty but for `text.encoder: new`, got {self.config}.")
        if self.train_text_encoder and self.dtype not in (None, "float32"):
            raise ValueError(
                f"`text.dtype` must be float32 or null with `text.train_text_encoder`, got {self.dtype}: "
                "`mixed_precision` sets what it computes in."
            )


@dataclass
class Captions:
    """The way from captions to what a step of training takes.

    Args:
        encoder: Tokenizer and model.
        device: Where training happens. An encoder whose hidden states are cached need not be there.
        is_trained: Whether the model is trained along: then a step takes tokens, and else hidden states.
        null: Cached hidden states of the empty text, where those of captions come with the latents.
        settings: The text encoder of these, `LatentFolder.text_settings`.
    """

    encoder: TextEncoder
    device: torch.device
    is_trained: bool
    null: TextEmbeddings | None = None
    settings: dict[str, Any] | None = None
    _has_warned: bool = field(default=False, init=False)

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.encoder.width

    @property
    def trained_model(self) -> nn.Module | None:
        """The model, if it is trained along."""
        return self.encoder.model if self.is_trained else None

    def check(self, data: LatentData) -> None:
        """Refuse held-out data whose cached hidden states are of another encoder than those of the training data."""
        settings = getattr(data.items, "text_settings", None)
        if self.settings is None or settings is None:
            return
        key = differing_setting(self.settings, settings)
        if key is not None:
            raise ValueError(
                f"`validation.data` must hold embeddings of the text encoder of `data`, whose `{key}` is "
                f"{self.settings[key]!r}, got {settings[key]!r}."
            )

    def prepare(self, batch: LatentBatch, drop: torch.Tensor | None = None) -> TextEmbeddings:
        """Turn the captions of a batch into tokens, or take their cached hidden states; on the CPU.

        Args:
            batch: The batch.
            drop: Of which samples the caption is dropped, `(B,)`.
        """
        if self.null is not None:
            text = batch.text
            if text is None:
                raise ValueError("`validation.data` must hold text embeddings as `data` does, got latents without.")
            if drop is None or not drop.any():
                return text
            null = [part.expand(len(drop), *part.shape[1:]) for part in self.null]
            return TextEmbeddings(
                torch.where(drop[:, None, None], null[0], text.embeds), torch.where(drop[:, None], null[1], text.mask)
            )
        captions = list(batch.captions or ())
        if drop is not None:
            captions = ["" if is_dropped else text for text, is_dropped in zip(captions, drop.tolist(), strict=True)]
        return TextEmbeddings(*tokenize(self.encoder.tokenizer, captions, self.encoder.max_length, self._warn_once))

    def _warn_once(self, message: str) -> None:
        if not self._has_warned:  # and not in every step
            logger.warning(message)
            self._has_warned = True

    @torch.no_grad()
    def place(self, text: TextEmbeddings) -> TextEmbeddings:
        """Bring what `prepare` gave to the device, as the training module takes it."""
        text = TextEmbeddings(*(part.to(self.device, non_blocking=True) for part in text))
        if self.is_trained:
            return text
        embeds = text.embeds if self.null is not None else encode_tokens(self.encoder.model, *text)
        return text._replace(embeds=embeds.float())

    @torch.no_grad()
    def encode(self, batch: LatentBatch, model: nn.Module | None = None) -> TextEmbeddings:
        """Return the hidden states of a batch's captions, by another `model` where the own one is trained."""
        text = self.place(self.prepare(batch))
        if not self.is_trained:
            return text
        return text._replace(embeds=encode_tokens(model or self.encoder.model, *text))

    def sample_arguments(self, prompts: list[str]) -> dict[str, Any]:
        """Return the arguments of a pipeline for texts; of a frozen encoder their hidden states, encoded once."""
        if self.is_trained:
            return {"prompt": prompts}
        text, null = self.encoder(prompts), self.encoder([""])
        return {
            "prompt_embeds": text.embeds.to(self.device),
            "prompt_attention_mask": text.mask.to(self.device),
            "negative_prompt_embeds": null.embeds.to(self.device).expand_as(text.embeds),
            "negative_prompt_attention_mask": null.mask.to(self.device).expand_as(text.mask),
        }

    def parts(self, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Return tokenizer and text encoder of a pipeline, with another `model` where the own one is trained."""
        return self.encoder.tokenizer, model if self.is_trained else self.encoder.model


def open_captions(recipe: TextRecipe, init: str | None, data: LatentData, device: torch.device) -> Captions:
    """Load or make the text encoder of a recipe.

    Args:
        recipe: The section `text`.
        init: The pipeline that training starts from, or `None`.
        data: The training data.
        device: Where the encoder goes.

    Raises:
        ValueError: If there is no encoder, or it does not fit the cached embeddings.
    """
    null, settings = getattr(data.items, "null_text", None), getattr(data.items, "text_settings", None)
    cached = None if settings is None else settings["source"]
    # The pipeline's own comes first: it is what its transformer knows, and cached embeddings must be of it.
    own = init if init is not None and _has_text_encoder(init) else None
    source, max_length = recipe.encoder or own or cached or init, recipe.max_length
    if source is None:
        raise ValueError("`text.encoder` must be given where neither the latents nor `init` tell it, got null.")
    if source == "new":
        encoder = make_text_encoder(_all_captions(data), recipe.config, max_length or 48)
        encoder.model.to(device)
    else:
        if settings is not None and max_length is None and not recipe.train_text_encoder:
            max_length = settings["max_length"]
        dtype = parse_dtype("text.dtype", recipe.dtype or (settings or {}).get("dtype", "float32"))
        try:
            is_used = null is None or recipe.train_text_encoder
            encoder = load_text_encoder(_pipeline_folder(source), dtype, device if is_used else "cpu", max_length)
        except ValueError as error:
            raise ValueError(f"`text.encoder` cannot be loaded: {reason_of(error)}.") from error
    # A pipeline cuts texts where its tokenizer says, and so as in training.
    encoder.tokenizer.model_max_length = encoder.max_length
    encoder.model.requires_grad_(recipe.train_text_encoder)
    # Dropout stays off even where the encoder is trained: it would come from the process and not from the sample.
    encoder.model.eval()
    if recipe.train_text_encoder:
        freeze_unused(encoder.model)
        for layer in encoder.model.modules():
            if isinstance(layer, nn.Linear):  # which compute alike; Muon watches the inputs of those that train
                layer.train()
        return Captions(encoder, device, is_trained=True)
    if settings is not None:
        check_text_encoder(encoder, settings)
    return Captions(encoder, device, is_trained=False, null=null, settings=settings)


def _pipeline_folder(source: str) -> str:
    """Replace the name of a bundled pipeline by its folder, unless there is a folder of that name."""
    return str(bundled.pipeline_path(source)) if bundled.is_bundled(source, bundled.PIPELINES) else source


def _has_text_encoder(source: str) -> bool:
    """Tell whether a transformer or pipeline, folder or Hub repository, comes with a text encoder."""
    try:
        index: Any = DiffusionPipeline.load_config(_pipeline_folder(source))
    except (OSError, ValueError):
        return False
    return index.get("text_encoder", [None])[0] is not None


def _all_captions(data: LatentData) -> Iterator[str]:
    if data.has_own_order:
        raise ValueError(
            "`text.encoder` must not be 'new' for `data.kind: videos`, whose captions are not all known at the start."
        )
    return (caption for number in range(len(data.items)) for caption in data.items.captions(number))


# --- The transformer -------------------------------------------------------------------------------------------------

# What Latte-1 has, but for its size.
_LATTE: dict[str, Any] = {
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "num_embeds_ada_norm": 1000,
}


def build_text_transformer(
    config: dict[str, Any],
    overrides: dict[str, Any],
    caption_channels: int,
    init: str | None,
    may_start_anew: bool = True,
) -> LatteTransformer3DModel:
    """Build diffusers' transformer of texts, new or from another one's weights.

    Args:
        config: Arguments of a `LeanVAELatteTransformer3DModel`; its blocks are half as many pairs.
        overrides: Arguments of `LatteTransformer3DModel`, over all others.
        caption_channels: Width of the text encoder's hidden states.
        init: A transformer or a pipeline of diffusers, folder or Hub repository. Its latents may be others: layers
            that do not fit, which are the first and the last, start anew.
        may_start_anew: Whether they may: they must not where they are not trained.
    """
    shape = {name: config[name] for name in ("in_channels", "out_channels", "sample_size")}
    shape |= {"video_length": config["num_latent_frames"], "caption_channels": caption_channels}
    if init is not None:
        source = _load_latte(init)
        model = _new_latte(public_config(source.config) | shape | overrides)
        _initialize(model)
        _take_weights(model, source, init, may_start_anew)
        return model
    sizes = {name: config[name] for name in ("num_attention_heads", "attention_head_dim") if name in config}
    if "num_layers" in config:
        sizes["num_layers"] = config["num_layers"] // 2
    if "patch_size" in config:
        sizes["patch_size"] = config["patch_size"]
    model = _new_latte(_LATTE | sizes | shape | overrides)
    _initialize(model)
    return model


def _new_latte(config: dict[str, Any]) -> LatteTransformer3DModel:
    width = config.get("num_attention_heads", 16) * config.get("attention_head_dim", 88)
    try:
        return LatteTransformer3DModel(**({"cross_attention_dim": width} | config))
    except TypeError as error:
        raise ValueError(f"`model` must hold arguments of LatteTransformer3DModel, got {config}: {error}.") from error


def _load_latte(init: str) -> LatteTransformer3DModel:
    folder = _pipeline_folder(init)
    options: dict[str, Any] = {"subfolder": "transformer"}
    try:
        try:
            config: Any = LatteTransformer3DModel.load_config(folder, **options)
        except OSError:
            config, options = LatteTransformer3DModel.load_config(folder), {}
        if config.get("_class_name") != "LatteTransformer3DModel":
            raise ValueError(f"it is a {config.get('_class_name')}")
        return LatteTransformer3DModel.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`init` must be a LatteTransformer3DModel or a pipeline with one, folder or Hub repository, got "
            f"{init!r}: {reason_of(error)}."
        ) from error


def _take_weights(
    model: LatteTransformer3DModel, source: LatteTransformer3DModel, init: str, may_start_anew: bool
) -> None:
    """Copy the weights that fit; of the others at most those of the first and the last layer may differ."""
    weights, wanted = source.state_dict(), model.state_dict()
    other = [name for name in wanted if name not in weights or weights[name].shape != wanted[name].shape]
    free = ("pos_embed.proj.", "proj_out.", "caption_projection.linear_1.") if may_start_anew else ()
    for name in other:
        if not name.startswith(free):
            came = tuple(weights[name].shape) if name in weights else "none"
            raise ValueError(
                f"`init` must have `{name}` of shape {tuple(wanted[name].shape)} for this recipe, got {came} in "
                f"{init!r}."
            )
    model.load_state_dict({name: value for name, value in weights.items() if name not in other}, strict=False)


def _initialize(model: Any) -> None:
    """Start as Latte and PixArt-alpha do: Xavier-uniform maps, and zeros where a branch or the model ends."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patches = model.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
    nn.init.zeros_(patches.bias)
    embedder, captions = model.adaln_single.emb.timestep_embedder, model.caption_projection
    ends = [block.attn2.to_out[0] for block in model.transformer_blocks]
    for layer in (*embedder.children(), model.adaln_single.linear, *captions.children()):
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
    for layer in (*ends, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)

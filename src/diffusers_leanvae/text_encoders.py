"""Text encoders of transformers: load one, make a small one from captions, encode texts as the pipeline does.

A caption becomes hidden states by `tokenize` and `encode_tokens` alone, so that it means the same in training, in a
cache of embeddings and in the pipeline.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils import logging
from safetensors import SafetensorError

from .checks import check_integer, reason_of


logger = logging.get_logger(__name__)

# Tokens that Latte-1 and PixArt-alpha were trained with.
MAX_SEQUENCE_LENGTH = 120


class TextEmbeddings(NamedTuple):
    """Hidden states `(n, length, width)`, and a mask `(n, length)`: 1 for tokens, 0 for padding."""

    embeds: torch.Tensor
    mask: torch.Tensor


@dataclass
class TextEncoder:
    """A tokenizer and a model of transformers.

    Args:
        tokenizer: The tokenizer.
        model: A model whose first output are hidden states `(n, length, width)`.
        max_length: Tokens that texts are padded or cut to.
    """

    tokenizer: Any
    model: Any
    max_length: int

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return hidden_width(self.model)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> TextEmbeddings:
        """Encode texts on the model's device and in its dtype, padded to `max_length`."""
        ids, mask = tokenize(self.tokenizer, texts, self.max_length)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        return TextEmbeddings(encode_tokens(self.model, ids, mask), mask)


def check_length(name: str, length: int | None, tokenizer: Any) -> int:
    """Return a number of tokens that a tokenizer can give; by default 120, or as many as it takes.

    Raises:
        ValueError: If it is more than that, or none, or no integer.
    """
    if length is None:
        return min(MAX_SEQUENCE_LENGTH, tokenizer.model_max_length)
    check_integer(name, length)
    if not 1 <= length <= tokenizer.model_max_length:
        raise ValueError(f"`{name}` must be 1 to the tokenizer's {tokenizer.model_max_length}, got {length}.")
    return length


def tokenize(
    tokenizer: Any, texts: Sequence[str], length: int, warn: Callable[[str], Any] = logger.warning
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn texts into ids and a mask, both int64 `(n, length)`; longer texts are cut, with a warning.

    Padding is on the right, whatever the tokenizer prefers: a model that counts positions from the first place would
    see other positions in another batch. A text without any token, as `""` is for some tokenizers, gets one of
    padding, for there must be something to attend to.
    """
    texts = list(texts)
    inputs = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, padding_side="right", return_tensors="pt"
    )
    mask = inputs.attention_mask.clone()
    # Only a text that leaves no place for padding can have been longer.
    full = [text for text, is_full in zip(texts, mask.all(dim=1).tolist(), strict=True) if is_full]
    longest = max(map(len, tokenizer(full, verbose=False).input_ids)) if full else 0
    if longest > length:
        warn(f"A text of {longest} tokens was cut to {length}, the `max_sequence_length`.")
    mask[:, 0] = 1
    return inputs.input_ids, mask


def encode_tokens(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the hidden states `(n, length, width)` of tokens, with their gradients."""
    return model(input_ids=ids, attention_mask=mask)[0]


def text_arguments(text: TextEmbeddings, num_latent_frames: int) -> dict[str, torch.Tensor]:
    """Return the arguments of `LatteTransformer3DModel` for texts and videos of so many latent frames.

    The transformer takes a mask only as a bias of its spatial blocks, whose batch is one of frames. With it a text
    means the same in every batch; multiplying embeddings by the mask would leave keys of padding.
    """
    bias = (1 - text.mask.to(text.embeds.dtype)) * -10000.0
    bias = bias.repeat_interleave(num_latent_frames, dim=0).unsqueeze(1)  # (B * F, 1, length)
    return {"encoder_hidden_states": text.embeds, "encoder_attention_mask": bias}


def freeze_unused(model: Any) -> None:
    """Freeze the weights that hidden states do not depend on, such as a pooler's.

    They would never get a gradient, which training by several processes takes for a fault.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with torch.enable_grad():
        hidden = encode_tokens(model, ids, torch.ones_like(ids))
        gradients = torch.autograd.grad(hidden.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def hidden_width(model: Any) -> int:
    """Return the width of a model's hidden states."""
    return model.config.get_text_config().hidden_size


def load_text_encoder(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_length: int | None = None,
) -> TextEncoder:
    """Load a tokenizer and a text encoder of transformers.

    Args:
        source: A folder or a Hub id: of T5 and its kin, of which the encoder is taken; of CLIP, of which the text
            model is; of any other encoder; or of a decoder such as Gemma or Qwen, of which the hidden states are. Or
            a pipeline with folders `tokenizer` and `text_encoder`.
        dtype: Dtype of the weights.
        device: Device of the model.
        max_length: Tokens that texts are padded or cut to: 120 by default, or as many as the tokenizer takes.

    Raises:
        ValueError: If there is none.
        ImportError: If transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError('Texts need transformers: pip install "diffusers-leanvae[text]".') from error
    try:
        config, in_folder = _read_config(transformers, source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **in_folder("tokenizer"))
        model = _model_class(transformers, config).from_pretrained(source, dtype=dtype, **in_folder("text_encoder"))
        if tokenizer.pad_token is None:  # any will do, for the mask hides it
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise ValueError("its tokenizer has no token to pad with")
        _check_model(model, tokenizer)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"`source` must be the folder or Hub id of a text encoder of transformers, got {str(source)!r}: "
            f"{reason_of(error)}."
        ) from error
    # Some tokenizers do not tell how many tokens their model has positions for.
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return TextEncoder(tokenizer, model.to(device).eval(), check_length("max_length", max_length, tokenizer))


def _check_model(model: Any, tokenizer: Any) -> None:
    """Refuse a model that does not turn tokens alone into hidden states, such as one that wants an image with them."""
    ids, mask = tokenize(tokenizer, [""], 1)
    try:
        with torch.no_grad():
            shape = tuple(encode_tokens(model, ids, mask).shape)
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"a {type(model).__name__} gives no hidden states of texts: {reason_of(error)}") from error
    if shape != (1, 1, hidden_width(model)):
        raise ValueError(f"a {type(model).__name__} gives no hidden states of texts")


def _read_config(transformers: Any, source: str | Path) -> tuple[Any, Callable[[str], dict[str, str]]]:
    """Read the config of a text encoder; with it, the arguments that find the parts of a pipeline."""
    try:
        return transformers.AutoConfig.from_pretrained(source), lambda part: {}
    except (OSError, ValueError) as error:  # of a local folder without one: "Unrecognized model"
        try:
            config = transformers.AutoConfig.from_pretrained(source, subfolder="text_encoder")
        except (OSError, ValueError):
            raise error from None
        return config, lambda part: {"subfolder": part}


def _model_class(transformers: Any, config: Any) -> Any:
    if config.model_type == "clip":  # both towers; a text model's own config is a `clip_text_model`
        return transformers.CLIPTextModel
    if type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        return transformers.AutoModelForTextEncoding
    if config.is_encoder_decoder:
        raise ValueError(f"a {config.model_type} has no encoder of text that transformers loads by itself")
    return transformers.AutoModel


def make_text_encoder(
    captions: Iterable[str], config: dict[str, Any] | None = None, max_length: int = 48
) -> TextEncoder:
    """Make a small T5 encoder with random weights and a vocabulary of the words of captions.

    Words are told apart by spaces and punctuation, whatever their case; a word that no caption has is `<unk>`.

    Args:
        captions: All that the vocabulary is made from.
        config: Arguments of `transformers.T5Config`, over a small default of 0.8 M parameters.
        max_length: Tokens of a text, with the one that marks its end.

    Raises:
        ValueError: If `config` holds what a `T5Config` does not know, or `vocab_size`, which the captions give.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )
    known = T5Config().to_dict().keys() - {"vocab_size"}
    for name in config or {}:
        if name not in known:  # transformers would keep it, and do nothing with it
            raise ValueError(f"`config` must hold arguments of T5Config other than `vocab_size`, got {name!r}.")
    default = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
    default["feed_forward_proj"] = "gated-gelu"
    model = T5EncoderModel(T5Config(vocab_size=len(wrapped), **(default | (config or {}))))
    return TextEncoder(wrapped, model, max_length)

"""Text embeddings on disk, beside the latents of the clips that the texts describe.

As with latents, each shard appears when it is complete and is a function of the settings and its captions alone: a
killed run resumes where it stopped, and any number of processes makes the same files. `text_settings.json` says what
they were made with; an empty `text_index.json`, written last, says that all is there.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checks import parse_dtype, reason_of
from ..text_encoders import TextEncoder, load_text_encoder
from .latent_shards import LatentFolder, open_shard
from .storage import AnyPath, begin_settings, fetched, list_names, write_json, write_whole
from .text_shards import (
    NULL_TEXT,
    TEXT_INDEX,
    TEXT_SETTINGS,
    list_texts,
    serialize_texts,
    text_shard_name,
)


if TYPE_CHECKING:
    from accelerate import Accelerator

_NUM_AT_ONCE = 32  # texts, of which rounding can depend on the number


def open_text_encoder(
    source: str | Path, max_length: int | None = None, dtype: str = "float32"
) -> tuple[TextEncoder, dict[str, Any]]:
    """Load a text encoder on the CPU, with its settings: where it came from, and checksums that tell it from others.

    Args:
        source: What `load_text_encoder` takes.
        max_length: Tokens that texts are cut to; `None` for the default.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        ValueError: If an argument is not legal.
    """
    torch_dtype = parse_dtype("text_dtype", dtype)
    try:
        encoder = load_text_encoder(source, torch_dtype, "cpu", max_length)
    except ValueError as error:
        raise ValueError(f"`text_encoder` cannot be loaded: {reason_of(error)}.") from error
    return encoder, {"source": str(source), "num_at_once": _NUM_AT_ONCE, **_describe(encoder)}


def check_text_encoder(encoder: TextEncoder, settings: dict[str, Any]) -> None:
    """Refuse a text encoder that is not the one of stored embeddings.

    Args:
        encoder: The text encoder.
        settings: `LatentFolder.text_settings`.

    Raises:
        ValueError: If it is another one, see `differing_setting`.
    """
    found = _describe(encoder, settings["dtype"])
    key = differing_setting(found, settings)
    if key is not None:
        raise ValueError(
            f"`text.encoder` must be the one of the stored embeddings, whose `{key}` is {settings[key]!r}, got "
            f"{found[key]!r}."
        )


def differing_setting(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Return the first key by which the settings of two text encoders tell these apart; `None` if none does.

    Weights are compared where their dtype is the same.
    """
    keys = ["max_length", "width", "class", "tokenizer_sha256"]
    if one["dtype"] == other["dtype"]:
        keys.append("weights_sha256")
    return next((key for key in keys if one[key] != other[key]), None)


def _describe(encoder: TextEncoder, dtype: str | None = None) -> dict[str, Any]:
    """Describe a text encoder; its weights, which take long, not if they are of another dtype than a given one."""
    found = str(encoder.model.dtype).removeprefix("torch.")
    return {
        "max_length": encoder.max_length,
        "dtype": found,
        "width": encoder.width,
        "class": type(encoder.model).__name__,
        "weights_sha256": checksum_of_weights(encoder.model) if dtype in (None, found) else None,
        "tokenizer_sha256": _checksum_of_tokenizer(encoder.tokenizer),
    }


def begin_texts(folder: AnyPath, settings: dict[str, Any]) -> None:
    """Write the settings of new embeddings into a folder, or refuse others than those they were begun with.

    Settings that nothing was encoded with yet are replaced.
    """
    _check_settings(folder, settings, lambda: not any(map(_is_of_texts, list_names(folder))))


def _is_of_texts(name: str) -> bool:
    return name.startswith("texts-") or name in (NULL_TEXT, TEXT_INDEX)


def _check_settings(folder: AnyPath, settings: dict[str, Any], discard: Callable[[], bool] = lambda: False) -> None:
    # The same encoder may lie elsewhere.
    difference = begin_settings(folder / TEXT_SETTINGS, settings, ["source"], discard=discard)
    if difference is not None:
        raise ValueError(
            f"`text_encoder` must be the one that the embeddings in {str(folder)!r} were begun with, got another: "
            f"{difference}."
        )


def encode_captions(
    latents: LatentFolder,
    encoder: TextEncoder,
    settings: dict[str, Any],
    accelerator: "Accelerator",
    progress: Callable[[int, int], Any] | None = None,
) -> None:
    """Encode the captions of a finished folder of latents, alone or together with other processes.

    Args:
        latents: The folder, where `begin_texts` was called.
        encoder: The text encoder, on its device.
        settings: Of the text encoder, as `begin_texts` got them.
        accelerator: The processes.
        progress: Called with the number of clips of each finished shard, and of all that this process does.

    Raises:
        ValueError: If no item has a caption, or another run has begun embeddings of another text encoder meanwhile.
    """
    if latents.index.get("num_captions") == 0:
        raise ValueError(f"`text_encoder` must be None where no clip has a caption, as in {str(latents.path)!r}.")
    folder = latents.path
    own = latents.index["shards"][accelerator.process_index :: accelerator.num_processes]
    total = sum(shard["num_items"] for shard in own)
    for shard in own:
        path = folder / text_shard_name(shard["file_name"])
        if not path.exists():
            with fetched(folder / shard["file_name"]) as local:
                texts = list_texts(open_shard(local).rows)
            content = serialize_texts(_encode(encoder, texts), encoder.width, encoder.model.dtype)
            _check_settings(folder, settings)
            write_whole(path, content)
        if progress is not None:
            progress(shard["num_items"], total)
    if accelerator.is_main_process and not (folder / NULL_TEXT).exists():
        write_whole(folder / NULL_TEXT, serialize_texts(_encode(encoder, [""]), encoder.width, encoder.model.dtype))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not (folder / TEXT_INDEX).exists():
        write_json(folder / TEXT_INDEX, {})
    accelerator.wait_for_everyone()


def _encode(encoder: TextEncoder, texts: Sequence[str]) -> list[torch.Tensor]:
    """Return the hidden states `(num_tokens, width)` of each text, on the CPU."""
    states = []
    for start in range(0, len(texts), _NUM_AT_ONCE):
        embeds, mask = encoder(texts[start : start + _NUM_AT_ONCE])
        lengths = mask.sum(1).tolist()
        for hidden, kept, length in zip(embeds.cpu(), mask.cpu(), lengths, strict=True):
            assert kept[:length].all()  # padding is on the right
            if not hidden[:length].isfinite().all():
                raise ValueError(
                    f"`text_dtype` must hold what the text encoder computes, got {embeds.dtype}, in which some is not "
                    "finite."
                )
            states.append(hidden[:length])
    return states


def checksum_of_weights(model: nn.Module) -> str:
    """Return a SHA-256 of the names and bytes of a model's weights, in their own dtype."""
    checksum = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        checksum.update(name.encode())
        checksum.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return checksum.hexdigest()


def _checksum_of_tokenizer(tokenizer: Any) -> str:
    described: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    if tokenizer.is_fast:
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        described = {key: value for key, value in described.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

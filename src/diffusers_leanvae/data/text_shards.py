"""Shards of text embeddings, which lie beside those of latents: hidden states of every caption, without padding.

Beside `latents-00003` lies `texts-00003.safetensors`, which holds each text of its captions once. The empty text,
which stands in for captions in classifier-free guidance, is in a file of its own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save


TEXT_SETTINGS, TEXT_INDEX, NULL_TEXT = "text_settings.json", "text_index.json", "text_null.safetensors"


def text_shard_name(latents_name: str) -> str:
    """Return the file name of the texts that belong to a shard of latents."""
    return f"texts-{Path(latents_name).stem.removeprefix('latents-')}.safetensors"


def list_texts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the captions of a shard's rows, each once, in the order of their embeddings."""
    return list(dict.fromkeys(text for row in rows for text in row["captions"]))


class TextShard:
    """Hidden states of texts, which stay in the file until they are read.

    Args:
        path: The file.

    Raises:
        ValueError: If it is not sound.
    """

    def __init__(self, path: Path) -> None:
        try:
            file = safe_open(path, "pt")
            self.embeds, self.ends = file.get_slice("embeds"), file.get_tensor("ends").tolist()
        except (OSError, SafetensorError) as error:
            raise ValueError(f"`path` must hold sound shards, got {str(path)!r}: {error}.") from error

    def read(self, number: int) -> torch.Tensor:
        """Return the hidden states of a text, `(num_tokens, width)`."""
        return self.embeds[self.ends[number - 1] if number else 0 : self.ends[number]]


def serialize_texts(texts: Sequence[torch.Tensor], width: int, dtype: torch.dtype) -> bytes:
    """Turn hidden states `(num_tokens, width)` of texts into the content of a file."""
    ends = torch.tensor([len(text) for text in texts], dtype=torch.int64).cumsum(0)
    return save({"embeds": torch.cat([torch.empty(0, width, dtype=dtype), *texts]), "ends": ends})

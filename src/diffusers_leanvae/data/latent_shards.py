"""Shards of latents on disk, in two formats, and [`LatentFolder`], which reads a folder of them."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import Dataset

from ..checks import reason_of
from .storage import as_json, fetched, load_json, local_copy, open_path
from .text_shards import NULL_TEXT, TEXT_INDEX, TEXT_SETTINGS, TextShard, list_texts, text_shard_name


if TYPE_CHECKING:
    from ..text_encoders import TextEmbeddings


FileFormat = Literal["safetensors", "webdataset"]
SHARD_SUFFIXES: dict[str, str] = {"safetensors": ".safetensors", "webdataset": ".tar"}
CACHE_VERSION = 2  # from 2 on, items have any number of captions


class LatentItem(NamedTuple):
    """`latents` are float32 posterior means, not normalised, `(C, F, h, w)`; `captions` may be none."""

    latents: torch.Tensor
    class_label: int | None
    captions: tuple[str, ...]


class LatentFolder(Dataset[LatentItem]):
    """Latents that `encode_dataset` wrote, read through memory maps: opening is free, an item costs its own bytes.

    Shards at a URL are copied to this machine when an item of theirs is asked for, see `storage.local_copy`.

    Args:
        path: A folder, or a URL such as `"s3://bucket/latents"`, see `storage.open_path`.

    Attributes:
        class_names: Names of the classes, or `None`.
        statistics: `mean` and `std`, a number per channel, and `num_items`.
        settings: The settings it was built with, and the config and checksum of the autoencoder.
        index: `num_items`, `num_skipped` and as `skipped` the names of those clips, `num_captions`, `shape` and
            `shards`.
        text_settings: Where captions are stored as embeddings: `source`, `max_length` and `dtype` of the text encoder,
            and checksums; else `None`.
        null_text: The embeddings of the empty text, of one sample, padded as those of captions; or `None`.

    Raises:
        ValueError: If the folder holds no finished cache.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = open_path(path)
        try:
            files = [load_json(self.path / f"{name}.json") for name in ("settings", "index", "statistics")]
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`path` must be a finished folder of `leanvae encode-dataset`, got {str(path)!r}: {reason_of(error)}."
            ) from error
        self.settings, self.index, self.statistics = files
        version = self.settings.get("version")
        if version != CACHE_VERSION:
            raise ValueError(
                f"`path` must hold latents of version {CACHE_VERSION}, got version {version} in {str(path)!r}: encode "
                "the data set again."
            )
        try:
            names, counts = self.index["class_names"], [shard["num_items"] for shard in self.index["shards"]]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"`path` must hold a sound index, got {str(self.path / 'index.json')!r}, which is damaged ({error!r})."
            ) from error
        self.class_names: tuple[str, ...] | None = None if names is None else tuple(names)
        self._ends = np.cumsum(counts)
        self._shards: dict[int, Shard] = {}
        self._texts: dict[int, tuple[TextShard, dict[str, int]]] = {}
        texts = map(as_json, files)
        self._key = hashlib.sha256("".join([str(self.path), *texts]).encode()).hexdigest()[:32]  # of local copies
        self._open_texts()

    def __len__(self) -> int:
        return self.index["num_items"]

    def __getitem__(self, index: int) -> LatentItem:
        _, shard, row = self._find(index)
        described = shard.rows[row]
        return LatentItem(shard.latents(row).float(), described["class_label"], tuple(described["captions"]))

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of an item, without its latents."""
        _, shard, row = self._find(index)
        return tuple(shard.rows[row]["captions"])

    def name(self, index: int) -> str:
        """Return the name of an item: its video and the number of its clip."""
        _, shard, row = self._find(index)
        return shard.rows[row]["name"]

    def text(self, index: int, number: int = 0) -> "TextEmbeddings":
        """Return the embeddings of a caption of an item, of one sample, padded with zeros to `max_length`.

        Args:
            index: The item.
            number: Which of its captions.

        Raises:
            ValueError: If the captions are not stored as embeddings.
        """
        if self.text_settings is None:
            raise ValueError(f"`path` must hold text embeddings, got none in {str(self.path)!r}.")
        place, shard, row = self._find(index)
        if place not in self._texts:
            name = text_shard_name(self.index["shards"][place]["file_name"])
            numbers = {text: number for number, text in enumerate(list_texts(shard.rows))}
            self._texts[place] = TextShard(local_copy(self.path / name, self._text_key)), numbers
        texts, numbers = self._texts[place]
        return self._pad(texts.read(numbers[shard.rows[row]["captions"][number]]))

    def _open_texts(self) -> None:
        self.text_settings: dict[str, Any] | None = None
        self.null_text: TextEmbeddings | None = None
        if not (self.path / TEXT_INDEX).exists():
            return
        self.text_settings = load_json(self.path / TEXT_SETTINGS)
        self._text_key = hashlib.sha256((self._key + as_json(self.text_settings)).encode()).hexdigest()[:32]
        with fetched(self.path / NULL_TEXT) as local:
            self.null_text = self._pad(TextShard(local).read(0))

    def _pad(self, hidden: torch.Tensor) -> "TextEmbeddings":
        from ..text_encoders import TextEmbeddings

        assert self.text_settings is not None
        length = self.text_settings["max_length"]
        mask = (torch.arange(length) < len(hidden)).long()
        return TextEmbeddings(F.pad(hidden, (0, 0, 0, length - len(hidden)))[None], mask[None])

    def _find(self, index: int) -> "tuple[int, Shard, int]":
        """Return the number of an item's shard, the shard, and the item's place in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be from 0 to {len(self) - 1}, got {index}.")
        number = int(np.searchsorted(self._ends, index, side="right"))
        if number not in self._shards:
            described = self.index["shards"][number]
            self._shards[number] = open_shard(local_copy(self.path / described["file_name"], self._key))
        return number, self._shards[number], index - int(self._ends[number]) + len(self._shards[number].rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}, "_texts": {}}  # a worker opens the maps again


class Shard(Protocol):
    """Latents of successive clips: `latents` gives one of shape `(C, F, h, w)`."""

    rows: list[dict[str, Any]]  # class_label, captions, name of every item

    def latents(self, row: int) -> torch.Tensor: ...


class _SafetensorsShard:
    def __init__(self, path: Path) -> None:
        self.file = safe_open(path, "pt")
        self.rows = json.loads(self.file.metadata()["items"])
        self.slice = self.file.get_slice("latents")

    def latents(self, row: int) -> torch.Tensor:
        return self.slice[row : row + 1][0]


class _TarShard:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.offsets: list[int] = []
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.name.endswith(".npy"):
                    self.offsets.append(member.offset_data)
                elif member.name.endswith(".json"):
                    content = archive.extractfile(member)
                    assert content is not None
                    self.rows.append(json.load(content))

    def latents(self, row: int) -> torch.Tensor:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[row])
            return torch.from_numpy(np.lib.format.read_array(file))


def open_shard(path: Path) -> Shard:
    """Open a shard of either format; its latents stay in the file until they are read.

    Raises:
        ValueError: If it is not sound.
    """
    try:
        return _TarShard(path) if path.suffix == ".tar" else _SafetensorsShard(path)
    except (OSError, SafetensorError, tarfile.TarError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`path` must hold sound shards, got {str(path)!r}: {error}.") from error


def _to_safetensors(latents: torch.Tensor, rows: list[dict[str, Any]], key: str) -> bytes:
    # One entry of metadata only: the order of several is not the same in every run.
    return save({"latents": latents}, {"items": json.dumps(rows)})


def _to_tar(latents: torch.Tensor, rows: list[dict[str, Any]], key: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, row in enumerate(rows):
            array = io.BytesIO()
            np.save(array, latents[number].numpy())
            parts = {"npy": array.getvalue(), "json": json.dumps(row).encode()}
            if row["class_label"] is not None:
                parts["cls"] = str(row["class_label"]).encode()
            if row["captions"]:  # one in every line; exactly as they are in the JSON
                parts["txt"] = "\n".join(" ".join(text.split()) for text in row["captions"]).encode()
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}-{number:05d}.{extension}")  # no date, no owner
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


_SERIALIZERS = {"safetensors": _to_safetensors, "webdataset": _to_tar}


def serialize_shard(latents: torch.Tensor, rows: list[dict[str, Any]], key: str, file_format: FileFormat) -> bytes:
    """Turn a shard into the content of its file, the same bytes for the same arguments.

    Args:
        latents: `(n, C, F, h, w)`, float32 or float16.
        rows: `class_label`, `captions` and `name` of every item.
        key: The number of the shard, which members of a tar file start with.
        file_format: A key of `SHARD_SUFFIXES`.
    """
    return _SERIALIZERS[file_format](latents, rows, key)

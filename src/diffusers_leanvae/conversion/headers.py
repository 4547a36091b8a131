"""Headers of safetensors files, read without PyTorch, which takes a second to import."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


# In the folder of a saved model: its config, and its weights if they are one file.
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


_MAX_BYTES = 100 * 2**20  # of a header, as safetensors has it


@dataclass(frozen=True)
class TensorInfo:
    """A tensor without its values; it has a `shape` and a length as a tensor has."""

    dtype: str
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def numel(self) -> int:
        return math.prod(self.shape)


class Header(NamedTuple):
    """The header of a safetensors file.

    Attributes:
        tensors: Its tensors.
        metadata: Texts that the writer added.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def args(self) -> dict[str, Any]:
        """Return the constructor's arguments that an original checkpoint may have in its metadata."""
        return json_object(self.metadata.get("args") or self.metadata.get("config"))


def json_object(text: str | None) -> dict[str, Any]:
    """Return the JSON object of a text in the metadata, where anybody may write anything; empty if it is none."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def read_header(path: str | Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        ValueError: If it has none.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise ValueError("it is shorter than a header" if size else "it is empty")
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, _MAX_BYTES):
                raise ValueError("the header is longer than the file, or than headers may be")
            entries = json.loads(file.read(length))
        metadata = entries.pop("__metadata__", {})
        tensors = {
            name: TensorInfo(_DTYPES.get(str(entry["dtype"]), str(entry["dtype"])), tuple(entry["shape"]))
            for name, entry in entries.items()
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"`path` must be a valid safetensors file, got {str(path)!r}: {error}.") from None
    return Header(tensors, metadata)

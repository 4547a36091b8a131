"""Finished clips of an evaluation, on disk as they come, so that a run that was ended goes on where it was."""

import base64
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class ClipResult:
    """What one clip contributes; plain values that go through JSON without loss.

    Attributes:
        index: Place in the order of the data.
        name: Of the clip.
        stamp: Of its file; see `ClipFile`.
        figures: By name of the metric.
        absent: Why figures of a kind are absent, by kind.
        features: By name of the features: those of the original and of the reconstruction.
        latents: Sums over the latents: `count` for each channel, `sum`, `squares`, `largest`; `None` without any.
        num_frames: Frames that were compared.
        encode_seconds: Time to encode.
        decode_seconds: Time to decode.
    """

    index: int
    name: str
    stamp: list[int]
    figures: dict[str, float]
    absent: dict[str, str] = field(default_factory=dict)
    features: dict[str, list[str]] = field(default_factory=dict)
    latents: dict[str, Any] | None = None
    num_frames: int = 0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0


def pack_features(values: torch.Tensor) -> str:
    """Write float32 features as text, without loss."""
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode("ascii")


def unpack_features(text: str) -> torch.Tensor:
    """Read features of [`pack_features`]."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32))


class Journal:
    """Finished clips of one evaluation; each process writes a file of its own and reads all.

    Args:
        folder: Where; made with the first result.
        setting: All that results depend on beyond the clips; results of another setting are not taken.
        rank: This process.
    """

    def __init__(self, folder: str | Path, setting: dict[str, Any], rank: int = 0) -> None:
        self.folder, self.path = Path(folder), Path(folder, f"clips-{rank}.jsonl")
        self.key = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]

    def read(self) -> dict[str, ClipResult]:
        """Return the results of all processes so far, by name. A line that was cut off is left out."""
        found = {}
        for path in sorted(self.folder.glob("clips-*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                    if row["key"] == self.key:
                        found[row["result"]["name"]] = ClipResult(**row["result"])
                except (ValueError, KeyError, TypeError):
                    continue
        return found

    def add(self, result: ClipResult) -> None:
        """Append a result."""
        line = json.dumps({"key": self.key, "result": asdict(result)}).encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # the end of a line that was cut off
                    line = b"\n" + line
            file.write(line + b"\n")

    @staticmethod
    def remove(folder: str | Path) -> None:
        """Remove the journal in a folder, when the evaluation is written."""
        shutil.rmtree(folder, ignore_errors=True)

"""A finished evaluation as data: the figures of every clip, their totals, and what was fixed; to JSON and back."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from .results import write_result


@dataclass(frozen=True)
class Metric:
    """How the figures of one name are understood and printed.

    Attributes:
        label: Short name for the head of a column, such as `"PSNR"`.
        definition: What is computed, in one sentence with every choice that makes a difference.
        unit: Such as `"dB"`; empty for a plain number.
        better: Which direction is better; `None` if neither is.
        digits: Decimals to print. Files hold two more.
    """

    label: str
    definition: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = "higher"
    digits: int = 4

    def round(self, value: float) -> float:
        """Round for a file."""
        return round(value, self.digits + 2)


@dataclass(frozen=True)
class Evaluation:
    """What one subject scored on the clips of one protocol.

    Attributes:
        model: The subject: a model by name or path, a codec with its settings, or a folder of generated videos.
        dataset: What was measured on.
        protocol: Every choice, by name: `name`, `num_frames`, `resolution` and the others of the protocol.
        metrics: How each name of `totals` and `clips` is understood, in the order of columns.
        totals: One figure for each metric: the mean over the clips, and figures of all clips together (FVD).
        clips: The figures of each clip that was scored, by its name, in the order of the data. A metric that a clip
            is too small for is absent, as are those of all clips together.
        about: More of the subject: `class`, `weights_sha256`, `num_parameters`, `latent_channels`,
            `temporal_compression_ratio`, `spatial_compression_ratio`, `dtype`, ...
        failed: What was wrong with each file that was left out, in one sentence, by its name.
        missing: Why each metric that was asked for is absent, or absent for some clips, in one sentence.
        latents: Statistics of the latents, `None` for what has none: `channel_mean` and `channel_std`, lists with a
            number for each channel, and `mean`, `std`, `largest` of all.
        timing: What depends on the machine: `encode_frames_per_second`, `decode_frames_per_second`, and
            `peak_memory_bytes`. It is the only part that differs when the same is measured again.
    """

    model: str
    dataset: str
    protocol: dict[str, Any]
    metrics: dict[str, Metric]
    totals: dict[str, float]
    clips: dict[str, dict[str, float]]
    about: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    latents: dict[str, Any] | None = None
    timing: dict[str, Any] | None = None

    @property
    def num_videos(self) -> int:
        """Number of clips that were scored."""
        return len(self.clips)

    def rounded(self) -> Self:
        """Return the same with figures rounded for a file."""
        return replace(
            self,
            totals=self._rounded(self.totals),
            clips={name: self._rounded(figures) for name, figures in self.clips.items()},
            latents=_round_floats(self.latents, 6),
            timing=_round_floats(self.timing, 3),
        )

    def _rounded(self, figures: Mapping[str, float]) -> dict[str, float]:
        return {name: self.metrics[name].round(value) for name, value in figures.items()}

    def to_json(self) -> dict[str, Any]:
        """Lay out for a file: the totals and what is about the model stand at the top, under their own names."""
        protocol = {name: self.protocol[name] for name in ("num_frames", "resolution") if name in self.protocol}
        return {
            "model": self.model,
            **self.about,
            "dataset": self.dataset,
            **self.totals,
            "num_videos": self.num_videos,
            "num_failed": len(self.failed),
            **protocol,
            "clips": self.clips,
            "failed": self.failed,
            "missing": self.missing,
            "latents": self.latents,
            "timing": self.timing,
            "protocol": self.protocol,
            "about": list(self.about),
            "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Take what [`to_json`] laid out; whatever else is there, such as `provenance`, is left alone."""
        try:
            metrics = {name: Metric(**metric) for name, metric in data["metrics"].items()}
            return cls(
                model=data["model"],
                dataset=data["dataset"],
                protocol=dict(data["protocol"]),
                metrics=metrics,
                totals={name: data[name] for name in metrics if name in data},
                clips={name: dict(figures) for name, figures in data["clips"].items()},
                about={name: data[name] for name in data["about"]},
                failed=dict(data["failed"]),
                missing=dict(data["missing"]),
                latents=data["latents"],
                timing=data["timing"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`data` must be an evaluation as `leanvae eval --output` writes it, got something else ({error!r})."
            ) from error

    def write(self, path: str | Path) -> None:
        """Write it, rounded and with its provenance, as a JSON file that [`read_evaluation`] reads."""
        write_result(path, self.rounded().to_json())


def read_evaluation(path: str | Path) -> Evaluation:
    """Read a file of `leanvae eval --output`.

    Raises:
        ValueError: If it is none.
    """
    try:
        return Evaluation.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"`path` must be a file of `leanvae eval --output`, got {str(path)!r}: {error}") from error


def mean_over_clips(clips: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Average each metric over the clips that have it; the exact sum is rounded once, whatever the order of clips."""
    names = dict.fromkeys(name for figures in clips.values() for name in figures)
    columns = {name: [figures[name] for figures in clips.values() if name in figures] for name in names}
    return {name: math.fsum(column) / len(column) for name, column in columns.items()}


def _round_floats(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {name: _round_floats(item, digits) for name, item in value.items()}
    return [_round_floats(item, digits) for item in value] if isinstance(value, list) else value

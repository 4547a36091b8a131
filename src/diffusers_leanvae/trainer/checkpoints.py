"""Files of a training run that survive a kill at any moment: checkpoints, logs and what it exports.

A checkpoint is written under another name and renamed, so that a folder named `step-*` is always whole. A run that
resumes drops what came after its checkpoint: lines of the logs, and checkpoints of the run that it takes the place of.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from ..atomic import commit, replace_file
from ..checks import reason_of
from .sharding import WeightAverage


MARK = "custom_checkpoint_0.pkl"  # in every checkpoint, sharded or not: the first of the objects that are registered


@dataclass
class Progress:
    """The counters in a checkpoint; the clips, everything random and the learning rate follow from `step`."""

    step: int = 0
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0
    num_bad_videos: int = 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        vars(self).update(state)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence that `path` cannot be written: what libraries say of a full disk names no place.

    Raises:
        ValueError: In place of their errors.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = reason_of(getattr(error, "strerror", None) or error)
        if isinstance(error, RuntimeError):
            if "inline_container" not in reason:
                raise
            # Where PyTorch notices that not all was written; it does not know why.
            reason = f"the disk is full, or the file would be too large ({reason})"
        raise ValueError(f"Cannot write {str(path)!r}: {reason}.") from error


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Add one record to a file of JSON lines; for NaN and infinity, which JSON does not have, stands null."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(_without_nan(record), allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def forget_after(path: Path, step: int) -> None:
    """Drop what a killed run logged beyond the checkpoint that it resumes from, and a line it did not finish."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        with writing(path), replace_file(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def abandon_after(folder: Path, step: int) -> None:
    """Set aside checkpoints beyond the one that a run resumes from, or they would outlive those that it writes."""
    for checkpoint in list_checkpoints(folder):
        if step_of(checkpoint) > step:
            _set_aside(checkpoint)


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run, from the oldest to the newest; the folder need not exist."""
    return sorted((path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def _set_aside(checkpoint: Path) -> None:
    """Take its name from a checkpoint, at once; `remove_leftovers` then removes it."""
    os.replace(checkpoint, checkpoint.with_name(checkpoint.name.replace("step", "stale")))


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint to resume from.

    Args:
        folder: Where the run keeps its checkpoints; need not exist.
        resume: `"latest"`: the newest one, if any; a checkpoint's own folder; or `None`: there must not be any.
    """
    if resume not in ("latest", None):
        if not (Path(resume) / MARK).is_file():
            raise ValueError(f"`resume` must be 'latest', a checkpoint folder or null, got {resume!r}.")
        return Path(resume)
    existing = list_checkpoints(folder)
    if existing and resume is None:
        raise ValueError(f"`output` must hold no checkpoints when `resume` is null, got {str(existing[-1])!r}.")
    return existing[-1] if existing else None


def save_checkpoint(
    accelerator: Accelerator, folder: Path, step: int, keep: int, data_state: dict[str, Any], ema: WeightAverage
) -> None:
    """Write a checkpoint, then drop the oldest; every process calls.

    Args:
        accelerator: It has prepared, or registered, all that has a state.
        folder: Where the run keeps its checkpoints.
        step: Optimizer steps done.
        keep: The number of checkpoints to keep.
        data_state: This process's position in the data, as JSON; may be empty.
        ema: The averaged weights.
    """
    partial, final = folder / f"partial-{step:07d}", folder / f"step-{step:07d}"
    with writing(final):
        accelerator.save_state(str(partial))
        ema.save_shards(partial)
        if data_state:
            path = partial / f"data_{accelerator.process_index}.json"
            path.write_text(json.dumps(data_state), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        commit(partial, final)
        for old in list_checkpoints(folder)[:-keep]:  # the newest is the one of this step: see `abandon_after`
            _set_aside(old)
        remove_leftovers(folder)
    accelerator.wait_for_everyone()


def load_data_state(checkpoint: Path, process_index: int) -> dict[str, Any]:
    """The process's position in the data as `save_checkpoint` got it; empty if the checkpoint has none for it."""
    path = checkpoint / f"data_{process_index}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def remove_leftovers(folder: Path) -> None:
    """Remove checkpoints that a killed run did not finish writing or removing."""
    for leftover in [*folder.glob("stale-*"), *folder.glob("partial-*")]:
        shutil.rmtree(leftover)

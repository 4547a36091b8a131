"""Published numbers as files; each carries the machine, versions, date and command that made it."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..atomic import replace_file


def provenance() -> dict[str, Any]:
    """Describe machine, versions, date and command. Absolute paths in the command lose their (private) folders."""
    packages = ("torch", "diffusers", "accelerate", "av", "numpy", "torchmetrics")
    installed = {}
    for package in packages:
        try:
            installed[package] = version(package)
        except ModuleNotFoundError:
            continue  # an extra that is not installed
    arguments = [Path(part).name if Path(part).is_absolute() else part for part in sys.argv[1:]]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join([Path(sys.argv[0]).name, *arguments]),
        "commit": _commit(),
        "version": __version__,
        "python": platform.python_version(),
        "packages": installed,
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _commit() -> str | None:
    """The commit of a checkout of this package; an installed one may lie in a repository of something else."""
    root = Path(__file__).resolve().parents[3]
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "--short=12", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    except OSError:  # no git
        return None
    return answer[1] if len(answer) == 2 and Path(answer[0]).resolve() == root else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """Write a result with its provenance as JSON; an older file is replaced.

    Raises:
        ValueError: If it holds NaN or an infinite number, which JSON does not have.
    """
    path = Path(path)
    try:
        text = json.dumps(result | {"provenance": provenance()}, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"`result` must hold finite numbers alone to go into {str(path)!r}: {error}.") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as partial:
        partial.write_text(f"{text}\n", encoding="utf-8")

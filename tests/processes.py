"""Processes that start at once: a server that has imported the package forks them.

A new interpreter takes seconds to import PyTorch and diffusers, longer than most of what tests do in one. Where
nothing depends on how a process comes to its imports, tests take it from here; all tests of a worker share the server.
"""

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["diffusers_leanvae.inference.distributed", "diffusers_leanvae.inference.files"])


def run_python(code: str, *arguments: object, **environment: str) -> str:
    """Run code in a new interpreter, where nothing is imported yet, and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "ignore"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def start(function: Callable[..., None], *arguments: object, output: Path) -> ForkServerProcess:
    """Start a process that calls `function`, which must be importable; what it prints, errors too, goes to a file."""
    process = CONTEXT.Process(target=_run, args=(dict(os.environ), output, function, arguments))
    process.start()
    return process


def run_ranks(function: Callable[..., None], *arguments: object, num_processes: int, output: Path) -> None:
    """Call `function(rank, *arguments)` in so many processes at the same time, and wait for all of them.

    Args:
        output: Folder for what each process prints.
    """
    files = [output / f"rank-{rank}.txt" for rank in range(num_processes)]
    processes = [start(function, rank, *arguments, output=file) for rank, file in enumerate(files)]
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in wait(list(running)):
            if running.pop(sentinel).exitcode:
                for process in running.values():  # they would wait for the one that failed
                    process.terminate()
    assert not any(process.exitcode for process in processes), "\n".join(file.read_text() for file in files)


def _run(environment: dict[str, str], output: Path, function: Callable[..., None], arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)  # of the test, not of the moment when the server was started
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    try:
        function(*arguments)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None

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
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["diffusers_leanvae.cli", "diffusers_leanvae.inference.distributed", "diffusers_leanvae.inference.files"]
)


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


class Piped:
    """A process that calls `function`, which must be importable, between pipes as a shell lays them.

    Args:
        function: What to call, with `arguments`.
        stdin: A file to read standard input from, in place of a pipe.
    """

    def __init__(self, function: Callable[..., None], *arguments: object, stdin: str | Path | None = None) -> None:
        (theirs_in, ours_in), (ours_out, theirs_out), (ours_err, theirs_err) = (CONTEXT.Pipe(False) for _ in range(3))
        theirs = (theirs_in, theirs_out, theirs_err)
        target = (dict(os.environ), os.getcwd(), theirs, stdin, function, arguments)
        self.process = CONTEXT.Process(target=_run_piped, args=target)
        self.process.start()
        self.stdin = os.fdopen(os.dup(ours_in.fileno()), "wb")
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno()), "rb") for end in (ours_out, ours_err))
        for end in (*theirs, ours_in, ours_out, ours_err):
            end.close()

    def communicate(self, data: bytes = b"") -> tuple[int, bytes, bytes]:
        """Write all of standard input, and return the exit status and what came out of the two others."""
        with ThreadPoolExecutor(3) as pool:
            pool.submit(self._feed, data)
            out, err = pool.map(lambda stream: stream.read(), (self.stdout, self.stderr))
        return self.wait(), out, err

    def wait(self, seconds: float = 300) -> int:
        """Return the exit status; a process that does not end in time is killed."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        for stream in (self.stdout, self.stderr):
            stream.close()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def _feed(self, data: bytes) -> None:
        try:
            with self.stdin:
                self.stdin.write(data)
        except BrokenPipeError:  # it needs no more
            pass


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


def _run_piped(
    environment: dict[str, str],
    folder: str,
    ends: tuple[Connection, Connection, Connection],
    stdin: str | Path | None,
    function: Callable[..., None],
    arguments: tuple,
) -> None:
    os.chdir(folder)
    for number, end in enumerate(ends):
        os.dup2(end.fileno(), number)
        end.close()
    if stdin is not None:
        with open(stdin, "rb") as file:
            os.dup2(file.fileno(), 0)
    sys.stdin = open(0, closefd=False)
    _call(environment, function, arguments)


def _run(environment: dict[str, str], output: Path, function: Callable[..., None], arguments: tuple) -> None:
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    _call(environment, function, arguments)


def _call(environment: dict[str, str], function: Callable[..., None], arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)  # of the test, not of the moment when the server was started
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    try:
        function(*arguments)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None

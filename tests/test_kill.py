"""A long job that dies in the middle: nothing that looks whole is left, the next run completes, memory stays flat."""

import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from diffusers_leanvae.video_io import iter_video, write_video


# Windows knows neither signal, nor a file's removal while it is open.
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")

# The console script; on Linux it says its peak memory at the end (`ru_maxrss` would include the parent's before exec).
LEANVAE = """
import atexit, pathlib, sys
status = pathlib.Path("/proc/self/status")
if status.exists():
    atexit.register(lambda: print(status.read_text(), file=sys.stderr))
from diffusers_leanvae.cli import app
app()
"""


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory) -> Path:
    r"""A tiny model, and clips of 200 and 1,200 frames."""
    folder = tmp_path_factory.mktemp("kill")
    make_model().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(256, (1, 48, 64, 3), generator=generator, dtype=torch.uint8)
    for num_frames in (200, 1200):
        frames = torch.cat([picture.roll(t, dims=2) for t in range(num_frames)])
        write_video(folder / f"{num_frames}.mp4", frames, Fraction(25), preset="ultrafast")
    return folder


def start(folder: Path, num_frames: int, output: Path) -> subprocess.Popen:
    arguments = ["reconstruct", folder / f"{num_frames}.mp4", output, "--model", folder / "model", "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-c", LEANVAE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def stop_in_the_middle(process: subprocess.Popen, output: Path, number: signal.Signals) -> tuple[int, str]:
    r"""Send a signal as soon as there are frames in the unfinished file; exit status and what was said."""
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in output.parent.iterdir()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def finish(process: subprocess.Popen) -> int | None:
    r"""Wait for success; peak memory in kB, `None` where the system does not tell."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert " frames" in output
    match = re.search(r"VmHWM:\s+(\d+) kB", errors)
    return int(match[1]) if match else None


def num_frames_in(path: Path) -> int:
    return sum(len(frames) for frames in iter_video(path))


def test_killed_in_the_middle_and_started_again_in_constant_memory(folder, tmp_path):
    output = tmp_path / "out.mp4"
    code, _ = stop_in_the_middle(start(folder, 1200, output), output, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())  # no chance to clean up, none to mistake
    peak = finish(start(folder, 1200, output))
    assert num_frames_in(output) == 1200
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["out.mp4"]
    short = finish(start(folder, 200, tmp_path / "short.mp4"))
    assert num_frames_in(tmp_path / "short.mp4") == 200
    if peak is None or short is None:
        pytest.skip("peak memory is read from /proc")
    print(f"peak memory: {short / 1024:.1f} MiB with 200 frames, {peak / 1024:.1f} MiB with 1,200")
    assert peak < 1.15 * short


def test_interrupted_in_the_middle(folder, tmp_path):
    output = tmp_path / "out.mp4"
    code, errors = stop_in_the_middle(start(folder, 1200, output), output, signal.SIGINT)
    assert code == 130
    assert "interrupted; no unfinished output was left" in errors
    assert list(tmp_path.iterdir()) == []

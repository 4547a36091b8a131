"""Processes that were started as one job work as one job, on a machine without GPUs too."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from diffusers_leanvae.launching import start_accelerator


CODE = """
import sys

from diffusers_leanvae.launching import start_accelerator

accelerator = start_accelerator()
place = f"process {accelerator.process_index} of {accelerator.num_processes} on {accelerator.device.type}"
sys.stdout.write(place + "\\n")  # at once, as both processes write to one pipe
accelerator.end_training()
"""


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def launch(tmp_path: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "script.py").write_text(CODE)
    finished = subprocess.run(
        [sys.executable, "-m", *launcher, "script.py"], capture_output=True, text=True, cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_torchrun_without_gpus(tmp_path: Path):
    finished = launch(tmp_path, "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert sorted(finished.stdout.splitlines()) == ["process 0 of 2 on cpu", "process 1 of 2 on cpu"]


def test_accelerate_launch_says_that_it_starts_one_process(tmp_path: Path):
    finished = launch(tmp_path, "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    assert finished.stdout == "process 0 of 1 on cpu\n"
    assert finished.stderr.count("This is a job of one process: without GPUs `accelerate launch` starts one") == 1
    finished = launch(tmp_path, "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    assert finished.stdout == "process 0 of 1 on cpu\n" and "a job of one process" not in finished.stderr


def test_processes_that_cannot_be_connected_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # without ranks, and on a device that Accelerate knows no way for
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="must connect the 2 processes of this job, got 1: .* for meta"):
        start_accelerator()

"""Processes that were started as one job work as one job, on a machine without GPUs too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from processes import Piped
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from diffusers_leanvae.launching import start_accelerator


SCRIPT = """
import sys

from diffusers_leanvae.launching import start_accelerator

accelerator = start_accelerator()
place = f"process {accelerator.process_index} of {accelerator.num_processes} on {accelerator.device.type}"
sys.stdout.write(place + "\\n")  # at once, as both processes write to one pipe
accelerator.end_training()
"""


def run_script() -> None:
    exec(SCRIPT, {})


def run_by_torchrun() -> None:
    """Do what `torchrun --standalone --nproc_per_node 2` does, but in forked processes, not in new interpreters."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, run_script)()


def run_by_accelerate(*options: str) -> None:
    """Do what `accelerate launch` does for one process, but in this one, not in a new interpreter."""
    arguments = launch_command_parser().parse_args([*options, "script.py"])
    os.environ.update(prepare_simple_launcher_cmd_env(_validate_launch_command(arguments)[0])[1])
    run_script()


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_torchrun_without_gpus():
    code, out, err = Piped(run_by_torchrun).communicate()
    assert code == 0 and sorted(out.splitlines()) == [b"process 0 of 2 on cpu", b"process 1 of 2 on cpu"], err


def test_accelerate_launch_says_that_it_starts_one_process(tmp_path: Path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "script.py"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "process 0 of 1 on cpu\n"
    assert finished.stderr.count("This is a job of one process: without GPUs `accelerate launch` starts one") == 1
    code, out, err = Piped(run_by_accelerate, "--cpu", "--num_processes", "1").communicate()
    assert code == 0 and out == b"process 0 of 1 on cpu\n" and b"a job of one process" not in err, err


def test_processes_that_cannot_be_connected_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # without ranks, and on a device that Accelerate knows no way for
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="must connect the 2 processes of this job, got 1: .* for meta"):
        start_accelerator()

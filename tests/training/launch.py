"""Training jobs in processes of their own: what runs there, and how it is killed; `runs.launch` starts this."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.launchers import debug_launcher
from diffusers.training_utils import EMAModel
from diffusers_leanvae.training import train_lvdm, train_vae
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException


def run_jobs(*jobs: dict[str, Any]) -> None:
    """Run jobs one after the other, each in processes forked from this one, which find everything imported.

    Args:
        jobs: `{"script": "train_vae", "arguments": [...], "num_processes": 2, "kill": None, "environment": {}}`;
            `kill` may be `["update", n]`: SIGKILL the last process in its n-th update of the averaged weights; or
            `["save", step]`: SIGKILL it with a half-written checkpoint. The environment is what a launcher sets.
    """
    for job in jobs:
        try:
            debug_launcher(_run, (job,), job["num_processes"])
            was_killed = False
        except ProcessExitedException as error:
            was_killed = error.signal_name == "SIGKILL"
            if not was_killed:
                raise
        except ProcessRaisedException as error:
            # The others lose their connection to the killed one, and may be seen to end before it.
            was_killed = re.search("Connection (reset|closed) by peer", str(error)) is not None
            if not was_killed:
                raise
        assert was_killed == (job["kill"] is not None), job


def _run(job: dict[str, Any]) -> None:
    os.environ.update(job["environment"])
    is_last = dist.get_rank() == job["num_processes"] - 1
    if job["kill"] is not None and is_last:
        moment, number = job["kill"]
        if moment == "update":
            EMAModel.step = at_update(number, _kill)
        else:
            _kill_in_save(number)
    {"train_vae": train_vae, "train_lvdm": train_lvdm}[job["script"]].main(job["arguments"])


def at_update(number: int, action: Callable[[], Any]) -> Callable[[EMAModel, Any], None]:
    """Return an `EMAModel.step` that does something before its `number`-th update, counted from 1."""
    step = EMAModel.step

    def watched(self: EMAModel, parameters: Any) -> None:
        if self.optimization_step == number - 1:
            action()
        step(self, parameters)

    return watched


def _kill_in_save(number: int) -> None:
    save_state = Accelerator.save_state

    def half(self, folder):
        save_state(self, folder)
        if folder.endswith(f"{number:07d}"):
            (Path(folder) / "optimizer.bin").write_bytes(b"")
            (Path(folder) / "custom_checkpoint_0.pkl").unlink()
            _kill()

    Accelerator.save_state = half


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

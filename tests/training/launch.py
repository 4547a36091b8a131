"""Run training jobs one by one, in forked processes that find everything imported; see `test_train_vae.py`.

    python launch.py jobs.json

A job is `{"arguments": [...], "num_processes": 2, "kill": null}`, with `"script": "train_lvdm"` for another than
`train_vae`; `kill` may be `["update", n]`: SIGKILL the last
process in its n-th update of the averaged weights; or `["save", step]`: SIGKILL it with a half-written checkpoint.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.launchers import debug_launcher
from diffusers.training_utils import EMAModel
from diffusers_leanvae.training import train_lvdm, train_vae
from torch.multiprocessing.spawn import ProcessExitedException


def kill_in_update(number: int) -> None:
    step = EMAModel.step

    def killed(self, parameters):
        if self.optimization_step == number - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, parameters)

    EMAModel.step = killed


def kill_in_save(number: int) -> None:
    save_state = Accelerator.save_state

    def half(self, folder):
        save_state(self, folder)
        if folder.endswith(f"{number:07d}"):
            (Path(folder) / "optimizer.bin").write_bytes(b"")
            (Path(folder) / "custom_checkpoint_0.pkl").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    Accelerator.save_state = half


def run(job: dict) -> None:
    is_last = dist.get_rank() == job["num_processes"] - 1
    if job["kill"] is not None and is_last:
        moment, number = job["kill"]
        {"update": kill_in_update, "save": kill_in_save}[moment](number)
    {"train_vae": train_vae, "train_lvdm": train_lvdm}[job.get("script", "train_vae")].main(job["arguments"])


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            debug_launcher(run, (job,), job["num_processes"])
            was_killed = False
        except ProcessExitedException as error:
            was_killed = error.signal_name == "SIGKILL"
            if not was_killed:
                raise
        assert was_killed == (job["kill"] is not None), job

"""Runs of the training scripts in tests: made here or in processes of their own, read back, and compared."""

import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from launch import at_update, run_jobs
from processes import start
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


# What could disturb resuming, of all scripts: what has a state, and what changes on the way, in eight steps.
DISTURBING = (
    "num_steps=8",
    "save_every=4",
    "validation.every=4",
    "num_accumulation_steps=2",
    "batch_size=4",
    "gradient_checkpointing=true",
)


class Script:
    """A training script with what all runs of a test file have in common.

    Args:
        name: `"train_vae"` or `"train_lvdm"`.
        config: The recipe, a file name in `training/configs`.
        overrides: Further settings of all runs.
    """

    def __init__(self, name: str, config: str, *overrides: str) -> None:
        self.name, self.module = name, importlib.import_module(f"diffusers_leanvae.training.{name}")
        self.path = Path(str(self.module.__file__)).resolve()
        self.common = (str(self.path.parent / "configs" / config), "num_threads=1", *overrides)

    def arguments(self, output: Path, *overrides: str) -> list[str]:
        return [*self.common, f"output={output}", *overrides]

    def train(self, output: Path, *overrides: str) -> Path:
        """Run the script in this process, and return its output folder."""
        AcceleratorState._reset_state(reset_partial_state=True)  # of whatever ran before
        self.module.main(self.arguments(output, *overrides))
        return output

    def interrupt(self, output: Path, *overrides: str, update: int) -> list[int]:
        """Run the script until the `update`-th update of the averaged weights, and return the steps in its log."""
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(EMAModel, "step", at_update(update, _interrupt))
            self.train(output, *overrides)
        return [record["step"] for record in read_log(output)]

    def torchrun(self, output: Path, *overrides: str, num_processes: int = 2) -> str:
        """Run the script as people do, `torchrun --nproc_per_node 2 train_vae.py ...`, and return what it prints."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        command = [sys.executable, *launcher, str(self.path), *self.arguments(output, *overrides)]
        finished = subprocess.run(command, capture_output=True, text=True, cwd=output.parent)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout + finished.stderr

    def job(
        self,
        output: Path,
        *overrides: str,
        num_processes: int = 2,
        kill: list | None = None,
        environment: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """A job for `launch`; `kill` and `environment` as of `run_jobs`."""
        options = {"num_processes": num_processes, "kill": kill, "environment": environment or {}}
        return {"script": self.name, "arguments": self.arguments(output, *overrides)} | options


def launch(folder: Path, *jobs: dict[str, Any]) -> None:
    """Run jobs one after the other in processes of their own; each must end as it should, by a kill or well."""
    process = start(run_jobs, *jobs, output=folder / "said.txt")
    process.join()
    assert process.exitcode == 0, (folder / "said.txt").read_text()


def _interrupt() -> None:
    raise KeyboardInterrupt


# --- What a run leaves -----------------------------------------------------------------------------------------------


def read_log(run: Path, name: str = "log") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def weights_at(run: Path, step: int, number: str = "") -> dict[str, torch.Tensor]:
    """The weights in a checkpoint; `number` is empty for those of the model, `"_1"` for those of a discriminator."""
    shards = run / f"checkpoints/step-{step:07d}/pytorch_model_fsdp_0"
    if shards.is_dir():
        return join_shards(shards)["model"]
    return load_file(run / f"checkpoints/step-{step:07d}/model{number}.safetensors")


def optimizer_at(run: Path, step: int, number: str = "") -> dict[int, dict[str, torch.Tensor]]:
    """The optimizer's state in a checkpoint, by the number of the parameter."""
    shards = run / f"checkpoints/step-{step:07d}/optimizer_0"
    if shards.is_dir():
        whole = join_shards(shards)["optimizer"]
        names = [name for group in whole["param_groups"] for name in group["params"]]
        return {number: whole["state"][name] for number, name in enumerate(names)}
    return torch.load(run / f"checkpoints/step-{step:07d}/optimizer{number}.bin", weights_only=True)["state"]


def join_shards(folder: Path) -> dict[str, Any]:
    """What FSDP has saved in many files, as one object."""
    with tempfile.TemporaryDirectory() as whole:
        dcp_to_torch_save(folder, f"{whole}/whole.pt")
        return torch.load(f"{whole}/whole.pt", weights_only=True)


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


# --- Two runs --------------------------------------------------------------------------------------------------------


def assert_same_run(actual: Path, expected: Path) -> None:
    """All files of two runs are the same to the last bit, but for times, paths, and random states that nobody uses."""
    files = [
        {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} for run in (actual, expected)
    ]
    assert files[0] == files[1]
    for name in sorted(files[0]):
        _assert_same_file(actual / name, expected / name)


def _assert_same_file(actual: Path, expected: Path) -> None:
    if actual.name in ("README.md", "recipe.yaml") or "random_states" in actual.name or actual.suffix == ".distcp":
        return
    if actual.name == ".metadata":  # of all the .distcp files beside it
        ours, theirs = (join_shards(path.parent) for path in (actual, expected))
        groups = [whole.get("optimizer", {}).pop("param_groups", None) for whole in (ours, theirs)]
        assert groups[0] == groups[1]  # names and numbers
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        return
    if actual.suffix == ".jsonl":
        ours, theirs = (read_log(path.parent, path.stem) for path in (actual, expected))
        for record in (*ours, *theirs):
            for key in [key for key in record if "seconds" in key]:
                del record[key]
        assert ours == theirs
    elif actual.suffix == ".safetensors":
        torch.testing.assert_close(load_file(actual), load_file(expected), rtol=0, atol=0)
    elif actual.suffix in (".bin", ".pkl"):
        ours, theirs = (torch.load(path, weights_only=True) for path in (actual, expected))
        if "optimizer" in actual.name:
            assert ours.pop("param_groups") == theirs.pop("param_groups")  # names and numbers
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    else:
        assert actual.read_bytes() == expected.read_bytes(), actual


def assert_same_training(
    actual: Path,
    expected: Path,
    step: int,
    number: str = "",
    gradients: float = 2e-4,
    weights: float = 4e-6,
    floor: float = 1e-6,
) -> None:
    """Two runs had the same gradients up to rounding, and so have the same weights.

    Weights alone say too little and too much. Too little, as Adam's steps do not depend on the size of the gradients.
    Too much, as there are gradients which are nothing but rounding: those of a bias under an L1 loss, when as many
    pixels are too bright as too dark. Adam divides them by their own size, and moves such a weight by anything up to
    the learning rate, on one machine this way and on another that way. So the averages of the gradients that the
    optimizer keeps are compared for every parameter, and the norm of the whole gradient for every step; of the
    weights, one in a thousand may differ.

    Args:
        actual: Folder of a run.
        expected: Folder of another.
        step: A step that both have a checkpoint of.
        number: As of `weights_at`.
        gradients: Bound on differences of averaged gradients, relative to the largest of their tensor. Measured for
            AdamW, over instruction sets from SSE4 to AVX-512: 4e-5.
        weights: Bound on differences of all but a thousandth of the weights. Measured for AdamW: 4e-7.
        floor: Averaged gradients below this share of the largest of all are taken for rounding.
    """
    for ours, theirs in zip(read_log(actual), read_log(expected), strict=True):
        norms = [{key: x for key, x in record.items() if key.endswith("grad_norm")} for record in (ours, theirs)]
        assert norms[0].keys() == norms[1].keys() and norms[0]
        for name, norm in norms[0].items():
            assert abs(norm - norms[1][name]) <= 1e-5 * norms[1][name], (name, ours["step"])

    ours, theirs = (_averaged_gradients(run, step, number) for run in (actual, expected))
    assert ours.keys() == theirs.keys() and ours
    least = floor * max(
        gradient.abs().max() for gradient in theirs.values()
    )  # there are tensors of mere rounding, too
    for index, gradient in theirs.items():
        difference = (ours[index] - gradient).abs().max()
        assert difference <= gradients * (gradient.abs().max() + least), (index, difference, gradient.abs().max())

    # The running means of LeCam count passes.
    models = [
        {k: x for k, x in weights_at(run, step, number).items() if "lecam" not in k} for run in (actual, expected)
    ]
    assert models[0].keys() == models[1].keys()
    difference = torch.cat([(models[0][key] - tensor).abs().flatten() for key, tensor in models[1].items()])
    assert difference.isfinite().all()
    assert difference.double().quantile(0.999) <= weights


def _averaged_gradients(run: Path, step: int, number: str) -> dict[int, torch.Tensor]:
    names = ("exp_avg", "momentum_buffer")  # of AdamW, of Muon
    states = optimizer_at(run, step, number)
    return {index: state[name] for index, state in states.items() for name in names if name in state}

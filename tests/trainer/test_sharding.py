"""Shards of a model in two processes: what needs all of them at once is what it is for the whole model."""

import os
from collections.abc import Iterator
from pathlib import Path

import diffusers_leanvae.training.train_vae as train_vae
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from processes import run_ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from diffusers_leanvae.launching import leaving_job, start_accelerator
from diffusers_leanvae.trainer.recipe import OptimizerRecipe, RunRecipe
from diffusers_leanvae.trainer.sharding import WeightAverage, check_checkpoint, check_launcher, clip_gradients, shard


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dtypes = nn.Linear(6, 6), set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32  # what is between the blocks keeps its precision
        self.dtypes.add(self.linear.weight.dtype)
        return x + self.linear(x.tanh())


class Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = nn.Linear(6, 1)
        self.register_buffer("scale", torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x * self.scale)
        return self.last(x).square().mean()


@leaving_job()
def train(rank: int, folder: Path, precision: str) -> None:
    """Train shards in this process, and the whole model beside them; all figures must agree."""
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(str(folder / "store"), 2))
    os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    accelerator = start_accelerator(mixed_precision=precision)
    whole, sharded = Model(seed=0), Model(seed=rank)  # the first process's weights count
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, sharded)]
    module = shard(accelerator, sharded, optimizers[1], sharded.blocks)
    assert [name for name, part in module.named_modules() if isinstance(part, FSDPModule)] == [
        "",
        "blocks.0",
        "blocks.1",
    ]
    parameters = [list(model.parameters()) for model in (whole, sharded)]
    assert all(isinstance(weight, DTensor) and weight.to_local().numel() <= 18 for weight in parameters[1])
    averages = [cls(x, decay=0.5, foreach=True) for cls, x in zip((EMAModel, WeightAverage), parameters, strict=True)]
    for step in range(3):
        batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            whole(batch).backward()
        accelerator.backward(module(batch[2 * rank : 2 * rank + 2]))
        norms = [clip_gradients(x, 0.05) for x in parameters]
        assert all(type(norm) is torch.Tensor for norm in norms) and norms[0] > 0.05
        # Measured: 1.2e-7 and, with roundings to 8 bits, 3.2e-4.
        torch.testing.assert_close(norms[1], norms[0], rtol=0, atol=5e-7 if precision == "no" else 1.3e-3)
        for optimizer, average, weights in zip(optimizers, averages, parameters, strict=True):
            optimizer.step()
            average.step(weights)
            optimizer.zero_grad()
    module(torch.full((1, 6), float("inf") if rank else 1.0)).backward()
    assert not clip_gradients(parameters[1], 1.0).isfinite()  # of one process, in all
    optimizers[1].zero_grad()
    copies = [list(Model(seed=5).parameters()) for _ in averages]
    for average, copy in zip(averages, copies, strict=True):
        average.copy_to(copy)
    # Measured: 0 and 1.6e-5.
    torch.testing.assert_close(copies[1], copies[0], rtol=0, atol=2e-7 if precision == "no" else 6e-5)
    assert sharded.blocks[1].dtypes == {torch.float32 if precision == "no" else torch.bfloat16}  # as they travel

    average = averages[1]
    assert "shadow_params" not in average.state_dict() and average.state_dict()["optimization_step"] == 3
    average.save_shards(folder / "checkpoint")
    other = WeightAverage(parameters[1], foreach=True)
    other.load_shards(folder / "checkpoint")
    for ours, theirs in zip(other.shadow_params, average.shadow_params, strict=True):
        assert torch.equal(ours.to_local(), theirs.to_local())
    dist.barrier()
    check_checkpoint(folder / "checkpoint", is_sharded=True)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_shards_train_as_the_whole_model(precision: str, tmp_path: Path):
    run_ranks(train, tmp_path, precision, num_processes=2, output=tmp_path)


@pytest.mark.parametrize(("exponent", "deviation"), [(6.94, 0.10), (16.97, 0.05)])
def test_an_average_by_a_power_function_grows_with_the_run(exponent: float, deviation: float):
    """The steps count by a power of their number: mean and deviation of the number are shares of the steps done."""
    step_and_square = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    average = WeightAverage([step_and_square], exponent, decay=0.5)
    for step in range(1, 2001):
        step_and_square.data = torch.tensor([step, step**2], dtype=torch.float64)
        average.step([step_and_square])
        if step == 1:
            assert average.shadow_params[0].tolist() == [1, 1]
        if step in (500, 2000):
            mean, square = average.shadow_params[0].tolist()
            assert mean / step == pytest.approx((exponent + 1) / (exponent + 2), abs=2e-3)  # measured: 4e-4
            assert (square - mean**2) ** 0.5 / step == pytest.approx(deviation, abs=4e-4)  # measured: 1e-4


def test_a_checkpoint_of_a_whole_model_says_that_it_has_no_shards(tmp_path: Path):
    with pytest.raises(ValueError, match="A run that began without FSDP must go on without it, got the checkpoint"):
        check_checkpoint(tmp_path, is_sharded=True)
    check_checkpoint(tmp_path, is_sharded=False)


# --- What a launcher may ask for -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def recipe(**options) -> RunRecipe:
    return RunRecipe(output="x", batch_size=1, ema_decay=0.9, log_every=1, save_every=1, **options)


@pytest.mark.parametrize(
    ("environment", "options", "can_shard", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, True, "must not ask for DeepSpeed, .* what ZeRO-2 does"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, True, "must not ask for Megatron-LM"),
        ({"FSDP_VERSION": "2"}, {}, False, "must not ask for FSDP, as this script keeps its small model whole"),
        ({}, {}, True, "`fsdp_version` of the launcher's configuration must be 2, got 1"),
        (
            {"FSDP_VERSION": "2"},
            {"optimizer": OptimizerRecipe(name="muon")},
            True,
            "`optimizer.name` must be 'adamw' with FSDP, got 'muon'",
        ),
        (
            {"FSDP_VERSION": "2"},
            {"ema_power": 6.94, "post_hoc_power": 3.0},
            True,
            "`post_hoc_power` must be null with FSDP, got 3.0",
        ),
        ({"FSDP_VERSION": "2"}, {"mixed_precision": "fp16"}, True, "must be 'bf16', 'fp32' or null with FSDP"),
    ],
)
def test_what_the_scripts_do_not_do_is_refused(
    environment: dict, options: dict, can_shard: bool, message: str, monkeypatch: pytest.MonkeyPatch
):
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check_launcher(recipe(**options), can_shard)


def test_the_script_of_autoencoders_refuses_to_shard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = Path(train_vae.__file__).resolve().parent / "configs/smoke.yaml"
    with pytest.raises(ValueError, match="must not ask for FSDP"):
        train_vae.main([str(config), "data.train=clips", f"output={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_pretrained_weights_are_loaded_in_every_process(monkeypatch: pytest.MonkeyPatch):
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_launcher(recipe(), can_shard=True)
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"].lower() == "false"

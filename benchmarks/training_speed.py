"""Time of a training step over its floor: the time of its matrix products alone.

    python benchmarks/training_speed.py --output results/bench_training.json
    python benchmarks/training_speed.py --recipes training/configs/smoke.yaml --sizes 2x5x32x32 --output x.json

Every case runs one training step (losses of the recipe, backward pass, gradient clipping, optimizer) on random clips
of one size. The matrix products of that step, forward and backward, are recorded and then run alone, in the same
order, on tensors of the same shapes and strides. Steps and products take turns in one process; times are medians. The
floor leaves out the depthwise convolutions, which are no matrix products, and whatever the optimizer multiplies.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers_leanvae.training import train_vae  # pyright: ignore[reportMissingImports]
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from diffusers_leanvae.benchmark.work import FIRST_FACTOR, RecordProducts
from diffusers_leanvae.clock import seconds
from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.trainer.recipe import load_recipe


class Case:
    """One recipe at one size."""

    def __init__(self, path: str, size: tuple[int, int, int, int], device: torch.device) -> None:
        self.recipe = load_recipe(train_vae.Recipe, path, ["loss.lpips=0"])
        torch.manual_seed(0)
        self.vae = train_vae.build_vae(self.recipe).to(device).train()
        if self.recipe.gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.module = train_vae.build_training_module(self.recipe, self.vae, device)
        self.optimizer = train_vae.build_optimizer(self.recipe.optimizer, self.vae)
        batch_size, *shape = size
        self.sample = torch.rand(batch_size, 3, *shape, device=device) * 2 - 1
        self.noise = train_vae.posterior_noise(self.vae, self.sample, list(range(batch_size)), seed=0)

    def gradients(self) -> None:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.recipe.mixed_precision or "fp32")
        with torch.autocast(self.sample.device.type, dtype, enabled=dtype is not None):
            loss = self.module(self.sample, self.noise).loss
        loss.backward()

    def update(self) -> None:
        clip_grad_norm_(self.vae.parameters(), self.recipe.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.gradients()
        self.update()


def make_products(record: RecordProducts, device: torch.device) -> Callable[[], None]:
    """The recorded products, on tensors of the same shapes and strides; factors of one layout share their memory."""
    factors: dict[tuple[Any, ...], torch.Tensor] = {}
    for _, layouts in record.products:
        for index, (shape, strides, dtype) in enumerate(layouts):
            if (index, shape, strides, dtype) not in factors:
                tensor = torch.empty_strided(shape, strides, dtype=dtype, device=device)
                factors[index, shape, strides, dtype] = tensor.normal_()

    def run() -> None:
        for is_batched, layouts in record.products:
            first, second = (factors[index, *layout] for index, layout in enumerate(layouts))
            torch.bmm(first, second) if is_batched else torch.mm(first, second)

    return run


def measure(path: str, size: tuple[int, int, int, int], num_repeats: int, device: torch.device) -> dict[str, Any]:
    case = Case(path, size, device)
    case.step()  # the optimizer's state, and kernels used once
    record = RecordProducts()
    with FlopCounterMode(display=False) as counter, record:
        case.gradients()
    case.update()
    products = make_products(record, device)
    products()
    times: dict[str, list[float]] = {"step": [], "products": []}
    for _ in range(num_repeats):
        times["step"].append(seconds(case.step, device))
        times["products"].append(seconds(products, device))
    step, floor = (statistics.median(values) for values in times.values())
    counts = counter.get_flop_counts()["Global"]
    gflop = sum(counts.get(operator.overloadpacket, 0) for operator in FIRST_FACTOR) / 1e9
    return {
        "recipe": Path(path).stem,
        "batch_size": size[0],
        "clip": list(size[1:]),
        "optimizer": case.recipe.optimizer.name,
        "mixed_precision": case.recipe.mixed_precision,
        "num_parameters": sum(parameter.numel() for parameter in case.vae.parameters()),
        "seconds_per_step": round(step, 4),
        "seconds_of_products": round(floor, 4),
        "fraction_of_floor": round(floor / step, 3),
        "num_products": len(record.products),
        "product_gflop": round(gflop, 2),
        "product_gflop_per_second": round(gflop / floor, 1),
        "step_gflop_per_second": round(gflop / step, 1),
        "repeats": num_repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=["training/configs/compact_16ch.yaml"])
    parser.add_argument("--sizes", nargs="*", default=["8x17x64x64"], help="batch x frames x height x width")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", default="results/bench_training.json")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for path in options.recipes:
        for text in options.sizes:
            batch_size, num_frames, height, width = map(int, text.split("x"))
            rows.append(measure(path, (batch_size, num_frames, height, width), options.repeats, device))
            print(rows[-1], flush=True)
    write_result(options.output, {"rows": rows, "loss": "of the recipe, without LPIPS and discriminator"})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

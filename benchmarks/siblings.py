"""WF-VAE and IV-VAE on one thread of a CPU: before and after small convolutions went to oneDNN, and what is left.

    python benchmarks/siblings.py
    python benchmarks/siblings.py --models WF-VAE-compact --sizes 17x64x64 --output x.json

Each call takes turns with the same call as it was before (the kernel of PyTorch for small convolutions of a video), in
one process; `cpu_seconds` and `before` are medians of the processor time, `times_as_fast` the median of the ratios of
neighbours. `rate` is multiply-adds a second over those of a matrix product of 1024x1024 on the same thread, timed in
between; `convolutions` is the share of all kernels' time that convolutions have. So where both are close to 1, nothing
but fewer multiply-adds would make the network faster.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import MODELS
from torch.profiler import ProfilerActivity, profile

from diffusers_leanvae.benchmark.work import count_work
from diffusers_leanvae.evaluation.autoencoders import decode, encode
from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.models import video_layers


SIBLINGS = [name for name in MODELS if not name.startswith("LeanVAE")]
SMALL_INPUT = video_layers._SMALL_INPUT


def cpu_seconds(call: Callable[[], object], small_input: int = SMALL_INPUT) -> float:
    """Processor time of a call, where convolutions of at most `small_input` (channels, frames, rows) go to oneDNN."""
    video_layers._SMALL_INPUT = small_input
    started = time.process_time()
    call()
    return time.process_time() - started


def share_of_convolutions(call: Callable[[], object]) -> float:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    return sum(value for key, value in times.items() if "conv" in key) / sum(times.values())


def measure(model: str, size: tuple[int, int, int], num_repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    vae = MODELS[model].make()
    factors = torch.randn(2, 1024, 1024)
    work, sample, rows = count_work(vae, size), torch.rand(1, 3, *size) * 2 - 1, []
    for direction, function in (("encode", encode), ("decode", decode)):

        def call(sample: torch.Tensor = sample, function: Callable = function) -> torch.Tensor:
            return function(vae, sample)

        result = call()
        before, after, product = [], [], []
        for _ in range(num_repeats):
            product += [cpu_seconds(lambda: factors[0] @ factors[1])]
            before += [cpu_seconds(call, small_input=0)]
            after += [cpu_seconds(call)]
        rate = work[direction].multiply_adds / statistics.median(after) / (1024**3 / statistics.median(product))
        ratios = [old / new for old, new in zip(before, after, strict=True)]
        row = {"model": model, "video": list(size), "direction": direction}
        row |= {"cpu_seconds": round(statistics.median(after), 3), "before": round(statistics.median(before), 3)}
        row |= {"times_as_fast": round(statistics.median(ratios), 2)}
        row |= {"rate": round(rate, 2), "convolutions": round(share_of_convolutions(call), 2)}
        rows.append(row)
        print(json.dumps(row), flush=True)
        sample = result
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=SIBLINGS, choices=SIBLINGS)
    parser.add_argument("--sizes", nargs="+", help="without: 17 frames of 64, 128 and, for compact models, 256 pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default=str(Path(__file__).parents[1] / "results/bench_siblings.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with torch.inference_mode():
        for model in options.models:
            edges = (64, 128, 256) if model.endswith("compact") else (64, 128)
            for size in options.sizes or [f"17x{edge}x{edge}" for edge in edges]:
                rows += measure(model, tuple(int(part) for part in size.split("x")), options.repeats)
    write_result(options.output, {"rows": rows})


if __name__ == "__main__":
    main()

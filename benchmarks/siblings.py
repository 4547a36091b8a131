"""Time of WF-VAE and IV-VAE on a CPU in two checkouts of the package, side by side.

    git worktree add ../before 71fa563
    python benchmarks/siblings.py --before ../before/src --models WF-VAE-compact IV-VAE-compact --threads 1 2
    python benchmarks/siblings.py --before ../before/src --models WF-VAE-S-8ch --sizes 5x128x128 17x128x128

The file keeps its other rows. Each checkout runs in a process of its own, with the same random weights and the same
input; the two take turns, one call each. `seconds_before` and `seconds` are medians of the processor's time, which
other processes disturb less than that on the wall; `ratio` and `ratio_on_the_wall` are the medians of the ratios of
neighbours. `difference` is the largest between the two results, over the largest value. From one more call, under the
profiler: the share that convolutions have in the time, and their GFLOP/s next to those of a matrix product of
1024x1024 in the same process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memory import MODELS
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import diffusers_leanvae
from diffusers_leanvae.checks import parse_video_size
from diffusers_leanvae.evaluation.results import write_result


COMPACT, FULL = ("WF-VAE-compact", "IV-VAE-compact"), ("WF-VAE-S-8ch", "IV-VAE-4ch")
DIRECTIONS = ("encode", "decode")
CONVOLUTIONS = ("aten::mkldnn_convolution", "aten::slow_conv", "aten::_slow_conv")  # beginnings of kernels' names


# ---- one checkout, in a process of its own --------------------------------------------------------------------------


def serve() -> None:
    """Answer each request, a line of JSON on standard input, with a line on standard output."""
    cases: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = json.dumps(request["case"])
        if key not in cases:
            cases = {key: Case(**request["case"])}  # the case before is not asked for again
        print(json.dumps(cases[key].answer(request["question"], request.get("path"))), flush=True)


class Case:
    """One model in one direction at one size."""

    def __init__(self, class_name: str, config: dict[str, Any], size: list[int], direction: str, num_threads: int):
        torch.set_num_threads(num_threads)
        torch.manual_seed(0)
        self.vae = getattr(diffusers_leanvae, class_name)(**config).eval()
        frames, height, width = size
        shape = (1, 3, frames, height, width)
        self.is_encoding = direction == "encode"
        if not self.is_encoding:
            shape = (1, self.vae.latent_channels, self.vae.num_latent_frames(frames), height // 8, width // 8)
        self.x = torch.randn(shape).clamp(-1, 1)

    @torch.no_grad()
    def call(self) -> torch.Tensor:
        return self.vae.encode(self.x).latent_dist.parameters if self.is_encoding else self.vae.decode(self.x).sample

    def answer(self, question: str, path: str | None) -> dict[str, Any]:
        if question == "result":
            torch.save(self.call(), path)
            return {}
        if question == "profile":
            return self.profile()
        wall, processor = time.perf_counter(), time.process_time()
        self.call()
        return {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}

    def profile(self) -> dict[str, Any]:
        with FlopCounterMode(display=False) as counter:
            self.call()
        flops = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            self.call()
        times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
        convolutions = sum(micros for key, micros in times.items() if key.startswith(CONVOLUTIONS))
        factor = torch.randn(1024, 1024)
        product = []
        for _ in range(9):
            started = time.perf_counter()
            torch.mm(factor, factor)
            product.append(time.perf_counter() - started)
        return {
            "share": convolutions / sum(times.values()),
            "rate": flops / convolutions / 1e3,
            "product_rate": 2 * 1024**3 / statistics.median(product) / 1e9,
        }


# ---- both, in turns -------------------------------------------------------------------------------------------------


class Checkout:
    """The other end of [`serve`]."""

    def __init__(self, source: Path):
        environment = os.environ | {"PYTHONPATH": str(source)}
        command = [sys.executable, __file__, "--serve"]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, case: dict[str, Any], question: str, path: Path | None = None) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"case": case, "question": question, "path": None if path is None else str(path)}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            raise SystemExit(
                f"`--before` must be the `src` of a checkout that has the models, got a failure of {case}."
            )
        return json.loads(line)


def compare(checkouts: list[Checkout], model: str, case: dict[str, Any], num_repeats: int) -> dict[str, Any]:
    """Measure one row."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{index}.pt" for index in range(2)]
        for checkout, path in zip(checkouts, paths, strict=True):
            checkout.ask(case, "result", path)  # the first call, which is not timed
        results = [torch.load(path) for path in paths]
    times = [[checkout.ask(case, "time") for checkout in checkouts] for _ in range(num_repeats)]
    profiles = [checkout.ask(case, "profile") for checkout in checkouts]

    def ratio(clock: str) -> float:
        return round(statistics.median(before[clock] / after[clock] for before, after in times), 2)

    seconds = [round(statistics.median(pair[index]["processor"] for pair in times), 3) for index in range(2)]
    return {
        "model": model,
        "video": "x".join(map(str, case["size"])),
        "direction": case["direction"],
        "threads": case["num_threads"],
        "seconds_before": seconds[0],
        "seconds": seconds[1],
        "ratio": ratio("processor"),
        "ratio_on_the_wall": ratio("wall"),
        "difference": float(f"{(results[0] - results[1]).abs().max() / results[0].abs().max():.1e}"),
        "share_of_convolutions_before": round(profiles[0]["share"], 2),
        "share_of_convolutions": round(profiles[1]["share"], 2),
        "convolution_gflop_per_second_before": round(profiles[0]["rate"]),
        "convolution_gflop_per_second": round(profiles[1]["rate"]),
        "product_gflop_per_second": round(profiles[1]["product_rate"]),
    }


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("model", "video", "direction", "threads"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the folder `src` of the other checkout")
    parser.add_argument("--models", nargs="*", default=[*COMPACT, *FULL], choices=[*COMPACT, *FULL])
    parser.add_argument("--sizes", nargs="*", default=["17x128x128"], help="frames x height x width")
    parser.add_argument("--threads", nargs="*", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/bench_siblings.json"))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if options.before is None or not (options.before / "diffusers_leanvae").is_dir():
        parser.error(f"`--before` must be the folder `src` of a checkout, got {options.before}.")
    checkouts = [Checkout(source) for source in (options.before, Path(__file__).parents[1] / "src")]
    known = json.loads(options.output.read_text(encoding="utf-8"))["rows"] if options.output.exists() else []
    rows = {identity(row): row for row in known}
    try:
        for model in options.models:
            vae = MODELS[model].make()
            config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
            for size in (list(parse_video_size("--sizes", text)) for text in options.sizes):
                for num_threads in options.threads:
                    for direction in DIRECTIONS:
                        case = {
                            "class_name": type(vae).__name__,
                            "config": config,
                            "size": size,
                            "direction": direction,
                            "num_threads": num_threads,
                        }
                        row = compare(checkouts, model, case, options.repeats)
                        rows[identity(row)] = row
                        print(row, flush=True)
                        content = {"weights": "random", "dtype": "float32", "rows": list(rows.values())}
                        write_result(options.output, content)
    finally:
        for checkout in checkouts:
            checkout.process.kill()
    print(json.dumps(list(rows.values())))


if __name__ == "__main__":
    main()

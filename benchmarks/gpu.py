"""LeanVAE on a GPU: fused, in bfloat16 and float16, next to eager float32 and bfloat16 and the GPU's own peak.

    python benchmarks/gpu.py --output outputs/gpu/bench_gpu.json        what `make gpu` runs after the tests; minutes
    python benchmarks/gpu.py --rehearse --output x.json                 the same on a CPU, with a tiny model and video

`tflops` counts two operations for each multiply-add of the network; `share_of_peak` is that over `peak_tflops`, the
fastest large square matrix product of random numbers of the same dtype, measured first. The network's own products
are smaller than those: `time_over_floor` compares with them alone. `float32-tf32` is float32 with
`torch.set_float32_matmul_precision("high")`. The file is written after each measurement; the last line on standard
output is the result as JSON.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from diffusers_leanvae.benchmark.rounds import (
    KEYS,
    MeasurementError,
    Record,
    describe,
    run_rounds,
    summarize,
)
from diffusers_leanvae.benchmark.subjects import Subject, build_model
from diffusers_leanvae.benchmark.work import DIRECTIONS
from diffusers_leanvae.checks import parse_dtype, parse_video_size
from diffusers_leanvae.clock import seconds
from diffusers_leanvae.evaluation.results import write_result


TF32 = "float32-tf32"
SUBJECTS = (  # variant, dtype
    ("eager", "float32"),
    ("eager", TF32),
    ("eager", "bfloat16"),
    ("fused", TF32),
    ("fused", "bfloat16"),
    ("fused", "float16"),
    ("fused-torch", "bfloat16"),
    ("graphs", "bfloat16"),
    ("compiled", "bfloat16"),
)
SIZES = ("17x256x256", "17x512x512", "17x1080x1920")
REHEARSAL = {"model": "LeanVAE-tiny", "sizes": ["5x64x64", "9x64x96"], "peak_sizes": [64, 128]}


def peak_tflops(dtype: str, sizes: list[int], device: torch.device) -> float:
    """Speed of the fastest square matrix product; random numbers, because zeros take less power and run faster."""
    set_precision(dtype)
    best = 0.0
    for size in sizes:
        first, second = (torch.randn(size, size, device=device).to(to_torch(dtype)) for _ in range(2))
        out = torch.empty_like(first)
        times = [seconds(lambda a=first, b=second, out=out: torch.mm(a, b, out=out), device) for _ in range(13)]
        best = max(best, 2 * size**3 / statistics.median(times[3:]) / 1e12)
    return best


def set_precision(dtype: str) -> None:
    torch.set_float32_matmul_precision("high" if dtype == TF32 else "highest")


def to_torch(dtype: str) -> torch.dtype:
    return parse_dtype("dtype", "float32" if dtype == TF32 else dtype)


def finish(records: list[Record], peaks: dict[str, float]) -> list[dict[str, Any]]:
    """Rows with the figures that only a GPU's peak and the other rows give."""
    rows = [summarize(record) for record in records if "first" in record or "note" in record]
    times = {tuple(map(str, (row["variant"], row["dtype"], row["video"], row["direction"]))): row for row in rows}
    for row in rows:
        if "seconds" not in row:
            continue
        row["tflops"] = float(f"{2e-3 * row['giga_multiply_adds_per_second']:.4g}")
        row["share_of_peak"] = float(f"{row['tflops'] / peaks[row['dtype']]:.3g}")
        for dtype in ("float32", "bfloat16"):
            baseline = times.get(("eager", dtype, str(row["video"]), row["direction"]), {})
            if "seconds" in baseline:
                row[f"speed_up_over_eager_{dtype}"] = round(baseline["seconds"] / row["seconds"], 2)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), help="frames x height x width")
    # Compiling takes minutes for each size, which a borrowed GPU may not have: by name only.
    parser.add_argument("--variants", nargs="*", default=["eager", "fused", "fused-torch", "graphs"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for a row")
    parser.add_argument("--rehearse", action="store_true", help="tiny, and without a GPU if there is none")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu/bench_gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.rehearse:
        raise SystemExit("This benchmark needs a CUDA GPU; `--rehearse` runs it tiny on the CPU.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = REHEARSAL["sizes"] if options.rehearse else options.sizes
    model = REHEARSAL["model"] if options.rehearse else "LeanVAE-16ch"
    peak_sizes = REHEARSAL["peak_sizes"] if options.rehearse else [4096, 8192, 16384]
    dtypes = dict.fromkeys(dtype for _, dtype in SUBJECTS)
    peaks = {dtype: peak_tflops(dtype, peak_sizes, device) for dtype in dtypes}
    print({dtype: f"{peak:.4g} TFLOP/s at most" for dtype, peak in peaks.items()}, flush=True)
    records: list[Record] = [
        dict(zip(KEYS, (model, variant, dtype, torch.get_num_threads(), size, direction), strict=True))
        for size in (parse_video_size("--sizes", text) for text in sizes)
        for variant, dtype in SUBJECTS
        if variant in options.variants
        for direction in DIRECTIONS
    ]
    groups: dict[str, list[Record]] = {}
    for record in records:  # every dtype takes turns too: they are what is compared
        groups.setdefault(str(record["video"]), []).append(record)
    subjects: dict[tuple[str, str], Subject] = {}

    def measure(record: Record, is_first: bool) -> dict[str, Any]:
        variant, dtype = key = (record["variant"], record["dtype"])
        set_precision(dtype)
        try:
            if key not in subjects:
                subjects[key] = Subject(build_model(model, device, to_torch(dtype)), variant)
            return subjects[key].measure(record["direction"], tuple(record["video"]), is_first)
        except (RuntimeError, ValueError) as error:
            torch.cuda.empty_cache()
            raise MeasurementError(f"{type(error).__name__}: {error}".split("\n")[0][:200]) from error

    result: dict[str, Any] = {}

    def save(record: Record) -> None:
        print(describe(record), flush=True)
        rows = finish(records, peaks)
        result.update(rows=rows, peak_tflops={dtype: float(f"{peak:.4g}") for dtype, peak in peaks.items()})
        write_result(options.output, result)

    for group in groups.values():
        run_rounds(group, measure, options.repeats, options.budget, save)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

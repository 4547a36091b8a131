"""LeanVAE, WF-VAE and IV-VAE trained alike: the same clips, size, channels, optimizer and processor time.

    python benchmarks/compare_families.py train --train ../shared/videos/train --held-out ../shared/videos/val
    python benchmarks/compare_families.py measure --held-out ../shared/videos/val

Each has 16 latent channels, random weights at the start, AdamW, and steps for about two hours of one thread. One
IV-VAE starts from images (keyframe-based temporal compression), whose training takes a fourth of its time. Learning
rates were looked at for some dozens of steps only.

`train` goes on where it was stopped, and `--only` takes one run, so that several can go at once, or on several days:
what counts is the processor time of the steps, not that of the clock. `measure` writes `results/bench_families.json`:
quality by `val-17x256`, also by the place of a frame in its group, and the curves on smaller clips along the way.
With `--only` the file keeps its other runs, each of which names the processor that measured it.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compare_recipes import ROOT, read_json_lines

from diffusers_leanvae.evaluation.autoencoders import open_autoencoder
from diffusers_leanvae.evaluation.reconstruction import evaluate_reconstruction
from diffusers_leanvae.evaluation.reconstructors import AutoencoderReconstructor
from diffusers_leanvae.evaluation.results import provenance, write_result


COMMON = [
    "init=spec",
    "batch_size=2",
    "data.clip_sizes=[[17,64,64]]",
    "data.short_side=192",
    "data.procedural=0",
    "num_threads=1",
    "optimizer.name=adamw",
    "validation.size=128",
    "validation.num_videos=0",
]
NUM_VALIDATIONS = 12  # of each run
METRICS = ("psnr_frame_mean_rgb", "ssim_frame_mean_rgb")


class Run(NamedTuple):
    """One training run: its recipe, and what is changed in it besides `COMMON`."""

    recipe: str
    num_steps: int
    overrides: list[str]
    before: str | None = None  # the run whose model it starts from


RUNS = {
    "LeanVAE": Run("compact_16ch", 21000, ["optimizer.learning_rate=1e-3"]),
    "WF-VAE": Run("compact_wfvae_16ch", 6900, ["optimizer.learning_rate=5e-4"]),
    "IV-VAE": Run("compact_ivvae_16ch", 1290, ["optimizer.learning_rate=5e-4"]),
    "images": Run(
        "compact_ivvae_image_8ch",
        640,
        ["optimizer.learning_rate=5e-4", "batch_size=32", "data.clip_sizes=[[1,64,64]]"],
    ),
    "IV-VAE from images": Run("compact_ivvae_16ch", 960, ["optimizer.learning_rate=5e-4", "init=image"], "images"),
}


def folder_of(options: argparse.Namespace, name: str) -> Path:
    return Path(options.runs) / name.lower().replace(" ", "_")


def train(options: argparse.Namespace, name: str) -> None:
    """Train one run, after the one that it starts from, unless that is done."""
    run, output = RUNS[name], folder_of(options, name)
    if (output / "vae" / "config.json").is_file():
        return
    overrides = [*COMMON, *run.overrides]
    if run.before is not None:
        train(options, run.before)
        overrides.append(f"image_vae.path={folder_of(options, run.before) / 'vae'}")
    script, recipe = ROOT / "training" / "train_vae.py", ROOT / "training" / "configs" / f"{run.recipe}.yaml"
    command = [sys.executable, str(script), str(recipe), f"data.train={options.train}", f"output={output}"]
    every = run.num_steps // NUM_VALIDATIONS
    command += [f"validation.folder={options.held_out}", f"validation.every={every}", *overrides]
    command += [f"num_steps={run.num_steps}", f"save_every={max(every // 4, 1)}"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def cpu_hours(output: Path, num_steps: float = math.inf) -> float:
    """Processor hours of the first steps of a run, all of them by default; a log has means over some steps each."""
    total, newest = 0.0, 0
    for record in read_json_lines(output / "log.jsonl"):
        total += max(min(record["step"], num_steps) - newest, 0) * record["cpu_seconds_per_step"] / 3600
        newest = record["step"]
    return total


def measure(options: argparse.Namespace, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of a trained model, and its curve."""
    run, output = RUNS[name], folder_of(options, name)
    before = 0.0 if run.before is None else cpu_hours(folder_of(options, run.before))
    vae, about = open_autoencoder(str(output / "vae"))
    quality = evaluate_reconstruction(AutoencoderReconstructor(vae, name, about=about), options.held_out).totals
    row: dict[str, Any] = {"run": name, "num_parameters": about["num_parameters"]}
    row |= {"num_steps": run.num_steps, "cpu_hours": round(before + cpu_hours(output), 2)}
    row |= {key: round(value, 4) for key, value in quality.items() if key.startswith(METRICS)}
    row["processor"] = provenance()["processor"]
    curve = [
        {"step": record["step"], "cpu_hours": round(before + cpu_hours(output, record["step"]), 3)}
        | {key: round(record[key], 4) for key in METRICS}
        for record in read_json_lines(output / "validation.jsonl")
    ]
    return row, curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["train", "measure"])
    parser.add_argument("--train", help="folder of training videos")
    parser.add_argument("--held-out", required=True, help="folder of other videos")
    parser.add_argument("--only", choices=list(RUNS), help="one run, and what it starts from")
    parser.add_argument("--runs", default="runs/families", help="folder of the training runs")
    parser.add_argument("--output", default=str(ROOT / "results/bench_families.json"))
    options = parser.parse_args()
    names = [options.only] if options.only else [name for name in RUNS if name != "images"]
    if options.action == "train":
        if options.train is None:
            parser.error("--train is needed for `train`")
        for name in names:
            train(options, name)
        return
    torch.set_num_threads(2)
    measured = {name: measure(options, name) for name in names}
    path = Path(options.output)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": [], "curves": {}}
    rows = {row["run"]: row for row in kept["rows"]} | {name: row for name, (row, _) in measured.items()}
    curves = kept["curves"] | {name: curve for name, (_, curve) in measured.items()}
    runs = {name: run._asdict() for name, run in RUNS.items()}
    write_result(path, {"rows": list(rows.values()), "curves": curves, "all_runs": COMMON, "runs": runs})
    print(json.dumps(list(rows.values())))


if __name__ == "__main__":
    main()

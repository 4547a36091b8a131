"""Comparison of ways to train a latent video generator: the same model, data, steps and seed for each.

    leanvae encode-dataset ../shared/videos/train latents/train --clip-size 17x128x128 --short-side 160 --num-crops 12
    leanvae encode-dataset ../shared/videos/val latents/val --clip-size 17x128x128 --short-side 160 --num-crops 6
    python benchmarks/generation_recipes.py latents/train latents/val --vae compact-16ch

Losses of different objectives cannot be compared; what a model says of the clean latents can. Every averaged model
denoises the same held-out latents, with the same noise, at the same signal-to-noise ratios: those of the line
`(1 - level) * latents + level * noise`, for Latte's schedule the timestep with the nearest ratio. `error` is the mean
square error of the predicted clean latents, normalised per channel: 1 is what predicting zero costs. Writes
`results/bench_generation_recipes.json`.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_leanvae import LeanVAELattePipeline
from diffusers_leanvae.data.latent_shards import LatentFolder
from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.latents import normalize_latents
from diffusers_leanvae.losses.diffusion import EpsilonObjective, FlowMatchingObjective


ROOT = Path(__file__).resolve().parent.parent
RECIPES: dict[str, list[str]] = {
    "epsilon": ["objective.name=epsilon"],
    "epsilon, min-SNR": ["objective.name=epsilon", "objective.min_snr_gamma=5.0"],
    "flow": ["objective.name=flow"],
    "flow, logit-normal": ["objective.name=flow", "objective.sampling=logit_normal"],
    "flow, logit-normal, aligned": [
        "objective.name=flow",
        "objective.sampling=logit_normal",
        "representation.weight=0.5",
        "representation.after_block=4",
        "representation.hidden_dim=512",
    ],
}
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
MODEL = "{num_attention_heads: 6, attention_head_dim: 64, num_layers: 8, patch_size: 2}"


def train_all(options: argparse.Namespace, names: list[str]) -> dict[str, Path]:
    """Pipelines by recipe; runs that ended before are not repeated. All at once with `--together`."""
    folders: dict[str, Path] = {}
    running: list[subprocess.Popen] = []
    for name in names:
        output = Path(options.runs) / name.replace(", ", "_")
        folders[name] = output / "pipeline"
        command = [sys.executable, "-m", "diffusers_leanvae.training.train_lvdm", options.recipe]
        command += [f"output={output}", f"vae={options.vae}", f"num_steps={options.num_steps}"]
        command += [f"data={{kind: latents, path: {options.train}}}", f"num_threads={options.threads}"]
        command += ["num_classes=null", "variant=null", f"model={MODEL}", f"batch_size={options.batch_size}"]
        command += ["objective.is_stratified=true", "optimizer.learning_rate=1e-3", "optimizer.schedule=cosine"]
        command += ["optimizer.num_warmup_steps=100", "optimizer.max_grad_norm=1.0", "ema_decay=0.995"]
        command += ["validation.data=null", "validation.num_samples=0", "save_every=100000", "log_every=50"]
        if not folders[name].is_dir():
            running.append(subprocess.Popen([*command, *RECIPES[name]]))
        if not options.together:
            wait_for(running)
    wait_for(running)
    return folders


def wait_for(running: list[subprocess.Popen]) -> None:
    while running:
        if status := running[0].wait():
            raise SystemExit(f"A run ended with status {status}: {running[0].args}")
        running.pop(0)


def load_latents(folder: str, vae: Any, device: torch.device) -> torch.Tensor:
    items = LatentFolder(folder)
    return normalize_latents(torch.stack([items[i].latents for i in range(len(items))]).to(device), vae.config)


@torch.no_grad()
def denoising_errors(
    transformer: Any, scheduler: Any, latents: torch.Tensor, batch_size: int = 32
) -> dict[str, float]:
    """Mean square error of predicted clean latents, by noise level; the scheduler tells the objective."""
    is_flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    objective = FlowMatchingObjective() if is_flow else EpsilonObjective()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents.device)
    errors = {}
    for level in LEVELS:
        if is_flow:
            timestep = objective.timesteps_at(torch.tensor([level]))
        else:
            signal = scheduler.alphas_cumprod.double()
            distance = (signal / (1 - signal)).log() - 2 * math.log((1 - level) / level)
            timestep = distance.abs().argmin()[None]
        total = 0.0
        for clean, drawn in zip(latents.split(batch_size), noise.split(batch_size), strict=True):
            timesteps = timestep.to(clean.device).expand(len(clean))
            noisy = objective.add_noise(clean, drawn, timesteps)
            output = transformer(noisy, timesteps, None).sample.float()
            if isinstance(objective, EpsilonObjective):
                predicted = objective.model_distribution(output, noisy, timesteps)[2]
            else:
                predicted = noisy - level * output
            total += (predicted - clean).square().mean().item() * len(clean)
        errors[str(level)] = round(total / len(latents), 5)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="latents that `leanvae encode-dataset` wrote")
    parser.add_argument("held_out", help="latents of other clips")
    parser.add_argument("--vae", default="compact-16ch", help="the autoencoder of the latents")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--recipe", default=str(ROOT / "training/configs/lvdm_smoke.yaml"), help="the rest of it")
    parser.add_argument("--num-steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--together", action="store_true", help="train all at once, for a GPU that one cannot fill")
    parser.add_argument("--runs", default="runs/generation_recipes")
    parser.add_argument("--output", default=str(ROOT / "results/bench_generation_recipes.json"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for name, folder in train_all(options, options.recipes).items():
        pipeline = LeanVAELattePipeline.from_pretrained(folder).to(device)
        latents = load_latents(options.held_out, pipeline.vae, device)
        errors = denoising_errors(pipeline.transformer, pipeline.scheduler, latents)
        log = (folder.parent / "log.jsonl").read_text(encoding="utf-8").splitlines()
        seconds = json.loads(log[-1])["seconds_per_step"]
        num_parameters = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
        row = {"recipe": name, "mean_error": round(sum(errors.values()) / len(errors), 5)}
        rows.append(row | {f"error_{level}": error for level, error in errors.items()})
        rows[-1] |= {
            "num_parameters": num_parameters,
            "num_steps": options.num_steps,
            "seconds_per_step": round(seconds, 4),
        }
        print(rows[-1], flush=True)
    result = {"rows": rows, "num_held_out": len(latents), "batch_size": options.batch_size, "model": MODEL}
    write_result(options.output, result | {"vae": options.vae, "trained_together": options.together})
    print(json.dumps(result))


if __name__ == "__main__":
    main()

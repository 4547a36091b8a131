"""The same small training run with one thing changed at a time: what the change is worth.

    python benchmarks/compare_recipes.py start --train ../shared/videos/train --held-out ../shared/videos/val
    python benchmarks/compare_recipes.py latents --train ../shared/videos/train --held-out ../shared/videos/val
    python benchmarks/compare_recipes.py alignment --train ../shared/videos/train --held-out ../shared/videos/val

`start`: initialisation and optimizer; the validation PSNR along the way, and the steps that each run takes to reach
certain values of it, the last of which is what principal components give at step 0. `latents`: each regulariser
against the plain recipe on the same number of steps; reconstruction, and how easy the latents are for diffusion
(`evaluation/diffusability.py`).
`alignment`: a student of a small random `AutoencoderKLWan` (`scripts/make_random_wan.py`), before and after.

Runs are those of `training/train_vae.py` with `compact_16ch.yaml` at a third of its width, so that a comparison takes
minutes and not days. `start --as-they-are` takes the curves of runs that were stopped. Results go to
`results/bench_COMPARISON.json`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from diffusers_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.data import pixels_to_sample
from diffusers_leanvae.evaluation.diffusability import DiffusabilityProtocol, load_clips, measure_diffusability
from diffusers_leanvae.evaluation.reconstruction import evaluate_reconstruction
from diffusers_leanvae.evaluation.reconstructors import AutoencoderReconstructor
from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.losses.alignment import Teacher


ROOT = Path(__file__).resolve().parent.parent
SMALL = ["model.low_freq_dim=16", "model.high_freq_dim=48", "ema_decay=0.99", "num_accumulation_steps=1"]
MUON = ["optimizer.name=muon", "optimizer.learning_rate=1e-3", "optimizer.num_warmup_steps=20"]
ADAMW = ["optimizer.name=adamw", "optimizer.learning_rate=5e-4", "optimizer.num_warmup_steps=20"]
VARIANTS: dict[str, dict[str, list[str]]] = {
    "start": {
        "principal components, muon": ["init=pca", *MUON],
        "specification, muon": ["init=spec", *MUON],
        "principal components, adamw": ["init=pca", *ADAMW],
        # The best of those tried for 200 steps from here: adamw at 2e-3, muon at 1e-3 and 1e-2.
        "specification, adamw": [
            "init=spec",
            *ADAMW,
            "optimizer.learning_rate=2e-3",
            "num_steps=4000",
            "validation.every=200",
        ],
    },
    "latents": {
        "plain": [],
        "EQ-VAE (2502.09509), in time too": ["regularization.equivariance_probability=0.5"],
        "SSVAE local correlation (2512.05394)": ["regularization.local_correlation=0.02"],
        "SSVAE latent masking (2512.05394)": ["regularization.mask_latents=true"],
        "low pass (aim of LC-VAE, 2604.16479)": ["regularization.low_pass=0.1"],
    },
    "alignment": {"before": ["num_steps=1", "optimizer.learning_rate=0", "ema_decay=0"], "after": []},
}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(options: argparse.Namespace, name: str, overrides: list[str], every: int | None = None) -> Path:
    """The output folder of a run, validated every `every` steps; what is there already is not run again."""
    output = Path(options.runs) / options.comparison / "".join(c if c.isalnum() else "_" for c in name)
    command = [
        sys.executable,
        str(ROOT / "training" / "train_vae.py"),
        str(ROOT / "training/configs/compact_16ch.yaml"),
    ]
    folder = "null" if every is None else options.held_out
    command += [f"data.train={options.train}", f"validation.folder={folder}", f"output={output}", *SMALL]
    command += [
        f"num_steps={options.num_steps}",
        f"validation.every={every or 1}",
        "save_every=100000",
        "log_every=20",
    ]
    command += ["validation.num_videos=0", f"num_threads={options.threads}", *overrides]
    if not (output / "vae" / "config.json").is_file() and not options.as_they_are:
        subprocess.run(command, check=True)
    return output


def compare_starts(options: argparse.Namespace) -> dict[str, Any]:
    curves = {}
    for name, overrides in VARIANTS["start"].items():
        output = train(options, name, overrides, every=options.num_steps // 8)
        curves[name] = {r["step"]: r["psnr_frame_mean_rgb"] for r in read_json_lines(output / "validation.jsonl")}
    goal = next(iter(curves.values()))[0]
    rows, marks = [], [20.0, 22.0, 24.0, 26.0, 28.0, goal]
    for name, curve in curves.items():
        last = max(curve)
        row: dict[str, Any] = {"run": name, "psnr_at_start": round(curve[0], 2), "num_steps": last}
        row["psnr_at_end"] = round(curve[last], 2)
        for mark in marks:
            reached = next((step for step, psnr in curve.items() if psnr >= mark), None)
            row[f"steps_to_{mark:.2f}_db"] = f"more than {last}" if reached is None else reached
        rows.append(row)
    return {"rows": rows, "goal_psnr": goal, "curves": curves}


def compare_latents(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    protocol = DiffusabilityProtocol(num_steps=options.num_denoiser_steps)
    size = (17, 64, 64)
    train_clips = load_clips(options.train, options.num_clips, size, protocol.seed)
    held_out_clips = load_clips(options.held_out, 56, size, protocol.seed)
    rows, details = [], {}
    for name, overrides in VARIANTS["latents"].items():
        output = train(options, name, ["init=pca", *MUON, *overrides])
        vae = AutoencoderKLLeanVAE.from_pretrained(output / "vae").eval()
        quality = evaluate_reconstruction(AutoencoderReconstructor(vae, name), options.held_out).totals
        details[name] = probe = measure_diffusability(vae, train_clips, held_out_clips, protocol)
        print(name, probe, flush=True)
        rows.append({"run": name, "psnr": round(quality["psnr_frame_mean_rgb"], 2)})
        rows[-1]["ssim"] = round(quality["ssim_frame_mean_rgb"], 4)
        rows[-1]["denoising_loss"] = probe["denoising_loss"]
        levels = {level["noise_level"]: round(level["psnr_frame_mean_rgb"], 2) for level in probe["levels"]}
        rows[-1] |= {f"psnr_from_noise_{level}": psnr for level, psnr in levels.items()}
    return {"rows": rows, "probe": details}


@torch.no_grad()
def compare_alignment(options: argparse.Namespace) -> dict[str, Any]:
    """Distance of the student's latents from the teacher's, and what the student decodes the teacher's to."""
    wan = Path(options.runs) / "random_wan"
    if not wan.is_dir():
        subprocess.run([sys.executable, str(ROOT / "scripts" / "make_random_wan.py"), str(wan)], check=True)
    teacher = Teacher.from_pretrained(wan)
    sample = pixels_to_sample(load_clips(options.held_out, 28, (17, 64, 64), seed=0))
    expected = torch.cat([teacher.encode(part) for part in sample.split(4)])
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (teacher.latents_mean, teacher.latents_std))
    rows = []
    for name, overrides in VARIANTS["alignment"].items():
        common = ["init=spec", "sample_posterior=false", "model.pixel_factor=1.0", f"teacher.path={wan}", *MUON]
        common += ["data.clip_sizes=[[17,64,64]]", "batch_size=2"]  # the teacher costs more than the student
        vae: Any = AutoencoderKLLeanVAE.from_pretrained(train(options, name, [*common, *overrides]) / "vae").eval()
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in sample.split(4)])
        decoded = torch.cat([vae.decode(part).sample for part in expected.split(4)]).clamp(-1, 1)
        error = ((latents - expected) / std).square().mean().sqrt().item()
        spread = ((expected - mean) / std).square().mean().sqrt().item()
        psnr = -10 * ((decoded - sample) / 2).square().mean(dim=(1, 3, 4)).log10().mean().item()
        rows.append({"run": name, "latent_rms_error": round(error, 4), "teacher_latent_rms": round(spread, 4)})
        rows[-1]["psnr_of_decoded_teacher_latents"] = round(psnr, 2)
    factor = rows[0]["latent_rms_error"] / rows[1]["latent_rms_error"]
    return {"rows": rows, "latent_error_fell_by_factor": f"{factor:.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=list(VARIANTS))
    parser.add_argument("--train", required=True, help="folder of training videos")
    parser.add_argument("--held-out", required=True, help="folder of other videos")
    parser.add_argument("--num-steps", type=int, default=320)
    parser.add_argument("--num-clips", type=int, default=512, help="training clips of the denoiser")
    parser.add_argument("--num-denoiser-steps", type=int, default=DiffusabilityProtocol.num_steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--as-they-are", action="store_true", help="train nothing: runs as far as they are")
    parser.add_argument("--runs", default="runs/compare", help="folder of the training runs")
    parser.add_argument("--output", help="results/bench_COMPARISON.json by default")
    options = parser.parse_args()
    compare = {"start": compare_starts, "latents": compare_latents, "alignment": compare_alignment}[options.comparison]
    changes = {name: " ".join(overrides) for name, overrides in VARIANTS[options.comparison].items()}
    result = compare(options) | {"num_steps": options.num_steps, "all_runs": SMALL, "changes": changes}
    write_result(options.output or ROOT / f"results/bench_{options.comparison}.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

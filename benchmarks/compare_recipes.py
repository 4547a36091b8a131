"""The same small training run with one thing changed at a time: what the change is worth.

    python benchmarks/compare_recipes.py start --train ../shared/videos/train --held-out ../shared/videos/val
    python benchmarks/compare_recipes.py latents --train ../shared/videos/train --held-out ../shared/videos/val
    python benchmarks/compare_recipes.py alignment --train ../shared/videos/train --held-out ../shared/videos/val
    python benchmarks/compare_recipes.py recipes --train ../shared/videos/train
    python benchmarks/compare_recipes.py compression --train ../shared/videos/train
    python benchmarks/compare_recipes.py clips --train ../shared/videos/train

`start`: initialisation and optimizer; the validation PSNR along the way, and the steps that each run takes to reach
certain values of it, the last of which is what principal components give at step 0. `latents`: each regulariser
against the plain recipe on the same number of steps; reconstruction, and how easy the latents are for diffusion
(`evaluation/diffusability.py`).
`alignment`: a student of a small random `AutoencoderKLWan` (`scripts/make_random_wan.py`), before and after.
`recipes`: everything that a recipe may choose, one thing at a time and each with the same processor time
(`--cpu-minutes`, from which the number of steps follows by the speed of the first ones); `--only` takes some runs, and
the file keeps the others. `compression`: sizes of patches and latents, likewise, from principal components.
`clips`: PSNR of each held-out clip, and how far colours come back, for the runs of `recipes` that are there, of which
nothing is trained again; the file keeps the others.
All three choose recipes, so they leave the validation clips alone: without `--held-out` the clips of every sixth
source are held out of the training clips.

Runs are those of `training/train_vae.py` with `compact_16ch.yaml` at a third of its width, so that a comparison takes
minutes and not days. `start --as-they-are` takes the curves of runs that were stopped. Results go to
`results/bench_COMPARISON.json`.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from diffusers_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.data import pixels_to_sample
from diffusers_leanvae.evaluation.autoencoders import open_autoencoder
from diffusers_leanvae.evaluation.diffusability import DiffusabilityProtocol, load_clips, measure_diffusability
from diffusers_leanvae.evaluation.protocols import PROTOCOLS
from diffusers_leanvae.evaluation.reconstruction import evaluate_reconstruction
from diffusers_leanvae.evaluation.reconstructors import AutoencoderReconstructor
from diffusers_leanvae.evaluation.results import provenance, write_result
from diffusers_leanvae.losses.alignment import Teacher
from diffusers_leanvae.models.video_autoencoder import VideoAutoencoder
from diffusers_leanvae.video_io.inputs import list_videos


ROOT = Path(__file__).resolve().parent.parent
SMALL = ["ema_decay=0.99", "num_accumulation_steps=1", "data.clip_sizes=[[17,96,96]]", "data.procedural=0"]
SMALL_MODEL = ["model.low_freq_dim=16", "model.high_freq_dim=48"]
MUON = ["optimizer.name=muon", "optimizer.learning_rate=1e-3", "optimizer.num_warmup_steps=20"]
ADAMW = ["optimizer.name=adamw", "optimizer.learning_rate=5e-4", "optimizer.num_warmup_steps=20"]
CONSTANT = ["optimizer.schedule=constant", "ema_power=6.94", "save_every=80", "keep_checkpoints=1000"]
SCHEDULE_FREE = ["optimizer.name=schedule_free", "optimizer.schedule=constant"]
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
    "recipes": {
        "base": [],
        "base, another seed": ["seed=1"],
        "base, a third seed": ["seed=2"],
        "base, once more": [],
        "bfloat16": ["mixed_precision=bf16"],
        "learning rate 5e-4": ["optimizer.learning_rate=5e-4"],
        "learning rate 2e-3": ["optimizer.learning_rate=2e-3"],
        "muon 1e-3": ["optimizer.name=muon"],
        "principal components, muon 1e-3": ["init=pca", "optimizer.name=muon"],
        "no average of weights": ["ema_decay=0"],
        "average by a power, 6.94": ["ema_power=6.94"],
        "average by a power, 16.97": ["ema_power=16.97"],
        "constant rate": ["optimizer.schedule=constant"],
        "constant rate, average by a power, 6.94": CONSTANT,
        "constant rate, average afterwards, 3": [*CONSTANT, "post_hoc_power=3"],
        "constant rate, average afterwards, 16.97": [*CONSTANT, "post_hoc_power=16.97"],
        "constant rate, average afterwards, 35": [*CONSTANT, "post_hoc_power=35"],
        "constant rate 2e-3, average by a power, 6.94": [*CONSTANT, "optimizer.learning_rate=2e-3"],
        "constant rate 2e-3, average afterwards, 16.97": [
            *CONSTANT,
            "optimizer.learning_rate=2e-3",
            "post_hoc_power=16.97",
        ],
        "schedule-free": SCHEDULE_FREE,
        "schedule-free 2e-3": [*SCHEDULE_FREE, "optimizer.learning_rate=2e-3"],
        "schedule-free 4e-3": [*SCHEDULE_FREE, "optimizer.learning_rate=4e-3"],
        "schedule-free 8e-3": [*SCHEDULE_FREE, "optimizer.learning_rate=8e-3"],
        "4 clips": ["batch_size=4"],
        "crops of 96": ["batch_size=1", "data.clip_sizes=[[17,96,96]]"],
        "9 frames, 4 clips": ["batch_size=4", "data.clip_sizes=[[9,64,64]]"],
        "larger pictures": ["data.short_side=288"],
        "a fourth drawn": ["data.procedural=0.25"],
        "L1 alone": ["loss.log_mse=0"],
        "log-MSE alone": ["loss.l1_pixel=0", "loss.l1_low=0", "loss.l1_high=0"],
        "log-MSE 1.0": ["loss.log_mse=1.0"],
        "learning rate 2e-3, log-MSE 1.0, bands together": [
            "optimizer.learning_rate=2e-3",
            "loss.log_mse=1.0",
            "model.patch_embedding_type=joint",
        ],
        "these three, constant rate, average by a power, 16.97": [
            *CONSTANT,
            "ema_power=16.97",
            "optimizer.learning_rate=2e-3",
            "loss.log_mse=1.0",
            "model.patch_embedding_type=joint",
        ],
        "Charbonnier for L1": ["loss.l1_pixel=0", "loss.charbonnier=1.0"],
        "no sub-bands": ["loss.l1_low=0", "loss.l1_high=0"],
        "latent consistency 0.1": ["loss.latent_consistency=0.1"],
        "no noise of the posterior": ["sample_posterior=false"],
        "1 iteration": ["model.num_ista_iterations=1"],
        "no iteration, 2 more layers": ["model.num_ista_iterations=0", "model.num_fusion_layers=6"],
        "wide: 24 + 72, 2 fusion layers": [
            "model.low_freq_dim=24",
            "model.high_freq_dim=72",
            "model.num_fusion_layers=2",
            "model.num_branch_layers=1",
            "model.num_ista_iterations=1",
        ],
        "deep: 12 + 36, 10 fusion layers": [
            "model.low_freq_dim=12",
            "model.high_freq_dim=36",
            "model.num_fusion_layers=10",
        ],
        "both bands of equal width": ["model.low_freq_dim=32", "model.high_freq_dim=32"],
        "bands together": ["model.patch_embedding_type=joint"],
        "no wavelet": ["model.patch_embedding_type=no_wavelet"],
        "decoded twice": [],
        "crops of 64, then of 96": [],
        "then a discriminator": [],
        "WF-VAE of as many multiply-adds": [
            "model.base_channels=4",
            "model.encoder_flow_channels=8",
            "model.decoder_flow_channels=8",
        ],
        "IV-VAE of fewer multiply-adds": ["model.base_channels=1"],  # two channels have more than twice as many
    },
    "compression": {
        "4x8x8, 4 channels": ["model.latent_channels=4"],
        "4x8x8, 16 channels": ["model.latent_channels=16"],
        "8x8x8, 8 channels": ["model.patch_size=[4,4,4]", "model.latent_channels=8"],
        "8x8x8, 16 channels": ["model.patch_size=[4,4,4]", "model.latent_channels=16"],
        # Principal components need branches of at least as many channels as the latents have.
        "8x8x8, 32 channels": ["model.patch_size=[4,4,4]", "model.latent_channels=32", "model.low_freq_dim=32"],
        "4x16x16, 16 channels": ["model.patch_size=[2,8,8]", "model.latent_channels=16"],
        "4x16x16, 48 channels": ["model.patch_size=[2,8,8]", "model.latent_channels=48", "model.low_freq_dim=48"],
        "4x16x16, 64 channels": [
            "model.patch_size=[2,8,8]",
            "model.latent_channels=64",
            "model.low_freq_dim=64",
            "model.high_freq_dim=64",
        ],
    },
    "alignment": {"before": ["num_steps=1", "optimizer.learning_rate=0", "ema_decay=0"], "after": []},
}


DECODED_TWICE = {"decoded twice": "base"}  # no training: the model of another run
# No training either: another average, from the checkpoints of another run.
AVERAGED_AFTERWARDS = {
    "constant rate, average afterwards, 3": "constant rate, average by a power, 6.94",
    "constant rate, average afterwards, 16.97": "constant rate, average by a power, 6.94",
    "constant rate, average afterwards, 35": "constant rate, average by a power, 6.94",
    "constant rate 2e-3, average afterwards, 16.97": "constant rate 2e-3, average by a power, 6.94",
}
OTHER_FILES = {
    "WF-VAE of as many multiply-adds": "compact_wfvae_16ch",
    "IV-VAE of fewer multiply-adds": "compact_ivvae_16ch",
}
# What goes on after two thirds of the time from the averaged weights, with a third of the learning rate.
LAST_THIRD = {
    "crops of 64, then of 96": ["batch_size=1", "data.clip_sizes=[[17,96,96]]"],
    "then a discriminator": [
        "adversarial.weight=0.05",
        "adversarial.is_adaptive=true",
        "adversarial.kind=3d",
        "adversarial.num_filters=16",
        "adversarial.learning_rate=2e-4",
    ],
}
LOG_EVERY = 20
LEARNING_RATE = 1e-3
_CLIPS = ["ema_decay=0.998", "batch_size=2", "data.clip_sizes=[[17,64,64]]", "data.short_side=192"]
BASES = {
    "recipes": [
        "init=spec",
        *ADAMW,
        f"optimizer.learning_rate={LEARNING_RATE}",
        "optimizer.num_warmup_steps=50",
        *_CLIPS,
    ],
    "compression": ["init=pca", *MUON, "optimizer.num_warmup_steps=50", *_CLIPS],
}
# Weights of red, green and blue.
COLOR_AXES = {"grey": (1 / 3, 1 / 3, 1 / 3), "red_blue": (0.5, 0, -0.5), "green_magenta": (-0.5, 1, -0.5)}
# Columns of the tables at equal time, by the names of the measures.
COLUMNS = {
    "psnr": "psnr_frame_mean_rgb",
    "ssim": "ssim_frame_mean_rgb",
    "vmaf": "vmaf_v0_6_1_frame_mean",
    "flicker": "flicker_mae_255",
    "grid": "grid_ratio_window_mean_rgb",
    "flat_std": "flat_std_255_patch16",
    "ghost": "ghost_mae_255",
}
EQUAL_TIME_PROTOCOL = replace(PROTOCOLS["val-17x256"], metrics=("psnr", "ssim", "vmaf", "flicker", "grid", "ghost"))
NOISE = "psnr_from_noise_0.5"  # of clips decoded from what a denoiser makes of half noise: comparable between sizes


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_folder(options: argparse.Namespace, comparison: str, name: str) -> Path:
    return Path(options.runs) / comparison / "".join(c if c.isalnum() else "_" for c in name)


def train(
    options: argparse.Namespace,
    name: str,
    overrides: list[str],
    every: int | None = None,
    recipe: str = "compact_16ch",
) -> Path:
    """The output folder of a run, validated every `every` steps; what is there already is not run again."""
    output = run_folder(options, options.comparison, name)
    command = [sys.executable, str(ROOT / "training" / "train_vae.py"), f"{ROOT}/training/configs/{recipe}.yaml"]
    folder = "null" if every is None else options.held_out
    command += [f"data.train={options.train}", f"validation.folder={folder}", f"output={output}", *SMALL]
    command += SMALL_MODEL if recipe == "compact_16ch" else []
    command += [
        f"num_steps={options.num_steps}",
        f"validation.every={every or 1}",
        "save_every=100000",
        f"log_every={LOG_EVERY}",
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


def denoiser_probe(options: argparse.Namespace) -> Callable[[VideoAutoencoder], dict[str, Any]]:
    """How easy the latents of a model are for diffusion, by the same clips and the same denoiser for each model."""
    torch.set_num_threads(options.threads)
    protocol = DiffusabilityProtocol(num_steps=options.num_denoiser_steps)
    size = (17, 64, 64)
    train_clips = load_clips(options.train, options.num_clips, size, protocol.seed)
    held_out_clips = load_clips(options.held_out, 56, size, protocol.seed)
    return lambda vae: measure_diffusability(vae, train_clips, held_out_clips, protocol)


def levels_of(probe: dict[str, Any]) -> dict[str, float]:
    return {
        f"psnr_from_noise_{level['noise_level']}": round(level["psnr_frame_mean_rgb"], 2) for level in probe["levels"]
    }


def compare_latents(options: argparse.Namespace) -> dict[str, Any]:
    measure = denoiser_probe(options)
    rows, details = [], {}
    for name, overrides in VARIANTS["latents"].items():
        output = train(options, name, ["init=pca", *MUON, *overrides])
        vae = AutoencoderKLLeanVAE.from_pretrained(output / "vae").eval()
        quality = evaluate_reconstruction(AutoencoderReconstructor(vae, name), options.held_out).totals
        details[name] = probe = measure(vae)
        print(name, probe, flush=True)
        rows.append({"run": name, "psnr": round(quality["psnr_frame_mean_rgb"], 2)})
        rows[-1]["ssim"] = round(quality["ssim_frame_mean_rgb"], 4)
        rows[-1]["denoising_loss"] = probe["denoising_loss"]
        rows[-1] |= levels_of(probe)
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


class TwiceDecodingReconstructor(AutoencoderReconstructor):
    """An autoencoder whose latents are decoded again after adding what encoding the first result has lost of them."""

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        first = super()._decode(latents).to(latents.dtype)
        return super()._decode(2 * latents - self._encode(first))


def open_reconstructor(folder: Path, name: str) -> AutoencoderReconstructor:
    vae, about = open_autoencoder(str(folder))
    kind = TwiceDecodingReconstructor if name in DECODED_TWICE else AutoencoderReconstructor
    return kind(vae, name, about=about)


def train_for(options: argparse.Namespace, name: str, overrides: list[str], minutes: float) -> Path:
    """The output folder of a run whose steps take so many minutes of a processor."""
    recipe = OTHER_FILES.get(name, "compact_16ch")
    look = train(options, f"{name}, speed", [*overrides, "num_steps=48", "log_every=24"], recipe=recipe)
    seconds = read_json_lines(look / "log.jsonl")[-1]["cpu_seconds_per_step"]
    num_steps = LOG_EVERY * max(round(minutes * 60 / seconds / LOG_EVERY), 1)
    return train(options, name, [*overrides, f"num_steps={num_steps}"], recipe=recipe)


def average_afterwards(options: argparse.Namespace, name: str, overrides: list[str], run: Path) -> Path:
    """The output folder of a run that is a finished one but for the average that it exports."""
    folder, last = run_folder(options, options.comparison, name), read_json_lines(run / "log.jsonl")[-1]["step"]
    if not folder.is_dir():
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("vae"))
    return train(options, name, [*overrides, f"num_steps={last}"])


def compare_at_equal_time(options: argparse.Namespace) -> dict[str, Any]:
    """Quality of each run after the same processor time; its steps are as many as that is enough for."""
    variants, base = VARIANTS[options.comparison], BASES[options.comparison]
    rows, measure = list[dict[str, Any]](), denoiser_probe(options)
    for name, overrides in variants.items():
        if options.only and name not in options.only:
            continue
        overrides, last = [*base, *overrides], LAST_THIRD.get(name)
        trained, minutes = (AVERAGED_AFTERWARDS | DECODED_TWICE).get(name, name), options.cpu_minutes
        parts = [
            train_for(options, trained, [*base, *variants[trained]], minutes if last is None else minutes * 2 / 3)
        ]
        if name in AVERAGED_AFTERWARDS:
            parts = [average_afterwards(options, name, overrides, parts[0])]
        if last is not None:
            go_on = [*overrides, f"init={parts[0] / 'vae'}", f"optimizer.learning_rate={LEARNING_RATE / 3}", *last]
            parts.append(train_for(options, last_third(name), go_on, minutes / 3))
        log = [record for part in parts for record in read_json_lines(part / "log.jsonl")]
        reconstructor = open_reconstructor(parts[-1] / "vae", name)
        quality = evaluate_reconstruction(reconstructor, options.held_out, EQUAL_TIME_PROTOCOL).totals
        row: dict[str, Any] = {
            "run": name,
            "num_parameters": reconstructor.about["num_parameters"],
            "num_steps": len(log) * LOG_EVERY,
        }
        row["cpu_minutes"] = round(sum(record["cpu_seconds_per_step"] for record in log) * LOG_EVERY / 60, 2)
        # Without imageio-ffmpeg there is no VMAF, without flat patches no `flat_std`.
        row |= {column: round(quality[key], 4) for column, key in COLUMNS.items() if key in quality}
        probe = measure(reconstructor.vae)
        row |= {"denoising_loss": round(probe["denoising_loss"], 4), NOISE: levels_of(probe)[NOISE]}
        print(row, flush=True)
        rows.append(row)
    kept = read_kept(options)
    processors = {*filter(None, kept["processors"].split(", ")), str(provenance()["processor"])}
    return {"rows": join_rows(kept, rows, variants), "processors": ", ".join(sorted(processors)), "base": base}


def read_kept(options: argparse.Namespace) -> dict[str, Any]:
    """What the file of the results holds now, to which another process may have added meanwhile."""
    path = Path(options.output)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": [], "processors": ""}


def join_rows(kept: dict[str, Any], rows: list[dict[str, Any]], names: Iterable[str]) -> list[dict[str, Any]]:
    """Rows by the order of `names`; of what is kept, those that did not come anew."""
    found = {row["run"]: row for row in (*kept["rows"], *rows)}
    return [found[name] for name in names if name in found]


def compare_clips(options: argparse.Namespace) -> dict[str, Any]:
    """PSNR of every held-out clip and gain of three colour axes, of the runs of `recipes` that are there.

    The gain is how far the average colour of a patch of 8x8 pixels comes back along an axis: 1 is as it was, 0 not at
    all. Patches are those of later frames, which have the wavelet in time.
    """
    protocol = replace(EQUAL_TIME_PROTOCOL, metrics=("psnr",))
    torch.set_num_threads(options.threads)
    rows = []
    for name in VARIANTS["recipes"]:
        run = last_third(name) if name in LAST_THIRD else DECODED_TWICE.get(name, name)
        folder = run_folder(options, "recipes", run) / "vae"
        if folder.is_dir():
            colors: list[tuple[torch.Tensor, torch.Tensor]] = []
            evaluation = evaluate_reconstruction(
                open_reconstructor(folder, name),
                options.held_out,
                protocol,
                on_clip=lambda _, result, colors=colors: colors.append(tuple(map(patch_colors, result[:2]))),
            )
            figures = {"all": evaluation.totals} | evaluation.clips
            psnr = {Path(clip).stem: round(figure["psnr_frame_mean_rgb"], 2) for clip, figure in figures.items()}
            rows.append({"run": name} | psnr | color_gains(*map(torch.cat, zip(*colors, strict=True))))
            print(rows[-1], flush=True)
    if not rows:
        raise ValueError(f"`--runs` must hold runs of `recipes`, got none in {options.runs}.")
    return {"rows": join_rows(read_kept(options), rows, VARIANTS["recipes"])}


def last_third(name: str) -> str:
    """Name of the run that goes on from another with something changed."""
    return f"{name}, last third"


def patch_colors(frames: torch.Tensor) -> torch.Tensor:
    """Average colours of patches of all frames but the first: `(T, 3, H, W)` to `((T - 1) * H / 8 * W / 8, 3)`."""
    return F.avg_pool2d(frames[1:], 8).movedim(1, 3).reshape(-1, 3)


def color_gains(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """Slopes of colours that came back over what they were, `(N, 3)` each, along the axes."""
    gains = {}
    for axis, weights in COLOR_AXES.items():
        x, y = ((colors - colors.mean(dim=0)).double() @ torch.tensor(weights).double() for colors in (before, after))
        gains[f"gain_{axis}"] = round(((x @ y) / (x @ x)).item(), 3)
    return gains


def hold_out(options: argparse.Namespace) -> None:
    """Part the training clips in two folders of links: every sixth source, the name before `_01`, is held out."""
    sources = {clip: clip.stem.rpartition("_")[0] or clip.stem for clip in list_videos(options.train)}
    held_out = sorted(set(sources.values()))[::6]
    folder = Path(options.runs).resolve() / "clips"
    options.train, options.held_out = str(folder / "train"), str(folder / "held_out")
    for clip, source in sources.items():
        name = options.held_out if source in held_out else options.train
        Path(name).mkdir(parents=True, exist_ok=True)
        if not (link := Path(name, clip.name)).exists():
            link.symlink_to(clip.resolve())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=[*VARIANTS, "clips"])
    parser.add_argument("--train", required=True, help="folder of training videos")
    parser.add_argument("--held-out", help="folder of other videos; not of `recipes`, `compression` and `clips`")
    parser.add_argument("--num-steps", type=int, default=320)
    parser.add_argument("--cpu-minutes", type=float, default=10.0, help="of each run of a comparison at equal time")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="runs of `recipes` or `compression`")
    parser.add_argument("--num-clips", type=int, default=512, help="training clips of the denoiser")
    parser.add_argument("--num-denoiser-steps", type=int, default=DiffusabilityProtocol.num_steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--as-they-are", action="store_true", help="train nothing: runs as far as they are")
    parser.add_argument("--runs", default="runs/compare", help="folder of the training runs")
    parser.add_argument("--output", help="results/bench_COMPARISON.json by default")
    options = parser.parse_args()
    unknown = set(options.only or ()) - set(VARIANTS[options.comparison] if options.comparison in BASES else ())
    if unknown:
        parser.error(f"--only must name runs of `recipes` or `compression`, got {', '.join(sorted(unknown))}")
    if options.held_out is None and options.comparison not in (*BASES, "clips"):
        parser.error(f"--held-out is needed for `{options.comparison}`")
    if options.held_out is None:
        hold_out(options)
    options.output = options.output or str(ROOT / f"results/bench_{options.comparison}.json")
    comparisons = {"start": compare_starts, "latents": compare_latents, "alignment": compare_alignment}
    if options.comparison == "clips":
        result = compare_clips(options)
    else:
        changes = {name: " ".join(overrides) for name, overrides in VARIANTS[options.comparison].items()}
        result = {"all_runs": SMALL, "changes": changes}
        if options.comparison in BASES:
            result = compare_at_equal_time(options) | result
        else:
            result = comparisons[options.comparison](options) | {"num_steps": options.num_steps} | result
    write_result(options.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

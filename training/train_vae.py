"""Train a LeanVAE video autoencoder. Read it from top to bottom.

One process, CPU or GPU:

    python training/train_vae.py training/configs/smoke.yaml data.train=path/to/videos

Several GPUs, or two processes on CPU:

    accelerate launch training/train_vae.py training/configs/paper_4ch.yaml data.train=path/to/videos
    torchrun --nproc_per_node 2 training/train_vae.py training/configs/compact_16ch.yaml data.train=path/to/videos

The recipe is a YAML file; `key=value` after it overrides one entry. The output folder receives

    recipe.yaml         the recipe with every default and override resolved
    log.jsonl           loss terms, learning rate, gradient norm and time, every `log_every` steps
    validation.jsonl    PSNR of every validation clip, every `validation.every` steps
    validation/         originals beside reconstructions, as PNG
    checkpoints/        everything needed to go on; the same command resumes from the newest one
    vae/                the trained model, for `AutoencoderKLLeanVAE.from_pretrained`
"""

import argparse
import contextlib
import copy
import inspect
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object, set_seed
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_leanvae.data import StepBatches, VideoFolder, pixels_to_sample, read_center_clip
from diffusers_leanvae.evaluation.metrics import frame_psnr
from diffusers_leanvae.initialization import initialize_from_principal_components
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.objectives import LossWeights, VAETrainingModule
from diffusers_leanvae.optimizers import MuonAdamW
from diffusers_leanvae.recipe import OptimizerRecipe, load_recipe, save_recipe
from diffusers_leanvae.video_io import list_videos


# --- Recipe: what the YAML file may hold -----------------------------------------------------------------------------


@dataclass
class DataRecipe:
    train: str
    clip_sizes: list[list[int]] = field(default_factory=lambda: [[17, 64, 64]])  # one [T, H, W] is drawn per step
    short_side: int | None = None  # larger videos are scaled down to it
    max_stride: int = 1
    max_zoom_out: float = 1.0
    flip: bool = True
    cache_gib: float = 4.0  # decoded videos are kept in memory up to this size, by each process
    num_workers: int = 0  # with everything in the cache, cutting clips costs less than handing them over


@dataclass
class ValidationRecipe:
    folder: str | None = None
    every: int = 500
    num_frames: int = 17
    size: int = 256


@dataclass
class Recipe:
    data: DataRecipe
    output: str
    model: dict[str, Any] = field(default_factory=dict)  # arguments of AutoencoderKLLeanVAE
    init: str = "spec"  # "spec" | "pca" | a folder of `save_pretrained` | an original checkpoint file
    num_init_clips: int = 256  # for "pca"
    seed: int = 0
    batch_size: int = 8  # clips per optimizer step, over all processes and accumulation steps
    num_accumulation_steps: int = 1
    num_steps: int = 1000
    max_minutes: float | None = None  # stop early, with a checkpoint and the model as it is
    mixed_precision: Literal["bf16"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    num_threads: int | None = None  # CPU threads of each process
    loss: LossWeights = field(default_factory=LossWeights)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    ema_decay: float = 0.999  # approached as (1 + step) / (10 + step), so that short runs average over a tenth
    max_skipped_steps: int = 20  # give up after so many steps in a row without a finite gradient
    log_every: int = 10
    validation: ValidationRecipe = field(default_factory=ValidationRecipe)
    save_every: int = 500
    keep_checkpoints: int = 2
    resume: str | None = "latest"  # "latest": the newest in `output`, if any | a checkpoint folder | null
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the model in `vae/`
    num_statistics_clips: int = 256  # for latents_mean and latents_std

    def __post_init__(self) -> None:
        names = ["batch_size", "num_accumulation_steps", "num_steps", "log_every", "save_every", "keep_checkpoints"]
        counts = {name: getattr(self, name) for name in names} | {"validation.every": self.validation.every}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")


# --- Model -----------------------------------------------------------------------------------------------------------


def build_vae(recipe: Recipe) -> AutoencoderKLLeanVAE:
    legal = [name for name in inspect.signature(AutoencoderKLLeanVAE.__init__).parameters if name != "self"]
    for key in recipe.model:
        if key not in legal:
            raise ValueError(f"Unknown recipe key `model.{key}`: legal keys here are {', '.join(legal)}.")
    if recipe.init in ("spec", "pca"):
        return AutoencoderKLLeanVAE(**recipe.model)
    source = Path(recipe.init)
    if not source.exists():
        raise ValueError(
            f"`init` must be 'spec', 'pca', a folder of `save_pretrained` or an original checkpoint file, got "
            f"{recipe.init!r}, which does not exist."
        )
    load = AutoencoderKLLeanVAE.from_pretrained if source.is_dir() else AutoencoderKLLeanVAE.from_single_file
    vae = load(recipe.init, torch_dtype=torch.float32)
    for key, value in recipe.model.items():
        if json.dumps(vae.config[key]) != json.dumps(value):
            raise ValueError(f"`model.{key}` must agree with `init`, which has {vae.config[key]!r}, got {value!r}.")
    return vae


def build_optimizer(recipe: OptimizerRecipe, module: torch.nn.Module) -> torch.optim.Optimizer:
    common: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (recipe.betas[0], recipe.betas[1]),
        "weight_decay": recipe.weight_decay,
    }
    if recipe.name == "muon":
        return MuonAdamW(module.named_parameters(), **common)
    return torch.optim.AdamW(module.parameters(), fused=True, **common)


def training_videos(dataset: VideoFolder, num_clips: int, device: torch.device) -> Iterator[torch.Tensor]:
    """The first clips of training, one at a time: `(1, 3, num_frames, height, width)` in `[-1, 1]`."""
    return (pixels_to_sample(dataset[index].pixels[None].to(device)) for index in range(num_clips))


@torch.no_grad()
def measure_latents(vae: AutoencoderKLLeanVAE, videos: Iterator[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every latent channel over posterior means."""
    total = squares = torch.zeros(vae.latent_channels, dtype=torch.float64)
    count = 0
    for sample in videos:
        posterior = vae.encode(sample, return_dict=False)[0]
        latents = posterior.mode().transpose(0, 1).flatten(1).cpu().double()  # (z, B * t * h * w)
        total, squares, count = total + latents.sum(1), squares + latents.square().sum(1), count + latents.shape[1]
    mean = total / count
    return mean.tolist(), (squares / count - mean.square()).clamp(min=0).sqrt().tolist()


# --- What a step needs -----------------------------------------------------------------------------------------------


def posterior_noise(vae: AutoencoderKLLeanVAE, sample: torch.Tensor, indices: list[int], seed: int) -> torch.Tensor:
    """Standard normal noise for the posterior of each clip; it depends on the seed and on the clip's index alone."""
    height, width = (edge // vae.spatial_compression_ratio for edge in sample.shape[3:])
    shape = (vae.latent_channels, vae.num_latent_frames(sample.shape[2]), height, width)
    noise = [np.random.default_rng([seed, 3, index]).standard_normal(shape, np.float32) for index in indices]
    return torch.from_numpy(np.stack(noise)).to(sample.device)


def average(accelerator: Accelerator, values: list[float]) -> list[float]:
    """The mean of each value over the processes."""
    reduced: Any = accelerator.reduce(torch.tensor(values, device=accelerator.device), reduction="mean")
    return reduced.tolist()


# --- Validation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(vae: AutoencoderKLLeanVAE, clip: torch.Tensor) -> tuple[float, np.ndarray]:
    """PSNR of a clip `(3, num_frames, height, width)`, and its middle frame beside the original as uint8 pixels."""
    clip = clip.to(vae.device)
    reconstruction = vae(clip[None], return_dict=False)[0][0]
    original, decoded = (x.transpose(0, 1).clamp(-1, 1).add(1).div(2) for x in (clip, reconstruction))
    pair = torch.cat((original, decoded), dim=3)[len(original) // 2]  # (3, H, 2 * W)
    picture = pair.mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    return frame_psnr(decoded, original).mean().item(), picture


def validate(
    accelerator: Accelerator, vae: AutoencoderKLLeanVAE, clips: dict[str, torch.Tensor], output: Path, step: int
) -> float:
    """Reconstruct this process's clips, gather all, write the record and the picture; returns the mean PSNR."""
    results = gather_object([(name, *reconstruct(vae, clip)) for name, clip in clips.items()])
    results.sort(key=lambda result: result[0])
    psnr = {name: value for name, value, _ in results}
    mean = sum(psnr.values()) / len(psnr)
    if accelerator.is_main_process:
        from PIL import Image

        append_json(output / "validation.jsonl", {"step": step, "psnr_frame_mean_rgb": mean, "clips": psnr})
        (output / "validation").mkdir(exist_ok=True)
        picture = Image.fromarray(np.concatenate([picture for _, _, picture in results]))
        picture.save(output / "validation" / f"step-{step:07d}.png")
    return mean


# --- Files of a run --------------------------------------------------------------------------------------------------


def append_json(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def forget_after(path: Path, step: int) -> None:
    """Drop what a killed run logged beyond the checkpoint that it resumes from, and a line it did not finish."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


@dataclass
class Progress:
    """The counters in a checkpoint; the clips, the noise and the learning rate follow from `step`."""

    step: int = 0
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


def find_checkpoint(recipe: Recipe) -> Path | None:
    if recipe.resume not in ("latest", None):
        if not Path(recipe.resume).is_dir():
            raise ValueError(f"`resume` must be 'latest', a checkpoint folder or null, got {recipe.resume!r}.")
        return Path(recipe.resume)
    existing = sorted(Path(recipe.output, "checkpoints").glob("step-*"))
    if existing and recipe.resume is None:
        raise ValueError(f"`output` must hold no checkpoints when `resume` is null, got {str(existing[-1])!r}.")
    return existing[-1] if existing else None


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int) -> None:
    """Write beside and rename, so that a folder named `step-*` is always whole; then drop the oldest."""
    partial, final = folder / f"partial-{step:07d}", folder / f"step-{step:07d}"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if final.exists():  # resumed from an earlier checkpoint than the newest
            os.replace(final, folder / f"stale-{step:07d}")
        os.replace(partial, final)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            os.replace(old, folder / old.name.replace("step", "stale"))
        remove_leftovers(folder)
    accelerator.wait_for_everyone()


def remove_leftovers(folder: Path) -> None:
    for leftover in [*folder.glob("stale-*"), *folder.glob("partial-*")]:
        shutil.rmtree(leftover)


# --- The run ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces one entry of the recipe")
    options = parser.parse_args(arguments)
    recipe = load_recipe(Recipe, options.recipe, options.overrides)
    output, started = Path(recipe.output), time.monotonic()

    # --- Init --------------------------------------------------------------------------------------------------------
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    torch.set_float32_matmul_precision("high")
    # Clips of one frame leave the video half of the model without a gradient.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=any(size[0] == 1 for size in recipe.data.clip_sizes))
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision or "no", kwargs_handlers=[ddp])
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world_size = accelerator.process_index, accelerator.num_processes
    say = tqdm.write if is_main else lambda text: None
    if recipe.mixed_precision and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        say("warning: this CPU has no bfloat16 arithmetic, `mixed_precision=null` is many times faster")
    set_seed(recipe.seed)
    checkpoint = find_checkpoint(recipe)

    # --- Data --------------------------------------------------------------------------------------------------------
    dataset = VideoFolder(
        recipe.data.train,
        clip_sizes=recipe.data.clip_sizes,
        clips_per_size=recipe.batch_size,
        short_side=recipe.data.short_side,
        max_stride=recipe.data.max_stride,
        max_zoom_out=recipe.data.max_zoom_out,
        flip=recipe.data.flip,
        cache_gib=recipe.data.cache_gib,
        seed=recipe.seed,
    )
    say(f"data: {len(dataset)} videos, {dataset.num_cached} in memory, {dataset.num_skipped} skipped")
    validation_folder = Path(recipe.validation.folder or "")
    validation_paths = list_videos(validation_folder) if recipe.validation.folder else []
    validation_clips = {
        str(path.relative_to(validation_folder)): read_center_clip(
            path, recipe.validation.num_frames, recipe.validation.size
        )
        for path in validation_paths[rank::world_size]
    }

    # --- Model -------------------------------------------------------------------------------------------------------
    vae = build_vae(recipe).to(device).train()
    if recipe.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    if recipe.init == "pca" and checkpoint is None and is_main:  # the other processes receive these weights below
        initialize_from_principal_components(vae, training_videos(dataset, recipe.num_init_clips, device))
    averaged_vae = copy.deepcopy(vae).requires_grad_(False).eval()  # filled from `ema` when it is needed
    optimizer = build_optimizer(recipe.optimizer, vae)
    module, optimizer = accelerator.prepare(VAETrainingModule(vae, recipe.loss), optimizer)
    if recipe.compile:
        module.compile()
    parameters = list(vae.parameters())
    ema = EMAModel(parameters, decay=recipe.ema_decay, foreach=True)
    progress = Progress()
    accelerator.register_for_checkpointing(ema, progress)
    say(f"model: {sum(parameter.numel() for parameter in parameters) / 1e6:.2f} M parameters on {device}")

    # --- Resume ------------------------------------------------------------------------------------------------------
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        ema.to(device)
        say(f"resumed from {checkpoint}")
    step_batches = StepBatches(
        recipe.batch_size, progress.step, recipe.num_steps, recipe.num_accumulation_steps, rank, world_size
    )
    loader = DataLoader(
        dataset,
        batch_sampler=step_batches,
        num_workers=recipe.data.num_workers,
        pin_memory=device.type == "cuda",
    )
    if is_main:
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)
        remove_leftovers(output / "checkpoints")
        save_recipe(recipe, output / "recipe.yaml")
        for name in ("log.jsonl", "validation.jsonl"):
            forget_after(output / name, progress.step if checkpoint is not None else -1)
    accelerator.wait_for_everyone()

    def run_validation() -> None:
        if validation_paths:
            ema.copy_to(averaged_vae.parameters())
            psnr = validate(accelerator, averaged_vae, validation_clips, output, progress.step)
            say(f"step {progress.step}: validation PSNR {psnr:.3f} dB")

    # --- Loop --------------------------------------------------------------------------------------------------------
    if progress.step == 0:
        run_validation()
    batches = iter(loader)
    bar = tqdm(total=recipe.num_steps, initial=progress.step, disable=not is_main, mininterval=1.0)
    totals: dict[str, float] = {}  # sums since the last log line, over `num_logged` steps
    num_logged = 0
    while progress.step < recipe.num_steps:
        # ---- one optimizer step -------------------------------------------------------------------------------------
        step_started, data_seconds = time.monotonic(), 0.0
        lr = recipe.optimizer.learning_rate_at(progress.step, recipe.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for part in range(recipe.num_accumulation_steps):
            data_started = time.monotonic()
            clips = next(batches)
            sample = pixels_to_sample(clips.pixels.to(device, non_blocking=True))
            noise = posterior_noise(vae, sample, clips.index.tolist(), recipe.seed)
            data_seconds += time.monotonic() - data_started
            is_last = part == recipe.num_accumulation_steps - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(module):
                loss, terms = module(sample, noise)
                accelerator.backward(loss / recipe.num_accumulation_steps)
        grad_norm = float(accelerator.clip_grad_norm_(parameters, recipe.optimizer.max_grad_norm) or 0.0)
        is_finite = math.isfinite(grad_norm)  # the same on all processes: gradients are synchronised
        if is_finite:
            optimizer.step()
            ema.step(parameters)
        optimizer.zero_grad()
        progress.step += 1
        progress.num_skipped += not is_finite
        progress.num_skipped_in_a_row = 0 if is_finite else progress.num_skipped_in_a_row + 1
        # -------------------------------------------------------------------------------------------------------------
        (minutes,) = average(accelerator, [(time.monotonic() - started) / 60])  # all leave the loop at the same step
        out_of_time = recipe.max_minutes is not None and minutes >= recipe.max_minutes
        is_over = out_of_time or progress.step == recipe.num_steps
        seconds = {"seconds_per_step": time.monotonic() - step_started, "data_seconds_per_step": data_seconds}
        if is_finite:  # with several accumulation steps, the terms of the last one stand for all
            for name, value in {"loss": loss.detach(), **terms, "grad_norm": grad_norm, **seconds}.items():
                totals[name] = totals.get(name, 0.0) + float(value)
            num_logged += 1
        bar.update()

        # ---- log, validate, save ------------------------------------------------------------------------------------
        if progress.step % recipe.log_every == 0 or is_over:
            record = {"step": progress.step, "lr": lr, "num_skipped": progress.num_skipped}
            means = average(accelerator, [total / num_logged for total in totals.values()])
            record |= dict(zip(totals, means, strict=True))
            totals, num_logged = {}, 0
            if is_main:
                append_json(output / "log.jsonl", record)
                bar.set_postfix(loss=record.get("loss"), refresh=False)
        if progress.num_skipped_in_a_row >= recipe.max_skipped_steps:
            raise RuntimeError(f"Stopped: the {recipe.max_skipped_steps} newest steps had no finite gradient.")
        if progress.step % recipe.validation.every == 0 or is_over:
            run_validation()
        if progress.step % recipe.save_every == 0 or is_over:
            save_checkpoint(accelerator, output / "checkpoints", progress.step, recipe.keep_checkpoints)
        if out_of_time:
            say(f"stopped at step {progress.step} of {recipe.num_steps}: {minutes:.1f} minutes are over")
            break
    bar.close()

    # --- Save --------------------------------------------------------------------------------------------------------
    if is_main:
        ema.copy_to(averaged_vae.parameters())
        mean, std = measure_latents(averaged_vae, training_videos(dataset, recipe.num_statistics_clips, device))
        averaged_vae.register_to_config(latents_mean=mean, latents_std=std)
        if recipe.save_dtype != "float32":
            averaged_vae.to(getattr(torch, recipe.save_dtype))
        averaged_vae.save_pretrained(output / "vae")
        say(f"saved {output / 'vae'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])

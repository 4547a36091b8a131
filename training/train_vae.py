"""Train a LeanVAE video autoencoder. Read it from top to bottom.

One process, CPU or GPU:

    python training/train_vae.py training/configs/smoke.yaml data.train=path/to/videos

Several GPUs, or several processes on CPU:

    accelerate launch training/train_vae.py training/configs/compact_16ch.yaml data.train=path/to/videos
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
import dataclasses
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
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_leanvae.data import StepBatches, VideoFolder, pixels_to_sample, read_center_clip
from diffusers_leanvae.initialization import initialize_from_principal_components
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.objectives import LossWeights, VAETrainingModule
from diffusers_leanvae.recipe import load_recipe, save_recipe
from diffusers_leanvae.video_io import list_videos


# ----------------------------------------------------------------------------------------------------------------------
# Recipe: what the YAML file may hold


@dataclass
class DataRecipe:
    train: str
    clip_sizes: list[list[int]] = field(default_factory=lambda: [[17, 64, 64]])  # one [T, H, W] is drawn per step
    short_side: int | None = None  # larger videos are scaled down to it
    max_stride: int = 1
    max_zoom_out: float = 1.0
    flip: bool = True
    cache_gib: float = 4.0  # decoded videos are kept in memory up to this size
    num_workers: int = 0  # with everything in the cache, cutting clips costs less than handing them over


@dataclass
class OptimizerRecipe:
    learning_rate: float = 5e-5
    final_learning_rate: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    num_warmup_steps: int = 0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


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


# ----------------------------------------------------------------------------------------------------------------------
# Model


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
    vae = load(recipe.init).float()
    for key, value in recipe.model.items():
        if json.dumps(vae.config[key]) != json.dumps(value):
            raise ValueError(f"`model.{key}` must agree with `init`, which has {vae.config[key]!r}, got {value!r}.")
    return vae


def training_videos(dataset: VideoFolder, num_clips: int, device: torch.device) -> Iterator[torch.Tensor]:
    """The first clips of training, one at a time: `(1, 3, num_frames, height, width)` in `[-1, 1]`."""
    for index in range(num_clips):
        yield pixels_to_sample(dataset[index]["pixels"][None].to(device))


@torch.no_grad()
def measure_latents(vae: AutoencoderKLLeanVAE, videos: Iterator[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every latent channel over posterior means."""
    totals = squares = torch.zeros(())
    count = 0
    for sample in videos:
        latents = vae.encode(sample).latent_dist.mode().double().transpose(0, 1).flatten(1).cpu()
        totals, squares = totals + latents.sum(1), squares + latents.square().sum(1)
        count += latents.shape[1]
    mean = totals / count
    std = (squares / count - mean.square()).clamp_min(1e-12).sqrt()
    return mean.tolist(), std.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# The step's pure functions


def learning_rate(recipe: OptimizerRecipe, step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to `final_learning_rate` at the last step, or constant."""
    if step < recipe.num_warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.num_warmup_steps
    if recipe.schedule == "constant":
        return recipe.learning_rate
    progress = (step - recipe.num_warmup_steps) / max(1, num_steps - recipe.num_warmup_steps)
    span = recipe.learning_rate - recipe.final_learning_rate
    return recipe.final_learning_rate + span * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def posterior_noise(vae: AutoencoderKLLeanVAE, sample: torch.Tensor, indices: torch.Tensor, seed: int) -> torch.Tensor:
    """Standard normal noise for the posterior of each clip; it depends on the seed and on the clip's index alone."""
    height, width = (edge // vae.spatial_compression_ratio for edge in sample.shape[3:])
    shape = (vae.latent_channels, vae.num_latent_frames(sample.shape[2]), height, width)
    noise = [np.random.default_rng([seed, 3, index]).standard_normal(shape, np.float32) for index in indices.tolist()]
    return torch.from_numpy(np.stack(noise)).to(sample.device)


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set anywhere: processes must leave the loop together."""
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item() > 0


# ----------------------------------------------------------------------------------------------------------------------
# Validation


def frame_psnr(sample: torch.Tensor, reconstruction: torch.Tensor) -> float:
    """Mean over the frames of the PSNR of each; `(1, 3, num_frames, height, width)` in `[-1, 1]`, clamped here."""
    error = (reconstruction.clamp(-1.0, 1.0) - sample).div(2.0).square().mean(dim=(0, 1, 3, 4))
    return (-10.0 * error.clamp_min(1e-10).log10()).mean().item()


@torch.no_grad()
def validate(
    vae: AutoencoderKLLeanVAE, clips: dict[str, torch.Tensor], device: torch.device
) -> tuple[dict[str, float], list[np.ndarray]]:
    """PSNR of each clip reconstructed from its posterior mean, and its middle frame beside the original's."""
    psnr, pictures = {}, []
    for name, clip in clips.items():
        sample = clip[None].to(device)
        reconstruction = vae.decode(vae.encode(sample).latent_dist.mode()).sample
        psnr[name] = frame_psnr(sample, reconstruction)
        middle = sample.shape[2] // 2
        pair = torch.cat((sample[0, :, middle], reconstruction[0, :, middle]), dim=2)  # (3, H, 2 * W)
        pictures.append(pair.clamp(-1.0, 1.0).add(1.0).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy())
    return psnr, pictures


def write_picture(path: Path, pictures: list[np.ndarray]) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(pictures)).save(path)


# ----------------------------------------------------------------------------------------------------------------------
# Files of a run


def append_json(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def drop_records_after(path: Path, step: int) -> None:
    """Forget what a killed run logged beyond the checkpoint that it is resumed from."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def find_checkpoint(recipe: Recipe) -> Path | None:
    existing = sorted(Path(recipe.output, "checkpoints").glob("step-*"), key=checkpoint_step)
    if recipe.resume == "latest":
        return existing[-1] if existing else None
    if recipe.resume is None:
        if existing:
            raise ValueError(f"`output` must hold no checkpoints when `resume` is null, got {str(existing[-1])!r}.")
        return None
    if not Path(recipe.resume).is_dir():
        raise ValueError(f"`resume` must be 'latest', a checkpoint folder or null, got {recipe.resume!r}.")
    return Path(recipe.resume)


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, keep: int) -> None:
    """Write beside and rename, so that a folder named `step-*` is always whole; then drop the oldest."""
    partial = folder / f"partial-{step:07d}"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        final = folder / f"step-{step:07d}"
        if final.exists():
            os.replace(final, folder / f"stale-{step:07d}")
        os.replace(partial, final)
        for old in sorted(folder.glob("step-*"), key=checkpoint_step)[:-keep]:
            os.replace(old, folder / f"stale-{old.name}")
        for leftover in [*folder.glob("stale-*"), *folder.glob("partial-*")]:
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()


@dataclass
class Progress:
    """The counters of a checkpoint; data order, noise and learning rate follow from `step`."""

    step: int = 0
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0

    def state_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def export_vae(vae: AutoencoderKLLeanVAE, folder: Path, dtype: str, statistics: tuple[list[float], list[float]]) -> None:
    exported = copy.deepcopy(vae).to(getattr(torch, dtype))
    exported.register_to_config(latents_mean=statistics[0], latents_std=statistics[1])
    exported.save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# The run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces one entry of the recipe")
    options = parser.parse_args(arguments)
    recipe = load_recipe(Recipe, options.recipe, options.overrides)
    output = Path(recipe.output)
    started = time.monotonic()

    # --- Init ---------------------------------------------------------------------------------------------------------
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    torch.set_float32_matmul_precision("high")
    # Clips of one frame leave the video half of the model without a gradient.
    partial_graph = DistributedDataParallelKwargs(
        find_unused_parameters=any(size[0] == 1 for size in recipe.data.clip_sizes)
    )
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision or "no", kwargs_handlers=[partial_graph])
    device, is_main = accelerator.device, accelerator.is_main_process
    set_seed(recipe.seed)
    checkpoint = find_checkpoint(recipe)
    progress = Progress(step=checkpoint_step(checkpoint) if checkpoint else 0)
    say = tqdm.write if is_main else (lambda text: None)

    # --- Data ---------------------------------------------------------------------------------------------------------
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
    step_batches = StepBatches(
        recipe.batch_size,
        progress.step,
        recipe.num_steps,
        recipe.num_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=step_batches,
        num_workers=recipe.data.num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=recipe.data.num_workers > 0,
    )
    validation_clips = {}
    if recipe.validation.folder is not None:
        paths = [Path(path) for path in list_videos(recipe.validation.folder)]
        for path in paths[accelerator.process_index :: accelerator.num_processes]:
            name = path.relative_to(recipe.validation.folder).as_posix()
            validation_clips[name] = read_center_clip(path, recipe.validation.num_frames, recipe.validation.size)

    # --- Model --------------------------------------------------------------------------------------------------------
    vae = build_vae(recipe).to(device)
    if recipe.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    if recipe.init == "pca" and checkpoint is None and is_main:  # the other processes receive these weights below
        initialize_from_principal_components(vae, training_videos(dataset, recipe.num_init_clips, device))
    averaged_vae = copy.deepcopy(vae).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        vae.parameters(),
        lr=recipe.optimizer.learning_rate,
        betas=(recipe.optimizer.betas[0], recipe.optimizer.betas[1]),
        weight_decay=recipe.optimizer.weight_decay,
        fused=True,
    )
    module, optimizer = accelerator.prepare(VAETrainingModule(vae, recipe.loss), optimizer)
    if recipe.compile:
        module.compile()
    parameters = list(vae.parameters())
    ema = EMAModel(parameters, decay=recipe.ema_decay, foreach=True)
    accelerator.register_for_checkpointing(ema, progress)
    say(f"model: {sum(parameter.numel() for parameter in parameters) / 1e6:.2f} M parameters on {device}")

    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        ema.to(device)
        say(f"resumed from {checkpoint}")
    if is_main:
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, output / "recipe.yaml")
        for name in ("log.jsonl", "validation.jsonl"):
            drop_records_after(output / name, progress.step if checkpoint is not None else -1)

    def run_validation() -> None:
        if recipe.validation.folder is None:
            return
        ema.copy_to(averaged_vae.parameters())
        psnr, pictures = validate(averaged_vae, validation_clips, device)
        gathered = gather_object([(name, value, picture) for (name, value), picture in zip(psnr.items(), pictures)])
        if is_main:
            gathered = sorted(gathered, key=lambda item: item[0])
            psnr = {name: round(value, 4) for name, value, _ in gathered}
            mean = sum(psnr.values()) / len(psnr)
            record = {"step": progress.step, "psnr_frame_mean_rgb": round(mean, 4), "clips": psnr}
            append_json(output / "validation.jsonl", record)
            write_picture(
                output / "validation" / f"step-{progress.step:07d}.png", [picture for _, _, picture in gathered]
            )
            say(f"step {progress.step}: validation PSNR {mean:.3f} dB")

    # --- Loop ---------------------------------------------------------------------------------------------------------
    if progress.step == 0:
        run_validation()
    batches = iter(loader)
    bar = tqdm(total=recipe.num_steps, initial=progress.step, disable=not is_main, desc="training")
    window: list[torch.Tensor] = []  # what was measured since the last log line
    window_started = time.monotonic()
    names: list[str] = []
    while progress.step < recipe.num_steps:
        # ---- one optimizer step --------------------------------------------------------------------------------------
        lr = learning_rate(recipe.optimizer, progress.step, recipe.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        measured = torch.zeros((), device=device)
        for part in range(recipe.num_accumulation_steps):
            batch = next(batches)
            sample = pixels_to_sample(batch["pixels"].to(device, non_blocking=True))
            noise = posterior_noise(vae, sample, batch["index"], recipe.seed)
            is_last = part == recipe.num_accumulation_steps - 1
            with contextlib.nullcontext() if is_last else accelerator.no_sync(module):
                loss, terms = module(sample, noise)
                accelerator.backward(loss / recipe.num_accumulation_steps)
            names = ["loss", *terms]
            measured = measured + torch.stack([loss.detach(), *terms.values()]) / recipe.num_accumulation_steps
        grad_norm = accelerator.clip_grad_norm_(parameters, recipe.optimizer.max_grad_norm)
        if bool(torch.isfinite(grad_norm)):
            optimizer.step()
            ema.step(parameters)
            progress.num_skipped_in_a_row = 0
        else:
            progress.num_skipped += 1
            progress.num_skipped_in_a_row += 1
        optimizer.zero_grad()
        progress.step += 1
        # --------------------------------------------------------------------------------------------------------------
        window.append(torch.cat([measured, grad_norm.reshape(1).to(measured)]))
        minutes = (time.monotonic() - started) / 60
        out_of_time = recipe.max_minutes is not None and any_process(accelerator, minutes >= recipe.max_minutes)
        is_over = out_of_time or progress.step == recipe.num_steps
        bar.update()

        # ---- log, validate, save -------------------------------------------------------------------------------------
        if progress.step % recipe.log_every == 0 or is_over:
            averages = accelerator.reduce(torch.stack(window).mean(0), reduction="mean").tolist()
            now = time.monotonic()
            record = {"step": progress.step, **dict(zip([*names, "grad_norm"], averages, strict=True)), "lr": lr}
            record["seconds_per_step"] = (now - window_started) / len(window)
            record["num_skipped"] = progress.num_skipped
            if is_main:
                append_json(output / "log.jsonl", record)
                bar.set_postfix(loss=f"{record['loss']:.4f}", lr=f"{lr:.2e}")
            window, window_started = [], now
        if progress.num_skipped_in_a_row >= recipe.max_skipped_steps:
            raise RuntimeError(
                f"Stopped at step {progress.step}: {progress.num_skipped_in_a_row} steps in a row had no finite gradient."
            )
        if progress.step % recipe.validation.every == 0 or is_over:
            run_validation()
        if progress.step % recipe.save_every == 0 or is_over:
            save_checkpoint(accelerator, output / "checkpoints", progress.step, recipe.keep_checkpoints)
        if out_of_time:
            say(f"stopped at step {progress.step} of {recipe.num_steps}: {minutes:.1f} minutes are over")
            break
    bar.close()

    # --- Save ---------------------------------------------------------------------------------------------------------
    if is_main:
        ema.copy_to(averaged_vae.parameters())
        videos = training_videos(dataset, recipe.num_statistics_clips, device)
        export_vae(averaged_vae, output / "vae", recipe.save_dtype, measure_latents(averaged_vae, videos))
        say(f"saved {output / 'vae'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])

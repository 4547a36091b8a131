"""Train or fine-tune a LeanVAE video autoencoder. Read it from top to bottom.

One process, CPU or GPU:

    python training/train_vae.py training/configs/smoke.yaml data.train=path/to/videos

Several GPUs, or two processes on CPU:

    accelerate launch training/train_vae.py training/configs/paper_4ch.yaml data.train=path/to/videos
    torchrun --nproc_per_node 2 training/train_vae.py training/configs/compact_16ch.yaml data.train=path/to/videos

The recipe is a YAML file; `key=value` after it overrides one entry. The output folder receives

    recipe.yaml         the recipe with every default and override resolved
    log.jsonl           loss terms, learning rate, gradient norm and time, every `log_every` steps
    validation.jsonl    PSNR and SSIM of every validation clip, every `validation.every` steps
    validation/         originals beside reconstructions: a PNG, and a folder of mp4 files
    checkpoints/        everything needed to go on; the same command resumes from the newest one
    vae/                the trained model, for `AutoencoderKLLeanVAE.from_pretrained`, with its card
    adapter/            the adapters by themselves, where LoRA was trained

A run that is killed at any moment and started again gives the numbers of one that was not: whatever is random follows
from the seed, the step and the clip's index, and nothing else is remembered outside the checkpoint.
"""

import argparse
import contextlib
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object, set_seed
from diffusers.training_utils import EMAModel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_leanvae.atomic import replace_folder
from diffusers_leanvae.data import ClipDataset, open_training_data, pixels_to_sample
from diffusers_leanvae.hub import upload_folder
from diffusers_leanvae.latents import measure_statistics
from diffusers_leanvae.losses.adversarial import (
    DiscriminatorTrainingModule,
    PatchDiscriminator2d,
    PatchDiscriminator3d,
)
from diffusers_leanvae.losses.alignment import AlignmentWeights, Teacher
from diffusers_leanvae.losses.perceptual import LPIPS
from diffusers_leanvae.losses.reconstruction import LossWeights
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.trainer.autoencoder_module import Regularization, VAETrainingModule
from diffusers_leanvae.trainer.checkpoints import (
    Progress,
    append_json,
    find_checkpoint,
    forget_after,
    load_data_state,
    remove_leftovers,
    save_checkpoint,
)
from diffusers_leanvae.trainer.finetuning import add_lora, freeze_encoder, load_vae
from diffusers_leanvae.trainer.loop import RunningMeans, average, build_optimizer, check_trackers
from diffusers_leanvae.trainer.model_card import describe_recipe, write_model_card
from diffusers_leanvae.trainer.principal_components import initialize_from_principal_components
from diffusers_leanvae.trainer.recipe import OptimizerRecipe, load_recipe, save_recipe
from diffusers_leanvae.trainer.validation import load_validation_clips, score_clips, summarize, write_picture


# --- Recipe: what the YAML file may hold -----------------------------------------------------------------------------


@dataclass
class DataRecipe:
    """Arguments of `open_training_data`, which says more."""

    train: str  # a folder, shards `x/{000..003}.tar`, a URL of shards, or `hub:user/name`
    clip_sizes: list[list[int]] = field(default_factory=lambda: [[17, 64, 64]])  # one [T, H, W] is drawn per step
    aspect_buckets: bool = False  # a step takes videos of one aspect ratio, and a size of that ratio
    short_side: int | None = None  # larger videos are scaled down to it
    stride: list[int] = field(default_factory=lambda: [1, 1])  # lowest and highest distance of frames
    max_zoom_out: float = 1.0
    flip: bool = True
    rescale_factors: list[float] = field(default_factory=lambda: [1.0])  # one is drawn per step: sizes divided by it
    image_ratio: float = 0.0  # share of steps on single frames
    image_batch_factor: int = 1  # such a step has this many times more clips
    images: str | None = None  # where single frames come from; null: the videos
    cache_gib: float = 4.0  # decoded videos are kept in memory up to this size, by each process
    shuffle_buffer: int = 256  # videos of a stream that are shuffled among each other
    num_workers: int = 0  # with everything in the cache, cutting clips costs less than handing them over


@dataclass
class PerceptualRecipe:
    """Of `loss.lpips` and `loss.ms_ssim`."""

    frames: Literal["reference", "all"] = "reference"  # "reference": the first and one group of four
    vgg16: str = "timm/vgg16.tv_in1k"  # file or Hub repository of the standard weights
    linear_heads: str | None = None  # file; null: those that come with torchmetrics


@dataclass
class AdversarialRecipe:
    """The discriminator of PatchGAN (1611.07004), with LeCam (2104.03310); off while `weight` is 0."""

    weight: float = 0.0  # 0.2 in the reference
    is_adaptive: bool = False  # scale the weight by the ratio of gradients at the last layer, as VQGAN (2012.09841)
    start_step: int = 0
    kind: Literal["2d", "3d"] = "2d"
    loss: Literal["hinge", "non_saturating"] = "hinge"  # of the discriminator
    generator_loss: Literal["hinge", "non_saturating"] = "non_saturating"
    num_layers: int = 3
    num_filters: int = 64
    norm: Literal["batch", "group", "instance", "none"] = "batch"
    lecam_weight: float = 0.005
    lecam_decay: float = 0.999
    update: Literal["joint", "alternate"] = "joint"  # "alternate": generator and discriminator take turns
    learning_rate: float = 1e-5
    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])
    weight_decay: float = 0.0


@dataclass
class TeacherRecipe:
    """Another autoencoder whose latents the model learns to make and to decode; off while `path` is null."""

    path: str | None = None  # folder or Hub repository
    subfolder: str | None = None
    has_discriminator: bool = False  # a second one, for the decoding of the teacher's latents
    weights: AlignmentWeights = field(default_factory=AlignmentWeights)


@dataclass
class LoraRecipe:
    rank: int = 16
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["up_proj", "down_proj"])  # ends of the layers' names


@dataclass
class ValidationRecipe:
    folder: str | None = None
    every: int = 500
    num_frames: int = 17
    size: int = 256
    num_videos: int = 8  # clips of each process that get a picture and a video


@dataclass
class Recipe:
    data: DataRecipe
    output: str
    model: dict[str, Any] = field(default_factory=dict)  # arguments of AutoencoderKLLeanVAE
    init: str = "spec"  # "spec" | "pca" | a bundled, saved or original model, here or on the Hub: see `load_vae`
    num_init_clips: int = 256  # for "pca"
    tune: Literal["full", "decoder", "lora"] = "full"  # "decoder" leaves the latents as they are
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    seed: int = 0
    batch_size: int = 8  # clips per optimizer step, over all processes and accumulation steps
    num_accumulation_steps: int = 1
    num_steps: int = 1000
    max_minutes: float | None = None  # stop early, with a checkpoint and the model as it is
    mixed_precision: Literal["bf16", "fp16"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    num_threads: int | None = None  # CPU threads of each process
    sample_posterior: bool = True  # false: decode posterior means
    loss: LossWeights = field(default_factory=LossWeights)
    perceptual: PerceptualRecipe = field(default_factory=PerceptualRecipe)
    adversarial: AdversarialRecipe = field(default_factory=AdversarialRecipe)
    regularization: Regularization = field(default_factory=Regularization)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    freeze_encoder_step: int | None = None  # from this step on, what makes the latents is frozen
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    ema_decay: float = 0.999  # approached as (1 + step) / (10 + step), so that short runs average over a tenth
    max_skipped_steps: int = 20  # give up after so many steps in a row without a finite loss and gradient
    log_every: int = 10
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = field(default_factory=list)  # beside log.jsonl
    validation: ValidationRecipe = field(default_factory=ValidationRecipe)
    save_every: int = 500
    keep_checkpoints: int = 2
    resume: str | None = "latest"  # "latest": the newest in `output`, if any | a checkpoint folder | null
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the model in `vae/`
    num_statistics_clips: int = 256  # for latents_mean and latents_std
    push_to_hub: str | None = None  # user/name: upload `vae/` at the end

    def __post_init__(self) -> None:
        names = ["batch_size", "num_accumulation_steps", "num_steps", "log_every", "save_every", "keep_checkpoints"]
        counts = {name: getattr(self, name) for name in names} | {"validation.every": self.validation.every}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.compile and self.optimizer.name == "muon":
            raise ValueError(
                "`compile` must be false with `optimizer.name: muon`, which watches the layers, got true."
            )
        if self.tune != "full" and self.init in ("spec", "pca"):
            raise ValueError(f"`tune` must be 'full' for the new model of `init: {self.init}`, got {self.tune!r}.")


# --- What a run is made of -------------------------------------------------------------------------------------------


def build_vae(recipe: Recipe) -> AutoencoderKLLeanVAE:
    return load_vae(recipe.init, recipe.model)


def build_training_module(recipe: Recipe, vae: AutoencoderKLLeanVAE, device: torch.device) -> VAETrainingModule:
    lpips = None
    if recipe.loss.lpips:
        lpips = LPIPS.from_weights(recipe.perceptual.vgg16, recipe.perceptual.linear_heads).to(device)
    return VAETrainingModule(
        vae,
        recipe.loss,
        recipe.regularization,
        recipe.teacher.weights,
        lpips,
        recipe.perceptual.frames,
        recipe.adversarial.weight,
        recipe.adversarial.is_adaptive,
    )


def build_discriminators(recipe: Recipe, vae: AutoencoderKLLeanVAE) -> list[DiscriminatorTrainingModule]:
    """One for reconstructions, and one for decoded latents of the teacher; none without an adversarial loss."""
    options = recipe.adversarial
    count = 1 + (recipe.teacher.path is not None and recipe.teacher.has_discriminator) if options.weight else 0
    network = {"2d": PatchDiscriminator2d, "3d": PatchDiscriminator3d}[options.kind]
    return [
        DiscriminatorTrainingModule(
            network(vae.in_channels, options.num_layers, options.num_filters, options.norm),
            options.loss,
            options.lecam_weight,
            options.lecam_decay,
            options.generator_loss,
        )
        for _ in range(count)
    ]


def build_teacher(recipe: TeacherRecipe, vae: AutoencoderKLLeanVAE, device: torch.device) -> Teacher | None:
    """The teacher, if any; the model takes its latent statistics over, as it will stand in its place."""
    if recipe.path is None:
        return None
    teacher = Teacher.from_pretrained(recipe.path, recipe.subfolder).to(device)
    teacher.check_student(vae)
    if teacher.latents_std is not None:
        vae.register_to_config(latents_mean=teacher.latents_mean, latents_std=teacher.latents_std)
    return teacher


def check_sizes(recipe: Recipe, vae: AutoencoderKLLeanVAE, discriminators: list[DiscriminatorTrainingModule]) -> None:
    """Refuse clips that, scaled down by the equivariance, are too small for another loss."""
    smallest = min(min(size[1:]) for size in recipe.data.clip_sizes) / max(recipe.data.rescale_factors)
    if recipe.regularization.equivariance_probability:
        ratio = vae.spatial_compression_ratio
        smallest = max(1, round(smallest / ratio * recipe.regularization.equivariance_min_scale)) * ratio
    needed = [getattr(module.discriminator, "min_size", 1) for module in discriminators]
    needed += [16 * bool(recipe.loss.lpips), 11 * bool(recipe.loss.ms_ssim)]
    if smallest < max(needed):
        raise ValueError(
            f"`data.clip_sizes`, with `rescale_factors` and `equivariance_min_scale`, must leave sides of at least "
            f"{max(needed)} for the losses of this recipe, got {int(smallest)}."
        )


def training_videos(dataset: ClipDataset, num_clips: int, device: torch.device) -> Iterator[torch.Tensor]:
    """The first clips of training, one at a time: `(1, 3, num_frames, height, width)` in `[-1, 1]`."""
    return (pixels_to_sample(dataset[index].pixels[None].to(device)) for index in range(num_clips))


@torch.no_grad()
def measure_latents(vae: AutoencoderKLLeanVAE, videos: Iterator[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every latent channel over posterior means."""
    means = (vae.encode(sample, return_dict=False)[0].mode() for sample in videos)
    return measure_statistics(means, vae.latent_channels)


# --- What a step needs -----------------------------------------------------------------------------------------------


def posterior_noise(vae: AutoencoderKLLeanVAE, sample: torch.Tensor, indices: list[int], seed: int) -> torch.Tensor:
    """Standard normal noise for the posterior of each clip; it depends on the seed and on the clip's index alone."""
    height, width = (edge // vae.spatial_compression_ratio for edge in sample.shape[3:])
    shape = (vae.latent_channels, vae.num_latent_frames(sample.shape[2]), height, width)
    noise = [np.random.default_rng([seed, 3, index]).standard_normal(shape, np.float32) for index in indices]
    return torch.from_numpy(np.stack(noise)).to(sample.device)


# --- The run ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces one entry of the recipe")
    options = parser.parse_args(arguments)
    recipe = load_recipe(Recipe, options.recipe, options.overrides)
    output, started = Path(recipe.output), time.monotonic()
    checkpoints = output / "checkpoints"

    # --- Init --------------------------------------------------------------------------------------------------------
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    torch.set_float32_matmul_precision("high")
    check_trackers(recipe.trackers)
    # Clips of one frame leave the video half of the model without a gradient, and a frozen encoder itself.
    has_images = recipe.data.image_ratio > 0 or any(size[0] == 1 for size in recipe.data.clip_sizes)
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision or "no",
        log_with=list(recipe.trackers) or None,
        project_dir=output,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=has_images or recipe.freeze_encoder_step is not None)
        ],
    )
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world_size = accelerator.process_index, accelerator.num_processes
    say = tqdm.write if is_main else lambda text: None
    if recipe.mixed_precision and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        say("warning: this CPU has no bfloat16 arithmetic, `mixed_precision=null` is many times faster")
    set_seed(recipe.seed)
    checkpoint = find_checkpoint(checkpoints, recipe.resume)

    # --- Data --------------------------------------------------------------------------------------------------------
    dataset = open_training_data(
        batch_size=recipe.batch_size,
        num_accumulation_steps=recipe.num_accumulation_steps,
        rank=rank,
        world_size=world_size,
        seed=recipe.seed,
        **{name: value for name, value in asdict(recipe.data).items() if name != "num_workers"},
    )
    say(f"data: {dataset.describe()}")
    view = recipe.validation
    validation_clips = load_validation_clips(view.folder, view.num_frames, view.size, rank, world_size)

    # --- Model -------------------------------------------------------------------------------------------------------
    vae = build_vae(recipe).to(device).train()
    if recipe.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    teacher = build_teacher(recipe.teacher, vae, device)
    if recipe.init == "pca" and checkpoint is None and is_main:  # the other processes receive these weights below
        videos = training_videos(dataset, recipe.num_init_clips, device)
        initialize_from_principal_components(vae, (video for video in videos if video.shape[2] > 1))
    if recipe.tune == "decoder":
        freeze_encoder(vae)
    adapted = add_lora(vae, **asdict(recipe.lora)) if recipe.tune == "lora" else vae  # wraps the same `vae`
    averaged = copy.deepcopy(adapted).requires_grad_(False).eval()  # filled from `ema` when it is needed
    if recipe.compile:
        for part in (vae.encoder, vae.bottleneck, vae.decoder):
            part.compile()
    bare_discriminators = build_discriminators(recipe, vae)
    check_sizes(recipe, vae, bare_discriminators)
    optimizer = build_optimizer(recipe.optimizer, vae)
    module = accelerator.prepare(build_training_module(recipe, vae, device))
    discriminators = [accelerator.prepare(discriminator) for discriminator in bare_discriminators]
    parameters = list(vae.parameters())
    discriminator_parameters = [p for discriminator in discriminators for p in discriminator.parameters()]
    optimizers = [optimizer]  # the second moves the discriminators, where there are any
    if discriminators:
        options = recipe.adversarial
        betas = (options.betas[0], options.betas[1])
        optimizers.append(
            torch.optim.AdamW(
                discriminator_parameters, options.learning_rate, betas, weight_decay=options.weight_decay
            )
        )
    for item in optimizers:
        accelerator.prepare(item)  # for checkpoints and fp16; steps are taken on the optimizers themselves
    ema = EMAModel(parameters, decay=recipe.ema_decay, foreach=True)
    progress = Progress()
    accelerator.register_for_checkpointing(ema, progress)
    num_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    num_parameters = sum(parameter.numel() for parameter in parameters)
    say(f"model: {num_parameters / 1e6:.2f} M parameters, {num_trained / 1e6:.2f} M trained, on {device}")

    # --- Resume ------------------------------------------------------------------------------------------------------
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        ema.to(device)
        dataset.load_state_dict(load_data_state(checkpoint, rank))
        say(f"resumed from {checkpoint}")
    loader = DataLoader(
        dataset,
        batch_sampler=dataset.batches(progress.step, recipe.num_steps),
        num_workers=recipe.data.num_workers,
        pin_memory=device.type == "cuda",
    )
    if is_main:
        checkpoints.mkdir(parents=True, exist_ok=True)
        remove_leftovers(checkpoints)
        save_recipe(recipe, output / "recipe.yaml")
        for name in ("log.jsonl", "validation.jsonl"):
            forget_after(output / name, progress.step if checkpoint is not None else -1)
    if recipe.trackers:
        accelerator.init_trackers("leanvae", config=describe_recipe(recipe))
    accelerator.wait_for_everyone()

    def run_validation() -> None:
        if view.folder is None:
            return
        ema.copy_to(averaged.parameters())
        folder = output / "validation" / f"step-{progress.step:07d}"
        averaged_vae = averaged.get_base_model() if recipe.tune == "lora" else averaged
        scores = gather_object(score_clips(averaged_vae, validation_clips, folder, view.num_videos))
        if is_main:
            record = {"step": progress.step} | summarize(scores)
            append_json(output / "validation.jsonl", record)
            write_picture(folder.with_suffix(".png"), scores)
            means = {name: value for name, value in record.items() if isinstance(value, float)}
            accelerator.log({f"validation/{name}": value for name, value in means.items()}, step=progress.step)
            say(f"step {progress.step}: validation PSNR {record['psnr_frame_mean_rgb']:.3f} dB")

    # --- Loop --------------------------------------------------------------------------------------------------------
    if progress.step == 0:
        run_validation()
    batches = iter(loader)
    bar = tqdm(total=recipe.num_steps, initial=progress.step, disable=not is_main, mininterval=1.0)
    means = RunningMeans()
    while progress.step < recipe.num_steps:
        # ---- whose turn it is ---------------------------------------------------------------------------------------
        step, step_started, data_seconds = progress.step, time.monotonic(), 0.0
        lr = recipe.optimizer.learning_rate_at(step, recipe.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        if recipe.freeze_encoder_step is not None and step >= recipe.freeze_encoder_step:
            freeze_encoder(vae)  # the average then takes these weights as they are, which the decoder learns from
        is_adversarial = bool(discriminators) and step >= recipe.adversarial.start_step
        takes_turns = is_adversarial and recipe.adversarial.update == "alternate"
        is_generator_turn = not takes_turns or (step - recipe.adversarial.start_step) % 2 == 0
        is_discriminator_turn = is_adversarial and not (takes_turns and is_generator_turn)

        # ---- gradients ----------------------------------------------------------------------------------------------
        step_loss, num_bad_videos = torch.zeros((), device=device), 0
        for part in range(recipe.num_accumulation_steps):
            data_started = time.monotonic()
            clips = next(batches)
            sample = pixels_to_sample(clips.pixels.to(device, non_blocking=True))
            noise = None
            if recipe.sample_posterior:
                noise = posterior_noise(vae, sample, clips.index.tolist(), recipe.seed)
            num_bad_videos += int(clips.num_skipped.sum())
            data_seconds += time.monotonic() - data_started
            teacher_latents = None if teacher is None else teacher.encode(sample)
            with contextlib.ExitStack() as stack:
                if part < recipe.num_accumulation_steps - 1:  # gradients are synchronised with the last part
                    for prepared in (module, *discriminators):
                        stack.enter_context(accelerator.no_sync(prepared))
                with torch.set_grad_enabled(is_generator_turn):
                    judges = bare_discriminators if is_adversarial and is_generator_turn else ()
                    loss, terms, pairs = module(sample, noise, (recipe.seed, 4, step), teacher_latents, judges)
                if is_generator_turn:
                    accelerator.backward(loss / recipe.num_accumulation_steps)
                    step_loss += loss.detach() / recipe.num_accumulation_steps
                if is_discriminator_turn:
                    for index, discriminator in enumerate(discriminators):
                        judge_loss, judge_terms = discriminator(*pairs[index])
                        accelerator.backward(judge_loss / recipe.num_accumulation_steps)
                        step_loss += judge_loss.detach() / recipe.num_accumulation_steps
                        terms |= {f"{'align_' * index}{name}": term for name, term in judge_terms.items()}

        # ---- update -------------------------------------------------------------------------------------------------
        accelerator.unscale_gradients()  # fp16
        grad_norms: dict[str, torch.Tensor | float] = {}
        if is_generator_turn:
            grad_norms["grad_norm"] = clip_grad_norm_(parameters, recipe.optimizer.max_grad_norm)
        if is_discriminator_turn:
            norm = clip_grad_norm_(discriminator_parameters, recipe.optimizer.max_grad_norm)
            grad_norms["discriminator_grad_norm"] = norm
        # Averages are the same on all processes, so all skip the same steps and leave the loop at the same one.
        minutes, mean_bad_videos, *finite = average(
            accelerator, [(time.monotonic() - started) / 60, num_bad_videos, step_loss, *grad_norms.values()]
        )
        is_finite = all(map(math.isfinite, finite))
        if is_finite and is_generator_turn:
            optimizer.step()
            ema.step(parameters)
        if is_finite and is_discriminator_turn:
            optimizers[1].step()
        if accelerator.scaler is not None:
            accelerator.scaler.update()  # fp16: a smaller scale after gradients that were not finite
        for item in optimizers:
            item.zero_grad()
        progress.step += 1
        progress.num_bad_videos += round(mean_bad_videos * world_size)
        progress.num_skipped += not is_finite
        progress.num_skipped_in_a_row = 0 if is_finite else progress.num_skipped_in_a_row + 1

        # ---- log, validate, save ------------------------------------------------------------------------------------
        out_of_time = recipe.max_minutes is not None and minutes >= recipe.max_minutes
        is_over = out_of_time or progress.step == recipe.num_steps
        if is_finite:  # with several accumulation steps, the terms of the last one stand for all
            seconds = {"seconds_per_step": time.monotonic() - step_started, "data_seconds_per_step": data_seconds}
            means.update(({"loss": loss.detach()} if is_generator_turn else {}) | terms | grad_norms | seconds)
        bar.update()
        if progress.step % recipe.log_every == 0 or is_over:
            record = {"step": progress.step, "lr": lr, "num_skipped": progress.num_skipped}
            record |= {"num_bad_videos": progress.num_bad_videos} | means.read(accelerator)
            if is_main:
                append_json(output / "log.jsonl", record)
                accelerator.log(record, step=progress.step)
                bar.set_postfix(loss=record.get("loss"), refresh=False)
        if progress.num_skipped_in_a_row >= recipe.max_skipped_steps:
            raise RuntimeError(
                f"Stopped: the {recipe.max_skipped_steps} newest steps had no finite loss and gradient."
            )
        if progress.step % recipe.validation.every == 0 or is_over:
            run_validation()
        if progress.step % recipe.save_every == 0 or is_over:
            data_state = dataset.state_dict(progress.step)
            save_checkpoint(accelerator, checkpoints, progress.step, recipe.keep_checkpoints, data_state)
        if out_of_time:
            say(f"stopped at step {progress.step} of {recipe.num_steps}: {minutes:.1f} minutes are over")
            break
    bar.close()

    # --- Export ------------------------------------------------------------------------------------------------------
    if is_main:
        ema.copy_to(averaged.parameters())
        if recipe.tune == "lora":
            averaged.save_pretrained(output / "adapter")
            (output / "adapter" / "README.md").unlink(missing_ok=True)  # a form that nobody filled in
            averaged = averaged.merge_and_unload()
        if teacher is None or teacher.latents_std is None:
            mean, std = measure_latents(averaged, training_videos(dataset, recipe.num_statistics_clips, device))
            averaged.register_to_config(latents_mean=mean, latents_std=std)
        if recipe.save_dtype != "float32":
            averaged.to(getattr(torch, recipe.save_dtype))
        run = asdict(progress) | {"minutes": (time.monotonic() - started) / 60}
        for name in ("log", "validation"):
            path = output / f"{name}.jsonl"
            run[name] = json.loads(path.read_text(encoding="utf-8").splitlines()[-1]) if path.exists() else None
        with replace_folder(output / "vae") as folder:
            averaged.save_pretrained(folder)
            write_model_card(folder, recipe, averaged, run)
        say(f"saved {output / 'vae'}")
        if recipe.push_to_hub is not None:
            upload_folder(output / "vae", recipe.push_to_hub)
            say(f"uploaded to {recipe.push_to_hub}")
    dataset.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])

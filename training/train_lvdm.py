"""Train a latent video diffusion model on the latents of a LeanVAE. Read it from top to bottom.

One process, CPU or GPU:

    python training/train_lvdm.py training/configs/lvdm_smoke.yaml

Several GPUs, or two processes on CPU:

    accelerate launch training/train_lvdm.py training/configs/lvdm_ucf101_4ch.yaml data.path=path/to/latents
    torchrun --nproc_per_node 2 training/train_lvdm.py training/configs/lvdm_shapes_mini.yaml data.path=path/to/latents

The recipe is a YAML file; `key=value` after it overrides one entry. The output folder receives

    recipe.yaml         the recipe with every default and override resolved
    log.jsonl           loss terms, learning rate, gradient norm and time, every `log_every` steps
    validation.jsonl    denoising losses of held-out latents at fixed noise levels, every `validation.every` steps
    validation/         generated videos, a grid in one mp4
    checkpoints/        everything needed to go on; the same command resumes from the newest one
    pipeline/           autoencoder, averaged transformer, scheduler and names of the classes, with a card, for
                        `DiffusionPipeline.from_pretrained`

A run that is killed at any moment and started again gives the numbers of one that was not: whatever is random follows
from the seed and the sample's number, and nothing else is remembered outside the checkpoint.
"""

import argparse
import contextlib
import copy
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from diffusers.training_utils import EMAModel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_leanvae.atomic import replace_folder
from diffusers_leanvae.conversion.checkpoints import is_checkpoint_reference
from diffusers_leanvae.data import Share, open_training_data
from diffusers_leanvae.data.latent_samples import LatentBatch, LatentData
from diffusers_leanvae.data.latent_shards import LatentFolder
from diffusers_leanvae.data.named import open_named_dataset
from diffusers_leanvae.data.shapes import MovingShapes
from diffusers_leanvae.generation.schedulers import make_scheduler
from diffusers_leanvae.hub import upload_folder
from diffusers_leanvae.latents import encode_batch, measure_statistics, normalize_latents
from diffusers_leanvae.loading import load_autoencoder, load_transformer
from diffusers_leanvae.losses.diffusion import EpsilonObjective, FlowMatchingObjective, TimestepSampling
from diffusers_leanvae.losses.representation import (
    AutoencoderFeatures,
    FeatureEncoder,
    ImageFeatures,
    RepresentationHead,
)
from diffusers_leanvae.models.transformer_latte import LeanVAELatteTransformer3DModel, latte_variant
from diffusers_leanvae.models.video_autoencoder import VideoAutoencoder
from diffusers_leanvae.trainer.checkpoints import (
    Progress,
    append_json,
    find_checkpoint,
    forget_after,
    load_data_state,
    remove_leftovers,
    save_checkpoint,
)
from diffusers_leanvae.trainer.diffusion_module import LatentDiffusionTrainingModule, draw_step, drop_labels
from diffusers_leanvae.trainer.loop import RunningMeans, average, build_optimizer, check_trackers
from diffusers_leanvae.trainer.model_card import describe_recipe, write_pipeline_card
from diffusers_leanvae.trainer.recipe import OptimizerRecipe, load_recipe, save_recipe
from diffusers_leanvae.video_io import write_video
from diffusers_leanvae.video_io.pixels import as_sample, unit_to_pixels, video_grid


# Of `optimizer.name: muon`: layers on the condition, of which a batch has too few to know their covariance, and the
# layer on top, which starts from zero.
ADAMW_LAYERS = ("norm1.linear", "norm_out.linear", "linear_1", "linear_2", "proj_out")


# --- Recipe: what the YAML file may hold -----------------------------------------------------------------------------


@dataclass
class DataRecipe:
    """Cached latents, or clips that are encoded on the way."""

    kind: Literal["latents", "videos", "shapes", "ucf101", "skytimelapse", "ffs", "taichi", "videofolder"] = "latents"
    # Of "latents": a folder that `leanvae encode-dataset` wrote; of "videos": what `open_training_data` takes, clips
    # cut at random without labels; of the named data sets: their folder, see `open_named_dataset`.
    path: str | None = None
    clip_size: list[int] = field(default_factory=lambda: [17, 256, 256])  # [T, H, W], of all but "latents"
    stride: int = 3  # distance of frames
    flip: bool | None = None  # mirror every other clip; null: what is usual for the data set, and not "videos"
    short_side: int | None = None  # of "videos": larger ones are scaled down to it
    sampling: Literal["exact", "reference"] = "exact"  # of named data sets
    num_draws: int = 16  # of named data sets: different clips per video
    num_clips: int = 10_000  # of "shapes"
    seed: int = 0  # of "shapes" and named data sets: what is drawn
    cache_gib: float = 4.0  # latents, or decoded videos, are kept in memory up to this size, by each process
    num_workers: int = 0


@dataclass
class ObjectiveRecipe:
    name: Literal["epsilon", "flow"] = "epsilon"  # "epsilon": noise and variance, as Latte; "flow": flow matching
    sampling: TimestepSampling = "uniform"
    is_stratified: bool = False  # spread the timesteps of a step evenly
    min_snr_gamma: float | None = None  # of "epsilon"


@dataclass
class RepresentationRecipe:
    """Representation alignment (2410.06940); off while `weight` is 0."""

    weight: float = 0.0  # 0.5 in the paper
    encoder: str = "vae"  # "vae": the autoencoder's own features | a vision transformer, folder or Hub repository
    after_block: int = 8
    hidden_dim: int = 2048


@dataclass
class ValidationRecipe:
    data: DataRecipe | None = None  # held-out latents or clips; null: no loss is measured
    every: int = 5000
    num_items: int = 64
    noise_levels: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])  # shares of the schedule
    num_samples: int = 16  # generated videos, of classes in turn; 0: none
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    fps: int = 8


@dataclass
class Recipe:
    output: str
    vae: str  # a bundled, saved or original model, here or on the Hub: see `load_autoencoder`
    data: DataRecipe = field(default_factory=DataRecipe)
    latent_statistics: Literal["vae", "data"] = "vae"  # "data": measure mean and deviation of channels, for the export
    num_statistics_items: int = 256  # for "data", where the latents are not cached
    variant: str | None = "XL/2"  # S, B, L, XL with patches of 2, 4, 8; null: `model` tells all
    model: dict[str, Any] = field(default_factory=dict)  # arguments of LeanVAELatteTransformer3DModel
    init: str | None = None  # a saved transformer or pipeline to go on from, or an original Latte checkpoint
    num_classes: int | None = None  # null: unconditional
    class_dropout: float = 0.1  # share of samples that get the null class
    num_images: int = 0  # images beside every video (joint training)
    seed: int = 0
    batch_size: int = 56  # samples per optimizer step, over all processes and accumulation steps
    num_accumulation_steps: int = 1
    num_steps: int = 1000
    max_minutes: float | None = None  # stop early, with a checkpoint and the pipeline as it is
    mixed_precision: Literal["bf16", "fp16"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False  # the blocks, which are nearly all of the work
    num_threads: int | None = None  # CPU threads of each process
    objective: ObjectiveRecipe = field(default_factory=ObjectiveRecipe)
    representation: RepresentationRecipe = field(default_factory=RepresentationRecipe)
    optimizer: OptimizerRecipe = field(
        default_factory=lambda: OptimizerRecipe(learning_rate=1e-4, schedule="constant", max_grad_norm=0.1)
    )
    clip_start_step: int = 0  # gradients are clipped from this step on
    ema_decay: float = 0.9999
    ema_min_decay: float = 0.0  # the decay is at least this from the second step on, and else (1 + step) / (10 + step)
    max_skipped_steps: int = 20  # give up after so many steps in a row without a finite loss and gradient
    log_every: int = 50
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = field(default_factory=list)  # beside log.jsonl
    validation: ValidationRecipe = field(default_factory=ValidationRecipe)
    save_every: int = 5000
    keep_checkpoints: int = 2
    resume: str | None = "latest"  # "latest": the newest in `output`, if any | a checkpoint folder | null
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the transformer in `pipeline/`
    push_to_hub: str | None = None  # user/name: upload `pipeline/` at the end

    def __post_init__(self) -> None:
        names = ["batch_size", "num_accumulation_steps", "num_steps", "log_every", "save_every", "keep_checkpoints"]
        counts = {name: getattr(self, name) for name in names} | {"validation.every": self.validation.every}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not 0.0 <= self.class_dropout <= 1.0:
            raise ValueError(f"`class_dropout` must be from 0 to 1, got {self.class_dropout}.")
        if self.objective.name == "flow" and self.objective.min_snr_gamma is not None:
            raise ValueError(
                f"`objective.min_snr_gamma` must be null with `objective.name: flow`, got "
                f"{self.objective.min_snr_gamma}."
            )
        depth = self.representation.after_block
        if self.representation.weight and (depth < 2 or depth % 2):
            raise ValueError(f"`representation.after_block` must be a positive even number, got {depth}.")
        if self.compile and self.optimizer.name == "muon":
            raise ValueError(
                "`compile` must be false with `optimizer.name: muon`, which watches the layers, got true."
            )


# --- What a run is made of -------------------------------------------------------------------------------------------


def open_data(data: DataRecipe, recipe: Recipe, num_images: int = 0, rank: int = 0, world_size: int = 1) -> LatentData:
    """The samples of training, or of validation."""
    if data.kind == "shapes":
        items: Any = MovingShapes(*data.clip_size, seed=data.seed, num_clips=data.num_clips)
    elif data.path is None:
        raise ValueError(f"`data.path` must be given for `data.kind: {data.kind}`, got null.")
    elif data.kind == "latents":
        items = LatentFolder(data.path)
    elif data.kind == "videos":
        if recipe.num_classes is not None:
            raise ValueError(f"`num_classes` must be null for `data.kind: videos`, got {recipe.num_classes}.")
        items = open_training_data(
            data.path,
            batch_size=recipe.batch_size,
            num_accumulation_steps=recipe.num_accumulation_steps,
            rank=rank,
            world_size=world_size,
            seed=recipe.seed,
            clip_sizes=[data.clip_size],
            short_side=data.short_side,
            stride=data.stride,
            flip=bool(data.flip),
            cache_gib=data.cache_gib,
        )
    else:
        num_frames, height, width = data.clip_size
        if height != width:
            raise ValueError(f"`data.clip_size` must be square for `data.kind: {data.kind}`, got {data.clip_size}.")
        items = open_named_dataset(
            data.kind,
            data.path,
            num_frames,
            height,
            data.sampling,
            data.seed,
            sample_stride=data.stride,
            flip=data.flip,
            num_draws=data.num_draws,
        )
    has_labels = recipe.num_classes is not None
    return LatentData(items, data.kind == "latents", has_labels, recipe.seed, num_images, data.cache_gib)


def measure_channels(
    data: LatentData, num_items: int, vae: VideoAutoencoder, device: torch.device
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the channels: those of the cache, or of the first items."""
    if data.has_latents:
        return data.items.statistics["mean"], data.items.statistics["std"]
    batches = data.first(num_items, 16)
    return measure_statistics((to_latents(batch.videos, False, vae, device) for batch in batches), vae.latent_channels)


def class_names(data: LatentData, num_classes: int | None) -> dict[int, str] | None:
    """Names of the classes, where the data has them."""
    if num_classes is None:
        return None
    names = getattr(data.items, "class_names", None)
    if names is None:
        return {index: str(index) for index in range(num_classes)}
    if len(names) != num_classes:
        raise ValueError(f"`num_classes` must be the {len(names)} classes of the data, got {num_classes}.")
    return {index: name.replace(",", " ") for index, name in enumerate(names)}


def build_transformer(recipe: Recipe, latent_shape: tuple[int, ...]) -> LeanVAELatteTransformer3DModel:
    """The model of a recipe for latents `(C, F, h, w)`; new, or of `init`."""
    channels, num_frames, height, width = latent_shape
    config: dict[str, Any] = {} if recipe.variant is None else dict(latte_variant(recipe.variant))
    config |= {
        "in_channels": channels,
        "out_channels": channels if recipe.objective.name == "flow" else 2 * channels,
        "num_latent_frames": num_frames,
        "sample_size": max(height, width),
        "num_classes": recipe.num_classes,
    }
    config |= recipe.model
    if recipe.init is None:
        return LeanVAELatteTransformer3DModel(**config)
    # An original file does not tell its heads; a saved model does.
    heads = {"num_attention_heads": recipe.model.get("num_attention_heads")}
    model = load_transformer(recipe.init, torch.float32, **heads if is_checkpoint_reference(recipe.init) else {})
    found = {"in_channels": model.in_channels, "out_channels": model.out_channels}
    for name, value in (found | {"num_classes": model.config["num_classes"]}).items():
        if value != config[name]:
            raise ValueError(f"`init` must have `{name}` {config[name]} for this recipe, got {value}.")
    return model


def build_objective(recipe: ObjectiveRecipe) -> EpsilonObjective | FlowMatchingObjective:
    if recipe.name == "flow":
        return FlowMatchingObjective(recipe.sampling)
    return EpsilonObjective(recipe.min_snr_gamma, recipe.sampling)


def build_feature_encoder(
    recipe: RepresentationRecipe, vae: VideoAutoencoder, device: torch.device
) -> FeatureEncoder | None:
    if not recipe.weight:
        return None
    if recipe.encoder == "vae":
        return AutoencoderFeatures(vae)
    return ImageFeatures.from_pretrained(recipe.encoder, vae.temporal_compression_ratio, device)


def build_pipeline(recipe: Recipe, vae: VideoAutoencoder, transformer: Any, id2label: dict[int, str] | None) -> Any:
    from diffusers_leanvae import LeanVAELattePipeline

    scheduler = make_scheduler("flow" if recipe.objective.name == "flow" else "ddpm")
    return LeanVAELattePipeline(vae, transformer, scheduler, id2label)


# --- What a step needs -----------------------------------------------------------------------------------------------


def to_latents(values: torch.Tensor, has_latents: bool, vae: VideoAutoencoder, device: torch.device) -> torch.Tensor:
    """Latents, not normalised, of what the data gives: latents, or pixels to encode."""
    values = values.to(device, non_blocking=True)
    return values.float() if has_latents else encode_batch(vae, values)


def join_images(latents: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Videos `(B, C, F, h, w)` and images `(B * n, C, 1, h, w)` to `(B, C, F + n, h, w)`."""
    return torch.cat((latents, images.squeeze(2).unflatten(0, (len(latents), -1)).transpose(1, 2)), dim=2)


def aim_at(
    encoder: FeatureEncoder, latents: torch.Tensor, batch: LatentBatch, has_latents: bool, vae: Any, patch_size: int
) -> torch.Tensor:
    """Features of the clean videos, one for each token; an encoder of pixels gets decoded ones of cached latents."""
    sample = None
    if encoder.needs_sample and has_latents:
        with torch.no_grad():
            sample = vae.decode(latents, return_dict=False)[0]
    elif encoder.needs_sample:
        sample = as_sample(batch.videos.to(latents.device))
    return encoder(latents, sample, (latents.shape[3] // patch_size, latents.shape[4] // patch_size))


# --- Validation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_losses(
    transformer: Any,
    objective: EpsilonObjective | FlowMatchingObjective,
    data: LatentData,
    vae: VideoAutoencoder,
    recipe: Recipe,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Loss terms of held-out items, with their labels, each with one noise of its own at every noise level."""
    view, rank, world_size = recipe.validation, accelerator.process_index, accelerator.num_processes
    sums: list[dict[str, Any]] = []
    for number, batch in enumerate(data.first(view.num_items, max(1, recipe.batch_size // world_size))):
        if number % world_size != rank:
            continue
        latents = normalize_latents(to_latents(batch.videos, data.has_latents, vae, accelerator.device), vae.config)
        noise = draw_step(batch.index.tolist(), latents.shape[1:], recipe.seed, stream=11, device=latents.device).noise
        labels = None if batch.class_labels is None else batch.class_labels.to(latents.device)
        for level in view.noise_levels:
            timesteps = objective.timesteps_at(torch.full((len(latents),), level, device=latents.device))
            output = transformer(objective.add_noise(latents, noise, timesteps), timesteps, labels).sample
            terms = objective.loss(output, latents, noise, timesteps)
            sums.append({"level": level, "count": len(latents)} | {name: x.sum().item() for name, x in terms.items()})
    sums = gather_object(sums)
    count = sum(record["count"] for record in sums)
    names = [name for name in sums[0] if name not in ("level", "count")]
    levels = {}
    for level in view.noise_levels:
        rows = [record for record in sums if record["level"] == level]
        levels[str(level)] = sum(row["loss"] for row in rows) / sum(row["count"] for row in rows)
    return {name: sum(record[name] for record in sums) / count for name in names} | {"levels": levels}


def write_samples(pipeline: Any, latent_shape: tuple[int, ...], recipe: Recipe, path: Path) -> None:
    """Generate videos, each from a noise of its own that stays the same all over training, and write their grid."""
    view, vae = recipe.validation, pipeline.vae
    labels = sample_labels(view.num_samples, recipe.num_classes)
    videos = []
    chunk = max(1, recipe.batch_size // recipe.num_accumulation_steps)
    for start in range(0, view.num_samples, chunk):
        numbers = range(start, min(start + chunk, view.num_samples))
        frames = pipeline(
            None if labels is None else labels[start : start + chunk],
            num_frames=vae.num_sample_frames(latent_shape[1]),
            height=latent_shape[2] * vae.spatial_compression_ratio,
            width=latent_shape[3] * vae.spatial_compression_ratio,
            num_inference_steps=view.num_inference_steps,
            guidance_scale=view.guidance_scale,
            num_videos_per_prompt=len(numbers) if labels is None else 1,
            generator=[torch.Generator().manual_seed(number) for number in numbers],
            output_type="pt",
        ).frames
        videos.append(frames.float().cpu())
    pixels = unit_to_pixels(torch.cat(videos).permute(0, 1, 3, 4, 2))  # (n, T, H, W, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, video_grid(pixels), fps=view.fps)


def sample_labels(num_samples: int, num_classes: int | None) -> list[int] | None:
    """Classes in turn, or spread evenly where there are more classes than samples."""
    if num_classes is None:
        return None
    if num_samples >= num_classes:
        return [number % num_classes for number in range(num_samples)]
    return [number * num_classes // num_samples for number in range(num_samples)]


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
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision or "no", log_with=list(recipe.trackers) or None, project_dir=output
    )
    device, is_main = accelerator.device, accelerator.is_main_process
    rank, world_size = accelerator.process_index, accelerator.num_processes
    say = tqdm.write if is_main else lambda text: None
    if recipe.mixed_precision and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        say("warning: this CPU has no bfloat16 arithmetic, `mixed_precision=null` is many times faster")
    set_seed(recipe.seed)
    checkpoint = find_checkpoint(checkpoints, recipe.resume)

    # --- Data --------------------------------------------------------------------------------------------------------
    vae = load_autoencoder(recipe.vae, torch.float32).to(device).requires_grad_(False).eval()
    data = open_data(recipe.data, recipe, recipe.num_images, rank, world_size)
    say(f"data: {data.describe()}")
    id2label = class_names(data, recipe.num_classes)
    view = recipe.validation
    held_out = None if view.data is None else open_data(view.data, recipe)
    has_latents = data.has_latents
    if recipe.latent_statistics == "data":
        mean, std = measure_channels(data, recipe.num_statistics_items, vae, device)
        vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0)
    (first,) = data.first(1, 1)
    latent_shape = tuple(to_latents(first.videos, has_latents, vae, device).shape[1:])
    if latent_shape[0] != vae.latent_channels:
        raise ValueError(
            f"`vae` must have the {latent_shape[0]} channels of the cached latents, got {vae.latent_channels}."
        )

    # --- Model -------------------------------------------------------------------------------------------------------
    transformer: Any = build_transformer(recipe, latent_shape).to(device).train()
    if recipe.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    objective = build_objective(recipe.objective)
    encoder = build_feature_encoder(recipe.representation, vae, device)
    head = None
    if encoder is not None:
        options = recipe.representation
        if options.after_block > transformer.config.num_layers:
            raise ValueError(
                f"`representation.after_block` must be at most {transformer.config.num_layers}, got "
                f"{options.after_block}."
            )
        head = RepresentationHead(
            transformer.inner_dim, encoder.dim, options.after_block, options.hidden_dim, options.weight
        ).to(device)
    averaged = copy.deepcopy(transformer).requires_grad_(False).eval()  # filled from `ema` when it is needed
    if recipe.compile:
        # The blocks' `forward` and not the blocks: compiled code does not see hooks that come later, and the
        # representation head captures tokens by one.
        for block in (*transformer.transformer_blocks, *transformer.temporal_transformer_blocks):
            block.forward = torch.compile(block.forward)
    bare_module = LatentDiffusionTrainingModule(transformer, objective, head)
    optimizer = build_optimizer(recipe.optimizer, bare_module, ADAMW_LAYERS)
    module = accelerator.prepare(bare_module)
    accelerator.prepare(optimizer)  # for checkpoints and fp16; steps are taken on the optimizer itself
    trained = [parameter for parameter in bare_module.parameters() if parameter.requires_grad]
    parameters = list(transformer.parameters())
    ema = EMAModel(parameters, decay=recipe.ema_decay, min_decay=recipe.ema_min_decay, foreach=True)
    progress = Progress()
    accelerator.register_for_checkpointing(ema, progress)
    num_parameters = sum(parameter.numel() for parameter in parameters)
    say(f"model: {num_parameters / 1e6:.2f} M parameters for latents {latent_shape}, on {device}")

    # --- Resume ------------------------------------------------------------------------------------------------------
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        ema.to(device)
        data.load_state_dict(load_data_state(checkpoint, rank))
        say(f"resumed from {checkpoint}")
    loader = DataLoader(
        data,
        batch_sampler=data.batches(
            recipe.batch_size,
            progress.step,
            recipe.num_steps,
            Share(rank, world_size, recipe.num_accumulation_steps),
        ),
        collate_fn=lambda batch: batch,  # the data gives whole batches
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
        accelerator.init_trackers("leanvae-lvdm", config=describe_recipe(recipe))
    accelerator.wait_for_everyone()

    def run_validation() -> None:
        ema.copy_to(averaged.parameters())
        if held_out is not None:
            record = {"step": progress.step}
            record |= measure_losses(averaged, objective, held_out, vae, recipe, accelerator)
            if is_main:
                append_json(output / "validation.jsonl", record)
                means = {name: value for name, value in record.items() if isinstance(value, float)}
                accelerator.log({f"validation/{name}": value for name, value in means.items()}, step=progress.step)
                say(f"step {progress.step}: validation loss {record['loss']:.4f}")
        if is_main and view.num_samples:
            pipeline = build_pipeline(recipe, vae, averaged, id2label)
            pipeline.set_progress_bar_config(disable=True)
            write_samples(pipeline, latent_shape, recipe, output / "validation" / f"step-{progress.step:07d}.mp4")
        accelerator.wait_for_everyone()

    # --- Loop --------------------------------------------------------------------------------------------------------
    batches = iter(loader)
    bar = tqdm(total=recipe.num_steps, initial=progress.step, disable=not is_main, mininterval=1.0)
    means = RunningMeans()
    while progress.step < recipe.num_steps:
        step, step_started, data_seconds = progress.step, time.monotonic(), 0.0
        lr = recipe.optimizer.learning_rate_at(step, recipe.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)

        # ---- gradients ----------------------------------------------------------------------------------------------
        step_loss, num_bad_videos = torch.zeros((), device=device), 0
        for part in range(recipe.num_accumulation_steps):
            data_started = time.monotonic()
            batch = next(batches)
            raw = to_latents(batch.videos, has_latents, vae, device)
            features = None
            if encoder is not None:
                features = aim_at(encoder, raw, batch, has_latents, vae, transformer.config.patch_size)
            if batch.images is not None:
                raw = join_images(raw, to_latents(batch.images, has_latents, vae, device))
            latents = normalize_latents(raw, vae.config)
            draws = draw_step(
                batch.index.tolist(),
                latents.shape[1:],
                recipe.seed,
                recipe.class_dropout,
                recipe.batch_size if recipe.objective.is_stratified else None,
                device=device,
            )
            labels = batch.class_labels
            if labels is not None and recipe.num_classes is not None:
                labels = drop_labels(labels.to(device, non_blocking=True), draws.drop, recipe.num_classes)
            num_bad_videos += batch.num_skipped
            data_seconds += time.monotonic() - data_started
            is_last = part == recipe.num_accumulation_steps - 1  # gradients are synchronised with the last part
            with contextlib.nullcontext() if is_last else accelerator.no_sync(module):
                loss, terms = module(
                    latents, draws.noise, objective.timesteps(draws.uniform), labels, recipe.num_images, features
                )
                accelerator.backward(loss / recipe.num_accumulation_steps)
            step_loss += loss.detach() / recipe.num_accumulation_steps

        # ---- update -------------------------------------------------------------------------------------------------
        accelerator.unscale_gradients()  # fp16
        max_norm = recipe.optimizer.max_grad_norm if step >= recipe.clip_start_step else math.inf
        grad_norm = clip_grad_norm_(trained, max_norm)
        # Averages are the same on all processes, so all skip the same steps and leave the loop at the same one.
        minutes, mean_bad_videos, *finite = average(
            accelerator, [(time.monotonic() - started) / 60, num_bad_videos, step_loss, grad_norm]
        )
        is_finite = all(map(math.isfinite, finite))
        if is_finite:
            optimizer.step()
            ema.step(parameters)
        if accelerator.scaler is not None:
            accelerator.scaler.update()  # fp16: a smaller scale after gradients that were not finite
        optimizer.zero_grad()
        progress.step += 1
        progress.num_bad_videos += round(mean_bad_videos * world_size)
        progress.num_skipped += not is_finite
        progress.num_skipped_in_a_row = 0 if is_finite else progress.num_skipped_in_a_row + 1

        # ---- log, validate, save ------------------------------------------------------------------------------------
        out_of_time = recipe.max_minutes is not None and minutes >= recipe.max_minutes
        is_over = out_of_time or progress.step == recipe.num_steps
        if is_finite:  # with several accumulation steps, the terms of the last one stand for all
            seconds = {"seconds_per_step": time.monotonic() - step_started, "data_seconds_per_step": data_seconds}
            means.update({"loss": step_loss} | terms | {"grad_norm": grad_norm} | seconds)
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
            data_state = data.state_dict(progress.step)
            save_checkpoint(accelerator, checkpoints, progress.step, recipe.keep_checkpoints, data_state)
        if out_of_time:
            say(f"stopped at step {progress.step} of {recipe.num_steps}: {minutes:.1f} minutes are over")
            break
    bar.close()

    # --- Export ------------------------------------------------------------------------------------------------------
    if is_main:
        ema.copy_to(averaged.parameters())
        if recipe.save_dtype != "float32":
            averaged.to(getattr(torch, recipe.save_dtype))
        pipeline = build_pipeline(recipe, vae, averaged, id2label)
        run = asdict(progress) | {"minutes": (time.monotonic() - started) / 60}
        for name in ("log", "validation"):
            path = output / f"{name}.jsonl"
            run[name] = json.loads(path.read_text(encoding="utf-8").splitlines()[-1]) if path.exists() else None
        with replace_folder(output / "pipeline") as folder:
            pipeline.save_pretrained(folder)
            write_pipeline_card(folder, recipe, pipeline, run)
        say(f"saved {output / 'pipeline'}")
        if recipe.push_to_hub is not None:
            upload_folder(output / "pipeline", recipe.push_to_hub)
            say(f"uploaded to {recipe.push_to_hub}")
    data.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])

"""Train a latent video diffusion model on the latents of a video autoencoder. Read it from top to bottom.

One process, CPU or GPU:

    python training/train_lvdm.py training/configs/lvdm_smoke.yaml

Several GPUs; the second line also starts two processes on CPU:

    accelerate launch training/train_lvdm.py training/configs/lvdm_ucf101_4ch.yaml data.path=path/to/latents
    torchrun --nproc_per_node 2 training/train_lvdm.py training/configs/lvdm_shapes_mini.yaml data.path=path/to/latents

The recipe is a YAML file; `key=value` after it overrides one entry. The output folder receives

    recipe.yaml         the recipe with every default and override resolved
    log.jsonl           loss terms, learning rate, gradient norm and time, every `log_every` steps
    validation.jsonl    denoising losses of held-out latents at fixed noise levels, every `validation.every` steps
    validation/         generated videos, a grid in one mp4
    checkpoints/        everything needed to resume; the same command resumes from the newest one
    pipeline/           autoencoder, averaged transformer, scheduler and names of the classes, with a card, for
                        `DiffusionPipeline.from_pretrained`

A run that is killed at any moment and started again gives the numbers of one that was not: whatever is random follows
from the seed and the sample's number, and nothing else is remembered outside the checkpoint.
"""

import contextlib
import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn.utils import clip_grad_norm_

from diffusers_leanvae.conversion.checkpoints import is_checkpoint_reference
from diffusers_leanvae.data import ClipOptions, Share, StepSchedule, open_clip_dataset
from diffusers_leanvae.data.latent_samples import LatentBatch, LatentData
from diffusers_leanvae.data.latent_shards import LatentFolder
from diffusers_leanvae.data.named import open_named_dataset
from diffusers_leanvae.data.shapes import MovingShapes
from diffusers_leanvae.generation.pipeline import LatentVideoPipeline
from diffusers_leanvae.generation.schedulers import make_scheduler
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
from diffusers_leanvae.trainer.denoising_validation import measure_losses, write_samples
from diffusers_leanvae.trainer.draws import draw_step, drop_labels
from diffusers_leanvae.trainer.loop import TrainingRun, build_optimizer
from diffusers_leanvae.trainer.model_card import write_pipeline_card
from diffusers_leanvae.trainer.recipe import OptimizerRecipe, RunRecipe, parse_recipe
from diffusers_leanvae.video_io.pixels import as_sample


# Of `optimizer.name: muon`: layers on the condition, of which a batch has too few to know their covariance, and the
# layer on top, which starts from zero.
ADAMW_LAYERS = ("norm1.linear", "norm_out.linear", "linear_1", "linear_2", "proj_out")


# --- Recipe: what the YAML file may hold -----------------------------------------------------------------------------


@dataclass
class DataRecipe:
    """Cached latents, or clips that are encoded on the fly."""

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

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"`validation.every` must be at least 1, got {self.every}.")


@dataclass(kw_only=True)
class Recipe(RunRecipe):
    vae: str  # a bundled, saved or original model, here or on the Hub: see `load_autoencoder`
    data: DataRecipe = field(default_factory=DataRecipe)
    latent_statistics: Literal["vae", "data"] = "vae"  # "data": measure mean and deviation of channels, for the export
    num_statistics_items: int = 256  # for "data", where the latents are not cached
    variant: str | None = "XL/2"  # S, B, L, XL with patches of 2, 4, 8; null: `model` tells all
    model: dict[str, Any] = field(default_factory=dict)  # arguments of LeanVAELatteTransformer3DModel
    init: str | None = None  # a saved transformer or pipeline to start from, or an original Latte checkpoint
    num_classes: int | None = None  # null: unconditional
    class_dropout: float = 0.1  # share of samples that get the null class
    num_images: int = 0  # images added to every video (joint training)
    batch_size: int = 56  # samples per optimizer step, over all processes and accumulation steps
    objective: ObjectiveRecipe = field(default_factory=ObjectiveRecipe)
    representation: RepresentationRecipe = field(default_factory=RepresentationRecipe)
    optimizer: OptimizerRecipe = field(
        default_factory=lambda: OptimizerRecipe(learning_rate=1e-4, schedule="constant", max_grad_norm=0.1)
    )
    clip_start_step: int = 0  # gradients are clipped from this step on
    ema_decay: float = 0.9999
    ema_min_decay: float = 0.0  # the decay is at least this from the second step on, and else (1 + step) / (10 + step)
    log_every: int = 50
    validation: ValidationRecipe = field(default_factory=ValidationRecipe)
    save_every: int = 5000

    def __post_init__(self) -> None:
        super().__post_init__()
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


# --- The step: what is minimised -------------------------------------------------------------------------------------


class StepOutput(NamedTuple):
    """The loss to minimise; its terms, unweighted means over the batch without gradients."""

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]


class LatentDiffusionTrainingModule(nn.Module):
    """The transformer with its objective, as the one module that a step calls.

    Gradients are synchronised between processes only for what runs inside the `forward` of the module that Accelerate
    has prepared, so all that has a gradient is computed here.

    Args:
        transformer: The denoiser.
        objective: What its predictions are compared with.
        representation: The head that aligns hidden tokens with features of another encoder, or `None`.
    """

    def __init__(
        self,
        transformer: LeanVAELatteTransformer3DModel,
        objective: EpsilonObjective | FlowMatchingObjective,
        representation: RepresentationHead | None = None,
    ) -> None:
        super().__init__()
        self.transformer, self.objective, self.representation = transformer, objective, representation

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        num_images: int = 0,
        features: torch.Tensor | None = None,
    ) -> StepOutput:
        """Denoise a batch and compare.

        Args:
            latents: Normalised latents `(B, C, F, h, w)`; the last `num_images` frames are images of their own.
            noise: Standard normal, of the same shape.
            timesteps: `(B,)`, as the objective gives them.
            class_labels: `(B,)` or, with images, `(B, 1 + num_images)`; `num_classes` is the null class.
            num_images: Number of images of each sample.
            features: What the representation head aims at, `(B, F - num_images, rows, columns, dim)`; without it the
                head is not used.
        """
        noisy, head = self.objective.add_noise(latents, noise, timesteps), self.representation
        capture = contextlib.nullcontext([]) if features is None or head is None else head.capture(self.transformer)
        with capture as captured:
            output = self.transformer(noisy, timesteps, class_labels, num_images, return_dict=False)[0]
        terms = {name: term.mean() for name, term in self.objective.loss(output, latents, noise, timesteps).items()}
        loss = terms.pop("loss")
        if features is not None and head is not None:
            terms["representation"] = head(captured[0], features)
            loss = loss + head.weight * terms["representation"]
        return StepOutput(loss, {name: term.detach() for name, term in terms.items()})


# --- What a run is made of -------------------------------------------------------------------------------------------


def open_data(data: DataRecipe, recipe: Recipe, share: Share, num_images: int = 0) -> LatentData:
    """Open the samples of training, or of validation."""
    if data.kind == "shapes":
        items = MovingShapes(*data.clip_size, seed=data.seed, num_clips=data.num_clips)
    elif data.path is None:
        raise ValueError(f"`data.path` must be given for `data.kind: {data.kind}`, got null.")
    elif data.kind == "latents":
        items = LatentFolder(data.path)
    elif data.kind == "videos":
        if recipe.num_classes is not None:
            raise ValueError(f"`num_classes` must be null for `data.kind: videos`, got {recipe.num_classes}.")
        options = ClipOptions([data.clip_size], False, data.short_side, data.stride, flip=bool(data.flip))
        schedule, cache_gib = StepSchedule(recipe.batch_size), data.cache_gib
        items = open_clip_dataset(data.path, options, schedule, share, seed=recipe.seed, cache_gib=cache_gib)
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


def build_head(
    recipe: RepresentationRecipe, transformer: LeanVAELatteTransformer3DModel, encoder: FeatureEncoder
) -> RepresentationHead:
    num_layers = transformer.config["num_layers"]
    if recipe.after_block > num_layers:
        raise ValueError(f"`representation.after_block` must be at most {num_layers}, got {recipe.after_block}.")
    return RepresentationHead(transformer.inner_dim, encoder.dim, recipe.after_block, recipe.hidden_dim, recipe.weight)


def build_pipeline(
    recipe: Recipe, vae: VideoAutoencoder, transformer: LeanVAELatteTransformer3DModel, id2label: dict[int, str] | None
) -> LatentVideoPipeline:
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
    encoder: FeatureEncoder,
    latents: torch.Tensor,
    batch: LatentBatch,
    has_latents: bool,
    vae: VideoAutoencoder,
    patch_size: int,
) -> torch.Tensor:
    """Features of the clean videos, one for each token; an encoder of pixels gets decoded ones of cached latents."""
    sample = None
    if encoder.needs_sample and has_latents:
        with torch.no_grad():
            sample = vae.decode(latents, return_dict=False)[0]
    elif encoder.needs_sample:
        sample = as_sample(batch.videos.to(latents.device))
    return encoder(latents, sample, (latents.shape[3] // patch_size, latents.shape[4] // patch_size))


def held_out_latents(
    data: LatentData, recipe: Recipe, vae: VideoAutoencoder, share: Share, device: torch.device
) -> Iterator[LatentBatch]:
    """This process's share of the held-out items, as normalised latents."""
    batches = data.first(recipe.validation.num_items, max(1, recipe.batch_size // share.world_size))
    for batch in islice(batches, share.rank, None, share.world_size):
        latents = to_latents(batch.videos, data.has_latents, vae, device)
        yield batch._replace(videos=normalize_latents(latents, vae.config))


# --- The run ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    recipe = parse_recipe(Recipe, __doc__, arguments)

    # --- Init --------------------------------------------------------------------------------------------------------
    run = TrainingRun(recipe, "leanvae-lvdm")
    accelerator, device, progress = run.accelerator, run.device, run.progress

    # --- Data --------------------------------------------------------------------------------------------------------
    vae = load_autoencoder(recipe.vae, torch.float32).to(device).requires_grad_(False).eval()
    data = open_data(recipe.data, recipe, run.share, recipe.num_images)
    run.say(f"data: {data.describe()}")
    id2label = class_names(data, recipe.num_classes)
    view = recipe.validation
    held_out = None
    if view.data is not None:  # all of it in every process
        held_out = open_data(view.data, recipe, Share(num_accumulation_steps=recipe.num_accumulation_steps))
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
    transformer = build_transformer(recipe, latent_shape).to(device).train()
    if recipe.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    objective = build_objective(recipe.objective)
    encoder = build_feature_encoder(recipe.representation, vae, device)
    head = None if encoder is None else build_head(recipe.representation, transformer, encoder).to(device)
    averaged = copy.deepcopy(transformer).requires_grad_(False).eval()  # filled from `ema` when it is needed
    if recipe.compile:
        # The blocks' `forward` and not the blocks: compiled code does not see hooks that come later, and the
        # representation head captures tokens by one.
        for block in (*transformer.transformer_blocks, *transformer.temporal_transformer_blocks):
            block.forward = torch.compile(block.forward)
    bare_module = LatentDiffusionTrainingModule(transformer, objective, head)
    optimizer = build_optimizer(recipe.optimizer, bare_module, ADAMW_LAYERS)
    module = accelerator.prepare(bare_module)
    trained = [parameter for parameter in bare_module.parameters() if parameter.requires_grad]
    parameters = list(transformer.parameters())
    ema = EMAModel(parameters, decay=recipe.ema_decay, min_decay=recipe.ema_min_decay, foreach=True)
    num_parameters = sum(parameter.numel() for parameter in parameters)
    run.say(f"model: {num_parameters / 1e6:.2f} M parameters for latents {latent_shape}, on {device}")

    # --- Resume ------------------------------------------------------------------------------------------------------
    run.resume(data, ema, [optimizer])

    def run_validation() -> None:
        ema.copy_to(averaged.parameters())
        if held_out is not None:
            batches = held_out_latents(held_out, recipe, vae, run.share, device)
            figures = measure_losses(averaged, objective, batches, view.noise_levels, recipe.seed)
            if run.is_main:
                run.log_validation(figures)
                run.say(f"step {progress.step}: validation loss {figures['loss']:.4f}")
        if run.is_main and view.num_samples:
            pipeline = build_pipeline(recipe, vae, averaged, id2label)
            pipeline.set_progress_bar_config(disable=True)
            path = run.output / "validation" / f"step-{progress.step:07d}.mp4"
            write_samples(
                pipeline,
                path,
                view.num_samples,
                recipe.num_classes,
                max(1, recipe.batch_size // recipe.num_accumulation_steps),
                view.fps,
                num_frames=vae.num_sample_frames(latent_shape[1]),
                height=latent_shape[2] * vae.spatial_compression_ratio,
                width=latent_shape[3] * vae.spatial_compression_ratio,
                num_inference_steps=view.num_inference_steps,
                guidance_scale=view.guidance_scale,
            )
        accelerator.wait_for_everyone()

    # --- Loop --------------------------------------------------------------------------------------------------------
    batches = run.load(
        data.batches(recipe.batch_size, progress.step, recipe.num_steps, run.share),
        recipe.data.num_workers,
        collate_fn=lambda batch: batch,  # the data gives whole batches
    )
    for step in run.steps():
        # ---- gradients ----------------------------------------------------------------------------------------------
        for _ in run.parts(module):
            with run.loading():
                batch = next(batches)
                raw = to_latents(batch.videos, has_latents, vae, device)
                features = None
                if encoder is not None:
                    features = aim_at(encoder, raw, batch, has_latents, vae, transformer.config["patch_size"])
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
                run.num_bad_videos += batch.num_skipped
            timesteps = objective.timesteps(draws.uniform)
            loss, terms = module(latents, draws.noise, timesteps, labels, recipe.num_images, features)
            run.backward(loss)

        # ---- update -------------------------------------------------------------------------------------------------
        max_norm = recipe.optimizer.max_grad_norm if step >= recipe.clip_start_step else math.inf
        grad_norm = clip_grad_norm_(trained, max_norm)
        if run.is_finite(grad_norm):
            optimizer.step()
            ema.step(parameters)

        # ---- log, validate, save ------------------------------------------------------------------------------------
        # With several accumulation steps, the terms of the last one stand for all.
        run.finish({"loss": run.loss} | terms | {"grad_norm": grad_norm})
        if run.is_due(view.every):
            run_validation()
        if run.is_due(recipe.save_every):
            run.save()

    # --- Export ------------------------------------------------------------------------------------------------------
    if run.is_main:
        ema.copy_to(averaged.parameters())
        if recipe.save_dtype != "float32":
            averaged.to(getattr(torch, recipe.save_dtype))
        pipeline = build_pipeline(recipe, vae, averaged, id2label)
        with run.export("pipeline") as folder:
            pipeline.save_pretrained(folder)
            write_pipeline_card(folder, recipe, pipeline, run.summarize())
    run.close()


if __name__ == "__main__":
    main(sys.argv[1:])

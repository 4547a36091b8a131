"""Train a latent video diffusion model on the latents of a video autoencoder. Read it from top to bottom.

One process, CPU or GPU:

    python training/train_lvdm.py training/configs/lvdm_smoke.yaml

Several GPUs; the second line also starts two processes on CPU:

    accelerate launch training/train_lvdm.py training/configs/lvdm_ucf101_4ch.yaml data.path=path/to/latents
    torchrun --nproc_per_node 2 training/train_lvdm.py training/configs/lvdm_shapes_mini.yaml data.path=path/to/latents

The model is unconditional, of classes (`num_classes`), or of texts (`text`).

The recipe is a YAML file; `key=value` after it overrides one entry. The output folder receives

    recipe.yaml         the recipe with every default and override resolved
    log.jsonl           loss terms, learning rate, gradient norm and time, every `log_every` steps
    validation.jsonl    denoising losses of held-out latents at fixed noise levels, every `validation.every` steps
    validation/         generated videos, a grid in one mp4
    checkpoints/        everything needed to resume; the same command resumes from the newest one
    pipeline/           autoencoder, averaged transformer, scheduler and names of the classes, or tokenizer and text
                        encoder, with a card, for `DiffusionPipeline.from_pretrained`
    adapter/            of `tune: lora`, the adapters by themselves, for `load_lora_weights`; pipeline/ has them merged

A run that is killed at any moment and started again gives the numbers of one that was not: whatever is random follows
from the seed and the sample's number, and nothing else is remembered outside the checkpoint.
"""

import contextlib
import copy
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from diffusers_leanvae.atomic import replace_folder
from diffusers_leanvae.conversion.checkpoints import is_checkpoint_reference
from diffusers_leanvae.data import Share
from diffusers_leanvae.data.latent_samples import LatentBatch, LatentData
from diffusers_leanvae.generation.lora import save_lora
from diffusers_leanvae.generation.pipeline import LatentVideoPipeline, Transformer
from diffusers_leanvae.generation.schedulers import make_scheduler
from diffusers_leanvae.latents import encode_batch, measure_statistics, normalize_latents
from diffusers_leanvae.launching import leave_job
from diffusers_leanvae.loading import load_autoencoder, load_transformer
from diffusers_leanvae.losses.diffusion import EpsilonObjective, FlowMatchingObjective, TimestepSampling
from diffusers_leanvae.losses.representation import RepresentationHead
from diffusers_leanvae.models.transformer_latte import LeanVAELatteTransformer3DModel, latte_variant
from diffusers_leanvae.models.video_autoencoder import VideoAutoencoder
from diffusers_leanvae.text_encoders import TextEmbeddings, encode_tokens
from diffusers_leanvae.trainer.checkpoints import writing
from diffusers_leanvae.trainer.denoising_validation import denoise, measure_losses, sample_labels, write_samples
from diffusers_leanvae.trainer.diffusion_data import DataRecipe, class_names, open_data
from diffusers_leanvae.trainer.draws import StepDraws, draw_given_frames, draw_step, drop_labels
from diffusers_leanvae.trainer.finetuning import (
    TransformerLoraRecipe,
    add_transformer_lora,
    check_agreement,
    check_keys,
    check_variant,
)
from diffusers_leanvae.trainer.loop import TrainingRun, build_optimizer, weights_to_average
from diffusers_leanvae.trainer.model_card import write_pipeline_card
from diffusers_leanvae.trainer.recipe import (
    OptimizerRecipe,
    RunRecipe,
    check_amounts,
    check_counts,
    check_positives,
    check_shares,
    parse_recipe,
)
from diffusers_leanvae.trainer.representation_features import (
    RepresentationRecipe,
    aim_at,
    build_feature_encoder,
    build_head,
)
from diffusers_leanvae.trainer.sharding import WeightAverage, clip_gradients
from diffusers_leanvae.trainer.text_conditioning import Captions, TextRecipe, build_text_transformer, open_captions


# Of `optimizer.name: muon`: layers on the condition, of which a batch has too few to know their covariance, and the
# layer on top, which starts from zero.
ADAMW_LAYERS = ("norm1.linear", "norm_out.linear", "adaln_single.linear", "linear_1", "linear_2", "proj_out")


# --- Recipe: what the YAML file may hold -----------------------------------------------------------------------------


@dataclass
class ObjectiveRecipe:
    """What the transformer is trained to predict, and at which noise levels."""

    name: Literal["epsilon", "flow"] = "epsilon"  # "epsilon": noise and variance, as Latte; "flow": flow matching
    sampling: TimestepSampling = "uniform"
    shift: float = 1.0  # of "flow": above 1 more training, and more steps of sampling, at high noise
    is_stratified: bool = False  # spread the timesteps of a step evenly
    min_snr_gamma: float | None = None  # of "epsilon"

    def __post_init__(self) -> None:
        check_positives(self, "shift", "min_snr_gamma", prefix="objective.")


@dataclass
class GivenFramesRecipe:
    """Image to video: some samples are given their first latent frames without noise, to learn to go on from there."""

    share: float = 0.0  # of the samples
    max_frames: int = 1  # latent frames, 1 to this number; windows of long videos overlap by 2

    def __post_init__(self) -> None:
        check_shares(self, "share", prefix="given_frames.")
        check_counts(self, "max_frames", prefix="given_frames.")


@dataclass
class ValidationRecipe:
    """What is measured and generated every few steps."""

    data: DataRecipe | None = None  # held-out latents or clips; null: no loss is measured
    every: int = 5000
    num_items: int = 64
    noise_levels: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])  # shares of the schedule
    num_samples: int = 16  # generated videos, of classes or prompts in turn; 0: none
    prompts: list[str] = field(default_factory=list)  # with `text`; empty: captions of the data
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    fps: int = 8

    def __post_init__(self) -> None:
        check_counts(self, "every", "num_items", "num_inference_steps", "fps", prefix="validation.")
        check_amounts(self, "num_samples", "guidance_scale", prefix="validation.")
        if not self.noise_levels or not all(0.0 <= level <= 1.0 for level in self.noise_levels):
            raise ValueError(
                f"`validation.noise_levels` must hold at least one number, all from 0 to 1, got {self.noise_levels}."
            )


@dataclass(kw_only=True)
class Recipe(RunRecipe):
    vae: str  # a bundled, saved or original model, here or on the Hub: see `load_autoencoder`
    data: DataRecipe = field(default_factory=DataRecipe)
    latent_statistics: Literal["vae", "data"] = "vae"  # "data": measure mean and deviation of channels, for the export
    num_statistics_items: int = 256  # for "data", where the latents are not cached
    # S, B, L, XL with patches of 2, 4, 8, but for what `model` says; null: the size of `init`, or XL/2 for a new one.
    variant: str | None = None
    # Arguments of LeanVAELatteTransformer3DModel, with `text` of LatteTransformer3DModel. With `init` they must agree.
    model: dict[str, Any] = field(default_factory=dict)
    # A saved transformer or pipeline to start from; for a model that is not of texts, also an original checkpoint.
    init: str | None = None
    tune: Literal["full", "lora"] = "full"  # "lora": of the model in `init`, low-rank adapters alone
    lora: TransformerLoraRecipe = field(default_factory=TransformerLoraRecipe)
    num_classes: int | None = None  # null: unconditional
    class_dropout: float = 0.1  # share of samples that get the null class
    text: TextRecipe | None = None  # null: not of texts
    given_frames: GivenFramesRecipe = field(default_factory=GivenFramesRecipe)
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
        check_counts(self, "num_statistics_items", "num_classes")
        check_amounts(self, "num_images", "clip_start_step")
        check_shares(self, "class_dropout", "ema_min_decay")
        if self.objective.name == "flow" and self.objective.min_snr_gamma is not None:
            raise ValueError(
                f"`objective.min_snr_gamma` must be null with `objective.name: flow`, got "
                f"{self.objective.min_snr_gamma}."
            )
        if self.objective.name != "flow" and self.objective.shift != 1.0:
            raise ValueError(
                f"`objective.shift` must be 1.0 with `objective.name: {self.objective.name}`, got "
                f"{self.objective.shift}."
            )
        if self.text is not None:
            legal = {"num_classes": None, "num_images": 0, "representation.weight": 0.0}
            found = (self.num_classes, self.num_images, self.representation.weight)
            for (name, value), came in zip(legal.items(), found, strict=True):
                if came != value:
                    raise ValueError(f"`{name}` must be {'null' if value is None else value} with `text`, got {came}.")
        if self.tune == "lora":
            if self.init is None:
                raise ValueError("`tune` must be 'full' for a new model, got 'lora' without `init`.")
            if self.text is not None and self.text.train_text_encoder:
                raise ValueError("`text.train_text_encoder` must be false with `tune: lora`, got true.")


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
        text_encoder: A model of transformers that is trained along, or `None`.
    """

    def __init__(
        self,
        transformer: Transformer,
        objective: EpsilonObjective | FlowMatchingObjective,
        representation: RepresentationHead | None = None,
        text_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.transformer, self.objective, self.representation = transformer, objective, representation
        self.text_encoder = text_encoder

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        num_images: int = 0,
        features: torch.Tensor | None = None,
        text: TextEmbeddings | None = None,
        num_given: torch.Tensor | None = None,
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
            text: Texts; with a `text_encoder` the ids of their tokens, `(B, length)`, in place of embeddings.
            num_given: First latent frames of each sample without noise, `(B,)`, which do not count in the loss.
        """
        noisy, head, weight = self.objective.add_noise(latents, noise, timesteps), self.representation, None
        if num_given is not None:
            is_given = torch.arange(latents.shape[2], device=latents.device) < num_given[:, None]
            is_given = is_given[:, None, :, None, None]
            noisy, weight = torch.where(is_given, latents, noisy), ~is_given
        if text is not None and self.text_encoder is not None:
            text = text._replace(embeds=encode_tokens(self.text_encoder, text.embeds, text.mask))
        capture = contextlib.nullcontext([]) if features is None or head is None else head.capture(self.transformer)
        with capture as captured:
            output = denoise(self.transformer, noisy, timesteps, class_labels, text, num_images)
        losses = self.objective.loss(output, latents, noise, timesteps, weight)
        terms = {name: term.mean() for name, term in losses.items()}
        loss = terms.pop("loss")
        if features is not None and head is not None:
            terms["representation"] = head(captured[0], features)
            loss = loss + head.weight * terms["representation"]
        return StepOutput(loss, {name: term.detach() for name, term in terms.items()})


# --- What a run is made of -------------------------------------------------------------------------------------------


def measure_channels(
    data: LatentData, num_items: int, vae: VideoAutoencoder, device: torch.device
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the channels: those of the cache, or of the first items."""
    if data.has_latents:
        return data.items.statistics["mean"], data.items.statistics["std"]
    batches = data.first(num_items, 16)
    return measure_statistics((to_latents(batch.videos, False, vae, device) for batch in batches), vae.latent_channels)


def build_transformer(
    recipe: Recipe, latent_shape: tuple[int, ...], caption_channels: int | None = None
) -> Transformer:
    """The model of a recipe for latents `(C, F, h, w)` and texts of so many channels; new, or of `init`."""
    channels, num_frames, height, width = latent_shape
    config: dict[str, Any] = latte_variant(recipe.variant or "XL/2") | {
        "in_channels": channels,
        "out_channels": channels if recipe.objective.name == "flow" else 2 * channels,
        "num_latent_frames": num_frames,
        "sample_size": max(height, width),
        "num_classes": recipe.num_classes,
    }
    if caption_channels is not None:
        model = build_text_transformer(
            config, recipe.model, caption_channels, recipe.init, may_start_anew=recipe.tune == "full"
        )
        if recipe.init is not None and recipe.variant is not None:  # it counts pairs of blocks
            found = dict(model.config) | {"num_layers": 2 * model.config["num_layers"]}
            check_variant(recipe.variant, recipe.model, found)
        return model
    check_keys(LeanVAELatteTransformer3DModel, recipe.model)
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
    check_agreement(model, recipe.model)
    if recipe.variant is not None:
        check_variant(recipe.variant, recipe.model, model.config)
    return model


def build_objective(recipe: ObjectiveRecipe) -> EpsilonObjective | FlowMatchingObjective:
    if recipe.name == "flow":
        return FlowMatchingObjective(recipe.sampling, shift=recipe.shift)
    return EpsilonObjective(recipe.min_snr_gamma, recipe.sampling)


def build_pipeline(
    recipe: Recipe,
    vae: VideoAutoencoder,
    transformer: Transformer,
    id2label: dict[int, str] | None,
    tokenizer: Any = None,
    text_encoder: Any = None,
) -> LatentVideoPipeline:
    from diffusers_leanvae import LeanVAELattePipeline, LeanVAELatteTextToVideoPipeline

    objective = recipe.objective
    scheduler = make_scheduler("flow", objective.shift) if objective.name == "flow" else make_scheduler("ddpm")
    is_clean = recipe.given_frames.share > 0
    if recipe.text is None:
        return LeanVAELattePipeline(vae, transformer, scheduler, id2label, is_clean)
    return LeanVAELatteTextToVideoPipeline(tokenizer, text_encoder, vae, transformer, scheduler, is_clean)


def sample_prompts(recipe: Recipe, data: LatentData) -> list[str]:
    """Texts to show what the model does, at least one: those of the recipe, or captions of the data."""
    if recipe.validation.prompts:
        return recipe.validation.prompts
    count = max(1, recipe.validation.num_samples)
    return [caption for batch in data.first(count, count) for caption in batch.captions or ()] or [""]


def sample_conditions(recipe: Recipe, captions: Captions | None, prompts: list[str]) -> dict[str, Any] | None:
    """The pipeline's arguments for the samples of validation: classes or texts in turn."""
    count = recipe.validation.num_samples
    if captions is None:
        labels = sample_labels(count, recipe.num_classes)
        return None if labels is None else {"class_labels": labels}
    return captions.sample_arguments([prompts[number % len(prompts)] for number in range(count)]) if count else None


# --- What a step needs -----------------------------------------------------------------------------------------------


class StepInput(NamedTuple):
    """A batch with all that is random about it; `text` as the training module takes it."""

    batch: LatentBatch
    draws: StepDraws
    text: TextEmbeddings | None
    num_given: torch.Tensor | None


@dataclass
class StepMaker:
    """Draw what is random about a batch, and tokenize its captions, in the workers of the loader.

    Args:
        recipe: The recipe.
        noise_shape: Shape of a sample's noise.
        captions: Turns captions into what the module takes, for a model of texts.
    """

    recipe: Recipe
    noise_shape: tuple[int, ...]
    captions: Captions | None

    def __call__(self, batch: LatentBatch) -> StepInput:
        recipe, given, indices = self.recipe, self.recipe.given_frames, batch.index.tolist()
        dropout = recipe.class_dropout if recipe.text is None else recipe.text.caption_dropout
        spread = recipe.batch_size if recipe.objective.is_stratified else None
        draws = draw_step(indices, self.noise_shape, recipe.seed, dropout, spread)
        text = None if self.captions is None else self.captions.prepare(batch, draws.drop)
        num_given = None
        if given.share:
            num_given = draw_given_frames(indices, recipe.seed, given.share, given.max_frames)
        return StepInput(batch, draws, text, num_given)


def to_latents(values: torch.Tensor, has_latents: bool, vae: VideoAutoencoder, device: torch.device) -> torch.Tensor:
    """Latents, not normalised, of what the data gives: latents, or pixels to encode."""
    values = values.to(device, non_blocking=True)
    return values.float() if has_latents else encode_batch(vae, values)


def latent_shape_of(name: str, data: LatentData, vae: VideoAutoencoder, device: torch.device) -> tuple[int, ...]:
    """Shape `(C, F, h, w)` of the latents of the first usable item of `name`, as errors call it."""
    first = next(data.first(sys.maxsize, 1), None)
    if first is None:
        raise ValueError(f"`{name}` must hold at least one usable item, got none.")
    return tuple(to_latents(first.videos, data.has_latents, vae, device).shape[1:])


def join_images(latents: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Videos `(B, C, F, h, w)` and images `(B * n, C, 1, h, w)` to `(B, C, F + n, h, w)`."""
    return torch.cat((latents, images.squeeze(2).unflatten(0, (len(latents), -1)).transpose(1, 2)), dim=2)


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
    if recipe.text is not None and recipe.data.num_workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork

    # --- Init --------------------------------------------------------------------------------------------------------
    run = TrainingRun(recipe, "leanvae-lvdm", can_shard=True)
    accelerator, device, progress = run.accelerator, run.device, run.progress

    # --- Data --------------------------------------------------------------------------------------------------------
    vae = load_autoencoder(recipe.vae, torch.float32).to(device).requires_grad_(False).eval()
    data = open_data(recipe.data, recipe, run.share, recipe.num_classes, recipe.text, recipe.num_images)
    run.say(f"data: {data.describe()}")
    id2label = class_names(data, recipe.num_classes)
    captions = None if recipe.text is None else open_captions(recipe.text, recipe.init, data, device)
    view = recipe.validation
    held_out = None
    if view.data is not None:  # all of it in every process
        everything = Share(num_accumulation_steps=recipe.num_accumulation_steps)
        held_out = open_data(view.data, recipe, everything, recipe.num_classes, recipe.text)
        if captions is not None:
            captions.check(held_out)
    has_latents = data.has_latents
    if recipe.latent_statistics == "data":
        mean, std = measure_channels(data, recipe.num_statistics_items, vae, device)
        vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0)
    latent_shape = latent_shape_of("data", data, vae, device)
    if latent_shape[0] != vae.latent_channels:
        raise ValueError(
            f"`vae` must have the {latent_shape[0]} channels of the cached latents, got {vae.latent_channels}."
        )
    if held_out is not None:
        shape = latent_shape_of("validation.data", held_out, vae, device)
        if shape != latent_shape:
            raise ValueError(
                f"`validation.data` must hold latents of the shape {latent_shape} of those of `data`, got {shape}."
            )
    if recipe.given_frames.max_frames >= latent_shape[1] and recipe.given_frames.share:
        raise ValueError(
            f"`given_frames.max_frames` must be less than the {latent_shape[1]} latent frames, got "
            f"{recipe.given_frames.max_frames}."
        )

    # --- Model -------------------------------------------------------------------------------------------------------
    width = None if captions is None else captions.width
    transformer = build_transformer(recipe, latent_shape, width).to(device).train()
    if recipe.tune == "lora":
        add_transformer_lora(transformer, recipe.lora)
    text_encoder = None if captions is None else captions.trained_model
    if recipe.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    objective = build_objective(recipe.objective)
    encoder = build_feature_encoder(recipe.representation, vae, device)
    head = None if encoder is None else build_head(recipe.representation, transformer, encoder).to(device)
    # Filled from `ema` when they are needed; with FSDP, which is to save memory, on the processor until then.
    averaged = copy.deepcopy(transformer).requires_grad_(False).eval()
    averaged_encoder = None if text_encoder is None else copy.deepcopy(text_encoder).requires_grad_(False).eval()
    averaged_parameters = [*averaged.parameters(), *(averaged_encoder.parameters() if averaged_encoder else ())]
    averaged_device = "cpu" if run.is_sharding else device
    averaged.to(averaged_device)
    blocks = (*transformer.transformer_blocks, *transformer.temporal_transformer_blocks)
    if recipe.compile:
        # The blocks' `forward` and not the blocks: compiled code does not see hooks that come later, and the
        # representation head captures tokens by one.
        for block in blocks:
            block.forward = torch.compile(block.forward)
    bare_module = LatentDiffusionTrainingModule(transformer, objective, head, text_encoder)
    optimizer = build_optimizer(recipe.optimizer, bare_module, ADAMW_LAYERS)
    module = run.prepare(bare_module, optimizer, blocks)
    trained = [parameter for parameter in bare_module.parameters() if parameter.requires_grad]
    parameters = [*transformer.parameters(), *(text_encoder.parameters() if text_encoder else ())]
    ema = WeightAverage(
        parameters, recipe.ema_power, decay=recipe.ema_decay, min_decay=recipe.ema_min_decay, foreach=True
    )
    num_parameters = sum(parameter.numel() for parameter in parameters)
    tuned = "" if recipe.tune == "full" else f", {sum(x.numel() for x in trained) / 1e6:.2f} M trained"
    run.say(f"model: {num_parameters / 1e6:.2f} M parameters{tuned} for latents {latent_shape}, on {device}")

    prompts = [] if captions is None else sample_prompts(recipe, held_out or data)
    conditions = sample_conditions(recipe, captions, prompts)

    # --- Resume ------------------------------------------------------------------------------------------------------
    run.resume(data, ema, [optimizer])

    def make_pipeline() -> LatentVideoPipeline:
        tokenizer, encoder = (None, None) if captions is None else captions.parts(averaged_encoder)
        return build_pipeline(recipe, vae, averaged, id2label, tokenizer, encoder)

    def run_validation() -> None:
        ema.copy_to(averaged_parameters)
        averaged.to(device)
        if held_out is not None:
            batches = held_out_latents(held_out, recipe, vae, run.share, device)
            encode = None if captions is None else partial(captions.encode, model=averaged_encoder)
            figures = measure_losses(averaged, objective, batches, view.noise_levels, recipe.seed, encode)
            if run.is_main:
                run.log_validation(figures)
                run.say(f"step {progress.step}: validation loss {figures['loss']:.4f}")
        if run.is_main and view.num_samples:
            pipeline = make_pipeline()
            pipeline.set_progress_bar_config(disable=True)
            path = run.output / "validation" / f"step-{progress.step:07d}.mp4"
            write_samples(
                pipeline,
                path,
                view.num_samples,
                conditions,
                max(1, recipe.batch_size // recipe.num_accumulation_steps),
                view.fps,
                num_frames=vae.num_sample_frames(latent_shape[1]),
                height=latent_shape[2] * vae.spatial_compression_ratio,
                width=latent_shape[3] * vae.spatial_compression_ratio,
                num_inference_steps=view.num_inference_steps,
                guidance_scale=view.guidance_scale,
            )
            run.show({}, {"samples": path})
        averaged.to(averaged_device)
        accelerator.wait_for_everyone()

    # --- Loop --------------------------------------------------------------------------------------------------------
    if progress.step > 0 and run.is_due(view.every):  # the run may have stopped on its way to it
        run_validation()
    noise_shape = (latent_shape[0], latent_shape[1] + recipe.num_images, *latent_shape[2:])
    batches = run.load(
        data.batches(recipe.batch_size, progress.step, recipe.num_steps, run.share),
        recipe.data.num_workers,
        collate_fn=StepMaker(recipe, noise_shape, captions),  # the data gives whole batches
    )
    for step in run.steps():
        # ---- gradients ----------------------------------------------------------------------------------------------
        for _ in run.parts(module):
            with run.loading():
                batch, draws, text, num_given = next(batches)
                raw = to_latents(batch.videos, has_latents, vae, device)
                features = None
                if encoder is not None:
                    features = aim_at(encoder, raw, batch, has_latents, vae, transformer.config["patch_size"])
                if batch.images is not None:
                    raw = join_images(raw, to_latents(batch.images, has_latents, vae, device))
                latents = normalize_latents(raw, vae.config)
                draws = StepDraws(*(tensor.to(device, non_blocking=True) for tensor in draws))
                num_given = None if num_given is None else num_given.to(device, non_blocking=True)
                if captions is not None:
                    text = captions.place(text)
                labels = batch.class_labels
                if labels is not None and recipe.num_classes is not None:
                    labels = drop_labels(labels.to(device, non_blocking=True), draws.drop, recipe.num_classes)
                run.num_bad_videos += batch.num_skipped
            timesteps = objective.timesteps(draws.uniform)
            loss, terms = module(latents, draws.noise, timesteps, labels, recipe.num_images, features, text, num_given)
            run.backward(loss)
            run.add_terms(terms)

        # ---- update -------------------------------------------------------------------------------------------------
        max_norm = recipe.optimizer.max_grad_norm if step >= recipe.clip_start_step else math.inf
        grad_norm = clip_gradients(trained, max_norm)
        if run.is_finite(grad_norm):
            optimizer.step()
            ema.step(weights_to_average(optimizer, parameters))

        # ---- log, save, validate ------------------------------------------------------------------------------------
        run.finish({"loss": run.loss} | run.terms | {"grad_norm": grad_norm})
        if run.is_due(recipe.save_every):
            run.save()
        if run.is_due(view.every):
            run_validation()

    # --- Export ------------------------------------------------------------------------------------------------------
    if run.average_post_hoc(parameters):
        run_validation()
    ema.copy_to(averaged_parameters)
    if run.is_main:
        run.check_finite(averaged, averaged_encoder)
        if recipe.tune == "lora":
            with writing(run.output / "adapter"), replace_folder(run.output / "adapter") as folder:
                save_lora(averaged, folder)
            averaged.fuse_lora()
            averaged.unload_lora()
        if recipe.save_dtype != "float32":
            for model in filter(None, (averaged, averaged_encoder)):
                model.to(getattr(torch, recipe.save_dtype))
        pipeline = make_pipeline()
        with run.export("pipeline") as folder:
            pipeline.save_pretrained(folder)
            prompt = prompts[0] if prompts else None
            write_pipeline_card(folder, recipe, pipeline, latent_shape[2:], run.summarize(), prompt)
    run.close()


if __name__ == "__main__":
    main(sys.argv[1:])
    leave_job()

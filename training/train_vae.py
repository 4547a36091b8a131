"""Train or fine-tune a video autoencoder: LeanVAE, WF-VAE or IV-VAE. Read it from top to bottom.

One process, CPU or GPU:

    python training/train_vae.py training/configs/smoke.yaml data.train=path/to/videos

Several GPUs; the second line also starts two processes on CPU:

    accelerate launch training/train_vae.py training/configs/paper_4ch.yaml data.train=path/to/videos
    torchrun --nproc_per_node 2 training/train_vae.py training/configs/compact_16ch.yaml data.train=path/to/videos

The recipe is a YAML file; `key=value` after it overrides one entry. The output folder receives

    recipe.yaml         the recipe with every default and override resolved
    log.jsonl           loss terms, learning rate, gradient norm and time, every `log_every` steps
    validation.jsonl    PSNR and SSIM of every validation clip, every `validation.every` steps
    validation/         originals next to reconstructions: a PNG, and a folder of mp4 files
    checkpoints/        everything needed to resume; the same command resumes from the newest one
    vae/                the trained model, for `from_pretrained` of its class, with its card
    adapter/            the adapters by themselves, where LoRA was trained

A run that is killed at any moment and started again gives the numbers of one that was not: whatever is random follows
from the seed, the step and the clip's index, and nothing else is remembered outside the checkpoint.
"""

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.nn.utils import clip_grad_norm_

from diffusers_leanvae.data import ClipDataset, ClipOptions, StepSchedule, open_clip_dataset, pixels_to_sample
from diffusers_leanvae.data.clip_lists import ClipList, ClipSelection, open_clip_list
from diffusers_leanvae.data.streams import is_stream
from diffusers_leanvae.latents import encode_batch, measure_statistics
from diffusers_leanvae.launching import leave_job
from diffusers_leanvae.loading import resolve_bundled
from diffusers_leanvae.losses.adversarial import DiscriminatorTrainingModule
from diffusers_leanvae.losses.alignment import AlignmentWeights, Teacher, alignment_terms
from diffusers_leanvae.losses.objectives import Objective, Posterior, objective_of
from diffusers_leanvae.losses.regularizers import latent_consistency, local_correlation, low_pass_consistency
from diffusers_leanvae.models.autoencoder_kl_ivvae import AutoencoderKLIVVAE
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.models.video_autoencoder import VideoAutoencoder
from diffusers_leanvae.trainer.autoencoder_terms import (
    PerceptualRecipe,
    PerceptualTerms,
    Regularization,
    decoder_task,
    last_layers,
    weight_at_last_layers,
)
from diffusers_leanvae.trainer.checkpoints import writing
from diffusers_leanvae.trainer.discriminators import (
    AdversarialRecipe,
    build_discriminator_optimizer,
    build_discriminators,
)
from diffusers_leanvae.trainer.draws import posterior_noise, seed_dropout
from diffusers_leanvae.trainer.finetuning import NEW_MODELS, LoraRecipe, add_lora, freeze_encoder, load_vae, type_of
from diffusers_leanvae.trainer.image_weights import initialize_from_image_vae, load_image_vae
from diffusers_leanvae.trainer.loop import TrainingRun, build_optimizer, weights_to_average
from diffusers_leanvae.trainer.model_card import write_model_card
from diffusers_leanvae.trainer.principal_components import initialize_from_principal_components
from diffusers_leanvae.trainer.recipe import (
    RunRecipe,
    check_amounts,
    check_clip_size,
    check_counts,
    check_shares,
    fill_section,
    parse_recipe,
)
from diffusers_leanvae.trainer.sharding import WeightAverage
from diffusers_leanvae.trainer.validation import (
    gather_failures,
    load_validation_clips,
    score_clips,
    summarize,
    write_picture,
)
from diffusers_leanvae.video_io.pixels import as_sample


# Of the terms of the reconstruction, and of the decoding of a teacher's latents; each has a discriminator of its own.
PREFIXES = ("", "align_")
LARGEST_LOGVAR = 80  # on either side of 0: terms are divided by its exponential, in float32


# --- Recipe: what the YAML file may hold -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DataRecipe(ClipOptions):
    """The videos, and what is cut from them; `open_training_data` says more."""

    train: str  # a folder, a video, shards `x/{000..003}.tar`, a URL of shards, or `hub:user/name`
    image_ratio: float = 0.0  # share of steps on single frames
    image_batch_factor: int = 1  # such a step has this many times more clips
    images: str | None = None  # where single frames come from; null: the videos
    procedural: float = 0.0  # share of clips, images too, that are drawn: flat colours, text, checkerboards, textures
    cache_gib: float = 4.0  # decoded videos are kept in memory up to this size, by each process
    shuffle_buffer: int = 256  # videos of a stream that are shuffled among each other
    num_workers: int = 0  # with everything in the cache, cutting clips costs less than handing them over

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amounts(self, "max_zoom_out", "cache_gib", "num_workers", prefix="data.")
        check_counts(self, "image_batch_factor", "shuffle_buffer", prefix="data.")
        check_shares(self, "image_ratio", "procedural", prefix="data.")
        if math.inf in self.rescale_factors:
            raise ValueError(f"`data.rescale_factors` must be finite numbers, got {self.rescale_factors}.")


@dataclass
class TeacherRecipe:
    """Another autoencoder whose latents a LeanVAE learns to make and to decode; off while `path` is null."""

    path: str | None = None  # folder or Hub repository
    subfolder: str | None = None
    # Where latents are compared, as `source: [num_frames, height, width]`; sources as of `leanvae encode-dataset`. One
    # clip in each part of a step and process, the sources in turn. Empty: on the clips that are trained on.
    clips: dict[str, list[int]] = field(default_factory=dict)
    has_discriminator: bool = False  # a second one, for the decoding of the teacher's latents
    weights: AlignmentWeights = field(default_factory=AlignmentWeights)

    def __post_init__(self) -> None:
        for source, size in self.clips.items():
            check_clip_size(f"teacher.clips.{source}", size)
        check_amounts(self.weights, *asdict(self.weights), prefix="teacher.weights.")


@dataclass
class ImageVAERecipe:
    """An autoencoder of images that an IV-VAE starts from with `init: image`; `initialize_from_image_vae` says how."""

    path: str | None = None  # folder or Hub repository
    subfolder: str | None = None


@dataclass
class ValidationRecipe:
    """Clips that are reconstructed every few steps, with PSNR and SSIM."""

    folder: str | None = None  # of videos, searched recursively; null: no validation
    every: int = 500
    num_frames: int = 17
    size: int = 256
    num_videos: int = 8  # clips of each process that get a picture and a video

    def __post_init__(self) -> None:
        check_counts(self, "every", "num_frames", "size", prefix="validation.")
        check_amounts(self, "num_videos", prefix="validation.")


@dataclass(kw_only=True)
class Recipe(RunRecipe):
    data: DataRecipe
    # `type` is leanvae (the default of a new model), wfvae or ivvae; the rest are arguments of its class.
    model: dict[str, Any] = field(default_factory=dict)
    # "spec" | "pca" | "image" | a bundled, saved or original model, here or on the Hub: see `load_vae`
    init: str = "spec"
    num_init_clips: int = 256  # for "pca"
    image_vae: ImageVAERecipe = field(default_factory=ImageVAERecipe)  # for "image"
    tune: Literal["full", "decoder", "lora"] = "full"  # "decoder" leaves the latents as they are
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    batch_size: int = 8  # clips per optimizer step, over all processes and accumulation steps
    sample_posterior: bool = True  # false: decode posterior means
    loss: dict[str, Any] = field(default_factory=dict)  # weights of terms; those not given: `losses/objectives.py`
    perceptual: PerceptualRecipe = field(default_factory=PerceptualRecipe)
    adversarial: AdversarialRecipe = field(default_factory=AdversarialRecipe)
    regularization: Regularization = field(default_factory=Regularization)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    freeze_encoder_step: int | None = None  # from this step on, what makes the latents is frozen
    ema_decay: float = 0.999
    log_every: int = 10
    validation: ValidationRecipe = field(default_factory=ValidationRecipe)
    save_every: int = 500
    num_statistics_clips: int = 256  # for latents_mean and latents_std

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "num_init_clips", "num_statistics_clips")
        check_amounts(self, "freeze_encoder_step")
        if self.tune != "full" and self.init in NEW_MODELS:
            raise ValueError(f"`tune` must be 'full' for the new model of `init: {self.init}`, got {self.tune!r}.")
        vae_class = type_of(self.init, self.model)
        if self.init == "pca" and vae_class is not AutoencoderKLLeanVAE:
            raise ValueError(f"`model.type` must be 'leanvae' for `init: pca`, got {self.model['type']!r}.")
        if self.init == "image" and vae_class is not AutoencoderKLIVVAE:
            raise ValueError(
                f"`model.type` must be 'ivvae' for `init: image`, got {self.model.get('type', 'leanvae')!r}."
            )
        if (self.init == "image") != (self.image_vae.path is not None):
            raise ValueError(
                f"`image_vae.path` must be given for `init: image` and for nothing else, got {self.image_vae.path!r} "
                f"with `init: {self.init}`."
            )
        if vae_class is not None:  # else the model has to be loaded first
            self.resolve_loss(vae_class)

    def resolve_loss(self, vae_class: type[VideoAutoencoder]) -> Objective:
        """Return the objective of models of a class, and fill in the weights that the recipe does not give."""
        objective = fill_section(objective_of(vae_class), self.loss, prefix="loss.")
        self.loss = asdict(objective)  # type: ignore[call-overload]
        check_amounts(objective, *(name for name in self.loss if name != "logvar"), prefix="loss.")
        if abs(self.loss.get("logvar", 0.0)) > LARGEST_LOGVAR:
            raise ValueError(
                f"`loss.logvar` must be from -{LARGEST_LOGVAR} to {LARGEST_LOGVAR}, got {self.loss['logvar']}."
            )
        return objective


# --- The step: what is minimised -------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """Videos for the turn of a discriminator, without gradients: originals, and what the decoder made of them."""

    real: torch.Tensor
    fake: torch.Tensor


class StepOutput(NamedTuple):
    """The loss to minimise; its terms, unweighted and without gradients; what each discriminator is to judge."""

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    judged: list[Judged]


class VAETrainingModule(nn.Module):
    """The autoencoder with all its losses, as the one module that a step calls.

    Gradients are synchronised between processes only for what runs inside the `forward` of the module that Accelerate
    has prepared, so all that has a gradient is computed here. Other networks come in as callables or as arguments of
    `forward`: they are neither trained nor saved with this module.

    Args:
        vae: The autoencoder.
        objective: What it is trained for; `None` for the defaults of its family. Terms of weight 0 that cost time are
            not computed.
        regularization: Switches of the regularisers.
        alignment: Weights of the terms that a call with `teacher_latents` adds.
        perceptual: LPIPS and MS-SSIM, needed if `objective.lpips` is not 0.
        adversarial: Its `weight` and `is_adaptive` are those of the adversarial terms; `None` for a weight of 0.2.
    """

    def __init__(
        self,
        vae: VideoAutoencoder,
        objective: Objective | None = None,
        regularization: Regularization | None = None,
        alignment: AlignmentWeights | None = None,
        perceptual: PerceptualTerms | None = None,
        adversarial: AdversarialRecipe | None = None,
    ) -> None:
        super().__init__()
        self.vae: Any = vae
        self.objective = objective or objective_of(type(vae))()
        self.regularization, self.alignment = regularization or Regularization(), alignment or AlignmentWeights()
        self.perceptual_terms = perceptual or PerceptualTerms(self.objective)
        self.adversarial = adversarial or AdversarialRecipe(weight=0.2)

    def forward(
        self,
        sample: torch.Tensor,
        noise: torch.Tensor | None = None,
        seed: Sequence[int] = (0,),
        teacher_latents: torch.Tensor | None = None,
        discriminators: Sequence[DiscriminatorTrainingModule] = (),
        teacher_sample: torch.Tensor | None = None,
    ) -> StepOutput:
        """Encode, decode and compare a batch.

        Args:
            sample: Videos in `[-1, 1]`, shape `(batch_size, 3, num_frames, height, width)`.
            noise: Standard normal noise of the posterior sample, shape of the latents; `None` decodes the means.
            seed: What is drawn for the batch (transformation, mask, frames) follows from these numbers alone: give
                seed and step, the same in all processes.
            teacher_latents: Latents of `teacher_sample` by another autoencoder, un-normalised: adds the alignment.
            discriminators: One for the reconstruction and, with `teacher_latents`, a second one for the decoding of
                those; unwrapped, and left as they are. None of them: no adversarial terms.
            teacher_sample: Videos that latents are compared on; `None` for `sample`.
        """
        vae, objective, regularization = self.vae, self.objective, self.regularization
        weight_of = objective.weights()
        # ---- encode, sample, decode ---------------------------------------------------------------------------------
        (posterior,) = vae.encode(sample, return_dict=False)
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        target, latents, mean = decoder_task(regularization, sample, latents, posterior.mean, seed)
        decoded = objective.decode(vae, latents)
        judged = [Judged(target, decoded.reconstruction)]

        # ---- terms --------------------------------------------------------------------------------------------------
        terms = objective.terms(vae, target, decoded, Posterior(posterior.mean, posterior.logvar))
        perceptual = self.perceptual_terms(target, decoded.reconstruction, seed)
        terms |= {name: objective.perceptual_factor(target) * term for name, term in perceptual.items()}
        if objective.latent_consistency:
            terms["latent_consistency"] = latent_consistency(vae, decoded.reconstruction, mean)
        if regularization.local_correlation:
            terms["local_correlation"] = local_correlation(posterior.mean)
            weight_of["local_correlation"] = regularization.local_correlation
        if regularization.low_pass:
            terms["low_pass"] = low_pass_consistency(vae, sample, posterior.mean)
            weight_of["low_pass"] = regularization.low_pass
        if teacher_latents is not None:  # the decoder takes a teacher's latents, the encoder makes them
            is_normalised = vae.config["latents_std"] is not None
            compared, mean = sample, posterior.mean
            if teacher_sample is not None:
                compared, mean = teacher_sample, vae.encode(teacher_sample, return_dict=False)[0].mean
            aligned = alignment_terms(vae, teacher_latents, mean, compared, is_normalised)
            judged.append(Judged(compared, aligned.reconstruction))
            perceptual = self.perceptual_terms(*judged[1], seed)
            terms |= aligned.terms | {f"align_{name}": term for name, term in perceptual.items()}
            weight_of |= asdict(self.alignment) | {f"align_{name}": weight_of[name] for name in perceptual}

        # ---- what is minimised --------------------------------------------------------------------------------------
        loss = sum((weight_of[name] * term for name, term in terms.items()), sample.new_zeros(()))
        adversarial = {
            f"{prefix}adversarial": discriminator.generator_term(videos.fake)
            for prefix, discriminator, videos in zip(PREFIXES, discriminators, judged, strict=False)
        }
        weight = weight_at_last_layers(vae, objective, loss, adversarial) if self.adversarial.is_adaptive else 1.0
        for term in adversarial.values():
            loss = loss + self.adversarial.weight * weight * term
        return StepOutput(
            loss,
            {name: term.detach() for name, term in (terms | adversarial).items()},
            [Judged(videos.real, videos.fake.detach()) for videos in judged],
        )


# --- What a run is made of -------------------------------------------------------------------------------------------


def build_vae(recipe: Recipe) -> VideoAutoencoder:
    return load_vae(recipe.init, recipe.model)


def build_training_module(recipe: Recipe, vae: VideoAutoencoder, device: torch.device) -> VAETrainingModule:
    objective = recipe.resolve_loss(type(vae))
    perceptual = PerceptualTerms.from_recipe(objective, recipe.perceptual, device)
    return VAETrainingModule(
        vae, objective, recipe.regularization, recipe.teacher.weights, perceptual, recipe.adversarial
    )


def build_teacher(recipe: TeacherRecipe, vae: VideoAutoencoder, device: torch.device) -> Teacher | None:
    """The teacher, if any; the model takes over how its latents are normalised, as it will stand in its place.

    One that is compared on clips of its own lends mean and deviation for that alone: in the end the model has its own.
    """
    if recipe.path is None:
        if recipe.clips:
            raise ValueError(f"`teacher.clips` must be empty without `teacher.path`, got {recipe.clips}.")
        return None
    if not isinstance(vae, AutoencoderKLLeanVAE):
        raise ValueError(f"`teacher.path` must be null for an {type(vae).__name__}, got {recipe.path!r}.")
    teacher = Teacher.from_pretrained(resolve_bundled(recipe.path), recipe.subfolder).to(device)
    teacher.check_student(vae)
    names = ["latents_mean", "latents_std"] + ([] if recipe.clips else ["scaling_factor"])
    vae.register_to_config(**{name: getattr(teacher, name) for name in names})
    return teacher


def open_teacher_clips(recipe: Recipe) -> list[ClipList]:
    """The clips that latents are compared on, a list for each source; none: on those that are trained on."""
    lists = []
    for source, size in recipe.teacher.clips.items():
        if is_stream(source):
            raise ValueError(f"`teacher.clips` must name sources on this machine, got {source!r}.")
        try:
            lists.append(open_clip_list(ClipSelection(source, size, seed=recipe.seed)))
        except ValueError as error:
            raise ValueError(f"`teacher.clips` has {source!r} with {size}: {error}") from error
    return lists


def read_teacher_clip(lists: list[ClipList], number: int) -> torch.Tensor:
    """Read a clip, from one source after another: `(1, 3, num_frames, height, width)` in `[-1, 1]`."""
    clips, place = lists[number % len(lists)], number // len(lists)
    for attempt in range(len(clips)):
        index = (place + attempt) % len(clips)
        for clip in clips.read(range(index, index + 1)):
            if clip is not None:
                return as_sample(clip.pixels[None])
    raise ValueError("`teacher.clips` must name sources with a usable clip each, got one without.")


def check_sizes(recipe: Recipe, vae: VideoAutoencoder, discriminators: list[DiscriminatorTrainingModule]) -> None:
    """Refuse clips that the model does not take, or that are too small for a loss at any step of the run.

    Of the latter those count that the equivariance has scaled down.
    """
    steps = (vae.temporal_compression_ratio, vae.spatial_compression_ratio)
    sizes = [("data.clip_sizes", size) for size in recipe.data.clip_sizes]
    for key, (num_frames, *sides) in [*sizes, *((f"teacher.clips.{k}", v) for k, v in recipe.teacher.clips.items())]:
        if (num_frames - 1) % steps[0] or any(side % steps[1] for side in sides):
            raise ValueError(
                f"`{key}` must have {steps[0]} * n + 1 frames and sides of multiples of {steps[1]} for this model, "
                f"got {[num_frames, *sides]}."
            )
    smallest = min(min(size[1:]) for size in recipe.data.clip_sizes) / max(recipe.data.rescale_factors)
    ratio = vae.spatial_compression_ratio
    if recipe.regularization.low_pass and smallest < 2 * ratio:
        raise ValueError(
            f"`data.clip_sizes`, with `rescale_factors`, must leave sides of at least {2 * ratio} for "
            f"`regularization.low_pass`, got {int(smallest)}."
        )
    if recipe.regularization.equivariance_probability:
        smallest = max(1, round(smallest / ratio * recipe.regularization.equivariance_min_scale)) * ratio
    # The first discriminator judges these clips; the second, if there is one, those that the teacher is compared on.
    judges: list[int] = [getattr(module.discriminator, "min_size", 1) for module in discriminators]
    objective = recipe.resolve_loss(type(vae))
    perceptual = [16 * bool(objective.lpips), 11 * bool(objective.ms_ssim)]
    needed = max(*perceptual, *judges)
    if smallest < needed:
        raise ValueError(
            f"`data.clip_sizes`, with `rescale_factors` and `equivariance_min_scale`, must leave sides of at least "
            f"{needed} for the losses of this recipe, got {int(smallest)}."
        )
    needed = max(*perceptual, *judges[1:])
    for source, size in recipe.teacher.clips.items():
        if min(size[1:]) < needed:
            raise ValueError(
                f"`teacher.clips.{source}` must have sides of at least {needed} for the losses of this recipe, got "
                f"{size}."
            )


def training_videos(dataset: ClipDataset, num_clips: int, device: torch.device) -> Iterator[torch.Tensor]:
    """The first clips of the videos, one at a time: `(1, 3, num_frames, height, width)` in `[-1, 1]`."""
    return (pixels_to_sample(dataset.cut_clip(index).pixels[None].to(device)) for index in range(num_clips))


# --- The run ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    recipe = parse_recipe(Recipe, __doc__, arguments)

    # --- Init --------------------------------------------------------------------------------------------------------
    # Clips of one frame leave the video half of the model without a gradient, and a frozen encoder itself.
    has_images = recipe.data.image_ratio > 0 or any(size[0] == 1 for size in recipe.data.clip_sizes)
    run = TrainingRun(recipe, "leanvae", has_images or recipe.freeze_encoder_step is not None)
    accelerator, device, progress = run.accelerator, run.device, run.progress

    # --- Data --------------------------------------------------------------------------------------------------------
    dataset = open_clip_dataset(
        recipe.data.train,
        recipe.data,
        StepSchedule(
            recipe.batch_size, recipe.data.image_ratio, recipe.data.image_batch_factor, recipe.data.procedural
        ),
        run.share,
        seed=recipe.seed,
        images=recipe.data.images,
        cache_gib=recipe.data.cache_gib,
        shuffle_buffer=recipe.data.shuffle_buffer,
    )
    run.say(f"data: {dataset.describe()}")
    view = recipe.validation
    validation = load_validation_clips(view.folder, view.num_frames, view.size, run.share)
    failed = gather_failures(validation)
    if failed:
        run.say(f"validation: {len(failed)} files cannot be used and are left out: {', '.join(failed)}")

    # --- Model -------------------------------------------------------------------------------------------------------
    vae = build_vae(recipe).to(device).train()
    if recipe.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    teacher = build_teacher(recipe.teacher, vae, device)
    teacher_clips = open_teacher_clips(recipe)
    if recipe.init == "pca" and run.checkpoint is None and run.is_main:  # the other processes receive these weights
        videos = training_videos(dataset, recipe.num_init_clips, device)
        assert isinstance(vae, AutoencoderKLLeanVAE)
        initialize_from_principal_components(vae, (video for video in videos if video.shape[2] > 1))
    if recipe.init == "image" and run.checkpoint is None and run.is_main:
        assert isinstance(vae, AutoencoderKLIVVAE) and recipe.image_vae.path is not None
        initialize_from_image_vae(vae, load_image_vae(recipe.image_vae.path, recipe.image_vae.subfolder))
    if recipe.tune == "decoder":
        freeze_encoder(vae)
    adapted = add_lora(vae, recipe.lora) if recipe.tune == "lora" else vae  # wraps the same `vae`
    averaged = copy.deepcopy(adapted).requires_grad_(False).eval()  # filled from `ema` when it is needed
    if recipe.compile:
        for name in ("encoder", "bottleneck", "decoder"):
            if hasattr(vae, name):
                getattr(vae, name).compile()
    num_discriminators = 1 + (teacher is not None and recipe.teacher.has_discriminator)
    bare_discriminators = build_discriminators(recipe.adversarial, vae.in_channels, num_discriminators)
    check_sizes(recipe, vae, bare_discriminators)
    if bare_discriminators and recipe.adversarial.is_adaptive:
        last_layers(vae, recipe.resolve_loss(type(vae)))  # refuses frozen ones now, and not at `start_step`
    optimizer = build_optimizer(recipe.optimizer, vae)
    module = accelerator.prepare(build_training_module(recipe, vae, device))
    discriminators = [accelerator.prepare(discriminator) for discriminator in bare_discriminators]
    parameters = list(vae.parameters())
    judges_parameters = [p for discriminator in discriminators for p in discriminator.parameters()]
    judges_optimizer = build_discriminator_optimizer(recipe.adversarial, judges_parameters)
    ema = WeightAverage(parameters, recipe.ema_power, decay=recipe.ema_decay, foreach=True)
    num_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    num_parameters = sum(parameter.numel() for parameter in parameters)
    run.say(f"model: {num_parameters / 1e6:.2f} M parameters, {num_trained / 1e6:.2f} M trained, on {device}")

    # --- Resume ------------------------------------------------------------------------------------------------------
    run.resume(dataset, ema, [optimizer] if judges_optimizer is None else [optimizer, judges_optimizer])
    freeze_step = recipe.freeze_encoder_step
    if freeze_step is not None and progress.step > freeze_step:
        freeze_encoder(vae)

    def run_validation() -> None:
        if view.folder is None:
            return
        ema.copy_to(averaged.parameters())
        folder = run.output / "validation" / f"step-{progress.step:07d}"
        averaged_vae = averaged.get_base_model() if recipe.tune == "lora" else averaged
        scores = gather_object(score_clips(averaged_vae, validation.clips, folder, view.num_videos))
        if run.is_main:
            figures = summarize(scores, failed)
            run.log_validation(figures)
            write_picture(folder.with_suffix(".png"), scores)
            if view.num_videos:
                videos = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.mp4"))}
                run.show({"pictures": folder.with_suffix(".png")}, videos)
            run.say(f"step {progress.step}: validation PSNR {figures['psnr_frame_mean_rgb']:.3f} dB")

    # --- Loop --------------------------------------------------------------------------------------------------------
    if run.is_due(view.every):  # before the first step; and again where a run may have stopped on its way to it
        run_validation()
    batches = run.load(dataset.batches(progress.step, recipe.num_steps), recipe.data.num_workers)
    for step in run.steps():
        # ---- whose turn it is ---------------------------------------------------------------------------------------
        if step == freeze_step:
            freeze_encoder(vae)  # the average then takes these weights as they are, which the decoder learns from
        is_adversarial = bool(discriminators) and step >= recipe.adversarial.start_step
        takes_turns = is_adversarial and recipe.adversarial.update == "alternate"
        is_generator_turn = not takes_turns or (step - recipe.adversarial.start_step) % 2 == 0
        is_discriminator_turn = is_adversarial and not (takes_turns and is_generator_turn)

        # ---- gradients ----------------------------------------------------------------------------------------------
        for part in run.parts(module, *discriminators):
            seed_dropout(recipe.seed, step, part, run.share.rank)
            with run.loading():
                clips = next(batches)
                sample = pixels_to_sample(clips.pixels.to(device, non_blocking=True))
                noise = None
                if recipe.sample_posterior:
                    noise = posterior_noise(vae, sample, clips.index.tolist(), recipe.seed)
                run.num_bad_videos += int(clips.num_skipped.sum())
            teacher_sample = None
            if teacher_clips:
                number = (step * recipe.num_accumulation_steps + part) * accelerator.num_processes + run.share.rank
                with run.loading():
                    teacher_sample = read_teacher_clip(teacher_clips, number).to(device)
            compared = sample if teacher_sample is None else teacher_sample
            teacher_latents = None if teacher is None else teacher.encode(compared)
            with torch.set_grad_enabled(is_generator_turn):
                judges = bare_discriminators if is_adversarial and is_generator_turn else ()
                seed = (recipe.seed, 4, step)
                loss, terms, judged = module(sample, noise, seed, teacher_latents, judges, teacher_sample)
            if is_generator_turn:
                run.backward(loss)
                terms = {"loss": loss.detach()} | terms
            if is_discriminator_turn:
                for prefix, discriminator, videos in zip(PREFIXES, discriminators, judged, strict=False):
                    judge_loss, judge_terms = discriminator(videos.real, videos.fake)
                    run.backward(judge_loss)
                    terms |= {f"{prefix}{name}": term for name, term in judge_terms.items()}
            run.add_terms(terms)

        # ---- update -------------------------------------------------------------------------------------------------
        grad_norms: dict[str, torch.Tensor] = {}
        if is_generator_turn:
            grad_norms["grad_norm"] = clip_grad_norm_(parameters, recipe.optimizer.max_grad_norm)
        if is_discriminator_turn:
            norm = clip_grad_norm_(judges_parameters, recipe.optimizer.max_grad_norm)
            grad_norms["discriminator_grad_norm"] = norm
        if run.is_finite(*grad_norms.values()):
            if is_generator_turn:
                optimizer.step()
                ema.step(weights_to_average(optimizer, parameters))
            if is_discriminator_turn and judges_optimizer is not None:
                judges_optimizer.step()

        # ---- log, save, validate ------------------------------------------------------------------------------------
        run.finish(run.terms | grad_norms)
        if run.is_due(recipe.save_every):
            run.save()
        if run.is_due(view.every):
            run_validation()

    # --- Export ------------------------------------------------------------------------------------------------------
    if run.average_post_hoc(parameters):
        run_validation()
    if run.is_main:
        ema.copy_to(averaged.parameters())
        run.check_finite(averaged)
        if recipe.tune == "lora":
            with writing(run.output / "adapter"):
                averaged.save_pretrained(run.output / "adapter")
                (run.output / "adapter" / "README.md").unlink(missing_ok=True)  # peft writes an empty template
            averaged = averaged.merge_and_unload()
        if teacher is None or teacher_clips:  # latents of other videos are not the teacher's
            videos = training_videos(dataset, recipe.num_statistics_clips, device)
            latents = (encode_batch(averaged, video) for video in videos)
            mean, std = measure_statistics(latents, averaged.latent_channels)
            averaged.register_to_config(latents_mean=mean, latents_std=std)
        if recipe.save_dtype != "float32":
            averaged.to(getattr(torch, recipe.save_dtype))
        with run.export("vae") as folder:
            averaged.save_pretrained(folder)
            write_model_card(folder, recipe, averaged, run.summarize())
    run.close()


if __name__ == "__main__":
    main(sys.argv[1:])
    leave_job()

"""The data of latent diffusion in a recipe: cached latents, or clips that are encoded on the fly."""

from dataclasses import dataclass, field
from typing import Literal

from ..data import ClipOptions, Share, StepSchedule, open_clip_dataset
from ..data.latent_samples import LatentData
from ..data.latent_shards import LatentFolder
from ..data.named import open_named_dataset
from ..data.scenes import MovingScenes
from ..data.shapes import MovingShapes
from .recipe import RunRecipe, check_amounts, check_clip_size, check_counts
from .text_conditioning import TextRecipe


@dataclass
class DataRecipe:
    """Cached latents, or clips that are encoded on the fly."""

    kind: Literal[
        "latents", "videos", "shapes", "scenes", "ucf101", "skytimelapse", "ffs", "taichi", "videofolder"
    ] = "latents"
    # Of "latents": a folder that `leanvae encode-dataset` wrote; of "videos": what `open_training_data` takes, clips
    # cut at random without labels; of the named data sets: their folder, see `open_named_dataset`.
    path: str | None = None
    clip_size: list[int] = field(default_factory=lambda: [17, 256, 256])  # [T, H, W], of all but "latents"
    stride: int = 3  # distance of frames
    flip: bool | None = None  # mirror every other clip; null: what is usual for the data set, and not "videos"
    short_side: int | None = None  # of "videos": larger ones are scaled down to it
    sampling: Literal["exact", "reference"] = "exact"  # of named data sets
    num_draws: int = 16  # of named data sets: different clips per video
    num_clips: int = 10_000  # of "shapes" and "scenes"
    num_captions: int = 1  # of "scenes": descriptions of each clip
    caption_column: str | None = None  # of "videos" and "videofolder": where captions are; null: the usual names
    seed: int = 0  # of "shapes", "scenes" and named data sets: what is drawn
    cache_gib: float = 4.0  # latents, or decoded videos, are kept in memory up to this size, by each process
    num_workers: int = 0

    def __post_init__(self) -> None:
        check_clip_size("data.clip_size", self.clip_size)
        counts = ("stride", "short_side", "num_draws", "num_clips", "num_captions")
        check_counts(self, *counts, prefix="data.")
        check_amounts(self, "seed", "cache_gib", "num_workers", prefix="data.")


def open_data(
    data: DataRecipe,
    recipe: RunRecipe,
    share: Share,
    num_classes: int | None,
    text: TextRecipe | None,
    num_images: int = 0,
) -> LatentData:
    """Open the samples of training, or of validation.

    Args:
        data: What to open.
        recipe: The run, which gives the seed and the size of batches.
        share: What this process draws of every step.
        num_classes: Classes of the model, whose labels are then read; `None` without them.
        text: Texts of the model, which are then read; `None` without them.
        num_images: Images that are added to every video.
    """
    if data.kind == "shapes":
        items = MovingShapes(*data.clip_size, seed=data.seed, num_clips=data.num_clips)
    elif data.kind == "scenes":
        items = MovingScenes(*data.clip_size, seed=data.seed, num_clips=data.num_clips, num_captions=data.num_captions)
    elif data.path is None:
        raise ValueError(f"`data.path` must be given for `data.kind: {data.kind}`, got null.")
    elif data.kind == "latents":
        items = LatentFolder(data.path)
    elif data.kind == "videos":
        if num_classes is not None:
            raise ValueError(f"`num_classes` must be null for `data.kind: videos`, got {num_classes}.")
        options = ClipOptions([data.clip_size], False, data.short_side, data.stride, flip=bool(data.flip))
        schedule, cache_gib = StepSchedule(recipe.batch_size), data.cache_gib
        items = open_clip_dataset(
            data.path,
            options,
            schedule,
            share,
            seed=recipe.seed,
            cache_gib=cache_gib,
            caption_column=data.caption_column,
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
            caption_column=data.caption_column,
        )
    return LatentData(
        items,
        has_latents=data.kind == "latents",
        has_labels=num_classes is not None,
        seed=recipe.seed,
        num_images=num_images,
        in_memory_gib=data.cache_gib,
        has_captions=text is not None,
        has_text=text is not None and not text.train_text_encoder,  # else they are encoded in every step
    )


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

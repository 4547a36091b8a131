"""Validation of latent diffusion in training: losses of held-out latents at fixed noise levels, generated videos."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from ..data.latent_samples import LatentBatch
from ..generation.pipeline import LatentVideoPipeline, Transformer
from ..losses.diffusion import EpsilonObjective, FlowMatchingObjective
from ..text_encoders import TextEmbeddings, text_arguments
from ..video_io import write_video
from ..video_io.pixels import unit_to_pixels, video_grid
from .draws import draw_step


def denoise(
    transformer: Transformer,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    text: TextEmbeddings | None = None,
    num_images: int = 0,
) -> torch.Tensor:
    """Call a transformer, of classes or of texts.

    Args:
        transformer: The denoiser.
        noisy: Noisy latents `(B, C, F, h, w)`.
        timesteps: `(B,)`.
        class_labels: Of a transformer of classes, as it takes them.
        text: Of a transformer of texts.
        num_images: Images at the end of each sample, of a transformer of classes.
    """
    if text is None:
        return transformer(noisy, timesteps, class_labels, num_images, return_dict=False)[0]
    return transformer(noisy, timesteps, **text_arguments(text, noisy.shape[2]), return_dict=False)[0]


@torch.no_grad()
def measure_losses(
    transformer: Transformer,
    objective: EpsilonObjective | FlowMatchingObjective,
    batches: Iterable[LatentBatch],
    noise_levels: Sequence[float],
    seed: int,
    encode: Callable[[LatentBatch], TextEmbeddings] | None = None,
) -> dict[str, Any]:
    """Average the loss terms of held-out items, each with one noise of its own at every noise level.

    Args:
        transformer: The denoiser.
        objective: Its objective.
        batches: Those of this process, with normalised latents as `videos`.
        noise_levels: Shares of the schedule, from 0 to 1.
        seed: Of the run; noise follows from it and from an item's number.
        encode: Returns the texts of a batch as the denoiser takes them, for a denoiser of texts.

    Returns:
        The mean of every term over levels and the items of all processes, the loss at each level as `levels`, and as
        `num_failed` the number of unusable videos that were passed over.

    Raises:
        ValueError: If there is no item.
    """
    sums: list[dict[str, Any]] = []
    num_failed = 0
    for batch in batches:
        num_failed += batch.num_skipped
        latents = batch.videos
        noise = draw_step(batch.index.tolist(), latents.shape[1:], seed, stream=11, device=latents.device).noise
        labels = None if batch.class_labels is None else batch.class_labels.to(latents.device)
        text = None if encode is None else encode(batch)
        for level in noise_levels:
            timesteps = objective.timesteps_at(torch.full((len(latents),), level, device=latents.device))
            noisy = objective.add_noise(latents, noise, timesteps)
            output = denoise(transformer, noisy, timesteps, labels, text)
            terms = objective.loss(output, latents, noise, timesteps)
            sums.append({"level": level, "count": len(latents)} | {name: x.sum().item() for name, x in terms.items()})
    sums, num_failed = gather_object(sums), sum(gather_object([num_failed]))
    if not sums:
        raise ValueError("`validation.data` must hold at least one usable item, got none.")
    count = sum(record["count"] for record in sums)
    names = [name for name in sums[0] if name not in ("level", "count")]
    levels = {}
    for level in noise_levels:
        rows = [record for record in sums if record["level"] == level]
        levels[str(level)] = sum(row["loss"] for row in rows) / sum(row["count"] for row in rows)
    return {name: sum(record[name] for record in sums) / count for name in names} | {
        "num_failed": num_failed,
        "levels": levels,
    }


def write_samples(
    pipeline: LatentVideoPipeline,
    path: Path,
    num_samples: int,
    conditions: dict[str, Any] | None,
    batch_size: int,
    fps: int,
    **options: Any,
) -> None:
    """Generate videos, each from a noise of its own that stays the same all over training, and write their grid.

    Args:
        pipeline: A pipeline that takes classes, or texts, or neither.
        path: The video file; missing folders are made.
        num_samples: Number of videos.
        conditions: Arguments of the pipeline that hold something for each video, such as classes; `None` without.
        batch_size: So many videos are generated at a time.
        fps: Frames per second of the file.
        options: Further arguments of the pipeline.
    """
    videos = []
    for start in range(0, num_samples, batch_size):
        numbers = range(start, min(start + batch_size, num_samples))
        given: dict[str, Any] = {"num_videos_per_prompt": len(numbers)}
        if conditions is not None:
            given = {name: values[start : start + batch_size] for name, values in conditions.items()}
        frames = pipeline(
            **given,
            generator=[torch.Generator().manual_seed(number) for number in numbers],
            output_type="pt",
            **options,
        ).frames
        videos.append(frames.float().cpu())
    pixels = unit_to_pixels(torch.cat(videos).permute(0, 1, 3, 4, 2))  # (n, T, H, W, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, video_grid(pixels), fps=fps)


def sample_labels(num_samples: int, num_classes: int | None) -> list[int] | None:
    """Take classes in turn, or spread evenly where there are more classes than samples."""
    if num_classes is None:
        return None
    if num_samples >= num_classes:
        return [number % num_classes for number in range(num_samples)]
    return [number * num_classes // num_samples for number in range(num_samples)]

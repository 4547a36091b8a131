"""Validation during training: figures for all clips, videos and pictures of originals next to reconstructions."""

import warnings
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object

from ..checks import one_line
from ..data.datasets import read_center_clip
from ..data.schedule import ALONE, Share
from ..evaluation.reconstruction import describe_failures, score_clip
from ..models.video_autoencoder import VideoAutoencoder
from ..video_io import VideoReader, list_videos, write_video
from ..video_io.pixels import unit_to_pixels


class ValidationClip(NamedTuple):
    """One clip: its path below the validation folder, its frames `(3, num_frames, height, width)` in `[-1, 1]`."""

    name: str
    sample: torch.Tensor
    fps: Fraction


class ValidationSet(NamedTuple):
    """Clips of a process, and what was wrong with each of its files that cannot be used, by the same names."""

    clips: list[ValidationClip]
    failed: dict[str, str]


class ValidationScore(NamedTuple):
    """Figures of one clip, and its middle frame next to the original's: uint8, `(height, 2 * width, 3)`, or `None`."""

    name: str
    psnr: float
    ssim: float
    picture: np.ndarray | None


def load_validation_clips(
    folder: str | Path | None, num_frames: int, size: int, share: Share = ALONE
) -> ValidationSet:
    """Load the clips of a process: of every video below `folder` the first frames, short side `size`, centre crop.

    A file that cannot be read, or is too short, is passed over with a warning.

    Args:
        folder: Searched recursively; `None` for no validation.
        num_frames: Frames of a clip.
        size: Height and width of a clip.
        share: This process, which takes every `world_size`-th video.

    Raises:
        ValueError: If there is no video.
    """
    loaded = ValidationSet([], {})
    if folder is None:
        return loaded
    if not Path(folder).is_dir():
        raise ValueError(f"`validation.folder` must be an existing folder or null, got {str(folder)!r}.")
    paths = list_videos(folder)
    if not paths:
        raise ValueError(f"`validation.folder` must hold at least one video, got none in {str(folder)!r}.")
    for path in paths[share.rank :: share.world_size]:
        name = path.relative_to(folder).as_posix()
        try:
            with VideoReader(path) as video:
                loaded.clips.append(ValidationClip(name, read_center_clip(video, num_frames, size), video.info.fps))
        except Exception as error:  # a foreign file must not end the run
            loaded.failed[name] = one_line(error)
            warnings.warn(f"Skipping a video of `validation.folder`: {loaded.failed[name]}", stacklevel=2)
    return loaded


def gather_failures(loaded: ValidationSet) -> dict[str, str]:
    """Return what was wrong with files in all processes, sorted by name; every process calls.

    Raises:
        ValueError: If there are no clips but failures, in all processes.
    """
    failed = dict(sorted(gather_object(list(loaded.failed.items()))))
    if failed and not sum(gather_object([len(loaded.clips)])):
        raise ValueError(f"`validation.folder` must hold at least one usable video, got {describe_failures(failed)}")
    return failed


def score_clips(
    vae: VideoAutoencoder, clips: Iterable[ValidationClip], videos: Path | None = None, num_videos: int = 8
) -> list[ValidationScore]:
    """Score clips one after the other with [`evaluation.reconstruction.score_clip`].

    Args:
        vae: The autoencoder, on its device.
        clips: What to reconstruct.
        videos: A folder for the originals next to the reconstructions, as mp4; `None` writes none.
        num_videos: The number of clips that get a picture and a video.
    """
    scores = []
    for index, clip in enumerate(clips):
        score, pictures = score_clip(vae, clip.sample), None
        if index < num_videos:
            pairs = torch.cat((score.original, score.reconstruction), dim=3)  # (T, 3, H, 2 * W)
            pictures = unit_to_pixels(pairs).permute(0, 2, 3, 1).cpu().numpy()
            if videos is not None:
                path = videos / (clip.name if clip.name.endswith(".mp4") else f"{clip.name}.mp4")  # beside `clip.mov`
                path.parent.mkdir(parents=True, exist_ok=True)
                write_video(path, pictures, clip.fps)
        picture = None if pictures is None else pictures[len(pictures) // 2]
        scores.append(ValidationScore(clip.name, score.psnr, score.ssim, picture))
    return scores


def write_picture(path: Path, scores: Iterable[ValidationScore]) -> None:
    """Write the middle frames of all clips that have a picture, below each other, as one PNG."""
    from PIL import Image

    pictures = [score.picture for score in scores if score.picture is not None]
    if pictures:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(pictures)).save(path)


def summarize(scores: Iterable[ValidationScore], failed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Means over the clips and the figures of each, sorted by name; `num_failed` and, of those that failed, `failed`.

    Args:
        scores: At least one.
        failed: What was wrong with each file that has no score.
    """
    scores = sorted(scores, key=lambda score: score.name)
    return {
        "psnr_frame_mean_rgb": sum(score.psnr for score in scores) / len(scores),
        "ssim_frame_mean_rgb": sum(score.ssim for score in scores) / len(scores),
        "num_failed": len(failed or {}),
        "clips": {score.name: score.psnr for score in scores},
        "clips_ssim": {score.name: score.ssim for score in scores},
        "failed": dict(failed or {}),
    }

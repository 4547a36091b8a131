"""Reconstruction quality of an autoencoder, clip by clip: the protocol of every published PSNR and SSIM."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checks import one_line
from ..data.datasets import read_center_clip
from ..models.video_autoencoder import VideoAutoencoder
from ..video_io import list_videos
from ..video_io.pixels import sample_to_unit
from .metrics import frame_psnr, frame_ssim


class ClipScore(NamedTuple):
    """Means over the frames of a clip, and what was compared: `(num_frames, 3, height, width)` in `[0, 1]`."""

    psnr: float  # in dB
    ssim: float
    original: torch.Tensor
    reconstruction: torch.Tensor


@torch.no_grad()
def score_clip(vae: VideoAutoencoder, clip: torch.Tensor) -> ClipScore:
    """Reconstruct a clip from the posterior mean, and compare.

    The output is clamped; PSNR and SSIM are those of each frame over its three channels with pixels in `[0, 1]`, and
    their mean over the frames. The original is what the model gets: in the model's dtype.

    Args:
        vae: The autoencoder, on its device, in its dtype.
        clip: `(3, num_frames, height, width)` in `[-1, 1]`, of sizes that the model takes.
    """
    sample = clip[None].to(vae.device, vae.dtype)
    reconstruction = vae(sample, return_dict=False)[0]
    decoded, original = (sample_to_unit(x[0].transpose(0, 1)) for x in (reconstruction, sample))
    psnr, ssim = (metric(decoded, original).mean().item() for metric in (frame_psnr, frame_ssim))
    return ClipScore(psnr, ssim, original, decoded)


def evaluate_reconstruction(
    vae: VideoAutoencoder,
    folder: str | Path,
    num_frames: int = 17,
    size: int = 256,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """PSNR and SSIM of the reconstructions of the videos of a folder.

    Of every video: the first `num_frames` frames, short side resized to `size` (bicubic, antialias), centre crop,
    scored by [`score_clip`]; then the mean over clips. Files that cannot be read, or are too short, are passed over
    and named.

    Args:
        vae: The autoencoder, on its device, in its dtype.
        folder: Searched recursively for videos.
        num_frames: A frame count the autoencoder takes.
        size: Height and width of the crop, a multiple of the spatial ratio.
        progress: Called with a line per clip.

    Returns:
        `psnr_frame_mean_rgb` (dB), `ssim_frame_mean_rgb`, `num_videos` (those scored), `num_failed`, `num_frames`,
        `resolution`, `dtype`, `clips` with the same two metrics for each, and `failed` with what was wrong with each
        of the others. Nothing is rounded; [`round_scores`] does, for a file.

    Raises:
        ValueError: If there is no video, or none that can be read.
    """
    clips, failed = {}, {}
    paths = list_videos(folder)
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            clip = read_center_clip(path, num_frames, size)
        except Exception as error:  # whatever a foreign file does to the reader, the others are still to be scored
            failed[name] = one_line(error)
            line = f"{name:<28} failed: {failed[name]}"
        else:
            score = score_clip(vae, clip)
            clips[name] = {"psnr_frame_mean_rgb": score.psnr, "ssim_frame_mean_rgb": score.ssim}
            line = f"{name:<28} PSNR {score.psnr:6.2f} dB  SSIM {score.ssim:.4f}"
        if progress is not None:
            progress(line)
    if not paths:
        raise ValueError(f"`folder` must hold at least one video, got none in {str(folder)!r}.")
    if not clips:
        raise ValueError(f"`folder` must hold at least one usable video, got {describe_failures(failed)}")
    return {
        **{name: sum(clip[name] for clip in clips.values()) / len(clips) for name in next(iter(clips.values()))},
        "num_videos": len(clips),
        "num_failed": len(failed),
        "num_frames": num_frames,
        "resolution": size,
        "dtype": str(vae.dtype).removeprefix("torch."),
        "clips": clips,
        "failed": failed,
    }


def describe_failures(failed: Mapping[str, str]) -> str:
    """Count files that failed, in words, with what was wrong with the first."""
    return f"{len(failed)} that failed, the first of them: {next(iter(failed.values()))}"


def round_scores(result: dict[str, Any]) -> dict[str, Any]:
    """Round what [`evaluate_reconstruction`] returns for a file: PSNR to 4 decimals, SSIM to 5."""

    def rounded(scores: dict[str, Any]) -> dict[str, Any]:
        digits = {"psnr_frame_mean_rgb": 4, "ssim_frame_mean_rgb": 5}
        return {name: round(value, digits[name]) if name in digits else value for name, value in scores.items()}

    return rounded(result) | {"clips": {name: rounded(scores) for name, scores in result["clips"].items()}}

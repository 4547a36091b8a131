"""Reconstruction quality of an autoencoder on a folder of videos, clip by clip."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..data.datasets import read_center_clip
from ..video_io import list_videos
from ..video_io.pixels import sample_to_unit
from .metrics import frame_psnr, frame_ssim


@torch.inference_mode()
def evaluate_reconstruction(
    vae: Any,
    folder: str | Path,
    num_frames: int = 17,
    size: int = 256,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    r"""PSNR and SSIM of reconstructions from posterior means.

    Of every video: the first `num_frames` frames, short side resized to `size` (bicubic, antialias), centre crop;
    output clamped; per frame over the three channels with pixels in [0, 1], mean over frames, then over clips.

    Args:
        vae: The autoencoder, on its device, in its dtype.
        folder: Searched recursively for videos.
        num_frames: A frame count the autoencoder takes.
        size: Height and width of the crop, a multiple of the spatial ratio.
        progress: Called with a line per clip.

    Returns:
        `psnr_frame_mean_rgb` (dB), `ssim_frame_mean_rgb`, `num_videos`, `num_frames`, `resolution`, `dtype`, and
        `clips` with the same two metrics for each.
    """
    clips = {}
    for path in list_videos(folder):
        sample = read_center_clip(path, num_frames, size)[None].to(vae.device, vae.dtype)
        reconstruction = vae.decode(vae.encode(sample).latent_dist.mode()).sample
        unit, reference = (sample_to_unit(x[0].transpose(0, 1)) for x in (reconstruction, sample))
        clips[Path(path).name] = {
            "psnr_frame_mean_rgb": round(frame_psnr(unit, reference).mean().item(), 4),
            "ssim_frame_mean_rgb": round(frame_ssim(unit, reference).mean().item(), 5),
        }
        if progress is not None:
            psnr, ssim = clips[Path(path).name].values()
            progress(f"{Path(path).name:<28} PSNR {psnr:6.2f} dB  SSIM {ssim:.4f}")
    if not clips:
        raise ValueError(f"`folder` must hold at least one video, got none in {str(folder)!r}.")
    return {
        **{name: sum(clip[name] for clip in clips.values()) / len(clips) for name in next(iter(clips.values()))},
        "num_videos": len(clips),
        "num_frames": num_frames,
        "resolution": size,
        "dtype": str(vae.dtype).removeprefix("torch."),
        "clips": clips,
    }

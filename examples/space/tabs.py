"""What the three tabs of the Space compute; app.py shows it."""

from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import torch

from diffusers_leanvae import bundled, crop_sample, pad_sample
from diffusers_leanvae.evaluation.metrics import frame_psnr
from diffusers_leanvae.generation import generate_videos, load_pipeline
from diffusers_leanvae.loading import load_autoencoder
from diffusers_leanvae.video_io import iter_video, probe_video, write_video
from diffusers_leanvae.video_io.pixels import (
    pixels_to_sample,
    pixels_to_unit,
    resize_frames,
    sample_to_pixels,
    short_side_size,
)


GENERATOR = bundled.default_pipeline(takes_text=False)
SHORT_SIDE = 256  # of what is computed, in pixels: a clip of a phone takes seconds then on two processor cores

load = cache(load_autoencoder)  # each model once, for all visitors


def read_clip(path: str | Path, num_frames: int) -> tuple[torch.Tensor, Fraction]:
    """Read the first frames of a video, uint8 `(num_frames, height, width, 3)` with even sides, and its rate."""
    info = probe_video(path)
    short_side = min(SHORT_SIDE, info.width, info.height)
    # Browsers play H.264 with even sides only.
    height, width = (max(side // 2, 1) * 2 for side in short_side_size(info.height, info.width, short_side))
    frames = [resize_frames(frame, height, width) for frame in iter_video(path, 0, num_frames, chunk_size=1)]
    return torch.cat(frames), info.fps


@torch.inference_mode()
def reconstruct(model: str, frames: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Encode and decode frames; return what comes back, and a row of figures."""
    vae = load(model)
    sample = pixels_to_sample(frames.permute(3, 0, 1, 2)[None])
    padded, padding = pad_sample(sample, vae.temporal_compression_ratio, vae.spatial_compression_ratio)
    latents = vae.encode(padded).latent_dist.mode()
    decoded = sample_to_pixels(crop_sample(vae.decode(latents).sample, padding)[0])
    psnr = frame_psnr(pixels_to_unit(decoded.transpose(0, 1)), pixels_to_unit(frames.permute(0, 3, 1, 2)))
    figures = {
        "Model": model,
        "PSNR (dB)": round(float(psnr.mean()), 2),
        "Latents": " x ".join(map(str, latents.shape[1:])),
        "Numbers in pixels": f"{frames.numel():,}",
        "Numbers in latents": f"{latents.numel():,}",
        "Times fewer": round(frames.numel() / latents.numel(), 1),
    }
    return decoded.permute(1, 2, 3, 0), figures


def compare(path: str | Path, models: list[str], num_frames: int, output: Path) -> list[dict[str, Any]]:
    """Write the original and its reconstructions beside each other; return a row of figures for each model."""
    frames, fps = read_clip(path, num_frames)
    results = [reconstruct(model, frames) for model in models]
    write_video(output, torch.cat([frames, *(decoded for decoded, _ in results)], dim=2), fps)
    return [figures for _, figures in results]


@cache
def labels() -> list[str]:
    """Return the classes that the bundled generator knows."""
    return sorted(load_pipeline(GENERATOR, torch.device("cpu"), torch.float32).labels)


def generate(label: str, num_steps: int, seed: int, output: Path) -> None:
    """Write four videos of a class, in a grid."""
    generate_videos(
        GENERATOR,
        output,
        labels=[label],
        num_videos=4,
        num_inference_steps=num_steps,
        seed=seed,
        device=torch.device("cpu"),
    )

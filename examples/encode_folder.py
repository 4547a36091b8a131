"""Encode the first frames of videos: python examples/encode_folder.py MODEL FOLDER OUT [NUM_FRAMES [SIZE]]

Writes one safetensors file per video of a folder, with posterior mean and log-variance of its latents, so that
training can draw again each time.
"""

import re
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffusers_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.data import read_center_clip
from diffusers_leanvae.video_io import VideoError, list_videos


def main(model: str, folder: str, out: str, num_frames: str = "17", size: str = "256") -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderKLLeanVAE.from_pretrained(model, torch_dtype=torch.float32).to(device).eval()
    videos = list_videos(folder)
    if not videos:
        sys.exit(f"FOLDER must hold videos or images, got {folder!r} without any.")
    for path in videos:
        try:
            clip = read_center_clip(path, int(num_frames), int(size))  # (3, num_frames, size, size) in [-1, 1]
        except VideoError as error:
            print(f"skipped: {error}")
            continue
        with torch.no_grad():
            posterior = vae.encode(clip[None].to(device)).latent_dist
        target = Path(out, path.relative_to(folder)).with_suffix(".safetensors")
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file({"mean": posterior.mean[0].cpu(), "logvar": posterior.logvar[0].cpu()}, target)
        print(f"{target}: {tuple(posterior.mean.shape[1:])}")


if __name__ == "__main__":
    if not 4 <= len(sys.argv) <= 6:
        sys.exit(__doc__)
    if not all(re.fullmatch("[1-9][0-9]*", number) for number in sys.argv[4:]):
        sys.exit(f"NUM_FRAMES and SIZE must be positive integers, got {' '.join(sys.argv[4:])}.")
    main(*sys.argv[1:])

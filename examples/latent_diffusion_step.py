"""Train a diffusion model on latents of a frozen VAE: python examples/latent_diffusion_step.py MODEL FOLDER [STEPS]

Flow matching with one convolution in place of a transformer: it shows where the VAE stands in the loop.
"""

import re
import sys

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from diffusers_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.data import VideoFolder, pixels_to_sample
from diffusers_leanvae.latents import normalize_latents


def main(model: str, folder: str, num_steps: str = "20") -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderKLLeanVAE.from_pretrained(model, torch_dtype=torch.float32).to(device).eval()
    vae.requires_grad_(False)
    denoiser = torch.nn.Conv3d(vae.latent_channels, vae.latent_channels, kernel_size=3, padding=1).to(device)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)
    videos = VideoFolder(folder, clip_sizes=[(9, 64, 64)], batch_size=2)  # random clips, any index is valid
    loader = DataLoader(videos, batch_size=2, sampler=range(2 * int(num_steps)))

    for step, clips in enumerate(loader):
        with torch.no_grad():
            sample = pixels_to_sample(clips.pixels.to(device))  # (batch_size, 3, 9, 64, 64) in [-1, 1]
            latents = normalize_latents(vae.encode(sample).latent_dist.sample(), vae.config)
        noise, t = torch.randn_like(latents), torch.rand(len(latents), 1, 1, 1, 1, device=device)
        loss = F.mse_loss(denoiser(torch.lerp(latents, noise, t)), noise - latents)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    if not all(re.fullmatch("[1-9][0-9]*", number) for number in sys.argv[3:]):
        sys.exit(f"STEPS must be a positive integer, got {sys.argv[3]}.")
    main(*sys.argv[1:])

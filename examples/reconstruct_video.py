"""Encode and decode a video in memory: python examples/reconstruct_video.py MODEL IN.mp4 OUT.mp4

MODEL is a folder or Hub repository, or an original checkpoint file. The command `leanvae reconstruct` does the same
for videos of any length, with audio.
"""

import sys
from pathlib import Path

import torch

from diffusers_leanvae import AutoencoderKLLeanVAE, crop_sample, pad_sample
from diffusers_leanvae.video_io import read_video, write_video
from diffusers_leanvae.video_io.pixels import pixels_to_sample, sample_to_pixels


def main(model: str, source: str, target: str) -> None:
    is_original = Path(model).is_file()
    load = AutoencoderKLLeanVAE.from_single_file if is_original else AutoencoderKLLeanVAE.from_pretrained
    vae = load(model, torch_dtype=torch.float32).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    vae.enable_tiling()  # exact; bounds the memory of large frames

    frames, info = read_video(source)  # (num_frames, height, width, 3), uint8
    sample = pixels_to_sample(frames.permute(3, 0, 1, 2)[None])  # (1, 3, num_frames, height, width), [-1, 1]
    padded, padding = pad_sample(sample, vae.temporal_compression_ratio, vae.spatial_compression_ratio)
    with torch.no_grad():
        latents = vae.encode(padded.to(vae.device)).latent_dist.mode()
        decoded = crop_sample(vae.decode(latents).sample.cpu(), padding).clamp(-1, 1)

    psnr = -10 * ((decoded - sample) / 2).square().mean().log10()
    print(f"{tuple(sample.shape[2:])} frames, height, width -> latents {tuple(latents.shape)}; PSNR {psnr:.2f} dB")
    write_video(target, sample_to_pixels(decoded[0]).permute(1, 2, 3, 0), info.fps)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])

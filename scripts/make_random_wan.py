"""Write a small AutoencoderKLWan with random weights: a teacher to try alignment with, without a download.

    python scripts/make_random_wan.py /tmp/wan
    python scripts/make_random_wan.py /tmp/wan22 --spatial-ratio 16 --latent-channels 48

Its latents are an arbitrary nonlinear function of the video. On crops of the bundled clip they have mean 0 and, by
channel, standard deviations from 0.5 to 2: those are `latents_mean` and `latents_std` of its config.
"""

import argparse
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from diffusers_leanvae import bundled
from diffusers_leanvae.evaluation.diffusability import load_clips
from diffusers_leanvae.video_io.pixels import pixels_to_sample


def make_random_wan(latent_channels: int = 16, base_dim: int = 8, spatial_ratio: int = 8, seed: int = 0) -> Any:
    """An `AutoencoderKLWan` of compression 4x8x8, or 4x16x16 as in Wan2.2, in evaluation mode."""
    if spatial_ratio not in (8, 16):
        raise ValueError(f"`spatial_ratio` must be 8 or 16, got {spatial_ratio}.")
    folded = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True}
    torch.manual_seed(seed)
    std = torch.logspace(-1, 1, latent_channels, base=2)
    wan: Any = AutoencoderKLWan(
        base_dim=base_dim,
        z_dim=latent_channels,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.0] * latent_channels,
        latents_std=[round(value, 5) for value in std.tolist()],
        scale_factor_spatial=spatial_ratio,
        **(folded if spatial_ratio == 16 else {}),
    ).eval()
    clips = pixels_to_sample(load_clips(bundled.clip_path().parent, 8, (17, 64, 64), seed))
    with torch.no_grad():
        # Fresh latents hardly vary. The last layer is linear, so scaling its rows sets their mean and deviation.
        latents = wan.encode(clips).latent_dist.mode().transpose(0, 1).flatten(1)
        scale = std / latents.std(dim=1)
        rows = slice(latent_channels)  # the other half are log-variances
        bias = wan.quant_conv.bias
        bias[rows] = (bias[rows] - latents.mean(dim=1)) * scale
        wan.quant_conv.weight[rows] *= scale.view(-1, 1, 1, 1, 1)
    return wan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--latent-channels", type=int, default=16)
    parser.add_argument("--base-dim", type=int, default=8)
    parser.add_argument("--spatial-ratio", type=int, default=8, choices=[8, 16])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wan = make_random_wan(options.latent_channels, options.base_dim, options.spatial_ratio, options.seed)
    wan.save_pretrained(options.output)
    print(f"{sum(p.numel() for p in wan.parameters()) / 1e6:.2f} M parameters -> {options.output}")


if __name__ == "__main__":
    main()

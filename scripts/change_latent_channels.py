"""Start a model with fewer latent channels from a trained one: everything is kept but the bottleneck's two matrices.

    python scripts/change_latent_channels.py MODEL_FOLDER OUTPUT_FOLDER --latent-channels 4 --videos VIDEO_FOLDER

The new latents are the principal components of what the old ones reconstruct: the features `initial @ latents`, in
whose orthonormal coordinates an error in any costs the same. The result needs training.
"""

import argparse

import torch

from diffusers_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.data import VideoFolder, pixels_to_sample
from diffusers_leanvae.description import public_config


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a trained AutoencoderKLLeanVAE")
    parser.add_argument("output")
    parser.add_argument("--latent-channels", type=int, required=True)
    parser.add_argument("--videos", required=True, help="folder of training videos")
    parser.add_argument("--num-clips", type=int, default=51)
    parser.add_argument(
        "--clip-size", type=int, nargs=3, default=(17, 128, 128), metavar=("FRAMES", "HEIGHT", "WIDTH")
    )
    options = parser.parse_args()

    source = AutoencoderKLLeanVAE.from_pretrained(options.model, torch_dtype=torch.float32).eval()
    z = options.latent_channels
    if not 0 < z < source.latent_channels:
        parser.error(f"`--latent-channels` must be 1 to {source.latent_channels - 1}, got {z}.")
    config = public_config(source.config)
    config |= {"latent_channels": z, "latents_mean": None, "latents_std": None, "scaling_factor": 1.0}
    target = AutoencoderKLLeanVAE(**config).eval()

    videos = VideoFolder(options.videos, clip_sizes=[list(options.clip_size)], short_side=288, cache_gib=0.0, seed=3)
    rows = []
    for index in range(options.num_clips):
        latents = source.encode(pixels_to_sample(videos[index].pixels[None])).latent_dist.mode()
        rows.append(latents.permute(0, 2, 3, 4, 1).flatten(0, 3).double())
    latents = torch.cat(rows)
    initial, phi = source.bottleneck.initial.double(), source.bottleneck.phi.double()
    features = latents @ initial.t()
    _, values, axes = torch.linalg.svd(features, full_matrices=False)
    axes = axes[:z]
    # Unit variance at most, as in `initialize_from_principal_components`.
    scale = (1 / (features @ axes.t()).std(0)).clamp(max=1)[:, None]
    new_latents = latents @ (scale * (axes @ initial)).t()
    weights = source.state_dict()
    weights["bottleneck.phi"] = (scale * (axes @ initial @ phi)).float()
    weights["bottleneck.initial"] = torch.linalg.lstsq(new_latents, features).solution.t().float().contiguous()
    weights["logvar_proj.weight"] = torch.zeros(z, weights["logvar_proj.weight"].shape[1])
    weights["logvar_proj.bias"] = torch.full((z,), -8.0)
    target.load_state_dict(weights)
    target.save_pretrained(options.output)
    kept = values[:z].square().sum() / values.square().sum()
    print(f"{options.output}: {z} of {source.latent_channels} channels, {kept:.1%} of the features' energy")


if __name__ == "__main__":
    main()

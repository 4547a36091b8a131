"""Solve the decoder's last linear layers in closed form on training clips, everything before them fixed.

    python scripts/refit_projections.py MODEL_FOLDER VIDEO_FOLDER OUTPUT_FOLDER

Stochastic gradients leave noise in these layers; weighted least squares removes it. Each clip weighs as much as its
squared error is small, which is the first-order expansion of the mean of PSNR, and a ridge keeps the solution near the
trained weights.
"""

import argparse

import torch

from diffusers_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.data import VideoFolder, pixels_to_sample
from diffusers_leanvae.models.leanvae_patches import split_patches


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("videos")
    parser.add_argument("output")
    parser.add_argument("--num-clips", type=int, default=153)
    parser.add_argument("--size", type=int, nargs=3, default=(17, 160, 160))
    parser.add_argument("--ridge", type=float, default=1e-3, help="of the mean diagonal of the normal equations")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    options = parser.parse_args()

    vae = AutoencoderKLLeanVAE.from_pretrained(options.model, torch_dtype=torch.float32).eval()
    dataset = VideoFolder(options.videos, clip_sizes=[list(options.size)], short_side=288, cache_gib=0.0, seed=1)
    decoder, geometry = vae.decoder, vae.decoder.geometry
    layers = {
        name: getattr(decoder, name)
        for name in ("image_low_proj", "image_high_proj", "video_low_proj", "video_high_proj")
    }
    normal = {
        name: torch.zeros(layer.in_features + 1, layer.in_features + 1).double() for name, layer in layers.items()
    }
    right = {name: torch.zeros(layer.in_features + 1, layer.out_features).double() for name, layer in layers.items()}
    for index in range(options.num_clips):
        sample = pixels_to_sample(dataset[index][0][None])
        latents = vae.encode(sample).latent_dist.mode()
        features = vae.bottleneck(latents.permute(0, 2, 3, 4, 1), reconstruct=True)
        features = decoder.fusion_layers(features)
        low, high = features.tensor_split((decoder.low_dim,), dim=-1)
        tokens = {"low": decoder.low_layers(low), "high": decoder.high_layers(high)}
        bands = vae.analyze(sample)
        targets = {
            "image": split_patches(bands.image, geometry.image_patch),
            "video": split_patches(bands.video, geometry.video_patch),
        }
        errors = {}
        for kind, first, target in (
            ("image", slice(0, 1), targets["image"]),
            ("video", slice(1, None), targets["video"]),
        ):
            split = geometry.image_low_dim if kind == "image" else geometry.video_low_dim
            for band, part in (("low", target[..., :split]), ("high", target[..., split:])):
                x = tokens[band][:, first].reshape(-1, tokens[band].shape[-1]).double()
                x = torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), dim=1)
                layer = layers[f"{kind}_{band}_proj"]
                residual = (
                    part.reshape(len(x), -1).double() - x @ torch.cat((layer.weight.t(), layer.bias[None])).double()
                )
                errors[f"{kind}_{band}_proj"] = (x, residual)
        # Sub-bands are orthogonal, with 8 (video) or 4 (image) times the pixels' energy.
        energy = sum(r.square().sum() / (8 if name[0] == "v" else 4) for name, (_, r) in errors.items())
        weight = 1 / (energy / sample.numel() + 1e-6)
        for name, (x, residual) in errors.items():
            normal[name] += weight * x.t() @ x
            right[name] += weight * x.t() @ residual
    for name, layer in layers.items():
        ridge = options.ridge * normal[name].diagonal().mean() * torch.eye(len(normal[name]), dtype=torch.float64)
        change = torch.linalg.solve(normal[name] + ridge, right[name])
        layer.weight += change[:-1].t().float()
        layer.bias += change[-1].float()
        print(f"{name}: changed by {(change.norm() / layer.weight.norm()).item():.4f} of its norm")
    for module in vae.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().to(getattr(torch, options.dtype)))
    vae.save_pretrained(options.output)


if __name__ == "__main__":
    main()

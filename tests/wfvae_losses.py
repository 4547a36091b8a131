"""The losses that the reference of WF-VAE computes, with all that it computes them from."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from diffusers_leanvae.losses.adversarial import PatchDiscriminator3d


class Recording(NamedTuple):
    """Settings and tensors of the recording, and its discriminator, in evaluation mode."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    discriminator: PatchDiscriminator3d


def read_recording(dtype: torch.dtype = torch.float32) -> Recording:
    with safe_open(Path(__file__).parent / "fixtures" / "wfvae_losses.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key).to(dtype) for key in file.keys()}
    prefix = "disc.state_dict.main."
    weights = {f"layers.{key.removeprefix(prefix)}": x for key, x in tensors.items() if key.startswith(prefix)}
    # With dropout, which does nothing in evaluation mode, the layers have the reference's numbers.
    sizes = {"num_layers": config["disc"]["n_layers"], "num_filters": config["disc"]["ndf"]}
    discriminator = PatchDiscriminator3d(**sizes, dropout=0.3)
    discriminator.load_state_dict(weights)
    return Recording(config, tensors, discriminator.to(dtype).eval())


def squared_error(frames: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """What stands in for LPIPS in the recording: frames `(N, 3, H, W)` to `(N,)`."""
    return (frames - reconstruction).square().mean(dim=(1, 2, 3))

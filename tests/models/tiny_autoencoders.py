"""Tiny models of every class, in the configurations that differ in what they compute; no tests."""

from typing import Any

import torch

from diffusers_leanvae import AutoencoderKLIVVAE, AutoencoderKLLeanVAE, AutoencoderKLWFVAE
from diffusers_leanvae.models.video_autoencoder import VideoAutoencoder


LEAN = {
    "latent_channels": 4,
    "low_freq_dim": 8,
    "high_freq_dim": 24,
    "num_branch_layers": 1,
    "num_fusion_layers": 2,
    "num_ista_iterations": 1,
    "num_ista_layers": 1,
}
WF = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 3, "decoder_flow_channels": 2}
IV = {"latent_channels": 4, "base_channels": 4, "channel_multipliers": (1, 2, 3, 3)}
CASES: dict[str, tuple[type[VideoAutoencoder], dict[str, Any]]] = {
    "lean": (AutoencoderKLLeanVAE, LEAN),
    "lean_two_iterations": (AutoencoderKLLeanVAE, LEAN | {"num_ista_iterations": 2, "num_fusion_layers": 1}),
    "wf": (AutoencoderKLWFVAE, WF),
    "wf_8x": (AutoencoderKLWFVAE, WF | {"temporal_compression_ratio": 8, "num_encoder_layers": 1}),
    "wf_nearest": (AutoencoderKLWFVAE, WF | {"temporal_interpolation": "nearest", "use_attention": False}),
    "wf_flow": (AutoencoderKLWFVAE, WF | {"num_flow_layers": 4, "num_decoder_layers": 1}),
    "wf_one_layer": (AutoencoderKLWFVAE, WF | {"num_encoder_layers": 1, "num_decoder_layers": 1}),
    "iv": (AutoencoderKLIVVAE, IV),
    "iv_one_layer": (
        AutoencoderKLIVVAE,
        IV | {"num_layers": 1, "channel_multipliers": (1, 1, 1, 2)},
    ),
}


def make(case: str, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """A model of `CASES` in evaluation mode, all outputs of order 1."""
    torch.manual_seed(0)
    model_class, settings = CASES[case]
    vae = model_class(**(settings | config)).eval()
    with torch.no_grad():
        for name, parameter in vae.named_parameters():  # outputs of order 1, and norms that are not the identity
            if name.endswith(("threshold", "step_size")):
                continue
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * scale + float(is_scale))
    return torch.nn.Module.to(vae, dtype)


def make_video(vae: Any, num_groups: int = 2, height: int = 32, width: int = 40, batch_size: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    num_frames = num_groups * vae.temporal_compression_ratio + 1
    return (torch.rand(batch_size, 3, num_frames, height, width, generator=generator) * 2 - 1).to(vae.dtype)


def make_latents(vae: Any, *size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, vae.latent_channels, *size, generator=generator).to(vae.dtype)


def assert_exact(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.05  # or there would be nothing to see
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11 * expected.abs().max().item())

"""Tiny models with lively weights, and inputs for them: outputs are of order 1, so that no error is too small to see.

vae = make_tiny("leanvae", torch.float64, num_ista_iterations=2)
sample = vae(make_video(1, 3, 9, 32, 40, dtype=torch.float64)).sample
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from diffusers_leanvae import (
    AutoencoderKLIVVAE,
    AutoencoderKLLeanVAE,
    AutoencoderKLWFVAE,
    LeanVAELatteTransformer3DModel,
)


# Each family with its smallest config that still has every kind of layer.
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "leanvae": (
        AutoencoderKLLeanVAE,
        {
            "latent_channels": 4,
            "low_freq_dim": 8,
            "high_freq_dim": 24,
            "num_branch_layers": 1,
            "num_fusion_layers": 2,
            "num_ista_iterations": 1,
            "num_ista_layers": 1,
        },
    ),
    "wfvae": (
        AutoencoderKLWFVAE,
        {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 3, "decoder_flow_channels": 2},
    ),
    "ivvae": (
        AutoencoderKLIVVAE,
        {"latent_channels": 4, "base_channels": 4, "channel_multipliers": [1, 2, 3, 3]},
    ),
    "latte": (
        LeanVAELatteTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "sample_size": 4,
            "num_latent_frames": 3,
            "num_classes": 3,
        },
    ),
}


# Arguments of diffusers' transformer of texts, of which it has no defaults that work.
LATTE_TEXT: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "attention_bias": True,
    "sample_size": 4,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 16,
    "video_length": 3,
}


# A LeanVAE with nothing but what it cannot do without, which is a causal convolution: tracing takes seconds.
SMALLEST: dict[str, Any] = {
    "num_branch_layers": 0,
    "num_fusion_layers": 1,
    "bottleneck_type": "linear",
    "patch_embedding_type": "joint",
}


def make_tiny(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Any:
    """Make a tiny model of a family with lively weights, in evaluation mode.

    The weights are drawn in float32, so that models which differ in `dtype` alone have the same ones.
    """
    model = make_fresh(family, seed, **config)
    enliven(model, seed)
    return torch.nn.Module.to(model, dtype).eval()  # without diffusers' warning about layers that want float32


def make_tiny_wan_transformer(**config: Any) -> WanTransformer3DModel:
    """Make a tiny denoiser of Wan for latents of 4 channels and prompts of 16 numbers a token, with random weights."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "ffn_dim": 32, "freq_dim": 32}
    shape = {"patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 16, "rope_max_seq_len": 32}
    return WanTransformer3DModel(**sizes, **shape, **config)


def make_fresh(family: str, seed: int = 0, **config: Any) -> Any:
    """Make a tiny model of a family as training would start it, in training mode.

    Its first outputs are small (LeanVAE: about 1e-4, Latte: 0): fine for losses and optimizers, not for comparisons.
    """
    model_class, settings = FAMILIES[family]
    with seeded(seed):
        return model_class(**(settings | config)).train()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's own generator, and put it back to where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def enliven(module: Any, seed: int = 0) -> Any:
    """Add noise to the weights of any module, as much as keeps a signal's size; norms and biases move a little too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if not name.endswith(("threshold", "step_size")):  # LeanVAE's bottleneck would no longer do what its name says
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


def make_video(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Uniform noise in [-1, 1], the same numbers for every `dtype`."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(dtype)


def make_latents(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> torch.Tensor:
    """Normal noise, the same numbers for every `dtype`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

"""The names of what can be measured, and what each stands for; imports nothing heavy, so that help can list them."""

from typing import Any


# How a variant of LeanVAE is fused (arguments of `AutoencoderKLLeanVAE.fuse`), or not.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "fused": {},
    "fused-torch": {"kernels": "torch"},
    "compiled": None,
    "graphs": {},
}
LEANVAE: dict[str, dict[str, Any]] = {
    "LeanVAE-16ch": {"latent_channels": 16},
    "LeanVAE-4ch": {"latent_channels": 4},
    # For tests and rehearsals: everything is there, nothing takes time.
    "LeanVAE-tiny": {"latent_channels": 4, "low_freq_dim": 8, "high_freq_dim": 24, "num_fusion_layers": 1},
}
# What it is compared with: a class of this package, of diffusers or of this folder, and what its config has beside the
# defaults.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "WF-VAE-S-4ch": ("AutoencoderKLWFVAE", {"latent_channels": 4, "base_channels": 128}),
    "WF-VAE-M-32ch": (
        "AutoencoderKLWFVAE",
        {"latent_channels": 32, "base_channels": 160, "temporal_compression_ratio": 8},
    ),
    "WF-VAE-L-16ch": ("AutoencoderKLWFVAE", {"latent_channels": 16, "base_channels": 192}),
    "IV-VAE-16ch": ("AutoencoderKLIVVAE", {"latent_channels": 16, "base_channels": 64}),
    "TAEHV-16ch": ("TinyVideoAutoencoder", {"latent_channels": 16}),
    "AutoencoderKLWan": ("AutoencoderKLWan", {}),
    "AutoencoderKLWan-2.2": (
        "AutoencoderKLWan",
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        },
    ),
    "AutoencoderKLCogVideoX": ("AutoencoderKLCogVideoX", {}),
    "AutoencoderKLCosmos": ("AutoencoderKLCosmos", {}),
    "AutoencoderKLLTXVideo": ("AutoencoderKLLTXVideo", {}),
    "AutoencoderKLLTX2Video": ("AutoencoderKLLTX2Video", {}),
    "AutoencoderVidTok": ("AutoencoderVidTok", {}),
    "AutoencoderKLKVAEVideo": ("AutoencoderKLKVAEVideo", {}),
    "AutoencoderKLMiniMaxH3": ("AutoencoderKLMiniMaxH3", {}),
    "AutoencoderKLMochi": ("AutoencoderKLMochi", {}),
    "AutoencoderKLHunyuanVideo": ("AutoencoderKLHunyuanVideo", {}),
    "AutoencoderKLHunyuanVideo15": ("AutoencoderKLHunyuanVideo15", {}),
}

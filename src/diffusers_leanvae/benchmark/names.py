"""The names of what can be measured, and what each stands for; imports nothing heavy, so that help can list them."""

from typing import Any


# How a variant of LeanVAE is fused (arguments of `AutoencoderKLLeanVAE.fuse`), or not.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "fused": {},
    "fused-torch": {"kernels": "torch"},
    "compiled": None,
    "int8": {"weights": "int8"},
    "graphs": {},
}
LEANVAE: dict[str, dict[str, Any]] = {
    "LeanVAE-16ch": {"latent_channels": 16},
    "LeanVAE-4ch": {"latent_channels": 4},
    # For tests and rehearsals: everything is there, nothing takes time.
    "LeanVAE-tiny": {"latent_channels": 4, "low_freq_dim": 8, "high_freq_dim": 24, "num_fusion_layers": 1},
}
PEERS = (
    "AutoencoderKLWan",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLCosmos",
    "AutoencoderKLLTXVideo",
    "AutoencoderVidTok",
    "AutoencoderKLHunyuanVideo",
)

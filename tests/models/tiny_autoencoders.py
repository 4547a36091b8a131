"""Tiny autoencoders of every class, in the configurations that differ in what they compute; no tests."""

from typing import Any

import tiny
import torch

from diffusers_leanvae.models.video_autoencoder import VideoAutoencoder


# Each case with its family in `tiny.py`, and what it adds to the config of that.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lean": ("leanvae", {}),
    "lean_two_iterations": ("leanvae", {"num_ista_iterations": 2, "num_fusion_layers": 1}),
    "wf": ("wfvae", {"decoder_flow_channels": 8}),  # LayerNorm over two is a sign: any rounding may flip it
    "wf_8x": ("wfvae", {"temporal_compression_ratio": 8, "num_encoder_layers": 1}),
    "wf_nearest": ("wfvae", {"temporal_interpolation": "nearest", "use_attention": False}),
    "wf_flow": ("wfvae", {"num_flow_layers": 4, "num_decoder_layers": 1}),
    "wf_one_layer": ("wfvae", {"num_encoder_layers": 1, "num_decoder_layers": 1}),
    "wf_no_flow": ("wfvae", {"num_wavelet_levels": 1}),
    "wf_two_levels": ("wfvae", {"num_wavelet_levels": 2, "decoder_flow_channels": 8}),
    "iv": ("ivvae", {}),
    "iv_causal": ("ivvae", {"convolution": "causal", "use_pyramid": False, "attention": "none"}),
    "iv_motion": ("ivvae", {"use_keyframe_branch": False, "attention": "mid"}),
    "iv_one_layer": ("ivvae", {"num_layers": 1, "channel_multipliers": (1, 1, 1, 2)}),
}


def make(case: str, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """Make the model of a case, in evaluation mode, its outputs of order 1."""
    family, settings = CASES[case]
    return tiny.make_tiny(family, dtype, **(settings | config))


def make_video(
    vae: VideoAutoencoder, num_groups: int = 2, height: int = 16, width: int = 24, batch_size: int = 1
) -> torch.Tensor:
    """Make noise of the first frame and `num_groups` groups of the frames of a latent."""
    num_frames = num_groups * vae.temporal_compression_ratio + 1
    return tiny.make_video(batch_size, 3, num_frames, height, width, dtype=vae.dtype)


def make_latents(vae: VideoAutoencoder, *size: int) -> torch.Tensor:
    """Make noise of `size`: latent frames, height, width."""
    return tiny.make_latents(1, vae.latent_channels, *size, dtype=vae.dtype)


def assert_exact(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that nothing differs but the rounding of float64."""
    assert expected.std() > 0.05  # or there would be nothing to see
    atol = 6e-13 * expected.abs().max().item()  # measured 1e-14 to 1.6e-13, by the processor
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)

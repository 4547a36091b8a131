"""Representation alignment (REPA, arXiv 2410.06940): hidden tokens of a denoiser drawn to features of the clean video.

The features come from a frozen encoder: an image encoder of transformers, such as DINOv2, or the autoencoder itself.
The better its features, the faster the denoiser learns.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ..models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from ..models.video_autoencoder import VideoAutoencoder
from ..video_io.pixels import sample_to_unit


# The statistics that encoders trained on ImageNet expect, for those that come without a `preprocessor_config.json`.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class RepresentationHead(nn.Module):
    """Projection of hidden tokens, and their distance from features: 1 - cosine similarity, mean over tokens.

    Args:
        dim: Width of the hidden tokens.
        feature_dim: Width of the features.
        after_block: Tokens are taken behind this many blocks of the transformer, an even number.
        hidden_dim: Width of the two hidden layers of the projection.
        weight: Weight in the loss.
    """

    def __init__(self, dim: int, feature_dim: int, after_block: int, hidden_dim: int = 2048, weight: float = 0.5):
        super().__init__()
        self.after_block, self.weight = after_block, weight
        self.project = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, feature_dim),
        )

    @contextmanager
    def capture(self, transformer: Any) -> Iterator[list[torch.Tensor]]:
        """Collect the tokens `(B, F * N, dim)` of the videos of a forward pass inside the `with` block."""
        block = transformer.temporal_transformer_blocks[self.after_block // 2 - 1]
        captured: list[torch.Tensor] = []
        handle = block.register_forward_hook(lambda module, args, output: captured.append(output))
        try:
            yield captured
        finally:
            handle.remove()

    def forward(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Compute the loss, from 0 to 2.

        Args:
            tokens: `(B, F * N, dim)`.
            features: `(B, F, rows, columns, feature_dim)` with `rows * columns = N`.
        """
        projected, target = self.project(tokens).float(), features.flatten(1, 3).float()
        return 1.0 - F.cosine_similarity(projected, target, dim=-1).mean()


class FeatureEncoder(Protocol):
    """A frozen encoder; `needs_sample` says whether it takes pixels."""

    dim: int
    needs_sample: bool

    def __call__(self, latents: torch.Tensor, sample: torch.Tensor | None, grid: tuple[int, int]) -> torch.Tensor:
        """Compute features `(B, F, rows, columns, dim)` of clean videos.

        Args:
            latents: Latents of the autoencoder, not normalised, `(B, C, F, h, w)`.
            sample: The videos, `(B, 3, T, H, W)` in `[-1, 1]`, with `needs_sample`.
            grid: Rows and columns of the features.
        """
        ...


class AutoencoderFeatures:
    """Features that the autoencoder's bottleneck recovers from its latents, averaged over patches.

    They need no other weights, and hold edges and motion but no objects, so expect little of them.

    Args:
        vae: The autoencoder that makes the latents.
    """

    needs_sample = False

    def __init__(self, vae: VideoAutoencoder) -> None:
        if not isinstance(vae, AutoencoderKLLeanVAE):
            raise ValueError(
                f"`representation.encoder` 'vae' needs an AutoencoderKLLeanVAE, which recovers features from its "
                f"latents, got an {type(vae).__name__}."
            )
        self.vae = vae
        self.dim = vae.logvar_proj.in_features

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, sample: torch.Tensor | None, grid: tuple[int, int]) -> torch.Tensor:
        features = self.vae.bottleneck(latents.permute(0, 2, 3, 4, 1), reconstruct=True)  # (B, F, h, w, c)
        pooled = F.adaptive_avg_pool2d(features.flatten(0, 1).permute(0, 3, 1, 2), grid)
        return pooled.permute(0, 2, 3, 1).unflatten(0, features.shape[:2])


class ImageFeatures:
    """Patch features of a vision transformer of transformers, such as DINOv2, for one frame of each latent frame.

    Frames are resized so that the encoder has one patch for every token. Deliberately no `nn.Module`: as an attribute
    of one it is neither trained, nor saved, nor synchronised.

    Args:
        model: The encoder: its `last_hidden_state` ends with the patches, row by row.
        mean, std: Statistics of the three colours, for pixels in `[0, 1]`.
        stride: Frames per latent frame.
    """

    needs_sample = True

    def __init__(
        self,
        model: Any,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        stride: int = 4,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.dim: int = model.config.hidden_size
        self.patch_size: int = model.config.patch_size
        self.mean, self.std = (torch.tensor(x, device=model.device).view(3, 1, 1) for x in (mean, std))
        self.stride = stride
        # Most interpolate their table of positions only on request.
        wants = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if wants else {}

    @classmethod
    def from_pretrained(cls, path: str, stride: int, device: torch.device | str = "cpu") -> "ImageFeatures":
        """Load the encoder from a folder or from the Hub, with the statistics of its `preprocessor_config.json`."""
        try:
            from transformers import AutoModel
            from transformers.image_processing_base import ImageProcessingMixin
        except ImportError as error:
            raise ImportError("`representation.encoder` needs transformers: pip install transformers") from error
        model = AutoModel.from_pretrained(path, dtype=torch.float32)
        model = getattr(model, "vision_model", model)  # of CLIP and SigLIP
        if not hasattr(model.config, "patch_size"):
            raise ValueError(f"`representation.encoder` must be a vision transformer, got {type(model).__name__}.")
        try:
            config, _ = ImageProcessingMixin.get_image_processor_dict(path)
        except OSError:
            config = {}
        statistics = (config.get("image_mean", IMAGENET_MEAN), config.get("image_std", IMAGENET_STD))
        return cls(model.to(device), *statistics, stride=stride)

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, sample: torch.Tensor | None, grid: tuple[int, int]) -> torch.Tensor:
        assert sample is not None
        batch_size = sample.shape[0]
        frames = sample[:, :, :: self.stride].transpose(1, 2).flatten(0, 1)  # (B * F, 3, H, W)
        size = [edge * self.patch_size for edge in grid]
        frames = F.interpolate(frames.float(), size, mode="bicubic", antialias=True, align_corners=False)
        pixels = (sample_to_unit(frames) - self.mean) / self.std
        tokens = self.model(pixel_values=pixels, **self.options).last_hidden_state
        patches = tokens[:, tokens.shape[1] - grid[0] * grid[1] :]  # class and register tokens come first
        return patches.unflatten(1, grid).unflatten(0, (batch_size, -1))

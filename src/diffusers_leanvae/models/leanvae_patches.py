"""Sub-bands and patches of LeanVAE: the way between pixels and the features of a token."""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn

from .wavelets import haar_synthesis_2d, haar_synthesis_3d


class Subbands(NamedTuple):
    """Prediction of the decoder, in the model's internal pixel range (`pixel_factor` times the public one).

    Attributes:
        image: First frame, `(batch_size, 4 * C, 1, height / 2, width / 2)`, or `None` in a later chunk of a stream.
        video: Later frames, `(batch_size, 8 * C, (num_frames - 1) / 2, height / 2, width / 2)`, or `None` without any.
        In both the first `C` channels are the low-pass band.
    """

    image: torch.Tensor | None
    video: torch.Tensor | None


def split_patches(x: torch.Tensor, patch_size: tuple[int, int, int]) -> torch.Tensor:
    pt, ph, pw = patch_size
    return rearrange(x, "b c (t pt) (h ph) (w pw) -> b t h w (c pt ph pw)", pt=pt, ph=ph, pw=pw)


def merge_patches(tokens: torch.Tensor, patch_size: tuple[int, int, int]) -> torch.Tensor:
    pt, ph, pw = patch_size
    return rearrange(tokens, "b t h w (c pt ph pw) -> b c (t pt) (h ph) (w pw)", pt=pt, ph=ph, pw=pw)


def patch_projection(in_dim: int, out_dim: int, norm: bool) -> nn.Sequential:
    """Linear projection of flattened patches, with LayerNorm on both sides if `norm` (ablation 3 of the paper)."""
    return nn.Sequential(
        nn.LayerNorm(in_dim) if norm else nn.Identity(),
        nn.Linear(in_dim, out_dim),
        nn.LayerNorm(out_dim) if norm else nn.Identity(),
    )


class LeanVAEPatchGeometry(NamedTuple):
    """Everything that follows from the pixel channels, the patch size and the kind of patch embedding."""

    in_channels: int
    patch_size: tuple[int, int, int]
    patch_embedding_type: str

    @property
    def image_patch(self) -> tuple[int, int, int]:
        _, ph, pw = self.patch_size
        return (1, ph, pw) if self.patch_embedding_type != "no_wavelet" else (1, 2 * ph, 2 * pw)

    @property
    def video_patch(self) -> tuple[int, int, int]:
        pt, ph, pw = self.patch_size
        return (pt, ph, pw) if self.patch_embedding_type != "no_wavelet" else (2 * pt, 2 * ph, 2 * pw)

    @property
    def image_dim(self) -> int:
        return 4 * self.in_channels * math.prod(self.patch_size[1:])

    @property
    def video_dim(self) -> int:
        return 8 * self.in_channels * math.prod(self.patch_size)

    @property
    def image_low_dim(self) -> int:
        return self.image_dim // 4

    @property
    def video_low_dim(self) -> int:
        return self.video_dim // 8


def synthesize(subbands: Subbands, pixel_factor: float) -> torch.Tensor:
    """Pixels in the public range of sub-bands in the internal one."""
    parts = []
    if subbands.image is not None:
        parts.append(haar_synthesis_2d(subbands.image))
    if subbands.video is not None:
        parts.append(haar_synthesis_3d(subbands.video))
    return torch.cat(parts, dim=2) * (1 / pixel_factor)

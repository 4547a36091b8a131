"""A tiny video autoencoder as TAEHV and TAEW2.1 are, for its cost alone: the peer that previews are made with.

Convolutions of single frames at 64 to 256 channels; what passes from frame to frame is the frame before, beside the
present one, at the entry of each block. Time is pooled by 4 in the encoder's first two stages, and grown in the
decoder's last two. 11.3 million parameters with 16 latent channels, the size for Wan 2.1. Built from that description,
with random weights: none of the released ones can be loaded.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, EncoderOutput
from torch import nn


_RATIO_T = 4
_NUM_BLOCKS = 3  # of each stage


class _MemoryBlock(nn.Module):
    """Three convolutions of a frame and the one before it, with a residual; of `(B, T, c, H, W)`."""

    def __init__(self, dim: int):
        super().__init__()
        dims = (2 * dim, dim, dim)
        self.convs = nn.ModuleList(nn.Conv2d(in_dim, dim, 3, padding=1) for in_dim in dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        hidden = torch.cat((x, before), dim=2).flatten(0, 1)
        first, second, third = self.convs
        hidden = third(F.relu(second(F.relu(first(hidden)))))
        return F.relu(hidden.unflatten(0, x.shape[:2]) + x)


class _FrameConv(nn.Conv2d):
    """A convolution of every frame."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class _PoolTime(nn.Module):
    """A point-wise map of each run of `stride` frames to one."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.stride, self.conv = stride, _FrameConv(stride * dim, dim, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.unflatten(1, (-1, self.stride)).flatten(2, 3))


class _GrowTime(nn.Module):
    """A point-wise map of each frame to a run of `stride` frames."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.stride, self.conv = stride, _FrameConv(dim, stride * dim, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).unflatten(2, (self.stride, -1)).flatten(1, 2)


class _Upsample(nn.Module):
    """Every pixel as four."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x.flatten(0, 1), scale_factor=2.0).unflatten(0, x.shape[:2])


def _blocks(dim: int) -> list[nn.Module]:
    return [_MemoryBlock(dim) for _ in range(_NUM_BLOCKS)]


class TinyVideoAutoencoder(ModelMixin, AutoencoderMixin, ConfigMixin):
    """Encode videos to `(B, latent_channels, T', H / 8, W / 8)` and back, with `T = 4 * T' - 3` frames.

    Args:
        latent_channels: Channels of the latents.
    """

    @register_to_config
    def __init__(self, latent_channels: int = 16):
        super().__init__()
        encoder: list[nn.Module] = [_FrameConv(3, 64, 3, padding=1), nn.ReLU()]
        for stride in (2, 2, 1):
            encoder += [_PoolTime(64, stride), _FrameConv(64, 64, 3, stride=2, padding=1, bias=False), *_blocks(64)]
        self.encoder = nn.Sequential(*encoder, _FrameConv(64, latent_channels, 3, padding=1))
        decoder: list[nn.Module] = [_FrameConv(latent_channels, 256, 3, padding=1), nn.ReLU()]
        for dim, next_dim, stride in ((256, 128, 1), (128, 64, 2), (64, 64, 2)):
            decoder += [*_blocks(dim), _Upsample(), _GrowTime(dim, stride)]
            decoder += [_FrameConv(dim, next_dim, 3, padding=1, bias=False)]
        self.decoder = nn.Sequential(*decoder, nn.ReLU(), _FrameConv(64, 3, 3, padding=1))

    def encode(self, x: torch.Tensor) -> EncoderOutput:
        """Encode `(B, 3, T, H, W)` in `[-1, 1]`; the last frame repeats up to a multiple of four."""
        frames = x.transpose(1, 2)
        missing = -frames.shape[1] % _RATIO_T
        frames = torch.cat((frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)), dim=1)
        return EncoderOutput(latent=self.encoder(frames / 2 + 0.5).transpose(1, 2))

    def decode(self, z: torch.Tensor) -> DecoderOutput:
        """Decode to `(B, 3, T, H, W)`; the first three frames, of an unfinished group, are dropped."""
        frames = self.decoder(z.div(3).tanh().mul(3).transpose(1, 2))
        return DecoderOutput(sample=(frames * 2 - 1)[:, _RATIO_T - 1 :].transpose(1, 2))

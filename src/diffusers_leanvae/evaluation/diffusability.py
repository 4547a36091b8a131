"""Ease of latents for diffusion: the held-out loss of a small denoiser, and the quality of its decoded predictions.

Everything but the autoencoder is fixed: clips, the denoiser and its first weights, the order of the batches, noise and
noise levels all follow from one seed. A flow-matching denoiser learns from latents normalised per channel. It gives
two figures, each with its blind spot:

- its loss on held-out clips, in the latents' own space: comparable where shapes agree, and blind to what latents lost;
- PSNR of decoded one-step predictions of held-out latents, in pixels: comparable everywhere, next to the PSNR of the
  plain reconstruction, which is the limit without noise.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ..data.datasets import VideoFolder
from ..models.video_autoencoder import VideoAutoencoder
from ..video_io.pixels import pixels_to_sample, sample_to_unit
from .metrics import frame_psnr


@dataclass(frozen=True)
class DiffusabilityProtocol:
    """Settings that are fixed, with the values of the published figures.

    Attributes:
        noise_levels: Held-out latents are `(1 - level) * latents + level * noise`, a signal-to-noise ratio of
            `((1 - level) / level) ** 2`.
        num_decoded_clips: Held-out clips whose predictions are decoded.
    """

    num_steps: int = 400
    batch_size: int = 16
    learning_rate: float = 1e-3
    width: int = 128
    num_layers: int = 4
    noise_levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    num_decoded_clips: int = 16
    seed: int = 0


class LatentDenoiser(nn.Module):
    """A transformer over patches of 1x2x2 latents (1x1x1 where sizes are odd) that predicts `noise - latents`.

    Preconditioned in the manner of EDM (arXiv 2206.00364): untrained it is the best denoiser of white latents, and
    what the transformer adds has unit variance at every noise level, so no step is spent on learning that.

    Args:
        latent_shape: `(latent_channels, num_latent_frames, latent_height, latent_width)`.
        width: Width of the tokens.
        num_layers: Pre-norm layers with four heads.
    """

    def __init__(self, latent_shape: tuple[int, int, int, int], width: int, num_layers: int) -> None:
        super().__init__()
        channels, *self.grid = latent_shape
        self.patch = 1 if self.grid[1] % 2 or self.grid[2] % 2 else 2
        num_tokens = math.prod(self.grid) // self.patch**2
        self.embed = nn.Linear(channels * self.patch**2, width)
        self.position = nn.Parameter(torch.randn(num_tokens, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.project = nn.Linear(width, channels * self.patch**2)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, noisy: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Velocities of latents `(batch_size, latent_channels, t, h, w)` with noise levels `(batch_size,)`."""
        variance = _variance(level).view(-1, 1, 1, 1, 1)
        frequencies = torch.logspace(0, 3, self.position.shape[1] // 2, device=level.device)
        angles = level[:, None] * frequencies
        time = self.time(torch.cat((angles.sin(), angles.cos()), dim=-1))  # (B, width)
        tokens = rearrange(
            noisy / variance.sqrt(), "b c t (h p) (w q) -> b (t h w) (c p q)", p=self.patch, q=self.patch
        )
        tokens = self.project(self.layers(self.embed(tokens) + self.position + time[:, None]))
        t, h, w = self.grid[0], self.grid[1] // self.patch, self.grid[2] // self.patch
        pattern = "b (t h w) (c p q) -> b c t (h p) (w q)"
        added = rearrange(tokens, pattern, t=t, h=h, w=w, p=self.patch, q=self.patch)
        return white_velocity(noisy, level) + added / variance.sqrt()


def _variance(level: torch.Tensor) -> torch.Tensor:
    """Variance of noisy latents whose clean variance is 1."""
    return (1 - level) ** 2 + level**2


def white_velocity(noisy: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """The best prediction of `noise - latents` for latents of unit variance without any structure."""
    return ((2 * level - 1) / _variance(level)).view(-1, 1, 1, 1, 1) * noisy


def load_clips(
    folder: str | Path, num_clips: int, clip_size: tuple[int, int, int] = (17, 64, 64), seed: int = 0
) -> torch.Tensor:
    """Load the first clips of a folder, cut at random by a seed.

    Args:
        folder: Searched for videos, which are scaled down to a short side of at most 256.
        num_clips: Clips to cut, from all videos in turn.
        clip_size: Frames, height and width.
        seed: Seed of the cuts.

    Returns:
        `uint8` clips `(num_clips, 3, num_frames, height, width)`.
    """
    videos = VideoFolder(folder, [clip_size], short_side=256, flip=False, seed=seed)
    return torch.stack([videos[index].pixels for index in range(num_clips)])


def measure_diffusability(
    vae: VideoAutoencoder,
    train_clips: torch.Tensor,
    held_out_clips: torch.Tensor,
    protocol: DiffusabilityProtocol | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train the denoiser on the latents of some clips and measure it on those of others.

    Args:
        vae: The autoencoder, on its device, in its dtype, in evaluation mode.
        train_clips: `uint8` clips `(num_clips, 3, num_frames, height, width)`, at least a batch of them.
        held_out_clips: Clips of other videos, of the same size.
        protocol: The fixed settings; figures compare only between runs of the same ones.
        progress: Called with a line every 100 steps and after every noise level.

    Returns:
        `denoising_loss`, the squared error on held-out latents as a share of that of [`white_velocity`] (1: no
        structure was found that is there again), mean over noise levels; `reconstruction_psnr_frame_mean_rgb`; the
        loss and the PSNR of predictions by noise level under `levels`; and the settings.
    """
    protocol = protocol or DiffusabilityProtocol()
    if len(train_clips) < protocol.batch_size:
        raise ValueError(f"`train_clips` must be at least {protocol.batch_size} clips, got {len(train_clips)}.")
    if not 1 <= protocol.num_decoded_clips <= len(held_out_clips):
        raise ValueError(
            f"`held_out_clips` must be at least the {protocol.num_decoded_clips} that are decoded, got "
            f"{len(held_out_clips)}."
        )
    train, held_out = _encode(vae, train_clips), _encode(vae, held_out_clips)
    mean = train.mean(dim=(0, 2, 3, 4), keepdim=True)
    std = train.std(dim=(0, 2, 3, 4), keepdim=True).clamp(min=1e-6)
    train, held_out = (train - mean) / std, (held_out - mean) / std
    denoiser = _train_denoiser(train, protocol, progress)

    sample = pixels_to_sample(held_out_clips[: protocol.num_decoded_clips])
    plain = _decoded_psnr(vae, held_out[: len(sample)] * std + mean, sample)
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(protocol.seed + 2))
    levels = []
    for level in protocol.noise_levels:
        loss, predicted = _predict(denoiser, held_out, noise, level, protocol.batch_size)
        psnr = _decoded_psnr(vae, predicted[: len(sample)] * std + mean, sample)
        row = {"noise_level": level, "denoising_loss": round(loss, 5), "psnr_frame_mean_rgb": round(psnr, 4)}
        levels.append(row)
        if progress is not None:
            progress(f"noise {level:.1f}: loss {loss:.4f}, PSNR {psnr:.2f} dB")
    return {
        "denoising_loss": round(sum(row["denoising_loss"] for row in levels) / len(levels), 5),
        "reconstruction_psnr_frame_mean_rgb": round(plain, 4),
        "levels": levels,
        "latent_shape": list(train.shape[1:]),
        "num_train_clips": len(train_clips),
        "num_held_out_clips": len(held_out_clips),
        "num_denoiser_parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "protocol": asdict(protocol),
    }


def _train_denoiser(
    latents: torch.Tensor, protocol: DiffusabilityProtocol, progress: Callable[[str], None] | None
) -> LatentDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(protocol.seed)
        channels, t, h, w = latents.shape[1:]
        denoiser = LatentDenoiser((channels, t, h, w), protocol.width, protocol.num_layers)
    generator = torch.Generator().manual_seed(protocol.seed + 1)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=protocol.learning_rate, weight_decay=0.0)
    num_warmup = max(1, protocol.num_steps // 20)
    for step in range(protocol.num_steps):
        decay = 0.5 + 0.5 * math.cos(math.pi * step / protocol.num_steps)
        optimizer.param_groups[0]["lr"] = protocol.learning_rate * min((step + 1) / num_warmup, decay)
        clean = latents[torch.randint(len(latents), (protocol.batch_size,), generator=generator)]
        noise = torch.randn(clean.shape, generator=generator)
        # One level from each of `batch_size` equal intervals: the batch always covers the whole range.
        offsets = torch.rand(protocol.batch_size, generator=generator)
        level = (torch.arange(protocol.batch_size) + offsets) / protocol.batch_size
        velocity = denoiser(torch.lerp(clean, noise, level.view(-1, 1, 1, 1, 1)), level)
        error = (velocity - noise + clean).square().mean(dim=(1, 2, 3, 4))
        loss = (error * _variance(level)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None and (step + 1) % 100 == 0:
            progress(f"step {step + 1} of {protocol.num_steps}: training loss {loss.item():.4f}")
    return denoiser.eval()


@torch.no_grad()
def _predict(
    denoiser: LatentDenoiser, latents: torch.Tensor, noise: torch.Tensor, level: float, batch_size: int
) -> tuple[float, torch.Tensor]:
    """Squared error of velocities as a share of the white denoiser's, and the latents predicted in one step."""
    noisy, levels = torch.lerp(latents, noise, level), torch.full((len(latents),), level)
    parts = zip(noisy.split(batch_size), levels.split(batch_size), strict=True)
    velocity = torch.cat([denoiser(*part) for part in parts])
    error, white_error = (F.mse_loss(v, noise - latents) for v in (velocity, white_velocity(noisy, levels)))
    return (error / white_error).item(), noisy - level * velocity


@torch.no_grad()
def _encode(vae: VideoAutoencoder, clips: torch.Tensor) -> torch.Tensor:
    """Posterior means in float32 on the CPU, where the denoiser is: its sums come out the same on every machine."""
    parts = (pixels_to_sample(part).to(vae.device, vae.dtype) for part in clips.split(8))
    return torch.cat([vae.encode(part, return_dict=False)[0].mode().float().cpu() for part in parts])


@torch.no_grad()
def _decoded_psnr(vae: VideoAutoencoder, latents: torch.Tensor, sample: torch.Tensor) -> float:
    values = []
    for z, clips in zip(latents.split(8), sample.split(8), strict=True):
        decoded = vae.decode(z.to(vae.device, vae.dtype), return_dict=False)[0].float().cpu()
        unit, reference = (sample_to_unit(x.transpose(1, 2).flatten(0, 1)) for x in (decoded, clips))
        values.append(frame_psnr(unit, reference))
    return torch.cat(values).mean().item()

"""Clips that move, drawn."""

import torch


def drifting_pattern(num_frames: int, height: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    phase, speed = torch.rand(2, 3, generator=generator) * torch.tensor([[6.0], [0.4]])
    t = torch.arange(num_frames)[:, None, None, None]
    y, x = torch.arange(height)[:, None, None] / 8, torch.arange(width)[:, None] / 8
    return (127.5 + 100 * torch.sin(x + phase + speed * t) * torch.cos(y - phase)).byte()

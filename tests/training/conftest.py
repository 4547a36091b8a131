"""A folder of tiny clips that move, written once."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from diffusers_leanvae.video_io import VideoWriter


def drifting_pattern(num_frames: int, height: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    phase, speed = torch.rand(2, 3, generator=generator) * torch.tensor([[6.0], [0.4]])
    t = torch.arange(num_frames)[:, None, None, None]
    y, x = torch.arange(height)[:, None, None] / 8, torch.arange(width)[:, None] / 8
    return (127.5 + 100 * torch.sin(x + phase + speed * t) * torch.cos(y - phase)).byte()


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    (folder / "nested").mkdir()
    for number, name in enumerate(["a.mp4", "b.mp4", "nested/c.mp4"]):
        with VideoWriter(folder / name, Fraction(24)) as writer:
            writer.write(drifting_pattern(12 + number, height=48, width=64, seed=number))
    return folder

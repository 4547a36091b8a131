"""What all tests share: one thread, and tiny models whose weights do something."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from patterns import drifting_pattern

from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.video_io import VideoWriter


# Runners share their cores, and sums over one thread come out the same everywhere.
torch.set_num_threads(1)
# Derandomised: a red test must stay red until its cause is gone. No deadline: a loaded runner is no bug.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")

TINY = {
    "latent_channels": 4,
    "low_freq_dim": 8,
    "high_freq_dim": 24,
    "num_branch_layers": 1,
    "num_fusion_layers": 2,
    "num_ista_iterations": 1,
    "num_ista_layers": 1,
}


def _make_model(dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> AutoencoderKLLeanVAE:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoencoderKLLeanVAE(**(TINY | config))
        # The training initialisation gives outputs of about 1e-4, behind which any error would hide.
        for name, parameter in model.named_parameters():
            if not name.endswith(("threshold", "step_size")):
                scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
                parameter.add_(torch.randn_like(parameter) * scale)
    return model.to(dtype).eval()


def _make_video(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(dtype)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., AutoencoderKLLeanVAE]:
    r"""`make_model(dtype, seed, **config)`: a tiny model in evaluation mode, every output of order 1."""
    return _make_model


@pytest.fixture(scope="session")
def make_video() -> Callable[..., torch.Tensor]:
    r"""`make_video(*shape, dtype, seed)`: uniform noise in [-1, 1]."""
    return _make_video


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    r"""A folder of tiny clips that move, written once."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "nested").mkdir()
    for number, name in enumerate(["a.mp4", "b.mp4", "nested/c.mp4"]):
        with VideoWriter(folder / name, Fraction(24)) as writer:
            writer.write(drifting_pattern(12 + number, height=48, width=64, seed=number))
    return folder

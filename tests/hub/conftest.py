"""A Hub of this process, and tiny pipelines to push to it."""

from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
from huggingface_hub import constants
from local_hub import LocalHub
from tiny import make_tiny, make_tiny_wan_transformer

import diffusers_leanvae
from diffusers_leanvae.generation.schedulers import make_scheduler


@pytest.fixture(scope="module")
def latte_pipeline() -> diffusers.DiffusionPipeline:
    transformer = make_tiny("latte", num_latent_frames=2, num_classes=2)
    pipeline = diffusers_leanvae.LeanVAELattePipeline(
        make_tiny("leanvae"), transformer, make_scheduler("ddpm"), id2label={0: "circle", 1: "square"}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def wan_pipeline() -> diffusers.DiffusionPipeline:
    """A stock pipeline with our autoencoder, tiny, random; without text encoder: prompts come as embeddings."""
    vae = make_tiny("leanvae", latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[1.0, 2.0, 3.0, 0.25])
    return diffusers.WanPipeline(
        None, None, vae, diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), make_tiny_wan_transformer()
    )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A Hub of this process, with a cache of its own."""
    with LocalHub() as server:
        server.connect(monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server

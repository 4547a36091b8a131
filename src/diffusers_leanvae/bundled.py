"""Demonstration weights and a clip, which are shipped with the package."""

import json
from collections.abc import Container
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from .checks import check_choice


# Trained in hours on small hardware, for the demo, examples and tests; see model_card.md.
MODELS = ("compact-16ch", "compact-4ch")
DEFAULT = "compact-16ch"


class BundledPipeline(NamedTuple):
    model: str  # the bundled model that decodes; its weights are in the package only once
    guidance_scale: float  # the best one by results/bench_shapes.json and bench_scenes.json
    takes_text: bool = False


PIPELINES = {
    "mini-shapes": BundledPipeline("compact-4ch", guidance_scale=2.0),
    "mini-scenes": BundledPipeline("compact-4ch", guidance_scale=2.0, takes_text=True),
}


def is_bundled(source: object, names: Container[str] = (*MODELS, *PIPELINES)) -> bool:
    """Tell whether a source is one of these names; a folder of that name in the working directory comes first."""
    return str(source) in names and not Path(str(source)).is_dir()


def model_path(name: str) -> Path:
    """Return the folder of a bundled model, for `from_pretrained`."""
    check_choice("name", name, MODELS)
    return Path(str(files("diffusers_leanvae"))) / "assets" / name


def pipeline_path(name: str) -> Path:
    """Return the folder of a bundled pipeline, without its autoencoder; [`generation.load_pipeline`] loads both."""
    check_choice("name", name, PIPELINES)
    return Path(str(files("diffusers_leanvae"))) / "assets" / name


def latent_statistics(name: str) -> dict[str, Any]:
    """Return what a bundled pipeline changes in its autoencoder's config: statistics of its own latents."""
    path = pipeline_path(name) / "vae" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {key: config[key] for key in ("latents_mean", "latents_std") if key in config}


def default_pipeline(takes_text: bool) -> str:
    """Return the name of the bundled pipeline that takes texts, or classes."""
    return next(name for name, pipeline in PIPELINES.items() if pipeline.takes_text == takes_text)


def clip_path() -> Path:
    """Return the path of a short CC0 video: a flower opening, from the MDN shared assets."""
    return Path(str(files("diffusers_leanvae"))) / "assets" / "flower.mp4"

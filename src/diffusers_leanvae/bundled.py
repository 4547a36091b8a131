"""Demonstration weights and a clip, which are shipped with the package."""

from collections.abc import Container
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from .checks import check_choice


# Trained in hours on small hardware, for the demo, examples and tests; see model_card.md.
MODELS = ("compact-16ch", "compact-4ch")
DEFAULT = "compact-16ch"


class BundledPipeline(NamedTuple):
    model: str  # the bundled model that decodes; its weights are in the package only once
    guidance_scale: float  # the best one by results/bench_shapes.json


PIPELINES = {"mini-shapes": BundledPipeline("compact-4ch", guidance_scale=2.0)}


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


def clip_path() -> Path:
    """Return the path of a short CC0 video: a flower opening, from the MDN shared assets."""
    return Path(str(files("diffusers_leanvae"))) / "assets" / "flower.mp4"

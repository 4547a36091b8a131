"""What travels inside the package: demonstration weights and a clip."""

from importlib.resources import files
from pathlib import Path


# Trained in hours on small hardware, for the demo, examples and tests; see model_card.md.
MODELS = ("compact-16ch", "compact-4ch")
DEFAULT = "compact-16ch"
PIPELINES = ("mini-shapes",)


def model_path(name: str) -> Path:
    r"""Folder of a bundled model, for `from_pretrained`."""
    if name not in MODELS:
        raise ValueError(f"`name` must be one of {', '.join(MODELS)}, got {name!r}.")
    return Path(str(files("diffusers_leanvae"))) / "assets" / name


def pipeline_path(name: str) -> Path:
    r"""Folder of a bundled pipeline, for `DiffusionPipeline.from_pretrained`."""
    if name not in PIPELINES:
        raise ValueError(f"`name` must be one of {', '.join(PIPELINES)}, got {name!r}.")
    return Path(str(files("diffusers_leanvae"))) / "assets" / name


def clip_path() -> Path:
    r"""A short CC0 video (a flower opening, MDN shared assets)."""
    return Path(str(files("diffusers_leanvae"))) / "assets" / "flower.mp4"

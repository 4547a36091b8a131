"""Videos from latent diffusion: pipelines from a name, and their videos as files."""

from .videos import generate_videos, load_pipeline


__all__ = ["generate_videos", "load_pipeline"]

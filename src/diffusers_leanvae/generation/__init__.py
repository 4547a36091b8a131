"""Latent diffusion: load a pipeline by its name, and generate videos to files."""

from .videos import generate_videos, load_pipeline


__all__ = ["generate_videos", "load_pipeline"]

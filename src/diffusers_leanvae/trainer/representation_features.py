"""Representation alignment in a recipe: the features that tokens are aligned with, and the head that does it."""

from dataclasses import dataclass

import torch

from ..data.latent_samples import LatentBatch
from ..generation.pipeline import Transformer
from ..losses.representation import AutoencoderFeatures, FeatureEncoder, ImageFeatures, RepresentationHead
from ..models.video_autoencoder import VideoAutoencoder
from ..video_io.pixels import as_sample
from .recipe import check_amounts, check_counts


@dataclass
class RepresentationRecipe:
    """Representation alignment (2410.06940); off while `weight` is 0."""

    weight: float = 0.0  # 0.5 in the paper
    encoder: str = "vae"  # "vae": the autoencoder's own features | a vision transformer, folder or Hub repository
    after_block: int = 8
    hidden_dim: int = 2048

    def __post_init__(self) -> None:
        check_amounts(self, "weight", prefix="representation.")
        check_counts(self, "hidden_dim", prefix="representation.")
        if self.after_block < 2 or self.after_block % 2:
            raise ValueError(f"`representation.after_block` must be a positive even number, got {self.after_block}.")


def build_feature_encoder(
    recipe: RepresentationRecipe, vae: VideoAutoencoder, device: torch.device
) -> FeatureEncoder | None:
    if not recipe.weight:
        return None
    if recipe.encoder == "vae":
        return AutoencoderFeatures(vae)
    return ImageFeatures.from_pretrained(recipe.encoder, vae.temporal_compression_ratio, device)


def build_head(recipe: RepresentationRecipe, transformer: Transformer, encoder: FeatureEncoder) -> RepresentationHead:
    num_layers = transformer.config["num_layers"]
    if recipe.after_block > num_layers:
        raise ValueError(f"`representation.after_block` must be at most {num_layers}, got {recipe.after_block}.")
    return RepresentationHead(transformer.inner_dim, encoder.dim, recipe.after_block, recipe.hidden_dim, recipe.weight)


def aim_at(
    encoder: FeatureEncoder,
    latents: torch.Tensor,
    batch: LatentBatch,
    has_latents: bool,
    vae: VideoAutoencoder,
    patch_size: int,
) -> torch.Tensor:
    """Features of the clean videos, one for each token; an encoder of pixels gets decoded ones of cached latents."""
    sample = None
    if encoder.needs_sample and has_latents:
        with torch.no_grad():
            sample = vae.decode(latents, return_dict=False)[0]
    elif encoder.needs_sample:
        sample = as_sample(batch.videos.to(latents.device))
    return encoder(latents, sample, (latents.shape[3] // patch_size, latents.shape[4] // patch_size))

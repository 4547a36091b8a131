"""The autoencoders that a latent video pipeline takes: those of this package, and video autoencoders of diffusers."""

from typing import Any, NamedTuple, Self

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLWan

from ..models.autoencoder_kl_ivvae import AutoencoderKLIVVAE
from ..models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from ..models.autoencoder_kl_wfvae import AutoencoderKLWFVAE
from ..models.temporal_cache import TemporalCache
from ..models.video_autoencoder import VideoAutoencoder


# Each by its own name: diffusers' `from_pipe` takes no sub-classes of what is named.
Autoencoder = (
    AutoencoderKLLeanVAE
    | AutoencoderKLWFVAE
    | AutoencoderKLIVVAE
    | AutoencoderKLWan
    | AutoencoderKLCogVideoX
    | AutoencoderKLHunyuanVideo
)


class LatentLayout(NamedTuple):
    """How an autoencoder turns a video into latents: the first frame into one, every later group into one more.

    Attributes:
        in_channels: Channels of the pixels.
        latent_channels: Channels of the latents.
        ratio_t: Frames of a later group.
        ratio_s: Pixels of a latent along height and along width.
        num_frames_step: Legal numbers of frames are 1 and this many more each time.
    """

    in_channels: int
    latent_channels: int
    ratio_t: int
    ratio_s: int
    num_frames_step: int

    @classmethod
    def of(cls, vae: Any) -> Self:
        """Read it from an autoencoder, whose names for it are those of this package or one of diffusers' own.

        Raises:
            ValueError: If the autoencoder does not tell.
        """
        if isinstance(vae, VideoAutoencoder):
            ratio_t, ratio_s = vae.temporal_compression_ratio, vae.spatial_compression_ratio
            return cls(vae.in_channels, vae.latent_channels, ratio_t, ratio_s, ratio_t)
        if not hasattr(vae, "config"):
            raise ValueError(f"`vae` must be a video autoencoder, got {vae!r}.")
        config = vae.config
        ratio_t = config.get("scale_factor_temporal", config.get("temporal_compression_ratio"))
        ratio_s = config.get("scale_factor_spatial", config.get("spatial_compression_ratio"))
        if ratio_s is None and "block_out_channels" in config:
            ratio_s = 2 ** (len(config["block_out_channels"]) - 1)
        channels = config.get("z_dim", config.get("latent_channels"))
        if ratio_t is None or ratio_s is None or channels is None:
            raise ValueError(
                "`vae` must be a video autoencoder whose config tells its compression and its latent channels, got an "
                f"`{type(vae).__name__}`."
            )
        in_channels = config["in_channels"] // (config.get("patch_size") or 1) ** 2  # of Wan2.2, those of its patches
        # A CogVideoX decodes latent frames in pairs, and an odd one with the first pair; an even number of them comes
        # out longer than what was encoded.
        num_at_once = getattr(vae, "num_latent_frames_batch_size", 1)
        return cls(in_channels, channels, int(ratio_t), int(ratio_s), int(ratio_t) * num_at_once)

    def num_latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video of `num_frames` frames."""
        return (num_frames - 1) // self.ratio_t + 1

    def num_sample_frames(self, num_latent_frames: int) -> int:
        """Frames that `num_latent_frames` latent frames decode to."""
        return (num_latent_frames - 1) * self.ratio_t + 1


def decode(vae: Any, latents: torch.Tensor, cache: TemporalCache | None = None) -> torch.Tensor:
    """Decode latents that are not normalised; only an autoencoder of this package takes them in pieces, by `cache`."""
    options = {} if cache is None else {"cache": cache}
    return vae.decode(latents, return_dict=False, **options)[0]

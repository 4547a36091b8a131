"""Start a LeanVAE as nearly the best *linear* autoencoder of its training data.

With the depthwise kernels and the last linear layers of the residual blocks at zero, the network is linear: patch
embedding, `phi`, `Q`, patch un-embedding. Set from the principal components of training patches, it reconstructs at
step 0 what the specification's random initialisation needs thousands of steps for.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from ..models.autoencoder_kl_leanvae import (
    AutoencoderKLLeanVAE,
    CompressedSensingBottleneck,
    ISTAIteration,
    LinearBottleneck,
)
from ..models.leanvae_blocks import CausalDepthwiseConv3d, LeanVAEBlock
from ..models.leanvae_patches import split_patches


# Latents start with at most unit variance; this is the log-variance of their noise (a standard deviation of 0.02).
_INITIAL_LOGVAR = -8.0


class _Moments:
    """Running mean and covariance of row vectors in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.outer = 0, torch.zeros(()), torch.zeros(())

    def update(self, rows: torch.Tensor) -> None:
        rows = rows.double()
        self.count += rows.shape[0]
        self.total = self.total + rows.sum(0)
        self.outer = self.outer + rows.t() @ rows

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        return self.outer / self.count - torch.outer(self.mean, self.mean)


def _principal_components(covariance: torch.Tensor, num_components: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first directions `(components, dim)`, orthonormal, and the standard deviation along each."""
    variance, vectors = torch.linalg.eigh(covariance)
    return vectors.flip(1)[:, :num_components].t(), variance.flip(0)[:num_components].clamp(min=0).sqrt()


@torch.no_grad()
def initialize_from_principal_components(vae: AutoencoderKLLeanVAE, videos: Iterable[torch.Tensor]) -> None:
    """Set the weights of `vae` in place so that it starts as a linear autoencoder in the principal components.

    Args:
        vae: A freshly made model (any configuration whose branches are at least `latent_channels` wide).
        videos: Training videos in `[-1, 1]`, `(batch_size, in_channels, num_frames, height, width)`, `num_frames` > 1.
            A few thousand patches suffice; all of them are read once.

    Raises:
        ValueError: If a branch is narrower than the latents, or `videos` is empty.
    """
    geometry, num_latents = vae.encoder.geometry, vae.latent_channels
    separate = vae.encoder.separate
    widths = (vae.config["low_freq_dim"], vae.config["high_freq_dim"]) if separate else (vae.logvar_proj.in_features,)
    if min(widths) < num_latents:
        raise ValueError(f"`vae` must have branches of at least {num_latents} channels, got {min(widths)}.")

    image_moments, video_moments, still_moments = _Moments(), _Moments(), _Moments()
    cross = torch.zeros((), dtype=torch.float64)
    ratio_t = vae.temporal_compression_ratio
    for video in videos:
        # Every frame may be a first frame; those of the groups of four are also paired with their group below.
        image, group = _patches(vae, video[:, :, :1], image=True), _patches(vae, video[:, :, 1:], image=False)
        still = _patches(vae, video[:, :, 1::ratio_t], image=True)
        image_moments.update(torch.cat((image, still)))
        video_moments.update(group)
        still_moments.update(still)
        cross = cross + still.double().t() @ group.double()
    if video_moments.count == 0:
        raise ValueError("`videos` must hold at least one video of more than one frame, got none.")
    image_axes, _ = _principal_components(image_moments.covariance, num_latents)
    video_axes, latent_std = _principal_components(video_moments.covariance, num_latents)
    # Turn the image's latents to those of a resting video (orthogonal Procrustes): the causal convolutions then see
    # one language in all latent frames. A resting video's sub-bands are larger than the image's, hence `image_gain`.
    cross = cross / video_moments.count - torch.outer(still_moments.mean, video_moments.mean)
    left, _, right = torch.linalg.svd(video_axes @ cross.t() @ image_axes.t())
    image_axes = left @ right @ image_axes
    image_gain = video_moments.covariance.trace().sqrt() / image_moments.covariance.trace().sqrt()

    # Features are orthonormal coordinates, so that an error in any of them costs the same; a whitening embedding would
    # make the first ones a hundred times more sensitive to the optimizer's noise (measured: the loss rises).
    for kind, moments, axes, scale, low_dim in (
        ("image", image_moments, image_axes, image_gain, geometry.image_low_dim),
        ("video", video_moments, video_axes, torch.ones(()), geometry.video_low_dim),
    ):
        bounds = (0, low_dim, moments.mean.shape[0]) if separate else (0, moments.mean.shape[0])
        names = ("_low_proj", "_high_proj") if separate else ("_proj",)
        # Each branch carries the latents' share of its bands; `phi` adds the shares up.
        gain = math.sqrt(len(names)) * scale
        for name, start, stop, width in zip(names, bounds[:-1], bounds[1:], widths, strict=True):
            embed, unembed = getattr(vae.encoder, kind + name)[1], getattr(vae.decoder, kind + name)
            mean = moments.mean[start:stop]
            others, _ = _principal_components(moments.covariance[start:stop, start:stop], width - num_latents)
            weight = torch.cat((gain * axes[:, start:stop], scale * others))
            embed.weight[: weight.shape[0]] = weight
            embed.bias[: weight.shape[0]] = -weight @ mean
            nn.init.normal_(unembed.weight, std=unembed.in_features**-0.5)
            unembed.weight[:, :num_latents] = axes[:, start:stop].t() * math.sqrt(len(names)) / scale
            unembed.bias.copy_(mean)

    # Unit variance is the latents' own affair: `phi` scales down (never up, the gradient steps of ISTA must contract).
    latent_scale = (1 / latent_std).clamp(max=1).float()
    phi, initial = torch.zeros(num_latents, sum(widths)), torch.zeros(sum(widths), num_latents)
    for offset in (0, widths[0])[: len(widths)]:
        share = slice(offset, offset + num_latents)
        phi[:, share] = torch.diag(latent_scale) / math.sqrt(len(widths))
        initial[share] = torch.diag(1 / latent_scale) / math.sqrt(len(widths))
    bottleneck = vae.bottleneck
    if isinstance(bottleneck, CompressedSensingBottleneck):
        bottleneck.phi.copy_(phi)
        bottleneck.initial.copy_(initial)
    elif isinstance(bottleneck, LinearBottleneck):
        for layer, weight in ((bottleneck.compress, phi), (bottleneck.expand, initial)):
            layer.weight.copy_(weight)
            nn.init.zeros_(layer.bias)
    nn.init.zeros_(vae.logvar_proj.weight)
    nn.init.constant_(vae.logvar_proj.bias, _INITIAL_LOGVAR)
    for module in vae.modules():
        if isinstance(module, LeanVAEBlock):
            _initialize_block(module)
    for module in bottleneck.modules():
        if isinstance(module, ISTAIteration):  # the proximal step starts as the identity
            last = module.backward_transform[-1]
            assert isinstance(last, LeanVAEBlock)
            nn.init.zeros_(last.ff.down_proj.weight)


def _patches(vae: AutoencoderKLLeanVAE, frames: torch.Tensor, image: bool) -> torch.Tensor:
    """Rows of patch features; `image` treats every frame as a first frame, in the order of the video's tokens."""
    geometry = vae.encoder.geometry
    part = vae.encoder.transform(frames * vae.pixel_factor, image=image)
    patches = split_patches(part, geometry.image_patch if image else geometry.video_patch)
    return patches.reshape(-1, patches.shape[-1])


def _initialize_block(block: LeanVAEBlock) -> None:
    nn.init.normal_(block.ff.up_proj.weight, std=block.ff.up_proj.in_features**-0.5)
    nn.init.zeros_(block.conv.weight)
    if block.residual:
        nn.init.zeros_(block.ff.down_proj.weight)
    else:
        _identity_(block.conv)
        nn.init.normal_(block.ff.down_proj.weight, std=block.ff.down_proj.in_features**-0.5)


def _identity_(conv: CausalDepthwiseConv3d) -> None:
    conv.weight[:, 0, -1, 1, 1] = 1.0  # the present token

"""Terms that make latents easier to model, in addition to the plain objective.

Pure functions of tensors and, where a term needs another pass, of the model. Whatever is random is drawn once per step
from a NumPy generator and shared by all clips, and every term is a mean over clips. So with a generator seeded by seed
and step, a resumed run draws what it would have drawn, and two processes compute what one with twice the batch does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..models.video_autoencoder import VideoAutoencoder
from ..models.wavelets import haar_analysis_2d, haar_analysis_3d


# Share of latent tokens to hide, and how often: the schedule of SSVAE's published 256-pixel configuration.
MASK_RATIOS = (0.0, 0.25, 0.5, 0.75)
MASK_PROBABILITIES = (0.7, 0.1, 0.1, 0.1)


# ---- equivariance ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transform:
    """A transformation of latents and of the video they stand for; [`equivariance_transform`] makes one.

    Applied in the order of the fields: time, size, mirroring, rotation.

    Attributes:
        latent_shape: `(num_latent_frames, latent_height, latent_width)` of what it applies to.
        halve_time: Average latent frames 1, 2, 3, ... in pairs, and video frames 1, 2, 3, ... in pairs.
        size: Latent height and width to scale down to.
        flip: Mirror left to right.
        quarter_turns: Rotation by this many times 90 degrees.
    """

    latent_shape: tuple[int, int, int]
    halve_time: bool
    size: tuple[int, int]
    flip: bool
    quarter_turns: int

    def apply_to_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(batch_size, latent_channels, num_latent_frames, latent_height, latent_width)`, transformed."""
        if tuple(latents.shape[2:]) != self.latent_shape:
            raise ValueError(
                f"`latents` must end in the sizes {self.latent_shape} of this transform, got {tuple(latents.shape)}."
            )
        return self._apply(latents, 1, 1)

    def apply_to_sample(self, sample: torch.Tensor) -> torch.Tensor:
        """Videos `(batch_size, channels, num_frames, height, width)` with latents of `latent_shape`, transformed.

        The compression ratios follow from the two sizes.
        """
        num_latent_frames, latent_height, latent_width = self.latent_shape
        num_frames, height, width = sample.shape[2:]
        ratio_s = height // latent_height
        ratio_t = (num_frames - 1) // (num_latent_frames - 1) if num_latent_frames > 1 else 1
        expected = ((num_latent_frames - 1) * ratio_t + 1, latent_height * ratio_s, latent_width * ratio_s)
        if expected != (num_frames, height, width) or min(ratio_s, ratio_t) < 1:
            raise ValueError(
                f"`sample` must be a whole multiple of the latent sizes {self.latent_shape} with one image frame in "
                f"front, got {tuple(sample.shape)}."
            )
        return self._apply(sample, ratio_t, ratio_s)

    def _apply(self, x: torch.Tensor, ratio_t: int, ratio_s: int) -> torch.Tensor:
        if self.halve_time:
            first, rest = x.tensor_split((1,), dim=2)
            num_pairs = rest.shape[2] // ratio_t // 2 * ratio_t  # an odd last latent frame goes, with its frames
            pairs = rest[:, :, : 2 * num_pairs].unflatten(2, (num_pairs, 2))
            x = torch.cat((first, pairs.mean(dim=3)), dim=2)
        size = (self.size[0] * ratio_s, self.size[1] * ratio_s)
        if size != tuple(x.shape[3:]):
            # The resampler takes images, so frames and channels go together. It lacks some half-precision kernels.
            images = x.flatten(1, 2).float()
            resized = F.interpolate(images, size=size, mode="bilinear", antialias=True)
            x = resized.unflatten(1, x.shape[1:3]).to(x.dtype)
        if self.flip:
            x = x.flip(4)
        return torch.rot90(x, self.quarter_turns, (3, 4)) if self.quarter_turns else x


def equivariance_transform(
    rng: np.random.Generator, latent_shape: Sequence[int], *, temporal: bool = True, min_scale: float = 0.25
) -> Transform:
    """Draw a transformation under which the decoder should be equivariant (EQ-VAE, arXiv 2502.09509).

    EQ-VAE's implicit loss: `decode(transform(latents))` must reconstruct `transform(sample)`, in place of the plain
    pair and with all reconstruction terms, in a share of the steps that the caller draws. This costs no further pass,
    and less than the plain pair, because the transformed one is smaller.

    Space is as in EQ-VAE: scaled by a factor from `[min_scale, 1]`, such that latent sizes stay whole and pixel sizes
    their multiples, and turned by multiples of 90 degrees; mirroring is added. Time is ours: played at twice the
    speed. The frames after the first are averaged in pairs and so are their latent frames: two groups of frames that
    had a latent frame each become one group that has one, and the first frame, an image of its own, remains. There is
    no reversal: the first latent frame is always an image's and the last cannot become one.

    Args:
        rng: Always consumes four draws, so that later draws do not depend on the outcome.
        latent_shape: Shape of the latents, of which the last three sizes count.
        temporal: Halve time in half of the draws, where there are three latent frames or more.
        min_scale: The smallest scale, above 0 and at most 1.
    """
    if not 0.0 < min_scale <= 1.0:
        raise ValueError(f"`min_scale` must be above 0 and at most 1, got {min_scale}.")
    num_latent_frames, height, width = (int(size) for size in latent_shape[-3:])
    scale, flip, turns, halve = rng.uniform(min_scale, 1.0), rng.random(), rng.integers(4), rng.random()
    return Transform(
        latent_shape=(num_latent_frames, height, width),
        halve_time=temporal and num_latent_frames >= 3 and bool(halve < 0.5),
        size=(max(1, round(height * scale)), max(1, round(width * scale))),
        flip=bool(flip < 0.5),
        quarter_turns=int(turns),
    )


# ---- local correlation and masking ----------------------------------------------------------------------------------


def local_correlation(
    latents: torch.Tensor, threshold: float = 0.75, window: tuple[int, int, int] = (2, 2, 2)
) -> torch.Tensor:
    """Lack of correlation between neighbouring latents (SSVAE, arXiv 2512.05394); lower is better, 0 the best.

    Pearson's correlation over the channels, of every two positions that share a window, averaged over windows; the
    first latent frame, an image's, on its own and with the weight of all others together. Clips beyond `threshold` are
    left alone. Threshold, window and weight are those of the authors' configuration, where the term counts 0.02;
    they cut the latents into windows side by side, here windows overlap, so that no position is special and any size
    is legal.

    Args:
        latents: Shape `(batch_size, latent_channels, num_latent_frames, latent_height, latent_width)`, two channels
            or more.
        threshold: The correlation to reach.
        window: Latent frames, rows and columns of a window; smaller where the latents are.
    """
    if latents.ndim != 5 or latents.shape[1] < 2:
        raise ValueError(
            f"`latents` must have shape (batch_size, latent_channels >= 2, num_latent_frames, latent_height, "
            f"latent_width), got {tuple(latents.shape)}."
        )
    latents = latents.float()
    directions = F.normalize(latents - latents.mean(dim=1, keepdim=True), dim=1)
    parts = directions.tensor_split((1,), dim=2)
    correlations = [c for part in parts if (c := _window_correlation(part, window)) is not None]
    if not correlations:  # a single position has no neighbours
        return latents.sum() * 0.0
    return F.relu(threshold - torch.stack(correlations).mean(dim=0)).mean()


def _window_correlation(directions: torch.Tensor, window: tuple[int, int, int]) -> torch.Tensor | None:
    """Mean inner product of the unit vectors in a window, equal pairs left out: one number per clip."""
    window = tuple(min(edge, size) for edge, size in zip(window, directions.shape[2:], strict=True))  # type: ignore
    count = math.prod(window)
    if count < 2:
        return None
    # |mean of n unit vectors|^2 is the mean of all n^2 inner products, n of which are 1.
    means = F.avg_pool3d(directions, window, stride=1)
    return (count * means.square().sum(dim=1).mean(dim=(1, 2, 3)) - 1) / (count - 1)


def draw_mask_ratio(rng: np.random.Generator) -> float:
    """A ratio for [`mask_latents`], 0 in most steps as in SSVAE, so that decoders stay used to whole latents."""
    return float(rng.choice(MASK_RATIOS, p=MASK_PROBABILITIES))


def mask_latents(latents: torch.Tensor, ratio: float, rng: np.random.Generator) -> torch.Tensor:
    """Hide a share of the latent tokens from the decoder (latent masked reconstruction of SSVAE, arXiv 2512.05394).

    What remains must tell of its neighbours, and a few directions of the channels win over many. SSVAE puts a learned
    token in place of hidden ones. Here it is zero, about the mean of the latents, and the model gets no weight that
    it would not use afterwards.

    Args:
        latents: Shape `(batch_size, latent_channels, num_latent_frames, latent_height, latent_width)`.
        ratio: Share of the positions to hide, at least 0 and below 1, rounded to whole positions.
        rng: Draws the positions, the same in every clip of the batch.
    """
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"`ratio` must be at least 0 and below 1, got {ratio}.")
    shape = latents.shape[2:]
    count = math.prod(shape)
    order = torch.from_numpy(rng.permutation(count)).to(latents.device)
    return latents.masked_fill((order < round(count * ratio)).view(shape), 0.0)


# ---- consistency ----------------------------------------------------------------------------------------------------


def latent_consistency(vae: VideoAutoencoder, reconstruction: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Squared distance of the latents of a reconstruction from those of its video, relative to the latter; 0 is best.

    The aim of H3AE's latent consistency loss (arXiv 2504.10567), which encodes the reconstruction again and takes the
    place of LPIPS and of a discriminator. Distance and flow of gradients are ours. The latents of the video are a
    target without a gradient, or the encoder could come closer by telling less. The other side has one, which goes
    through the encoder, whose weights learn from it unless they are frozen, to the decoder. Posterior means are
    compared, also where samples were decoded.

    Args:
        vae: The autoencoder in training.
        reconstruction: Videos that were decoded, shape `(batch_size, 3, num_frames, height, width)`, not clamped.
        mean: Posterior means of the videos that should have been.
    """
    again, target = vae.encode(reconstruction, return_dict=False)[0].mode().float(), mean.detach().float()
    difference, norm = (x.square().sum(dim=(1, 2, 3, 4)) for x in (again - target, target))
    return (difference / norm.clamp_min(1e-6)).mean()


def low_pass_consistency(vae: VideoAutoencoder, sample: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Distance of the latents of a low-passed video from the low-passed latents of the video, 0 (best) to 2.

    LC-VAE (arXiv 2604.16479) finds that what makes latents of many channels hard for diffusion is their disordered
    high frequencies; it takes the Haar transform of the latents, drops the high sub-bands and trains the decoder to
    do without. It changes what a latent is, so its latents are no longer LeanVAE's. This is a loss with the same aim
    for latents that stay: `encode(low(sample))` against `low(latents)`, where `low` is the lowest Haar band of one
    level, at half the size. That is to say, low frequencies of the latents hold the low frequencies of the video and
    nothing else. Both are at half the size, so the further pass of the encoder costs an eighth of the plain one.

    The squared difference of each clip is divided by both squared norms, so that nothing is gained by shrinking the
    latents.

    Args:
        vae: The autoencoder in training.
        sample: Videos in `[-1, 1]`, shape `(batch_size, 3, num_frames, height, width)`.
        latents: Posterior means of `sample`, with a latent height and width of at least 2. Of an odd one the last row
            or column is left out, and what it stands for in the video. With an odd number of latent frames after the
            first, time keeps its length.
    """
    num_later, height, width = latents.shape[2] - 1, *latents.shape[3:]
    if min(height, width) < 2:
        raise ValueError(f"`latents` must have a height and width of at least 2, got {height} and {width}.")
    rows, columns = height // 2 * 2, width // 2 * 2
    sample = sample[..., : sample.shape[3] // height * rows, : sample.shape[4] // width * columns]
    latents = latents[..., :rows, :columns]
    halve_time = num_later % 2 == 0
    low = vae.encode(_lowest_band(sample, halve_time), return_dict=False)[0].mode().float()
    target = _lowest_band(latents, halve_time).float()
    difference, *norms = (x.square().sum(dim=(1, 2, 3, 4)) for x in (low - target, low, target))
    return (difference / (norms[0] + norms[1] + 1e-6)).mean()


def _lowest_band(x: torch.Tensor, halve_time: bool) -> torch.Tensor:
    """The lowest Haar band as block means: the first frame by itself, later ones in pairs if `halve_time`."""
    channels, (first, rest) = x.shape[1], x.tensor_split((1,), dim=2)
    bands = [haar_analysis_2d(first)[:, :channels] / 4]
    if rest.shape[2]:
        bands.append((haar_analysis_3d(rest) / 8 if halve_time else haar_analysis_2d(rest) / 4)[:, :channels])
    return torch.cat(bands, dim=2)

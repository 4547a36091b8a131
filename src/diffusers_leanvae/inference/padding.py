"""Any clip a person has, made legal for the network and cut back exactly afterwards."""

from typing import NamedTuple

import torch

from ..checks import check_positive


class Padding(NamedTuple):
    """The true size of a padded video; what `crop_sample` needs."""

    num_frames: int
    height: int
    width: int


def pad_frames(frames: torch.Tensor, spatial_ratio: int) -> torch.Tensor:
    """Mirror the bottom and right edges until height and width are multiples of `spatial_ratio`.

    Args:
        frames: Any tensor `(..., height, width)`; a side too short for mirroring is continued by its last pixels.
        spatial_ratio: Spatial compression ratio of the autoencoder.
    """
    for dim in (-2, -1):
        size, missing = frames.shape[dim], -frames.shape[dim] % spatial_ratio
        if missing:
            mirrored = [size - 2 - i if size - 2 - i >= 0 else size - 1 for i in range(missing)]
            index = torch.tensor([*range(size), *mirrored], device=frames.device)
            frames = frames.index_select(dim, index)
    return frames


def pad_sample(sample: torch.Tensor, temporal_ratio: int = 4, spatial_ratio: int = 8) -> tuple[torch.Tensor, Padding]:
    """Pad videos to legal sizes: edges mirrored at the bottom and right, the last frame repeated.

    Args:
        sample: `(batch_size, channels, num_frames, height, width)`, any sizes from 1.
        temporal_ratio: `temporal_compression_ratio` of the autoencoder.
        spatial_ratio: `spatial_compression_ratio` of the autoencoder.

    Returns:
        The padded videos, and the `Padding` that [`crop_sample`] undoes.
    """
    check_positive("temporal_ratio", temporal_ratio)
    check_positive("spatial_ratio", spatial_ratio)
    if sample.ndim != 5 or min(sample.shape[2:]) < 1:
        raise ValueError(
            f"`sample` must have shape (batch_size, channels, num_frames, height, width), got {tuple(sample.shape)}."
        )
    padding = Padding(*sample.shape[2:])
    sample = pad_frames(sample, spatial_ratio)
    missing = (1 - padding.num_frames) % temporal_ratio
    if missing:
        sample = torch.cat((sample, sample[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2)
    return sample, padding


def crop_sample(sample: torch.Tensor, padding: Padding) -> torch.Tensor:
    """Cut reconstructed videos back to what they were before [`pad_sample`].

    Args:
        sample: `(batch_size, channels, num_frames, height, width)`; a side that is shorter already, as of a piece of a
            stream, stays as it is.
        padding: What [`pad_sample`] returned with the padded videos.
    """
    if not isinstance(padding, Padding):
        raise ValueError(f"`padding` must be a `Padding`, got {padding!r}.")
    if sample.ndim != 5:
        raise ValueError(
            f"`sample` must have shape (batch_size, channels, num_frames, height, width), got {tuple(sample.shape)}."
        )
    return sample[:, :, : padding.num_frames, : padding.height, : padding.width]

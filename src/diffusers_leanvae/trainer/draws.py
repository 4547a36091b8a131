"""Random draws of a training step: a function of the seed and of the sample's number alone, on any device."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..models.video_autoencoder import VideoAutoencoder


def posterior_noise(vae: VideoAutoencoder, sample: torch.Tensor, indices: Sequence[int], seed: int) -> torch.Tensor:
    """Draw standard normal noise for the posterior of each clip.

    Args:
        vae: The autoencoder.
        sample: The clips, shape `(batch_size, 3, num_frames, height, width)`.
        indices: Numbers of the clips in training.
        seed: Of the run.
    """
    height, width = (edge // vae.spatial_compression_ratio for edge in sample.shape[3:])
    shape = (vae.latent_channels, vae.num_latent_frames(sample.shape[2]), height, width)
    noise = [np.random.default_rng([seed, 3, index]).standard_normal(shape, np.float32) for index in indices]
    return torch.from_numpy(np.stack(noise)).to(sample.device)


def seed_dropout(seed: int, step: int, part: int, rank: int) -> None:
    """Seed the generators of all devices, from which dropout draws, for one accumulation step of one process.

    A resumed run draws what it would have drawn: nothing depends on what was drawn before.
    """
    torch.manual_seed(int(np.random.default_rng([seed, 5, step, part, rank]).integers(2**63)))


class StepDraws(NamedTuple):
    """Draws of a step: `uniform` `(B,)` for the timesteps, `drop` `(B,)` for the labels, `noise`."""

    uniform: torch.Tensor
    drop: torch.Tensor
    noise: torch.Tensor


def draw_step(
    indices: Sequence[int],
    shape: Sequence[int],
    seed: int,
    dropout: float = 0.0,
    batch_size: int | None = None,
    stream: int = 10,
    device: torch.device | str = "cpu",
) -> StepDraws:
    """Draw what is random about samples; each one's numbers follow from the seed and from its index alone.

    Args:
        indices: Numbers of the samples, counted from the beginning of training.
        shape: Shape of one sample's noise.
        seed: Of the run.
        dropout: The share of samples whose label is dropped.
        batch_size: Spread the timesteps of a step evenly: a sample's number comes from the one of `batch_size` equal
            intervals that its place in the step has. `None` for independent numbers.
        stream: Tells draws for different purposes apart.
        device: Where the tensors go.
    """
    draws, noise = np.empty((len(indices), 2)), np.empty((len(indices), *shape), np.float32)
    for place, index in enumerate(indices):
        rng = np.random.default_rng([seed, stream, index])
        draws[place] = rng.random(2)
        rng.standard_normal(dtype=np.float32, out=noise[place])
    uniform = draws[:, 0]
    if batch_size is not None:
        uniform = (np.asarray(indices) % batch_size + uniform) / batch_size
    tensors = (torch.from_numpy(uniform), torch.from_numpy(draws[:, 1] < dropout), torch.from_numpy(noise))
    return StepDraws(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def drop_labels(class_labels: torch.Tensor, drop: torch.Tensor, null_class: int) -> torch.Tensor:
    """Labels `(B,)` or `(B, n)` with those of the samples in `drop` `(B,)` replaced by the null class."""
    return torch.where(drop.view(-1, *[1] * (class_labels.ndim - 1)), null_class, class_labels)


def draw_given_frames(indices: Sequence[int], seed: int, share: float, max_frames: int) -> torch.Tensor:
    """Draw how many latent frames each sample is given, `(B,)`: 0, or for a `share` of them 1 to `max_frames`."""
    numbers = []
    for index in indices:
        rng = np.random.default_rng([seed, 12, index])
        numbers.append(int(rng.integers(1, max_frames + 1)) if rng.random() < share else 0)
    return torch.tensor(numbers)

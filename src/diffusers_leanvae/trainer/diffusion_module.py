"""The module of all losses of latent diffusion, which a training step calls, and what is random in a step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..losses.diffusion import EpsilonObjective, FlowMatchingObjective
from ..losses.representation import RepresentationHead


class DiffusionLosses(NamedTuple):
    r"""`loss` has a gradient; `terms` have none: means over the batch."""

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]


class LatentDiffusionTrainingModule(nn.Module):
    r"""A denoiser with its objective, as one module for Accelerate or DDP to wrap.

    Args:
        transformer: `LeanVAELatteTransformer3DModel`.
        objective: What its answers are compared with.
        representation: The head that aligns hidden tokens with features of another encoder, or `None`.
    """

    def __init__(
        self,
        transformer: Any,
        objective: EpsilonObjective | FlowMatchingObjective,
        representation: RepresentationHead | None = None,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.objective = objective
        self.representation = representation

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        num_images: int = 0,
        features: torch.Tensor | None = None,
    ) -> DiffusionLosses:
        r"""Losses of one batch.

        Args:
            latents: Normalised latents `(B, C, F, h, w)`; the last `num_images` frames are images of their own.
            noise: Standard normal, of the same shape.
            timesteps: `(B,)`, as the objective gives them.
            class_labels: `(B,)` or, with images, `(B, 1 + num_images)`; `num_classes` is the null class.
            num_images: Number of images of each sample.
            features: What the representation head aims at, `(B, F - num_images, rows, columns, dim)`; without it the
                head is not used.
        """
        noisy = self.objective.add_noise(latents, noise, timesteps)
        if features is None or self.representation is None:
            output = self.transformer(noisy, timesteps, class_labels, num_images, return_dict=False)[0]
        else:
            with self.representation.capture(self.transformer) as captured:
                output = self.transformer(noisy, timesteps, class_labels, num_images, return_dict=False)[0]
        terms = {name: term.mean() for name, term in self.objective.loss(output, latents, noise, timesteps).items()}
        loss = terms.pop("loss")
        if features is not None and self.representation is not None:
            terms["representation"] = self.representation(captured[0], features)
            loss = loss + self.representation.weight * terms["representation"]
        return DiffusionLosses(loss, {name: term.detach() for name, term in terms.items()})


class StepDraws(NamedTuple):
    r"""What is random in a step: `uniform` `(B,)` for the timesteps, `drop` `(B,)` for the labels, `noise`."""

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
    r"""Draw what is random about samples; each one's numbers follow from the seed and from its index alone.

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
    r"""Labels `(B,)` or `(B, n)` with those of the samples in `drop` `(B,)` replaced by the null class."""
    return torch.where(drop.view(-1, *[1] * (class_labels.ndim - 1)), null_class, class_labels)

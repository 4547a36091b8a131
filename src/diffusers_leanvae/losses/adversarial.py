"""Adversarial training: patch discriminators of videos (arXiv 1611.07004), their losses, and one training module.

The recipe of LeanVAE is `PatchDiscriminator2d` with the hinge loss and LeCam for the discriminator, and a
non-saturating term for the autoencoder.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from ..checks import check_choice


KINDS = ("hinge", "non_saturating")
NORMS = ("batch", "group", "instance", "none")
MAX_WIDTH_FACTOR = 8


class PatchDiscriminator(nn.Module):
    """Base of the discriminators: convolutions that halve the size, and two more, the last of which gives the logits.

    Args:
        in_channels: Channels of a frame.
        num_layers: Convolutions of stride 2.
        num_filters: Width of the first convolution; doubles with each, to 8 times at most.
        norm: `"batch"`, `"group"` (up to 32 groups), `"instance"` or `"none"`. Statistics of `"batch"` are those of
            one process.
        dropout: Share of the values that are dropped after every normalised convolution while training.
    """

    conv: ClassVar[type[nn.Module]]
    batch_norm: ClassVar[type[nn.Module]]
    kernel_size: ClassVar[int]

    def __init__(
        self,
        in_channels: int = 3,
        num_layers: int = 3,
        num_filters: int = 64,
        norm: str = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, NORMS)
        if num_layers < 1:
            raise ValueError(f"`num_layers` must be at least 1, got {num_layers}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"`dropout` must be in [0, 1), got {dropout}.")
        self.in_channels, self.num_layers = in_channels, num_layers
        widths = [num_filters * min(2**i, MAX_WIDTH_FACTOR) for i in range(num_layers + 1)] + [1]
        layers: list[nn.Module] = []
        for index, width in enumerate(widths):
            is_first, is_last = index == 0, index == num_layers + 1
            has_norm = norm != "none" and not is_first and not is_last
            stride = self.stride_of(index) if index < num_layers else 1
            layers.append(self.conv(in_channels, width, self.kernel_size, stride, padding=1, bias=not has_norm))
            nn.init.normal_(layers[-1].weight, 0.0, 0.02)  # pyright: ignore[reportArgumentType]
            if has_norm:
                # Instance norm is group norm with a channel per group.
                num_groups = width if norm == "instance" else math.gcd(32, width)
                layers.append(self.batch_norm(width) if norm == "batch" else nn.GroupNorm(num_groups, width))
                nn.init.normal_(layers[-1].weight, 1.0, 0.02)  # pyright: ignore[reportArgumentType]
            if not is_last:
                layers.append(nn.LeakyReLU(0.2))
            if has_norm and dropout:
                layers.append(nn.Dropout(dropout))
            in_channels = width
        self.layers = nn.Sequential(*layers)

    @property
    def min_size(self) -> int:
        """The least height and width of a video."""
        return 1

    def stride_of(self, index: int) -> int | tuple[int, ...]:
        """The stride of one of the convolutions that halve the size."""
        return 2


class PatchDiscriminator2d(PatchDiscriminator):
    """PatchGAN on single frames: one logit for each overlapping patch of each frame.

    Each side must be at least `3 * 2**num_layers`. Arguments as of [`PatchDiscriminator`].
    """

    conv, batch_norm, kernel_size = nn.Conv2d, nn.BatchNorm2d, 4

    @property
    def min_size(self) -> int:
        return 3 * 2**self.num_layers

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """Compute logits, high for real frames.

        Args:
            sample: Videos in `[-1, 1]`, shape `(batch_size, in_channels, num_frames, height, width)`.

        Returns:
            Shape `(batch_size * num_frames, 1, patch_rows, patch_columns)`; frames of a video follow each other.
        """
        _check_video(sample, self.in_channels, self.min_size)
        return self.layers(sample.transpose(1, 2).flatten(0, 1))


class PatchDiscriminator3d(PatchDiscriminator):
    """PatchGAN on videos of any length and size, single frames included.

    Kernels are 3x3x3 with padding 1, and the first two convolutions halve the time too: the layout of WF-VAE's
    (arXiv 2411.17459), which has 4 layers and a dropout of 0.3. Arguments as of [`PatchDiscriminator`].
    """

    conv, batch_norm, kernel_size = nn.Conv3d, nn.BatchNorm3d, 3

    def stride_of(self, index: int) -> int | tuple[int, ...]:
        return (2 if index < 2 else 1, 2, 2)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """Compute logits, high for real videos.

        Args:
            sample: Videos in `[-1, 1]`, shape `(batch_size, in_channels, num_frames, height, width)`.

        Returns:
            Shape `(batch_size, 1, patch_frames, patch_rows, patch_columns)`.
        """
        _check_video(sample, self.in_channels, self.min_size)
        return self.layers(sample)


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor, kind: str = "hinge") -> torch.Tensor:
    """Half the sum of the losses on real and on fake logits, each the mean over all patches, in float32.

    Args:
        real_logits: Logits of real videos, any shape.
        fake_logits: Logits of reconstructions, any shape.
        kind: `"hinge"` or `"non_saturating"` (cross-entropy).
    """
    check_choice("kind", kind, KINDS)
    real_logits, fake_logits = _at_least_float32(real_logits), _at_least_float32(fake_logits)
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def generator_loss(fake_logits: torch.Tensor, kind: str = "non_saturating") -> torch.Tensor:
    """The autoencoder's adversarial term, in float32.

    Args:
        fake_logits: Logits of reconstructions, shape `(..., 1, patch_rows, patch_columns)` or
            `(..., 1, patch_frames, patch_rows, patch_columns)`.
        kind: `"non_saturating"`: cross-entropy of the mean logit of each frame; `"hinge"`: minus the mean logit.
    """
    check_choice("kind", kind, KINDS)
    frame_logits = _at_least_float32(fake_logits).mean(dim=(-2, -1))
    return (F.softplus(-frame_logits) if kind == "non_saturating" else -frame_logits).mean()


class LeCam(nn.Module):
    """Regulariser of a discriminator (arXiv 2104.03310): holds real logits near the running mean of the fake ones.

    The running means are buffers, equal on all processes, and start at 0. Only `update` changes them.

    Args:
        decay: Decay of the running means.
    """

    ema_real: torch.Tensor
    ema_fake: torch.Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"`decay` must be in [0, 1), got {decay}.")
        self.decay = decay
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))

    @torch.no_grad()
    def update(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> None:
        """Update the running means with the mean logits of this step over all processes, which must all call.

        A step whose means are not finite is left out, since the running means would never recover.
        """
        means = torch.stack([_at_least_float32(logits).mean() for logits in (real_logits, fake_logits)])
        means = _mean_over_processes(means)
        is_finite = means.isfinite().all()
        for ema, mean in zip((self.ema_real, self.ema_fake), means, strict=True):
            ema.copy_(torch.where(is_finite, ema.lerp(mean.to(ema.dtype), 1.0 - self.decay), ema))

    def forward(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
        """`mean(relu(real - ema_fake)^2) + mean(relu(ema_real - fake)^2)` over all patches, in float32."""
        real_excess = F.relu(_at_least_float32(real_logits) - self.ema_fake)
        fake_excess = F.relu(self.ema_real - _at_least_float32(fake_logits))
        return real_excess.square().mean() + fake_excess.square().mean()


def adaptive_weight(
    reconstruction_loss: torch.Tensor,
    adversarial_loss: torch.Tensor,
    last_layer: torch.Tensor | Sequence[torch.Tensor],
    maximum: float = 1e4,
) -> torch.Tensor:
    """Weight that makes the adversarial gradient as long as that of the reconstruction (VQGAN, arXiv 2012.09841).

    Both gradients are averaged over all processes first, so that all get the weight of the whole batch. The graphs
    are kept for the backward pass that follows.

    Args:
        reconstruction_loss: Scalar.
        adversarial_loss: Scalar, unweighted.
        last_layer: Last parameter(s) of the decoder; one that a loss does not reach counts as a gradient of 0.
        maximum: Upper bound of the result.

    Returns:
        A detached scalar, in `[0, maximum]`.
    """
    parameters = [last_layer] if isinstance(last_layer, torch.Tensor) else list(last_layer)
    norms = []
    for loss in (reconstruction_loss, adversarial_loss):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        flat = torch.cat([_at_least_float32(gradient).flatten() for gradient in gradients])
        norms.append(torch.linalg.vector_norm(_mean_over_processes(flat)))
    return (norms[0] / (norms[1] + 1e-6)).clamp(max=maximum)


class DiscriminatorTrainingModule(nn.Module):
    """A discriminator together with its losses; its `state_dict` holds all that resuming needs.

    Wrap this module for distributed training and step it by `forward`; take `generator_term` from the unwrapped one,
    as it leaves no gradient here that would have to be synchronised.

    Args:
        discriminator: Videos to logits.
        kind: Loss of the discriminator, `"hinge"` or `"non_saturating"`.
        lecam_weight: Weight of the LeCam regulariser.
        lecam_decay: Decay of its running means.
        generator_kind: Loss of the autoencoder, `"hinge"` or `"non_saturating"`.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        kind: str = "hinge",
        lecam_weight: float = 0.005,
        lecam_decay: float = 0.999,
        generator_kind: str = "non_saturating",
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        check_choice("generator_kind", generator_kind, KINDS)
        self.discriminator = discriminator
        self.kind, self.generator_kind = kind, generator_kind
        self.lecam_weight = lecam_weight
        self.lecam = LeCam(lecam_decay)

    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The discriminator's weighted loss and its detached, unweighted terms; no gradient reaches the videos.

        In training mode this updates the running means of LeCam (before they are used), and those of a batch norm
        twice: real and fake videos are normalised apart.

        Args:
            real: Videos in `[-1, 1]`, shape `(batch_size, 3, num_frames, height, width)`.
            fake: Reconstructions, same shape.

        Returns:
            The loss, and the terms `discriminator`, `lecam`, `logits_real`, `logits_fake`; the last two are means.
        """
        real_logits, fake_logits = self.discriminator(real.detach()), self.discriminator(fake.detach())
        if self.training:
            self.lecam.update(real_logits, fake_logits)
        terms = {
            "discriminator": discriminator_loss(real_logits, fake_logits, self.kind),
            "lecam": self.lecam(real_logits, fake_logits),
            "logits_real": _at_least_float32(real_logits).mean(),
            "logits_fake": _at_least_float32(fake_logits).mean(),
        }
        loss = terms["discriminator"] + self.lecam_weight * terms["lecam"]
        return loss, {name: term.detach() for name, term in terms.items()}

    def generator_term(self, fake: torch.Tensor) -> torch.Tensor:
        """The autoencoder's adversarial term, unweighted, with gradients to `fake` alone.

        Nothing of this module changes: its parameters take part as constants, and a batch norm in training mode
        normalises by the statistics of `fake` without adding them to its running ones.

        Args:
            fake: Reconstructions, shape `(batch_size, 3, num_frames, height, width)`.
        """
        constants = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        constants |= {name: buffer.clone() for name, buffer in self.discriminator.named_buffers()}
        return generator_loss(torch.func.functional_call(self.discriminator, constants, (fake,)), self.generator_kind)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    if not dist.is_available() or not dist.is_initialized():
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def _check_video(sample: torch.Tensor, in_channels: int, min_size: int) -> None:
    if sample.ndim != 5 or sample.shape[1] != in_channels or min(sample.shape[3:]) < min_size:
        raise ValueError(
            f"`sample` must be videos (batch_size, {in_channels}, num_frames, height, width) with sides of at least "
            f"{min_size}, got {tuple(sample.shape)}."
        )

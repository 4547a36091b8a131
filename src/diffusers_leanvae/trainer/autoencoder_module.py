"""The one module that a training step calls: an autoencoder together with all its losses.

The terms themselves are in `losses/`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn

from ..checks import check_choice
from ..losses.adversarial import DiscriminatorTrainingModule, adaptive_weight
from ..losses.alignment import AlignmentWeights, alignment_terms
from ..losses.perceptual import ms_ssim, reference_frames
from ..losses.reconstruction import LossWeights, reconstruction_terms
from ..losses.regularizers import (
    draw_mask_ratio,
    equivariance_transform,
    local_correlation,
    low_pass_consistency,
    mask_latents,
)


@dataclass
class Regularization:
    """What makes latents easier to model; each is off by default. Numbers are weights where nothing else is said."""

    equivariance_probability: float = 0.0  # EQ-VAE (2502.09509): share of steps that decode transformed latents
    equivariance_in_time: bool = True  # ours: those steps also play half of the clips at twice the speed
    equivariance_min_scale: float = 0.25  # smallest size of transformed clips, relative to the clip
    local_correlation: float = 0.0  # SSVAE (2512.05394), whose authors weigh it with 0.02
    mask_latents: bool = False  # SSVAE (2512.05394): hide some latents from the decoder in some steps
    low_pass: float = 0.0  # the aim of LC-VAE (2604.16479): low frequencies of latents hold those of the video

    def __post_init__(self) -> None:
        if not 0.0 <= self.equivariance_probability <= 1.0:
            raise ValueError(
                f"`equivariance_probability` must be between 0 and 1, got {self.equivariance_probability}."
            )


class TrainingOutput(NamedTuple):
    """The weighted loss; its detached, unweighted terms; `(real, fake)` videos for each discriminator, detached."""

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    pairs: list[tuple[torch.Tensor, torch.Tensor]]


class VAETrainingModule(nn.Module):
    r"""A video autoencoder together with its losses.

    Wrap this module (not the autoencoder) for distributed training: gradients are synchronised only for what runs
    inside the wrapped `forward`. Other networks come in as callables or as arguments of `forward`, so they are neither
    trained nor saved with this module.

    Args:
        vae: The autoencoder: anything with `analyze`, `encode`, `decode_subbands`, `synthesize`.
        weights: Weights of the terms; terms with weight 0 that cost time are not computed.
        regularization: Switches of the regularisers.
        alignment: Weights of the terms that a call with `teacher_latents` adds.
        lpips: Distance of frames `(num_frames, 3, height, width)`, needed if `weights.lpips` is not 0. It is not
            registered as a part of this module: place it on the device yourself.
        perceptual_frames: `"reference"`: the perceptual terms look at the first frame and one group of four, as the
            reference does; `"all"`: at every frame.
        adversarial_weight: Weight of the adversarial terms.
        is_adaptive: Whether to scale that weight by the ratio of gradients at the decoder's last layers.
    """

    def __init__(
        self,
        vae: nn.Module,
        weights: LossWeights | None = None,
        regularization: Regularization | None = None,
        alignment: AlignmentWeights | None = None,
        lpips: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        perceptual_frames: str = "reference",
        adversarial_weight: float = 0.2,
        is_adaptive: bool = False,
    ) -> None:
        super().__init__()
        self.vae: Any = vae
        self.weights = LossWeights() if weights is None else weights
        self.regularization = Regularization() if regularization is None else regularization
        self.alignment = AlignmentWeights() if alignment is None else alignment
        if self.weights.lpips and lpips is None:
            raise ValueError(f"`lpips` must be given for `weights.lpips` of {self.weights.lpips}, got None.")
        self.lpips = None if lpips is None else lpips.__call__  # a bound method: modules would be registered
        check_choice("perceptual_frames", perceptual_frames, ("reference", "all"))
        self.perceptual_frames = perceptual_frames
        self.adversarial_weight, self.is_adaptive = adversarial_weight, is_adaptive

    def forward(
        self,
        sample: torch.Tensor,
        noise: torch.Tensor | None = None,
        seed: Sequence[int] = (0,),
        teacher_latents: torch.Tensor | None = None,
        discriminators: Sequence[DiscriminatorTrainingModule] = (),
    ) -> TrainingOutput:
        r"""All losses of a batch.

        Args:
            sample: Videos in `[-1, 1]`, shape `(batch_size, 3, num_frames, height, width)`.
            noise: Standard normal noise of the posterior sample, shape of the latents; `None` decodes the means.
            seed: What is drawn for the batch (transformation, mask, frames) follows from these numbers alone: give
                seed and step, the same on all processes.
            teacher_latents: Latents of `sample` by another autoencoder, un-normalised: adds the alignment.
            discriminators: One for the reconstruction and, with `teacher_latents`, a second one for the decoding of
                those; unwrapped, and left as they are. None of them: no adversarial terms.
        """
        vae, weights, regularization = self.vae, self.weights, self.regularization
        posterior = vae.encode(sample).latent_dist
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise

        # What the decoder gets and must answer: the plain pair, or a transformed one, perhaps with latents hidden.
        target, decoder_input = sample, latents
        rng = np.random.default_rng([*seed, 0])
        if rng.random() < regularization.equivariance_probability:
            in_time, min_scale = regularization.equivariance_in_time, regularization.equivariance_min_scale
            transform = equivariance_transform(rng, latents.shape, temporal=in_time, min_scale=min_scale)
            target, decoder_input = transform.apply_to_sample(sample), transform.apply_to_latents(latents)
        if regularization.mask_latents:
            rng = np.random.default_rng([*seed, 1])
            decoder_input = mask_latents(decoder_input, draw_mask_ratio(rng), rng)

        predicted_bands = vae.decode_subbands(decoder_input)
        # Under autocast the network answers in bfloat16; the synthesis is a sum of sub-bands and deserves float32.
        predicted_bands = type(predicted_bands)(*(None if band is None else band.float() for band in predicted_bands))
        reconstruction = vae.synthesize(predicted_bands)
        moments, factor = (posterior.mean, posterior.logvar), vae.config.pixel_factor
        terms = reconstruction_terms(
            target, reconstruction, vae.analyze(target), predicted_bands, *moments, factor
        ) | self._perceptual_terms(target, reconstruction, seed)
        weight_of = asdict(weights)
        pairs = [(target, reconstruction)]

        if regularization.local_correlation:
            terms["local_correlation"] = local_correlation(posterior.mean)
            weight_of["local_correlation"] = regularization.local_correlation
        if regularization.low_pass:
            terms["low_pass"] = low_pass_consistency(vae, sample, posterior.mean)
            weight_of["low_pass"] = regularization.low_pass

        if teacher_latents is not None:
            is_normalised = vae.config["latents_std"] is not None
            aligned: Any = alignment_terms(vae, teacher_latents, posterior.mean, sample, is_normalised)
            pairs.append((sample, aligned.pop("reconstruction")))
            perceptual = self._perceptual_terms(*pairs[1], seed)
            terms |= aligned | {f"align_{name}": term for name, term in perceptual.items()}
            weight_of |= asdict(self.alignment) | {f"align_{name}": weight_of[name] for name in perceptual}

        loss = sum((weight_of[name] * term for name, term in terms.items()), sample.new_zeros(()))
        names = ("adversarial", "align_adversarial")
        adversarial = {
            name: discriminator.generator_term(fake)
            for name, discriminator, (_, fake) in zip(names, discriminators, pairs, strict=False)
        }
        weight = self._adaptive_weight(loss, adversarial) if adversarial and self.is_adaptive else 1.0
        for name, term in adversarial.items():
            loss = loss + self.adversarial_weight * weight * term
            terms[name] = term
        return TrainingOutput(
            loss,
            {name: term.detach() for name, term in terms.items()},
            [(real, fake.detach()) for real, fake in pairs],
        )

    def _perceptual_terms(
        self, sample: torch.Tensor, reconstruction: torch.Tensor, seed: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        if not (self.weights.lpips or self.weights.ms_ssim):
            return {}
        if self.perceptual_frames == "reference":
            index = reference_frames(sample.shape[2], np.random.default_rng([*seed, 2]))
            sample, reconstruction = sample[:, :, index], reconstruction[:, :, index]
        frames = [video.float().transpose(1, 2).flatten(0, 1) for video in (sample, reconstruction)]
        terms = {}
        if self.weights.lpips and self.lpips is not None:
            terms["lpips"] = self.lpips(*frames).mean()
        if self.weights.ms_ssim:
            terms["ms_ssim"] = ms_ssim(*frames)
        return terms

    def _adaptive_weight(self, loss: torch.Tensor, adversarial: dict[str, torch.Tensor]) -> torch.Tensor | float:
        if not torch.is_grad_enabled():
            return 1.0
        last_layers = [
            parameter
            for name, parameter in self.vae.decoder.named_parameters()
            if name.split(".")[0].endswith("_proj") and parameter.requires_grad
        ]
        if not last_layers:
            raise ValueError("`is_adaptive` must be false where the decoder's last layers are frozen, got true.")
        return adaptive_weight(loss, torch.stack(list(adversarial.values())).sum(), last_layers)

"""What each family of autoencoders is trained for: the weights of its terms, and the terms.

`training/train_vae.py` asks the objective of the model, [`objective_of`], for all that differs between the families.
Perceptual, adversarial and regularising terms, which do not, are put together there.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from ..models.autoencoder_kl_ivvae import AutoencoderKLIVVAE
from ..models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from ..models.autoencoder_kl_wfvae import AutoencoderKLWFVAE
from ..models.video_autoencoder import VideoAutoencoder
from .reconstruction import charbonnier, kl_divergence, log_mse, reconstruction_terms, summed_l1, wavelet_l1


class Decoded(NamedTuple):
    """Videos in `[-1, 1]`, not clamped, and the sub-bands that the decoder predicts beside them, if it does."""

    reconstruction: torch.Tensor
    subbands: Any


class Posterior(NamedTuple):
    """Moments of the latents, `(batch_size, latent_channels, num_latent_frames, ...)`; log-variances are clamped."""

    mean: torch.Tensor
    logvar: torch.Tensor


class Objective(ABC):
    """Base of the objectives: a dataclass whose fields are the weights of its terms, under the names of these.

    Attributes:
        lpips: Weight of the distance of frames that [`LPIPS`] measures.
        ms_ssim: Weight of one minus the multi-scale similarity.
        latent_consistency: Weight of the distance of the reconstruction's latents from those of the video.
        max_adaptive_weight: Upper bound of the ratio of gradients by which adversarial terms may be scaled.
    """

    lpips: float
    ms_ssim: float
    latent_consistency: float
    max_adaptive_weight: ClassVar[float] = 1e4

    def decode(self, vae: Any, latents: torch.Tensor) -> Decoded:
        """Decode latents to all that [`terms`] compare."""
        return Decoded(vae.decode(latents, return_dict=False)[0], None)

    @abstractmethod
    def terms(self, vae: Any, target: torch.Tensor, decoded: Decoded, posterior: Posterior) -> dict[str, torch.Tensor]:
        """Compute the unweighted terms but the perceptual ones and the consistency, as scalars.

        Args:
            vae: The autoencoder.
            target: Videos in `[-1, 1]`, `(batch_size, 3, num_frames, height, width)`, that should be decoded.
            decoded: What was, as of [`decode`].
            posterior: Of the videos that were encoded.
        """

    def weights(self) -> dict[str, float]:
        """The weight of every term, by its name."""
        return asdict(self)  # type: ignore[call-overload]

    def perceptual_factor(self, target: torch.Tensor) -> float:
        """What means over frames are multiplied by, so that they are in the unit of the other terms."""
        return 1.0

    def is_last_layer(self, name: str) -> bool:
        """Tell whether a parameter of the decoder is one by whose gradients adversarial terms are scaled."""
        return name in ("conv_out.weight", "conv_out.conv_2d.weight", "conv_out.conv_3d.weight")


@dataclass
class LeanVAEObjective(Objective):
    """Objective of LeanVAE; the weights are those of the reference (its wavelet terms are `4 * 0.05` and `4 * 0.1`).

    Pixels and sub-bands are compared in the model's own pixel range.
    """

    l1_pixel: float = 4.0
    l1_low: float = 0.2
    l1_high: float = 0.4
    kl: float = 1e-7
    lpips: float = 0.0  # 4 in the reference; needs the weights of VGG16
    ms_ssim: float = 0.0  # a perceptual term that needs no weights
    log_mse: float = 0.0  # ours: PSNR itself, up to a factor; relative errors of easy and of hard clips weigh the same
    charbonnier: float = 0.0  # ours: L1 that is smooth near 0
    latent_consistency: float = 0.0  # H3AE (2504.10567): latents of the reconstruction, encoded again

    def decode(self, vae: Any, latents: torch.Tensor) -> Decoded:
        bands = vae.decode_subbands(latents)
        # Under autocast the network computes in bfloat16; the synthesis is a sum of sub-bands and deserves float32.
        bands = type(bands)(*(None if band is None else band.float() for band in bands))
        return Decoded(vae.synthesize(bands), bands)

    def terms(self, vae: Any, target: torch.Tensor, decoded: Decoded, posterior: Posterior) -> dict[str, torch.Tensor]:
        factor = vae.config["pixel_factor"]
        terms = reconstruction_terms(
            target, decoded.reconstruction, vae.analyze(target), decoded.subbands, *posterior, factor
        )
        if self.charbonnier:
            terms["charbonnier"] = charbonnier(target, decoded.reconstruction, factor)
        return terms

    def is_last_layer(self, name: str) -> bool:
        return name.split(".")[0].endswith("_proj")


@dataclass
class WFVAEObjective(Objective):
    """Objective of WF-VAE; the weights are those of the reference, whose terms are sums and not means.

    `l1` is the sum over a frame, averaged over the frames; perceptual terms are averaged over frames, too, and count
    for every value of a frame. Both are divided by the exponential of `logvar`, to which they are a likelihood.
    """

    l1: float = 1.0
    lpips: float = 0.0  # 1 in the first two stages of the reference, 0.1 in the third; needs the weights of VGG16
    ms_ssim: float = 0.0  # ours: a perceptual term that needs no weights
    kl: float = 1e-6
    wavelet: float = 0.1  # of the sub-bands in the energy flow: summed over everything but the batch
    latent_consistency: float = 0.0  # ours: as of LeanVAE
    logvar: float = 0.0  # no weight: log-variance of the pixels, which the reference keeps at 0

    max_adaptive_weight: ClassVar[float] = 1e6

    def decode(self, vae: Any, latents: torch.Tensor) -> Decoded:
        reconstruction, *subbands = vae.decode_subbands(latents)
        return Decoded(reconstruction, tuple(subbands))

    def terms(self, vae: Any, target: torch.Tensor, decoded: Decoded, posterior: Posterior) -> dict[str, torch.Tensor]:
        terms = {"l1": summed_l1(target, decoded.reconstruction), "kl": kl_divergence(*posterior)}
        if decoded.subbands:  # there are none without an energy flow
            terms["wavelet"] = wavelet_l1(vae.analyze(target), decoded.subbands)
        if self.logvar:  # what is left of the likelihood: the logarithm of its scale, for every value of a frame
            terms["logvar"] = terms["l1"].new_tensor(self.logvar * self.perceptual_factor(target))
        return terms

    def weights(self) -> dict[str, float]:
        precision = math.exp(-self.logvar)
        weights = asdict(self) | {name: precision * getattr(self, name) for name in ("l1", "lpips", "ms_ssim")}
        return weights | {"logvar": 1.0}

    def perceptual_factor(self, target: torch.Tensor) -> float:
        return float(target[0, :, 0].numel())


@dataclass
class IVVAEObjective(Objective):
    """Objective of IV-VAE: L1, LPIPS and KL, as its paper names them. It tells no weights: the defaults are ours.

    Terms are means, as those of LeanVAE; KL is the sum over each posterior.
    """

    l1_pixel: float = 1.0
    kl: float = 1e-7
    lpips: float = 0.0  # 1 in our recipes; needs the weights of VGG16
    ms_ssim: float = 0.0  # ours: a perceptual term that needs no weights
    log_mse: float = 0.0  # ours: as of LeanVAE
    charbonnier: float = 0.0  # ours: as of LeanVAE
    latent_consistency: float = 0.0  # ours: as of LeanVAE

    def terms(self, vae: Any, target: torch.Tensor, decoded: Decoded, posterior: Posterior) -> dict[str, torch.Tensor]:
        terms = {
            "l1_pixel": F.l1_loss(decoded.reconstruction.float(), target.float()),
            "kl": kl_divergence(*posterior),
            "log_mse": log_mse(target, decoded.reconstruction, 1.0),
        }
        if self.charbonnier:
            terms["charbonnier"] = charbonnier(target, decoded.reconstruction, 1.0)
        return terms


OBJECTIVES: dict[type[VideoAutoencoder], type[Objective]] = {
    AutoencoderKLLeanVAE: LeanVAEObjective,
    AutoencoderKLWFVAE: WFVAEObjective,
    AutoencoderKLIVVAE: IVVAEObjective,
}


def objective_of(vae_class: type[VideoAutoencoder]) -> type[Objective]:
    """Return the class of the objective that models of a class are trained for."""
    for model_class, objective in OBJECTIVES.items():
        if issubclass(vae_class, model_class):
            return objective
    names = ", ".join(model_class.__name__ for model_class in OBJECTIVES)
    raise ValueError(f"`vae` must be one of {names}, got an {vae_class.__name__}.")

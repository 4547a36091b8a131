"""Another video autoencoder as teacher, so that a LeanVAE can stand in for it inside its pipeline."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoModel

from ..models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from .reconstruction import band_l1


class Teacher:
    """A frozen autoencoder of diffusers whose latents a student learns to make and to decode.

    Deliberately no `nn.Module`: as an attribute of one it is neither trained, nor saved, nor synchronised.

    Args:
        vae: Any video autoencoder with `encode(...).latent_dist`, `AutoencoderKLWan` first. It is set to evaluation
            mode and frozen.

    Attributes:
        latent_channels: Channels of its latents.
        compression_ratios: Pixels per latent in time, height and width; `None` where the model does not tell.
        latents_mean: Mean of each latent channel from its config, for the student to take over, or `None`.
        latents_std: Standard deviation of each latent channel, in the same way.
        scaling_factor: Factor on its latents, which has no statistics then, for the student to take over, or 1.0.
    """

    def __init__(self, vae: Any) -> None:
        config = vae.config
        self.vae = vae.requires_grad_(False).eval()
        self.latent_channels: int = config.z_dim if "z_dim" in config else config.latent_channels
        temporal = _declared(vae, "temporal_compression_ratio", "scale_factor_temporal")
        spatial = _declared(vae, "spatial_compression_ratio", "scale_factor_spatial")
        self.compression_ratios = (temporal, spatial, spatial)
        self.latents_mean = _statistics(config, "latents_mean", self.latent_channels)
        self.latents_std = _statistics(config, "latents_std", self.latent_channels)
        self.scaling_factor: float = config.get("scaling_factor") or 1.0

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | Path, subfolder: str | None = None, dtype: torch.dtype = torch.float32
    ) -> "Teacher":
        """Load the teacher, of any class of diffusers, from a folder or from the Hub.

        Args:
            path_or_repo: Folder or Hub repository of the autoencoder or of its pipeline.
            subfolder: Where the autoencoder is in there: `"vae"` in that of a pipeline.
            dtype: Dtype that it encodes in.
        """
        return cls(AutoModel.from_pretrained(str(path_or_repo), subfolder=subfolder, torch_dtype=dtype))

    def check_student(self, student: AutoencoderKLLeanVAE) -> None:
        """Raise a `ValueError` unless `student`, a LeanVAE, has latents of the teacher's shape for every video."""
        spatial = student.spatial_compression_ratio
        ratios = (student.temporal_compression_ratio, spatial, spatial)
        same = all(mine in (None, its) for mine, its in zip(self.compression_ratios, ratios, strict=True))
        if self.latent_channels != student.latent_channels or not same:
            wanted, got = ("x".join(map(str, r)) for r in (self.compression_ratios, ratios))
            raise ValueError(
                f"`student` must have the teacher's latents, {self.latent_channels} channels at a compression of "
                f"{wanted} (`latent_channels`, and `patch_size` half of the compression), got "
                f"{student.latent_channels} channels at {got}."
            )

    def to(self, device: torch.device | str) -> "Teacher":
        """Move the teacher to a device."""
        self.vae.to(device)
        return self

    @torch.no_grad()
    def encode(self, sample: torch.Tensor) -> torch.Tensor:
        """Encode videos to posterior means, not normalised.

        Args:
            sample: Videos in `[-1, 1]`, shape `(batch_size, 3, num_frames, height, width)`, in sizes of the teacher's.

        Returns:
            Latents `(batch_size, latent_channels, num_latent_frames, latent_height, latent_width)` in the dtype of
            `sample`. Autocast does not reach the teacher: its latents are those of its own dtype.
        """
        with torch.autocast(sample.device.type, enabled=False):
            return self.vae.encode(sample.to(self.vae.dtype)).latent_dist.mode().to(sample.dtype)


@dataclass
class AlignmentWeights:
    """Weights of the reference's Wan-aligned models (`4`, `4 * 0.5`, `4 * 0.05`, `4 * 0.1`); names of the terms."""

    align_pixel: float = 4.0
    align_latents: float = 2.0
    align_low: float = 0.2
    align_high: float = 0.4


class Alignment(NamedTuple):
    """Terms, and what they were computed from.

    Attributes:
        terms: `align_pixel`, `align_latents`, `align_low` and `align_high`, unweighted float32 scalars.
        reconstruction: The student's decoding of the teacher's latents with shape and range of the videos, not
            clamped, for perceptual and adversarial terms.
    """

    terms: dict[str, torch.Tensor]
    reconstruction: torch.Tensor


def alignment_terms(
    student: AutoencoderKLLeanVAE,
    teacher_latents: torch.Tensor,
    student_latents: torch.Tensor,
    sample: torch.Tensor,
    normalise: bool,
) -> Alignment:
    """Terms that draw a model's latents to those of another: its decoder takes them, its encoder makes them.

    The terms of the reference's Wan-aligned models. The model's own reconstruction keeps its own terms.

    Args:
        student: The LeanVAE in training.
        teacher_latents: Posterior means of `sample`, not normalised, by [`Teacher.encode`].
        student_latents: Those of the student, same shape.
        sample: Videos in `[-1, 1]`, shape `(batch_size, 3, num_frames, height, width)`.
        normalise: Compare latents as `(latents - latents_mean) / latents_std` by the student's config, which has taken
            both over from the teacher, so that all channels count equally. The reference does.
    """
    if teacher_latents.shape != student_latents.shape:
        raise ValueError(
            f"`teacher_latents` must have the shape {tuple(student_latents.shape)} of the student's, got "
            f"{tuple(teacher_latents.shape)}."
        )
    predicted_bands = student.decode_subbands(teacher_latents)
    predicted_bands = type(predicted_bands)(*(None if band is None else band.float() for band in predicted_bands))
    reconstruction = student.synthesize(predicted_bands)
    low, high = band_l1(student.analyze(sample), predicted_bands)
    difference = student_latents.float() - teacher_latents.float()
    if normalise:
        std = student.config["latents_std"]
        if std is None:
            raise ValueError("`normalise` must be false for a student without `latents_std` in its config, got true.")
        difference = difference / torch.tensor(std, device=difference.device).view(1, -1, 1, 1, 1)
    terms = {
        "align_pixel": F.l1_loss(reconstruction, sample.float()) * student.config["pixel_factor"],
        "align_latents": difference.abs().mean(),
        "align_low": low,
        "align_high": high,
    }
    return Alignment(terms, reconstruction)


def _declared(vae: Any, attribute: str, config_key: str) -> int | None:
    """A compression ratio: models of diffusers tell it as an attribute, in their config, or under Wan's name."""
    value = vae.__dict__.get(attribute, vae.config.get(attribute, vae.config.get(config_key)))
    return None if value is None else int(value)


def _statistics(config: Any, name: str, latent_channels: int) -> list[float] | None:
    values = config.get(name)
    if values is not None and len(values) != latent_channels:
        raise ValueError(f"`{name}` in the teacher's config must have {latent_channels} entries, got {len(values)}.")
    return None if values is None else [float(value) for value in values]

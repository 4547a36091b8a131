"""What is judged: something that takes a clip, stores it in a number of bits, and gives it back."""

import inspect
from typing import Any, NamedTuple, Protocol

import torch

from ..clock import timed
from ..data.text_cache import checksum_of_weights
from ..video_io.pixels import sample_to_unit
from .autoencoders import decode, encode, is_image_autoencoder, legal_sample
from .records import Metric


# How many bits are stored; what that costs in quality is for the other metrics to say.
BITS_PER_PIXEL = "bits_per_pixel"
RATE = Metric(
    "rate",
    "Bits stored for each pixel of each frame: an autoencoder's latents at 8 bits a number, a codec's packets.",
    "bit/px",
    better=None,
)
LATENT_BITS = 8
_NUM_IMAGES = 8  # that an image autoencoder takes at once


class Reconstruction(NamedTuple):
    """A clip and what came back of it.

    Attributes:
        original: What was stored, `(num_frames, 3, height, width)` in `[0, 1]`, in the precision of the model.
        pixels: What came back, same shape and range.
        num_bits: What the clip takes when stored.
        encode_seconds: Time to encode.
        decode_seconds: Time to decode.
        latents: `(latent_channels, num_latent_frames, latent_height, latent_width)`; `None` of a codec.
    """

    original: torch.Tensor
    pixels: torch.Tensor
    num_bits: int
    encode_seconds: float
    decode_seconds: float
    latents: torch.Tensor | None

    @property
    def bits_per_pixel(self) -> float:
        """Bits for each pixel of each frame."""
        num_frames, _, height, width = self.original.shape
        return self.num_bits / (num_frames * height * width)


class Reconstructor(Protocol):
    """An autoencoder or a codec, ready to be judged.

    Attributes:
        name: What tables call it.
        about: More of it, for a record: see [`records.Evaluation`].
    """

    name: str
    about: dict[str, Any]

    def checksum(self) -> str:
        """Return what differs when the weights do; empty without weights."""
        ...

    def reconstruct(self, clip: torch.Tensor) -> Reconstruction:
        """Store a clip `(3, num_frames, height, width)` in `[-1, 1]`, and take it back.

        Raises:
            ValueError: If it is of a size that cannot be stored.
        """
        ...


class AutoencoderReconstructor:
    """Any autoencoder of diffusers: posterior means, latents at 8 bits a number; of images frame by frame.

    The latents are decoded as they are: 8 bits count the rate, and are not applied.

    Args:
        vae: The autoencoder, on its device, in its dtype, in evaluation mode.
        name: What tables call it.
        about: What is known of it, as of [`autoencoders.OpenedAutoencoder`].
    """

    def __init__(self, vae: Any, name: str, about: dict[str, Any] | None = None) -> None:
        self.vae, self.name = vae, name
        self.about = (about or {}) | {"dtype": str(vae.dtype).removeprefix("torch.")}
        self._is_image = is_image_autoencoder(vae)
        # Stable Video Diffusion's encoder sees single frames, its decoder all of them.
        self._counts_frames = "num_frames" in inspect.signature(vae.decode).parameters

    def checksum(self) -> str:
        """Return a checksum of the weights, whatever they were loaded from."""
        return checksum_of_weights(self.vae)

    @torch.no_grad()
    def reconstruct(self, clip: torch.Tensor) -> Reconstruction:
        """Encode and decode; see [`Reconstructor.reconstruct`]."""
        vae, sample = self.vae, clip.to(self.vae.device, self.vae.dtype)
        latents, encode_seconds = timed(lambda: self._encode(sample), vae.device)
        decoded, decode_seconds = timed(lambda: self._decode(latents), vae.device)
        if decoded.shape != sample.shape:
            raise ValueError(
                f"`clip` must have a size that {self.name} gives back, got {tuple(sample.shape[1:])}, from which came "
                f"{tuple(decoded.shape[1:])}."
            )
        original, pixels = (sample_to_unit(x.transpose(0, 1)) for x in (sample, decoded))
        return Reconstruction(original, pixels, LATENT_BITS * latents.numel(), encode_seconds, decode_seconds, latents)

    def _encode(self, sample: torch.Tensor) -> torch.Tensor:
        if not self._is_image:
            return encode(self.vae, legal_sample(self.vae, sample[None]))[0]
        parts = sample.transpose(0, 1).split(_NUM_IMAGES)
        return torch.cat([encode(self.vae, part) for part in parts]).transpose(0, 1)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        if not self._is_image:
            return decode(self.vae, latents[None])[0]
        frames = latents.transpose(0, 1)
        if self._counts_frames:
            return self.vae.decode(frames, num_frames=len(frames)).sample.transpose(0, 1)
        return torch.cat([decode(self.vae, part) for part in frames.split(_NUM_IMAGES)]).transpose(0, 1)

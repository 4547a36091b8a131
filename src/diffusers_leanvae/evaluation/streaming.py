"""Reconstruction in pieces, in memory that does not grow with the length of a clip."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..clock import timed
from ..models.temporal_cache import TemporalCache
from ..models.video_autoencoder import VideoAutoencoder
from ..video_io.pixels import sample_to_unit
from .reconstructors import LATENT_BITS, AutoencoderReconstructor, Reconstruction


class StreamingReconstructor(AutoencoderReconstructor):
    """An autoencoder of this package that gets a clip in pieces; the result is that of the whole clip.

    Args:
        vae: The autoencoder, on its device, in its dtype, in evaluation mode.
        name: What tables call it.
        about: What is known of it.
        chunk: Frames of the first piece, `temporal_compression_ratio * n + 1` with `n >= 1`; later ones have one less.

    Raises:
        ValueError: If `chunk` is not legal, or the model takes no pieces.
    """

    def __init__(self, vae: VideoAutoencoder, name: str, about: dict[str, Any] | None, chunk: int) -> None:
        if not isinstance(vae, VideoAutoencoder) or not vae.can_stream:
            raise ValueError(f"`chunk` must be None for {name}, which takes no pieces, got {chunk}.")
        ratio = vae.temporal_compression_ratio
        if chunk <= ratio or chunk % ratio != 1:
            raise ValueError(f"`chunk` must be {ratio} * n + 1 with n >= 1, got {chunk}.")
        super().__init__(vae, name, (about or {}) | {"chunk": chunk})
        self.chunk, self.ratio = chunk, ratio

    @torch.no_grad()
    def stream(self, pieces: Iterable[torch.Tensor]) -> Iterator[Reconstruction]:
        """Reconstruct the pieces of a clip, each `(3, num_frames, height, width)` in `[-1, 1]`, as they come.

        Of a decoder that looks ahead, frames come with a later piece than they were given with.
        """
        encoder, decoder = TemporalCache(), TemporalCache()
        waiting = torch.empty(0)
        for piece, is_last in _mark_last(pieces):
            sample = piece[None].to(self.vae.device, self.vae.dtype)
            encoder.is_last = decoder.is_last = is_last
            latents, encode_seconds = timed(lambda x=sample: self._encode_piece(x, encoder), self.vae.device)
            decoded, decode_seconds = timed(lambda z=latents: self._decode_piece(z, decoder), self.vae.device)
            frames = sample_to_unit(sample[0].transpose(0, 1))
            waiting = torch.cat((waiting, frames)) if len(waiting) else frames
            pixels = sample_to_unit(decoded[0].transpose(0, 1))
            num_bits = LATENT_BITS * latents.numel()
            original, waiting = waiting[: len(pixels)], waiting[len(pixels) :]
            yield Reconstruction(original, pixels, num_bits, encode_seconds, decode_seconds, latents[0])

    def _encode_piece(self, x: torch.Tensor, cache: TemporalCache) -> torch.Tensor:
        return self.vae.encode(x, return_dict=False, cache=cache)[0].mode()

    def _decode_piece(self, z: torch.Tensor, cache: TemporalCache) -> torch.Tensor:
        return self.vae.decode(z, return_dict=False, cache=cache)[0]


def _mark_last(items: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, bool]]:
    before: list[torch.Tensor] = []
    for item in items:
        for waiting in before:
            yield waiting, False
        before = [item]
    for waiting in before:
        yield waiting, True

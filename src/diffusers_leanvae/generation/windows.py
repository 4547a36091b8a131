"""A video longer than the transformer: the windows it is sampled in, and its frames while it is sampled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..models.temporal_cache import TemporalCache
from ..models.video_autoencoder import VideoAutoencoder


class Window(NamedTuple):
    """Latent frames `start` to `stop` that are sampled at once; the first `num_known` are given."""

    start: int
    stop: int
    num_known: int


@dataclass
class Frames:
    """Size of the videos in pixels, and the windows in which a video longer than the transformer is sampled."""

    num_frames: int
    height: int
    width: int
    windows: list[Window]
    reencode_overlap: bool


def plan_windows(num_latent_frames: int, window: int, num_overlap: int) -> list[Window]:
    """Cover a video by windows of `window` latent frames that overlap by at least `num_overlap`.

    All are equally long, because a transformer may know one length only; the last one overlaps more where that is
    needed.
    """
    windows = [Window(0, min(window, num_latent_frames), 0)]
    while windows[-1].stop < num_latent_frames:
        stop = min(windows[-1].stop + window - num_overlap, num_latent_frames)
        windows.append(Window(stop - window, stop, windows[-1].stop - (stop - window)))
    return windows


class FrameDecoder:
    """Decodes latents window by window while more are sampled, or all at once where nobody waits for frames.

    Args:
        vae: The autoencoder. One that does not compute chunks exactly decodes whole videos only.
        decode: Decodes normalised latents, as a chunk if it gets a cache.
        num_latent_frames: Latent frames of the whole video.
        num_kept: How many of the last frames must be kept, all by default.
        on_frames: Takes the number of the first frame, and frames `(batch_size, channels, n, height, width)` as soon
            as they are decoded, which is then done latent frame by latent frame.
    """

    def __init__(
        self,
        vae: Any,
        decode: Callable[[torch.Tensor, TemporalCache | None], torch.Tensor],
        num_latent_frames: int,
        num_kept: int | None = None,
        on_frames: Callable[[int, torch.Tensor], None] | None = None,
    ):
        self.decode = decode
        self.num_latent_frames = num_latent_frames
        self.num_kept = num_kept
        self.on_frames = on_frames
        self.can_stream = isinstance(vae, VideoAutoencoder) and vae.can_stream
        self._cache = TemporalCache()
        self._num_taken = self._num_decoded = 0
        self._pieces: list[torch.Tensor] = []

    def push(self, latents: torch.Tensor) -> None:
        """Decode the next latents, after which [`last`] knows their frames."""
        parts = [latents] if self.on_frames is None else latents.split(1, dim=2)
        for part in parts:
            self._num_taken += part.shape[2]
            self._cache.is_last = self._num_taken == self.num_latent_frames
            self._take(self.decode(part, self._cache))

    def decode_all(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the frames of all latents, those pushed or, if there were none, the given ones."""
        if self._num_taken == 0:
            self._take(self.decode(latents, None))
        return torch.cat(self._pieces, dim=2)

    def last(self, num_frames: int) -> torch.Tensor:
        """Return the last frames of the latents pushed."""
        num_pieces, num_found = 0, 0
        while num_found < num_frames:
            num_pieces += 1
            num_found += self._pieces[-num_pieces].shape[2]
        return torch.cat(self._pieces[-num_pieces:], dim=2)[:, :, -num_frames:]

    def _take(self, piece: torch.Tensor) -> None:
        if self.on_frames is not None and piece.shape[2] > 0:
            self.on_frames(self._num_decoded, piece)
        self._num_decoded += piece.shape[2]
        self._pieces.append(piece)
        while self.num_kept is not None and sum(p.shape[2] for p in self._pieces[1:]) >= max(self.num_kept, 1):
            del self._pieces[0]

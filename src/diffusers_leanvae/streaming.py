"""Videos of any length through a LeanVAE in constant memory: push what you have, get what is ready.

The state is the object's own, so any number of streams may interleave on one model. Chunked results equal those of the
whole video up to float rounding (`tests/test_streaming.py`: 1e-10 in float64).
"""

from pathlib import Path
from typing import Any

import torch

from .models.temporal_cache import TemporalCache


class _Stream:
    r"""Collects pieces along time until a step is full; the first step takes one more, the image."""

    def __init__(self, vae: Any, step: int, cache_directory: str | Path | None):
        self.vae = vae
        self.step = step
        self.cache = TemporalCache(cache_directory)
        self.reset()

    def reset(self) -> None:
        r"""Forget the stream; the next piece pushed is the first of a new one."""
        self.cache.reset()
        self.pending: list[torch.Tensor] = []
        self.num_pushed = 0

    def push(self, piece: torch.Tensor) -> torch.Tensor | None:
        if piece.ndim != 5:
            raise ValueError(
                f"The pushed tensor must have 5 dimensions (B, C, T, H, W), got shape {tuple(piece.shape)}."
            )
        if self.pending and _frame_shape(piece) != _frame_shape(self.pending[0]):
            raise ValueError(
                f"The pushed tensor must keep the stream's (B, C, H, W) {_frame_shape(self.pending[0])}, got "
                f"{_frame_shape(piece)}."
            )
        if piece.shape[2]:
            self.pending.append(piece)
            self.num_pushed += piece.shape[2]
        outputs = []
        while self._num_pending >= (size := self.step + (self.cache.num_latent_frames == 0)):
            joined = self._take_pending()
            outputs.append(self._run(joined[:, :, :size]))
            if joined.shape[2] > size:
                self.pending = [joined[:, :, size:]]
        return torch.cat(outputs, dim=2) if outputs else None

    def flush(self) -> torch.Tensor | None:
        output = self._run(self._take_pending()) if self.pending else None
        self.reset()
        return output

    @property
    def _num_pending(self) -> int:
        return sum(piece.shape[2] for piece in self.pending)

    def _take_pending(self) -> torch.Tensor:
        pieces, self.pending = self.pending, []
        return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]

    def _run(self, chunk: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def state_dict(self) -> dict[str, torch.Tensor]:
        r"""Everything needed to continue the stream later, as tensors (safetensors can store it)."""
        state = {f"cache/{key}": tensor for key, tensor in self.cache.state_dict().items()}
        state["num_pushed"] = torch.tensor(self.num_pushed)
        if self.pending:
            state["pending"] = torch.cat(self.pending, dim=2)
        return state

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        r"""Restore what `state_dict` gave."""
        self.reset()
        self.cache.load_state_dict(
            {key.removeprefix("cache/"): value for key, value in state_dict.items() if key.startswith("cache/")}
        )
        self.num_pushed = int(state_dict["num_pushed"])
        self.pending = [state_dict["pending"]] if "pending" in state_dict else []


class StreamingEncoder(_Stream):
    r"""Encode a video piece by piece.

    Args:
        vae: The autoencoder; its tiling settings apply.
        num_frames_per_step: Frames to collect before the network runs, a multiple of the temporal ratio; larger steps
            are faster and take more memory.
        sample_posterior: Whether to sample the posterior instead of taking its mean.
        generator: Random generator of the posterior sample.
        cache_directory: Keep the state of tiles on disk between steps (see `TemporalCache`); needs tiling.
    """

    def __init__(
        self,
        vae: Any,
        num_frames_per_step: int = 16,
        sample_posterior: bool = False,
        generator: torch.Generator | None = None,
        cache_directory: str | Path | None = None,
    ):
        ratio = vae.temporal_compression_ratio
        if num_frames_per_step < ratio or num_frames_per_step % ratio:
            raise ValueError(
                f"`num_frames_per_step` must be a positive multiple of {ratio}, got {num_frames_per_step}."
            )
        self.sample_posterior = sample_posterior
        self.generator = generator
        super().__init__(vae, num_frames_per_step, cache_directory)

    def push(self, piece: torch.Tensor) -> torch.Tensor | None:
        r"""Take the next frames, any number of them.

        Args:
            piece: `(batch_size, in_channels, num_frames, height, width)` in `[-1, 1]`.

        Returns:
            The latents that became ready, `(batch_size, latent_channels, n, latent_height, latent_width)`, or `None`.
        """
        return super().push(piece)

    def flush(self) -> torch.Tensor | None:
        r"""End the stream: the latents of the frames still waiting, or `None`; then reset.

        A last group that is not full is completed by repeating the last frame: cut the decoded video to as many frames
        as were pushed.
        """
        missing = (1 - self.num_pushed) % self.vae.temporal_compression_ratio
        if self.num_pushed and missing:
            self.pending.append(self.pending[-1][:, :, -1:].expand(-1, -1, missing, -1, -1))
        return super().flush()

    def _run(self, chunk: torch.Tensor) -> torch.Tensor:
        posterior = self.vae.encode(chunk, return_dict=False, cache=self.cache)[0]
        return posterior.sample(self.generator) if self.sample_posterior else posterior.mode()


class StreamingDecoder(_Stream):
    r"""Decode latents piece by piece.

    Args:
        vae: The autoencoder; its tiling settings apply.
        num_latent_frames_per_step: Latent frames to collect before the network runs.
        cache_directory: Keep the state of tiles on disk between steps (see `TemporalCache`); needs tiling.
    """

    def __init__(self, vae: Any, num_latent_frames_per_step: int = 4, cache_directory: str | Path | None = None):
        if num_latent_frames_per_step < 1:
            raise ValueError(f"`num_latent_frames_per_step` must be positive, got {num_latent_frames_per_step}.")
        super().__init__(vae, num_latent_frames_per_step, cache_directory)

    def push(self, piece: torch.Tensor) -> torch.Tensor | None:
        r"""Take the next latents, any number of frames.

        Args:
            piece: `(batch_size, latent_channels, num_latent_frames, latent_height, latent_width)`, not normalised.

        Returns:
            The frames that became ready, `(batch_size, in_channels, n, height, width)`, or `None`.
        """
        return super().push(piece)

    def flush(self) -> torch.Tensor | None:
        r"""End the stream: the frames of the latents still waiting, or `None`; then reset."""
        return super().flush()

    def _run(self, chunk: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(chunk, return_dict=False, cache=self.cache)[0]


def _frame_shape(piece: torch.Tensor) -> tuple[int, ...]:
    return (*piece.shape[:2], *piece.shape[3:])

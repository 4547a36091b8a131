"""Videos of any length through an autoencoder in constant memory: push what you have, get what is ready.

The state is the object's own, so any number of streams may interleave on one model. Chunked results equal those of the
whole video up to float rounding (`tests/inference/test_streaming.py`: 1e-10 in float64).
"""

import torch

from ..checks import check_positive
from ..models.temporal_cache import TemporalCache
from ..models.video_autoencoder import VideoAutoencoder


class _Stream:
    """Collects pieces along time until a step is full; the first step takes one more, the image.

    Frames that must wait are copied into one buffer. To keep the pieces themselves would keep all of a large piece for
    its last frame, and a caller who fills one tensor again and again would change frames already pushed.
    """

    is_encoder: bool
    is_delayed = False  # whether something comes out after the last frames went in

    def __init__(self, vae: VideoAutoencoder, step: int, cache: TemporalCache):
        self.vae = vae
        self.step = step
        self.cache = cache
        self.reset()

    def reset(self) -> None:
        """Forget the stream; the next piece pushed is the first of a new one."""
        self.cache.reset()
        self.num_pushed = 0
        self._like: torch.Tensor | None = None  # no frames, but shape, dtype and device of the stream's
        self._buffer: torch.Tensor | None = None
        self._num_pending = 0

    def push(self, piece: torch.Tensor) -> torch.Tensor | None:
        self.vae.check_tensor(piece, "piece")
        if piece.ndim != 5:
            raise ValueError(
                f"The pushed tensor must have 5 dimensions (B, C, T, H, W), got shape {tuple(piece.shape)}."
            )
        if self._like is None:
            self._like = piece[:, :, :0].clone()
        if _kind(piece) != _kind(self._like):
            raise ValueError(
                f"The pushed tensor must keep the stream's (B, C, H, W), dtype and device {_kind(self._like)}, got "
                f"{_kind(piece)}."
            )
        outputs, start = [], 0
        while start < piece.shape[2]:
            size = self.step + (self.cache.num_latent_frames == 0)
            taken = min(size - self._num_pending, piece.shape[2] - start)
            frames = piece[:, :, start : start + taken]
            start += taken
            self.num_pushed += taken
            if taken == size:
                outputs.append(self._run(frames))  # a whole step: nothing to copy
                continue
            self._collect(frames, size)
            if self._num_pending == size:
                outputs.append(self._run(self._take_pending()))
        # `torch.cat` of one tensor would copy it, too.
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0] if outputs else None

    def flush(self) -> torch.Tensor | None:
        self.cache.is_last = True
        output = None
        if self._num_pending:
            output = self._run(self._take_pending())
        elif self.is_delayed and self._like is not None and self.cache.num_latent_frames > 0:
            output = self._run(self._like)
        self.reset()
        return output

    def _collect(self, frames: torch.Tensor, size: int) -> None:
        if self._buffer is None:
            self._buffer = frames.new_empty(*frames.shape[:2], size, *frames.shape[3:])
        stop = self._num_pending + frames.shape[2]
        self._buffer[:, :, self._num_pending : stop] = frames
        self._num_pending = stop

    def _take_pending(self) -> torch.Tensor:
        assert self._buffer is not None
        frames, self._buffer, self._num_pending = self._buffer[:, :, : self._num_pending], None, 0
        return frames

    def _run(self, chunk: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything needed to continue the stream later, as tensors (safetensors can store it)."""
        state = {f"cache/{key}": tensor for key, tensor in self.cache.state_dict().items()}
        state |= {"num_pushed": torch.tensor(self.num_pushed), "is_encoder": torch.tensor(self.is_encoder)}
        if self._buffer is not None:
            state["pending"] = self._buffer[:, :, : self._num_pending].clone()
        elif self.is_delayed and self._like is not None:
            state["pending"] = self._like
        return state

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: If it is no state of such a stream.
        """
        name = type(self).__name__
        if "num_pushed" not in state_dict:
            raise ValueError(f"`state_dict` must be the state of a {name}, got keys {sorted(state_dict)}.")
        if bool(state_dict.get("is_encoder", self.is_encoder)) != self.is_encoder:
            raise ValueError(f"`state_dict` must be the state of a {name}, got that of the other direction.")
        cached = {key.removeprefix("cache/"): value for key, value in state_dict.items() if key.startswith("cache/")}
        layers = {getattr(module, "name", None) for module in self.vae.modules()} | {"layout", "num_latent_frames"}
        unknown = sorted({key.rpartition("/")[2] for key in cached} - layers)
        if unknown:
            raise ValueError(
                f"`state_dict` must be the state of a {name} of such a model, got that of one with other layers, for "
                f"instance {unknown[0]!r}."
            )
        self.reset()
        self.cache.load_state_dict(cached)
        self.num_pushed = int(state_dict["num_pushed"])
        if "pending" in state_dict:
            pending, size = state_dict["pending"], self.step + (self.cache.num_latent_frames == 0)
            if pending.shape[2] >= size:
                raise ValueError(
                    f"`state_dict` must be of a stream with as short steps, got {pending.shape[2]} waiting for one of "
                    f"{size}."
                )
            self._like = pending[:, :, :0].clone()
            self._collect(pending, size)


class StreamingEncoder(_Stream):
    """Encode a video piece by piece.

    Args:
        vae: The autoencoder; its tiling settings apply.
        num_frames_per_step: Frames to collect before the network runs, a multiple of the temporal ratio; larger steps
            are faster and take more memory.
        sample_posterior: Whether to sample the posterior instead of taking its mean.
        generator: Random generator of the posterior sample.
        cache: A fresh `TemporalCache(directory, layout)` for a stream that keeps the state of its tiles on disk, or
            that has tiles of its own.
    """

    is_encoder = True

    def __init__(
        self,
        vae: VideoAutoencoder,
        num_frames_per_step: int = 16,
        sample_posterior: bool = False,
        generator: torch.Generator | None = None,
        cache: TemporalCache | None = None,
    ):
        ratio = vae.temporal_compression_ratio
        check_positive("num_frames_per_step", num_frames_per_step)
        if num_frames_per_step % ratio:
            raise ValueError(
                f"`num_frames_per_step` must be a positive multiple of {ratio}, got {num_frames_per_step}."
            )
        self.sample_posterior = sample_posterior
        self.generator = generator
        super().__init__(vae, num_frames_per_step, TemporalCache() if cache is None else cache)

    def push(self, piece: torch.Tensor) -> torch.Tensor | None:
        """Take the next frames, any number of them.

        Args:
            piece: `(batch_size, in_channels, num_frames, height, width)` in `[-1, 1]`.

        Returns:
            The latents that became ready, `(batch_size, latent_channels, n, latent_height, latent_width)`, or `None`.
        """
        return super().push(piece)

    def flush(self) -> torch.Tensor | None:
        """End the stream: the latents of the frames still waiting, or `None`; then reset.

        A last group that is not full is completed by repeating the last frame: cut the decoded video to as many frames
        as were pushed.
        """
        missing = (1 - self.num_pushed) % self.vae.temporal_compression_ratio
        if self.num_pushed and missing:
            assert self._buffer is not None  # frames of a group that is not full are waiting
            last = self._buffer[:, :, self._num_pending - 1 : self._num_pending]
            self._collect(last.expand(-1, -1, missing, -1, -1), self._buffer.shape[2])
        return super().flush()

    def _run(self, chunk: torch.Tensor) -> torch.Tensor:
        posterior = self.vae.encode(chunk, return_dict=False, cache=self.cache)[0]
        return posterior.sample(self.generator) if self.sample_posterior else posterior.mode()


class StreamingDecoder(_Stream):
    """Decode latents piece by piece.

    Args:
        vae: The autoencoder; its tiling settings apply.
        num_latent_frames_per_step: Latent frames to collect before the network runs.
        cache: A fresh `TemporalCache(directory, layout)` for a stream that keeps the state of its tiles on disk, or
            that has tiles of its own.
    """

    is_encoder = False

    def __init__(self, vae: VideoAutoencoder, num_latent_frames_per_step: int = 4, cache: TemporalCache | None = None):
        check_positive("num_latent_frames_per_step", num_latent_frames_per_step)
        self.is_delayed = vae.num_delayed_frames > 0
        super().__init__(vae, num_latent_frames_per_step, TemporalCache() if cache is None else cache)

    def push(self, piece: torch.Tensor) -> torch.Tensor | None:
        """Take the next latents, any number of frames.

        Args:
            piece: `(batch_size, latent_channels, num_latent_frames, latent_height, latent_width)`, not normalised.

        Returns:
            The frames that became ready, `(batch_size, in_channels, n, height, width)`, or `None`.
        """
        return super().push(piece)

    def flush(self) -> torch.Tensor | None:
        """End the stream: the frames of the latents still waiting, or `None`; then reset."""
        return super().flush()

    def _run(self, chunk: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(chunk, return_dict=False, cache=self.cache)[0]


def _kind(piece: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype, str]:
    return (*piece.shape[:2], *piece.shape[3:]), piece.dtype, str(piece.device)

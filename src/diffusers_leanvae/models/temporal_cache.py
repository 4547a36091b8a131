"""Caller-owned state of a causal video stream: what each temporal convolution must remember between chunks."""

import torch


class TemporalCache:
    r"""The last two input time steps of every causal convolution, for one stream and one direction.

    Pass a fresh `TemporalCache()` with the first chunk and the same object with every later chunk; the model writes
    nothing anywhere else, so streams interleave freely and the memory is freed with the object.

    Attributes:
        tails: Per convolution name, a tensor of shape `(batch_size, 2, latent_height, latent_width, channels)`.
        num_latent_frames: Latent frames seen so far; 0 means that the next chunk starts with the image token.
    """

    def __init__(self) -> None:
        self.tails: dict[str, torch.Tensor] = {}
        self.num_latent_frames = 0

    def extend(self, name: str, hidden_states: torch.Tensor, num_steps: int) -> torch.Tensor:
        r"""Put the remembered steps (zeros at the start) in front of `hidden_states` and remember its last ones."""
        tail = self.tails.get(name)
        if tail is None:
            tail = hidden_states.new_zeros(hidden_states.shape[0], num_steps, *hidden_states.shape[2:])
        extended = torch.cat((tail, hidden_states), dim=1)
        # A clone, not a view: a view would keep the whole chunk's activation alive until the next chunk.
        self.tails[name] = extended[:, -num_steps:].clone()
        return extended

    def reset(self) -> None:
        r"""Forget the stream; the next chunk is the first of a new one."""
        self.tails.clear()
        self.num_latent_frames = 0

    def to(self, *args, **kwargs) -> "TemporalCache":
        r"""A copy with its tensors moved or cast as by `torch.Tensor.to`."""
        moved = TemporalCache()
        moved.tails = {name: tail.to(*args, **kwargs) for name, tail in self.tails.items()}
        moved.num_latent_frames = self.num_latent_frames
        return moved

    def state_dict(self) -> dict[str, torch.Tensor]:
        r"""Everything needed to continue the stream later, as tensors (safetensors can store it)."""
        return {**self.tails, "num_latent_frames": torch.tensor(self.num_latent_frames)}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        r"""Restore what [`TemporalCache.state_dict`] gave."""
        tails = dict(state_dict)
        self.num_latent_frames = int(tails.pop("num_latent_frames"))
        self.tails = tails

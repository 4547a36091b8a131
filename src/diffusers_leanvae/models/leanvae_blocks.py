"""Neighborhood-aware feed-forward (NAF) layers of LeanVAE (arXiv 2503.14325, section 3.2); tokens `(B, t, h, w, c)`.

In a call of the model without gradients the tokens are overwritten, slice by slice, and a network needs the memory of
about two activations. At 17x256x256 with 16 latent channels in float32 `encode` takes 26 MiB above weights and input,
and `decode` 36 MiB. Without any of this they would take 137 and 157 MiB and be no faster; with slices that are written
to new tensors, 58 and 88 MiB. `fuse` takes 34 and 40 MiB, but does not serve autocast, hooks and offloading.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight

from .temporal_cache import WHOLE, Chunk
from .video_layers import is_autocast_on


def works_in_place(chunk: Chunk) -> bool:
    """Whether layers overwrite the tokens that they get.

    Autograd needs the old values, hooks want to see them, and a compiler would unroll the slices. A layer that is
    called by itself leaves its input alone.
    """
    return not (chunk.has_gradients or chunk.is_watched or torch.is_grad_enabled() or torch.compiler.is_compiling())


def slice_elements(device: torch.device) -> int:
    """Elements that the temporary tensors of a slice may have: 16 MB in float32 on CPU, 2 GB elsewhere."""
    return 2**22 if device.type == "cpu" else 2**29


def slices(size: int, elements_per_item: int, device: torch.device) -> Iterator[slice]:
    """Cut `size` items so that the temporary tensors of a slice stay below `slice_elements`."""
    step = max(slice_elements(device) // max(elements_per_item, 1), 1)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def update_tokens(
    function: Callable[..., torch.Tensor], tokens: torch.Tensor, *others: torch.Tensor, width: int, chunk: Chunk
) -> torch.Tensor:
    """Compute a function of every token by itself: overwrite the tokens, slice by slice, where that is allowed.

    Args:
        function: Of `(n, c)` tokens and their rows of `others`, or of all of them in their shape.
        tokens: `(B, t, h, w, c)`.
        others: Other tensors of the same tokens, of any widths.
        width: Of all temporary tensors of the function together.
        chunk: What the tokens belong to.
    """
    if not works_in_place(chunk):
        return function(tokens, *others)
    rows, *other_rows = (x.view(-1, x.shape[-1]) for x in (tokens, *others))
    for part in slices(rows.shape[0], width, tokens.device):
        rows[part] = function(rows[part], *(x[part] for x in other_rows))
    return tokens


def keep(tokens: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Tokens that a layer may overwrite, while these are needed afterwards."""
    return tokens.clone() if works_in_place(chunk) else tokens


def by_strips(
    function: Callable[..., tuple[torch.Tensor, ...]],
    tensors: Sequence[torch.Tensor | None],
    dims: tuple[int, int],
    height: int,
    elements_per_row: int,
    chunk: Chunk,
) -> tuple[torch.Tensor, ...]:
    """Compute a function of rows of tokens by themselves, strip by strip where tokens may be overwritten.

    The way between pixels and tokens takes six times their memory.

    Args:
        function: Of the tensors; returns a tuple of tensors.
        tensors: Pixels or tokens.
        dims: The dimension of rows in the tensors, and in what the function returns.
        height: Rows of tokens.
        elements_per_row: Elements of the temporary tensors of a row of tokens.
        chunk: What the tokens belong to.
    """
    device = next(x.device for x in tensors if x is not None)
    strips = list(slices(height, elements_per_row, device)) if works_in_place(chunk) else [slice(0, height)]
    if len(strips) == 1:
        return function(*tensors)

    def rows(x: torch.Tensor, dim: int, scale: int, strip: slice) -> torch.Tensor:
        return x.narrow(dim, strip.start * scale, (strip.stop - strip.start) * scale)

    results: list[torch.Tensor] = []
    for strip in strips:
        inputs = (None if x is None else rows(x, dims[0], x.shape[dims[0]] // height, strip) for x in tensors)
        for index, part in enumerate(function(*inputs)):
            scale = part.shape[dims[1]] // (strip.stop - strip.start)
            if strip.start == 0:
                shape = list(part.shape)
                shape[dims[1]] = height * scale
                results.append(part.new_empty(shape))
            rows(results[index], dims[1], scale, strip).copy_(part)
    return tuple(results)


NUM_TAIL_STEPS = 2  # that the 3x3x3 convolutions see before a chunk


def no_tail(hidden_states: torch.Tensor) -> torch.Tensor:
    """Zeros that precede the first chunk of tokens `(B, t, h, w, c)`; they have no memory of their own."""
    batch_size, _, *frame_shape = hidden_states.shape
    return hidden_states.new_zeros(()).expand(batch_size, NUM_TAIL_STEPS, *frame_shape)


def exchange_tail(name: str, hidden_states: torch.Tensor, chunk: Chunk) -> torch.Tensor | None:
    """The steps that a convolution remembers, `None` at the start; it remembers the last tokens instead."""
    tail = chunk.recall(name, hidden_states, time_dim=1)
    if chunk.is_open:
        last = hidden_states[:, -NUM_TAIL_STEPS:]
        short = NUM_TAIL_STEPS - last.shape[1]
        if short:
            before = no_tail(hidden_states) if tail is None else tail
            chunk.remember(name, torch.cat((before[:, -short:], last), dim=1), copy=False)
        else:
            chunk.remember(name, last)
    return tail


class CausalDepthwiseConv3d(nn.Conv3d):
    """Depthwise 3x3x3 convolution over channels-last tokens, zero-padded in space, causal in time."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, kernel_size=3, padding=(0, 1, 1), groups=dim)
        self.name = ""  # qualified name in the model, of what it remembers

    def forward(self, hidden_states: torch.Tensor, chunk: Chunk = WHOLE, residual: bool = False) -> torch.Tensor:
        tail = exchange_tail(self.name, hidden_states, chunk)
        if tail is None:
            tail = no_tail(hidden_states)
        if not works_in_place(chunk):
            output = self._convolve(tail, hidden_states, slice(None))
            return hidden_states + output if residual else output
        num_tokens = hidden_states[..., 0].numel() + tail[..., 0].numel()
        for channels in slices(hidden_states.shape[-1], 2 * num_tokens, hidden_states.device):
            part = hidden_states[..., channels]
            output = self._convolve(tail[..., channels], part, channels)
            part.add_(output) if residual else part.copy_(output)
        return hidden_states

    def _convolve(self, tail: torch.Tensor, hidden_states: torch.Tensor, channels: slice) -> torch.Tensor:
        dtype, device_type = hidden_states.dtype, hidden_states.device.type
        weight, bias = self.weight[channels], self.bias[channels]  # type: ignore[index]
        hidden_states = torch.cat((tail, hidden_states), dim=1)
        if device_type == "cpu" and (dtype.itemsize < 4 or torch.is_autocast_enabled("cpu")):
            # PyTorch has no fast 16-bit depthwise kernel on CPU: float32 is far faster, and more exact.
            hidden_states, weight, bias = hidden_states.float(), weight.float(), bias.float()
        with torch.autocast(device_type, enabled=False) if is_autocast_on(device_type) else nullcontext():
            if device_type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return _TrainableDepthwiseConv.apply(hidden_states, weight, bias).to(dtype)  # type: ignore[union-attr]
            return _depthwise_conv(hidden_states, weight, bias).to(dtype)


def _depthwise_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`(B, t + 2, h, w, c)` to `(B, t, h, w, c)`, zero-padded in space."""
    # The permuted view is exactly `channels_last_3d`: no copy, and a far faster kernel than for the packed layout.
    x = F.conv3d(x.permute(0, 4, 1, 2, 3), weight, bias, padding=(0, 1, 1), groups=weight.shape[0])
    return x.permute(0, 2, 3, 4, 1)


class _TrainableDepthwiseConv(torch.autograd.Function):
    """The same convolution with gradients through fast CPU kernels; PyTorch's own are far slower here.

    The input's gradient is the convolution with the mirrored kernel. The weight's is taken by the 2D kernel, one step
    in time after the other: the 3D one has no vectorised gradient on CPU.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return _depthwise_conv(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def jvp(ctx: Any, x_change: Any, weight_change: Any, bias_change: Any) -> torch.Tensor:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        changes = [] if x_change is None else [_depthwise_conv(x_change, weight, None)]
        if weight_change is not None:
            changes.append(_depthwise_conv(x, weight_change, None))
        return functools.reduce(torch.add, changes if bias_change is None else [*changes, bias_change])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        batch_size, num_steps, height, width, dim = grad.shape
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _depthwise_conv(F.pad(grad, (0, 0, 0, 0, 0, 0, 2, 2)), weight.flip(2, 3, 4), None)
        if ctx.needs_input_grad[1]:
            images = (batch_size * num_steps, height, width, dim)
            frames = grad.view(images).permute(0, 3, 1, 2)
            taps = [
                conv2d_weight(
                    x[:, tap : tap + num_steps].reshape(images).permute(0, 3, 1, 2),
                    [dim, 1, 3, 3],
                    frames,
                    padding=1,
                    groups=dim,
                )
                for tap in range(weight.shape[2])
            ]
            grad_weight = torch.stack(taps, dim=2)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=(0, 1, 2, 3))
        return grad_x, grad_weight, grad_bias


def inner_dim(dim: int) -> int:
    """Inner width of a feed-forward, by the reference's rounding: 1365 for 512, 341 for 128, 21 for 8."""
    return int(4 * (2 / 3) * dim)


class LeanVAEFeedForward(nn.Module):
    """LayerNorm -> Linear to twice the inner width -> `gelu(gate) * value` -> Linear, per token."""

    def __init__(self, dim: int):
        super().__init__()
        self.inner_dim = inner_dim(dim)
        self.norm = nn.LayerNorm(dim)
        self.up_proj = nn.Linear(dim, 2 * self.inner_dim, bias=False)
        self.down_proj = nn.Linear(self.inner_dim, dim, bias=False)

    def forward(self, hidden_states: torch.Tensor, chunk: Chunk = WHOLE, residual: bool = False) -> torch.Tensor:
        function = self._add_feed_forward if residual else self._feed_forward
        # The hidden width is 5.3 times the model's: computed at once it alone would set the memory peak.
        return update_tokens(function, hidden_states, width=4 * self.inner_dim, chunk=chunk)

    def _add_feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self._feed_forward(hidden_states)

    def _feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        value, gate = self.up_proj(self.norm(hidden_states)).chunk(2, dim=-1)
        return self.down_proj(F.gelu(gate) * value)


class LeanVAEBlock(nn.Module):
    """Neighborhood-aware feed-forward layer (NAF); with `residual=True` both parts are residual (ResNAF).

    In a call of the model without gradients the input is overwritten by the output.
    """

    def __init__(self, dim: int, residual: bool = True):
        super().__init__()
        self.residual = residual
        self.conv = CausalDepthwiseConv3d(dim)
        self.ff = LeanVAEFeedForward(dim)

    def forward(self, hidden_states: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        hidden_states = self.conv(hidden_states, chunk, self.residual)
        return self.ff(hidden_states, chunk, self.residual)


class LeanVAEBlocks(nn.ModuleList):
    """A chain of blocks with gradient checkpointing."""

    def __init__(self, dim: int, num_layers: int, residual: bool = True):
        super().__init__([LeanVAEBlock(dim, residual) for _ in range(num_layers)])
        self.gradient_checkpointing = False

    def __getitem__(self, index: int | slice) -> nn.Module:  # type: ignore[override]
        # A slice (group offloading takes them) would be built by this class's constructor, which takes no modules.
        return nn.ModuleList(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    def forward(self, hidden_states: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        for block in self:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, chunk)  # type: ignore[operator]
            else:
                hidden_states = block(hidden_states, chunk)
        return hidden_states

"""Triton: the gate of a feed-forward, and the soft threshold of the bottleneck, in one pass each; see `eager`."""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from .eager import check_gated_arguments, check_threshold_arguments
from .triton_launch import check_contiguous, check_tensors, on_device


SQRT_HALF = tl.constexpr(0.5**0.5)


@triton.jit
def _gated_gelu_kernel(projected_ptr, output_ptr, num_tokens, inner_dim, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr):
    num_blocks = tl.cdiv(inner_dim, BLOCK_I)
    rows = (tl.program_id(0) // num_blocks * BLOCK_N + tl.arange(0, BLOCK_N))[:, None].to(tl.int64)
    start = tl.program_id(0) % num_blocks * BLOCK_I
    pairs = 2 * start + tl.arange(0, 2 * BLOCK_I)[None, :]
    mask = (rows < num_tokens) & (pairs < 2 * inner_dim)
    projected = tl.load(projected_ptr + rows * (2 * inner_dim) + pairs, mask=mask, other=0).to(tl.float32)
    value, gate = tl.split(tl.reshape(projected, (BLOCK_N, BLOCK_I, 2)))
    gate = 0.5 * gate * (1 + tl.erf(gate * SQRT_HALF))
    columns = start + tl.arange(0, BLOCK_I)[None, :]
    tl.store(output_ptr + rows * inner_dim + columns, value * gate, mask=(rows < num_tokens) & (columns < inner_dim))


@triton.jit
def _soft_threshold_kernel(x_ptr, threshold_ptr, num_elements, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    x = tl.load(x_ptr + offsets, mask=mask).to(tl.float32)
    excess = tl.abs(x) - tl.load(threshold_ptr).to(tl.float32)
    excess = tl.where(excess < 0, 0.0, excess)  # not a maximum: that would turn NaN into 0
    sign = (x > 0).to(tl.float32) - (x < 0).to(tl.float32)
    tl.store(x_ptr + offsets, sign * excess, mask=mask)


def gated_gelu(projected: torch.Tensor) -> torch.Tensor:
    """See `eager.gated_gelu`. `projected` must be contiguous; memory is read 16 bytes at a time where `inner` is a
    multiple of 8, and number by number elsewhere: pad the inner width.
    """
    check_gated_arguments(projected)
    check_tensors("projected", {"projected": projected})
    check_contiguous("projected", projected)
    return _gated_gelu_op(projected) if torch.compiler.is_compiling() else _launch_gated_gelu(projected)


def soft_threshold_(hidden_states: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """See `eager.soft_threshold_`. `hidden_states` must be contiguous; `threshold` is read on the device."""
    check_threshold_arguments(threshold)
    check_tensors("hidden_states", {"hidden_states": hidden_states, "threshold": threshold}, same_dtype=False)
    check_contiguous("hidden_states", hidden_states)
    launch = _soft_threshold_op if torch.compiler.is_compiling() else _launch_soft_threshold
    launch(hidden_states, threshold)
    return hidden_states


def _launch_gated_gelu(projected: torch.Tensor) -> torch.Tensor:
    num_tokens, inner_dim = projected.shape[0], projected.shape[1] // 2
    output = projected.new_empty(num_tokens, inner_dim)
    block = {"BLOCK_N": 8, "BLOCK_I": 256}
    grid = (triton.cdiv(num_tokens, block["BLOCK_N"]) * triton.cdiv(inner_dim, block["BLOCK_I"]),)
    with on_device(projected):
        _gated_gelu_kernel[grid](projected, output, num_tokens, inner_dim, **block, num_warps=8)  # type: ignore[call-arg]
    return output


def _launch_soft_threshold(hidden_states: torch.Tensor, threshold: torch.Tensor) -> None:
    num_elements, block = hidden_states.numel(), 2048
    if num_elements > 0:
        grid = (triton.cdiv(num_elements, block),)
        with on_device(hidden_states):
            _soft_threshold_kernel[grid](hidden_states, threshold, num_elements, BLOCK=block)  # type: ignore[arg-type]


# What a compiler sees: one opaque operation. Without a compiler the kernel is launched straight, which costs less.
@torch.library.custom_op("diffusers_leanvae::gated_gelu", mutates_args=())
def _gated_gelu_op(projected: torch.Tensor) -> torch.Tensor:
    return _launch_gated_gelu(projected)


@_gated_gelu_op.register_fake
def _(projected: torch.Tensor) -> torch.Tensor:
    return projected.new_empty(projected.shape[0], projected.shape[1] // 2)


@torch.library.custom_op("diffusers_leanvae::soft_threshold_", mutates_args=("hidden_states",))
def _soft_threshold_op(hidden_states: torch.Tensor, threshold: torch.Tensor) -> None:
    _launch_soft_threshold(hidden_states, threshold)

"""Triton: causal depthwise convolution, residual and LayerNorm in one pass over the tokens; see `eager`.

A program computes rows of `BLOCK_W` tokens for `STEPS` time steps, all channels at once, since the LayerNorm needs
them. A thread holds 16 bytes of one token at each step: a weight, once loaded, serves all steps, and an input three.
Neither is ever exchanged between threads. Going from row to row, two of three input rows have just been read.
"""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from .eager import check_depthwise_arguments
from .triton_launch import IS_INTERPRETED, check_tensors, on_device


NUM_ROWS = 4  # of a program, one after the other, where a frame is large
LARGE_FRAME = 2**22  # numbers of a time step: with four rows each, some 500 programs are left, enough for an H100


def _tokens(args: dict) -> int:
    return max(args["num_warps"] * 32 * (16 // args["x_ptr"].element_size()) // args["BLOCK_C"], 1)


def _steps(args: dict) -> int:
    """At most `MAX_STEPS`, and as even as possible: the last program of 9 steps would waste 7 of 8."""
    num_programs = -(-args["num_steps"] // args["MAX_STEPS"])
    return -(-args["num_steps"] // num_programs)


# More steps mean fewer loads and more registers: with 8 in 16 bit nearly all that a thread can have.
_CONFIGS = [triton.Config({"MAX_STEPS": steps}, num_warps=warps) for steps in (4, 8) for warps in (8, 4)]


# Tuned for each width, dtype and number of steps, not for each size of a frame: a model that is fed many sizes should
# not stop to measure each.
@triton.autotune(_CONFIGS[:1] if IS_INTERPRETED else _CONFIGS, key=["CHANNELS", "num_steps"], cache_results=True)
@triton.heuristics({"BLOCK_W": _tokens, "STEPS": _steps})
@triton.jit(do_not_specialize=["num_steps", "height", "width"])
def _conv_norm_kernel(
    x_ptr,
    tail_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    output_ptr,
    normed_ptr,
    num_steps,
    height,
    width,
    x_stride_b,
    x_stride_t,
    x_stride_h,
    x_stride_w,
    eps,
    CHANNELS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STEPS: tl.constexpr,
    MAX_STEPS: tl.constexpr,
):
    num_blocks = tl.cdiv(width, BLOCK_W)
    first_row = tl.program_id(0) // num_blocks * ROWS
    start = tl.program_id(1) * STEPS
    batch = tl.program_id(2).to(tl.int64)
    columns = (tl.program_id(0) % num_blocks * BLOCK_W + tl.arange(0, BLOCK_W))[:, None]
    # (BLOCK_W, BLOCK_C), as everything below, parameters too: each thread loads its own, and none is exchanged.
    channels = tl.arange(0, BLOCK_C)[None, :] + columns * 0
    is_channel = channels < CHANNELS
    frame_size = height.to(tl.int64) * width * CHANNELS

    for r in range(ROWS):
        row = first_row + r
        bias = tl.load(bias_ptr + channels, mask=is_channel, other=0).to(tl.float32)
        sums = ()
        for _ in tl.static_range(STEPS):
            sums = sums + (bias,)
        for tap in range(9):  # not unrolled: that would only add registers and seconds of compilation
            h, w = row + tap // 3 - 1, columns + tap % 3 - 1
            mask = is_channel & (w >= 0)
            end = tl.where((h >= 0) & (h < height), width, 0)  # rows and steps outside have no columns
            taps = ()
            for tap_t in tl.static_range(3):
                weight = tl.load(weight_ptr + (tap_t * 9 + tap) * CHANNELS + channels, mask=is_channel, other=0)
                taps = taps + (weight.to(tl.float32),)
            for i in tl.static_range(STEPS + 2):  # type: ignore[misc]
                t = start + i - 2
                frame = x_ptr + batch * x_stride_b + t.to(tl.int64) * x_stride_t + h.to(tl.int64) * x_stride_h
                step_end = tl.where((t >= 0) & (t < num_steps), end, 0)
                x = tl.load(frame + w * x_stride_w + channels, mask=mask & (w < step_end), other=0)
                if HAS_TAIL and i < 2:
                    frame = tail_ptr + (batch * 2 + i) * frame_size + h.to(tl.int64) * width * CHANNELS
                    tail_end = tl.where(t < 0, end, 0)
                    x += tl.load(frame + w * CHANNELS + channels, mask=mask & (w < tail_end), other=0)
                x = x.to(tl.float32)
                updated = ()
                for k in tl.static_range(STEPS):  # step k sees the inputs k, k + 1 and k + 2
                    updated = updated + (tl.fma(x, taps[i - k], sums[k]) if i >= k and i <= k + 2 else sums[k],)
                sums = updated

        norm_weight = tl.load(norm_weight_ptr + channels, mask=is_channel, other=0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + channels, mask=is_channel, other=0).to(tl.float32)
        for k in tl.static_range(STEPS):
            t = start + k
            mask = is_channel & (columns < tl.where((row < height) & (t < num_steps), width, 0))
            total = sums[k]
            if RESIDUAL:
                frame = x_ptr + batch * x_stride_b + t.to(tl.int64) * x_stride_t + row.to(tl.int64) * x_stride_h
                total += tl.load(frame + columns * x_stride_w + channels, mask=mask, other=0).to(tl.float32)
            mean = tl.sum(total, axis=1, keep_dims=True) / CHANNELS
            centered = tl.where(is_channel, total - mean, 0.0)
            variance = tl.sum(centered * centered, axis=1, keep_dims=True) / CHANNELS
            normed = centered * tl.rsqrt(variance + eps) * norm_weight + norm_bias
            place = (batch * num_steps + t) * frame_size + row.to(tl.int64) * width * CHANNELS
            tl.store(output_ptr + place + columns * CHANNELS + channels, total, mask=mask)
            tl.store(normed_ptr + place + columns * CHANNELS + channels, normed, mask=mask)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """See `eager.pack_weight`. The same `(channels, 1, 3, 3, 3)` with channels next to each other in memory."""
    return weight.flatten(1).t().contiguous().t().unflatten(1, (1, 3, 3, 3))


def depthwise_conv_residual_norm(
    hidden_states: torch.Tensor,
    tail: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float = 1e-5,
    residual: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `eager.depthwise_conv_residual_norm`. All tensors share one dtype: float32, bfloat16 or float16.

    The channels of `hidden_states` must be adjacent in memory; a slice of channels may be passed as it is. Weights
    from [`pack_weight`] save a copy.
    """
    check_depthwise_arguments(hidden_states, tail, weight, bias, norm_weight, norm_bias)
    parameters = {"weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    check_tensors("hidden_states", {"hidden_states": hidden_states, "tail": tail} | parameters)
    if hidden_states.stride(-1) != 1:
        raise ValueError(
            f"`hidden_states` must have adjacent channels for a Triton kernel, got strides {hidden_states.stride()}."
        )
    launch = _op if torch.compiler.is_compiling() else _launch
    return launch(hidden_states, tail, weight, bias, norm_weight, norm_bias, eps, residual)


def _launch(
    hidden_states: torch.Tensor,
    tail: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    residual: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch_size, num_steps, height, width, channels = hidden_states.shape
    if (weight.stride(0), *weight.stride()[2:]) != (1, 9 * channels, 3 * channels, channels):
        weight = pack_weight(weight)
    output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    normed = torch.empty_like(output)

    num_rows = NUM_ROWS if output.numel() // num_steps >= LARGE_FRAME else 1

    def grid(meta: dict) -> tuple[int, int, int]:
        num_blocks = -(-height // num_rows) * -(-width // meta["BLOCK_W"])
        return num_blocks, -(-num_steps // meta["STEPS"]), batch_size

    with on_device(hidden_states):
        _conv_norm_kernel[grid](
            hidden_states,
            hidden_states if tail is None else tail.contiguous(),
            weight,
            bias.contiguous(),
            norm_weight.contiguous(),
            norm_bias.contiguous(),
            output,
            normed,
            num_steps,
            height,
            width,
            *hidden_states.stride()[:4],
            eps,
            CHANNELS=channels,
            HAS_TAIL=tail is not None,
            RESIDUAL=residual,
            ROWS=num_rows,
            BLOCK_C=triton.next_power_of_2(channels),
        )
    return output, normed


# What a compiler sees: one opaque operation. Without a compiler the kernel is launched straight, which costs less.
@torch.library.custom_op("diffusers_leanvae::depthwise_conv_residual_norm", mutates_args=())
def _op(
    hidden_states: torch.Tensor,
    tail: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    residual: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch(hidden_states, tail, weight, bias, norm_weight, norm_bias, eps, residual)


@_op.register_fake
def _(hidden_states: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    shape = hidden_states.shape
    return hidden_states.new_empty(shape), hidden_states.new_empty(shape)

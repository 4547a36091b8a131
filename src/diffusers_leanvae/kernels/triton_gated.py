"""Triton: matrix product and gate of a feed-forward in one; see `eager.gated_projection`.

Each pair of columns of the product is a value and its gate, and lies in one thread: the gate is applied where the sums
are, and the product, the largest tensor of the network, is never written. A program computes tile after tile, and
loads the next one's factors through tensor descriptors while the gate of this one is computed.
"""

import functools
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.tools.tensor_descriptor import TensorDescriptor  # pyright: ignore[reportMissingImports]

from .eager import check_projection_arguments
from .triton_launch import IS_INTERPRETED, check_contiguous, check_tensors, on_device
from .triton_pointwise import gated_gelu


@triton.jit
def _gelu(x):
    # |gelu(x) - max(x, 0)| is |x| times the normal distribution's tail, here 2 to a polynomial of degree 6: minimax of
    # log2(erfc(x / sqrt(2)) / 2) on [0, 6]. Off by 5e-7 at most, and by 1.5e-4 of the tail down to -4: less than a
    # rounding of 16 bits. Fewer instructions than `erf`: the matrix units wait for them.
    distance = tl.abs(x)
    a = tl.minimum(distance, 6.0)
    tail = 3.192063013557345e-05 * a - 0.0007500402862206101
    tail = tail * a + 0.007986803539097309
    tail = tail * a - 0.05321424454450607
    tail = tail * a - 0.45896434783935547
    tail = tail * a - 1.1511197090148926
    tail = tl.exp2(tail * a - 1.0000042915344238)
    return tl.where(x > 0, x, 0.0) - distance * tail


@triton.jit
def _gated_projection_kernel(
    hidden_states,
    weight,
    output,
    num_tokens,
    num_columns,
    num_programs,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    num_m, num_n = tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, num_programs, flatten=True):
        # Tiles of `GROUP` rows of tiles before the next rows: what programs read at a time stays in the L2 cache.
        group = tile // (GROUP * num_n)
        num_rows = min(num_m - group * GROUP, GROUP)
        row = (group * GROUP + tile % (GROUP * num_n) % num_rows) * BLOCK_M
        column = tile % (GROUP * num_n) // num_rows * BLOCK_N
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, CHANNELS, BLOCK_K):
            x = hidden_states.load([row, k])
            w = weight.load([column, k])
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            sums = tl.dot(x, w.T, sums)
        value, gate = tl.split(tl.reshape(sums, (BLOCK_M, BLOCK_N // 2, 2)))
        output.store([row, column // 2], (value * _gelu(gate)).to(output.dtype))


@functools.cache
def _settings(device: torch.device) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Block sizes, launch options and number of programs that suit a device."""
    if IS_INTERPRETED:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}, {}, 2
    properties = torch.cuda.get_device_properties(device)
    programs = properties.multi_processor_count
    # Hopper and its successors in data centres; PyTorch for AMD may not tell.
    if getattr(properties, "shared_memory_per_block_optin", 0) >= 227 * 1024:
        return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}, {"num_warps": 8, "num_stages": 4}, programs
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, {"num_warps": 8, "num_stages": 3}, programs


def gated_projection(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See `eager.gated_projection`. Both tensors share one dtype and are contiguous.

    float32, and widths that are no multiple of 8, take PyTorch's product and [`gated_gelu`].
    """
    check_projection_arguments(hidden_states, weight)
    check_tensors("hidden_states", {"hidden_states": hidden_states, "weight": weight})
    check_contiguous("hidden_states", hidden_states)
    check_contiguous("weight", weight)
    is_aligned = weight.shape[1] % 8 == 0 and weight.shape[0] % 16 == 0  # descriptors count in 16 bytes
    if hidden_states.dtype == torch.float32 or not is_aligned:
        return gated_gelu(torch.mm(hidden_states, weight.t()))
    return _op(hidden_states, weight) if torch.compiler.is_compiling() else _launch(hidden_states, weight)


def _launch(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (num_tokens, channels), num_columns = hidden_states.shape, weight.shape[0]
    output = hidden_states.new_empty(num_tokens, num_columns // 2)
    blocks, options, num_programs = _settings(hidden_states.device)
    rows, columns, depth = blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_K"]
    num_tiles = triton.cdiv(num_tokens, rows) * triton.cdiv(num_columns, columns)
    num_programs = min(num_programs, num_tiles)
    # The interpreter's product takes bfloat16 for integers.
    constants = {"CHANNELS": channels, **blocks, "GROUP": 8, "UPCAST": IS_INTERPRETED}
    with on_device(hidden_states):
        _gated_projection_kernel[(num_programs,)](
            TensorDescriptor.from_tensor(hidden_states, [rows, depth]),
            TensorDescriptor.from_tensor(weight, [columns, depth]),
            TensorDescriptor.from_tensor(output, [rows, columns // 2]),
            num_tokens,
            num_columns,
            num_programs,
            **constants,
            **options,
        )
    return output


@torch.library.custom_op("diffusers_leanvae::gated_projection", mutates_args=())
def _op(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _launch(hidden_states, weight)


@_op.register_fake
def _(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape[0], weight.shape[0] // 2)

"""Fused operations of LeanVAE's blocks for inference, in two implementations with the same signatures.

`get("eager")` is plain PyTorch, the reference; `get("triton")` needs Triton and a GPU, or Triton's interpreter
(`TRITON_INTERPRET=1` in the environment before the first import), which is for tests. Nothing is chosen by itself.
Those of `slabs.py`, in C++ for CPUs, are of slabs of tokens, and so have signatures of their own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..checks import check_choice


class Kernels(NamedTuple):
    """The operations of one implementation; `eager.py` documents them."""

    depthwise_conv_residual_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    gated_gelu: Callable[[torch.Tensor], torch.Tensor]
    gated_projection: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    soft_threshold_: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    pack_weight: Callable[[torch.Tensor], torch.Tensor]


def get(implementation: str) -> Kernels:
    """The operations of an implementation, `"eager"` or `"triton"`."""
    check_choice("implementation", implementation, ("eager", "triton"))
    if implementation == "eager":
        from . import eager

        return Kernels(
            eager.depthwise_conv_residual_norm,
            eager.gated_gelu,
            eager.gated_projection,
            eager.soft_threshold_,
            eager.pack_weight,
        )
    try:
        import triton  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('These kernels need Triton: pip install "diffusers-leanvae[triton]"') from error
    from . import triton_conv, triton_gated, triton_pointwise

    return Kernels(
        triton_conv.depthwise_conv_residual_norm,
        triton_pointwise.gated_gelu,
        triton_gated.gated_projection,
        triton_pointwise.soft_threshold_,
        triton_conv.pack_weight,
    )

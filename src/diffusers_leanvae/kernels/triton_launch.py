"""Checks of the tensors that a Triton kernel gets, before it is launched."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton  # pyright: ignore[reportMissingImports]


# Decided when Triton decorates the kernels, that is at import: changing the environment later has no effect.
IS_INTERPRETED: bool = triton.knobs.runtime.interpret  # type: ignore[attr-defined]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensors(first: str, tensors: dict[str, torch.Tensor | None], same_dtype: bool = True) -> None:
    """Raise unless all tensors can go to a kernel together: device, dtype, no gradient. `first` names the leader."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    leader = given[first]
    if not (leader.is_cuda or IS_INTERPRETED):
        raise ValueError(f"`{first}` must be on a GPU for a Triton kernel, got {leader.device.type!r}.")
    for name, tensor in given.items():
        if tensor.device != leader.device:
            raise ValueError(
                f"`{name}` must be on {str(leader.device)!r} as `{first}` is, got {str(tensor.device)!r}."
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"`{name}` must be float32, bfloat16 or float16 for a Triton kernel, got {tensor.dtype}.")
        if same_dtype and tensor.dtype != leader.dtype:
            raise ValueError(f"`{name}` must be {leader.dtype} as `{first}` is, got {tensor.dtype}.")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"`{name}` must not require gradients: Triton kernels are for inference, got one that does; call "
                "them under `torch.no_grad()`."
            )


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"`{name}` must be contiguous for a Triton kernel, got strides {tensor.stride()}.")


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

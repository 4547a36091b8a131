"""Layers of channels-first videos `(B, c, T, H, W)` that more than one autoencoder is made of."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .temporal_cache import WHOLE, Chunk


# On a CPU PyTorch gives a convolution of one video to oneDNN if channels times frames times rows are more, and
# otherwise to a kernel of its own, which is far slower (`benchmarks/siblings.py`).
_SMALL_INPUT = 20480


def is_autocast_on(device_type: str) -> bool:
    """Tell whether autocast is enabled for a type of devices; some, such as `"meta"`, have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class FrameConv2d(nn.Conv2d):
    """A 2D convolution of every frame."""

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        padding: Any = self.padding
        stride, padding, dilation = (1, *self.stride), (0, *padding), (1, *self.dilation)
        return convolve(x, self.weight.unsqueeze(2), self.bias, stride, padding, dilation)


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> torch.Tensor:
    """`conv3d`, also of no frames: a stream may have nothing ready yet."""
    # A view, since hooks that cast or offload weights after a layer was called replace the data of the parameter
    # itself, and autograd would find that on its way back.
    weight = weight.view_as(weight)
    if x.shape[2] > 0:
        if _is_slow(x, weight):
            return torch.ops.mkldnn._convolution_pointwise(
                x, weight, bias, padding, stride, dilation, 1, "none", [], ""
            )
        return F.conv3d(x, weight, bias, stride, padding, dilation)
    shape = (*x.shape[:2], weight.shape[2] - 2 * padding[0], *x.shape[3:])  # as many frames as give one
    # Zeros: the gradient of the weight is their product with zeros, which memory as it was found might make NaN.
    return F.conv3d(x.new_zeros(shape), weight, bias, stride, padding, dilation)[:, :, :0]


def _is_slow(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether PyTorch would not give a convolution to oneDNN that oneDNN can compute, without gradients."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu" or len(x) != 1:
        return False
    is_small = x[0, :, :, :, 0].numel() <= _SMALL_INPUT and weight[0, 0].numel() > 1  # others are a matrix product
    is_float = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return is_small and is_float and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


class LayerChain(nn.ModuleList):
    """Layers one after the other, with gradient checkpointing."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__(layers)
        self.gradient_checkpointing = False

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        return self.run(x, chunk)

    def run(self, x: torch.Tensor, chunk: Chunk, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Compute some of the layers."""
        for layer in list(self)[start:stop]:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(layer, x, chunk)  # type: ignore[operator]
            else:
                x = layer(x, chunk)
        return x


def attend_within_frames(qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], size: torch.Size) -> torch.Tensor:
    """Attention with one head over the positions of each frame.

    Args:
        qkv: Queries, keys and values, `(B, T, H * W, c)` each.
        size: Height and width.

    Returns:
        `(B, T, H, W, c)`.
    """
    return F.scaled_dot_product_attention(*qkv).unflatten(2, size)

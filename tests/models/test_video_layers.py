"""Layers that more than one autoencoder is made of: a convolution is the same whichever kernel computes it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_leanvae.models.video_layers import convolve


class _Called(TorchDispatchMode):
    """Collects the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def _called(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, set[str]]:
    with _Called() as called:
        return function(), called.names


ONEDNN = "mkldnn::_convolution_pointwise"
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
SETTINGS = [  # kernel, stride, padding, dilation
    ((3, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1)),
    ((1, 3, 3), (1, 2, 2), (0, 0, 0), (1, 1, 1)),
    ((1, 3, 3), (1, 1, 1), (0, 6, 6), (1, 6, 6)),
    ((2, 1, 1), (2, 1, 1), (0, 0, 0), (1, 1, 1)),
]


@needs_onednn
@pytest.mark.parametrize("kernel, stride, padding, dilation", SETTINGS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_strided", [True, False])
@torch.no_grad()
def test_a_small_input_goes_to_onednn(kernel, stride, padding, dilation, has_bias: bool, is_strided: bool):
    torch.manual_seed(0)
    x = torch.randn(1, 5, 4, 12, 10)
    x = x.transpose(3, 4) if is_strided else x
    weight, bias = torch.randn(7, 5, *kernel), torch.randn(7) if has_bias else None
    y, called = _called(lambda: convolve(x, weight, bias, stride, padding, dilation))
    assert ONEDNN in called
    exact = convolve(x.double(), weight.double(), None if bias is None else bias.double(), stride, padding, dilation)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-5)  # 4e-6 was measured


@needs_onednn
@pytest.mark.parametrize("change", ["double", "gradients", "two videos", "1x1", "large", "autocast", "disabled"])
def test_everything_else_is_pytorchs_own(change: str):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 5, 4, 12, 10), torch.randn(7, 5, 3, 3, 3)
    if change == "double":
        x, weight = x.double(), weight.double()
    elif change == "two videos":
        x = x.expand(2, -1, -1, -1, -1)
    elif change == "1x1":
        weight = weight[..., :1, :1, :1]
    elif change == "large":
        x = torch.randn(1, 5, 4, 1025, 3)
    settings = (1, 1, 1), (0, 1, 1), (1, 1, 1)
    with (
        torch.set_grad_enabled(change == "gradients"),
        torch.autocast("cpu", enabled=change == "autocast"),
        torch.backends.mkldnn.flags(enabled=change != "disabled"),
    ):
        y, called = _called(lambda: convolve(x, weight, None, *settings))
        assert ONEDNN not in called and "aten::convolution" in called
        assert torch.equal(y, F.conv3d(x, weight, None, *settings))

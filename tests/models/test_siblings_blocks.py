"""Single layers of WF-VAE and IV-VAE against tensors recorded from the reference implementations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffusers_leanvae import TemporalCache
from diffusers_leanvae.models import autoencoder_kl_ivvae as iv
from diffusers_leanvae.models import autoencoder_kl_wfvae as wf
from diffusers_leanvae.models.temporal_cache import Chunk
from diffusers_leanvae.models.video_layers import FrameConv2d


GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the golden tensors are not at {GOLDEN}")
LAYERS = {interpolation: wf.Layers("layer_norm", 0.0, interpolation) for interpolation in ("linear", "nearest")}
DESIGN = iv.Design(has_keyframes=True, is_group_causal=True, attention="all", use_pyramid=True, dropout=0.0)
GROUP_NORM = wf.Layers("group_norm", 0.0, "linear")


class Block:
    """Everything that was recorded of one layer."""

    def __init__(self, name: str, file: str):
        tensors = load_file(GOLDEN / f"{file}.safetensors")
        self.tensors = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        self.input, self.output = self.tensors["in"], self.tensors["out"]
        prefix = "state_dict."
        self.weights = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def load_into(self, module: nn.Module, **names: str) -> Any:
        """Fill a module; `names` are parts of original keys, and what they are called here."""
        weights = {}
        for key, value in self.weights.items():
            for original, ours in names.items():
                key = key.replace(original, ours)
            expected = module.state_dict()[key].shape
            weights[key] = value.view(expected)
        module.load_state_dict(weights, strict=True)
        return module.eval()


def assert_matches(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# ---- WF-VAE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t1", "t5", "t4"])
def test_wavelet_analysis(name: str):
    block = Block(f"dwt3d.{name}", "wfvae_blocks")
    x = block.input
    # The reference drops a trailing frame that has no partner.
    x = x[:, :, : x.shape[2] - (x.shape[2] - 1) % 2]
    assert_matches(wf.Wavelet(True).analyze(x, is_first=True), block.output)


def test_wavelets_in_chunks_and_back():
    block = Block("dwt3d.chunked", "wfvae_blocks")
    chunks = block.input.split((1, 4, 4), dim=2)
    parts = [wf.Wavelet(True).analyze(chunk, is_first=index == 0) for index, chunk in enumerate(chunks)]
    assert [part.shape[2] for part in parts] == block.tensors["lens"].int().tolist()
    assert_matches(torch.cat(parts, dim=2), block.output)
    for name, is_first in (("first", True), ("later_chunk", False)):
        block = Block(f"idwt3d.{name}", "wfvae_blocks")
        assert_matches(wf.Wavelet(True).synthesize(block.input, is_first), block.output)
    block = Block("dwt2d", "wfvae_blocks")
    assert_matches(wf.Wavelet(False).analyze(block.input, is_first=True), block.output)
    block = Block("idwt2d", "wfvae_blocks")
    assert_matches(wf.Wavelet(False).synthesize(block.input, is_first=True), block.output)


def replace_conv(module: nn.Module, out_dim: int) -> nn.Module:
    """The recorded resampling layers change the width, which the models' never do."""
    conv: Any = module.conv
    settings = {"stride": conv.stride, "padding": conv.padding}
    module.conv = type(conv)(conv.in_channels, out_dim, conv.kernel_size, **settings)
    return module


def wf_modules() -> dict[str, tuple[nn.Module, dict[str, str]]]:
    """Per recorded layer: the module and names in its keys."""
    resnet = {"nin_shortcut.conv": "conv_shortcut", "nin_shortcut": "conv_shortcut", ".norm": "", "1.conv": "1"}
    resnet |= {"2.conv": "2"}
    attention = {
        "norm.norm": "norm",
        "proj_out": "to_out",
        "q.": "to_q.",
        "k.": "to_k.",
        "v.c": "to_v.c",
        ".conv.": ".",
    }
    return {
        "causalconv.k3s1": (wf.CausalConv3d(4, 5, 3, padding=(0, 1, 1)), {"conv.": ""}),
        "causalconv.k3s2": (wf.CausalConv3d(4, 5, 3, stride=2), {"conv.": ""}),
        "causalconv.k1": (wf.CausalConv3d(4, 5, 1), {"conv.": ""}),
        "up_thw.trilinear": (
            replace_conv(wf.WFVAETemporalUpsample(4, LAYERS["linear"]), 5),
            {"conv.conv": "conv"},
        ),
        "up_thw.nearest": (
            replace_conv(wf.WFVAETemporalUpsample(4, LAYERS["nearest"]), 5),
            {"conv.conv": "conv"},
        ),
        "up_hw": (replace_conv(wf.WFVAEUpsample(4), 5), {}),
        "down_thw": (replace_conv(wf.WFVAEDownsample(4, is_temporal=True), 5), {"conv.conv": "conv"}),
        "down_hw": (replace_conv(wf.WFVAEDownsample(4, is_temporal=False), 5), {}),
        "res3D.layernorm": (wf.WFVAEResnetBlock(6, 7, LAYERS["linear"]), resnet),
        "res2D.layernorm": (wf.WFVAEResnetBlock(6, 7, LAYERS["linear"], of_frames=True), resnet),
        "res2D.groupnorm": (wf.WFVAEResnetBlock(32, 64, GROUP_NORM, of_frames=True), resnet),
        "attn": (wf.WFVAEAttention(6, LAYERS["linear"]), attention),
    }


@pytest.mark.parametrize("name", wf_modules())
@torch.no_grad()
def test_wf_layer(name: str):
    block = Block(name, "wfvae_blocks")
    module, names = wf_modules()[name]
    block.load_into(module, **names)
    assert_matches(module(block.input), block.output)
    if "out_t1" in block.tensors:
        assert_matches(module(block.input[:, :, :1]), block.tensors["out_t1"])


# ---- IV-VAE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [1, 2, 4])
@torch.no_grad()
def test_group_causal_convolution(group_size: int):
    block = Block(f"gcconv.tc{group_size}", "ivvae_blocks")
    module = block.load_into(iv.GroupCausalConv3d(4, 5, group_size))
    cache = TemporalCache()
    cache.tails[module.name] = block.tensors["cache"]
    assert_matches(module(block.input, Chunk(is_first=False, cache=cache)), block.output)
    assert_matches(module(block.input[:, :, :1]), block.tensors["out_t1"])


@torch.no_grad()
def test_first_convolution():
    block = Block("first_conv", "ivvae_blocks")
    module = block.load_into(iv.BranchConv3d(3, 4, 3, group_size=4, design=DESIGN))
    cache = TemporalCache()
    cache.tails[module.conv_3d.name] = block.tensors["cache"]
    assert_matches(module(block.input, Chunk(is_first=False, cache=cache)), block.output)


def iv_modules() -> dict[str, tuple[nn.Module, dict[str, str]]]:
    resample = {"resample_2d.1": "conv_2d", "resample_3d.1": "conv_3d"}
    attention = {"Attention": "attention", "gamma": "weight", "proj": "to_out"}
    return {
        "resample.downsample2d": (iv.IVVAEDownsample(4, is_temporal=False, design=DESIGN), resample),
        "resample.downsample3d": (iv.IVVAEDownsample(4, is_temporal=True, design=DESIGN), resample),
        "resample.upsample2d": (iv.IVVAEUpsample(4, is_temporal=False, design=DESIGN), resample),
        "resample.upsample3d": (iv.IVVAEUpsample(4, is_temporal=True, design=DESIGN), resample),
        "sep_attn": (iv.IVVAEAttention(6, DESIGN), attention),
        "sep_conv_k1": (iv.BranchConv3d(8, 6, 1, group_size=1, design=DESIGN), {}),
    }


@pytest.mark.parametrize("name", iv_modules())
@torch.no_grad()
def test_iv_layer(name: str):
    block = Block(name, "ivvae_blocks")
    module, names = iv_modules()[name]
    block.load_into(module, **names)
    assert_matches(module(block.input, Chunk(is_first=False)), block.output)
    if "out_first_frame" in block.tensors:
        actual = module(block.input[:, :, :1])
        assert_matches(actual, block.tensors["out_first_frame"])


@torch.no_grad()
def test_norm_and_pyramid():
    block = Block("sep_rms", "ivvae_blocks")
    assert_matches(block.load_into(iv.BranchRMSNorm(5, num_branches=2), gamma="weight")(block.input), block.output)
    block = Block("pac", "ivvae_blocks")
    module = block.load_into(
        iv.PyramidConv2d(5, 3, num_branches=2), **{"PAC_conv.conv": "merge", "PAC_": "convs.", ".conv.": "."}
    )
    assert_matches(module(block.input), block.output)
    assert all(isinstance(conv, FrameConv2d) for conv in module.convs.values())

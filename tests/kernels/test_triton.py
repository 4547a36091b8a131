"""Triton kernels against their reference in float64: on a GPU, or under `TRITON_INTERPRET=1` on the CPU.

Without either every test here is skipped; `test_kernels.py` runs them under the interpreter.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diffusers_leanvae import kernels
from diffusers_leanvae.kernels import eager
from diffusers_leanvae.kernels.cuda_graphs import GraphedFunction
from diffusers_leanvae.models.temporal_cache import TemporalCache


IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Of outputs below 8: the rounding of the output, and that of sums in float32. The interpreter cuts bfloat16 off.
ATOL = {torch.float32: 3e-6, torch.bfloat16: 2**-5, torch.float16: 2**-8}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("triton", reason="Triton is not installed")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


def arguments(
    shape: tuple[int, ...], tail: bool, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Any]:
    """Arguments of `depthwise_conv_residual_norm`, such that its outputs are of order 1."""
    g, c = torch.Generator().manual_seed(0), shape[-1]
    given = {
        "hidden_states": torch.randn(shape, generator=g),
        "tail": torch.randn(shape[0], 2, *shape[2:], generator=g) if tail else None,
        "weight": torch.randn(c, 1, 3, 3, 3, generator=g) / 8,
        "bias": torch.randn(c, generator=g) / 4,
        "norm_weight": torch.rand(c, generator=g) + 0.5,
        "norm_bias": torch.randn(c, generator=g) / 4,
    }
    return {name: None if x is None else x.to(device, dtype) for name, x in given.items()}


def assert_parity(given: dict[str, Any], residual: bool = True) -> None:
    outputs = kernels.get("triton").depthwise_conv_residual_norm(**given, residual=residual)
    exact: dict[str, Any] = {name: None if x is None else x.cpu().double() for name, x in given.items()}
    references = eager.depthwise_conv_residual_norm(**exact, residual=residual)
    hidden_states = given["hidden_states"]
    for output, reference in zip(outputs, references, strict=True):
        assert output.dtype == hidden_states.dtype and output.is_contiguous() and 1 < reference.abs().max() < 8
        torch.testing.assert_close(output.cpu().double(), reference, rtol=0, atol=ATOL[output.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, tail, residual",
    [
        ((1, 1, 2, 5, 24), True, True),  # the first chunk of a stream, an image
        ((2, 3, 1, 3, 24), True, False),
        ((1, 9, 1, 1, 128), True, True),  # several programs along time
        ((1, 2, 1, 3, 384), False, False),  # no power of two
        ((1, 5, 1, 3, 512), False, True),
    ],
)
def test_convolution(shape: tuple[int, ...], tail: bool, residual: bool, dtype: torch.dtype, device: str):
    assert_parity(arguments(shape, tail, dtype, device), residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.gpu
def test_convolution_of_full_size(dtype: torch.dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    cases = [((1, steps, 64, 64, 512), True) for steps in (1, 4, 5, 17)]  # each of the tuned forms
    for shape, tail in (*cases, ((1, 5, 135, 240, 384), False)):  # and a large frame
        given = arguments(shape, tail, dtype, "cuda")
        given |= {name: given[name] * 0.75 for name in ("norm_weight", "norm_bias")}  # so many stay below 8
        assert_parity(given)


def test_rows_one_after_the_other(device: str, monkeypatch: pytest.MonkeyPatch):
    kernels.get("triton")
    monkeypatch.setattr("diffusers_leanvae.kernels.triton_conv.LARGE_FRAME", 0)
    assert_parity(arguments((1, 1, 5, 3, 24), True, device=device))


def test_chunks_are_the_whole(device: str):
    operation = kernels.get("triton").depthwise_conv_residual_norm
    given = arguments((1, 7, 1, 3, 24), False, device=device)
    tokens = given.pop("hidden_states")
    whole = operation(tokens, **given)
    parts = []
    for chunk, tail in ((tokens[:, :2], None), (tokens[:, 2:3], tokens[:, :2]), (tokens[:, 3:], tokens[:, 1:3])):
        parts.append(operation(chunk, **given | {"tail": tail}))
    for output, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(pieces, dim=1), output, rtol=0, atol=1e-6)


def test_layouts(device: str):
    given = arguments((1, 2, 2, 3, 24), True, device=device)  # several rows and steps: their strides differ
    tokens, weight = given["hidden_states"], given["weight"]
    packed = kernels.get("triton").pack_weight(weight)
    assert packed.stride(0) == 1 and torch.equal(packed, weight)
    assert_parity(given | {"weight": packed})
    # One of two branches, and the zeros without memory that start a stream.
    assert_parity(given | {"hidden_states": torch.cat((tokens, tokens), dim=-1)[..., 24:]})
    assert_parity(given | {"tail": tokens.new_zeros(()).expand(1, 2, 2, 3, 24)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(13, 1365), (9, 1376), (33, 21), (1, 8)])
def test_gate(shape: tuple[int, int], dtype: torch.dtype, device: str):
    torch.manual_seed(2)
    projected = torch.randn(shape[0], 2 * shape[1]).clamp(-3.5, 3.5).to(device, dtype)
    output = kernels.get("triton").gated_gelu(projected)
    reference = eager.gated_gelu(projected.cpu().double())
    atol = {torch.float32: 3e-6, torch.bfloat16: 2**-4, torch.float16: 2**-7}[dtype]
    assert output.shape == shape and output.dtype == dtype and 0.5 < reference.abs().max() < 16
    torch.testing.assert_close(output.cpu().double(), reference, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "num_tokens, channels, inner_dim",
    [
        (37, 48, 40),  # tiles that stick out on every side
        (1, 8, 8),
        (5, 12, 7),  # not for tensor descriptors
    ],
)
def test_gated_projection(num_tokens: int, channels: int, inner_dim: int, dtype: torch.dtype, device: str):
    assert_gated_parity(num_tokens, channels, inner_dim, dtype, device)


def test_the_gelu_of_the_gated_projection(device: str):
    if device == "cuda":
        pytest.skip("the product of a GPU would round more than the polynomial errs")
    kernels.get("triton")
    gates = torch.linspace(-9, 9, 1501)
    tokens = F.pad(torch.stack((torch.ones_like(gates), gates), dim=1), (0, 6))  # values of 1
    output = kernels.triton_gated._launch(tokens, torch.eye(16, 8))[:, 0]  # type: ignore[attr-defined]
    reference = F.gelu(gates.double())
    torch.testing.assert_close(output.double(), reference, rtol=1e-6, atol=5e-7)
    tail = (gates > -4) & (gates < -0.1)
    torch.testing.assert_close(output[tail].double(), reference[tail], rtol=1.5e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens, channels, inner_dim", [(20_480, 512, 1376), (300, 384, 1024), (5120, 128, 352)])
@pytest.mark.gpu
def test_gated_projection_of_full_size(num_tokens: int, channels: int, inner_dim: int, dtype: torch.dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    assert_gated_parity(num_tokens, channels, inner_dim, dtype, "cuda")


def assert_gated_parity(num_tokens: int, channels: int, inner_dim: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(num_tokens, channels).to(device, dtype)
    weight = torch.randn(2 * inner_dim, channels).mul(channels**-0.5).to(device, dtype)
    output = kernels.get("triton").gated_projection(tokens, weight)
    reference = eager.gated_projection(tokens.cpu().double(), weight.cpu().double())
    assert output.shape == (num_tokens, inner_dim) and output.dtype == dtype and reference.std() > 0.2
    error = (output.cpu().double() - reference).norm() / reference.norm()
    # Rounding to nearest is a third of this; the interpreter cuts bfloat16 off.
    assert error < {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.25, -0.25])  # it is learned, nothing keeps it positive
def test_threshold(threshold: float, dtype: torch.dtype, device: str):
    torch.manual_seed(0)
    x = torch.randn(3, 7, 131).to(device, dtype)
    x.view(-1)[:3] = torch.tensor([0.0, torch.nan, -torch.inf])
    expected = eager.soft_threshold_(x.cpu().double(), torch.tensor(threshold))
    result = kernels.get("triton").soft_threshold_(x, torch.tensor([threshold], device=device))
    assert result is x
    atol = {torch.float32: 3e-7, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    torch.testing.assert_close(x.cpu().double(), expected, rtol=0, atol=atol, equal_nan=True)


def test_compiles_as_one_graph(device: str):
    operations = kernels.get("triton")
    given = arguments((1, 1, 1, 2, 24), True, device=device)
    threshold, up = torch.tensor([0.1], device=device), torch.randn(24, 24, device=device) / 5

    def block(**given: torch.Tensor) -> torch.Tensor:
        output, normed = operations.depthwise_conv_residual_norm(**given)
        hidden = operations.gated_gelu(normed.flatten(0, 3)) + operations.gated_projection(normed.flatten(0, 3), up)
        return output.flatten(0, 3)[:, :12] + operations.soft_threshold_(hidden, threshold)

    torch.compiler.reset()
    backend = "aot_eager" if device == "cpu" else "inductor"  # the interpreter runs within no compiled code
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend=backend)(**given)
        torch.testing.assert_close(compiled, block(**given), rtol=0, atol=1e-6)


def test_operations_keep_their_schema(device: str):
    kernels.get("triton")
    operations = torch.ops.diffusers_leanvae
    with torch.no_grad():
        given = arguments((1, 1, 1, 2, 24), True, device=device)
        torch.library.opcheck(operations.depthwise_conv_residual_norm.default, (*given.values(), 1e-5, True))
        torch.library.opcheck(operations.gated_gelu.default, (torch.randn(3, 8, device=device),))
        tokens, weight = torch.randn(9, 16, device=device).half(), torch.randn(16, 16, device=device).half()
        torch.library.opcheck(operations.gated_projection.default, (tokens, weight))
        x = torch.randn(3, 8, device=device)
        torch.library.opcheck(operations.soft_threshold_.default, (x, torch.tensor([0.1], device=device)))


def test_what_is_refused(device: str):
    operations = kernels.get("triton")
    given = arguments((1, 2, 2, 3, 24), True, device=device)
    tokens = given["hidden_states"]
    for change, message in (
        ({"hidden_states": tokens.clone().requires_grad_()}, "`hidden_states` must not require gradients"),
        ({"bias": torch.zeros(24, device=device).bfloat16()}, "`bias` must be torch.float32 as `hidden_states` is"),
        ({"norm_bias": torch.zeros(24, device="meta")}, "`norm_bias` must be on .* as `hidden_states` is, got 'meta'"),
        ({"hidden_states": tokens.mT.contiguous().mT}, "`hidden_states` must have adjacent channels"),
        ({"tail": torch.zeros(1, 1, 2, 3, 24, device=device)}, r"`tail` must have the shape \(1, 2, 2, 3, 24\)"),
    ):
        with pytest.raises(ValueError, match=message):
            operations.depthwise_conv_residual_norm(**given | change)
    with pytest.raises(ValueError, match="`hidden_states` must be float32, bfloat16 or float16"):
        operations.soft_threshold_(torch.zeros(3, device=device).double(), torch.zeros(1, device=device))
    with pytest.raises(ValueError, match="`projected` must be contiguous"):
        operations.gated_gelu(torch.zeros(8, 4, device=device).t())
    tokens = torch.zeros(3, 8, device=device)
    for weight, message in (
        (torch.zeros(16, 9, device=device), r"`weight` must be \(2 \* inner, 8\) .* got \(16, 9\)"),
        (torch.zeros(8, 16, device=device).t(), "`weight` must be contiguous"),
        (torch.zeros(16, 8, device=device).half(), "`weight` must be torch.float32 as `hidden_states` is"),
    ):
        with pytest.raises(ValueError, match=message):
            operations.gated_projection(tokens, weight)


@pytest.mark.gpu
def test_cuda_graph():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    operations = kernels.get("triton")
    given = arguments((1, 5, 32, 32, 128), False, torch.bfloat16, "cuda")
    tokens = given.pop("hidden_states")
    graphed = GraphedFunction(lambda x: operations.depthwise_conv_residual_norm(x, **given), tokens)
    for scale in (1.0, -0.5):
        outputs = graphed(tokens * scale)
        for output, expected in zip(
            outputs, operations.depthwise_conv_residual_norm(tokens * scale, **given), strict=True
        ):
            torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert not torch.equal(outputs[0], graphed(tokens)[0])  # the caller's own, not overwritten
    with pytest.raises(ValueError, match="`inputs` must be as recorded"):
        graphed(tokens[:, :1])
    with pytest.raises(ValueError, match="`function` must return a tensor or a tuple of tensors, got NoneType"):
        GraphedFunction(lambda x: None, tokens)


def test_a_fused_model_streams_through_the_kernels(device: str, make_model: Callable, make_video: Callable):
    vae = make_model(num_fusion_layers=1, num_ista_iterations=2).to(device)
    video = make_video(1, 3, 5, 8, 16).to(device)
    with torch.no_grad():
        moments = vae.encode(video).latent_dist.parameters
        latents = moments.chunk(2, dim=1)[0]
        sample = vae.decode(latents).sample
        vae.fuse(kernels="triton")
        cache = TemporalCache()
        parts = [vae.encode(part, cache=cache).latent_dist.parameters for part in video.split((1, 4), dim=2)]
        fused = vae.decode(latents).sample
    for actual, expected in ((torch.cat(parts, dim=2), moments), (fused, sample)):
        assert expected.std() > 0.1
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))

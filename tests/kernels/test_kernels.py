"""The reference of the kernels against the model, what they refuse, and that they compile for GPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from diffusers_leanvae import kernels
from diffusers_leanvae.kernels import eager
from diffusers_leanvae.kernels.cuda_graphs import GraphedFunction
from diffusers_leanvae.models.leanvae_blocks import LeanVAEBlock
from diffusers_leanvae.models.temporal_cache import TemporalCache, chunks


def arguments(c: int = 8, t: int = 3) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, t, 3, 5, c, generator=g),
        "tail": torch.randn(2, 2, 3, 5, c, generator=g),
        "weight": torch.randn(c, 1, 3, 3, 3, generator=g),
        "bias": torch.randn(c, generator=g),
        "norm_weight": torch.randn(c, generator=g),
        "norm_bias": torch.randn(c, generator=g),
    }


@pytest.mark.parametrize("residual", [True, False])
def test_reference_is_the_block_of_the_model(residual: bool):
    torch.manual_seed(0)
    block = LeanVAEBlock(8, residual).double()
    torch.nn.init.normal_(block.ff.norm.weight)
    torch.nn.init.normal_(block.ff.norm.bias)
    tokens = torch.randn(2, 5, 3, 4, 8, dtype=torch.float64)
    cache, tail = TemporalCache(), None
    operations = kernels.get("eager")
    with torch.no_grad():
        for start, stop, state in chunks(cache, [(0, 2), (2, 5)], is_first=True, is_last=True):
            chunk = tokens[:, start:stop]
            expected = block(chunk.clone(), state)
            output, normed = operations.depthwise_conv_residual_norm(
                chunk,
                tail,
                block.conv.weight,
                block.conv.bias,
                block.ff.norm.weight,
                block.ff.norm.bias,
                1e-5,
                residual,
            )
            alternating = block.ff.up_proj.weight.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
            gated = operations.gated_projection(normed.flatten(0, 3), alternating)
            change = F.linear(gated, block.ff.down_proj.weight).view_as(output)
            torch.testing.assert_close(output + change if residual else change, expected, rtol=0, atol=1e-12)
            tail = chunk[:, -2:]


def test_reference_of_the_threshold():
    x = torch.tensor([-2.0, -0.5, 0.0, 0.25, 3.0])
    assert eager.soft_threshold_(x, torch.tensor([0.5])).tolist() == [-1.5, 0.0, 0.0, 0.0, 2.5]
    assert x[0] == -1.5  # in place


@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 2**-5), (torch.float16, 2**-8)])
def test_reference_rounds_once(dtype: torch.dtype, atol: float):
    given = {name: x.to(dtype) for name, x in arguments().items()}
    outputs = eager.depthwise_conv_residual_norm(**given)
    exact = eager.depthwise_conv_residual_norm(**{name: x.double() for name, x in given.items()})
    for output, reference in zip(outputs, exact, strict=True):
        assert output.dtype == dtype and reference.abs().max() < 32
        torch.testing.assert_close(output.double(), reference, rtol=0, atol=2.01 * atol)  # and float32 before


@pytest.mark.parametrize(
    "name, shape",
    [
        ("hidden_states", (3, 5, 8)),
        ("tail", (2, 1, 3, 5, 8)),
        ("weight", (8, 27)),
        ("bias", (7,)),
        ("norm_bias", (1, 8)),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        given: dict[str, Any] = arguments() | {name: torch.zeros(shape)}
        eager.depthwise_conv_residual_norm(**given)


def test_what_else_is_refused():
    with pytest.raises(ValueError, match="`implementation` must be one of 'eager', 'triton', got 'cuda'"):
        kernels.get("cuda")
    with pytest.raises(ValueError, match="`projected` must be a non-empty"):
        eager.gated_gelu(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="`hidden_states` must be non-empty"):
        eager.gated_projection(torch.zeros(0, 5), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="`threshold` must have one element"):
        eager.soft_threshold_(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"`examples` must be tensors on a CUDA device, at least one, got \['cpu'\]"):
        GraphedFunction(torch.neg, torch.zeros(3))


def test_triton_kernels_want_a_gpu():
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.raises(ValueError, match="`hidden_states` must be on a GPU for a Triton kernel, got 'cpu'"):
        kernels.get("triton").depthwise_conv_residual_norm(**arguments())


def test_parity_under_the_interpreter():
    # In a process of its own: with this variable Triton's functions are others, also for PyTorch's compiler.
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu"]
    result = subprocess.run(
        [*command, str(Path(__file__).with_name("test_triton.py"))],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\b\d+ passed", result.stdout) and "skipped" not in result.stdout, result.stdout


@pytest.mark.parametrize(
    "backend, architecture, binary", [("cuda", 80, "cubin"), ("cuda", 90, "cubin"), ("hip", "gfx942", "hsaco")]
)  # A100, H100, MI300
@pytest.mark.parametrize(
    "kernel, constants",
    [
        ("triton_conv._conv_norm_kernel", {"CHANNELS": 24, "BLOCK_C": 32, "BLOCK_W": 32, "STEPS": 2, "MAX_STEPS": 4}),
        ("triton_pointwise._gated_gelu_kernel", {"BLOCK_N": 8, "BLOCK_I": 256}),
        ("triton_pointwise._soft_threshold_kernel", {"BLOCK": 2048}),
        ("triton_gated._gated_projection_kernel", {"CHANNELS": 512, "GROUP": 8, "UPCAST": False}),
    ],
)
def test_compiles_for_a_gpu(
    kernel: str,
    constants: dict[str, int],
    backend: str,
    architecture: int | str,
    binary: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    # The compiler is stricter than the interpreter: of types above all.
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels.get("triton")
    module, _, name = kernel.partition(".")
    function = getattr(getattr(kernels, module), name)
    while not isinstance(function, triton.JITFunction):  # below tuning and heuristics
        function = function.fn
    if module == "triton_conv":
        constants = constants | {"HAS_TAIL": True, "RESIDUAL": True, "ROWS": 4}
    kinds = {argument: "*bf16" if argument.endswith("_ptr") else "i32" for argument in function.arg_names}
    if module == "triton_gated":
        rows, columns, depth = (128, 256, 64) if architecture == 90 else (128, 128, 32)
        constants = constants | {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth}
        blocks = {"hidden_states": [rows, depth], "weight": [columns, depth], "output": [rows, columns // 2]}
        kinds |= {name: f"tensordesc<bf16{block}>" for name, block in blocks.items()}
    kinds |= {argument: "constexpr" for argument in constants} | ({"eps": "fp32"} if "eps" in kinds else {})
    target = GPUTarget(backend, architecture, 64 if backend == "hip" else 32)
    compiled = triton.compile(ASTSource(function, kinds, constants), target=target)
    assert len(compiled.asm[binary]) > 1000

"""The C++ between the products of a slab computes what `kernels/eager.py` does, on every kind of processor."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny import make_tiny

from diffusers_leanvae.kernels import eager, slabs
from diffusers_leanvae.kernels.slabs import DepthwiseParameters, SlabKernels, pack_taps


# Of the largest value. Measured: 2.6e-7 and 3.7e-3, where half a unit in the last place is 3.9e-3.
TOLERANCES = {torch.float32: 5e-7, torch.bfloat16: 4e-3}


@pytest.fixture
def kernels() -> SlabKernels:
    if slabs.find_compiler() is None:
        pytest.skip("there is no C++ compiler here")
    kernels = slabs.load()
    assert kernels is not None
    return kernels


def make_parameters(channels: int, has_residual: bool) -> tuple[torch.Tensor, DepthwiseParameters]:
    weight, bias, norm_weight, norm_bias = (torch.randn(channels, *rest) for rest in ((1, 3, 3, 3), (), (), ()))
    return weight, DepthwiseParameters(pack_taps(weight), bias, norm_weight, norm_bias, 1e-5, has_residual)


def convolve(
    kernels: SlabKernels,
    tokens: torch.Tensor,
    tail: torch.Tensor | None,
    slab: tuple[int, int, int, int],
    parameters: DepthwiseParameters,
    dtype: torch.dtype,
    above: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    start, stop, top, bottom = slab
    shape = (stop - start, bottom - top, *tokens.shape[2:])
    convolved, normed = torch.full(shape, math.nan), torch.full(shape, math.nan, dtype=dtype)
    channels = tokens.shape[-1]
    kernels.convolve_and_normalize(
        tokens, tail, above, slab, parameters, convolved.view(-1, channels), normed.view(-1, channels)
    )
    return convolved, normed


# Widths take every path: blocks of eight and four outputs and single ones, and both borders in one block.
@pytest.mark.parametrize("width", [1, 3, 4, 5, 8, 16, 21])
@pytest.mark.parametrize("has_tail", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
def test_convolution_and_norm(
    kernels: SlabKernels, width: int, has_tail: bool, has_residual: bool, dtypes: tuple[torch.dtype, torch.dtype]
):
    torch.manual_seed(0)
    num_steps, height, channels = 4, 5, 48
    tokens = torch.randn(num_steps, height, width, channels).to(dtypes[0])
    tail = torch.randn(2, height, width, channels).to(dtypes[0]) if has_tail else None
    weight, parameters = make_parameters(channels, has_residual)
    expected = eager.depthwise_conv_residual_norm(
        tokens[None].double(),
        None if tail is None else tail[None].double(),
        *(tensor.double() for tensor in (weight, *parameters[1:4])),
        parameters.eps,
        has_residual,
    )
    for slab in ((0, 4, 0, 5), (1, 2, 1, 3), (0, 1, 0, 2), (3, 4, 4, 5), (2, 4, 0, 5)):
        start, stop, top, bottom = slab
        actual = convolve(kernels, tokens, tail, slab, parameters, dtypes[1])
        for kind, dtype, got, right in zip(
            ("convolved", "normed"), (torch.float32, dtypes[1]), actual, expected, strict=True
        ):
            right = right[0, start:stop, top:bottom]
            error = (got.double() - right).abs().max() / right.abs().max()
            assert error < TOLERANCES[dtype], (kind, slab, error.item())


def test_the_row_above_is_the_one_that_is_given(kernels: SlabKernels):
    torch.manual_seed(0)
    tokens = torch.randn(2, 6, 7, 32)
    _, parameters = make_parameters(32, True)
    slab = (1, 2, 3, 5)
    expected = convolve(kernels, tokens, None, slab, parameters, torch.float32)
    overwritten = tokens.clone()
    above, overwritten[1, 2] = tokens[1, 2].clone(), math.nan
    actual = convolve(kernels, overwritten, None, slab, parameters, torch.float32, above)
    for got, right in zip(actual, expected, strict=True):
        assert torch.equal(got, right)


def test_gelu(kernels: SlabKernels):
    gate = torch.cat(
        (torch.linspace(-12, 12, 16 * 4096 - 16), torch.tensor([0.0, -0.0, 1e30, -1e30, math.inf, math.nan]))
    )
    gate = torch.cat((gate, torch.randn(10) * 1e-6))
    value = torch.ones_like(gate)
    assert kernels.multiply_by_gelu_(value, gate) is value
    right = gate.double() * 0.5 * torch.erfc(-gate.double() / math.sqrt(2))
    is_finite = torch.isfinite(right) & (gate.abs() < 1e29)
    error = (value.double() - right).abs()[is_finite] / gate.double().abs()[is_finite].clamp(min=1e-30)
    assert 0 < error.max() < 1.5e-7  # of the share of the normal distribution; measured: 8.9e-8
    assert value[gate == 1e30].item() == pytest.approx(1e30) and value[gate == -1e30].item() == 0
    assert value[gate == math.inf].item() == math.inf and value[gate.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", slabs.DTYPES)
def test_gate(kernels: SlabKernels, dtype: torch.dtype):
    torch.manual_seed(0)
    value, gate = torch.randn(37, 96).to(dtype), 3 * torch.randn(37, 96).to(dtype)
    right = value.double() * torch.nn.functional.gelu(gate.double())
    actual, untouched = value.clone(), gate.clone()
    kernels.multiply_by_gelu_(actual, gate)
    assert (actual.double() - right).abs().max() / right.abs().max() < TOLERANCES[dtype] / 2  # measured: 4e-8, 1.6e-3
    assert torch.equal(gate, untouched)


@pytest.mark.parametrize("base_dtype", [None, *slabs.DTYPES])
@pytest.mark.parametrize("product_dtype", slabs.DTYPES)
@pytest.mark.parametrize("dtype", slabs.DTYPES)
@pytest.mark.parametrize("threshold", [None, 0.0, 0.3, -0.2])
def test_sum(
    kernels: SlabKernels,
    base_dtype: torch.dtype | None,
    product_dtype: torch.dtype,
    dtype: torch.dtype,
    threshold: float | None,
):
    torch.manual_seed(0)
    product = torch.randn(5, 32).to(product_dtype)
    product[0, :3] = torch.tensor([0.0, -0.0, math.inf])
    base = None if base_dtype is None else torch.randn(5, 32).to(base_dtype)
    if base is not None:
        base[0, :2] = 0
    right = product.float() + (0 if base is None else base.float())
    if threshold is not None:
        right = eager.soft_threshold_(right, torch.tensor([threshold]))
    out = torch.full((5, 32), math.nan, dtype=dtype)
    kernels.add(base, product, out, threshold)
    assert torch.equal(out, right.to(dtype))
    if base is not None and base_dtype == dtype:
        kernels.add(base, product, base, threshold)  # in place
        assert torch.equal(base, out)


def test_rounding_to_bfloat16_is_that_of_pytorch(kernels: SlabKernels):
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(1 << 16) * 65536 + 32768 - 2**31).to(torch.int32)
    special = torch.tensor(
        [0x7FFFFFFF, -1, 0x7F7FFFFF, 0x7F800000, 1, 0, 0x7F800001, 0x7FC00000] * 2, dtype=torch.int32
    )
    x = torch.cat((bits, ties, special)).view(torch.float32)
    out = torch.empty(len(x), dtype=torch.bfloat16)
    kernels.add(None, x, out)
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out[~x.isnan()].view(torch.int16), x.to(torch.bfloat16)[~x.isnan()].view(torch.int16))


def test_tensors_that_the_kernels_cannot_read(kernels: SlabKernels):
    x = torch.randn(32, 32)
    for wrong in (x.t(), x.double(), x.to("meta")):
        with pytest.raises(ValueError, match="Slabs must be contiguous float32 or bfloat16 tensors on the CPU, got"):
            kernels.multiply_by_gelu_(wrong, wrong)
    for wrong in (x.bfloat16(), x[:16]):
        with pytest.raises(ValueError, match="`gate` must hold 1024 values of torch.float32 to fit the other tensors"):
            kernels.multiply_by_gelu_(x, wrong)
    with pytest.raises(ValueError, match="`product` must hold 1024 values .*, got 512 of torch.float32"):
        kernels.add(None, x[:16], x)
    with pytest.raises(ValueError, match="`base` must hold 1024 values .*, got 512 of torch.bfloat16"):
        kernels.add(x[:16].bfloat16(), x, x)
    tokens, rows = torch.randn(1, 4, 4, 16), torch.empty(16, 16)
    _, parameters = make_parameters(16, True)
    for name, tail, above, convolved, normed in (
        ("tail", torch.randn(2, 4, 4, 16).bfloat16(), None, rows, rows),
        ("tail", torch.randn(1, 4, 4, 16), None, rows, rows),
        ("above", None, torch.randn(4, 16).bfloat16(), rows, rows),
        ("convolved", None, None, rows.bfloat16(), rows),
        ("normed", None, None, rows, rows[:8]),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must hold"):
            kernels.convolve_and_normalize(tokens, tail, above, (0, 1, 0, 4), parameters, convolved, normed)


# PyTorch itself says what a processor can do, and may be told to say less.
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_lesser_processors(tmp_path: Path, capability: str):
    if slabs.find_compiler() is None:
        pytest.skip("there is no C++ compiler here")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no vectors that could be left unused")
    own = Path(__file__)
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    tests = [f"{own}::test_{name}" for name in ("convolution_and_norm", "gelu", "gate", "sum")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and " skipped" not in result.stdout, result.stdout[-3000:]
    assert len(list((tmp_path / "diffusers_leanvae").glob("slabs-*.so"))) == 1


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`slabs.load`, without what it remembers, and with a folder of its own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(slabs, "_load", slabs._load.__wrapped__)
    return slabs.load


def test_what_was_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load):
    if slabs.find_compiler() is None:
        pytest.skip("there is no C++ compiler here")
    assert isinstance(load(), SlabKernels)
    files = list((tmp_path / "extensions" / "diffusers_leanvae").iterdir())
    assert [file.suffix for file in files] == [".so"]
    monkeypatch.setattr(slabs.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert isinstance(load(), SlabKernels)
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["there-is-no-such-compiler", " "])
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, load, name: str):
    monkeypatch.setenv("CXX", name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load() is None


def make_script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(os.name != "posix", reason="the compiler here is a shell script")
@pytest.mark.parametrize(
    "script, reason",
    [
        ("echo 'fatal: no such thing' >&2; exit 1", "fatal: no such thing"),
        ('while [ "$1" != -o ]; do shift; done; echo nothing > "$2"', "file too short|invalid ELF header"),
        ("exit 0", "No such file"),
    ],
    ids=["fails", "makes_no_library", "makes_nothing"],
)
def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load, script: str, reason: str):
    monkeypatch.setenv("CXX", make_script(tmp_path / "compiler", script))
    with pytest.warns(UserWarning, match=rf"^`fuse` goes on without kernels in C\+\+: .*compiler .*({reason})"):
        assert load() is None


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load):
    if slabs.find_compiler() is None:
        pytest.skip("there is no C++ compiler here")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="Not a directory.*the folder that `TORCH_EXTENSIONS_DIR` names"):
        assert load() is None


def test_a_compiler_that_is_named_wrong(monkeypatch: pytest.MonkeyPatch, load):
    monkeypatch.setenv("CXX", 'g++ "')
    with pytest.warns(UserWarning, match="No closing quotation"):
        assert load() is None


def test_it_is_tried_again_with_another_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if slabs.find_compiler() is None:
        pytest.skip("there is no C++ compiler here")
    monkeypatch.setenv("CXX", make_script(tmp_path / "compiler", "exit 1"))
    vae = make_tiny("leanvae", torch.float32)
    with pytest.warns(UserWarning, match="goes on without") as warned:
        vae.fuse()
        vae.fuse()
    assert [Path(warning.filename) for warning in warned] == [Path(__file__)]  # once, and with the line of the caller
    with pytest.raises(ValueError, match="`kernels` must not be 'cpp' without a C.. compiler .*compiler on Linux"):
        vae.fuse("cpp")
    monkeypatch.delenv("CXX")
    vae.fuse("cpp")

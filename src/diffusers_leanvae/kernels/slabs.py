"""What lies between the matrix products of a block of LeanVAE on CPUs, in C++ that is compiled on first use.

PyTorch takes a pass over memory for each operation, and in 16 bits conversions besides; here convolution, residual and
LayerNorm are one pass, the gate is one, and so is the sum at the end. `slabs.cpp` is compiled once on a machine, in
seconds, and kept where PyTorch keeps compiled extensions: in `TORCH_EXTENSIONS_DIR`, by default
`~/.cache/torch_extensions`. There is neither Python nor PyTorch in it, so it is called through `ctypes`, and takes a
compiler only; `torch.utils.cpp_extension` would need ninja and half a minute for PyTorch's headers.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..atomic import replace_file


SOURCE = Path(__file__).with_name("slabs.cpp")
CHANNEL_MULTIPLE = 16  # whole vectors on every processor
DTYPES = (torch.float32, torch.bfloat16)
_SECONDS_TO_COMPILE = 120
# What PyTorch's own kernels are compiled with. Not `-march=native`: a home folder may be shared by unlike machines.
_FLAGS_OF_CAPABILITY = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}
_LOCK = threading.Lock()
_FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC", "-w"]


class DepthwiseParameters(NamedTuple):
    """Parameters of a depthwise convolution and of the LayerNorm of its output, all float32.

    Attributes:
        taps: Of [`pack_taps`], `(channels / 16, 27, 16)`.
        bias, norm_weight, norm_bias: `(channels,)` each.
        eps: Of the LayerNorm.
        has_residual: Whether the tokens are added to their convolution.
    """

    taps: torch.Tensor
    bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    eps: float
    has_residual: bool


class SlabKernels:
    """The compiled operations; get them from [`load`].

    Tensors are contiguous, on the CPU and of one of `DTYPES`, and rows are multiples of `CHANNEL_MULTIPLE`. All is
    computed in float32, and rounded once.

    Raises:
        ValueError: Of every operation, if a tensor is not so, or does not fit the others.
    """

    def __init__(self, library: ctypes.CDLL):
        pointer, integer, size, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
        self._convolve_and_normalize = library.leanvae_convolve_and_normalize
        self._convolve_and_normalize.argtypes = (
            [pointer] * 3 + [integer] + [pointer] * 5 + [real, integer] + [pointer] * 2 + [integer] * 2
        )
        self._multiply_by_gelu = library.leanvae_multiply_by_gelu
        self._multiply_by_gelu.argtypes = [pointer, pointer, integer, size, integer]
        self._add = library.leanvae_add
        self._add.argtypes = [pointer, integer] * 2 + [pointer, pointer, integer, size, integer]
        for function in (self._convolve_and_normalize, self._multiply_by_gelu, self._add):
            function.restype = None

    def convolve_and_normalize(
        self,
        frames: torch.Tensor,
        tail: torch.Tensor | None,
        above: torch.Tensor | None,
        slab: Sequence[int],
        parameters: DepthwiseParameters,
        convolved: torch.Tensor,
        normed: torch.Tensor,
    ) -> None:
        """Causal depthwise 3x3x3 convolution of a slab, zero-padded in space, and the LayerNorm of its output.

        Args:
            frames: Tokens `(time, height, width, channels)`.
            tail: The two time steps before them, `(2, height, width, channels)`, of the same dtype; `None` for zeros.
            above: The row above the slab where `frames` has another by now, `(width, channels)`, of the same dtype; or
                `None`.
            slab: `(start, stop, top, bottom)`: of what [`eager.depthwise_conv_residual_norm`] returns for all tokens,
                `[start:stop, top:bottom]` is computed.
            convolved: Takes the convolution, with the residual if there is one: `(num_tokens, channels)`, float32.
            normed: Takes its LayerNorm, `(num_tokens, channels)`.
        """
        start, stop, top, bottom = slab
        _, height, width, channels = frames.shape
        num_values = (stop - start) * (bottom - top) * width * channels
        _check("tail", tail, 2 * height * width * channels, frames.dtype)
        _check("above", above, width * channels, frames.dtype)
        _check("convolved", convolved, num_values, torch.float32)
        _check("normed", normed, num_values)
        size = (ctypes.c_int64 * 7)(height, width, channels, *slab)
        self._convolve_and_normalize(
            _pointer(frames),
            _pointer(tail),
            _pointer(above),
            _is_bfloat16(frames),
            size,
            *map(_pointer, parameters[:4]),
            parameters.eps,
            parameters.has_residual,
            _pointer(convolved),
            _pointer(normed),
            _is_bfloat16(normed),
            torch.get_num_threads(),
        )

    def multiply_by_gelu_(self, value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """`value * gelu(gate)`, of the exact gelu, into `value`, which is returned; both of one shape and dtype."""
        _check("gate", gate, value.numel(), value.dtype)
        arguments = _is_bfloat16(value), value.numel(), torch.get_num_threads()
        self._multiply_by_gelu(_pointer(gate), _pointer(value), *arguments)
        return value

    def add(
        self, base: torch.Tensor | None, product: torch.Tensor, out: torch.Tensor, threshold: float | None = None
    ) -> None:
        """Sum of `base`, if any, and `product` into `out`, all of one shape and each of its dtype.

        [`eager.soft_threshold_`] is applied to the sum if there is a threshold.
        """
        _check("product", product, out.numel())
        _check("base", base, out.numel())
        self._add(
            _pointer(base),
            0 if base is None else _is_bfloat16(base),
            _pointer(product),
            _is_bfloat16(product),
            None if threshold is None else ctypes.byref(ctypes.c_float(threshold)),
            _pointer(out),
            _is_bfloat16(out),
            out.numel(),
            torch.get_num_threads(),
        )


def pack_taps(weight: torch.Tensor) -> torch.Tensor:
    """The weight `(channels, 1, 3, 3, 3)` of a depthwise convolution as [`SlabKernels`] reads it.

    Returns:
        `(channels / 16, 27, 16)`, float32: 16 channels at a time, taps in order of time, row and column.
    """
    taps = weight.detach().float().reshape(-1, CHANNEL_MULTIPLE, 27)
    return taps.transpose(1, 2).contiguous()


def find_compiler(command: str | None = None) -> list[str] | None:
    """The command of this machine's C++ compiler.

    Args:
        command: What `CXX` names, if it does. Of itself only GNU's compiler is found: its OpenMP library is that of
            PyTorch, and threads of a second one would wait for work while those of the first compute.

    Returns:
        `None` if there is none, and outside of Linux, where compilers and PyTorch have different OpenMP libraries.

    Raises:
        ValueError: If quotation marks in `command` are not closed.
    """
    if platform.system() != "Linux":
        return None
    commands = [shlex.split(command)] if command else [["g++"], ["c++"]]
    return next((words for words in commands if words and shutil.which(words[0])), None)


def load() -> SlabKernels | None:
    """Return the operations, compiled if they have not been yet.

    Returns:
        `None` on a machine without a C++ compiler, and after a warning where it fails; that comes once, and it is
        tried again when `CXX` or `TORCH_EXTENSIONS_DIR` has changed.
    """
    with _LOCK:  # threads of a process would write the same file
        return _load(os.environ.get("CXX"), os.environ.get("TORCH_EXTENSIONS_DIR"))


@functools.cache
def _load(command: str | None, folder: str | None) -> SlabKernels | None:
    try:
        compiler = find_compiler(command)
        return None if compiler is None else SlabKernels(ctypes.CDLL(str(_compile(compiler, folder))))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        output = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        reason = next(filter(str.strip, f"{output}\n{error}".splitlines()), type(error).__name__)
        warnings.warn(
            f"`fuse` goes on without kernels in C++: {command or 'the compiler'} or loading what it compiled failed "
            f"({reason.strip()}). They are kept in the folder that `TORCH_EXTENSIONS_DIR` names.",
            stacklevel=5,  # where `fuse` is called
        )
        return None


def _compile(compiler: list[str], folder: str | None) -> Path:
    """Compile the source, unless that has been done, and return the path of the library."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = _FLAGS + next((more for name, more in _FLAGS_OF_CAPABILITY.items() if capability.startswith(name)), [])
    key = repr((SOURCE.read_bytes(), compiler, flags, platform.machine(), platform.libc_ver()))
    root = folder or Path.home() / ".cache" / "torch_extensions"
    path = Path(root) / "diffusers_leanvae" / f"slabs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as partial:
            subprocess.run(
                [*compiler, *flags, str(SOURCE), "-o", str(partial)],
                check=True,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS_TO_COMPILE,
            )
    return path


def _check(name: str, tensor: torch.Tensor | None, num_values: int, dtype: torch.dtype | None = None) -> None:
    """Refuse a tensor, if there is one, of another size, or of another dtype if one is given."""
    if tensor is not None and (tensor.numel() != num_values or tensor.dtype != (dtype or tensor.dtype)):
        raise ValueError(
            f"`{name}` must hold {num_values} values of {dtype or tensor.dtype} to fit the other tensors, got "
            f"{tensor.numel()} of {tensor.dtype}."
        )


def _is_bfloat16(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16


def _pointer(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    if not tensor.is_contiguous() or tensor.dtype not in DTYPES or tensor.device.type != "cpu":
        raise ValueError(
            f"Slabs must be contiguous float32 or bfloat16 tensors on the CPU, got {tensor.dtype} on {tensor.device} "
            f"with strides {tensor.stride()}."
        )
    return tensor.data_ptr()

"""The work of one call of an autoencoder, and the time that its matrix products alone would take."""

import functools
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..clock import seconds
from ..evaluation.autoencoders import decode, encode, legal_sample


Size = tuple[int, int, int]  # frames, height, width
DIRECTIONS = ("encode", "decode")


FIRST_FACTOR = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1, torch.ops.aten.bmm.default: 0}


class RecordProducts(TorchDispatchMode):
    """Collects every matrix product: a flag for batched ones, and shape, strides and dtype of its two factors."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[bool, list[tuple[Any, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FIRST_FACTOR:
            factors = args[FIRST_FACTOR[func] :][:2]
            layout = [(tuple(x.shape), x.stride(), x.dtype) for x in factors]
            self.products.append((func is torch.ops.aten.bmm.default, layout))
        return func(*args, **(kwargs or {}))


class Work(NamedTuple):
    """The work of one call.

    Attributes:
        input_shape: Of the call's input.
        output_shape: Of its result: latents, or pixels.
        multiply_adds: Of matrix products, convolutions and attention.
        products: The matrix products, `(rows, inner width, columns)` each.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    multiply_adds: float
    products: tuple[tuple[int, int, int], ...]


def count_work(vae: Any, size: Size) -> dict[str, Work]:
    """Count the work of encoding and decoding a video of `size` (frames, height, width); nothing is computed.

    Runs the plain network on tensors without memory. Autograd is on, although nothing needs a gradient: without it
    LeanVAE works slice by slice, which would be slow here and counts the same.

    Raises:
        ValueError: If the size is not legal for an autoencoder of this package.
    """
    return _count_work(type(vae), vae.to_json_string(), size)


@functools.lru_cache
def _count_work(cls: Any, config: str, size: Size) -> dict[str, Work]:
    with torch.device("meta"):
        twin = cls.from_config(json.loads(config))
    twin = twin.to_empty(device="cpu").eval().requires_grad_(False)
    work = {}
    with torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        x = legal_sample(twin, torch.empty(1, 3, *size))
        for direction, function in (("encode", encode), ("decode", decode)):
            with RecordProducts() as record, FlopCounterMode(display=False) as counter:
                y = function(twin, x)
            products = tuple(
                (first[0][0], *second[0]) for is_batched, (first, second) in record.products if not is_batched
            )
            work[direction] = Work(tuple(x.shape), tuple(y.shape), counter.get_total_flops() / 2, products)
            x = y
    return work


class Layout(NamedTuple):
    """A way to compute a matrix product: both widths zero-padded to multiples of `multiple_of`, the weight packed for
    oneDNN or plain, `num_rows` rows at a time (0: all), 16-bit factors in their dtype or in float32.
    """

    multiple_of: int
    is_packed: bool
    num_rows: int
    is_wide: bool = False

    def __str__(self) -> str:
        parts = [f"widths multiples of {self.multiple_of}"] if self.multiple_of > 1 else ["as is"]
        parts += ["packed"] if self.is_packed else []
        parts += [f"{self.num_rows} rows at a time"] if self.num_rows else []
        parts += ["in float32"] if self.is_wide else []
        return ", ".join(parts)


CPU_LAYOUTS = [Layout(m, p, r) for m in (1, 16, 32, 64) for p in (False, True) for r in (0, 1024, 256)]
WIDE_CPU_LAYOUTS = [layout._replace(is_wide=True) for layout in CPU_LAYOUTS]
GPU_LAYOUTS = [Layout(m, False, 0) for m in (1, 8, 32, 64, 128)]


class MatrixFloor:
    """The time that a network's matrix products alone would take: nothing between them, memory taken beforehand,
    every shape of product in the layout that was fastest when tried.

    Depthwise convolutions are no matrix products and are left out. Weights of one shape share their memory, as do
    factors and results.

    Args:
        products: `(rows, inner width, columns)` of each, in order (see [`Work`]).
        dtype: Of all factors.
        device: Where.
        layouts: Layouts chosen before, by shape; found ones are added.
    """

    TRIAL_ROWS = 4096

    def __init__(
        self,
        products: Iterable[tuple[int, int, int]],
        dtype: torch.dtype,
        device: torch.device,
        layouts: dict[tuple[int, ...], Layout] | None = None,
    ):
        self._dtype, self._device = dtype, device
        self._memory: dict[tuple[Any, ...], torch.Tensor] = {}
        self.layouts = {} if layouts is None else layouts
        products = list(products)
        for trial in sorted({self._trial(shape) for shape in products} - self.layouts.keys()):
            self.layouts[trial] = self._fastest(trial)
        self._memory.clear()  # of trials
        self._steps = []
        steps: dict[tuple[int, ...], Callable[[], None]] = {}
        for shape in sorted(set(products), reverse=True):  # the largest first: others use its memory
            steps[shape] = self._product(*shape, self.layouts[self._trial(shape)])
        self._steps = [steps[shape] for shape in products]

    def __call__(self) -> None:
        for step in self._steps:
            step()

    def _trial(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Choose the shape to try layouts with in place of this one: on CPU more rows only take more time."""
        rows = min(shape[0], self.TRIAL_ROWS) if self._device.type == "cpu" else shape[0]
        return (rows, *shape[1:])

    def _fastest(self, shape: tuple[int, int, int]) -> Layout:
        candidates = CPU_LAYOUTS if self._device.type == "cpu" else GPU_LAYOUTS
        if self._device.type == "cpu" and self._dtype.itemsize == 2:
            candidates = WIDE_CPU_LAYOUTS + candidates
        times: dict[Layout, float] = {}
        for layout in candidates:
            if layout.num_rows >= shape[0]:
                continue
            try:
                step = self._product(*shape, layout)
                first = seconds(step, self._device)
            except (RuntimeError, AttributeError):  # not every build and processor can pack every dtype
                continue
            if times and first > 0.1 + 5 * min(times.values()):  # emulated; no warm-up makes up for that
                continue
            times[layout] = min(seconds(step, self._device) for _ in range(3))
        return min(times, key=times.__getitem__)

    def _factor(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Return random numbers, `(rows, columns)`."""
        kept = self._memory.get((name, columns, dtype))
        if kept is None or len(kept) < rows:
            kept = torch.randn(rows, columns, dtype=torch.float32, device=self._device).to(dtype)
            self._memory[name, columns, dtype] = kept
        return kept[:rows]

    def _product(self, rows: int, inner: int, columns: int, layout: Layout) -> Callable[[], None]:
        inner, columns = (-(-width // layout.multiple_of) * layout.multiple_of for width in (inner, columns))
        step = layout.num_rows or rows
        dtype = torch.float32 if layout.is_wide else self._dtype
        parts = self._factor("x", rows, inner, dtype).split(step)
        key = ("weight", inner, columns, dtype)
        if key not in self._memory:
            self._memory[key] = torch.randn(columns, inner, device=self._device).div_(inner**0.5).to(dtype)
        weight = self._memory[key]
        if layout.is_packed:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, step)

            def run() -> None:
                for part in parts:
                    torch.ops.mkldnn._linear_pointwise(part, packed, None, "none", [], "")
        else:
            kept = self._memory.get(("out", dtype))
            if kept is None or kept.numel() < step * columns:
                kept = self._memory["out", dtype] = torch.empty(step * columns, dtype=dtype, device=self._device)
            outputs = kept[: step * columns].view(step, columns)

            def run() -> None:
                for part in parts:
                    torch.mm(part, weight.t(), out=outputs[: len(part)])

        return run

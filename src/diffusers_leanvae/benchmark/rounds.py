"""How fast, how large, how near the floor: LeanVAE and diffusers' other video autoencoders, measured side by side.

A `Subject` is one autoencoder in one variant on one device; `run_rounds` lets subjects take turns, so that what
disturbs the machine disturbs all of them. What a row of the result means:

- `seconds`: median of the calls after the first (of the first alone if the budget allows no more), with quartiles;
- `peak_mib`: highest memory during the first call minus the memory before it, with weights and input there and small
  calls done; the result counts, `output_mib` says how large it is. Resident memory on CPU, without what the C
  library keeps (see `keep_freed_memory`); allocated memory on CUDA;
- `giga_multiply_adds`: of the network as it is written, whatever the variant makes of it;
- `floor_seconds`, `time_over_floor`: the same network's matrix products alone, each in the fastest layout found
  (`MatrixFloor`), timed directly after each call; medians of the times and of the ratios of neighbours.
"""

import ctypes
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..checks import check_choice
from ..models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE


DIRECTIONS = ("encode", "decode")
# How a variant of LeanVAE is fused (arguments of `AutoencoderKLLeanVAE.fuse`), or not.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "fused": {},
    "fused-torch": {"kernels": "torch"},
    "compiled": None,
    "int8": {"weights": "int8"},
    "graphs": {},
}
LEANVAE: dict[str, dict[str, Any]] = {
    "LeanVAE-16ch": {"latent_channels": 16},
    "LeanVAE-4ch": {"latent_channels": 4},
    # For tests and rehearsals: everything is there, nothing takes time.
    "LeanVAE-tiny": {"latent_channels": 4, "low_freq_dim": 8, "high_freq_dim": 24, "num_fusion_layers": 1},
}
PEERS = (
    "AutoencoderKLWan",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLCosmos",
    "AutoencoderKLLTXVideo",
    "AutoencoderVidTok",
    "AutoencoderKLHunyuanVideo",
)
MIB = 2**20
SUBJECT_KEYS = ("model", "variant", "dtype", "num_threads")
KEYS = (*SUBJECT_KEYS, "video", "direction")  # that tell one record from another
Size = tuple[int, int, int]  # frames, height, width
Record = dict[str, Any]


def build_model(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    r"""An autoencoder with random weights: a name of `LEANVAE`, or a class of diffusers as it is by default."""
    check_choice("name", name, (*LEANVAE, *PEERS))
    torch.manual_seed(0)
    if name in PEERS:
        return nn.Module.to(getattr(diffusers, name)().eval(), device, dtype)  # diffusers' own `to` warns of nothing
    vae = AutoencoderKLLeanVAE(**LEANVAE[name])
    with torch.no_grad():  # the training initialisation gives tokens of almost zero, and zeros can be faster
        for key, parameter in vae.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
            elif key.endswith("bias"):
                parameter.normal_(std=0.1)
    return nn.Module.to(vae.eval(), device, dtype)


# ---- products of matrices, and floating-point operations ------------------------------------------------------------

FIRST_FACTOR = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1, torch.ops.aten.bmm.default: 0}


class RecordProducts(TorchDispatchMode):
    r"""Collects every matrix product: whether it is batched, and shape, strides and dtype of its two factors."""

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
    r"""What one call computes.

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
    r"""Work of encoding and decoding a video of `size` (frames, height, width); nothing is computed.

    Runs the plain network on tensors without memory. Autograd is on, although nothing needs a gradient: without it
    LeanVAE works slice by slice, which would be slow here and counts the same.
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
    r"""How a matrix product is computed: both widths zero-padded to multiples of `multiple_of`, the weight packed for
    oneDNN or plain, `num_rows` rows at a time (0: all), 16-bit factors in their dtype or in float32."""

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
    r"""The time that a network's matrix products alone would take: nothing between them, memory taken beforehand,
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
        r"""The shape that stands for this one when layouts are tried: on CPU more rows only take more time."""
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
        r"""Random numbers, `(rows, columns)`."""
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


# ---- one autoencoder in one variant ---------------------------------------------------------------------------------


def encode(vae: Any, x: torch.Tensor) -> torch.Tensor:
    r"""Posterior mean of videos, by any autoencoder of diffusers."""
    return vae.encode(x).latent_dist.mode()


def decode(vae: Any, z: torch.Tensor) -> torch.Tensor:
    r"""Videos of latents, by any autoencoder of diffusers."""
    output = vae.decode(z)
    return output if isinstance(output, torch.Tensor) else output.sample


def legal_sample(vae: Any, x: torch.Tensor) -> torch.Tensor:
    r"""`x` as `encode` wants it: VidTok's own `forward` repeats the first frame before it calls `encode`."""
    if type(vae).__name__ != "AutoencoderVidTok":
        return x
    return torch.cat((x[:, :, :1].expand(-1, -1, vae.temporal_compression_ratio - 1, -1, -1), x), dim=2)


class Subject:
    r"""One autoencoder, ready to be measured.

    Args:
        vae: A video autoencoder of diffusers, with its dtype and on its device.
        variant: A key of `VARIANTS`: `"eager"`, or `"compiled"` (`torch.compile` of the eager network for each size);
            for LeanVAE also `"fused"`, `"fused-torch"` (without Triton), `"int8"` (fused, int8 weights) and `"graphs"`
            (fused, replayed as a CUDA graph).
    """

    def __init__(self, vae: Any, variant: str = "eager"):
        check_choice("variant", variant, VARIANTS)
        if (settings := VARIANTS[variant]) is not None:
            if not isinstance(vae, AutoencoderKLLeanVAE):
                raise ValueError(f"`variant` must be 'eager' or 'compiled' for {type(vae).__name__}, got {variant!r}.")
            vae.fuse(**settings)
        self.vae, self.variant = vae, variant
        self.dtype, self.device = vae.dtype, vae.device
        self.num_parameters = sum(parameter.numel() for parameter in vae.parameters())
        self._functions: dict[tuple[str, Size], Callable[[torch.Tensor], torch.Tensor]] = {}
        self._inputs: dict[tuple[str, Size], torch.Tensor] = {}
        self._floors: dict[tuple[str, Size], MatrixFloor] = {}
        self.layouts: dict[tuple[int, ...], Layout] = {}
        self._warm: set[Any] = set()

    def make_input(self, direction: str, size: Size) -> torch.Tensor:
        r"""Uniform noise in `[-1, 1]` to encode, normal noise to decode."""
        generator = torch.Generator(self.device).manual_seed(0)
        settings: dict[str, Any] = {"generator": generator, "device": self.device}
        if direction == "encode":
            x = legal_sample(self.vae, torch.rand(1, 3, *size, **settings) * 2 - 1)
        else:
            x = torch.randn(count_work(self.vae, size)["decode"].input_shape, **settings)
        return x.to(self.dtype)

    def measure(self, direction: str, size: Size, is_first: bool, with_floor: bool = False) -> dict[str, Any]:
        r"""Call once. The first call tells memory and work, later ones the floor beside the time.

        Args:
            direction: `"encode"` or `"decode"`.
            size: Frames, height and width of the video.
            is_first: Whether memory and work are wanted; the time is then that of a call with large tensors new.
            with_floor: Whether the matrix products alone are timed directly after.
        """
        key = (direction, size)
        if key not in self._inputs:
            self._inputs = {key: self.make_input(direction, size)}
        x = self._inputs[key]
        function = self._function(direction, size, x)
        result: dict[str, Any] = {}
        with torch.no_grad():
            self._warm_up(direction, size, x, function)
            if is_first:
                work = count_work(self.vae, size)[direction]
                self._floors.clear()
                before = start_of_peak(self.device)
                output = None

                def run() -> None:
                    nonlocal output
                    output = function(x)

                result["seconds"] = seconds(run, self.device)
                # A graph takes its memory when it is recorded, not when it runs.
                peak = None if self.variant == "graphs" else end_of_peak(before, self.device)
                assert output is not None
                if tuple(output.shape) != work.output_shape or not bool(output.isfinite().all()):
                    raise RuntimeError(f"result of shape {tuple(output.shape)} is not finite or of the wrong shape")
                result |= {
                    "peak_mib": None if peak is None else round(peak / MIB, 1),
                    "output_mib": round(output.numel() * output.element_size() / MIB, 1),
                    "giga_multiply_adds": float(f"{work.multiply_adds / 1e9:.6g}"),
                    "num_parameters": self.num_parameters,
                    "latent": list(work.output_shape if direction == "encode" else work.input_shape)[2:],
                }
            else:
                result["seconds"] = seconds(lambda: function(x), self.device)
                if with_floor:
                    floor = self._floor(direction, size)
                    result["floor_seconds"] = seconds(floor, self.device)
        return result

    def _floor(self, direction: str, size: Size) -> MatrixFloor:
        if (direction, size) not in self._floors:
            products = count_work(self.vae, size)[direction].products
            self._floors = {key: floor for key, floor in self._floors.items() if key[1] == size}
            self._floors[direction, size] = MatrixFloor(products, self.dtype, self.device, self.layouts)
            self._floors[direction, size]()
        return self._floors[direction, size]

    def _function(self, direction: str, size: Size, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        key = (direction, size)
        if key in self._functions:
            return self._functions[key]
        plain = encode if direction == "encode" else decode

        def function(x: torch.Tensor) -> torch.Tensor:
            return plain(self.vae, x)

        if self.variant == "compiled":
            torch._dynamo.config.recompile_limit = 64  # one version for each size
            function = torch.compile(function, dynamic=False)
        elif self.variant == "graphs":
            from ..kernels.cuda_graphs import GraphedFunction

            self._functions.clear()  # a graph holds the memory of its peak
            function = GraphedFunction(function, x)  # type: ignore[assignment]
        self._functions[key] = function
        return function

    def _warm_up(self, direction: str, size: Size, x: torch.Tensor, function: Callable) -> None:
        r"""Kernels, their threads and their scratch memory are there before anything is counted."""
        if self.variant in ("compiled", "graphs"):
            if (direction, size) not in self._warm:
                function(x)
                function(x)  # what the first call changed may have it compiled once more
                self._warm.add((direction, size))
        elif not self._warm:
            small = (17, 64, 64)
            for name, plain in (("encode", encode), ("decode", decode)):
                plain(self.vae, self.make_input(name, small))
                self._warm.add((name, small))


# ---- time and memory ------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object], device: torch.device) -> float:
    r"""Time of one call, the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _resident(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def start_of_peak(device: torch.device) -> int | None:
    r"""Forget the old peak; bytes in use now, or `None` where they cannot be told."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _resident("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None


def end_of_peak(before: int | None, device: torch.device) -> int | None:
    r"""Bytes of the highest peak since `start_of_peak`, above what was in use then."""
    if before is None:
        return None
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() - before
    return _resident("VmHWM") - before


def keep_freed_memory(is_kept: bool) -> None:
    r"""Whether the C library keeps blocks that were freed (on Linux; without effect elsewhere).

    Kept memory makes allocation fast, but is nothing that a network needs. So peaks are taken in a process that has
    not kept any from its start, and times with what glibc comes to by itself once large blocks have been freed.
    """
    num_bytes = 2**25 if is_kept else 2**18
    m_trim_threshold, m_mmap_threshold = -1, -3  # of <malloc.h>
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, num_bytes)
        libc.mallopt(m_trim_threshold, 2 * num_bytes)
    except (AttributeError, TypeError):
        return


# ---- taking turns ---------------------------------------------------------------------------------------------------


class MeasurementError(Exception):
    r"""Why a subject cannot be measured at a size; becomes the row's `note`."""


def parse_size(text: str) -> list[int]:
    r"""`17x256x256` to frames, height and width."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"`size` must be FRAMESxHEIGHTxWIDTH such as 17x256x256, got {text!r}.")
    return [int(part) for part in parts]


def groups_of(records: Iterable[Record]) -> list[list[Record]]:
    r"""What takes turns: all subjects at one size, dtype and number of threads."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault((*record["video"], record["dtype"], record["num_threads"]), []).append(record)
    return list(groups.values())


def run_here(
    records: Sequence[Record],
    make_subject: Callable[[Record], Subject],
    num_repeats: int,
    budget: float,
    save: Callable[[Record], None],
) -> None:
    r"""`run_rounds` of each group in this process, memory before times; subjects are made when needed, and kept."""
    subjects: dict[tuple[Any, ...], Subject] = {}

    def measure(record: Record, is_first: bool) -> dict[str, Any]:
        torch.set_num_threads(record["num_threads"])
        key = tuple(record[name] for name in SUBJECT_KEYS)
        try:
            if key not in subjects:
                subjects[key] = make_subject(record)
            return subjects[key].measure(
                record["direction"], tuple(record["video"]), is_first, record["model"] not in PEERS
            )
        except (RuntimeError, MemoryError) as error:
            raise MeasurementError(f"{type(error).__name__}: {error}".split("\n")[0][:200]) from error

    keep_freed_memory(False)
    for group in groups_of(records):
        run_rounds(group, measure, 0, budget, save)
    keep_freed_memory(True)
    for group in groups_of(records):
        run_rounds(group, measure, num_repeats, budget, save)


def describe(record: Record) -> str:
    r"""One line about the latest call."""
    text = f"{record['model']:<26} {record['variant']:<8} {record['dtype']:<8} {record['num_threads']} threads  "
    text += f"{'x'.join(map(str, record['video'])):<12} {record['direction']}  "
    if "note" in record:
        return text + record["note"]
    if not record["seconds"]:
        first = record["first"]
        return text + f"{first['seconds']:9.4f} s at first, peak {first['peak_mib']} MiB"
    floor = record.get("floor_seconds")
    return text + f"{record['seconds'][-1]:9.4f} s" + (f", floor {floor[-1]:.4f} s" if floor else "")


def run_rounds(
    records: Sequence[Record],
    measure: Callable[[Record, bool], dict[str, Any]],
    num_repeats: int,
    budget: float,
    save: Callable[[Record], None],
) -> None:
    r"""Measure every record once for memory, then in turns until each has `num_repeats` times.

    Args:
        records: What to measure (keys are the caller's); results are added under `first`, `seconds`, `floor_seconds`
            and `note`. Records that hold some already go on from there.
        measure: One call of `Subject.measure` for a record and whether it is its first; raises `MeasurementError`.
        num_repeats: Calls after the first.
        budget: Seconds for each record: no call is begun that would probably outrun it.
        save: Called with each record that changed.
    """
    for number in range(num_repeats + 1):
        start = number % max(len(records), 1)  # not always after the same neighbour
        for record in [*records[start:], *records[:start]]:
            times = record.setdefault("seconds", [])
            if "note" in record or (number > 0 and len(times) >= number):
                continue
            if number == 0 and "first" in record:
                continue
            if number > 0:
                spent = record["first"]["seconds"] + sum(times) + sum(record.get("floor_seconds", []))
                if spent * (1 + 1 / (len(times) + 1)) > budget:
                    continue
            try:
                sample = measure(record, number == 0)
            except MeasurementError as error:
                record["note"] = str(error)
                save(record)
                continue
            if number == 0:
                record["first"] = sample
            else:
                times.append(sample["seconds"])
                if "floor_seconds" in sample:
                    record.setdefault("floor_seconds", []).append(sample["floor_seconds"])
            save(record)


def summarize(record: Record) -> dict[str, Any]:
    r"""The flat row of a record."""
    row = {key: record[key] for key in KEYS}
    if "first" in record and "note" not in record:
        first = record["first"]
        times = record["seconds"] or [first["seconds"]]
        lower, median, upper = _quartiles(times)
        row |= {"seconds": _rounded(median), "seconds_lower": _rounded(lower), "seconds_upper": _rounded(upper)}
        row |= {"repeats": len(times)} | {key: value for key, value in first.items() if key != "seconds"}
        row["giga_multiply_adds_per_second"] = _rounded(first["giga_multiply_adds"] / median)
        if floor := record.get("floor_seconds"):
            row["floor_seconds"] = _rounded(statistics.median(floor))
            ratios = [time / least for time, least in zip(record["seconds"], floor, strict=False)]
            row["time_over_floor"] = round(statistics.median(ratios), 3)
    if "note" in record:
        row["note"] = record["note"]
    return row


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


# ---- is cost linear? ------------------------------------------------------------------------------------------------


def linearity(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    r"""How time and memory grow with the number of latent positions, over length and over area.

    For each model, variant, dtype, direction and quantity with at least three sizes that differ in length only, or in
    area only: `exponent` (slope of the logarithms, 1 if proportional), `r_squared` of the straight line through the
    points, and `max_deviation` from the line through the origin, as a share of it.
    """
    names = (*SUBJECT_KEYS, "direction")
    found = []
    for axis, same in (("length", lambda video: tuple(video[1:])), ("area", lambda video: video[0])):
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in rows:
            if "seconds" in row:
                groups.setdefault((*(row[name] for name in names), same(row["video"])), []).append(row)
        for (*key, _), members in groups.items():
            members.sort(key=lambda row: math.prod(row["video"]))
            for quantity in ("seconds", "peak_mib"):
                points = [(math.prod(row["latent"]), row[quantity]) for row in members if row.get(quantity)]
                if len({x for x, _ in points}) >= 3:
                    sizes = [row["video"] for row in members if row.get(quantity)]
                    about = dict(zip(names, key, strict=True)) | {"axis": axis, "quantity": quantity}
                    found.append(about | {"smallest": sizes[0], "largest": sizes[-1]} | _fit(points))
    return found


def _fit(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    xs, ys = zip(*points, strict=True)
    exponent, _ = statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys])
    slope = statistics.linear_regression(xs, ys, proportional=True).slope
    return {
        "num_points": len(points),
        "exponent": round(exponent, 3),
        "r_squared": round(statistics.correlation(xs, ys) ** 2, 5),
        "max_deviation": round(max(abs(y / (slope * x) - 1) for x, y in points), 3),
    }

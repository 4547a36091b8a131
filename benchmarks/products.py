"""A feed-forward's matrix products on this processor: plain or packed weights, float32, bfloat16 and int8.

    python benchmarks/products.py

`CPU_SLAB_TOKENS` tokens, those of a slab of a fused LeanVAE, times the weights of its feed-forwards; on one thread, in
turns. Each figure is 10^9 operations a second (two to a multiply-add), from the median of the processor
times. `int8` is the product alone (exact sums by `torch._int_mm`), `int8 from float` with all that it needs: a scale
for each token, rounding, and the scales of tokens and channels on the sums. It counts the same multiply-adds, so
what has the larger figure is the faster way.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.models.leanvae_fused_blocks import CPU_SLAB_TOKENS, DenseProduct, PackedProduct


WIDTHS = ((512, 1376), (1376, 512), (384, 1024), (1024, 384))  # inner width, columns


class Int8Product:
    """`x @ weight.T` in int8: weights with a scale per output channel, activations with one per token."""

    def __init__(self, weight: torch.Tensor):
        self.scale = weight.abs().amax(dim=1) / 127
        self.weight = (weight / self.scale[:, None]).round().to(torch.int8).t()

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        scale = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).div_(127)
        sums = torch._int_mm((x / scale).round_().to(torch.int8), self.weight)
        return torch.mul(sums, self.scale, out=out).mul_(scale)


def ways(inner: int, columns: int) -> dict[str, Callable[[], torch.Tensor]]:
    weight, x = torch.randn(columns, inner) / inner**0.5, torch.randn(CPU_SLAB_TOKENS, inner)
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            continue
        factor, out = x.to(dtype), torch.empty(CPU_SLAB_TOKENS, columns, dtype=dtype)
        plain, packed = DenseProduct(weight.to(dtype)), PackedProduct(weight.to(dtype))
        calls[f"{name}, plain"] = lambda plain=plain, factor=factor, out=out: plain(factor, out)
        calls[f"{name}, packed"] = lambda packed=packed, factor=factor, out=out: packed(factor, out)
    int8, rounded = Int8Product(weight), (x * 30).round().clamp(-127, 127).to(torch.int8)
    calls["int8"] = lambda: torch._int_mm(rounded, int8.weight)
    out = torch.empty(CPU_SLAB_TOKENS, columns)
    calls["int8 from float"] = lambda: int8(x, out)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output", default=str(Path(__file__).parents[1] / "results/bench_products.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with torch.inference_mode():
        for inner, columns in WIDTHS:
            times: dict[str, list[float]] = {}
            calls = ways(inner, columns)
            for _ in range(options.repeats):
                for name, call in calls.items():
                    started = time.process_time()
                    call()
                    times.setdefault(name, []).append(time.process_time() - started)
            operations = 2e-9 * CPU_SLAB_TOKENS * inner * columns
            row = {"inner width": inner, "columns": columns}
            rows.append(row | {name: round(operations / statistics.median(t)) for name, t in times.items()})
            print(rows[-1], flush=True)
    write_result(options.output, {"rows": rows})


if __name__ == "__main__":
    main()

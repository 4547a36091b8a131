"""Quality cost of the fast paths: PSNR of the bundled models on real clips, compared with eager float32.

    python benchmarks/precision.py ../shared/videos/val

Every variant reconstructs the same clips by the protocol `val-17x256` of results/README.md. Writes
`results/bench_precision.json`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffusers_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.bundled import model_path
from diffusers_leanvae.evaluation.protocols import Protocol
from diffusers_leanvae.evaluation.reconstruction import evaluate_reconstruction
from diffusers_leanvae.evaluation.reconstructors import AutoencoderReconstructor
from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.models.leanvae_fused import FusedLeanVAE
from diffusers_leanvae.models.leanvae_fused_blocks import PrepareProduct


class SimulatedFloat8:
    """`x @ weight.T` as units for float8 (e4m3) would compute it: a scale per channel and per token, exact sums."""

    def __init__(self, weight: torch.Tensor):
        self.weight = self._round(weight)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return torch.mm(self._round(x), self.weight.t(), out=out)

    @staticmethod
    def _round(x: torch.Tensor) -> torch.Tensor:
        scale = (x.abs().amax(dim=1, keepdim=True) / 448).clamp(min=1e-12)
        return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def fuse_with(vae: AutoencoderKLLeanVAE, prepare_product: PrepareProduct) -> None:
    vae._fused = FusedLeanVAE(vae, prepare_product=prepare_product)


VARIANTS: dict[str, tuple[torch.dtype, Callable[[AutoencoderKLLeanVAE], None]]] = {
    "float32": (torch.float32, lambda vae: None),
    "float32, fused": (torch.float32, lambda vae: vae.fuse()),
    "float8 (simulated), fused": (torch.float32, lambda vae: fuse_with(vae, SimulatedFloat8)),
    "bfloat16": (torch.bfloat16, lambda vae: None),
    "bfloat16, fused": (torch.bfloat16, lambda vae: vae.fuse()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of videos")
    parser.add_argument("--models", nargs="+", default=["compact-16ch", "compact-4ch"], help="bundled models")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default=Path(__file__).resolve().parent.parent / "results/bench_precision.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    protocol = Protocol("precision", options.num_frames, options.size)
    rows: list[dict[str, Any]] = []
    for model in options.models:
        reference: dict[str, Any] = {}
        for name in options.variants:
            dtype, prepare = VARIANTS[name]
            vae = AutoencoderKLLeanVAE.from_pretrained(model_path(model), torch_dtype=dtype).eval()
            prepare(vae)
            quality = evaluate_reconstruction(AutoencoderReconstructor(vae, model), options.folder, protocol).totals
            reference = reference or quality
            psnr, ssim = quality["psnr_frame_mean_rgb"], quality["ssim_frame_mean_rgb"]
            rows.append({"model": model, "variant": name, "psnr": round(psnr, 3), "ssim": round(ssim, 5)})
            rows[-1]["psnr_loss_db"] = round(reference["psnr_frame_mean_rgb"] - psnr, 4)
            print(rows[-1], flush=True)
    result = {"rows": rows, "num_frames": options.num_frames, "size": options.size, "folder": options.folder}
    write_result(options.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

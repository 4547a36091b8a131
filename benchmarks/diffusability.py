"""Diffusability of the latents of some models: one small denoiser for each, everything else the same.

    python benchmarks/diffusability.py runs/plain/vae runs/equivariant/vae \
        --train ../shared/videos/train --held-out ../shared/videos/val --output results/diffusability.json

Minutes per model on a CPU core. What is measured: `diffusers_leanvae/evaluation/diffusability.py`. All models are
measured in one run on the same clips, so that its rows can be compared.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoModel

import diffusers_leanvae  # noqa: F401 - makes AutoModel know AutoencoderKLLeanVAE
from diffusers_leanvae.checks import sha256
from diffusers_leanvae.conversion.headers import WEIGHTS_NAME
from diffusers_leanvae.evaluation.diffusability import DiffusabilityProtocol, load_clips, measure_diffusability
from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.loading import resolve_bundled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders for from_pretrained, or names of bundled models")
    parser.add_argument("--train", required=True, help="folder of videos whose latents the denoiser learns from")
    parser.add_argument("--held-out", required=True, help="folder of other videos, to measure it on")
    parser.add_argument("--output", required=True)
    parser.add_argument("--num-train-clips", type=int, default=512)
    parser.add_argument("--num-held-out-clips", type=int, default=56)
    parser.add_argument("--clip-size", type=int, nargs=3, default=[17, 64, 64], metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--num-steps", type=int, default=DiffusabilityProtocol.num_steps)
    parser.add_argument("--seed", type=int, default=DiffusabilityProtocol.seed)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    protocol = DiffusabilityProtocol(num_steps=options.num_steps, seed=options.seed)
    num_frames, height, width = options.clip_size
    size = (num_frames, height, width)
    train_clips = load_clips(options.train, options.num_train_clips, size, options.seed)
    held_out_clips = load_clips(options.held_out, options.num_held_out_clips, size, options.seed)
    rows = []
    for model in options.models:
        folder = Path(resolve_bundled(model))
        vae = AutoModel.from_pretrained(str(folder), torch_dtype=torch.float32).eval()
        started = time.perf_counter()
        result = measure_diffusability(vae, train_clips, held_out_clips, protocol, print)
        weights = folder / WEIGHTS_NAME
        rows.append({"model": model, "weights_sha256": sha256(weights) if weights.is_file() else None} | result)
        rows[-1]["seconds"] = round(time.perf_counter() - started, 1)
        print(f"{model}: {rows[-1]['denoising_loss']}, {rows[-1]['seconds']} s", flush=True)
        data = {"train": Path(options.train).name, "held_out": Path(options.held_out).name}
        write_result(options.output, {"rows": rows, "data": data, "clip_size": options.clip_size, "dtype": "float32"})


if __name__ == "__main__":
    main()

"""Quality and memory of the bundled models by the length of the pieces that clips are given in: the paper's Table 5.

    python benchmarks/chunks.py --held-out path/to/val    # writes results/bench_chunks.json

Causal convolutions carry their state from piece to piece, so no figure may depend on the pieces. LPIPS has random
weights (VGG16 of seed 0), which show whether reconstructions differ, not how good they are. The table is in
docs/benchmarks.md.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffusers_leanvae import bundled
from diffusers_leanvae.clock import MIB, end_of_peak, keep_freed_memory, start_of_peak
from diffusers_leanvae.evaluation.measures import MetricOptions
from diffusers_leanvae.evaluation.protocols import get_protocol
from diffusers_leanvae.evaluation.reconstruction import evaluate_reconstruction
from diffusers_leanvae.evaluation.reconstructors import AutoencoderReconstructor
from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.evaluation.streaming import StreamingReconstructor
from diffusers_leanvae.loading import load_autoencoder


ROOT = Path(__file__).resolve().parent.parent
CHUNKS = (5, 9, None)


def make_reconstructor(vae: Any, name: str, chunk: int | None) -> AutoencoderReconstructor:
    about = {"temporal_compression_ratio": vae.temporal_compression_ratio}
    if chunk is None:
        return AutoencoderReconstructor(vae, name, about)
    return StreamingReconstructor(vae, name, about, chunk)


def peak_mib(reconstructor: AutoencoderReconstructor, clip: torch.Tensor) -> float | None:
    """Memory above the clip and the weights while a clip is reconstructed, in MiB; frames are dropped as they come."""
    device = reconstructor.vae.device
    before = start_of_peak(device)
    if isinstance(reconstructor, StreamingReconstructor):
        later = reconstructor.chunk - 1
        sizes = [reconstructor.chunk, *[later] * ((clip.shape[1] - reconstructor.chunk) // later)]
        for _ in reconstructor.stream(clip.split(sizes, dim=1)):
            pass
    else:
        reconstructor.reconstruct(clip)
    peak = end_of_peak(before, device)
    return None if peak is None else round(peak / MIB, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", required=True, help="folder of videos to measure on")
    parser.add_argument("--max-clips", type=int, help="the first so many videos by name; VGG16 takes a second a frame")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "bench_chunks.json")
    options = parser.parse_args()
    keep_freed_memory(False)
    metrics = ("psnr", "ssim", "lpips_vgg16")
    protocol = replace(get_protocol("val-17x256"), metrics=metrics, max_clips=options.max_clips)
    size = protocol.num_frames, protocol.resolution, protocol.resolution
    clip = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = []
    for name in bundled.MODELS:
        vae = load_autoencoder(name).eval()
        for chunk in CHUNKS:
            reconstructor = make_reconstructor(vae, name, chunk)
            # Memory comes first: what the metrics leave behind could be used again, and would hide some of it. A small
            # clip before it makes what stays from the first call on, such as threads and compiled products.
            peak_mib(reconstructor, clip[..., :64, :64])
            row: dict[str, Any] = {"model": name, "frames of a piece": chunk or "whole"}
            row["peak MiB"] = peak_mib(reconstructor, clip)
            evaluation = evaluate_reconstruction(
                reconstructor, options.held_out, protocol, MetricOptions(vgg16="seed:0")
            )
            for metric, value in evaluation.totals.items():
                row[evaluation.metrics[metric].label] = round(value, evaluation.metrics[metric].digits)
            rows.append(row)
            print(*row.values(), sep=" | ", flush=True)
    write_result(
        options.output,
        {"protocol": f"{protocol.name}, {evaluation.num_videos} clips, LPIPS with VGG16 of seed 0", "rows": rows},
    )


if __name__ == "__main__":
    main()

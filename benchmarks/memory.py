"""Peak memory and time of exact streaming and tiling, each case in a process of its own.

    python benchmarks/memory.py --output results/bench_memory.json            everything (tens of minutes)
    python benchmarks/memory.py --cases stream-17 whole-17x256 --output x.json

Full-size LeanVAE-16ch, random weights, float32. "Peak" is the highest resident memory while the case ran, minus the
resident memory with weights loaded and every kernel used once. Inputs and outputs are counted unless a row says so.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from diffusers_leanvae import AutoencoderKLLeanVAE, StreamingDecoder, StreamingEncoder
from diffusers_leanvae.results import write_result


MIB = 2**20


def resident(key: str) -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key))


def measure(work: Callable[[], object]) -> dict[str, float]:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # forget the old peak
    before, started = resident("VmRSS"), time.perf_counter()
    work()
    return {"peak_mib": round(resident("VmHWM") - before, 1), "seconds": round(time.perf_counter() - started, 2)}


def make_vae() -> AutoencoderKLLeanVAE:
    torch.manual_seed(0)
    vae = AutoencoderKLLeanVAE(latent_channels=16).eval()
    with torch.inference_mode():
        vae(torch.zeros(1, 3, 5, 64, 64))
    return vae


def frames(num_frames: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, num_frames, height, width) * 2 - 1


def stream(num_frames: int) -> list[dict]:
    """Frames are made when they are pushed, results are dropped: the stream's own memory is what remains."""
    vae = make_vae()
    encoder, decoder = StreamingEncoder(vae, 16), StreamingDecoder(vae, 4)
    num_latent = vae.num_latent_frames(num_frames)
    size = 256

    def encode() -> None:
        for start in range(0, num_frames, 8):
            encoder.push(frames(min(8, num_frames - start), size, size))
        encoder.flush()

    def decode() -> None:
        for start in range(0, num_latent, 2):
            decoder.push(torch.randn(1, 16, min(2, num_latent - start), size // 8, size // 8))
        decoder.flush()

    return [
        {"direction": name, "num_frames": num_frames, "height": size, "width": size, **measure(work)}
        for name, work in (("encode", encode), ("decode", decode))
    ]


def whole(num_frames: int, height: int, width: int, tile: tuple[int, int, int] | None) -> list[dict]:
    """`encode` and `decode` of a whole video, untiled or in tiles, beside what `plan` predicts."""
    vae = make_vae()
    if tile is not None:
        vae.enable_tiling(*tile)
    plan = vae.plan(num_frames, height, width, tile=tile or (height, width, num_frames))
    sample = frames(num_frames, height, width)
    latents = torch.randn(1, 16, vae.num_latent_frames(num_frames), height // 8, width // 8)
    common = {"num_frames": num_frames, "height": height, "width": width, "tile": tile}
    rows = []
    for name, work, predicted, overhead in (
        ("encode", lambda: vae.encode(sample), plan.encode_bytes, plan.encode_overhead),
        ("decode", lambda: vae.decode(latents), plan.decode_bytes, plan.decode_overhead),
    ):
        row = {"direction": name, **common, "predicted_mib": round(predicted / MIB, 1), "work": round(overhead, 3)}
        rows.append(row | measure(work))
    return rows


def reconstruct(num_frames: int, height: int, width: int, budget_mib: int) -> list[dict]:
    """Input to reconstruction in tiles fitted to a budget; the input (made outside) is counted."""
    vae = make_vae()
    before = resident("VmRSS")
    sample = frames(num_frames, height, width)
    held = sample.nbytes / MIB
    plan = vae.plan(num_frames, height, width, budget=int((budget_mib - held) * MIB))
    vae.enable_tiling(*plan[:3])
    row = {"direction": "reconstruct", "num_frames": num_frames, "height": height, "width": width}
    row |= {"tile": list(plan[:3]), "budget_mib": budget_mib}
    measured = measure(lambda: vae(sample))
    measured["peak_mib"] = round(measured["peak_mib"] + resident("VmRSS") - before, 1)
    return [row | measured]


CASES: dict[str, Callable[[], list[dict]]] = {
    **{f"stream-{n}": (lambda n=n: stream(n)) for n in (1, 5, 17, 121, 1001)},
    "whole-17x256": lambda: whole(17, 256, 256, None),
    "whole-17x512": lambda: whole(17, 512, 512, None),
    "whole-65x256": lambda: whole(65, 256, 256, None),
    "tiled-65x256-128": lambda: whole(65, 256, 256, (128, 128, 17)),
    "tiled-17x512-256": lambda: whole(17, 512, 512, (256, 256, 17)),
    "tiled-17x1080p-none": lambda: whole(17, 1080, 1920, None),
    "tiled-17x1080p-544": lambda: whole(17, 1080, 1920, (544, 640, 17)),
    "tiled-17x1080p-272": lambda: whole(17, 1080, 1920, (272, 320, 17)),
    "tiled-17x1080p-136": lambda: whole(17, 1080, 1920, (136, 192, 17)),
    "reconstruct-17x1080p": lambda: reconstruct(17, 1080, 1920, 2048),
    "reconstruct-17x2160p": lambda: reconstruct(17, 2160, 3840, 3072),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--output", default="results/bench_memory.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        with torch.inference_mode():
            print(json.dumps(CASES[options.worker]()))
        return
    rows = []
    # Freed blocks go back to the system at once, so that resident memory is what is alive.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    for case in options.cases:
        command = [sys.executable, __file__, "--worker", case, "--threads", str(options.threads)]
        output = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if output.returncode:
            raise SystemExit(f"{case} failed:\n{output.stderr}")
        for row in json.loads(output.stdout.splitlines()[-1]):
            rows.append({"case": case} | row)
            print(rows[-1], flush=True)
        write_result(options.output, {"rows": rows, "model": "LeanVAE-16ch, random weights", "dtype": "float32"})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

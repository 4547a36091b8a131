"""How long a live stream keeps one waiting: `leanvae live`, and the first frames that a stream of latents decodes to.

    python benchmarks/latency.py                                    results/bench_latency.json; a quiet machine
    python benchmarks/latency.py --models compact-16ch --sizes 256x256 --seconds 2 --output x.json

`live` hands raw frames to `reconstruct_stream`, each as soon as it is asked for, and watches them come out: the time
between the last frame of a group (four frames, the first one of the video by itself) being handed over and the first
frame of that group being there. A camera adds what it takes to deliver the other frames of the group. `first frames`
is a new `StreamingDecoder` given the two latent frames that its first step takes, until five pictures are there. Times
are wall times of warm models; medians of as many as `--seconds` are enough for, and the 99th percentile of a hundred
or more.
"""

import argparse
import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from diffusers_leanvae import StreamingDecoder
from diffusers_leanvae.benchmark.names import LEANVAE
from diffusers_leanvae.benchmark.subjects import build_model
from diffusers_leanvae.checks import parse_dtype
from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.inference.live import reconstruct_stream
from diffusers_leanvae.loading import load_autoencoder
from diffusers_leanvae.models.video_autoencoder import VideoAutoencoder


MAX_TIMES = 200


class Camera(io.RawIOBase):
    """Raw frames of noise, and the moment at which the newest one was handed over."""

    def __init__(self, num_frames: int, num_bytes: int) -> None:
        self.num_left, self.newest = num_frames, 0.0
        self._frame = torch.randint(256, (num_bytes,), dtype=torch.uint8).numpy().tobytes()

    def read(self, size: int = -1) -> bytes:
        if self.num_left == 0:
            return b""
        self.num_left -= 1
        self.newest = time.perf_counter()
        return self._frame


class Screen(io.RawIOBase):
    """Takes frames, and notes how long after the newest one of the camera."""

    def __init__(self, camera: Camera) -> None:
        self.camera, self.delays = camera, list[float]()

    def write(self, data: Any) -> int:
        self.delays.append(time.perf_counter() - self.camera.newest)
        return len(data)


def live(vae: VideoAutoencoder, height: int, width: int, num_groups: int) -> list[float]:
    """Seconds that the frames of each group take, after a first group that is not counted."""
    ratio = vae.temporal_compression_ratio
    camera = Camera((num_groups + 1) * ratio + 1, height * width * 3)
    screen = Screen(camera)
    reconstruct_stream(vae, camera, screen, width, height)  # type: ignore[arg-type]
    return screen.delays[1 + ratio :: ratio]  # of the first frame of each group


def first_frames(vae: VideoAutoencoder, height: int, width: int, num_times: int) -> list[float]:
    """Seconds to the first pictures of a stream, after one that is not counted."""
    ratio = vae.spatial_compression_ratio
    latents = torch.randn(1, vae.latent_channels, 2, height // ratio, width // ratio, dtype=vae.dtype)
    times = []
    for _ in range(num_times + 1):
        started = time.perf_counter()
        assert StreamingDecoder(vae, 1).push(latents) is not None
        times.append(time.perf_counter() - started)
    return times[1:]


def summary(times: list[float]) -> dict[str, float]:
    row = {"number": len(times), "median ms": round(1e3 * statistics.median(times), 1)}
    if len(times) >= 100:
        row["99 % ms"] = round(1e3 * statistics.quantiles(times, n=100)[98], 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["compact-16ch", "LeanVAE-16ch"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sizes", nargs="+", default=["256x256", "512x512", "720x1280"])
    parser.add_argument("--seconds", type=float, default=20, help="about how long to look at each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default=str(Path(__file__).parents[1] / "results/bench_latency.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for model in options.models:
        for name in options.dtypes:
            dtype = parse_dtype("--dtypes", name)
            vae: Any = build_model(model).eval() if model in LEANVAE else load_autoencoder(model)
            vae.to(dtype).fuse()
            for size in options.sizes:
                height, width = (int(edge) for edge in size.split("x"))
                with torch.inference_mode():
                    for what, function in (("live", live), ("first frames", first_frames)):
                        row = {"model": model, "dtype": name, "size": size, "what": what}
                        slowest = max(function(vae, height, width, 2))
                        num_times = min(max(int(options.seconds / slowest), 3), MAX_TIMES)
                        row |= summary(function(vae, height, width, num_times))
                        rows.append(row)
                        print(json.dumps(row), flush=True)
    write_result(options.output, {"rows": rows})


if __name__ == "__main__":
    main()

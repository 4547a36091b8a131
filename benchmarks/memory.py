"""Peak memory and time of exact streaming and tiling, each case in a process of its own.

    python benchmarks/memory.py --threads 1                         every case (about an hour of one core)
    python benchmarks/memory.py --cases stream-17 whole-17x256      these cases; the file keeps its other rows
    python benchmarks/memory.py --cases                             only predict the rows again
    python benchmarks/memory.py --model WF-VAE-S-8ch                another model and its cases, a file of its own

A model with random weights, float32, on the CPU: of full size, or of a recipe in `training/configs`. `peak_mib` is the
highest resident memory while the case ran, minus the resident memory with weights loaded and every kernel used once.
Input made before is not counted, results are. Streams push one frame at a time and drop what comes out.
`reconstruct-*` cases go from file to file through `files.reconstruct_video(max_memory=...)`, and everything is
counted: frames, network, state, FFmpeg.

`predicted_mib` is what the planner says, `work` the tokens computed over the tokens kept: the halo's share.
`cpu_seconds` is processor time, which others on the machine disturb less than the clock; `time_ratio` is that of a
tiled case over the untiled. `difference` is the largest between a stream and the whole video at once, over the largest
value.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from diffusers_leanvae import (
    AutoencoderKLIVVAE,
    AutoencoderKLLeanVAE,
    AutoencoderKLWFVAE,
    StreamingDecoder,
    StreamingEncoder,
)
from diffusers_leanvae.clock import MIB, status_bytes
from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.inference import files, memory
from diffusers_leanvae.models.video_autoencoder import VideoAutoencoder
from diffusers_leanvae.video_io import VideoReader, VideoWriter, iter_video


Row = dict[str, Any]


class Model(NamedTuple):
    """A model to measure.

    Attributes:
        model_class: Its class.
        config: Its config, or the recipe that it is in.
        cases: What is measured if nothing is named.
    """

    model_class: type[VideoAutoencoder]
    config: dict[str, Any] | str
    cases: list[str]

    def make(self) -> VideoAutoencoder:
        config = self.config
        if isinstance(config, str):
            path = Path(__file__).parents[1] / "training" / "configs" / config
            config = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        return self.model_class(**{name: value for name, value in config.items() if name != "type"}).eval()


def measure(work: Callable[[], object]) -> Row:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # forget the old peak
    before, cpu = status_bytes("VmRSS"), time.process_time()
    work()
    return {
        "peak_mib": round((status_bytes("VmHWM") - before) / MIB, 1),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }


def make_vae(model: str) -> VideoAutoencoder:
    torch.manual_seed(0)
    vae = MODELS[model].make()
    vae(torch.zeros(1, 3, 5, 128, 128))  # as many tokens as a block of a matrix product: its buffers are kept
    return vae


def frames(num_frames: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, num_frames, height, width).mul_(2).sub_(1)


def stream(model: str, num_frames: int, size: int = 256) -> list[Row]:
    """One stream in each direction; up to 121 frames also its largest difference from the whole video at once."""
    vae = make_vae(model)
    sample = frames(num_frames, size, size)
    latents = torch.randn(1, vae.latent_channels, vae.num_latent_frames(num_frames), size // 8, size // 8)
    rows = []
    for direction, source, whole_of, make in (
        ("encode", sample, lambda x: vae.encode(x, return_dict=False)[0].mode(), lambda: StreamingEncoder(vae, 16)),
        ("decode", latents, lambda z: vae.decode(z, return_dict=False)[0], lambda: StreamingDecoder(vae, 4)),
    ):
        whole = whole_of(source) if num_frames <= 121 else None
        largest, num_out = 0.0, 0

        def check(output: torch.Tensor | None, whole: torch.Tensor | None = whole) -> None:
            nonlocal largest, num_out
            if output is not None:
                if whole is not None:  # in place: nothing is added to the peak
                    output.sub_(whole[:, :, num_out : num_out + output.shape[2]]).abs_()
                    largest = max(largest, output.max().item())
                num_out += output.shape[2]

        def run(source: torch.Tensor = source, make: Callable = make) -> None:
            pushed = make()
            for piece in source.split(1, dim=2):
                check(pushed.push(piece))
            check(pushed.flush())

        run(source[:, :, :33])  # a first and a later step: oneDNN keeps the code of every shape that it has seen
        largest, num_out = 0.0, 0
        row = {"direction": direction, "video": [num_frames, size, size]} | measure(run)
        assert num_out == (latents if direction == "encode" else sample).shape[2]
        if whole is not None:
            row["difference"] = float(f"{largest / whole.abs().max().item():.2g}")
        rows.append(row)
    return rows


def whole(model: str, num_frames: int, height: int, width: int, tile: tuple[int, int, int] | None = None) -> list[Row]:
    """`encode` and `decode` of a whole video, untiled or in tiles."""
    vae = make_vae(model)
    if tile is not None:
        vae.enable_tiling(*tile)
    sample = frames(num_frames, height, width)
    latents = torch.randn(1, vae.latent_channels, vae.num_latent_frames(num_frames), height // 8, width // 8)
    row = {"video": [num_frames, height, width], "tile": tile}
    return [
        {"direction": "encode", **row, **measure(lambda: vae.encode(sample))},
        {"direction": "decode", **row, **measure(lambda: vae.decode(latents))},
    ]


def write_source(path: Path, num_frames: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 20, width // 20, generator=generator)
    frame = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp_(0, 1)
    pixels = frame[0].mul_(255).byte().permute(1, 2, 0).contiguous()
    with VideoWriter(path, 25, preset="ultrafast") as writer:
        for index in range(num_frames):
            writer.write(pixels.roll(4 * index, dims=1)[None])


def reconstruct(model: str, num_frames: int, height: int, width: int, max_mib: int) -> list[Row]:
    """`leanvae reconstruct --max-memory`, without the start of a process and the loading of weights."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.mp4"), Path(folder, "out.mp4")
        write_source(source, num_frames, height, width)
        vae = make_vae(model)
        for _ in iter_video(source, num_frames=1):  # FFmpeg's code is loaded, as are kernels
            pass
        plan, looks_ahead = memory.plan_streams(vae, memory.VideoJob(num_frames, height, width), max_mib * MIB)
        measured = measure(lambda: files.reconstruct_video(vae, source, target, max_memory=max_mib * MIB))
    row = {"direction": "reconstruct", "video": [num_frames, height, width], "max_mib": max_mib, "tile": plan.layout}
    row |= {"step": plan.num_frames_per_step, "parked": plan.is_parked}
    return [row | {"preset": "medium" if looks_ahead else "ultrafast"} | measured]


def codec(num_frames: int, height: int, width: int, preset: str) -> list[Row]:
    """Memory that FFmpeg holds while it writes and reads a video: frames in flight that the network never sees."""
    row = {"video": [num_frames, height, width], "preset": preset}
    with tempfile.TemporaryDirectory() as folder:
        small, path = Path(folder, "small.mp4"), Path(folder, "video.mp4")
        write_source(small, 5, 64, 64)
        for _ in iter_video(small):
            pass
        coarse = torch.randint(256, (1, 3, height // 20, width // 20), dtype=torch.uint8)
        image = torch.nn.functional.interpolate(coarse.float(), size=(height, width), mode="bilinear")
        pixels = image[0].permute(1, 2, 0).byte().contiguous()
        del image

        def write() -> None:
            with VideoWriter(path, 25, preset=preset) as writer:
                for index in range(num_frames):
                    writer.write(pixels.roll(4 * index, dims=1)[None])

        def read() -> None:
            with VideoReader(path) as video:
                for _ in video.timed_frames(chunk_size=1):
                    pass

        return [{"direction": name, **row, **measure(work)} for name, work in (("write", write), ("read", read))]


CASES: dict[str, Callable[[str], list[Row]]] = {
    "codec-1080p-medium": lambda _: codec(60, 1080, 1920, "medium"),
    "codec-1080p-ultrafast": lambda _: codec(60, 1080, 1920, "ultrafast"),
    "whole-17x256": lambda m: whole(m, 17, 256, 256),
    "whole-5x64": lambda m: whole(m, 5, 64, 64),
    "whole-5x128": lambda m: whole(m, 5, 128, 128),
    "tiled-9x128-64": lambda m: whole(m, 9, 128, 128, (64, 64, 5)),
    "whole-17x512": lambda m: whole(m, 17, 512, 512),
    "tiled-17x512-256": lambda m: whole(m, 17, 512, 512, (256, 256, 17)),
    "tiled-33x256-128": lambda m: whole(m, 33, 256, 256, (128, 128, 17)),
    **{f"stream-{n}": (lambda m, n=n: stream(m, n)) for n in (1, 5, 17, 121, 1001)},
    "stream-1001x48": lambda m: stream(m, 1001, 48),
    "reconstruct-17x1080p": lambda m: reconstruct(m, 17, 1080, 1920, 2048),
    "reconstruct-1x1080p": lambda m: reconstruct(m, 1, 1080, 1920, 2048),
    "reconstruct-5x1080p": lambda m: reconstruct(m, 5, 1080, 1920, 2048),
    "whole-5x1080p": lambda m: whole(m, 5, 1080, 1920),
    "tiled-5x1080p-544x960": lambda m: whole(m, 5, 1080, 1920, (544, 960, 5)),
    "tiled-5x1080p-544x640": lambda m: whole(m, 5, 1080, 1920, (544, 640, 5)),
    "tiled-5x1080p-272x480": lambda m: whole(m, 5, 1080, 1920, (272, 480, 5)),
    "reconstruct-33x512-parked": lambda m: reconstruct(m, 33, 512, 512, 400),
    "reconstruct-17x2160p": lambda m: reconstruct(m, 17, 2160, 3840, 3072),
}
# The others take ten to a hundred times the arithmetic of LeanVAE, so that they get smaller cases.
SHORT_CASES = ["whole-5x64", "whole-5x128", "tiled-9x128-64"]
LONG_CASES = ["stream-1001x48", "reconstruct-1x1080p", "reconstruct-5x1080p"]
MODELS = {
    "LeanVAE-16ch": Model(
        AutoencoderKLLeanVAE, {"latent_channels": 16}, [name for name in CASES if name not in SHORT_CASES + LONG_CASES]
    ),
    "LeanVAE-compact": Model(
        AutoencoderKLLeanVAE, "compact_16ch.yaml", [*SHORT_CASES, "whole-17x256", "whole-5x1080p", *LONG_CASES]
    ),
    "WF-VAE-compact": Model(AutoencoderKLWFVAE, "compact_wfvae_16ch.yaml", SHORT_CASES + LONG_CASES),
    "IV-VAE-compact": Model(AutoencoderKLIVVAE, "compact_ivvae_16ch.yaml", SHORT_CASES + LONG_CASES),
    "WF-VAE-S-8ch": Model(
        AutoencoderKLWFVAE,
        {"latent_channels": 8, "base_channels": 128, "encoder_flow_channels": 64, "num_flow_layers": 2},
        SHORT_CASES,
    ),
    "IV-VAE-4ch": Model(AutoencoderKLIVVAE, {"latent_channels": 4}, SHORT_CASES),
}


def predict(rows: list[Row], model: str, num_threads: int) -> None:
    """Add to every row the planner's prediction and, for a tiled case, its time over the untiled one's."""
    with torch.device("meta"):
        vae = MODELS[model].make()
    vae = vae.to_empty(device="cpu")  # never touched, so no memory: slices are those of a CPU
    seconds = {(r["case"].split("-")[1], r["direction"]): r["cpu_seconds"] for r in rows if r["case"][:5] == "whole"}
    for row in rows:
        num_frames, height, width = row["video"]
        if row["case"].startswith("stream"):
            is_encode = row["direction"] == "encode"
            settings = ((height, width), num_frames, 16, (height, width, vae.num_frames_per_step or 17), 4)
            predicted = vae.memory_model().stream(*settings, encode=is_encode, decode=not is_encode).num_bytes
        elif row["direction"] == "reconstruct":
            layout = tuple(row["tile"] or (height, width, row["step"] + 1))
            job = memory.VideoJob(num_frames, height, width)
            others = memory.memory_beside_network(job, looks_ahead=row["preset"] == "medium", num_threads=num_threads)
            size = (-(-height // 8) * 8, -(-width // 8) * 8)
            plan = vae.memory_model().stream(
                size, num_frames, row["step"], layout, 4, is_parked=row["parked"], others=others
            )
            predicted = plan.num_bytes
        elif row["direction"] in ("encode", "decode"):
            untiled = (height, width, vae.num_frames_per_step or num_frames)
            tile_height, tile_width, num_chunk_frames = row["tile"] or untiled
            plan = vae.plan(num_frames, height, width, tile=(tile_height, tile_width, num_chunk_frames))
            predicted = plan.encode_bytes if row["direction"] == "encode" else plan.decode_bytes
            work = plan.encode_overhead if row["direction"] == "encode" else plan.decode_overhead
            untiled_seconds = seconds.get((row["case"].split("-")[1], row["direction"]))
            if row["tile"]:
                row["work"] = round(work, 3)
            if row["tile"] and untiled_seconds:
                row["time_ratio"] = round(row["cpu_seconds"] / untiled_seconds, 3)
        else:
            continue
        row["predicted_mib"] = round(predicted / MIB, 1)


def describe_run(provenance: dict[str, Any]) -> str:
    """The run that measured the peaks last."""
    return f"`{provenance['command']}`, {provenance['processor']}, {provenance['date']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), help="by default those of the model")
    parser.add_argument("--model", default="LeanVAE-16ch", choices=list(MODELS))
    parser.add_argument("--output", type=Path, help="by default results/bench_memory.json, with the model if another")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[: options.threads])  # FFmpeg takes a thread per core
        with torch.inference_mode():
            print(json.dumps(CASES[options.worker](options.model)))
        return
    if options.cases is None:
        options.cases = MODELS[options.model].cases
    if options.output is None:
        suffix = "" if options.model == "LeanVAE-16ch" else "_" + options.model.lower().replace("-", "_")
        options.output = Path(f"results/bench_memory{suffix}.json")
    kept = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    if kept.get("num_threads", options.threads) != options.threads:
        raise SystemExit(f"`--threads` must be {kept['num_threads']}, as for the other rows of {options.output}.")
    rows = kept["rows"]
    # Freed blocks go back to the system at once, so that resident memory is what is alive.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    for case in [*options.cases, None]:
        if case is not None:
            command = [sys.executable, __file__, "--worker", case, "--threads", str(options.threads)]
            command += ["--model", options.model]
            output = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if output.returncode:
                raise SystemExit(f"{case} failed:\n{output.stderr}")
            measured = [{"case": case} | row for row in json.loads(output.stdout.splitlines()[-1])]
            rows = [row for row in rows if row["case"] != case] + measured
        rows = [row for row in rows if row["case"] in CASES]
        rows.sort(key=lambda row: list(CASES).index(row["case"]))
        predict(rows, options.model, options.threads)
        for row in rows:
            if row["case"] == case:
                print(row, flush=True)
        order = (
            "case",
            "direction",
            "video",
            "tile",
            "step",
            "parked",
            "preset",
            "max_mib",
            "predicted_mib",
            "peak_mib",
        )
        keys = {key: None for row in rows for key in (*order, *row)}
        rows = [{key: row[key] for key in keys if key in row} for row in rows]
        about = {"model": f"{options.model}, random weights", "dtype": "float32", "num_threads": options.threads}
        if not options.cases and "provenance" in kept:  # that of a run that only predicts says nothing of the peaks
            about["peaks"] = kept.get("peaks") or describe_run(kept["provenance"])
        write_result(options.output, {"rows": rows} | about)


if __name__ == "__main__":
    main()

"""Time from file to file: reader, network and writer each alone, in turn, and side by side.

    python benchmarks/stages.py ../shared/videos/val/CLIP.mp4    # writes results/bench_stages.json

`over slowest` is the time side by side over that of the slowest stage alone; where the stages share the cores of a
processor it cannot come near 1. For a GPU, which leaves them to reader and writer, stands a tiny model that waits so
many milliseconds for each frame and direction. x264 looks 42 frames ahead, and compresses these when all else is done:
take clips of several times that. All are medians of rounds in which the cases take turns.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from diffusers_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.inference import files
from diffusers_leanvae.inference.streaming import StreamingDecoder, StreamingEncoder
from diffusers_leanvae.loading import load_autoencoder
from diffusers_leanvae.video_io import VideoReader, VideoWriter


ROOT = Path(__file__).resolve().parent.parent
STEP = 16


class WaitingAutoencoder(AutoencoderKLLeanVAE):
    """A model whose frames take `seconds` each, in which the processor is free."""

    seconds = 0.0

    def encode_moments(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        time.sleep(self.seconds * x.shape[2])
        return super().encode_moments(x, *arguments, **options)

    def decode_sample(self, z: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        time.sleep(self.seconds * z.shape[2] * self.temporal_compression_ratio)
        return super().decode_sample(z, *arguments, **options)


class Job:
    """One clip through one model: the whole command, and its stages alone."""

    def __init__(self, vae: Any, clip: Path, num_frames: int, folder: Path) -> None:
        self.vae, self.clip, self.folder = vae, clip, folder
        self.excerpt = files.Excerpt(num_frames=num_frames)
        self.latents = folder / "latents.safetensors"
        self.frames = list(self.read())
        with torch.inference_mode():
            self.encode()
            self.pictures = list(self.reconstructed())

    def read(self) -> Iterator[torch.Tensor]:
        with VideoReader(self.clip) as video:
            for frame, _ in video.timed_frames(0, self.excerpt.num_frames, chunk_size=1):
                yield frame

    def write(self) -> None:
        with VideoWriter(self.folder / "alone.mp4", Fraction(25)) as writer:
            for frame in self.pictures:
                writer.write(frame)

    def reconstructed(self) -> Iterator[torch.Tensor]:
        encoder = StreamingEncoder(self.vae, STEP)
        decoder = StreamingDecoder(self.vae, STEP // self.vae.temporal_compression_ratio)
        for unit, _ in files.reconstruct_frames(self.frames, encoder, decoder):
            yield files.picture(unit)

    def encoded(self) -> Iterator[torch.Tensor | None]:
        encoder = StreamingEncoder(self.vae, STEP)
        for frame in self.frames:
            yield encoder.push(files._to_sample(frame, self.vae))
        yield encoder.flush()

    def decoded(self) -> Iterator[torch.Tensor]:
        decoder = StreamingDecoder(self.vae, STEP // self.vae.temporal_compression_ratio)
        height, width = self.frames[0].shape[1:3]
        for unit in files._decode_frames(self.latents, decoder, height, width):
            yield files.picture(unit)

    def reconstruct(self) -> None:
        files.reconstruct_video(self.vae, self.clip, self.folder / "out.mp4", excerpt=self.excerpt)

    def encode(self) -> None:
        files.encode_video(self.vae, self.clip, self.latents, model="", checksum="", excerpt=self.excerpt)

    def decode(self) -> None:
        files.decode_video(self.vae, self.latents, self.folder / "out.mp4")


def in_turn(command: Callable[[], None]) -> None:
    """Run a command with no stage in a thread of its own."""
    open_streams = files._open_streams

    def without_threads(*arguments: Any) -> Any:
        return open_streams(*arguments)._replace(num_ahead=0)

    with mock.patch.object(files, "_open_streams", without_threads):
        command()


@torch.inference_mode()
def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in call() or ():
        pass
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--num-frames", type=int, default=120, help="frames for the model that waits")
    parser.add_argument("--num-frames-on-cpu", type=int, default=33, help="frames for the bundled model")
    parser.add_argument("--wait-ms", type=float, nargs="+", default=[2, 20])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads of the network")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "bench_stages.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        networks: dict[str, tuple[Any, int]] = {}
        for wait_ms in options.wait_ms:
            torch.manual_seed(0)
            vae = WaitingAutoencoder(low_freq_dim=8, high_freq_dim=24, num_ista_iterations=1).eval()
            vae.seconds = wait_ms / 1000
            networks[f"waits {wait_ms:g} ms a frame"] = vae, options.num_frames
        networks["compact-4ch on the CPU"] = load_autoencoder("compact-4ch").eval(), options.num_frames_on_cpu
        rows = []
        for network, (vae, num_frames) in networks.items():
            folder = Path(name, f"{len(rows)}")
            folder.mkdir()
            job = Job(vae, options.clip, num_frames, folder)
            cases: dict[str, dict[str, Callable[[], Any]]] = {
                "reconstruct": {"reader": job.read, "network": job.reconstructed, "writer": job.write},
                "encode": {"reader": job.read, "network": job.encoded},
                "decode": {"network": job.decoded, "writer": job.write},
            }
            commands = {"reconstruct": job.reconstruct, "encode": job.encode, "decode": job.decode}
            for case, stages in cases.items():
                command = commands[case]
                calls = stages | {"in turn": lambda c=command: in_turn(c), "side by side": command}
                measured: dict[str, list[float]] = {call: [] for call in calls}
                for _ in range(options.repeats):
                    for call in calls:
                        measured[call].append(seconds(calls[call]))
                found = {call: statistics.median(times) for call, times in measured.items()}
                slowest = max(found[stage] for stage in stages)
                row: dict[str, Any] = {"command": case, "network": network, "frames": len(job.frames)}
                row |= {
                    f"{call} s": round(found[call], 2) if call in found else None
                    for call in ("reader", "network", "writer", "in turn", "side by side")
                }
                row["over slowest"] = round(found["side by side"] / slowest, 2)
                row["in turn over slowest"] = round(found["in turn"] / slowest, 2)
                rows.append(row)
                print(*row.values(), sep=" | ", flush=True)
        height, width = job.frames[0].shape[1:3]
    write_result(options.output, {"protocol": f"{options.clip.name}, {width}x{height}, x264 medium", "rows": rows})


if __name__ == "__main__":
    main()

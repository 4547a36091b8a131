"""Frames that come later in a clip than any frame of a training, next to the same frames in clips of 17.

    python benchmarks/long_clips.py --held-out path/to/val    # writes results/bench_long_clips.json

In a clip longer than those of its training, a causal model has more frames before a frame than it ever saw. So frames
18 to 45 are reconstructed in a clip of 45 frames, and in clips of at most 17 that begin with the 17th and 33rd frame.
Static surfaces show best what the length costs, so beside the videos of a folder there are drawn scenes: two shapes
that move over an even colour. The table is in docs/benchmarks.md.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from diffusers_leanvae import bundled
from diffusers_leanvae.data.scenes import MovingScenes
from diffusers_leanvae.evaluation.clips import list_clips, read_clip
from diffusers_leanvae.evaluation.protocols import get_protocol
from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.loading import load_autoencoder
from diffusers_leanvae.models.video_autoencoder import VideoAutoencoder


ROOT = Path(__file__).resolve().parent.parent
SIZE, LONG, SHORT = 128, 45, 17


def drawn_clips(number: int) -> Iterator[torch.Tensor]:
    scenes = MovingScenes(LONG, SIZE, SIZE, seed=0)
    return (scenes[index].pixels for index in range(number))


def held_out_clips(folder: str) -> Iterator[torch.Tensor]:
    protocol = replace(get_protocol("val-17x256"), num_frames=LONG, resolution=SIZE)
    for clip in list_clips(folder, protocol):
        with clip.open() as video:
            yield read_clip(video, protocol, clip.name)


@torch.no_grad()
def measure(vae: VideoAutoencoder, clips: Iterator[torch.Tensor]) -> dict[str, float]:
    """Mean absolute errors of frames 18 to 45, in levels of 255: within the long clip, and within short ones."""

    def reconstruct(clip: torch.Tensor) -> torch.Tensor:
        return vae(clip[None], return_dict=False)[0][0].clamp(-1, 1)

    errors = []
    for clip in clips:
        whole = reconstruct(clip)[:, SHORT:]
        parts = [reconstruct(clip[:, start : start + SHORT])[:, 1:] for start in range(SHORT - 1, LONG - 1, SHORT - 1)]
        errors.append(torch.stack([(x - clip[:, SHORT:]).abs().mean() * 127.5 for x in (whole, torch.cat(parts, 1))]))
    in_long, in_short = torch.stack(errors).mean(dim=0).tolist()
    return {"error in the long clip": round(in_long, 3), "in clips of 17 frames": round(in_short, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", required=True, help="folder of videos to measure on")
    parser.add_argument("--model", nargs="+", default=list(bundled.MODELS), help="bundled, folders or of the Hub")
    parser.add_argument("--num-scenes", type=int, default=16, help="drawn scenes")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "bench_long_clips.json")
    options = parser.parse_args()
    rows = []
    for name in options.model:
        vae = load_autoencoder(name).eval()
        for kind, clips in (
            (f"{options.num_scenes} drawn scenes", drawn_clips(options.num_scenes)),
            ("held-out videos", held_out_clips(options.held_out)),
        ):
            figures = measure(vae, clips)
            ratio = figures["error in the long clip"] / figures["in clips of 17 frames"]
            rows.append({"model": name, "clips": kind} | figures | {"ratio": round(ratio, 3)})
            print(*rows[-1].values(), sep=" | ", flush=True)
    write_result(options.output, {"figures": "mean absolute error of frames 18 to 45, levels of 255", "rows": rows})


if __name__ == "__main__":
    main()

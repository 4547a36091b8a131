"""Does a generator of moving shapes show what it was asked for? Judged by a detector that it never saw.

    python benchmarks/shapes_generation.py                                     the bundled generator
    python benchmarks/shapes_generation.py runs/lvdm_shapes_mini/pipeline runs/other/pipeline

Of each pipeline: videos of the classes in turn, with and without guidance; the share whose shape, colour and
direction are all those of the class, the share of each by itself, and the time of a video. Beside them clips of the
data set that no training saw, as drawn and through the pipelines' autoencoders: what the detector, and the latents,
allow. Each set also has its Frechet distance to other drawn clips, by features of `--i3d` or `--feature-model`.
By default these are of a small VideoMAE with random weights, whose distances compare with no other figures than those
beside them; that of drawn clips says how small it can be. Writes `results/bench_shapes.json`.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from diffusers_leanvae import bundled
from diffusers_leanvae.data.shapes import NUM_CLASSES, MovingShapes, class_parts
from diffusers_leanvae.evaluation.features import I3DFeatures, TransformerFeatures, VideoFeatures
from diffusers_leanvae.evaluation.frechet import frechet_distance
from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.evaluation.shapes_detector import detect
from diffusers_leanvae.generation import load_pipeline
from diffusers_leanvae.video_io.pixels import sample_to_pixels


ROOT = Path(__file__).resolve().parent.parent


def judge(videos: torch.Tensor, labels: list[int]) -> dict[str, Any]:
    """Shares of right answers for videos `(num_videos, 3, T, H, W)` in `[-1, 1]`."""
    found = [detect(video) for video in videos]
    parts = [class_parts(label) for label in labels]
    count = len(labels)
    result: dict[str, Any] = {"num_videos": count}
    pairs = list(zip(found, labels, strict=True))
    result["accuracy"] = round(sum(detection.class_label == label for detection, label in pairs) / count, 4)
    for index, name in enumerate(("shape", "color", "direction")):
        right = sum(getattr(detection, name) == part[index] for detection, part in zip(found, parts, strict=True))
        result[f"{name}_accuracy"] = round(right / count, 4)
    return result


NUM_FEATURE_FRAMES = 16


@contextmanager
def random_videomae() -> Iterator[Path]:
    """Save a small VideoMAE with random weights of seed 0 for as long as it is needed."""
    from transformers import VideoMAEConfig, VideoMAEModel

    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=64,
        patch_size=8,
        num_frames=NUM_FEATURE_FRAMES,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
    )
    with TemporaryDirectory() as folder:
        path = Path(folder, "videomae-random-seed-0")
        VideoMAEModel(config).save_pretrained(path)
        yield path


def open_features(options: argparse.Namespace) -> VideoFeatures:
    if options.i3d is not None:
        return I3DFeatures(options.i3d, options.device)
    if options.feature_model is not None:
        return TransformerFeatures(options.feature_model, options.device)
    with random_videomae() as path:
        return TransformerFeatures(path, options.device)


def features_of(network: VideoFeatures, videos: torch.Tensor) -> torch.Tensor:
    pixels = sample_to_pixels(videos[:, :, :NUM_FEATURE_FRAMES]).transpose(1, 2)
    return torch.stack([network(clip) for clip in pixels])


@torch.no_grad()
def reconstruct_clips(vae: Any, clips: MovingShapes) -> tuple[torch.Tensor, list[int]]:
    """Return drawn clips, through an autoencoder if there is one, and their classes."""
    labels, videos = [], []
    for index in range(len(clips)):
        item = clips[index]
        labels.append(item.class_label)
        videos.append(
            item.pixels if vae is None else vae(item.pixels[None].to(vae.device)).sample[0].clamp(-1, 1).cpu()
        )
    return torch.stack(videos), labels


def judge_generator(pipeline: Any, scale: float, options: argparse.Namespace) -> tuple[dict[str, Any], torch.Tensor]:
    labels = [index % NUM_CLASSES for index in range(options.num_videos)]
    videos, started = [], time.perf_counter()
    for start in range(0, len(labels), options.batch_size):
        part = labels[start : start + options.batch_size]
        generators = [torch.Generator().manual_seed(options.seed + start + offset) for offset in range(len(part))]
        output = pipeline(
            class_labels=part,
            guidance_scale=scale,
            num_inference_steps=options.num_inference_steps,
            generator=generators,
            output_type="pt",
            return_dict=False,
        )[0]  # (B, T, C, H, W) in [0, 1]
        videos.append(output.cpu().permute(0, 2, 1, 3, 4) * 2 - 1)
    seconds = (time.perf_counter() - started) / len(labels)
    sample = torch.cat(videos)
    return judge(sample, labels) | {"seconds_per_video": round(seconds, 3)}, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="*", default=["mini-shapes"], help="bundled names or folders")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0])
    parser.add_argument("--num-videos", type=int, default=96)
    parser.add_argument("--num-clips", type=int, default=400, help="clips of the data set")
    parser.add_argument("--num-inference-steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--device", default="cpu", help="that generates, cpu or cuda; noise is always the CPU's")
    parser.add_argument("--i3d", help="I3D for the distance: the torchscript file of StyleGAN-V")
    parser.add_argument("--feature-model", help="vision model of transformers for the distance: folder or Hub id")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default=ROOT / "results/bench_shapes.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []

    def add(name: str, scale: float | None, figures: dict[str, Any]) -> None:
        rows.append({"videos": name, "guidance_scale": scale} | figures)
        print(rows[-1], flush=True)

    clips = MovingShapes(num_clips=options.num_clips, seed=2)
    network = open_features(options)
    reference = features_of(network, reconstruct_clips(None, MovingShapes(num_clips=options.num_clips, seed=3))[0])

    def distance(videos: torch.Tensor) -> dict[str, float]:
        # Of as many clips for every row, since the distance of a few samples is too large.
        features = features_of(network, videos[: options.num_videos])
        return {f"fvd_{network.name}": round(frechet_distance(features, reference), 5)}

    drawn, labels = reconstruct_clips(None, clips)
    add("drawn", None, judge(drawn, labels) | distance(drawn))
    for name in options.pipelines:
        pipeline = load_pipeline(name, torch.device(options.device), torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        shown = name if name in bundled.PIPELINES else "/".join(Path(name).parts[-2:])
        decoded, _ = reconstruct_clips(pipeline.vae, clips)
        add(f"drawn, through the autoencoder of {shown}", None, judge(decoded, labels) | distance(decoded))
        for scale in options.guidance:
            figures, sample = judge_generator(pipeline, scale, options)
            add(f"generated by {shown}", scale, figures | distance(sample))
    result = {
        "rows": rows,
        "num_inference_steps": options.num_inference_steps,
        "num_threads": options.threads,
        "features": network.description,
    }
    write_result(options.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

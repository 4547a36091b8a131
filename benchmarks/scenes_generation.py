"""Does a text-to-video pipeline show the scenes it was asked for? Judged by a detector that it never saw.

    python benchmarks/scenes_generation.py runs/lvdm_scenes/pipeline --device cuda --workers 8 --sheet samples.png

Prompts are captions of scenes of two objects that no training drew: some of looks (shape, colour and direction) that
training saw, others with a held-out look. Captions name size, speed and background or not, and what is not named
cannot be wrong; so of the captions of a scene the first one that names everything is taken, in whatever words and
order. Properties are compared object by object: what is above, or to the left, is the first.

Of each pipeline, with each guidance scale, the shares of videos
- `first_object`, `one_object`, `both_objects`: all five properties right of the first, of at least one, of both;
- `everything`: of both, and how they lie, and the background;
- `found`: two objects are there; the rest counts what is not found as wrong;
and of objects (relation and background: of videos) the share that is right in each property, and of those with a
held-out look the share that is right in all. Beside them the same scenes as drawn, and through the pipeline's
autoencoder: what the detector, and the latents, allow. Writes `results/bench_scenes.json`, after every row.
"""

import argparse
import json
import math
import multiprocessing
import re
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from diffusers_leanvae import bundled
from diffusers_leanvae.checks import parse_dtype
from diffusers_leanvae.data.scenes import HELD_OUT, MovingScenes, Scene, SceneObject
from diffusers_leanvae.evaluation.results import write_result
from diffusers_leanvae.evaluation.scenes_detector import ObjectDetection, SceneDetection, count_matches, detect_scene
from diffusers_leanvae.generation import load_pipeline
from diffusers_leanvae.video_io.pixels import unit_to_pixels


ROOT = Path(__file__).resolve().parent.parent
NAMED = (r"\b(small|large)\b", r"\b(slowly|quickly|fast)\b", r"\bbackground\b")
NUM_SHOWN_FRAMES = 5
TEXT_WIDTH = 320


def choose_prompts(scenes: MovingScenes) -> list[str]:
    """Choose for each scene the first caption that names size, speed and background; one in three does."""
    return [
        next(text for text in scenes.captions(index, 100) if all(re.search(words, text) for words in NAMED))
        for index in range(len(scenes))
    ]


def judge(scenes: list[Scene], found: list[SceneDetection]) -> dict[str, Any]:
    """Shares of what is right; see the head of this file."""
    pairs = list(zip(scenes, found, strict=True))
    matches = [count_matches(scene, detection) for scene, detection in pairs]
    objects: list[tuple[SceneObject, ObjectDetection | None, int]] = []
    for (scene, detection), (first, second) in zip(pairs, matches, strict=True):
        objects += [(scene.first, detection.first, first), (scene.second, detection.second, second)]
    relation = [scene.relation == detection.relation for scene, detection in pairs]
    background = [scene.background == detection.background for scene, detection in pairs]
    everything = [
        sum(match) == 2 and lies and ground for match, lies, ground in zip(matches, relation, background, strict=True)
    ]
    shares = {
        "first_object": [match[0] for match in matches],
        "one_object": [max(match) for match in matches],
        "both_objects": [min(match) for match in matches],
        "everything": everything,
        "found": [detection.first is not None for detection in found],
    }
    for name in ObjectDetection._fields:
        shares[name] = [seen is not None and getattr(item, name) == getattr(seen, name) for item, seen, _ in objects]
    shares |= {"relation": relation, "background": background}
    shares["held_out_objects"] = [match for item, _, match in objects if item.look in HELD_OUT]
    return {"num_videos": len(scenes)} | {
        name: round(sum(right) / len(right), 4) for name, right in shares.items() if right
    }


def detect_array(video: np.ndarray) -> SceneDetection:
    return detect_scene(torch.from_numpy(video))


class Detectors:
    """Detects what videos show, in other processes while more are generated."""

    def __init__(self, pool: ProcessPoolExecutor | None) -> None:
        self.pool = pool
        self.started: list[Future[SceneDetection] | SceneDetection] = []

    def add(self, videos: torch.Tensor) -> None:
        """Take videos `(num_videos, 3, num_frames, height, width)` in `[-1, 1]`."""
        for video in videos.float().cpu().numpy():  # arrays travel through a pipe, tensors through shared memory
            self.started.append(detect_array(video) if self.pool is None else self.pool.submit(detect_array, video))

    def results(self) -> list[SceneDetection]:
        done = [one.result() if isinstance(one, Future) else one for one in self.started]
        self.started = []
        return done


@contextmanager
def open_detectors(num_workers: int) -> Iterator[Detectors]:
    if num_workers < 2:
        yield Detectors(None)
        return
    context = multiprocessing.get_context("spawn")  # a process with a GPU must not fork
    with ProcessPoolExecutor(num_workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield Detectors(pool)


def video_size(pipeline: Any) -> tuple[int, int, int]:
    """Frames, height and width that the pipeline generates by default."""
    side = pipeline.transformer.config.sample_size * pipeline.vae.spatial_compression_ratio
    return pipeline.vae.num_sample_frames(pipeline.transformer.config.video_length), side, side


@torch.no_grad()
def judge_drawn(vae: Any, scenes: MovingScenes, detectors: Detectors, batch_size: int) -> dict[str, Any]:
    """Judge the scenes as drawn, or through an autoencoder."""
    for start in range(0, len(scenes), batch_size):
        batch = range(start, min(start + batch_size, len(scenes)))
        videos = torch.stack([scenes[index].pixels for index in batch])
        if vae is not None:
            videos = vae(videos.to(vae.device, vae.dtype)).sample
        detectors.add(videos)
    return judge([scenes.scene(index) for index in range(len(scenes))], detectors.results())


def judge_generator(
    pipeline: Any, scale: float, scenes: MovingScenes, detectors: Detectors, options: argparse.Namespace
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Generate a video of each scene's prompt; return the shares, and pictures of the first videos."""
    prompts, shown, seconds = choose_prompts(scenes), [], 0.0
    for start in range(0, len(prompts), options.batch_size):
        batch = prompts[start : start + options.batch_size]
        started = time.perf_counter()
        videos = (
            pipeline(
                prompt=batch,
                guidance_scale=scale,
                num_inference_steps=options.num_inference_steps,
                generator=[
                    torch.Generator().manual_seed(options.seed + start + offset) for offset in range(len(batch))
                ],
                output_type="pt",
                return_dict=False,
            )[0]
            .float()
            .cpu()
        )  # (B, T, C, H, W) in [0, 1]
        seconds += time.perf_counter() - started
        detectors.add(videos.permute(0, 2, 1, 3, 4) * 2 - 1)
        shown += list(videos[: max(0, options.num_shown - len(shown))])
    found = detectors.results()
    wanted = [scenes.scene(index) for index in range(len(scenes))]
    strips = [draw_strip(*parts) for parts in zip(shown, prompts, wanted, found, strict=False)]
    return judge(wanted, found) | {"seconds_per_video": round(seconds / len(prompts), 3)}, strips


def draw_strip(video: torch.Tensor, prompt: str, scene: Scene, found: SceneDetection) -> Image.Image:
    """Draw some frames of a video `(T, 3, H, W)` in `[0, 1]` side by side, the prompt, and how many objects fit."""
    places = torch.linspace(0, len(video) - 1, NUM_SHOWN_FRAMES).round().long()
    frames = unit_to_pixels(video[places].clamp(0, 1)).permute(2, 0, 3, 1)  # (H, T, W, 3)
    picture = Image.fromarray(frames.flatten(1, 2).numpy())
    strip = Image.new("RGB", (picture.width + TEXT_WIDTH, max(picture.height, 60)), "white")
    strip.paste(picture)
    num_right = sum(count_matches(scene, found))
    lines = [f"{num_right} of 2 objects right", *textwrap.wrap(prompt, 50)]
    ImageDraw.Draw(strip).text((picture.width + 6, 2), "\n".join(lines), fill=("red", "black", "green")[num_right])
    return strip


def write_sheet(path: Path, sections: list[tuple[str, list[Image.Image]]]) -> None:
    """Write a picture of all strips, in two columns, under the titles of their rows."""
    blocks = []
    for title, strips in sections:
        width, height = strips[0].size
        block = Image.new("RGB", (2 * width, 16 + math.ceil(len(strips) / 2) * (height + 2)), "white")
        ImageDraw.Draw(block).text((4, 2), title, fill="black")
        for index, strip in enumerate(strips):
            block.paste(strip, (index % 2 * width, 16 + index // 2 * (height + 2)))
        blocks.append(block)
    sheet = Image.new("RGB", (max(block.width for block in blocks), sum(block.height for block in blocks)), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+", help="folders of text-to-video pipelines, or bundled names")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0, 5.0])
    parser.add_argument("--num-videos", type=int, default=200, help="of trained looks, and as many of held-out ones")
    parser.add_argument("--num-inference-steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument(
        "--seed", type=int, default=1000, help="of the scenes and the noise; training must use another"
    )
    parser.add_argument("--device", default="cpu", help="that generates, cpu or cuda; noise is always the CPU's")
    parser.add_argument("--dtype", default="float32", help="to generate in, float32 or bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes that detect")
    parser.add_argument("--sheet", type=Path, help="picture of some videos, with their prompts")
    parser.add_argument("--num-shown", type=int, default=4, help="videos of each row in the picture")
    parser.add_argument("--output", default=ROOT / "results/bench_scenes.json")
    options = parser.parse_args()
    dtype = parse_dtype("--dtype", options.dtype, ("float32", "bfloat16"))
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    sections: list[tuple[str, list[Image.Image]]] = []
    result = {
        "rows": rows,
        "seed": options.seed,
        "num_inference_steps": options.num_inference_steps,
        "dtype": options.dtype,
        "num_threads": options.threads,
    }

    def add(name: str, looks: str, scale: float | None, figures: dict[str, Any]) -> None:
        rows.append({"videos": name, "looks": looks, "guidance_scale": scale} | figures)
        print(rows[-1], flush=True)
        write_result(options.output, result)  # a run that is cut short leaves what it has

    drawn: set[tuple[int, int, int]] = set()
    with open_detectors(options.workers) as detectors:
        for name in options.pipelines:
            pipeline = load_pipeline(name, torch.device(options.device), dtype)
            if not hasattr(pipeline, "encode_prompt"):
                raise ValueError(f"`pipelines` must be text-to-video pipelines, got {name!r} of other conditions.")
            pipeline.set_progress_bar_config(disable=True)
            shown = name if name in bundled.PIPELINES else "/".join(Path(name).parts[-2:])
            size = video_size(pipeline)
            sets = {
                looks: MovingScenes(*size, seed=options.seed, num_clips=options.num_videos, held_out=held_out)
                for looks, held_out in (("trained", False), ("held out", True))
            }
            for scale in options.guidance:
                for looks, scenes in sets.items():
                    figures, strips = judge_generator(pipeline, scale, scenes, detectors, options)
                    add(f"generated by {shown}", looks, scale, figures)
                    if options.sheet is not None and strips:
                        sections.append((f"{shown}, guidance {scale:g}, {looks} looks", strips))
                        write_sheet(options.sheet, sections)
            for looks, scenes in sets.items():
                add(
                    f"drawn, through the autoencoder of {shown}",
                    looks,
                    None,
                    judge_drawn(pipeline.vae, scenes, detectors, options.batch_size),
                )
                if size not in drawn:
                    add("drawn", looks, None, judge_drawn(None, scenes, detectors, options.batch_size))
            drawn.add(size)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

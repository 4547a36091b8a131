"""`demo`: the bundled clip through the bundled autoencoder, and videos of a bundled generator."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import bundled
from ..checks import check_place
from .common import Device, Json, counted, load_model, print_json


PROMPTS = [
    "a red circle moves left above a blue square moving down",
    "On a green background, a large white triangle moves up to the left of a small yellow cross that goes down.",
]
LABELS = ["red circle left", "blue cross right"]
NUM_STEPS = 25
FOLDER = Path("outputs/demo")
FILES = ("side_by_side.mp4", "frames.png", "latents.safetensors", "generated.mp4", "generated.png")


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = FOLDER,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames of the bundled clip to reconstruct.")] = 49,
    device: Device = "auto",
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help=f"Replace results that exist; those in {FOLDER}, which is for the demo alone, are in any case.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Reconstruct the bundled clip, generate two videos from texts, and print where the results are; works offline."""
    check_place("`--output`", output, output)
    for path in (output / name for name in FILES):
        if path.is_dir():
            raise ValueError(f"Results in `--output` must be files, got {str(path)!r}, which is a folder.")
        if path.exists() and not (overwrite or output == FOLDER):
            raise ValueError(f"Results in `--output` must not exist without `--overwrite`, got {str(path)!r}.")
    vae = load_model(bundled.DEFAULT, device)
    output.mkdir(parents=True, exist_ok=True)
    say = partial(typer.echo, err=as_json)
    result = reconstruct_clip(output, vae, num_frames, say) | generate_two(output, vae.device, say)
    if as_json:
        print_json(result)


def reconstruct_clip(output: Path, vae: Any, num_frames: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Write `side_by_side.mp4`, `frames.png` and `latents.safetensors`; say and return what was measured."""
    from ..inference.files import Excerpt, encode_video, reconstruct_video
    from ..inference.latents_file import open_latents
    from ..video_io import probe_video

    clip = bundled.clip_path()
    video, picture, latents = output / "side_by_side.mp4", output / "frames.png", output / "latents.safetensors"
    info = probe_video(clip)
    say(f"A clip of {info.width}x{info.height} through {bundled.DEFAULT} (a demonstration model) ...")
    excerpt = Excerpt(num_frames=num_frames)
    summary = reconstruct_video(vae, clip, video, excerpt=excerpt, side_by_side=True, metrics=True)
    write_contact_sheet(video, picture)
    encoded = encode_video(vae, clip, latents, model=bundled.DEFAULT, excerpt=excerpt)
    num_pixels = encoded.num_frames * encoded.height * encoded.width * 3
    with open_latents(latents) as (values, _):
        num_latents = math.prod(values.get_shape())
    say(
        f"{counted(summary['num_frames'], 'frame')}, PSNR {summary['psnr_frame_mean_rgb']:.2f} dB, "
        f"SSIM {summary['ssim_frame_mean_rgb']:.4f}, {num_pixels / num_latents:.1f} times fewer numbers than pixels.\n"
        f"Original (left) and reconstruction (right): {video.resolve()}\n"
        f"Three frames of it:                         {picture.resolve()}\n"
        f"The latents:                                {latents.resolve()}"
    )
    measured = {key: summary[key] for key in ("num_frames", "psnr_frame_mean_rgb", "ssim_frame_mean_rgb")}
    return {"model": bundled.DEFAULT, **measured, "video": video, "picture": picture, "latents": latents}


def generate_two(output: Path, device: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Write `generated.mp4` and `generated.png`: videos from texts, or of classes, which need no text encoder."""
    from diffusers.utils import is_transformers_available

    from ..generation import generate_videos

    takes_text = is_transformers_available()
    name, wanted = bundled.default_pipeline(takes_text), PROMPTS if takes_text else LABELS
    video, picture = output / "generated.mp4", output / "generated.png"
    if not takes_text:
        say('Videos from texts need transformers: pip install "diffusers-leanvae[text]"; these are of classes.')
    say(f"Two videos of {name} (a demonstration of {'text' if takes_text else 'class'} to video) ...")
    conditions: dict[str, Any] = {"prompts" if takes_text else "labels": wanted}
    generate_videos(name, video, **conditions, num_inference_steps=NUM_STEPS, device=device)
    write_contact_sheet(video, picture)
    say(f"Generated, {'; '.join(wanted)}: {video.resolve()}\nThree frames of it: {picture.resolve()}")
    return {"generator": name, "wanted": wanted, "generated_video": video, "generated_picture": picture}


def write_contact_sheet(video: Path, target: Path, num_frames: int = 3) -> None:
    """Write evenly spaced frames of a video as one picture, one below the other."""
    import torch

    from ..video_io import read_video, write_video

    frames, _ = read_video(video)
    chosen = torch.linspace(0, len(frames) - 1, num_frames).round().long()
    write_video(target, torch.cat(tuple(frames[chosen]))[None], fps=1)

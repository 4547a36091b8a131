"""The demonstration behind `leanvae demo`: one clip through the bundled model, and videos of the bundled generator."""

from pathlib import Path

import torch
import typer

from .. import bundled
from ..generation.videos import generate_videos
from ..inference import files
from ..models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from ..video_io import probe_video, read_video, write_video


def write_contact_sheet(video: str | Path, target: str | Path, num_frames: int = 3) -> None:
    r"""A picture of frames of a video, evenly spaced, one below the other."""
    frames, _ = read_video(video)
    chosen = torch.linspace(0, len(frames) - 1, num_frames).round().long()
    write_video(target, torch.cat(tuple(frames[chosen]))[None], fps=1)


GENERATOR = next(iter(bundled.PIPELINES))
GENERATED = ("red circle left", "yellow triangle down", "blue cross right")


def run_demo(output: Path, vae: AutoencoderKLLeanVAE, num_frames: int) -> None:
    r"""Write everything into `output`, and print what was measured.

    That is `side_by_side.mp4`, `frames.png`, `latents.safetensors`; and `generated.mp4`, `generated.png`.
    """
    output.mkdir(parents=True, exist_ok=True)
    clip = bundled.clip_path()
    video, picture, latents = output / "side_by_side.mp4", output / "frames.png", output / "latents.safetensors"
    info = probe_video(clip)
    typer.echo(f"A clip of {info.width}x{info.height} through {bundled.DEFAULT} (a demonstration model) ...")
    summary = files.reconstruct_video(vae, clip, video, num_frames=num_frames, side_by_side=True, metrics=True)
    write_contact_sheet(video, picture)
    encoded = files.encode_video(vae, clip, latents, model=bundled.DEFAULT, num_frames=num_frames)
    pixels = encoded.num_frames * encoded.height * encoded.width * 3
    with files.open_latents(latents) as (values, _):
        numbers = torch.Size(values.get_shape()).numel()
    typer.echo(
        f"{summary['num_frames']} frames, PSNR {summary['psnr_frame_mean_rgb']:.2f} dB, "
        f"SSIM {summary['ssim_frame_mean_rgb']:.4f}, {pixels / numbers:.1f} times fewer numbers than pixels.\n"
        f"Original (left) and reconstruction (right): {video.resolve()}\n"
        f"Three frames of it:                         {picture.resolve()}\n"
        f"The latents:                                {latents.resolve()}"
    )
    video, picture = output / "generated.mp4", output / "generated.png"
    typer.echo(f"Videos of {GENERATOR} (a demonstration generator) ...")
    labels: list[str] = list(GENERATED)
    generate_videos(GENERATOR, video, labels=labels, num_inference_steps=25, device=vae.device)
    write_contact_sheet(video, picture)
    typer.echo(f"Generated, {'; '.join(GENERATED)}: {video.resolve()}\nThree frames of it: {picture.resolve()}")

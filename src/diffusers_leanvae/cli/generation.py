"""Latent diffusion: `generate`, `encode-dataset`."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import bundled
from ..checks import parse_dtype, parse_video_size
from .choices import DTYPE_NAMES, SCHEDULERS, complete
from .common import (
    Codec,
    Crf,
    Device,
    Dtype,
    Json,
    Model,
    PixFmt,
    load_model,
    memory_limit,
    place,
    print_json,
    progress_bar,
    shows_progress,
)


def generate(
    output: Annotated[
        str,
        typer.Option(
            help="Video or animation to write, several in a grid (.mp4, .mkv, .mov, .webm, .gif, .webp, f_%04d.png), "
            "or a picture with --num-frames 1 (.png, .jpg); a name without an extension, or with a slash at the end, "
            "is a folder with one file for each."
        ),
    ] = "outputs/generated.mp4",
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Pipeline: a bundled one ({', '.join(bundled.PIPELINES)}), a folder, or a Hub id (user/repo). "
            f"Without it {bundled.default_pipeline(takes_text=True)} with --prompt, else "
            f"{bundled.default_pipeline(takes_text=False)}.",
            autocompletion=complete(*bundled.PIPELINES),
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="Class of the video, by name or number; repeat it for several. Without it random classes."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Description of the video, for text-to-video pipelines; repeat it for several."),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image file for the first frame of every video.")] = None,
    num_videos: Annotated[
        int | None, typer.Option(min=1, help="Number of videos; without it one for each label or prompt, else 1.")
    ] = None,
    num_frames: Annotated[
        int | None,
        typer.Option(min=1, help="Frames of each video; without it the number the pipeline was trained on."),
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=1, help="Height in pixels; without it the height the pipeline was trained on.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Width in pixels; without it the width the pipeline was trained on.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps: more are slower, and usually better.")] = 50,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Strength of classifier-free guidance; 1 turns it off. Without it the pipeline's default; bundled "
            "pipelines bring their own."
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Sampler: ddpm, ddim or dpm++ for models that predict noise, flow for flow matching. Without it the "
            "pipeline's own.",
            autocompletion=complete(*SCHEDULERS),
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, help="Seed of the first video; every further video takes the next number."),
    ] = 0,
    fps: Annotated[float, typer.Option(help="Frame rate of the files in frames per second.")] = 8,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Videos to generate at once; the result does not depend on it.")
    ] = 4,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Upper limit of memory for decoding, in addition to the weights, such as 2GiB: smaller tiles, the "
            "same pixels. Without it no limit."
        ),
    ] = None,
    codec: Codec = None,
    crf: Crf = None,
    pix_fmt: PixFmt = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace outputs that exist. Without it one that exists is an error.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Generate videos of a class or from a text with a latent diffusion pipeline."""
    if guidance_scale is not None and not 0 <= guidance_scale < math.inf:
        raise ValueError(f"`--guidance-scale` must be a finite number from 0 on, got {guidance_scale}.")
    from ..generation import generate_videos

    limit = memory_limit(max_memory)
    torch_device, torch_dtype = place(device, dtype)
    name = model or bundled.default_pipeline(takes_text=bool(prompt))
    written = generate_videos(
        name,
        output,
        labels=label or None,
        prompts=prompt or None,
        image=image,
        num_videos=num_videos,
        scheduler=scheduler,
        num_inference_steps=steps,
        seed=seed,
        batch_size=batch_size,
        device=torch_device,
        dtype=torch_dtype,
        max_memory=limit,
        fps=fps,
        codec=codec,
        crf=crf,
        pixel_format=pix_fmt,
        overwrite=overwrite,
        show_progress=shows_progress(),
        num_frames=num_frames,
        height=height,
        width=width,
        guidance_scale=guidance_scale,
    )
    if as_json:
        print_json({"model": name, "files": written})
        return
    for path in written:
        typer.echo(path)


def encode_dataset(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of videos, tar shards (quoted pattern), stream (hub:user/name), named data set "
            "(ucf101:FOLDER), or drawn clips: shapes, scenes.",
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="Folder for the latents, here or at a URL (s3://...); an unfinished one is resumed."
        ),
    ],
    model: Model = bundled.DEFAULT,
    clip_size: Annotated[
        str, typer.Option(help="Size of a clip, FRAMESxHEIGHTxWIDTH in frames and pixels.")
    ] = "17x256x256",
    num_crops: Annotated[int, typer.Option(min=1, help="Clips to cut from each video.")] = 1,
    flip: Annotated[
        Literal["auto", "none", "random", "both"],
        typer.Option(
            help="Mirror clips left to right: none, a random half of them, or both (each clip twice); auto does what "
            "is usual for a named data set."
        ),
    ] = "auto",
    sampling: Annotated[
        Literal["exact", "reference"],
        typer.Option(help="Choice of frames in named data sets: exact, or reference for the published way."),
    ] = "exact",
    stride: Annotated[
        int | None, typer.Option(min=1, help="Take every n-th frame; without it 3 for named data sets, else 1.")
    ] = None,
    short_side: Annotated[
        int | None,
        typer.Option(min=1, help="Shorter side in pixels to scale larger videos down to, before clips are cut."),
    ] = None,
    num_clips: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of clips (required for streams); without it all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed for choosing the crops.")] = 0,
    caption_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the metadata file, key of the .json files, or column of the Hub data set with the "
            "captions, a text or a list; without it caption, text, txt or captions."
        ),
    ] = None,
    num_captions: Annotated[int, typer.Option(min=1, help="Descriptions of each clip of scenes.")] = 1,
    save_dtype: Annotated[
        str,
        typer.Option(
            help="Number type of the stored latents: float32 (fp32) or float16 (fp16).",
            autocompletion=complete("float32", "fp32", "float16", "fp16"),
        ),
    ] = "float32",
    file_format: Annotated[
        Literal["safetensors", "webdataset"], typer.Option(help="Format of the files that hold the latents.")
    ] = "safetensors",
    shard_size: Annotated[int, typer.Option(min=1, help="Clips in each file.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips to encode at once.")] = 8,
    num_workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Processes that read videos ahead; 0 reads them in the main process. With ray: at most so many on "
            "all machines; 0 for as many as there are processors.",
        ),
    ] = 0,
    text_encoder: Annotated[
        str | None,
        typer.Option(
            help="Text encoder of transformers (folder or Hub id; T5, CLIP, ...) to store embeddings of the captions "
            "with; also later, for latents that are there."
        ),
    ] = None,
    text_max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that captions are cut to; without it 120, or as many as the encoder takes."),
    ] = None,
    text_dtype: Annotated[
        str,
        typer.Option(
            help="Number type of the text encoder and of the stored embeddings: float32 (fp32), bfloat16 (bf16) or "
            "float16 (fp16).",
            autocompletion=complete(*DTYPE_NAMES),
        ),
    ] = "float32",
    engine: Annotated[
        Literal["processes", "ray"],
        typer.Option(
            help="Program that shares out the work: processes for this one or those of torchrun, ray for Ray Data, on "
            "this machine or a cluster. The files are the same."
        ),
    ] = "processes",
    num_encoders: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes of ray that encode; without it one per GPU, or one per two processors without GPUs.",
        ),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Encode a data set to latents once, for training a diffusion model on them.

    Started again with the same options it resumes where it stopped.

    `torchrun --nproc_per_node N --no-python leanvae encode-dataset ...` runs it in N processes.
    """
    from ..data import latent_cache
    from ..launching import is_first_process, leaving_job

    size = parse_video_size("--clip-size", clip_size)
    parse_dtype("--save-dtype", save_dtype, latent_cache.SHARD_DTYPES)
    vae = load_model(model, device, dtype)
    with (
        leaving_job(),
        progress_bar("clips") as advance,
        progress_bar("clips", "captions") if text_encoder else nullcontext() as advance_captions,
    ):
        latents = latent_cache.encode_dataset(
            vae,
            source,
            target,
            clip_size=size,
            num_crops=num_crops,
            flip=flip,
            sampling=sampling,
            stride=stride,
            short_side=short_side,
            num_clips=num_clips,
            seed=seed,
            caption_column=caption_column,
            num_captions=num_captions,
            dtype=save_dtype,
            file_format=file_format,
            shard_size=shard_size,
            batch_size=batch_size,
            num_workers=num_workers,
            text_encoder=text_encoder,
            text_max_length=text_max_length,
            text_dtype=text_dtype,
            engine=engine,
            num_encoders=num_encoders,
            progress=advance,
            text_progress=advance_captions,
        )
        is_first = is_first_process()
    if is_first and as_json:
        figures = {name: latents.index[name] for name in ("num_items", "shape", "num_skipped", "num_captions")}
        print_json({"output": target} | figures)
    elif is_first:
        shape = " x ".join(str(edge) for edge in latents.index["shape"])
        typer.echo(f"{target}  {len(latents)} latents of {shape}  {latents.index['num_skipped']} clips skipped")

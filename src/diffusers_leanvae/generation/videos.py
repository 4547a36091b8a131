"""Generate videos with a pipeline and write them to files, as `leanvae generate` does."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .. import bundled
from ..checks import check_choice, check_positive, is_integer
from ..loading import load_diffusion_pipeline
from ..models.video_autoencoder import VideoAutoencoder
from ..video_io import VideoWriter, read_video
from ..video_io.formats import check_output
from ..video_io.pixels import pixels_to_unit, unit_to_pixels, video_grid
from ..video_io.writer import MIN_RATE
from .pipeline import LatentVideoPipeline
from .schedulers import SCHEDULERS, make_scheduler, respaced_timesteps


def load_pipeline(name: str, device: torch.device, dtype: torch.dtype) -> LatentVideoPipeline:
    """Load a latent video pipeline by the name of a bundled one, by its folder, or by its Hub id.

    Raises:
        ValueError: If there is none, or it is of another kind.
    """
    try:
        pipeline = load_diffusion_pipeline(name, dtype)
    except ValueError as error:
        raise ValueError(f"`model` {name!r} cannot be loaded: {error}") from None
    if not isinstance(pipeline, LatentVideoPipeline):
        raise ValueError(f"`model` must be a latent video pipeline of this package, got a {type(pipeline).__name__}.")
    return pipeline.to(device)


def choose_scheduler(pipeline: LatentVideoPipeline, name: str | None, num_inference_steps: int) -> dict[str, Any]:
    """Put the named scheduler into a pipeline; return the arguments of its call that set the steps.

    Raises:
        ValueError: If the model was trained for other schedulers.
    """
    if name is None:
        return {"num_inference_steps": num_inference_steps}
    is_flow = isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    legal = [n for n in SCHEDULERS if (n == "flow") == is_flow]
    check_choice("scheduler", name, legal, "for this model")
    if not is_flow:  # of which there is only the pipeline's own
        pipeline.scheduler = make_scheduler(name)
    if name in ("ddpm", "ddim"):  # exactly the steps of the reference
        return {"timesteps": respaced_timesteps(num_inference_steps)}
    return {"num_inference_steps": num_inference_steps}


def generate_videos(
    model: str,
    output: str | Path,
    *,
    labels: list[str] | None = None,
    prompts: list[str] | None = None,
    image: Path | None = None,
    num_videos: int | None = None,
    scheduler: str | None = None,
    num_inference_steps: int = 50,
    seed: int = 0,
    batch_size: int = 4,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    max_memory: int | None = None,
    fps: float = 8,
    codec: str | None = None,
    crf: float | None = None,
    pixel_format: str | None = None,
    overwrite: bool = True,
    show_progress: bool = False,
    **options: Any,
) -> list[Path]:
    """Generate videos and write them.

    Args:
        model: A bundled pipeline, a folder or a Hub id: see [`load_pipeline`].
        output: A video file, an animation or numbered pictures (`f_%04d.png`), or of `num_frames=1` a picture, in
            which several videos form a grid; or, by a name without an extension or with a slash at its end, a folder
            with one file for each.
        labels: Classes by name or id, used in turn; random ones if `None`.
        prompts: Texts, used in turn, for a text-to-video pipeline.
        image: Image file with the first frame of the videos.
        num_videos: Total number of videos; by default one for each label or prompt.
        scheduler: One of [`SCHEDULERS`], or `None` for the pipeline's own.
        num_inference_steps: Number of steps.
        seed: Video `i` comes from `seed + i`, whatever the batch.
        batch_size: Videos that are generated at once.
        device: Device to compute on.
        dtype: Dtype of the weights and of the computation.
        max_memory: Bytes that decoding may use in addition to the weights; the autoencoder chooses its tiles by it.
        fps: Frames per second of the files, as of `VideoWriter`.
        codec: Codec of the files, by default that of their container; see `VideoWriter`.
        crf: Constant rate factor of the files; lower is better.
        pixel_format: Pixel format of the files, by default that of the codec.
        overwrite: Whether files that exist may be replaced.
        show_progress: Whether to show a progress bar.
        options: Further arguments of the pipeline; `None` keeps its default. Bundled pipelines bring their own
            guidance scale.

    Returns:
        The files.

    Raises:
        ValueError: If an argument is not legal or does not fit the pipeline.
    """
    writer_options: dict[str, Any] = {"codec": codec, "crf": crf, "pixel_format": pixel_format, "overwrite": overwrite}
    if not MIN_RATE <= fps < 100000:
        raise ValueError(f"`fps` must be at least 0.00001 and less than 100000, got {fps}.")
    if not is_integer(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"`seed` must be an integer from 0 to 2**63 - 1, got {seed!r}.")
    for name, value in (
        ("num_videos", 1 if num_videos is None else num_videos),
        ("num_inference_steps", num_inference_steps),
        ("batch_size", batch_size),
    ):
        check_positive(name, value)
    for name, texts in (("labels", labels), ("prompts", prompts)):
        if texts is not None and (isinstance(texts, str) or not texts):
            raise ValueError(f"`{name}` must be a list of at least one text or None, got {texts!r}.")
    folder, num_frames = _find_folder(output), options.get("num_frames")
    if folder is None:
        _check_files([Path(output)], num_frames, writer_options)
    else:  # which files there will be, only the pipeline knows
        _check_files([folder / "000.mp4"], num_frames, writer_options | {"overwrite": True})
    pipeline = load_pipeline(model, device, dtype)
    if max_memory is not None:
        if not isinstance(pipeline.vae, VideoAutoencoder):
            name = type(pipeline.vae).__name__
            raise ValueError(f"`max_memory` needs an autoencoder of this package, got an `{name}`.")
        pipeline.vae.check_can_stream("max_memory")
        pipeline.vae.enable_tiling(budget=max_memory)
    pipeline.set_progress_bar_config(disable=not show_progress, leave=False)
    options = {key: value for key, value in options.items() if value is not None}
    if bundled.is_bundled(model, bundled.PIPELINES):
        options = {"guidance_scale": bundled.PIPELINES[model].guidance_scale} | options
    options |= choose_scheduler(pipeline, scheduler, num_inference_steps)
    if image is not None:
        options["image"] = pixels_to_unit(read_video(image, num_frames=1)[0]).permute(0, 3, 1, 2)
    argument, conditions = _conditions(pipeline, labels, prompts, num_videos, seed)
    paths = [Path(output)] if folder is None else [folder / name for name in _file_names(conditions)]
    if num_frames is None:
        num_frames = pipeline.layout.num_sample_frames(pipeline._num_trained_latent_frames())
    _check_files(paths, num_frames, writer_options)

    batches = []
    for start in range(0, len(conditions), batch_size):
        batch = conditions[start : start + batch_size]
        given = {"num_videos_per_prompt": len(batch)} if argument is None else {argument: batch}
        generator = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        # Latents: of a long video they are little, and it is decoded only while it is written.
        batches += pipeline(**given, generator=generator, output_type="latent", return_dict=False, **options)
    latents = torch.cat(batches)

    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path, one in zip(paths, [latents] if folder is None else latents.split(1), strict=True):
        with VideoWriter(path, fps, **writer_options) as writer:
            for piece in pipeline.decode_stream(one):
                writer.write(video_grid(unit_to_pixels(piece).permute(0, 1, 3, 4, 2)))
    return paths


def _find_folder(output: str | Path) -> Path | None:
    """Return the output as a folder for several files, or `None` if it is a file."""
    path = Path(output)
    is_folder = path.is_dir() or str(output).endswith(("/", os.sep)) or not re.fullmatch(r"\.\w{1,5}", path.suffix)
    return path if is_folder else None


def _check_files(paths: list[Path], num_frames: int | None, writer_options: dict[str, Any]) -> None:
    """Refuse outputs that could not be written, without touching anything; `num_frames` is `None` if not known yet."""
    for path in paths:
        output = check_output(path, makes_folders=True, **writer_options)
        if output.kind == "image" and num_frames not in (None, 1):
            raise ValueError(
                f"Cannot write {str(path)!r}: an image file holds one frame, and there would be {num_frames}; "
                f"`num_frames=1` (`--num-frames 1`) makes one, and a pattern such as '{path.stem}_%04d{path.suffix}' "
                "writes one file for each."
            )


def _file_names(conditions: list[Any]) -> list[str]:
    """Name the files of a folder by number and condition."""
    words = ["" if each is None else re.sub(r"\W+", "-", str(each)).strip("-")[:60] for each in conditions]
    return [f"{index:03d}{'-' * bool(text)}{text}.mp4" for index, text in enumerate(words)]


def _conditions(
    pipeline: LatentVideoPipeline,
    labels: list[str] | None,
    prompts: list[str] | None,
    num_videos: int | None,
    seed: int,
) -> tuple[str | None, list[Any]]:
    """Return the name of the pipeline's argument, and its value for each video."""
    takes_text = hasattr(pipeline, "encode_prompt")
    num_classes = None if takes_text else pipeline.transformer.config.num_classes
    if labels is not None and num_classes is None:
        kind = "a text-to-video" if takes_text else "an unconditional"
        raise ValueError(f"`label` must not be given to {kind} pipeline, got {', '.join(labels)}.")
    if (prompts is not None) != takes_text:
        came = "none" if prompts is None else "one"
        raise ValueError(f"`prompt` must{'' if takes_text else ' not'} be given to this pipeline, got {came}.")
    if takes_text:
        values: list[Any] = list(prompts or [])
    elif num_classes is None:
        return None, [None] * (num_videos or 1)
    elif labels is None:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(num_classes, (num_videos or 1,), generator=generator).tolist()
    else:
        values = [int(label) if label.isdecimal() else label for label in labels]
    count = num_videos or len(values)
    return "prompt" if takes_text else "class_labels", [values[i % len(values)] for i in range(count)]

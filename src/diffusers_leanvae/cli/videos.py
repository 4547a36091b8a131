"""Videos to videos, to latents and back: `reconstruct`, `encode`, `decode`, `live`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import bundled
from ..checks import check_choice
from .common import (
    STANDARD,
    Advance,
    Background,
    Codec,
    Crf,
    Device,
    Dtype,
    Format,
    Fps,
    Frames,
    Fuse,
    Json,
    MaxMemory,
    Model,
    NumFrames,
    Overwrite,
    PixFmt,
    Size,
    SquarePixels,
    Start,
    check_standard_output,
    counted,
    load_known_model,
    load_model,
    memory_limit,
    parse_color,
    parse_rate,
    say_demonstration,
    standard_input,
)
from .jobs import Jobs, Naming, check_latents, check_outputs, find_jobs, process


if TYPE_CHECKING:
    from ..inference.latents_file import LatentsInfo

Source = Annotated[
    str,
    typer.Argument(
        metavar="IN",
        help="Video or image to read, or a folder of them; - for standard input, http(s):// and hf:// addresses, or "
        "numbered pictures (f_%04d.png).",
    ),
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="OUT",
        help="Video or image to write, or the folder for it; a folder if IN is one. - is standard output, f_%04d.png "
        "numbered pictures. Of clip.mov in a folder comes clip.mp4, and clip.mov.mp4 if there is a clip.mkv as well.",
    ),
]
SideBySide = Annotated[
    bool, typer.Option("--side-by-side", help="Put the original to the left of the reconstruction.")
]


def reconstruct(
    context: typer.Context,
    source: Source,
    target: Target,
    model: Model = bundled.DEFAULT,
    side_by_side: SideBySide = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="Print PSNR (dB) and SSIM of each video.")] = False,
    start: Start = 0,
    num_frames: NumFrames = None,
    size: Size = None,
    fps: Fps = None,
    square_pixels: SquarePixels = False,
    background: Background = "white",
    frames: Frames = False,
    codec: Codec = None,
    crf: Crf = None,
    pix_fmt: PixFmt = None,
    file_format: Format = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    fuse: Fuse = False,
    max_memory: MaxMemory = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Encode and decode videos or images, to see what the autoencoder keeps of them."""
    from ..inference import files
    from ..video_io.inputs import is_media, list_videos

    check_format(file_format, source, target, frames)
    naming = Naming(list_videos, lambda path: files.default_suffix(path, file_format), is_media)
    jobs = find_jobs(source, target, naming, frames=frames, overwrite=overwrite, as_json=as_json)
    options = writer_options(jobs, codec, crf, pix_fmt, file_format)
    excerpt = read_excerpt(start, num_frames, size, fps, square_pixels, background)
    limit = memory_limit(max_memory)
    say_demonstration(context, model)
    vae = load_model(model, device, dtype, fuse)

    def work(path: Path | str, output: Path | str, progress: Advance) -> dict[str, Any]:
        return files.reconstruct_video(
            vae,
            path,
            output,
            excerpt=excerpt,
            side_by_side=side_by_side,
            metrics=metrics,
            max_memory=limit,
            progress=progress,
            **options,
        )

    process(jobs, overwrite, work, as_json)


def encode(
    context: typer.Context,
    source: Source,
    target: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="Latents to write (.safetensors), or the folder for them; a folder if IN is one."
        ),
    ],
    model: Model = bundled.DEFAULT,
    start: Start = 0,
    num_frames: NumFrames = None,
    size: Size = None,
    fps: Fps = None,
    square_pixels: SquarePixels = False,
    background: Background = "white",
    frames: Frames = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    fuse: Fuse = False,
    max_memory: MaxMemory = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Encode videos or images to latents (posterior means, not normalised) in safetensors files, with their sound."""
    from ..inference import files
    from ..loading import portable_reference
    from ..video_io.inputs import list_videos

    naming = Naming(list_videos, lambda _: ".safetensors", lambda _: False)
    jobs = find_jobs(source, target, naming, frames=frames, overwrite=overwrite, as_json=as_json)
    check_latents(jobs)
    excerpt = read_excerpt(start, num_frames, size, fps, square_pixels, background)
    limit = memory_limit(max_memory)
    say_demonstration(context, model)
    vae, checksum = load_known_model(model, device, dtype, fuse)
    name, revision = portable_reference(model)

    def work(path: Path | str, output: Path | str, progress: Advance) -> dict[str, Any]:
        info = files.encode_video(
            vae,
            path,
            output,
            model=name,
            revision=revision,
            checksum=checksum,
            excerpt=excerpt,
            max_memory=limit,
            progress=progress,
        )
        return summarize(info)

    process(jobs, overwrite, work, as_json)


def decode(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN", help="Latents that `leanvae encode` wrote, or a folder of them; - or an address, too."
        ),
    ],
    target: Target,
    model: Annotated[
        str | None, typer.Option(help="Autoencoder, as of `leanvae encode`; without it the one that encoded the file.")
    ] = None,
    any_weights: Annotated[
        bool,
        typer.Option(
            "--any-weights", help="Decode with other weights than those that encoded, such as a fine-tuned decoder."
        ),
    ] = False,
    audio_from: Annotated[
        str | None,
        typer.Option(help="File to take sound, subtitles and chapters from. Without it those kept with the latents."),
    ] = None,
    codec: Codec = None,
    crf: Crf = None,
    pix_fmt: PixFmt = None,
    file_format: Format = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    fuse: Fuse = False,
    max_memory: MaxMemory = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Decode latents to videos or images of the original size, length, frame rate and sound."""
    from ..inference.files import decode_video, default_suffix
    from ..inference.latents_file import LatentsInfo, open_latents
    from ..video_io.inputs import is_remote, list_files, local_file

    def is_latents(path: Path) -> bool:
        return path.suffix == ".safetensors"

    def suffix(path: Path) -> str:
        try:
            with open_latents(path) as (_, info):
                return default_suffix("a.png" if info.is_image else "a.mp4", file_format)
        except ValueError:
            return ".mp4"  # the job itself will say what is wrong with the file

    check_format(file_format, source, target)
    naming = Naming(lambda folder: list_files(folder, is_latents), suffix, lambda _: False)
    also_read = [] if audio_from is None else [audio_from]
    jobs = find_jobs(source, target, naming, overwrite=overwrite, as_json=as_json, also_read=also_read)
    if audio_from is not None and jobs.is_folder:
        raise ValueError("`--audio-from` must not be given with a folder as IN.")
    if audio_from is not None and audio_from != STANDARD and not is_remote(audio_from):
        if not Path(audio_from).exists() or Path(audio_from).is_dir():
            raise ValueError(f"`--audio-from` must be a file that exists, got {audio_from!r}.")
    options = writer_options(jobs, codec, crf, pix_fmt, file_format)
    limit = memory_limit(max_memory)
    loaded: dict[tuple[str, str | None], tuple[Any, str]] = {}

    def load(info: LatentsInfo) -> tuple[Any, str]:
        key = (info.model, info.revision) if model is None else (model, None)
        if key not in loaded:
            loaded.clear()  # one model in memory at a time
            loaded[key] = load_known_model(key[0], device, dtype, fuse, revision=key[1])
        return loaded[key]

    def work(path: Path | str, output: Path | str, progress: Advance) -> dict[str, Any]:
        with local_file(path) as file:
            return decode_file(path, file, output, progress)

    def decode_file(path: Path | str, file: Path, output: Path | str, progress: Advance) -> dict[str, Any]:
        with open_latents(file) as (_, info):
            pass  # the file is closed while the model is loaded
        vae, checksum = load(info)
        if not any_weights:
            info.check_weights(checksum, path, "--model", "; `--any-weights` decodes all the same")
        decode_video(vae, file, output, audio_from=audio_from, max_memory=limit, progress=progress, **options)
        return summarize(info)

    process(jobs, overwrite, work, as_json)


def summarize(info: "LatentsInfo") -> dict[str, Any]:
    """Tell of a video as `reconstruct_video` does."""
    return {name: getattr(info, name) for name in ("num_frames", "height", "width", "fps")}


def check_format(file_format: str | None, source: str, target: str, frames: bool = False) -> None:
    """Refuse a `--format` that cannot be written, or where OUT tells it, which is a folder if IN is one."""
    from ..video_io.formats import CONTAINERS, IMAGES

    if file_format is None:
        return
    if target == STANDARD:
        legal = [suffix[1:] for suffix, held in CONTAINERS.items() if held.is_streamable]
        check_choice("--format", file_format, legal, "on standard output")
    else:
        check_choice("--format", file_format, dict.fromkeys(suffix[1:] for suffix in (*CONTAINERS, *IMAGES)))
        is_folder = target.endswith("/") or Path(target).is_dir() or (Path(source).is_dir() and not frames)
        if Path(target).suffix and not is_folder:
            raise ValueError(f"`--format` must not be given where OUT has an extension, got {file_format!r}.")


def writer_options(
    jobs: Jobs, codec: str | None, crf: float | None, pix_fmt: str | None, file_format: str | None
) -> dict[str, Any]:
    """Turn options into those of `VideoWriter`, and refuse outputs that it could not write."""
    target = jobs.pairs[0][1]
    options: dict[str, Any] = {"codec": codec, "crf": crf, "pixel_format": pix_fmt}
    if target == STANDARD:
        options["container"] = file_format
    check_outputs(jobs, options)
    return options


def read_excerpt(
    start: int, num_frames: int | None, size: str | None, fps: str | None, square_pixels: bool, background: str
) -> Any:
    """Turn the options of reading into an `Excerpt`."""
    from ..inference.files import Excerpt

    return Excerpt(start, num_frames, size, parse_rate(fps), square_pixels, parse_color(background))


def live(
    width: Annotated[int, typer.Option(min=1, help="Width of the frames in pixels.")],
    height: Annotated[int, typer.Option(min=1, help="Height of the frames in pixels.")],
    model: Model = bundled.DEFAULT,
    num_frames_per_step: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Frames that pass the network at once, a multiple of the model's temporal ratio: fewer come out "
            "sooner, more are faster. Without it as few as the model allows (4 for most).",
        ),
    ] = None,
    side_by_side: SideBySide = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    fuse: Fuse = False,
) -> None:
    """Reconstruct raw RGB24 frames from standard input, and write them to standard output as they get ready."""
    source = standard_input()
    check_standard_output()
    from ..inference.live import reconstruct_stream

    vae = load_model(model, device, dtype, fuse)
    # Unbuffered: frames leave at once, and a reader that went away is noticed here and not when Python ends.
    with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as target:
        count = reconstruct_stream(
            vae,
            source,
            target,
            width,
            height,
            num_frames_per_step=num_frames_per_step,
            side_by_side=side_by_side,
            source_name="Standard input",
        )
    typer.echo(counted(count, "frame"), err=True)

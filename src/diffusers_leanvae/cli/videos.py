"""Videos to videos, to latents and back: `reconstruct`, `encode`, `decode`, `live`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from .. import bundled
from .common import (
    Crf,
    Device,
    Dtype,
    Fuse,
    MaxMemory,
    Model,
    NumFrames,
    Overwrite,
    Size,
    Start,
    load_model,
    memory_limit,
    progress_bar,
    sentence_of,
)


Source = Annotated[Path, typer.Argument(metavar="IN", help="Video or image to read, or a folder of them.")]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="Video or image to write; a folder if IN is one.")]
SideBySide = Annotated[
    bool, typer.Option("--side-by-side", help="Put the original to the left of the reconstruction.")
]


class Jobs(NamedTuple):
    """The work of a command.

    Attributes:
        pairs: Each file to read with the file to write.
        is_folder: Whether they are the files of a folder.
    """

    pairs: list[tuple[Path, Path]]
    is_folder: bool


def find_jobs(source: Path, target: Path, find: Callable[[Path], list[Path]], suffix: Callable[[Path], str]) -> Jobs:
    """Pair the files to read with those to write.

    Args:
        source: A file or a folder.
        target: The file to write, or the folder for it; a folder if `source` is one.
        find: Lists the files of a folder that can be read.
        suffix: Returns the extension of the file to write for a file to read.
    """
    if not source.exists():
        raise ValueError(f"IN must exist, got {str(source)!r}.")
    is_folder = source.is_dir()
    if not is_folder:
        if target.is_dir():
            target = target / source.with_suffix(suffix(source)).name
        pairs = [(source, target)]
    else:
        if target.exists() and not target.is_dir():
            raise ValueError(f"OUT must be a folder when IN is one, got {str(target)!r}.")
        pairs = [(path, target / path.relative_to(source).with_suffix(suffix(path))) for path in find(source)]
        if not pairs:
            raise ValueError(f"IN must hold at least one file that can be read, got none in {str(source)!r}.")
    sources: dict[Path, Path] = {}
    for path, output in pairs:
        if output.exists() and output.samefile(path):
            raise ValueError(f"OUT must not be the file that is read, got {str(output)!r}.")
        if (other := sources.setdefault(output, path)) != path:
            raise ValueError(
                f"IN must not hold two files with one name, got {other.name!r} and {path.name!r}, both for {output}."
            )
    return Jobs(pairs, is_folder)


def process(jobs: Jobs, overwrite: bool, work: Callable[[Path, Path, Callable[[int], Any]], str]) -> None:
    """Do every job and print its line; in a folder continue past bad files, skip finished ones, and fail at the end.

    Args:
        jobs: The work.
        overwrite: Whether to redo files of a folder that exist.
        work: Does one job; takes the file to read, the file to write, and a function to call with the number of
            frames just finished. Returns a line to print.
    """
    failures, pairs = [], jobs.pairs
    for number, (source, target) in enumerate(pairs, start=1):
        if jobs.is_folder and target.exists() and not overwrite:
            typer.echo(f"{source}: done already, skipped ({target})", err=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        description = f"[{number}/{len(pairs)}] {source.name}" if jobs.is_folder else source.name
        try:
            with progress_bar("frames", description) as bar:
                line = work(source, target, bar.update)
        except Exception as error:
            if not jobs.is_folder:
                raise
            failures.append(source)
            typer.echo(f"error: {sentence_of(error)}", err=True)
        else:
            typer.echo(line)
    if failures:
        raise ValueError(f"{len(failures)} of {len(pairs)} files failed: {', '.join(map(str, failures))}")


def reconstruct(
    source: Source,
    target: Target,
    model: Model = bundled.DEFAULT,
    side_by_side: SideBySide = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="Print PSNR (dB) and SSIM of each video.")] = False,
    start: Start = 0,
    num_frames: NumFrames = None,
    size: Size = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    fuse: Fuse = False,
    max_memory: MaxMemory = None,
    crf: Crf = 16,
    overwrite: Overwrite = False,
) -> None:
    """Encode and decode videos or images, to see what the autoencoder keeps of them."""
    from ..inference import files
    from ..video_io import list_videos

    jobs = find_jobs(source, target, list_videos, files.default_suffix)
    excerpt, limit = files.Excerpt(start, num_frames, size), memory_limit(max_memory)
    vae = load_model(model, device, dtype, fuse)

    def work(path: Path, output: Path, progress: Callable[[int], Any]) -> str:
        summary = files.reconstruct_video(
            vae,
            path,
            output,
            excerpt=excerpt,
            side_by_side=side_by_side,
            metrics=metrics,
            max_memory=limit,
            progress=progress,
            crf=crf,
        )
        line = f"{output}  {summary['width']}x{summary['height']}  {summary['num_frames']} frames"
        if metrics:
            line += f"  PSNR {summary['psnr_frame_mean_rgb']:.2f} dB  SSIM {summary['ssim_frame_mean_rgb']:.4f}"
        return line

    process(jobs, overwrite, work)


def encode(
    source: Source,
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="Latents to write (.safetensors); a folder if IN is one.")
    ],
    model: Model = bundled.DEFAULT,
    start: Start = 0,
    num_frames: NumFrames = None,
    size: Size = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    fuse: Fuse = False,
    max_memory: MaxMemory = None,
    overwrite: Overwrite = False,
) -> None:
    """Encode videos or images to latents (posterior means, not normalised) in safetensors files."""
    from ..inference import files
    from ..video_io import list_videos

    jobs = find_jobs(source, target, list_videos, lambda _: ".safetensors")
    excerpt, limit = files.Excerpt(start, num_frames, size), memory_limit(max_memory)
    vae = load_model(model, device, dtype, fuse)

    def work(path: Path, output: Path, progress: Callable[[int], Any]) -> str:
        info = files.encode_video(
            vae,
            path,
            output,
            model=model,
            excerpt=excerpt,
            max_memory=limit,
            progress=progress,
        )
        return f"{output}  {info.width}x{info.height}  {info.num_frames} frames"

    process(jobs, overwrite, work)


def decode(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Latents that `leanvae encode` wrote, or a folder of them.")
    ],
    target: Target,
    model: Annotated[
        str | None, typer.Option(help="Autoencoder, as of `leanvae encode`; without it the one that encoded the file.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    fuse: Fuse = False,
    max_memory: MaxMemory = None,
    crf: Crf = 16,
    overwrite: Overwrite = False,
) -> None:
    """Decode latents to videos or images of the original size, length and frame rate."""
    from ..inference.files import decode_video
    from ..inference.latents_file import open_latents

    def suffix(path: Path) -> str:
        try:
            with open_latents(path) as (_, info):
                return ".png" if info.is_image else ".mp4"
        except ValueError:
            return ".mp4"  # the job itself will say what is wrong with the file

    jobs = find_jobs(source, target, lambda folder: sorted(folder.rglob("*.safetensors")), suffix)
    limit = memory_limit(max_memory)
    loaded: dict[str, Any] = {}

    def work(path: Path, output: Path, progress: Callable[[int], Any]) -> str:
        with open_latents(path) as (_, info):
            name = model or info.model
        if name not in loaded:
            loaded.clear()  # one model in memory at a time
            loaded[name] = load_model(name, device, dtype, fuse)
        decode_video(loaded[name], path, output, max_memory=limit, progress=progress, crf=crf)
        return f"{output}  {info.width}x{info.height}  {info.num_frames} frames"

    process(jobs, overwrite, work)


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
    from ..inference.live import reconstruct_stream

    vae = load_model(model, device, dtype, fuse)
    # Unbuffered: frames leave at once, and a reader that went away is noticed here and not when Python ends.
    with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as target:
        count = reconstruct_stream(
            vae,
            sys.stdin.buffer,
            target,
            width,
            height,
            num_frames_per_step=num_frames_per_step,
            side_by_side=side_by_side,
        )
    typer.echo(f"{count} frames", err=True)

"""What a command on files has to do: which files it reads, under which names it writes, and what it must not touch.

Everything that can be known from names is checked here, before a model is loaded.
"""

import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import typer

from ..atomic import MAX_NAME_BYTES, shorten_name
from ..checks import check_place
from .common import (
    STANDARD,
    Advance,
    check_standard_output,
    counted,
    print_json,
    progress_bar,
    sentence_of,
    standard_input,
)


_NUMBER = re.compile(r"%(0?\d+)?d")  # in a name: the place of the number of a picture


class Naming(NamedTuple):
    """How a command finds its files and names its outputs.

    Attributes:
        find: Lists the files of a folder that can be read.
        suffix: Returns what follows the stem in the name of the output for a file: an extension, or `/%06d.png` for a
            folder of pictures.
        reads: Tells of the name of an output whether this command would read it as a file of a folder.
    """

    find: Callable[[Path], list[Path]]
    suffix: Callable[[Path], str]
    reads: Callable[[Path], bool]


class Jobs(NamedTuple):
    """The work of a command.

    Attributes:
        pairs: Each input with the output. A `Path` is one on the disk, a text is an address, or `-` for standard input
            or output.
        is_folder: Whether they are the files of a folder.
    """

    pairs: list[tuple[Path | str, Path | str]]
    is_folder: bool


def find_jobs(
    source: str,
    target: str,
    naming: Naming,
    *,
    frames: bool = False,
    overwrite: bool = False,
    as_json: bool = False,
    also_read: Sequence[str | Path] = (),
) -> Jobs:
    """Pair what is read with what is written.

    Args:
        source: A file, `-`, an address, numbered pictures (`f_%04d.png`), or a folder.
        target: What to write, or the folder for it; a folder if `source` is one. A name that ends in a slash is one.
        naming: How the command finds its files and names its outputs.
        frames: Whether the folder `source` holds the frames of one video.
        overwrite: Whether an output may exist; files of a folder may in any case.
        as_json: Whether standard output is wanted for JSON.
        also_read: Further files that must not be written over.

    Raises:
        ValueError: If there is nothing to read, or something that is read would be written over.
    """
    if STANDARD in (source, *also_read):
        standard_input()
    if target == STANDARD:
        check_standard_output()
    if as_json and target == STANDARD:
        raise ValueError(f"`--json` must not be given with standard output as OUT, got {target!r}.")
    place = _place(source)
    if frames and not (isinstance(place, Path) and place.is_dir()):
        raise ValueError(f"IN must be a folder with `--frames`, got {source!r}.")
    is_folder = False
    files: list[Path | str]
    if isinstance(place, Path) and place.is_dir() and not frames:
        is_folder = True
        pairs = _pair_folder(place, target, naming)
        files = [path for path, _ in pairs]
    else:
        files = [*_files_of(place, source)]
        pairs = [(place, _single_target(place, target, naming))]
    reading = {_identity(path) for path in (*files, *also_read)}
    if source == STANDARD:
        reading.add(_standard_input())
    for path, output in pairs:
        for file in _existing(output):
            if _identity(file) in reading:
                raise ValueError(f"OUT must not be a file that is read, got {str(file)!r}.")
            if not (is_folder or overwrite):
                raise ValueError(f"OUT must not exist without `--overwrite`, got {str(file)!r}.")
        if not is_folder and frames and isinstance(output, Path) and _same_folder(output.parent, path):
            raise ValueError(f"OUT must not be in the folder of frames that is read, got {str(output)!r}.")
    return Jobs(pairs, is_folder)


class Work(Protocol):
    """What a command does with one file."""

    def __call__(self, source: Any, target: Any, progress: Advance, /) -> dict[str, Any]:
        """Read `source`, write `target`, and return `width`, `height`, `num_frames` and what was measured."""
        ...


def process(jobs: Jobs, overwrite: bool, work: Work, as_json: bool = False) -> None:
    """Do every job and print its line; in a folder continue past bad files, skip finished ones, and fail at the end.

    Args:
        jobs: The work.
        overwrite: Whether to redo files of a folder that exist.
        work: Does one job.
        as_json: Whether to print lines of JSON.
    """
    failures, pairs = [], jobs.pairs
    for number, (source, target) in enumerate(pairs, start=1):
        if jobs.is_folder and not overwrite and _existing(target):
            typer.echo(f"{source}: done already, skipped ({target})", err=True)
            continue
        name = Path(source).name
        folders = [target.parent, *target.parent.parents] if isinstance(target, Path) else []
        made = [folder for folder in folders if not folder.exists()]
        try:
            if made:
                made[0].mkdir(parents=True, exist_ok=True)
            with progress_bar("frames", f"[{number}/{len(pairs)}] {name}" if jobs.is_folder else name) as advance:
                figures = work(source, target, advance)
        except Exception as error:
            with suppress(OSError):  # they may hold something by now
                for folder in made:
                    folder.rmdir()
            if not jobs.is_folder:
                raise
            failures.append(source)
            typer.echo(f"error: {sentence_of(error)}", err=True)
        else:
            if as_json:
                print_json({"input": source, "output": target} | figures)
            else:
                typer.echo(f"{target}  {_describe(figures)}", err=target == STANDARD)  # which holds the video then
    if failures:
        raise ValueError(f"{len(failures)} of {len(pairs)} files failed: {', '.join(map(str, failures))}")


def _describe(figures: dict[str, Any]) -> str:
    text = f"{figures['width']}x{figures['height']}  {counted(figures['num_frames'], 'frame')}"
    if "psnr_frame_mean_rgb" in figures:  # which no frame has if the reader of a pipe went away at once
        text += f"  PSNR {figures['psnr_frame_mean_rgb']:.2f} dB  SSIM {figures['ssim_frame_mean_rgb']:.4f}"
    return text


def check_outputs(jobs: Jobs, options: dict[str, Any]) -> None:
    """Refuse outputs that `VideoWriter` could not write, before any work is done.

    Args:
        jobs: The work. Of the files of a folder one of each extension is looked at.
        options: Of `VideoWriter`.
    """
    from ..video_io.formats import check_output

    for output in {Path(output).suffix: output for _, output in jobs.pairs}.values():
        check_output(output, makes_folders=True, **options)


def check_latents(jobs: Jobs) -> None:
    """Refuse outputs of `encode` that could not be written."""
    output = jobs.pairs[0][1]
    if Path(output).suffix != ".safetensors":
        raise ValueError(f"OUT must end in .safetensors, got {str(output)!r}.")
    check_place("OUT", Path(output), Path(output).parent)


# --- Inputs ----------------------------------------------------------------------------------------------------------


def _place(text: str) -> Path | str:
    """Turn an argument into a path, or leave it as the text that it is."""
    from ..video_io.inputs import is_remote

    if text == STANDARD or is_remote(text):
        return text
    path = Path(text)
    return path.absolute() if str(path) == STANDARD else path  # "./-" is a file


def _files_of(place: Path | str, source: str) -> list[Path]:
    """List the files that a single input consists of, as far as they are on the disk."""
    from ..video_io.inputs import find_sequence, list_frames

    if not isinstance(place, Path):
        return []
    if place.is_dir():
        return list_frames(place)
    if place.exists():
        return [place]
    files = find_sequence(place)
    if not files:
        raise ValueError(f"IN must exist, got {source!r}.")
    return files


def _identity(path: str | Path) -> tuple[int, int] | None:
    """Return what a file is, by whatever name; `None` for one that is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _standard_input() -> tuple[int, int] | None:
    """Return what standard input is, if it is a file."""
    try:
        status = os.fstat(sys.stdin.fileno())
    except (OSError, ValueError, AttributeError):  # there is none, or it is none of the system's
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


# --- Outputs ---------------------------------------------------------------------------------------------------------


def _pair_folder(source: Path, target: str, naming: Naming) -> list[tuple[Path | str, Path | str]]:
    folder = _place(target)
    if not isinstance(folder, Path) or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"OUT must be a folder when IN is one, got {target!r}.")
    paths = naming.find(source)
    inside = folder.resolve()
    if source.resolve() in inside.parents:  # what was written before is not read
        paths = [path for path in paths if inside not in path.resolve().parents]
    if not paths:
        raise ValueError(f"IN must hold at least one file that can be read, got none in {str(source)!r}.")
    names = output_names([path.relative_to(source) for path in paths], [naming.suffix(path) for path in paths])
    if _same_folder(folder, source) and any(naming.reads(name) for name in names):
        raise ValueError(f"OUT must not be the folder that is read, got {target!r}.")
    return [(path, folder / name) for path, name in zip(paths, names, strict=True)]


def output_names(names: list[Path], suffixes: list[str]) -> list[Path]:
    """Name the outputs of the files of a folder: by stem and suffix, with the extension where stems are alike.

    Of `clip.mov` alone comes `clip.mp4`, and of `clip.mov` and `clip.mkv` come `clip.mov.mp4` and `clip.mkv.mp4`. A
    name that would be longer than a file system takes ends in a checksum instead.

    Args:
        names: The files, relative to their folder.
        suffixes: As of [`Naming`], one for each.
    """
    is_long = [False] * len(names)
    while True:
        outputs = [_output_name(*entry) for entry in zip(names, suffixes, is_long, strict=True)]
        counts = Counter(outputs)
        alike = [counts[output] > 1 or long for output, long in zip(outputs, is_long, strict=True)]
        if alike == is_long:
            return outputs
        is_long = alike


def _output_name(name: Path, suffix: str, is_long: bool) -> Path:
    return name.parent / _fit(name.name if is_long else name.stem, suffix)


def _fit(stem: str, suffix: str) -> str:
    """Join a stem and what follows it, shortened to what a file system takes.

    The stem is that of an input, and no pattern: in one that looks so, `%%` stands for a percent sign, as in patterns.
    """
    from ..video_io.formats import IMAGES
    from ..video_io.inputs import is_pattern

    if suffix in IMAGES and is_pattern(stem + suffix):
        stem = stem.replace("%", "%%")
    return shorten_name(stem, MAX_NAME_BYTES - len(suffix.split("/")[0])) + suffix


def _single_target(place: Path | str, target: str, naming: Naming) -> Path | str:
    """Find what to write for one input: with a folder as target the file of this name in it."""
    output = _place(target)
    if output == STANDARD:
        return output
    if not isinstance(output, Path):
        raise ValueError(f"OUT must be a file, a folder or '-', got {target!r}.")
    if (length := len(os.fsencode(output.name))) > MAX_NAME_BYTES:
        raise ValueError(f"OUT must have a name of at most {MAX_NAME_BYTES} bytes, got {length}.")
    if not (output.is_dir() or target.endswith(("/", os.sep))):
        return output
    if isinstance(place, Path):
        name = os.path.basename(os.path.abspath(place))  # `.` and `..` have names, too
    else:
        name = "stdin" if place == STANDARD else Path(place.split("?")[0].rstrip("/")).name
    if isinstance(place, Path) and (place.is_dir() or not place.exists()):  # pictures that are one video
        stem = name if place.is_dir() else _NUMBER.sub("", Path(name).stem).strip("-_. ") or "frames"
        return output / _fit(stem, naming.suffix(Path("video.mp4")))
    return output / _fit(Path(name).stem or "video", naming.suffix(Path(place)))


def _existing(output: Path | str) -> list[Path]:
    """List what is there already of an output: one file, or the pictures of a sequence."""
    from ..video_io.formats import find_output, is_sequence

    if not isinstance(output, Path):
        return []
    if is_sequence(output) and not output.is_file():
        return sorted(find_output(output).existing_images().values())
    if not output.exists():
        return []
    mode = output.stat().st_mode
    return [output] if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else []  # a pipe or a device is there for this


def _same_folder(folder: Path, other: Path | str) -> bool:
    return folder.exists() and Path(other).exists() and folder.samefile(other)

"""Parts that the commands share: options, the model, progress, and errors as one sentence.

Every module of this folder imports only what is light; the rest is imported inside the command that needs it, so that
`--help` answers at once.
"""

import functools
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, cast

import typer
from typer.core import TyperCommand
from typer.models import ArgumentInfo, OptionInfo

from .. import bundled
from ..checks import DTYPES, check_place, one_line, parse_dtype
from .choices import DEVICES, DTYPE_NAMES, FILE_FORMATS, IMAGE_FORMATS, STREAM_FORMATS, VIDEO_CODECS, complete


if TYPE_CHECKING:
    import torch

DTYPES_TEXT = ", ".join(f"{long} ({short})" for long, short in DTYPES.items())
TRACEBACK = "LEANVAE_TRACEBACK"  # set in the environment, it shows where an error comes from
STANDARD = "-"  # standard input or output
# Arguments of the library whose names in the messages of a command are others: those of its first parameter here.
PARAMETERS = {
    "class_labels": ("label",),
    "container": ("file_format",),
    "folder": ("folder",),
    "labels": ("label",),
    "num_inference_steps": ("steps",),
    "pixel_format": ("pix_fmt",),
    "prompts": ("prompt",),
    "repo_id": ("repo_id",),
    "train": ("source", "folder"),
}
_shown_names: ContextVar[Mapping[str, str]] = ContextVar("shown_names")  # of the command that runs
Advance = Callable[[int, int | None], None]  # told how many units were just finished, and of how many, if known

MODEL_TEXT = (
    f"Autoencoder: a bundled model ({', '.join(bundled.MODELS)}), a model folder, an original checkpoint file, or a "
    "Hub id (user/repo, or user/repo/file.ckpt for original weights)."
)
Model = Annotated[
    str,
    typer.Option(help=MODEL_TEXT, autocompletion=complete(*bundled.MODELS)),
]
Device = Annotated[
    str,
    typer.Option(
        help="Device to compute on: cpu, cuda, cuda:1, xpu, mps; auto is the accelerator that PyTorch finds (cuda, "
        "xpu, mps), else cpu.",
        autocompletion=complete(*DEVICES),
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help=f"Number type to compute in: {DTYPES_TEXT}; auto is bfloat16 on a CUDA GPU, else float32.",
        autocompletion=complete("auto", *DTYPE_NAMES),
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(help="JSON file to write, with the result and the machine, versions and command it came from."),
]
Start = Annotated[int, typer.Option(min=0, help="First frame to read, counted from 0.")]
NumFrames = Annotated[
    int | None, typer.Option(min=1, help="Maximum number of frames to read; without it all, to the end.")
]
Size = Annotated[
    str | None,
    typer.Option(
        help="Resize the video first: length of the shorter side in pixels (256), or WIDTHxHEIGHT (640x360). Without "
        "it the video keeps its size."
    ),
]
Crf = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Constant rate factor of the written video, 0 to 51 (libx264, libx265, on GPUs) or 63 (libvpx-vp9, "
        "libsvtav1): lower is better and larger. Without it 16, or 18 for libsvtav1.",
    ),
]
Codec = Annotated[
    str | None,
    typer.Option(
        help="Codec of the written video: libx264, libx265, libvpx-vp9, libsvtav1, prores_ks (.mov), ffv1 (.mkv), "
        "which loses nothing, or h264_nvenc or hevc_nvenc on an NVIDIA GPU. Without it libx264, and libvpx-vp9 for "
        ".webm.",
        autocompletion=complete(*VIDEO_CODECS),
    ),
]
PixFmt = Annotated[
    str | None,
    typer.Option(
        help="Pixel format of the written video by FFmpeg's name, such as yuv444p. Without it that of the codec."
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help=f"Format of standard output ({', '.join(STREAM_FORMATS)}), or of the files in the folder OUT "
        f"({', '.join(FILE_FORMATS)}; {', '.join(IMAGE_FORMATS)} for a folder of frames of each video). Without it "
        "mkv on standard output, else mp4, and png for images.",
        autocompletion=complete(*FILE_FORMATS, *IMAGE_FORMATS),
    ),
]
Fps = Annotated[
    str | None,
    typer.Option(
        help="Constant frame rate (25, 30000/1001) to bring the video to by repeating and dropping frames; of "
        "numbered pictures the rate they are shown at. Without it every frame keeps its time, and pictures come at 25."
    ),
]
SquarePixels = Annotated[
    bool,
    typer.Option(
        "--square-pixels", help="Stretch videos whose pixels are not square; without it their ratio is passed on."
    ),
]
Background = Annotated[str, typer.Option(help="Colour behind transparent pixels, by name or as #rrggbb.")]
Frames = Annotated[
    bool,
    typer.Option("--frames", help="Take the images in the folder IN for the frames of one video, in natural order."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Upper limit of memory in addition to the weights, such as 2GiB or 800MiB: shorter steps and smaller "
        "tiles, and state kept on disk next to OUT if necessary; the pixels stay the same. Without it no limit."
    ),
]
Fuse = Annotated[
    bool,
    typer.Option(
        "--fuse", help="Prepare the weights for speed: the same result up to rounding, twice the memory for weights."
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace outputs that exist. Without it one that exists is an error, or skipped with a folder as IN.",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one line of JSON on standard output, and nothing else there."),
]


class Command(TyperCommand):
    """A command that refuses empty texts, which as paths would be the current folder; only a prompt may be empty."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:  # as of completion
            given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
            in_one_sentence(_check_not_empty)(self.params, given)
        return super().parse_args(ctx, args)


def _check_not_empty(parameters: Iterable[Any], given: Mapping[str, Any]) -> None:
    for parameter in parameters:
        value = given.get(parameter.name)
        if parameter.name != "prompt" and "" in (value if isinstance(value, list | tuple) else [value]):
            is_option = parameter.param_type_name == "option"
            name = f"`{parameter.opts[0]}`" if is_option else parameter.metavar.strip("[]")
            raise ValueError(f"{name} must not be empty, got ''.")


def in_one_sentence(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that each of its errors is one sentence on stderr, and exit code 1.

    If the reader of standard output has gone away there is nobody to tell: exit code 141, as of other programs.
    """
    names = _names_of(command)

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        before = _shown_names.set(names)
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            stream = _failed_stream(error)
            if stream and isinstance(error, BrokenPipeError):
                raise typer.Exit(141) from None
            if os.environ.get(TRACEBACK):
                raise
            place = f"Cannot write to standard {stream}: " if stream else ""
            typer.echo(f"error: {place}{sentence_of(error)}", err=True)
            raise typer.Exit(1) from None
        finally:
            _shown_names.reset(before)

    return run


def _failed_stream(error: Exception) -> str | None:
    """Name the standard stream that `typer.echo` could not write to, and discard what it still holds."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(error, OSError) and frame.f_code is typer.echo.__code__:
            name, stream = ("error", sys.stderr) if frame.f_locals.get("err") else ("output", sys.stdout)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # else Python would try again when it ends, and complain
            os.close(nowhere)
            return name
    return None


def _names_of(command: Callable[..., None]) -> dict[str, str]:
    """Map arguments of the library to what the user of a command calls them."""
    options, arguments = {}, {}
    for name, parameter in inspect.signature(command).parameters.items():
        for about in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(about, OptionInfo):
                options[name] = f"`{next(iter(about.param_decls or ()), '--' + name.replace('_', '-'))}`"
            elif isinstance(about, ArgumentInfo):
                arguments[name] = str(about.metavar).strip("[]")
    shown = options | arguments
    others = {name: [shown[own] for own in places if own in shown] for name, places in PARAMETERS.items()}
    return options | {name: found[0] for name, found in others.items() if found}


def sentence_of(error: Exception) -> str:
    """Put an error into one sentence for the user."""
    text = in_own_words(one_line(error))
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return "out of memory; try smaller or fewer frames, `--dtype bfloat16`, or `--max-memory` where there is one."
    if isinstance(error, ValueError | OSError | ImportError):  # these are written for the user
        return text
    return f"{type(error).__name__}: {text} (`{TRACEBACK}=1 leanvae ...` shows where it comes from)"


def in_own_words(text: str) -> str:
    """Replace the names of the library's arguments in a message by those that the command that runs gives to them."""
    names = _shown_names.get({})
    text = re.sub(r"(cannot be \w+: )`(?:source|reference|path)`", r"\1it", text)
    return re.sub(r"`(\w+)`", lambda match: names.get(match[1], match[0]), text)


def place(device: str, dtype: str) -> "tuple[torch.device, torch.dtype]":
    """Turn the options `--device` and `--dtype` into a device of this machine and a dtype.

    Every command that loads a model asks for them first, so bars of loading are switched off here, where they must be.
    """
    import torch

    _hide_bars()
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        device = found.type if found is not None and found.type in ("cuda", "xpu", "mps") else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    elif dtype not in DTYPE_NAMES:
        raise ValueError(f"`--dtype` must be auto, {DTYPES_TEXT}, got {dtype!r}.")
    torch_dtype = parse_dtype("--dtype", dtype)
    try:
        torch_device = torch.device(device)
        torch.empty(0, device=torch_device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"`--device` must be a device of this machine, got {device!r}.") from None
    return torch_device, torch_dtype


def load_model(
    name: str, device: str = "auto", dtype: str = "auto", fuse: bool = False, *, argument: str = "`--model`"
) -> Any:
    """Load the autoencoder that a command was given, ready for inference.

    Args:
        name: Of the model.
        device: As of `--device`.
        dtype: As of `--dtype`.
        fuse: Whether to prepare the weights for speed.
        argument: Where the command takes the name, for the message.
    """
    torch_device, torch_dtype = place(device, dtype)
    vae = _load(name, torch_dtype, argument).to(torch_device)
    if fuse:
        vae.fuse()
    return vae


def load_known_model(
    name: str, device: str = "auto", dtype: str = "auto", fuse: bool = False, *, revision: str | None = None
) -> tuple[Any, str]:
    """Load the autoencoder of a `--model` option as [`load_model`] does, with the checksum of its weights.

    Args:
        name: Of the model.
        device: As of `--device`.
        dtype: As of `--dtype`.
        fuse: Whether to prepare the weights for speed.
        revision: Commit of a model on the Hub.
    """
    import torch

    from ..inference.latents_file import weights_sha256

    torch_device, torch_dtype = place(device, dtype)
    vae = _load(name, torch.float32, "`--model`", **({} if revision is None else {"revision": revision}))
    checksum = weights_sha256(vae)  # of the weights as they are stored, whatever dtype they are used in
    # As exact as loading it in this dtype; diffusers' own method warns that for some models it would not be.
    vae = torch.nn.Module.to(vae, torch_device, torch_dtype)
    if fuse:
        cast(Any, vae).fuse()
    return vae, checksum


def _load(name: str, dtype: "torch.dtype", argument: str, **options: Any) -> Any:
    from ..loading import load_autoencoder

    try:
        return load_autoencoder(name, dtype, **options).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument} {name!r} cannot be loaded: {one_line(error)}") from None


def say_demonstration(context: typer.Context, model: str) -> None:
    """Say on stderr that the weights are a demonstration, if no model was named."""
    source = context.get_parameter_source("model")
    if source is not None and source.name == "DEFAULT" and bundled.is_bundled(model):
        typer.echo(f"uses the demonstration weights {model}; `--model` names others", err=True)


def check_file(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written, before any work is done; folders that it lacks will be made."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"`{option}` must be a file, got {str(path)!r}, which is a folder.")
    check_place(f"`{option}`", path, path.parent)


def standard_input() -> BinaryIO:
    """Return standard input, of bytes; refuse one that is closed, and a terminal, at which nobody types videos."""
    if sys.stdin is None or sys.stdin.isatty():
        found = "a closed one" if sys.stdin is None else "a terminal"
        raise ValueError(f"Standard input must be a file or pipe, got {found}.")
    return sys.stdin.buffer


def check_standard_output() -> None:
    """Refuse a closed standard output, whose place the next file that is opened would take."""
    if sys.stdout is None:
        raise ValueError("Standard output must be a file, a pipe or a terminal, got a closed one.")


def shows_progress() -> bool:
    """Tell whether standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def counted(number: int, noun: str) -> str:
    """Put a number before a noun, which takes an s unless it is one."""
    return f"{number} {noun}" + ("s" if number != 1 else "")


def parse_rate(text: str | None) -> Fraction | None:
    """Turn the option `--fps` into frames per second."""
    if text is None:
        return None
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise ValueError(f"`--fps` must be a rate of at most 1000 such as 25 or 30000/1001, got {text!r}.")
    return rate


def parse_color(text: str) -> tuple[int, int, int]:
    """Turn the option `--background` into RGB values from 0 to 255."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise ValueError(f"`--background` must be a colour such as white or #102030, got {text!r}.") from None


def memory_limit(max_memory: str | None) -> int | None:
    """Turn the option `--max-memory` into bytes, and keep no freed memory from then on; `None` is no limit."""
    from ..clock import keep_freed_memory
    from ..inference.memory import parse_memory

    if max_memory is None:
        return None
    num_bytes = parse_memory(max_memory)
    keep_freed_memory(False)  # else the C library holds on to much that the network does not need any more
    return num_bytes


@contextmanager
def progress_bar(unit: str, description: str | None = None) -> Iterator[Advance]:
    """Show progress on a terminal, and nothing elsewhere.

    Yields:
        A function to call with the number of units that are done anew, and of how many, if that is known.
    """
    from tqdm.auto import tqdm

    with tqdm(desc=description, unit=f" {unit}", disable=not shows_progress(), leave=False) as bar:

        def advance(count: int, total: int | None) -> None:
            bar.total = total
            bar.update(count)

        yield advance


def _hide_bars() -> None:
    """Switch the progress bars of loading off where they would not be seen as such."""
    from diffusers.utils import logging
    from huggingface_hub.utils import disable_progress_bars

    if shows_progress():
        return
    logging.disable_progress_bar()
    disable_progress_bars()  # which transformers asks for when it is imported, and only then
    if "transformers" in sys.modules:
        import transformers

        transformers.utils.logging.disable_progress_bar()


def print_json(result: Any) -> None:
    """Print the result of a command with `--json`."""
    typer.echo(json.dumps(result, default=str))


def render_table(lines: Sequence[Sequence[str]]) -> str:
    """Lay out lines of cells in columns, the first one to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )

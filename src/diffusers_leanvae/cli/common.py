"""Parts that the commands share: options, the model, progress, and errors as one sentence.

Every module of this folder imports only what is light; the rest is imported inside the command that needs it, so that
`--help` answers at once.
"""

import functools
import os
import sys
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import bundled
from ..checks import DTYPES, parse_dtype


if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

DTYPE_NAMES = ", ".join(f"{long} ({short})" for long, short in DTYPES.items())
TRACEBACK = "LEANVAE_TRACEBACK"  # set in the environment, it shows where an error comes from

Model = Annotated[
    str,
    typer.Option(
        help=f"Autoencoder: a bundled model ({', '.join(bundled.MODELS)}), a model folder, an original checkpoint "
        "file, or a Hub id (user/repo, or user/repo/file.ckpt for original weights)."
    ),
]
Device = Annotated[
    str,
    typer.Option(help="Device to compute on: cpu, cuda, cuda:1, mps; auto is cuda if there is such a GPU, else cpu."),
]
Dtype = Annotated[
    str,
    typer.Option(help=f"Number type to compute in: {DTYPE_NAMES}; auto is bfloat16 on a CUDA GPU, else float32."),
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
    float,
    typer.Option(min=0, max=51, help="Constant rate factor of the written video: lower is better and larger."),
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
    bool, typer.Option("--overwrite", help="With a folder as IN: redo outputs that exist, instead of skipping them.")
]


def in_one_sentence(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that each of its errors is one sentence on stderr, and exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if os.environ.get(TRACEBACK):
                raise
            typer.echo(f"error: {sentence_of(error)}", err=True)
            raise typer.Exit(1) from None

    return run


def sentence_of(error: Exception) -> str:
    """Put an error into one sentence for the user."""
    text = one_line(error)
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return "out of memory; try smaller or fewer frames, `--dtype bfloat16`, or `--max-memory` where there is one."
    if isinstance(error, ValueError | OSError | ImportError):  # these are written for the user
        return text
    return f"{type(error).__name__}: {text} (`{TRACEBACK}=1 leanvae ...` shows where it comes from)"


def one_line(error: Any) -> str:
    """Put the text of an error or warning on one line of at most 400 characters."""
    return textwrap.shorten(str(error), 400, placeholder=" ...")


def place(device: str, dtype: str) -> "tuple[torch.device, torch.dtype]":
    """Turn the options `--device` and `--dtype` into a device of this machine and a dtype."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    elif dtype not in (*DTYPES, *DTYPES.values()):
        raise ValueError(f"`--dtype` must be auto, {DTYPE_NAMES}, got {dtype!r}.")
    torch_dtype = parse_dtype("--dtype", dtype)
    try:
        torch_device = torch.device(device)
        torch.empty(0, device=torch_device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"`--device` must be a device of this machine, got {device!r}.") from None
    return torch_device, torch_dtype


def load_model(name: str, device: str = "auto", dtype: str = "auto", fuse: bool = False) -> Any:
    """Load the autoencoder of a `--model` option, ready for inference."""
    from ..loading import load_autoencoder

    torch_device, torch_dtype = place(device, dtype)
    try:
        vae = load_autoencoder(name, torch_dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"`--model` {name!r} cannot be loaded: {one_line(error)}") from None
    vae = vae.to(torch_device).eval()
    if fuse:
        vae.fuse()
    return vae


def memory_limit(max_memory: str | None) -> int | None:
    """Turn the option `--max-memory` into bytes; `None` is no limit."""
    from ..inference.memory import parse_memory

    return None if max_memory is None else parse_memory(max_memory)


def progress_bar(unit: str, description: str | None = None) -> "tqdm":
    """Show progress on a terminal, and nothing elsewhere."""
    from tqdm.auto import tqdm

    return tqdm(desc=description, unit=f" {unit}", disable=not sys.stderr.isatty(), leave=False)

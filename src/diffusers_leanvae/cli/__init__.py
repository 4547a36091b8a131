"""The command `leanvae`."""

import signal
import sys
import threading
import warnings
from typing import Annotated

import typer

from .._version import __version__
from ..checks import one_line
from . import demo, evaluation, export, generation, measure, models, serving, sharing, training, videos
from .common import Command, in_one_sentence, in_own_words


__all__ = ["app"]

app = typer.Typer(
    name="leanvae",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Video autoencoders: encode videos of any length and size to latents, decode them, measure what is lost, "
    "and generate videos.",
)
COMMANDS = {
    "reconstruct": videos.reconstruct,
    "encode": videos.encode,
    "decode": videos.decode,
    "live": videos.live,
    "serve": serving.serve,
    "generate": generation.generate,
    "encode-dataset": generation.encode_dataset,
    "train": training.train,
    "convert": models.convert,
    "export": export.export,
    "page": export.page,
    "info": models.info,
    "models": models.models,
    "push": sharing.push,
    "pull": sharing.pull,
    "eval": evaluation.evaluate,
    "bench": measure.bench,
    "demo": demo.demo,
}
for name, command in COMMANDS.items():
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
    else:
        app.command(name, cls=Command)(in_one_sentence(command))


@app.callback(invoke_without_command=True)
@in_one_sentence
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    warnings.showwarning = lambda message, *_: typer.echo(f"warning: {in_own_words(one_line(message))}", err=True)  # type: ignore[arg-type, assignment]
    # diffusers hands this on to huggingface_hub whenever it reads a config of the Hub; nobody here can change that.
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that unfinished outputs are removed
    if version:
        typer.echo(__version__)
        raise typer.Exit

"""Models for other programs: `export` and `page`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from .. import bundled
from ..checks import check_choice, check_place
from .choices import EXPORT_FORMATS, EXPORT_PARTS, EXPORT_WEIGHTS, complete
from .common import MODEL_TEXT, Device, Dtype, Json, load_model, print_json, progress_bar


ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help=MODEL_TEXT, autocompletion=complete(*bundled.MODELS)),
]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]


def export(
    model: ModelArgument,
    target: Target,
    to: Annotated[
        str,
        typer.Option(
            help="Kind of the files: onnx; torch-export, programs for torch.export.load; aoti, compiled programs.",
            autocompletion=complete(*EXPORT_FORMATS),
        ),
    ] = "onnx",
    part: Annotated[
        str,
        typer.Option(help="What to export: encoder, decoder or both.", autocompletion=complete(*EXPORT_PARTS)),
    ] = "both",
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming",
            help="Add the graphs of streams, which take a chunk and what the layers remember of those before.",
        ),
    ] = False,
    weights: Annotated[
        str,
        typer.Option(
            help="Weights in ONNX files: same, or float16 for half the size; the computation stays in float32.",
            autocompletion=complete(*EXPORT_WEIGHTS),
        ),
    ] = "same",
    opset: Annotated[
        int | None, typer.Option(min=18, max=21, help="Version of ONNX's operators, 18 unless given.")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a former export. Without it one that exists is an error.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Export encoder and decoder to ONNX, torch.export or AOTInductor, for clips of 16 pixels per side or more."""
    check_choice("--to", to, EXPORT_FORMATS)
    check_choice("--part", part, EXPORT_PARTS)
    check_choice("--weights", weights, EXPORT_WEIGHTS)
    if opset is not None and to != "onnx":
        raise ValueError(f"`--opset` must not be given unless `--to` is onnx, got {opset} with {to}.")
    from ..export import PARTS, check_folder, export_model

    check_place("OUT", target, target.parent)
    check_folder(target, overwrite, "OUT", "`--overwrite`")
    vae = load_model(model, device, dtype, argument="MODEL")
    with progress_bar("graph", "export") as advance:
        files = export_model(
            vae,
            target,
            to,  # type: ignore[arg-type] - checked above
            parts=PARTS if part == "both" else (part,),  # type: ignore[arg-type]
            streaming=streaming,
            opset=opset,
            weights=weights,  # type: ignore[arg-type]
            overwrite=overwrite,
            progress=lambda done, total: advance(min(done, 1), total),
        )
    _say_written(target, sorted(target.iterdir()), as_json, set(files))


def page(
    model: ModelArgument,
    target: Target,
    runtime: Annotated[
        Path | None,
        typer.Option(
            help="Folder `dist` of the npm package onnxruntime-web, to be copied into the page; without it a browser "
            "loads these files from cdn.jsdelivr.net."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a former page. Without it one that exists is an error.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a web page that runs an autoencoder in the browser, for `serve --page` or any static host."""
    from ..export import check_folder, check_runtime, export_page
    from ..export.page import SETTINGS

    check_place("OUT", target, target.parent)
    check_folder(target, overwrite, "OUT", "`--overwrite`", SETTINGS)
    if runtime is not None:
        check_runtime(runtime, "`--runtime`")
    vae = load_model(model, "cpu", "float32", argument="MODEL")
    with progress_bar("graph", "export") as advance:
        files = export_page(
            vae,
            target,
            os.path.basename(os.path.abspath(model)),  # `.` and `..` have names, too
            runtime=runtime,
            overwrite=overwrite,
            progress=lambda done, total: advance(min(done, 1), total),
        )
    _say_written(target, files, as_json, set(files))


def _say_written(folder: Path, written: list[Path], as_json: bool, files: set[Path]) -> None:
    """Print what was written; what is not in `files` belongs to one that is."""
    if as_json:
        print_json(
            {"folder": str(folder), "files": {str(path.relative_to(folder)): path.stat().st_size for path in written}}
        )
        return
    for path in written:
        typer.echo(f"{path}  {path.stat().st_size / 1e6:.2f} MB" + ("" if path in files else "  (belongs to these)"))

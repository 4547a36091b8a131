"""The graphs of a video autoencoder as files of ONNX, `torch.export` or AOTInductor.

Every file says by itself what it is: class, config and version of the model, pixel range, names and shapes, as JSON;
the folder has the same in `export.json`.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from .._version import __version__
from ..atomic import check_replaceable, replace_folder
from ..checks import check_choice
from ..description import public_config
from ..models.video_autoencoder import VideoAutoencoder
from .graphs import METADATA, PARTS, Graph, Part, Size, check_exportable, graphs_of, number_of


Format = Literal["onnx", "torch-export", "aoti"]
FORMATS: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2"}
Weights = Literal["same", "float16"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
MANIFEST = "export.json"
OPSETS = (18, 19, 20, 21)
# A file of protocol buffers takes 2 GiB at most.
MAX_BYTES_INSIDE = 3 * 2**29

# A graph is traced with these sizes, of which none matters, but which have no slice of one element or of none: those
# would be taken for fixed sizes. For the same reason the groups are at least so many in a program of `torch.export`.
EXAMPLE = {"batch": 2, "groups": 5, "latent_height": 3, "latent_width": 4}
MIN_GROUPS = 4
# Programs of encoders refuse clips that are one latent pixel high or wide, by a guard that tracing adds.
MIN_ENCODER_SIDE = 2
# What is compiled is compared at other sizes. One video is what PyTorch 2.13 gets wrong of WF-VAE's decoder.
COMPARED = {"batch": 1, "groups": MIN_GROUPS, "latent_height": 2, "latent_width": 3}


def export_model(
    vae: VideoAutoencoder,
    folder: str | Path,
    to: Format = "onnx",
    *,
    parts: tuple[Part, ...] = PARTS,
    streaming: bool = False,
    opset: int | None = None,
    weights: Weights = "same",
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write a model as graphs that run without this package.

    Batch size, frames, height and width stay open. The folder appears when it is complete.

    Args:
        vae: The model, of whatever family; its dtype is that of inputs, outputs and computation.
        folder: The folder to write.
        to: `"onnx"`; `"torch-export"`: programs for `torch.export.load`, on the device of the model; `"aoti"`: the
            same compiled by AOTInductor, for `torch._inductor.aoti_load_package` and for C++, on processors like this
            one.
        parts: `"encoder"`, `"decoder"` or both.
        streaming: Whether to add the graphs of streams, which take and give what the layers remember between chunks.
        opset: Version of ONNX's operators, 18 by default.
        weights: `"float16"`: ONNX files of half the size, whose float32 computation starts from rounded weights.
        overwrite: Whether to replace a former export.
        progress: Called with the number of finished graphs and of all, at first and after each.

    Returns:
        The files of the graphs, inside the folder.

    Raises:
        ValueError: If an argument is not legal, the model cannot do this, or there is no C++ compiler for `"aoti"`.
        ImportError: If the packages that write ONNX are not installed.
    """
    folder = Path(folder)
    check_choice("to", to, FORMATS)
    check_choice("weights", weights, WEIGHTS)
    if opset is not None:
        check_choice("opset", opset, OPSETS)
        if to != "onnx":
            raise ValueError(f"`opset` must be None unless `to` is 'onnx', got {opset} for {to!r}.")
    check_exportable(vae, parts)
    if weights != "same" and (to != "onnx" or vae.dtype != torch.float32):
        raise ValueError(f"`weights` {weights!r} needs an ONNX file of a float32 model, got {to} of {vae.dtype}.")
    if to == "onnx" and (vae.dtype not in (torch.float32, torch.float16) or vae.device.type != "cpu"):
        raise ValueError(f"`to` 'onnx' needs a model of float32 or float16 on cpu, got {vae.dtype} on {vae.device}.")
    check_folder(folder, overwrite)
    if to == "onnx":
        try:
            from .onnx_files import SharedWeights, write_onnx
        except ImportError as error:
            raise ImportError(
                'ONNX files need onnx and onnxscript: pip install "diffusers-leanvae[export]".'
            ) from error
    if to == "aoti":
        _check_compiler()
    opset = opset or OPSETS[0]
    graphs = graphs_of(vae, parts, streaming)
    entries = {
        graph.name: {"file": f"{graph.name}{FORMATS[to]}", **_entry(graph, to, vae.is_local)} for graph in graphs
    }
    with named_errors(folder), replace_folder(folder) as partial, ExitStack() as stack:
        shared: dict[Part, SharedWeights] = {}
        if to == "onnx" and (streaming or sum(weight.nbytes for weight in vae.parameters()) > MAX_BYTES_INSIDE):
            shared = {part: stack.enter_context(SharedWeights(partial / f"{part}.weights")) for part in parts}
        progress(0, len(graphs))
        for done, graph in enumerate(graphs, 1):
            description = json.dumps(_describe(vae, to, {graph.name: entries[graph.name]}))
            path = partial / entries[graph.name]["file"]
            program = trace(graph)
            if to == "onnx":
                write_onnx(program, graph, path, opset, description, weights == "float16", shared.get(graph.part))
            elif to == "aoti":
                _compile(program, graph, path, description)
            else:
                torch.export.save(program, path, extra_files={f"{METADATA}.json": description})
            progress(done, len(graphs))
        manifest = json.dumps(_describe(vae, to, entries), indent=2)
        (partial / MANIFEST).write_text(f"{manifest}\n", encoding="utf-8")
    return [folder / entry["file"] for entry in entries.values()]


class UnwritableError(ValueError):
    """What the file system says against the folder of an export."""

    def __init__(self, folder: Path, reason: OSError) -> None:
        super().__init__(f"Cannot write {str(folder)!r}: {reason}.")
        self.reason = reason


@contextmanager
def named_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into one that names the folder that was asked for, be it around another."""
    try:
        yield
    except OSError as error:  # of a full disk, which names no file
        raise UnwritableError(folder, error) from error
    except UnwritableError as error:
        raise UnwritableError(folder, error.reason) from error.reason


def trace(graph: Graph) -> torch.export.ExportedProgram:
    """Trace a graph, with open sizes."""
    dims = {name: torch.export.Dim(name, min=MIN_GROUPS if name == "groups" else 1) for name in EXAMPLE}

    def dim(size: Size) -> Any:
        scaled = size.factor * dims[size.name] if size.factor != 1 else dims[size.name]
        return scaled + size.more if size.more else scaled

    shapes = [{i: dim(size) for i, size in enumerate(port.shape) if isinstance(size, Size)} for port in graph.inputs]
    dynamic_shapes = (shapes[0], tuple(shapes[1:])) if len(shapes) > 1 else (shapes[0],)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own use of what it has deprecated
        return torch.export.export(graph.module, _make_inputs(graph, EXAMPLE), dynamic_shapes=dynamic_shapes)


def _make_inputs(graph: Graph, clip: dict[str, int]) -> tuple[torch.Tensor, ...]:
    """Make inputs of a graph for a clip of these sizes: normal noise, always the same."""
    like, generator = next(graph.module.parameters()), torch.Generator().manual_seed(0)
    shapes = [[number_of(size, clip) for size in port.shape] for port in graph.inputs]
    return tuple(torch.randn(shape, generator=generator).to(like.device, like.dtype) for shape in shapes)


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # these take a second to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "`to` 'aoti' needs a C++ compiler (g++, or the one that the environment variable CXX names), got none."
        ) from error


def _compile(program: torch.export.ExportedProgram, graph: Graph, path: Path, description: str) -> None:
    """Compile a program and write it, if it then computes what the model does."""
    from torch._inductor.exc import InductorError

    settings = {"aot_inductor.metadata": {METADATA: description}}
    refusal = f"`to` must be 'torch-export' or 'onnx' for the {graph.part} of this model, got 'aoti', whose "
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in `trace`
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
        except InductorError as error:
            raise ValueError(f"{refusal}compiler fails at its open sizes.") from error
        inputs = _make_inputs(graph, COMPARED)
        compiled, expected = torch._inductor.aoti_load_package(str(path))(*inputs), graph.module(*inputs)
    for found, output in zip(compiled, expected, strict=True):
        if output.numel() and (found - output).abs().max() > 0.1 * output.abs().max():  # rounding is far less
            raise ValueError(f"{refusal}program computes something else.")


def check_folder(
    folder: Path, overwrite: bool, name: str = "`folder`", option: str = "`overwrite`", mark: str = MANIFEST
) -> None:
    """Refuse to replace anything but a former export.

    Args:
        folder: The folder to write.
        overwrite: Whether to replace a former export.
        name: Where the folder was given, for the message.
        option: Where `overwrite` was given, for the message.
        mark: A file that a former export has.
    """
    check_replaceable(name, folder, "former export", lambda former: (former / mark).is_file())
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{name} must be new or empty without {option}, got the export {str(folder)!r}.")


def _entry(graph: Graph, to: Format, takes_images: bool) -> dict[str, Any]:
    """One graph of the description."""
    ports = {"inputs": graph.inputs, "outputs": graph.outputs}
    least = MIN_GROUPS if to != "onnx" else int(graph.role != "whole" or not takes_images)
    named = {key: [{"name": port.name, "shape": port.labels} for port in value] for key, value in ports.items()}
    side = MIN_ENCODER_SIDE if to != "onnx" and graph.part == "encoder" else 1
    return {"part": graph.part, "role": graph.role, "min_groups": least, "min_latent_side": side, **named}


def _describe(vae: VideoAutoencoder, to: Format, entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    config = public_config(vae.config)
    return {
        "format": to,
        "package": f"diffusers-leanvae {__version__}",
        "class": type(vae).__name__,
        "config": config,
        "dtype": str(vae.dtype).removeprefix("torch."),
        "pixel_range": [-1.0, 1.0],
        "temporal_compression_ratio": vae.temporal_compression_ratio,
        "spatial_compression_ratio": vae.spatial_compression_ratio,
        "latent_channels": vae.latent_channels,
        "num_delayed_frames": vae.num_delayed_frames,
        "latents_mean": config["latents_mean"],
        "latents_std": config["latents_std"],
        "scaling_factor": config["scaling_factor"],
        "graphs": entries,
    }

"""ONNX files of traced graphs: their names, what they say of themselves, and where their weights are."""

import hashlib
import logging
import math
import warnings
from pathlib import Path
from typing import Self

import numpy as np
import onnx
import onnxscript  # noqa: F401 - PyTorch's exporter needs it, and says so only after tracing
import torch
from onnx import external_data_helper, helper, numpy_helper

from .._version import __version__
from .graphs import METADATA, Graph


MIN_WEIGHT_ELEMENTS = 512  # what is smaller, such as a shape or a bias, stays inside the file as it is
ALIGNMENT = 4096  # of weights, so that they can be mapped into memory


class SharedWeights:
    """Weights of several ONNX files in one, each tensor once.

    Args:
        path: The file to write, in the folder of the ONNX files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._offsets: dict[bytes, int] = {}

    def take(self, tensor: onnx.TensorProto) -> None:
        """Move the data of a tensor out of its ONNX file."""
        data = numpy_helper.to_array(tensor).tobytes()
        digest = hashlib.sha256(data).digest()
        if digest not in self._offsets:
            self._file.write(bytes(-self._file.tell() % ALIGNMENT))
            self._offsets[digest] = self._file.tell()
            self._file.write(data)
        tensor.raw_data = data  # what refers to it needs it there
        external_data_helper.set_external_data(tensor, self.path.name, self._offsets[digest], len(data))
        tensor.ClearField("raw_data")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_onnx(
    program: torch.export.ExportedProgram,
    graph: Graph,
    path: Path,
    opset: int,
    description: str,
    as_float16: bool = False,
    shared: SharedWeights | None = None,
) -> None:
    """Write a traced graph as an ONNX file.

    Args:
        program: The graph as traced.
        graph: Its names and shapes.
        path: The file.
        opset: Version of the operators.
        description: What the file says of itself, as JSON.
        as_float16: Whether to store weights in float16, to be cast back when they are loaded.
        shared: Where the weights go, instead of into the file.
    """
    model = _convert(program, graph, opset)
    model.producer_name, model.producer_version = "diffusers-leanvae", __version__
    helper.set_model_props(model, {METADATA: description})
    _name_sizes(model, graph)
    # The exporter notes at each node which line of whose source it came from.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    if as_float16:
        store_as_float16(model)
    if shared is not None:
        share_weights(model, shared)
    path.write_bytes(model.SerializeToString())


def _convert(program: torch.export.ExportedProgram, graph: Graph, opset: int) -> onnx.ModelProto:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it names the operators of torchvision that it does without
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=[port.name for port in graph.inputs],
                output_names=[port.name for port in graph.outputs],
            )
    finally:
        logger.setLevel(level)
    assert converted is not None  # `None` is for the exporter without `dynamo`
    return converted.model_proto


def _name_sizes(model: onnx.ModelProto, graph: Graph) -> None:
    """Give the open sizes names that people understand, instead of the exporter's."""
    del model.graph.value_info[:]
    for values, ports in ((model.graph.input, graph.inputs), (model.graph.output, graph.outputs)):
        for value, port in zip(values, ports, strict=True):
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(helper.make_tensor_value_info(port.name, kind, port.labels))


def share_weights(model: onnx.ModelProto, shared: SharedWeights) -> None:
    """Move the weights of a model into a file of several models."""
    for tensor in model.graph.initializer:
        if _is_weight(tensor):
            shared.take(tensor)


def store_as_float16(model: onnx.ModelProto) -> None:
    """Round weights to float16, and cast them back at the start of the graph; those beyond its range stay."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or not _is_weight(tensor):
            continue
        name = tensor.name
        with np.errstate(over="ignore"):
            rounded = numpy_helper.to_array(tensor).astype(np.float16)
        if not np.isfinite(rounded).all():
            continue
        tensor.CopyFrom(numpy_helper.from_array(rounded, f"{name}.float16"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], f"{name}.cast", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _is_weight(tensor: onnx.TensorProto) -> bool:
    return math.prod(tensor.dims) >= MIN_WEIGHT_ELEMENTS

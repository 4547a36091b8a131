"""Encoder and decoder as files for ONNX Runtime, `torch.export` and AOTInductor: [`export_model`]."""

from .files import FORMATS, WEIGHTS, check_folder, export_model, trace
from .graphs import PARTS, Graph, Port, Size, graphs_of


__all__ = [
    "FORMATS",
    "PARTS",
    "WEIGHTS",
    "Graph",
    "Port",
    "Size",
    "check_folder",
    "export_model",
    "graphs_of",
    "trace",
]

"""Encoder and decoder as files for ONNX Runtime, `torch.export` and AOTInductor, and as a page for browsers."""

from .files import FORMATS, WEIGHTS, check_folder, export_model, trace
from .graphs import PARTS, Graph, Port, Size, graphs_of
from .page import check_runtime, export_page


__all__ = [
    "FORMATS",
    "PARTS",
    "WEIGHTS",
    "Graph",
    "Port",
    "Size",
    "check_folder",
    "check_runtime",
    "export_model",
    "export_page",
    "graphs_of",
    "trace",
]

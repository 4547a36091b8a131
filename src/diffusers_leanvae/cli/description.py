"""Descriptions of files and models from their headers and configs: no weights are read, and torch is not imported."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .. import bundled


CONFIG_NAME = "config.json"
INDEX_NAME = "model_index.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class Family(NamedTuple):
    """A kind of model.

    Attributes:
        name: Its name in papers.
        ratios: Returns the compression ratios of time and of space for a config; `None` for a model without them.
        buffers: Tensors in the file that are no parameters.
    """

    name: str
    ratios: Callable[[dict[str, Any]], tuple[int, ...]] | None = None
    buffers: tuple[str, ...] = ()


FAMILIES = {
    "AutoencoderKLLeanVAE": Family(
        "LeanVAE", lambda config: (2 * config["patch_size"][0], 2 * config["patch_size"][1])
    ),
    "AutoencoderKLWFVAE": Family("WF-VAE", lambda config: (config["temporal_compression_ratio"], 8)),
    "AutoencoderKLIVVAE": Family("IV-VAE", lambda config: (4, 8)),
    "LeanVAELatteTransformer3DModel": Family("Latte", buffers=("pos_embed", "temp_embed")),
}


class Header(NamedTuple):
    """The header of a safetensors file.

    Attributes:
        tensors: Dtype and shape of each tensor.
        metadata: Texts that the writer added.
    """

    tensors: dict[str, tuple[str, list[int]]]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        ValueError: If it has none.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(os.fstat(file.fileno()).st_size, 100 * 2**20):
                raise ValueError("the header is longer than the file")
            entries = json.loads(file.read(length))
            metadata = entries.pop("__metadata__", {})
            tensors = {name: (str(entry["dtype"]), entry["shape"]) for name, entry in entries.items()}
            return Header({name: (DTYPES.get(code, code), shape) for name, (code, shape) in tensors.items()}, metadata)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`path` must be a valid safetensors file, got {str(path)!r}: {error}.") from None


def describe(source: str) -> dict[str, Any] | None:
    """Describe a video, image, latents file, cached data set, model or pipeline, if its header and config tell.

    Args:
        source: A path, or the name of a bundled model or pipeline.

    Returns:
        `kind` and what is known, or `None` for anything else, such as an original checkpoint.
    """
    if source in bundled.MODELS:
        return _describe_model(bundled.model_path(source))
    if source in bundled.PIPELINES:
        vae = bundled.model_path(bundled.PIPELINES[source].model)
        return _describe_pipeline(bundled.pipeline_path(source), {"vae": vae})
    path = Path(source)
    if path.is_dir():
        return _describe_folder(path)
    if path.is_file() and path.suffix.lower() == ".safetensors":
        header = read_header(path)
        return _describe_latents(header) if "leanvae" in header.metadata else None
    if path.is_file():
        return _describe_video(path)
    return None


def _describe_video(path: Path) -> dict[str, Any] | None:
    from ..video_io.reader import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, probe_video

    if path.suffix.lower() not in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS:
        return None
    info = vars(probe_video(path))
    return {"kind": "image" if info["is_image"] else "video", **info}


def _describe_latents(header: Header) -> dict[str, Any]:
    dtype, shape = header.tensors["latents"]
    return {"kind": "latents", "shape": shape, "dtype": dtype, **json.loads(header.metadata["leanvae"])}


def _describe_folder(folder: Path) -> dict[str, Any] | None:
    if (folder / INDEX_NAME).is_file():
        return _describe_pipeline(folder, {})
    if (folder / CONFIG_NAME).is_file():
        return _describe_model(folder)
    if (folder / "settings.json").is_file():  # of `leanvae encode-dataset`
        index = folder / "index.json"
        is_complete = index.is_file()
        return {
            "kind": "data set of latents",
            "is_complete": is_complete,
            **(_read_json(index) if is_complete else {}),
            "settings": _read_json(folder / "settings.json"),
        }
    return None


def _describe_model(folder: Path) -> dict[str, Any] | None:
    config = _read_json(folder / CONFIG_NAME)
    class_name = config.get("_class_name")
    files = _weight_files(folder)
    if class_name is None or not files:
        return None
    family = FAMILIES.get(class_name, Family(class_name))
    ratios = {}
    if family.ratios is not None:
        try:
            time, space = family.ratios(config)
        except (LookupError, TypeError) as error:
            name = f"{type(error).__name__}: {error}"
            raise ValueError(f"`{CONFIG_NAME}` of {str(folder)!r} must describe an {class_name} ({name}).") from None
        ratios = {"temporal_compression_ratio": time, "spatial_compression_ratio": space}
    return {
        "kind": "model",
        "class": class_name,
        "family": family.name,
        **_describe_weights(files, family.buffers),
        **ratios,
        "config": {key: value for key, value in config.items() if not key.startswith("_")},
    }


def _describe_weights(files: Iterable[Path], buffers: tuple[str, ...]) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for path in files:
        for name, (dtype, shape) in read_header(path).tensors.items():
            dtypes[dtype] += math.prod(shape) * (name not in buffers)
    return {
        "num_parameters": dtypes.total(),
        "dtypes": dict(dtypes),
        "num_bytes": sum(path.stat().st_size for path in files),
    }


def _describe_pipeline(folder: Path, elsewhere: dict[str, Path]) -> dict[str, Any]:
    """Describe a pipeline; `elsewhere` are folders of components that are not in its own."""
    index = _read_json(folder / INDEX_NAME)
    components: dict[str, Any] = {}
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and value[1] is not None:
            place = elsewhere.get(name, folder / name)
            described = _describe_model(place) if (place / CONFIG_NAME).is_file() else None
            components[name] = described or {"class": value[1]}
    counts = [part["num_parameters"] for part in components.values() if "num_parameters" in part]
    labels = index.get("id2label") or {}
    return {
        "kind": "pipeline",
        "class": index.get("_class_name"),
        "num_parameters": sum(counts),
        **({"labels": [labels[key] for key in sorted(labels, key=int)]} if labels else {}),
        "components": components,
    }


def _weight_files(folder: Path) -> list[Path]:
    """Find the safetensors files of a model: one, or those that its index names."""
    index = folder / f"{WEIGHTS_NAME}.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    return [folder / WEIGHTS_NAME] if (folder / WEIGHTS_NAME).is_file() else []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`path` must hold valid JSON, got {str(path)!r}: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"`path` must hold a JSON object, got {str(path)!r} with a {type(content).__name__}.")
    return content

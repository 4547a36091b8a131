"""Descriptions of files and models from their headers and configs: no weights are read, and torch is not imported."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from . import bundled
from .atomic import check_replaceable
from .checks import CHECKPOINT_SUFFIXES
from .conversion.headers import CONFIG_NAME, WEIGHTS_NAME, Header, TensorInfo, json_object, read_header


INDEX_NAME = "model_index.json"
WEIGHTS_NAMES = (WEIGHTS_NAME, "model.safetensors")  # of diffusers, of transformers
ADAPTER_NAME = "pytorch_lora_weights.safetensors"  # what `load_lora_weights` of diffusers looks for
ADAPTER_VALUES = {"rank": "r", "alpha": "lora_alpha", "targets": "target_modules"}  # ours -> those of peft
# A file of weights, or the index of such files: its name without variant and number, and its variant, which diffusers
# puts in front of the number and transformers behind it.
_WEIGHTS = re.compile(
    r"(?P<plain>(.*/)?[^./]*?)(-\d+-of-\d+)?(\.(?P<variant>[^./]+?))?(-\d+-of-\d+)?\.(safetensors|bin)"
    r"(?P<index>\.index(\.(?P<of_index>[^./]+))?\.json)?"
)


class Family(NamedTuple):
    """A kind of model.

    Attributes:
        name: Its name in papers.
        ratios: Returns the compression ratios of time and of space for a config; `None` for a model without them.
        constants: Matches names of tensors in a file that are no parameters; `None` if there are none.
    """

    name: str
    ratios: Callable[[dict[str, Any]], tuple[int, ...]] | None = None
    constants: str | None = None


FAMILIES = {
    "AutoencoderKLLeanVAE": Family("LeanVAE", lambda config: tuple(2 * size for size in config["patch_size"][:2])),
    "AutoencoderKLWFVAE": Family("WF-VAE", lambda config: (config["temporal_compression_ratio"], 8), "wavelet_tran"),
    "AutoencoderKLIVVAE": Family("IV-VAE", lambda config: (4, 8)),
    "LeanVAELatteTransformer3DModel": Family("Latte", constants="^(pos|temp)_embed$"),
}


def describe(source: str) -> dict[str, Any] | None:
    """Describe a video, image, latents file, cached data set, model, pipeline or adapter by its header and config.

    Args:
        source: A path, `-` for a video on standard input, the address of a video, numbered pictures (`f_%04d.png`), or
            the name of a bundled model or pipeline, before which comes a folder of that name.

    Returns:
        `kind` and what is known, or `None` for anything else, such as a pickle or a Hub id.

    Raises:
        ValueError: If a file is damaged, or is not what its name or config says.
    """
    if bundled.is_bundled(source):
        return describe_bundled(source)
    from .video_io.inputs import find_sequence, is_remote

    path = Path(source)
    if path.is_dir():
        return _describe_folder(path)
    if path.suffix.lower() == ".safetensors" and path.is_file():
        return _describe_safetensors(path)
    is_checkpoint = path.suffix.lower() in CHECKPOINT_SUFFIXES
    is_video = source == "-" or path.is_fifo() or path.is_file() or (is_remote(source) and not _is_model(source))
    if (is_video and not is_checkpoint) or find_sequence(source) is not None:
        return _describe_video(source)
    return None


def describe_bundled(name: str) -> dict[str, Any] | None:
    """Describe the bundled model or pipeline of a name, as [`describe`] does."""
    if name in bundled.MODELS:
        return _describe_model(bundled.model_path(name))
    vae = bundled.model_path(bundled.PIPELINES[name].model)
    return _describe_pipeline(bundled.pipeline_path(name), {"vae": vae})


def list_files(source: str | Path) -> dict[str, Path]:
    """List the files of a saved model, pipeline or adapter by their names in its folder, but for hidden ones.

    Args:
        source: The folder, or the name of a bundled model or pipeline, with the autoencoder of the latter; a folder of
            that name comes first.

    Returns:
        The files in the order of their names; none if there is no such folder.
    """
    folders = {"": Path(source)}
    if bundled.is_bundled(source, bundled.MODELS):
        folders = {"": bundled.model_path(str(source))}
    elif bundled.is_bundled(source, bundled.PIPELINES):
        vae = bundled.model_path(bundled.PIPELINES[str(source)].model)
        folders = {"": bundled.pipeline_path(str(source)), "vae/": vae}
    files: dict[str, Path] = {}
    for start, folder in folders.items():
        for path in folder.rglob("*"):
            name = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                files[start + name.as_posix()] = path
    return dict(sorted(files.items()))


def _is_model(address: str) -> bool:
    """Tell whether an address is that of a checkpoint."""
    return urlsplit(address).path.lower().endswith(CHECKPOINT_SUFFIXES)


def describe_model(
    class_name: str, weights: Iterable[tuple[str, int]], config: Mapping[str, Any], num_bytes: int | None = None
) -> dict[str, Any]:
    """Describe a model.

    Args:
        class_name: Its class.
        weights: Dtype and number of elements of each parameter.
        config: Its config.
        num_bytes: Size of its files.

    Raises:
        ValueError: If the config is not one of such a model.
    """
    family = FAMILIES.get(class_name, Family(class_name))
    dtypes: Counter[str] = Counter()
    for dtype, count in weights:
        dtypes[dtype] += count
    ratios = {}
    if family.ratios is not None:
        try:
            time, space = family.ratios(dict(config))
        except (LookupError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"The config must be one of an {class_name}, which this is not ({reason}).") from None
        ratios = {"temporal_compression_ratio": time, "spatial_compression_ratio": space}
    return {
        "kind": "model",
        "class": class_name,
        "family": family.name,
        "num_parameters": dtypes.total(),
        "dtypes": dict(dtypes),
        **({} if num_bytes is None else {"num_bytes": num_bytes}),
        **ratios,
        "config": public_config(config),
    }


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Select the arguments of a model from its config, without the entries of diffusers: class, version, origin."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _describe_video(source: str) -> dict[str, Any]:
    from .video_io.reader import probe_video

    info = probe_video(source)
    described = {key: value for key, value in vars(info).items() if key != "is_variable_rate"}
    width, height = info.display_size
    return {
        "kind": "image" if info.is_image else "video",
        **described,
        "frame_rate": "variable" if info.is_variable_rate else "constant",
        "display_width": width,
        "display_height": height,
        "has_audio": info.has_audio,
    }


def _describe_safetensors(path: Path) -> dict[str, Any] | None:
    header = read_header(path)
    if "lora_adapter_metadata" in header.metadata or path.name == ADAPTER_NAME:
        return _describe_adapter(path, header)
    if "leanvae" not in header.metadata or "latents" not in header.tensors:
        return _describe_original(path, header.args(), header.tensors)
    latents = header.tensors["latents"]
    described = {"kind": "latents", "shape": list(latents.shape), "dtype": latents.dtype}
    return described | json_object(header.metadata["leanvae"])


def describe_checkpoint(path: Path) -> dict[str, Any] | None:
    """Describe an original checkpoint by the names and shapes in it, or return `None` for anything else.

    Raises:
        ValueError: If the file is damaged, or is a pickle of more than tensors and plain values.
    """
    from .conversion.checkpoints import read_layout

    return _describe_original(path, *read_layout(path))


def _describe_adapter(path: Path, header: Header) -> dict[str, Any]:
    """Describe low-rank adapters; what diffusers notes of them names the adapted component in front."""
    dtypes: Counter[str] = Counter()
    for tensor in header.tensors.values():
        dtypes[tensor.dtype] += tensor.numel()
    noted = json_object(header.metadata.get("lora_adapter_metadata"))
    values = {key.rpartition(".")[2]: value for key, value in noted.items()}
    return {
        "kind": "adapter",
        "components": sorted({name.split(".")[0] for name in header.tensors}),
        "num_parameters": dtypes.total(),
        "dtypes": dict(dtypes),
        "num_bytes": path.stat().st_size,
        **{name: values[key] for name, key in ADAPTER_VALUES.items() if key in values},
    }


def _describe_original(path: Path, args: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any] | None:
    from .conversion import ivvae, latte, leanvae, wfvae
    from .conversion.checkpoints import has_anchor

    modules = {module.NAME: module for module in (leanvae, wfvae, ivvae, latte)}
    for class_name, family in FAMILIES.items():
        if has_anchor(tensors, modules[family.name].ANCHOR):
            config, weights = modules[family.name].select_network(path, args, tensors)
            return describe_model(class_name, _parameters(class_name, weights), config, path.stat().st_size)
    return None


def _describe_folder(folder: Path) -> dict[str, Any] | None:
    if (folder / INDEX_NAME).is_file():
        return _describe_pipeline(folder, {})
    if (folder / CONFIG_NAME).is_file():
        return _describe_model(folder)
    if (folder / ADAPTER_NAME).is_file():
        return _describe_safetensors(folder / ADAPTER_NAME)
    if (folder / "settings.json").is_file():  # of `leanvae encode-dataset`
        index = folder / "index.json"
        is_complete = index.is_file()
        return {
            "kind": "data set of latents",
            "is_complete": is_complete,
            **(read_json(index) if is_complete else {}),
            "settings": read_json(folder / "settings.json"),
        }
    return _describe_latents(folder)


def _describe_latents(folder: Path) -> dict[str, Any] | None:
    """Describe a folder that holds only what `leanvae encode` wrote for the files of another."""
    paths = list_files(folder).values()
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        return None
    models: set[str] = set()
    num_frames = 0
    for path in paths:
        header = read_header(path)
        if "leanvae" not in header.metadata or "latents" not in header.tensors:
            return None
        info = json_object(header.metadata["leanvae"])
        models.add(str(info.get("model")))
        num_frames += int(info.get("num_frames", 0))
    return {
        "kind": "folder of latents",
        "num_files": len(paths),
        "num_frames": num_frames,
        "models": sorted(models),
        "num_bytes": sum(path.stat().st_size for path in paths),
    }


def _describe_model(folder: Path, class_name: str | None = None) -> dict[str, Any] | None:
    """Describe a model in a folder; `class_name` is what its pipeline calls it, where its config does not say."""
    config = read_json(folder / CONFIG_NAME)
    class_name = config.get("_class_name", class_name)
    if not isinstance(class_name, str | None):
        raise ValueError(f"`_class_name` of {str(folder / CONFIG_NAME)!r} must be a name, got {class_name!r}.")
    files = _weight_files(folder)
    if class_name not in FAMILIES and len(files) == 1:  # perhaps an original that was saved by diffusers' means
        header = read_header(files[0])
        described = _describe_original(files[0], header.args(), header.tensors)
        if described is not None:
            return described
    if class_name is None or not files:
        return None
    weights = [entry for path in files for entry in _parameters(class_name, read_header(path).tensors)]
    return describe_model(class_name, weights, config, sum(path.stat().st_size for path in files))


def _parameters(class_name: str, tensors: Mapping[str, TensorInfo]) -> list[tuple[str, int]]:
    """List dtype and number of elements of the parameters among the tensors of a file."""
    constants = FAMILIES.get(class_name, Family(class_name)).constants
    return [
        (tensor.dtype, tensor.numel())
        for name, tensor in tensors.items()
        if constants is None or re.search(constants, name) is None
    ]


def _describe_pipeline(folder: Path, elsewhere: dict[str, Path]) -> dict[str, Any]:
    """Describe a pipeline; `elsewhere` are folders of components that are not in its own."""
    index = read_json(folder / INDEX_NAME)
    components: dict[str, Any] = {}
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and value[1] is not None:
            place = elsewhere.get(name, folder / name)
            described = _describe_model(place, value[1]) if (place / CONFIG_NAME).is_file() else None
            components[name] = described or {"class": value[1]}
    counts = [part["num_parameters"] for part in components.values() if "num_parameters" in part]
    labels = index.get("id2label") or {}
    return {
        "kind": "pipeline",
        "class": class_of_index(index),
        "num_parameters": sum(counts),
        **({"labels": [labels[key] for key in sorted(labels, key=int)]} if labels else {}),
        "components": components,
    }


def class_of_index(index: Mapping[str, Any]) -> Any:
    """Return the class of a pipeline; a pushed one names the module in its repository first (`hub.make_shims`)."""
    name = index.get("_class_name")
    return name[1] if isinstance(name, list) and len(name) == 2 else name


class WeightsName(NamedTuple):
    """What the name of a file of weights, or of the index of such files, says.

    Attributes:
        plain: The name, with its folders, without variant, number and suffix.
        variant: The variant, if it is of one.
        is_index: Whether it is an index.
    """

    plain: str
    variant: str | None
    is_index: bool


def parse_weights_name(name: str) -> WeightsName | None:
    """Take the name of a file of weights apart; `None` for any other file."""
    match = _WEIGHTS.fullmatch(name)
    if match is None:
        return None
    return WeightsName(match["plain"], match["variant"] or match["of_index"], match["index"] is not None)


def list_shards(index: Path) -> list[str]:
    """List the files that an index of weights names.

    Raises:
        ValueError: If it is no such index.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"`path` must be an index of weights with a `weight_map`, got {str(index)!r} without one.")
    return sorted(set(weight_map.values()))


def _weight_files(folder: Path) -> list[Path]:
    """Find the safetensors files of a model: one, or those that its index names."""
    for weights in WEIGHTS_NAMES:
        index = folder / f"{weights}.index.json"
        if index.is_file():
            return [folder / name for name in list_shards(index)]
        if (folder / weights).is_file():
            return [folder / weights]
    # Of a variant, which stands between name and suffix; its shards differ from it in their numbers.
    stems = {Path(weights).stem for weights in WEIGHTS_NAMES}
    variants: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.*.safetensors")):
        if path.name.split(".")[0] in stems:
            variants.setdefault(re.sub(r"-\d+-of-\d+$", "", path.stem), []).append(path)
    return next(iter(variants.values()), [])


def check_model_folder(name: str, folder: Path) -> None:
    """Refuse to replace any folder but that of a saved model, pipeline or adapter; as of `check_replaceable`."""
    check_replaceable(name, folder, "model folder", _has_model)


def _has_model(folder: Path) -> bool:
    if any((folder / name).is_file() for name in (ADAPTER_NAME, "adapter_config.json")):
        return True
    for name in (CONFIG_NAME, INDEX_NAME):
        try:
            if "_class_name" in read_json(folder / name):
                return True
        except (OSError, ValueError):
            pass
    return False


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: If there is none in the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`path` must hold valid JSON, got {str(path)!r}: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"`path` must hold a JSON object, got {str(path)!r} with a {type(content).__name__}.")
    return content

"""Original LeanVAE checkpoints <-> `AutoencoderKLLeanVAE`: the key map is data, used both ways, strictly.

Release file: `{"args": {...}, "state_dict": {...}}`. Training file (Lightning): `{"state_dict": {"autoencoder.<key>":
..., foreign keys}, "hyper_parameters": {"args": Namespace}}`. A safetensors file has the same keys and the arguments
as JSON in its metadata (`args` or `config`). Functions of files and dictionaries: no model is imported here.
"""

import argparse
import json
import math
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors
import safetensors.torch
import torch
from huggingface_hub import constants, hf_hub_download

from ..atomic import replace_file


# Arguments of `from_single_file` that are `huggingface_hub`'s.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
_PLACEHOLDERS = {
    "i": r"\d+",
    "j": r"\d+",
    "parameter": "weight|bias",
    "half": "encoder|decoder",
    "branch": "low|high|fusion",
    "kind": "video|image",
    "direction": "forward|backward",
}
_BLOCK_KEYS = {
    "dconv_layer.{j}.ds_conv.{parameter}": "{j}.conv.{parameter}",
    "ffd_layer.{j}.0.{parameter}": "{j}.ff.norm.{parameter}",
    "ffd_layer.{j}.1.weight": "{j}.ff.up_proj.weight",
    "ffd_layer.{j}.4.weight": "{j}.ff.down_proj.weight",
}
# Original key -> ours.
KEY_MAP = {
    "latent_bottleneck.phi": "bottleneck.phi",
    "latent_bottleneck.Q": "bottleneck.initial",
    "latent_bottleneck.weights.{i}": "bottleneck.iterations.{i}.step_size",
    "latent_bottleneck.threshold.{i}": "bottleneck.iterations.{i}.threshold",
    "std_layer.{parameter}": "logvar_proj.{parameter}",
    "encoder.{kind}_{branch}_proj.1.{parameter}": "encoder.{kind}_{branch}_proj.1.{parameter}",
    "decoder.{kind}_{branch}_proj.0.{parameter}": "decoder.{kind}_{branch}_proj.{parameter}",
    **{f"{{half}}.{{branch}}_layer.{k}": f"{{half}}.{{branch}}_layers.{v}" for k, v in _BLOCK_KEYS.items()},
    **{
        f"latent_bottleneck.{{direction}}_l.{{i}}.{k}": f"bottleneck.iterations.{{i}}.{{direction}}_transform.{v}"
        for k, v in _BLOCK_KEYS.items()
    },
}
# Original argument -> ours.
CONFIG_MAP = {
    "latent_dim": "latent_channels",
    "l_dim": "low_freq_dim",
    "h_dim": "high_freq_dim",
    "sep_num_layer": "num_branch_layers",
    "fusion_num_layer": "num_fusion_layers",
    "ista_iter_num": "num_ista_iterations",
    "ista_layer_num": "num_ista_layers",
}
# Kept under our names in `args`, where the original code ignores them, so that the way back loses nothing.
_EXTRA_CONFIG = ("patch_size", "pixel_factor", "scaling_factor", "latents_mean", "latents_std")
# The factor that the reference's diffusion configurations apply to latents (spec/latte.md section 5), by channels.
_SCALING_FACTORS = {4: 0.7744, 16: 1.0}
ANCHOR = "latent_bottleneck.phi"  # one key that every original LeanVAE has and nothing else does


def _rename(key: str, source: str, target: str, placeholders: Mapping[str, str]) -> str | None:
    pattern = re.sub(r"\\\{(\w+)\\\}", lambda m: f"(?P<{m[1]}>{placeholders[m[1]]})", re.escape(source))
    match = re.fullmatch(pattern, key)
    return target.format(**match.groupdict()) if match else None


def convert_keys(
    state_dict: dict[str, torch.Tensor],
    pairs: list[tuple[str, str]],
    placeholders: Mapping[str, str],
    kind: str,
) -> dict[str, torch.Tensor]:
    r"""Rename keys by templates; every key must fit one.

    Args:
        state_dict: Weights.
        pairs: Templates of keys, such as `{half}.{i}.weight`, and of what becomes of them.
        placeholders: Regular expression of each name in braces.
        kind: Whose keys they are, for the error.
    """
    converted, unknown = {}, []
    for key, tensor in state_dict.items():
        renamed = next(
            (new for old, ours in pairs if (new := _rename(key, old, ours, placeholders)) is not None), None
        )
        if renamed is None:
            unknown.append(key)
        else:
            converted[renamed] = tensor
    if unknown:
        raise ValueError(
            f"`state_dict` must hold {kind} keys only, got {len(unknown)} others, for instance {unknown[0]!r}."
        )
    return converted


def from_original(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    r"""Rename original keys to ours; every key must be known. Tensors are passed on untouched."""
    return convert_keys(state_dict, list(KEY_MAP.items()), _PLACEHOLDERS, "LeanVAE")


def to_original(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    r"""Rename our keys to the original ones; inverse of [`from_original`]."""
    pairs = [(ours, original) for original, ours in KEY_MAP.items()]
    return convert_keys(state_dict, pairs, _PLACEHOLDERS, "LeanVAE")


def config_from_original(args: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    r"""Our config of an original checkpoint: sizes from its tensors, checked against its `args`.

    Args:
        args: Constructor arguments stored in the file, original names; may be empty and may hold others.
        state_dict: Weights under original keys.
    """
    image_low, low_dim = state_dict["encoder.image_low_proj.1.weight"].shape[::-1]
    video_low = state_dict["encoder.video_low_proj.1.weight"].shape[1]
    patch_width = math.isqrt(image_low // 3)
    config: dict[str, Any] = {
        "latent_channels": state_dict[ANCHOR].shape[0],
        "low_freq_dim": low_dim,
        "high_freq_dim": state_dict["encoder.image_high_proj.1.weight"].shape[0],
        "num_branch_layers": count_matches(state_dict, r"encoder\.low_layer\.dconv_layer\.(\d+)\..*"),
        "num_fusion_layers": count_matches(state_dict, r"encoder\.fusion_layer\.dconv_layer\.(\d+)\..*"),
        "num_ista_iterations": count_matches(state_dict, r"latent_bottleneck\.weights\.(\d+)"),
        "num_ista_layers": count_matches(state_dict, r"latent_bottleneck\.forward_l\.0\.dconv_layer\.(\d+)\..*"),
        "patch_size": [video_low // image_low, patch_width, patch_width],
    }
    for original, ours in CONFIG_MAP.items():
        if original in args and args[original] != config[ours]:
            raise ValueError(
                f"`args` of the checkpoint says {original} = {args[original]}, its tensors {config[ours]}."
            )
    config["scaling_factor"] = _SCALING_FACTORS.get(config["latent_channels"], 1.0)
    config.update({name: args[name] for name in _EXTRA_CONFIG if args.get(name) is not None})
    return config


def count_matches(state_dict: Mapping[str, Any], pattern: str) -> int:
    r"""How many different numbers, the pattern's group, stand in the keys that match."""
    return len({match[1] for key in state_dict if (match := re.fullmatch(pattern, key))})


def read_original_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    r"""Read a release, Lightning or safetensors file of the original LeanVAE.

    EMA weights are preferred where a file has both. Pickles are opened with `weights_only=True`, and beyond tensors
    only `argparse.Namespace` is allowed.

    Returns:
        Config and state dict of an `AutoencoderKLLeanVAE`.

    Raises:
        ValueError: If the file is no such checkpoint, or a pickle with anything else inside.
    """
    path = Path(path)
    args, tensors = read_tensors(path, "LeanVAE")
    tensors = select_weights(path, tensors, ANCHOR, "LeanVAE")
    try:
        return config_from_original(args, tensors), from_original(tensors)
    except KeyError as error:
        raise ValueError(f"`path` must be a complete LeanVAE checkpoint, got {str(path)!r} without {error}.") from None


def select_weights(path: Path, tensors: dict[str, torch.Tensor], anchor: str, kind: str) -> dict[str, torch.Tensor]:
    r"""The weights of one network in a file that may hold several: averaged (EMA) ones if there are any.

    Args:
        path: Of the file, for the error.
        tensors: All of them.
        anchor: One key that every network of the kind has. What precedes it in the file is cut off; what does not
            start so is foreign: losses, discriminator, optimiser.
        kind: Of network, for the error.
    """
    prefixes = [key.removesuffix(anchor) for key in tensors if key.endswith(anchor)]
    if not prefixes:
        raise ValueError(f"`path` must be an original {kind} checkpoint, got {str(path)!r} without {anchor!r}.")
    prefix = next((p for p in prefixes if "ema" in re.split(r"[._]", p.lower())), prefixes[0])
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    r"""Arguments and tensors of an original checkpoint of some kind, which only the error names.

    A pickle is opened with `weights_only=True`, and beyond tensors only `argparse.Namespace` is allowed. The keys of
    a dictionary inside get its name in front, but for those of `state_dict`.

    Raises:
        ValueError: If there is no such file, or it is damaged, or a pickle with anything else inside.
    """
    if not path.is_file():
        raise ValueError(f"`path` must be an original {kind} checkpoint, got {str(path)!r}, which is no file.")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            return json.loads(metadata.get("args") or metadata.get("config") or "{}"), {
                key: file.get_tensor(key) for key in file.keys()
            }
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"`path` must be a valid safetensors file, got {str(path)!r}: {error}.") from None


def read_keys(path: str | Path) -> set[str]:
    r"""Keys of the tensors that [`read_tensors`] would read, which are not; none if there is no such file."""
    try:
        if Path(path).suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                return set(file.keys())
        return set(_read_pickle(Path(path), "meta")[1])
    except (ValueError, OSError, safetensors.SafetensorError):  # whoever asked says so when reading it
        return set()


def _read_pickle(path: Path, device: str = "cpu") -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.sub(r"\s+", " ", str(error))
        unsafe = re.search(r"GLOBAL (\S+)", reason) or re.search(r"Unsupported \S+ ([^\W\d]\S*)", reason)
        what = f"it wants to import {unsafe[1]!r}" if unsafe else "it is no readable PyTorch file"
        raise ValueError(f"`path` must be a pickle of tensors and plain values, got {str(path)!r}: {what}.") from None
    except Exception as error:  # on bytes that are no checkpoint torch's unpickler fails with whatever comes first
        raise ValueError(f"`path` must be a PyTorch checkpoint, got {str(path)!r}: {error}.") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"`path` must hold a dictionary, got {str(path)!r} with a {type(checkpoint).__name__}.")
    args = checkpoint.get("args", checkpoint.get("hyper_parameters", {}).get("args", {}))
    args = vars(args) if isinstance(args, argparse.Namespace) else dict(args)
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in checkpoint.items():  # `state_dict`, and EMA copies stored beside it
        if isinstance(entry, dict):
            scope = "" if name == "state_dict" else f"{name}."
            tensors.update({scope + key: value for key, value in entry.items() if isinstance(value, torch.Tensor)})
            for key, part in entry.items() if name == "state_dict" else ():  # of a model with several parts
                if isinstance(part, dict):
                    tensors.update({f"{key}.{k}": v for k, v in part.items() if isinstance(v, torch.Tensor)})
        elif isinstance(entry, torch.Tensor):  # a bare state dict
            tensors[name] = entry
    return args, tensors


def write_original_checkpoint(path: str | Path, config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> None:
    r"""Write an `AutoencoderKLLeanVAE` in the release layout (safetensors if `path` ends so, else a torch file).

    Raises:
        ValueError: If the config has no original counterpart (one of the ablations).
    """
    for name, legal in (
        ("in_channels", 3),
        ("patch_embedding_type", "separate"),
        ("bottleneck_type", "compressed_sensing"),
        ("patch_norm", False),
    ):
        if config[name] != legal:
            raise ValueError(f"`{name}` must be {legal!r} for the original layout, got {config[name]!r}.")
    path = Path(path)
    args = {original: config[ours] for original, ours in CONFIG_MAP.items()}
    args["embedding_dim"] = config["low_freq_dim"] + config["high_freq_dim"]
    args |= {name: config[name] for name in _EXTRA_CONFIG}
    args["patch_size"] = list(args["patch_size"])
    tensors = {key: value.detach().cpu().contiguous() for key, value in to_original(state_dict).items()}
    write_tensors(path, args, tensors, {"args": args, "state_dict": tensors})


def write_tensors(
    path: Path, args: dict[str, Any], tensors: dict[str, torch.Tensor], checkpoint: dict[str, Any]
) -> None:
    """Write an original checkpoint: safetensors with `args`, or `checkpoint` as a torch file."""
    with replace_file(path) as partial:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(tensors, partial, metadata={"format": "pt", "args": json.dumps(args)})
        else:
            torch.save(checkpoint, partial)


def resolve_checkpoint(reference: str | Path, **hub_kwargs: Any) -> Path:
    r"""Local path of a checkpoint given as a path, a Hub reference `user/repo/path/in/repo` or a Hub URL.

    Args:
        reference: For instance `Yumic/LeanVAE/LeanVAE-dim4.ckpt`.
        hub_kwargs: Passed on to `huggingface_hub.hf_hub_download` (`revision`, `token`, `cache_dir`, ...).
    """
    if os.path.exists(reference):
        return Path(reference)
    text = str(reference)
    url = urlparse(text)
    is_url = url.scheme in ("http", "https")
    parts = [part for part in (url.path if is_url else text).split("/") if part]
    hosts = {"huggingface.co", "hf.co", urlparse(constants.ENDPOINT).netloc}
    if is_url and url.netloc in hosts and len(parts) > 4 and parts[2] in ("resolve", "blob"):
        hub_kwargs.setdefault("revision", parts[3])
        del parts[2:4]
    elif url.scheme or len(parts) < 3 or text.startswith(("/", ".", "~")):
        raise ValueError(
            f"`reference` must be a file, a Hub file 'user/repo/file' or its URL "
            f"'https://huggingface.co/user/repo/resolve/revision/file', got {text!r}."
        )
    return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), **hub_kwargs))

"""Original LeanVAE checkpoints <-> `AutoencoderKLLeanVAE`: the key map is data, used both ways, strictly.

Release file: `{"args": {...}, "state_dict": {...}}`. Training file (Lightning): `{"state_dict": {"autoencoder.<key>":
..., foreign keys}, "hyper_parameters": {"args": Namespace}}`. A safetensors file has the same keys and the arguments
as JSON in its metadata (`args` or `config`). Functions of files and dictionaries: no model is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checkpoints
from .checkpoints import convert_keys, count_matches, read_tensors, write_tensors


if TYPE_CHECKING:  # PyTorch takes a second to import, and a header can be read without it
    import torch


NAME = "LeanVAE"
# Options of `leanvae convert` that apply: config values that a file cannot tell.
OPTIONS = ("pixel_factor",)
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
# The factor that the reference's diffusion configurations apply to latents, by channels.
_SCALING_FACTORS = {4: 0.7744, 16: 1.0}
ANCHOR = "latent_bottleneck.phi"  # one key that every original LeanVAE has and nothing else does
CONFIG_ANCHOR = "ista_iter_num"  # and one argument


def from_original(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename original keys to ours; every key must be known. Tensors are passed on untouched."""
    return convert_keys(state_dict, list(KEY_MAP.items()), _PLACEHOLDERS, NAME)


def to_original(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename our keys to the original ones; inverse of [`from_original`]."""
    pairs = [(ours, original) for original, ours in KEY_MAP.items()]
    return convert_keys(state_dict, pairs, _PLACEHOLDERS, NAME)


def config_from_original(args: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Derive our config from an original checkpoint: sizes from its tensors, checked against its `args`.

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


def select_network(
    path: Path, args: dict[str, Any], tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config of an `AutoencoderKLLeanVAE` and its weights, see [`checkpoints.select_network`]."""
    return checkpoints.select_network(path, args, tensors, NAME, ANCHOR, CONFIG_ANCHOR, config_from_original)


def read_original_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a release, Lightning or safetensors file of the original LeanVAE.

    EMA weights are preferred where a file has both. Arguments come from the file, or from the `config.json` next to
    it. Pickles are opened with `weights_only=True`, and beyond tensors only `argparse.Namespace` is allowed.

    Returns:
        Config and state dict of an `AutoencoderKLLeanVAE`.

    Raises:
        ValueError: If the file is no such checkpoint, or a pickle with anything else inside.
    """
    config, tensors = select_network(Path(path), *read_tensors(Path(path), NAME))
    return config, from_original(tensors)


def write_original_checkpoint(path: str | Path, config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> None:
    """Write an `AutoencoderKLLeanVAE` in the release layout (safetensors if `path` ends so, else a torch file).

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
    args = {original: config[ours] for original, ours in CONFIG_MAP.items()}
    args["embedding_dim"] = config["low_freq_dim"] + config["high_freq_dim"]
    args |= {name: config[name] for name in _EXTRA_CONFIG}
    args["patch_size"] = list(args["patch_size"])
    write_tensors(path, args, to_original(state_dict))

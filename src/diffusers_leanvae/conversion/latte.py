"""Original Latte checkpoints <-> `LeanVAELatteTransformer3DModel`: the key map is data, used both ways, strictly.

An original file is `{"model": state_dict, "ema": state_dict}`; a bare state dict and safetensors are read too. Stored
position tables are weights like all others, for averaging has changed them. Functions of files and dictionaries: no
model is imported here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints import count_matches, named_gaps, read_tensors, select_weights, write_tensors


if TYPE_CHECKING:  # PyTorch takes a second to import, and a header can be read without it
    import torch


NAME = "Latte"
# Options of `leanvae convert` that apply: config values that a file cannot tell.
OPTIONS = ("num_attention_heads",)
# The sizes of the paper (table 1): name -> blocks, width, heads. No tensor of a checkpoint shows the heads.
VARIANTS = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
# Original module -> ours. One original tensor that holds several of ours lists them in the order of its rows.
_MODULES = {
    "x_embedder.proj": ("patch_embed.proj",),
    "t_embedder.mlp.0": ("timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("timestep_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
_BLOCK_MODULES = {
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.proj": ("attn.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
_LABELS = ("y_embedder.embedding_table.weight", "class_embedder.embedding_table.weight")
ANCHOR = "temp_embed"  # one key that every original Latte has and nothing else does
CONFIG_ANCHOR = None  # the original has no config
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")


def key_map(num_layers: int, has_labels: bool) -> dict[str, tuple[str, ...]]:
    """Map every original key of a model to our keys that share it (query, key and value are one tensor).

    Args:
        num_layers: Blocks of both kinds; even ones of the original are spatial, odd ones temporal.
        has_labels: Whether the model is class-conditional.
    """
    modules: dict[str, tuple[str, ...]] = dict(_MODULES)
    for index in range(num_layers):
        kind = "temporal_transformer_blocks" if index % 2 else "transformer_blocks"
        for original, ours in _BLOCK_MODULES.items():
            modules[f"blocks.{index}.{original}"] = tuple(f"{kind}.{index // 2}.{name}" for name in ours)
    keys: dict[str, tuple[str, ...]] = {name: (name,) for name in ("pos_embed", "temp_embed")}
    for original, ours in modules.items():
        for parameter in ("weight", "bias"):
            keys[f"{original}.{parameter}"] = tuple(f"{name}.{parameter}" for name in ours)
    if has_labels:
        keys[_LABELS[0]] = (_LABELS[1],)
    return keys


def _swaps_halves(original_key: str) -> bool:
    # The original's last modulation has the shift first, diffusers' AdaLayerNormContinuous the scale.
    return original_key.startswith("final_layer.adaLN_modulation.")


def _swap_halves(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat(tensor.chunk(2)[::-1])


def _check_keys(actual: Mapping[str, Any], expected: set[str]) -> None:
    for kind, keys in (
        ("no other keys than Latte's", actual.keys() - expected),
        ("all keys", expected - actual.keys()),
    ):
        if keys:
            raise ValueError(f"`state_dict` must have {kind} of a Latte model, got {len(keys)} wrong: {min(keys)!r}.")


def from_original(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert original weights to ours; all keys must be known and present. Values are moved, never changed.

    Args:
        state_dict: Weights under original keys; prefixes of wrappers (`module.`, `_orig_mod.`) are dropped.
    """
    state_dict = _unwrap(state_dict)
    keys = key_map(count_matches(state_dict, r"blocks\.(\d+)\..*"), _LABELS[0] in state_dict)
    _check_keys(state_dict, set(keys))
    converted = {}
    for original, ours in keys.items():
        tensor = state_dict[original]
        if _swaps_halves(original):
            tensor = _swap_halves(tensor)
        # Parts of one tensor become tensors of their own, or each would keep the whole alive.
        parts = (tensor,) if len(ours) == 1 else (part.clone() for part in tensor.chunk(len(ours)))
        converted.update(zip(ours, parts, strict=True))
    return converted


def to_original(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert our weights to the original ones, bit for bit; inverse of [`from_original`]."""
    import torch

    num_layers = 2 * count_matches(state_dict, r"transformer_blocks\.(\d+)\..*")
    keys = key_map(num_layers, _LABELS[1] in state_dict)
    _check_keys(state_dict, {name for ours in keys.values() for name in ours})
    converted = {}
    for original, ours in keys.items():
        tensor = state_dict[ours[0]] if len(ours) == 1 else torch.cat([state_dict[name] for name in ours])
        converted[original] = _swap_halves(tensor) if _swaps_halves(original) else tensor
    return converted


def config_from_original(
    state_dict: Mapping[str, torch.Tensor], num_attention_heads: int | None = None
) -> dict[str, Any]:
    """Derive our config from the shapes of original weights.

    Args:
        state_dict: Weights under original keys.
        num_attention_heads: Heads, which no shape shows; by default those of the paper's sizes S, B, L and XL.
    """
    state_dict = _unwrap(state_dict)
    dim, in_channels, patch_size = state_dict["x_embedder.proj.weight"].shape[:3]
    if num_attention_heads is None:
        num_attention_heads = next((heads for _, width, heads in VARIANTS.values() if width == dim), None)
    if num_attention_heads is None or num_attention_heads < 1 or dim % num_attention_heads:
        widths = ", ".join(str(width) for _, width, _ in VARIANTS.values())
        raise ValueError(
            f"`num_attention_heads` must divide the width {dim} and be given for widths other than {widths}, got "
            f"{num_attention_heads}."
        )
    num_patches = state_dict["pos_embed"].shape[1]
    return {
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": dim // num_attention_heads,
        "in_channels": in_channels,
        "out_channels": state_dict["final_layer.linear.weight"].shape[0] // patch_size**2,
        "num_layers": count_matches(state_dict, r"blocks\.(\d+)\..*"),
        "patch_size": patch_size,
        "sample_size": math.isqrt(num_patches) * patch_size,
        "num_latent_frames": state_dict["temp_embed"].shape[1],
        "num_classes": state_dict[_LABELS[0]].shape[0] - 1 if _LABELS[0] in state_dict else None,
        "mlp_ratio": state_dict["blocks.0.mlp.fc1.weight"].shape[0] / dim,
    }


def _unwrap(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    unwrapped = {_WRAPPERS.sub("", key): tensor for key, tensor in state_dict.items()}
    if len(unwrapped) < len(state_dict):
        raise ValueError("`state_dict` must hold each key once, got the same one with and without a wrapper's prefix.")
    return unwrapped


def select_network(
    path: Path, args: dict[str, Any], tensors: Mapping[str, Any], num_attention_heads: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Select the weights of the network in a file and read its config from them; names and shapes are all it takes.

    Args:
        path: The file.
        args: Constructor's arguments in it.
        tensors: All tensors in it, or what is known of them ([`headers.TensorInfo`]).
        num_attention_heads: See [`config_from_original`]; files that we wrote say it themselves.

    Returns:
        Config of a `LeanVAELatteTransformer3DModel`, and the weights under original keys.

    Raises:
        ValueError: If the file is no such checkpoint.
    """
    tensors = select_weights(path, _unwrap(tensors), ANCHOR, NAME)
    with named_gaps(path, NAME):
        return config_from_original(tensors, num_attention_heads or args.get("num_heads")), tensors


def read_original_checkpoint(
    path: str | Path, num_attention_heads: int | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read an original Latte file: a pickle of `model` and `ema` weights, a bare state dict, or safetensors.

    EMA weights are preferred. Pickles are opened with `weights_only=True`, and beyond tensors only
    `argparse.Namespace` is allowed.

    Args:
        path: The file.
        num_attention_heads: See [`config_from_original`]; files that we wrote say it themselves.

    Returns:
        Config and state dict of a `LeanVAELatteTransformer3DModel`.

    Raises:
        ValueError: If the file is no such checkpoint, or a pickle with anything else inside.
    """
    path = Path(path)
    config, tensors = select_network(path, *read_tensors(path, NAME), num_attention_heads)
    return config, from_original(tensors)


def write_original_checkpoint(
    path: str | Path, config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> None:
    """Write a `LeanVAELatteTransformer3DModel` in the original layout, where the weights stand as `model` and `ema`.

    Args:
        path: File to write: safetensors if it ends so, else a torch file.
        config: Config of the model; its heads are stored next to the weights, where the original code ignores them.
        state_dict: Its weights.
    """
    args = {"num_heads": config["num_attention_heads"]}
    write_tensors(path, args, to_original(state_dict), ("model", "ema"))

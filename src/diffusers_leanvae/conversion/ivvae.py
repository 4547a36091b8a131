"""Original IV-VAE checkpoints <-> `AutoencoderKLIVVAE`: the key map is data, used both ways, strictly.

A file is a bare state dict. Functions of files and dictionaries: no model is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checkpoints
from .checkpoints import convert_keys, count_matches, read_tensors, write_tensors


if TYPE_CHECKING:  # PyTorch takes a second to import, and a header can be read without it
    import torch


NAME = "IV-VAE"
# Options of `leanvae convert` that apply: config values that a file cannot tell.
OPTIONS = ()
_PLACEHOLDERS = {
    "i": r"\d+",
    "parameter": "weight|bias",
    "branch": "conv_2d|conv_3d",
    "half": "2d|3d",
}
_BLOCK_KEYS = {
    "{i}.residual.0.gamma": "{i}.norm1.weight",
    "{i}.residual.3.gamma": "{i}.norm2.weight",
    "{i}.residual.2.{branch}.{parameter}": "{i}.conv1.{branch}.{parameter}",
    "{i}.residual.6.{branch}.{parameter}": "{i}.conv2.{branch}.{parameter}",
    "{i}.shortcut.{branch}.{parameter}": "{i}.conv_shortcut.{branch}.{parameter}",
    "{i}.residual.2.conv.{parameter}": "{i}.conv1.{parameter}",
    "{i}.residual.6.conv.{parameter}": "{i}.conv2.{parameter}",
    "{i}.shortcut.conv.{parameter}": "{i}.conv_shortcut.{parameter}",
    "{i}.resample_{half}.1.{parameter}": "{i}.conv_{half}.{parameter}",
    "{i}.time_conv.{parameter}": "{i}.time_conv.{parameter}",
    "{i}.Attention_{half}.norm.gamma": "{i}.attention_{half}.norm.weight",
    "{i}.Attention_{half}.to_qkv.{parameter}": "{i}.attention_{half}.to_qkv.{parameter}",
    "{i}.Attention_{half}.proj.{parameter}": "{i}.attention_{half}.to_out.{parameter}",
}
_CHAINS = {
    "encoder.downsamples": "encoder.blocks",
    "encoder.middle": "encoder.mid",
    "decoder.middle": "decoder.mid",
    "decoder.upsamples": "decoder.blocks",
}
# Original key -> ours.
KEY_MAP = {
    "encoder.conv1.{branch}.{parameter}": "encoder.conv_in.{branch}.{parameter}",
    "encoder.head.0.gamma": "encoder.norm_out.weight",
    "encoder.head.2.PAC_{i}.conv.{parameter}": "encoder.conv_out.convs.{i}.{parameter}",
    "encoder.head.2.PAC_conv.conv.{parameter}": "encoder.conv_out.merge.{parameter}",
    "conv1.{branch}.{parameter}": "encoder.quant_conv.{branch}.{parameter}",
    "conv2.{branch}.{parameter}": "decoder.post_quant_conv.{branch}.{parameter}",
    "decoder.conv1.conv.{parameter}": "decoder.conv_in.{parameter}",
    "decoder.head.0.gamma": "decoder.norm_out.weight",
    "decoder.head.2.{branch}.{parameter}": "decoder.conv_out.{branch}.{parameter}",
    **{
        f"{original}.{key}": f"{ours}.{value}"
        for original, ours in _CHAINS.items()
        for key, value in _BLOCK_KEYS.items()
    },
}
# Scale and shift of the released models, by latent and base channels; the file does not tell them.
_STATISTICS = {
    (4, 64): (1.3196, 0.1250),
    (8, 64): (1.0940, -0.0322),
    (16, 64): (0.9697, -0.1553),
    (16, 96): (0.7619, -0.0483),
}
ANCHOR = "encoder.head.2.PAC_conv.conv.weight"  # one key that every original IV-VAE has and nothing else does
CONFIG_ANCHOR = None  # the original has no config
_ORIGINAL_DESIGN = {
    "convolution": "group_causal",
    "use_keyframe_branch": True,
    "use_pyramid": True,
    "attention": "all",
}


def from_original(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename original keys to ours; every key must be known. The weights of norms lose axes of size 1."""
    flat = {key: value.flatten() if key.endswith(".gamma") else value for key, value in state_dict.items()}
    return convert_keys(flat, list(KEY_MAP.items()), _PLACEHOLDERS, NAME)


def to_original(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename our keys to the original ones; inverse of [`from_original`]."""
    pairs = [(ours, original) for original, ours in KEY_MAP.items()]
    original = convert_keys(state_dict, pairs, _PLACEHOLDERS, NAME)
    for key, value in original.items():
        if key.endswith(".gamma"):
            of_frames = ".Attention_" in key  # whose norm is applied to single frames
            original[key] = value.view(-1, *(1,) * (2 if of_frames else 3))
    return original


def config_from_original(args: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Derive our config from an original checkpoint: sizes from its tensors.

    Args:
        args: Constructor arguments, original names; may be empty. Only `scale_factor` and `shift_factor` are taken.
        state_dict: Weights under original keys.
    """
    latent_channels = state_dict["conv1.conv_2d.weight"].shape[0]
    base_channels = len(state_dict["encoder.conv1.conv_2d.bias"])
    num_blocks = count_matches(state_dict, r"encoder\.downsamples\.(\d+)\..*")
    num_layers = (num_blocks - 4) // 5  # three levels, their resampling, an attention, and a level with as many more
    ends = [(num_layers + 1) * level + num_layers - 1 for level in range(3)] + [num_blocks - 2]
    widths = [len(state_dict[f"encoder.downsamples.{index}.residual.3.gamma"]) // 2 for index in ends]
    config: dict[str, Any] = {
        "latent_channels": latent_channels,
        "base_channels": base_channels,
        "channel_multipliers": [width // base_channels for width in widths],
        "num_layers": num_layers,
    }
    scale, shift = _STATISTICS.get((latent_channels, base_channels), (None, None))
    scale, shift = args.get("scale_factor", scale), args.get("shift_factor", shift)
    if scale is not None and shift is not None:
        config |= {"scaling_factor": scale, "latents_mean": [shift] * latent_channels}
        config |= {"latents_std": [1.0] * latent_channels}
    return config


def select_network(
    path: Path, args: dict[str, Any], tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config of an `AutoencoderKLIVVAE` and its weights, see [`checkpoints.select_network`]."""
    return checkpoints.select_network(path, args, tensors, NAME, ANCHOR, CONFIG_ANCHOR, config_from_original)


def read_original_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a file of the original IV-VAE; pickles are opened with `weights_only=True`.

    Returns:
        Config and state dict of an `AutoencoderKLIVVAE`.

    Raises:
        ValueError: If the file is no such checkpoint, or a pickle with anything but tensors and plain values inside.
    """
    config, tensors = select_network(Path(path), *read_tensors(Path(path), NAME))
    return config, from_original(tensors)


def write_original_checkpoint(path: str | Path, config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> None:
    """Write an `AutoencoderKLIVVAE` as a bare state dict in the original layout.

    Args:
        path: A safetensors file, with scale and shift as metadata, if it ends so, else a torch file.
        config: Of the model.
        state_dict: Of the model.

    Raises:
        ValueError: If the model is an ablation, which the original has no layout for.
    """
    for name, value in _ORIGINAL_DESIGN.items():
        if config[name] != value:
            raise ValueError(f"`{name}` must be {value!r} in the original layout, got {config[name]!r}.")
    args = {"z_dim": config["latent_channels"], "dim": config["base_channels"]}
    args |= {"dim_mult": list(config["channel_multipliers"]), "num_res_blocks": config["num_layers"]}
    if config["latents_mean"] is not None:
        args |= {"scale_factor": config["scaling_factor"], "shift_factor": config["latents_mean"][0]}
    write_tensors(path, args, to_original(state_dict))

"""Original WF-VAE checkpoints <-> `AutoencoderKLWFVAE`: the key map is data, used both ways, strictly.

Training file: `{"ema_state_dict": {"module.<key>": ...}, "state_dict": {"gen_model": {"<key>": ...}, ...}}`; released
weights are a bare state dict, of which Open-Sora-Plan v1.3 has an older layout. The constants of the wavelets, which
some files hold, are checked to be what they must be and left out. Functions of files and dictionaries: no model is
imported here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checkpoints
from .checkpoints import count_matches, read_tensors, write_tensors


if TYPE_CHECKING:  # PyTorch takes a second to import, and a header can be read without it
    import torch


NAME = "WF-VAE"
# Options of `leanvae convert` that apply: config values that a file cannot tell.
OPTIONS = ()
# Original argument -> ours.
CONFIG_MAP = {
    "latent_dim": "latent_channels",
    "base_channels": "base_channels",
    "encoder_num_resblocks": "num_encoder_layers",
    "decoder_num_resblocks": "num_decoder_layers",
    "encoder_energy_flow_hidden_size": "encoder_flow_channels",
    "decoder_energy_flow_hidden_size": "decoder_flow_channels",
    "connect_res_layer_num": "num_flow_layers",
    "use_attention": "use_attention",
    "norm_type": "norm_type",
    "t_interpolation": "temporal_interpolation",
    "dropout": "dropout",
}
_VALUES = {"layernorm": "layer_norm", "groupnorm": "group_norm", "trilinear": "linear", "nearest": "nearest"}
# Arguments that name layers, by temporal ratio; no other choice has public weights.
_LAYERS = {
    "attention_type": ("AttnBlock3DFix", "AttnBlock3DFix"),
    "l1_dowmsample_block": ("Downsample", "Spatial2xTime2x3DDownsample"),
    "l1_downsample_wavelet": ("HaarWaveletTransform2D", "HaarWaveletTransform3D"),
    "l1_upsample_block": ("Upsample", "Spatial2xTime2x3DUpsample"),
    "l1_upsample_wavelet": ("InverseHaarWaveletTransform2D", "InverseHaarWaveletTransform3D"),
    "l2_dowmsample_block": ("Spatial2xTime2x3DDownsample", "Spatial2xTime2x3DDownsample"),
    "l2_downsample_wavelet": ("HaarWaveletTransform3D", "HaarWaveletTransform3D"),
    "l2_upsample_block": ("Spatial2xTime2x3DUpsample", "Spatial2xTime2x3DUpsample"),
    "l2_upsample_wavelet": ("InverseHaarWaveletTransform3D", "InverseHaarWaveletTransform3D"),
}
# Mean and 1 / standard deviation that Open-Sora-Plan applies to latents, by channels and base channels.
_STATISTICS = {
    (8, 128): (
        [-0.1621, -0.2734, -0.4004, -2.75, -2.0938, -1.8359, 1.0, -0.9844],
        [0.2969, 0.8164, 0.6758, 0.8906, 0.416, 0.6719, 0.5469, 0.7812],
    ),
    (32, 160): (
        [-0.2129, 0.1226, 1.6328, 0.6211, -0.875, 0.6172, -0.5703, 0.1348, -0.2178, -0.9375, 0.3184, 0.3281]
        + [-0.0544, -0.1826, -0.2812, 0.4355, 0.1621, -0.2578, 0.7148, -0.7422, -0.2295, -0.2324, -1.4922, 0.6328]
        + [1.125, -0.2578, -2.1094, 1.0391, 1.1797, -1.2422, -0.2988, -0.957],
        [0.7031, 0.7109, 1.5391, 1.2969, 0.7109, 1.4141, 1.3828, 2.1719, 1.7266, 1.8281, 1.9141, 1.2031]
        + [0.6875, 0.9609, 1.6484, 1.1875, 1.5312, 1.1328, 0.8828, 0.6836, 0.8828, 0.9219, 1.6953, 1.4453]
        + [1.5312, 0.6836, 0.7656, 0.8242, 1.2344, 1.0312, 1.7266, 0.9492],
    ),
}
# Of the 3D transforms, as the reference writes it: 1 / (2 * sqrt(2)) rounded, and trained weights depend on it.
HAAR_3D = 0.3536
ANCHOR = "encoder.down1.0.weight"  # one key that every original WF-VAE has and nothing else does
CONFIG_ANCHOR = "encoder_energy_flow_hidden_size"  # and one argument
_LEGACY_ANCHOR = "encoder.connect_l3.weight"
_BANDS_2D = ("aa", "ad", "da", "dd")
_BANDS_3D = ("h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v")


class _Names(dict[str, str]):
    """Original keys and ours, layer by layer."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.norm = ".norm" if config["norm_type"] == "layer_norm" else ""
        self.use_attention = config["use_attention"]

    def layer(self, original: str, ours: str) -> None:
        self.update({f"{original}.{name}": f"{ours}.{name}" for name in ("weight", "bias")})

    def resnet(self, original: str, ours: str, has_shortcut: bool = False, of_frames: bool = False) -> None:
        for i in (1, 2):
            self.layer(f"{original}.norm{i}{self.norm}", f"{ours}.norm{i}")
            self.layer(f"{original}.conv{i}" + ("" if of_frames else ".conv"), f"{ours}.conv{i}")
        if has_shortcut:
            self.layer(f"{original}.nin_shortcut.conv", f"{ours}.conv_shortcut")

    def mid(self, half: str, has_shortcuts: tuple[bool, bool]) -> None:
        attention = f"{half}.mid.1"
        if self.use_attention:
            self.layer(f"{attention}.norm{self.norm}", f"{attention}.norm")
            for original, ours in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out")):
                self.layer(f"{attention}.{original}.conv", f"{attention}.{ours}")
        for i, has_shortcut in zip((0, 2 if self.use_attention else 1), has_shortcuts, strict=True):
            self.resnet(f"{half}.mid.{i}", f"{half}.mid.{i}", has_shortcut)


def key_map(config: dict[str, Any]) -> dict[str, str]:
    """Map every original key of a configuration to ours."""
    names = _Names(config)
    width, is_8x = config["base_channels"], config["temporal_compression_ratio"] == 8

    for level, original in enumerate(("encoder.down1", "encoder.down2")):
        ours, num_layers = f"encoder.levels.{level}", config["num_encoder_layers"]
        is_temporal = level == 1 or is_8x
        names.layer(f"{original}.0", f"{ours}.conv_in")
        for i in range(num_layers):
            names.resnet(f"{original}.{i + 1}", f"{ours}.resnets.{i}", of_frames=level == 0)
        names.layer(f"{original}.{num_layers + 1}.conv" + (".conv" if is_temporal else ""), f"{ours}.downsample.conv")
        names.layer(f"encoder.connect_l{level + 1}", f"{ours}.flow")
    names.mid("encoder", (2 * width + config["encoder_flow_channels"] != 4 * width, False))
    names.layer(f"encoder.norm_out{names.norm}", "encoder.norm_out")
    names.layer("encoder.conv_out.conv", "encoder.conv_out")

    names.layer("decoder.conv_in.conv", "decoder.conv_in")
    names.mid("decoder", (False, True))
    for level, original in enumerate(("decoder.up2", "decoder.up1")):
        ours, num_layers = f"decoder.levels.{level}", config["num_decoder_layers"]
        is_temporal = level == 0 or is_8x
        for i in range(num_layers):
            names.resnet(f"{original}.{i}", f"{ours}.resnets.{i}", has_shortcut=level == 1 and i == 0)
        names.layer(f"{original}.{num_layers}.conv" + (".conv" if is_temporal else ""), f"{ours}.upsample.conv")
        names.resnet(f"{original}.{num_layers + 1}", f"{ours}.resnet_out", has_shortcut=level == 0)
    for level, original in enumerate(("decoder.connect_l2", "decoder.connect_l1")):
        for i in range(config["num_flow_layers"]):
            names.resnet(f"{original}.{i}", f"decoder.flows.{level}.resnets.{i}")
        names.layer(f"{original}.{config['num_flow_layers']}", f"decoder.flows.{level}.conv_out")
    for i in range(2):
        names.resnet(f"decoder.layer.{i}", f"decoder.resnets_out.{i}", has_shortcut=i == 0)
    names.layer(f"decoder.norm_out{names.norm}", "decoder.norm_out")
    names.layer("decoder.conv_out", "decoder.conv_out")
    return names


def wavelet_constants(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the constants that original files hold, by their keys."""
    import torch

    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # sum and difference; in 2D the vertical difference comes first
    bands_2d = 0.5 * torch.einsum("ah,bw->bahw", signs, signs).reshape(4, 1, 1, 2, 2)
    bands_3d = HAAR_3D * torch.einsum("at,bh,cw->abcthw", signs, signs, signs).reshape(8, 1, 1, 2, 2, 2)
    constants = {}
    for stage in ("in", "l1", "l2", "out"):
        of_space = stage == "l1" and config["temporal_compression_ratio"] == 4
        names, bands = (_BANDS_2D, bands_2d) if of_space else (_BANDS_3D, bands_3d)
        for name, band in zip(names, bands, strict=True):
            if stage != "out":
                suffix = "" if of_space else "_conv.conv.weight"
                constants[f"encoder.wavelet_transform_{stage}.{name}{suffix}"] = band
            if stage != "in":
                constants[f"decoder.inverse_wavelet_transform_{stage}.{name}"] = band
    return constants


def from_original(state_dict: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Rename original keys to ours; every key must be known. Tensors are passed on, at most with another shape."""
    import torch

    names, constants = key_map(config), wavelet_constants(config)
    converted = {}
    for key, tensor in _from_legacy(state_dict).items():
        if key in constants:
            if not torch.allclose(tensor.float(), constants[key], atol=1e-2):  # half precision is no reason
                raise ValueError(f"`state_dict` must hold Haar wavelets, got something else in {key!r}.")
        elif key not in names:
            raise ValueError(f"`state_dict` must hold WF-VAE keys only, got {key!r}.")
        else:
            # The linear maps of the attention are 1x1x1 convolutions there.
            is_linear = ".mid.1.to_" in names[key] and tensor.ndim == 5
            converted[names[key]] = tensor.flatten(1) if is_linear else tensor
    return converted


def to_original(state_dict: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Rename our keys to the original ones, and add the wavelets' constants; inverse of [`from_original`]."""
    names = {ours: original for original, ours in key_map(config).items()}
    original = {}
    for key, tensor in state_dict.items():
        is_linear = ".mid.1.to_" in key and tensor.ndim == 2
        original[names[key]] = tensor[:, :, None, None, None] if is_linear else tensor
    dtype = next(iter(original.values())).dtype
    # Copies, for files of safetensors keep no two tensors of one memory.
    return original | {key: constant.to(dtype, copy=True) for key, constant in wavelet_constants(config).items()}


def _from_legacy(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the keys of Open-Sora-Plan v1.3 to the present ones."""
    if _LEGACY_ANCHOR not in state_dict:
        return state_dict
    renamed = {}
    for key, tensor in state_dict.items():
        key = re.sub(r"\.connect_l(\d)", lambda match: f".connect_l{int(match[1]) - 1}", key)
        key = re.sub(r"wavelet_tranform_(\d)d", lambda match: f"wavelet_transform_l{int(match[1]) - 1}", key)
        renamed[key] = tensor
    return renamed


def config_from_original(args: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Derive our config from an original checkpoint: sizes from its tensors, checked against its `args`.

    Args:
        args: Constructor arguments, original names; may be empty and may hold others.
        state_dict: Weights under original keys.
    """
    state_dict = _from_legacy(state_dict)
    num_encoder_layers = count_matches(state_dict, r"encoder\.down1\.(\d+)\.norm1\..*")
    num_flow_layers = count_matches(state_dict, r"decoder\.connect_l1\.(\d+)\.norm1\..*")
    is_8x = f"encoder.down1.{num_encoder_layers + 1}.conv.conv.weight" in state_dict
    config: dict[str, Any] = {
        "latent_channels": state_dict["decoder.conv_in.conv.weight"].shape[1],
        "base_channels": state_dict[ANCHOR].shape[0],
        "encoder_flow_channels": state_dict["encoder.connect_l1.weight"].shape[0],
        "decoder_flow_channels": state_dict[f"decoder.connect_l1.{num_flow_layers}.weight"].shape[1],
        "num_encoder_layers": num_encoder_layers,
        # Beside the layers of the level there is the residual block after the upsampling.
        "num_decoder_layers": count_matches(state_dict, r"decoder\.up1\.(\d+)\.norm1\..*") - 1,
        "num_flow_layers": num_flow_layers,
        "use_attention": any(key.startswith("encoder.mid.1.q.") for key in state_dict),
        "norm_type": "layer_norm" if "encoder.norm_out.norm.weight" in state_dict else "group_norm",
        "temporal_compression_ratio": 8 if is_8x else 4,
    }
    for original, ours in CONFIG_MAP.items():
        value = args.get(original)
        value = _VALUES.get(value, value) if isinstance(value, str) else value
        if value is not None and config.setdefault(ours, value) != value:
            raise ValueError(
                f"`args` of the checkpoint says {original} = {args[original]}, its tensors {config[ours]}."
            )
    for original, legal in _LAYERS.items():
        if original in args and args[original] != legal[is_8x]:
            raise ValueError(f"`{original}` must be {legal[is_8x]!r} for these weights, got {args[original]!r}.")
    channels = config["latent_channels"]
    means, factors = _STATISTICS.get((channels, config["base_channels"]), (None, None))
    # Lists of another length, which the examples carry, mean "unknown".
    if len(args.get("shift") or []) == len(args.get("scale") or []) == channels:
        means, factors = args["shift"], args["scale"]
    if means is not None and factors is not None:
        try:
            config |= {"latents_mean": list(means), "latents_std": [1 / factor for factor in factors]}
        except (TypeError, ZeroDivisionError):
            raise ValueError(f"`scale` of the checkpoint must hold numbers other than 0, got {factors}.") from None
    return config


def select_network(
    path: Path, args: dict[str, Any], tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config of an `AutoencoderKLWFVAE` and its weights, see [`checkpoints.select_network`]."""
    return checkpoints.select_network(path, args, tensors, NAME, ANCHOR, CONFIG_ANCHOR, config_from_original)


def read_original_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a training file, a bare state dict or a safetensors file of the original WF-VAE.

    EMA weights are preferred where a file has both. Arguments, such as the interpolation, which no tensor shows, come
    from the file, or from the `config.json` next to it. Pickles are opened with `weights_only=True`.

    Returns:
        Config and state dict of an `AutoencoderKLWFVAE`.

    Raises:
        ValueError: If the file is no such checkpoint, or a pickle with anything but tensors and plain values inside.
    """
    config, tensors = select_network(Path(path), *read_tensors(Path(path), NAME))
    return config, from_original(tensors, config)


def write_original_checkpoint(path: str | Path, config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> None:
    """Write an `AutoencoderKLWFVAE` as a bare state dict in the original layout, wavelets included.

    Args:
        path: A safetensors file, with the constructor's arguments as metadata, if it ends so, else a torch file.
        config: Of the model.
        state_dict: Of the model.

    Raises:
        ValueError: If the model is an ablation, which the original has no layout for.
    """
    if config["num_wavelet_levels"] != 3:
        raise ValueError(f"`num_wavelet_levels` must be 3 in the original layout, got {config['num_wavelet_levels']}.")
    names = {ours: original for original, ours in _VALUES.items()}
    args = {original: names.get(config[ours], config[ours]) for original, ours in CONFIG_MAP.items()}
    args |= {original: legal[config["temporal_compression_ratio"] == 8] for original, legal in _LAYERS.items()}
    if config["latents_mean"] is not None and config["latents_std"] is not None:
        args |= {"shift": list(config["latents_mean"]), "scale": [1 / std for std in config["latents_std"]]}
    write_tensors(path, args, to_original(state_dict, config))

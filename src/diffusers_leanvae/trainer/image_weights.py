"""Start an IV-VAE from an autoencoder of images: on a video that stands still it does what that one does.

Keyframe-based temporal compression (arXiv 2411.06449) starts both branches from an image autoencoder of half the
latent channels, so that the latents of the keyframe branch alone hold a whole image. For comparison, both branches can
start from one of all latent channels, which the two then share: the usual inflation. The paper does not tell how the
branches start to see each other. Here they do not: what a branch reads of the other has weights of zero, which get a
gradient from the first step on.

In time, kernels have the image's in the tap of the present frame; the motion branch halves time by averaging two
frames, and doubles it by repeating one.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoModel
from torch import nn

from ..models.autoencoder_kl_ivvae import (
    AutoencoderKLIVVAE,
    BranchAttention,
    BranchConv3d,
    CausalConv3d,
    GroupCausalConv3d,
    IVVAEAttention,
    IVVAEDownsample,
    IVVAEResnetBlock,
    IVVAEUpsample,
    PyramidConv2d,
)


# Config values that both models must have alike, so that their layers correspond.
_SIZES = ("base_channels", "channel_multipliers", "num_layers", "use_pyramid", "attention")


def load_image_vae(path: str | Path, subfolder: str | None = None) -> AutoencoderKL | AutoencoderKLIVVAE:
    """Load an image autoencoder: an `AutoencoderKL` of diffusers, or an IV-VAE without keyframe branch.

    Args:
        path: Folder or Hub repository of the model or of its pipeline.
        subfolder: Where the model is in there.
    """
    try:
        model: Any = AutoModel.from_pretrained(str(path), subfolder=subfolder, torch_dtype=torch.float32)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"`image_vae.path` must be a saved model, got {str(path)!r}: {reason}") from None
    if not isinstance(model, AutoencoderKL | AutoencoderKLIVVAE):
        raise ValueError(
            f"`image_vae.path` must be an AutoencoderKL or an AutoencoderKLIVVAE without keyframe branch, got "
            f"{str(path)!r}, an {type(model).__name__}."
        )
    return model


@torch.no_grad()
def initialize_from_image_vae(vae: AutoencoderKLIVVAE, image_vae: AutoencoderKL | AutoencoderKLIVVAE) -> None:
    """Set the weights of `vae` in place from those of an image autoencoder.

    From an IV-VAE without keyframe branch, trained on single frames, this is exact: a video that stands still is
    reconstructed as the image is. An `AutoencoderKL` has other norms, and other widths behind its upsampling, which
    are projected; its function is not kept, only its filters, so that the first steps have to mend it.

    Args:
        vae: A freshly made model.
        image_vae: With the same widths. With half of the latent channels of `vae`: keyframe-based temporal
            compression; with all of them: inflation, and the only choice for a `vae` without keyframe branch.

    Raises:
        ValueError: If the two do not fit.
    """
    has_keyframes = vae.config["use_keyframe_branch"]
    wanted = [vae.latent_channels // 2, vae.latent_channels] if has_keyframes else [vae.latent_channels]
    latent_channels = image_vae.config["latent_channels"]
    if latent_channels not in wanted:
        raise ValueError(
            f"`image_vae` must have {' or '.join(map(str, wanted))} latent channels for this model, got "
            f"{latent_channels}."
        )
    if isinstance(image_vae, AutoencoderKL):
        image_vae = _from_autoencoder_kl(image_vae, vae)
    if image_vae.config["use_keyframe_branch"]:
        raise ValueError("`image_vae` must be an AutoencoderKLIVVAE with `use_keyframe_branch` false, got true.")
    for name in _SIZES:
        ours, theirs = (_plain(model.config[name]) for model in (vae, image_vae))
        if ours != theirs:
            raise ValueError(f"`image_vae` must have the `{name}` of the model, {ours}, got {theirs}.")
    is_split = latent_channels < vae.latent_channels or not has_keyframes
    for (name, ours), theirs in zip(_layers(vae), (layer for _, layer in _layers(image_vae)), strict=True):
        _copy_layer(ours, theirs, name, is_split)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _layers(vae: AutoencoderKLIVVAE) -> list[tuple[str, nn.Module]]:
    """The layers with weights, a pair of branches as one; models of the same sizes have them in the same order."""
    whole = (BranchConv3d, IVVAEAttention, IVVAEDownsample, IVVAEUpsample, PyramidConv2d)
    found: list[tuple[str, nn.Module]] = []

    def visit(name: str, module: nn.Module) -> None:
        if isinstance(module, whole) or next(module.children(), None) is None:
            found.append((name, module))
            return
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}".lstrip("."), child)

    visit("", vae)
    return [(name, layer) for name, layer in found if next(layer.parameters(), None) is not None]


# ---- one layer ------------------------------------------------------------------------------------------------------


def _copy_layer(ours: Any, theirs: Any, name: str, is_split: bool) -> None:
    """Set a layer from that of the image model; with `is_split` each branch has the latents of a whole image."""
    if isinstance(ours, IVVAEAttention):
        _copy_branches((ours.attention_2d, ours.attention_3d), theirs.attention_3d)
    elif isinstance(ours, IVVAEDownsample | IVVAEUpsample):
        _copy_branches((ours.conv_2d, ours.conv_3d), theirs.conv_3d)
        if ours.time_conv is not None:
            _set_time_conv(ours.time_conv)
    elif isinstance(ours, PyramidConv2d):
        _copy_pyramid(ours, theirs, is_split)
    elif isinstance(ours, BranchConv3d):
        _copy_branch_conv(ours, theirs, name, is_split)
    elif isinstance(ours, nn.Conv2d) and not is_split and name == "decoder.conv_in":  # both branches read all latents
        ours.weight.copy_(torch.cat((theirs.weight, theirs.weight)))
        ours.bias.copy_(torch.cat((theirs.bias, theirs.bias)))  # type: ignore[union-attr]
    elif isinstance(ours, nn.Conv2d):
        _copy_frame_conv(ours, theirs, is_split or name != "encoder.conv_out")
    else:  # a norm
        ours.weight.copy_(theirs.weight.repeat(len(ours.weight) // len(theirs.weight)))


def _copy_branches(branches: tuple[nn.Module | None, nn.Module], source: nn.Module) -> None:
    for branch in branches:
        if branch is not None:
            branch.load_state_dict(source.state_dict())


def _copy_pyramid(ours: PyramidConv2d, theirs: PyramidConv2d, is_split: bool) -> None:
    for key, conv in ours.convs.items():
        _copy_frame_conv(conv, theirs.convs[key], is_split)
    if is_split:
        _copy_frame_conv(ours.merge, theirs.merge, is_split)
        return
    # Here the two halves of every dilation are apart.
    order = torch.arange(theirs.merge.in_channels).view(len(ours.convs), 2, -1).transpose(0, 1).flatten()
    ours.merge.weight.copy_(theirs.merge.weight[:, order])
    ours.merge.bias.copy_(theirs.merge.bias)  # type: ignore[arg-type]


def _copy_branch_conv(ours: BranchConv3d, theirs: Any, name: str, is_split: bool) -> None:
    kernel, bias = _image_kernel(theirs.conv_3d), theirs.conv_3d.bias
    first = second = torch.arange(len(bias))
    if not is_split and name == "encoder.quant_conv":  # rows are means, then log-variances, of all channels
        first, second = torch.arange(len(bias)).view(2, 2, -1).transpose(0, 1).flatten(1)
    elif not is_split and name == "decoder.post_quant_conv":
        first, second = torch.arange(len(bias)).view(2, -1)
    if ours.conv_2d is not None:
        _place(ours.conv_2d, kernel[first], bias[first], branch=0)
    _place(ours.conv_3d, kernel[second], bias[second], branch=1)


def _copy_frame_conv(ours: Any, theirs: Any, is_split: bool) -> None:
    """Each branch gets the weights for its own inputs; if not `is_split`, it gets its half of the outputs only."""
    num_branches = ours.in_channels // theirs.in_channels
    parts = [theirs.weight] * num_branches if is_split else list(theirs.weight.chunk(num_branches))
    ours.weight.zero_()
    row = column = 0
    for part in parts:
        ours.weight[row : row + part.shape[0], column : column + part.shape[1]] = part
        row, column = row + part.shape[0], column + part.shape[1]
    ours.bias.copy_(theirs.bias.repeat(num_branches if is_split else 1))


def _place(conv: Any, kernel: torch.Tensor, bias: torch.Tensor, branch: int) -> None:
    """Set a convolution of one branch by the kernel `(out, in, k, k)` of an image, for the inputs of that branch."""
    conv.weight.zero_()
    weight = conv.weight
    if weight.ndim == 5:
        weight = weight[:, :, {GroupCausalConv3d: 1, CausalConv3d: 2}.get(type(conv), 0)]
    start = branch * kernel.shape[1] if weight.shape[1] == 2 * kernel.shape[1] else 0  # pixels are of both branches
    weight[:, start : start + kernel.shape[1]] = kernel
    conv.bias.copy_(bias)


def _image_kernel(conv: Any) -> torch.Tensor:
    """The kernel `(out, in, k, k)` that a convolution of the motion branch amounts to for an image, its own past."""
    if isinstance(conv, GroupCausalConv3d):
        return conv.weight[:, :, :2].sum(dim=2)  # behind the frame there are zeros
    return conv.weight.sum(dim=2)


def _set_time_conv(conv: nn.Conv3d) -> None:
    """Average the two frames of a kernel, or repeat one: the rows of the two are one after the other."""
    dim = conv.in_channels
    identity = torch.eye(dim).view(dim, dim, 1, 1, 1)
    is_up = conv.out_channels == 2 * dim
    conv.weight.copy_(torch.cat((identity, identity)) if is_up else (identity / 2).expand_as(conv.weight))
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]


# ---- from diffusers -------------------------------------------------------------------------------------------------


def _from_autoencoder_kl(source: AutoencoderKL, vae: AutoencoderKLIVVAE) -> AutoencoderKLIVVAE:
    """The IV-VAE without keyframe branch that is nearest to an `AutoencoderKL`, in the layout of `vae`."""
    config = vae.config
    dims = [config["base_channels"] * multiplier for multiplier in config["channel_multipliers"]]
    sizes = (list(source.config["block_out_channels"]), source.config["layers_per_block"])
    if sizes != (dims, config["num_layers"]):
        raise ValueError(
            f"`image_vae` must have block_out_channels {dims} and layers_per_block {config['num_layers']} for this "
            f"model, got {sizes[0]} and {sizes[1]}."
        )
    image = AutoencoderKLIVVAE(
        latent_channels=source.config["latent_channels"],
        use_keyframe_branch=False,
        convolution=config["convolution"],
        **{name: config[name] for name in _SIZES},
    )
    encoder, decoder = source.encoder, source.decoder
    _copy_conv(image.encoder.conv_in, encoder.conv_in)
    _copy_blocks(image.encoder.blocks, encoder.down_blocks)
    _copy_mid(image.encoder.mid, encoder.mid_block)
    _copy_norm(image.encoder.norm_out, encoder.conv_norm_out)
    conv_out: Any = image.encoder.conv_out
    if isinstance(conv_out, PyramidConv2d):  # of the pyramid, the 3x3 convolution without dilation alone is merged
        _copy_conv(conv_out.convs["1"], encoder.conv_out)
        dim = 2 * image.latent_channels
        start = dim * list(conv_out.convs).index("1")
        nn.init.zeros_(conv_out.merge.weight)
        conv_out.merge.weight[:, start : start + dim, 0, 0] = torch.eye(dim)
        nn.init.zeros_(conv_out.merge.bias)  # type: ignore[arg-type]
    else:
        _copy_conv(conv_out, encoder.conv_out)
    dim = image.latent_channels
    _copy_conv(image.encoder.quant_conv, source.quant_conv or _identity_conv(2 * dim))
    _copy_conv(image.decoder.post_quant_conv, source.post_quant_conv or _identity_conv(dim))
    _copy_conv(image.decoder.conv_in, decoder.conv_in)
    _copy_mid(image.decoder.mid, decoder.mid_block)
    _copy_blocks(image.decoder.blocks, decoder.up_blocks)
    _copy_norm(image.decoder.norm_out, decoder.conv_norm_out)
    _copy_conv(image.decoder.conv_out, decoder.conv_out)
    return image


def _copy_blocks(ours: Any, theirs: Any) -> None:
    """Set the blocks of all levels; attention that only we have starts as nothing."""
    resnets = [resnet for level in theirs for resnet in level.resnets]
    resamples = [
        layer
        for level in theirs
        for layer in (getattr(level, "downsamplers", None) or getattr(level, "upsamplers", None) or [])
    ]
    upsample = None
    for block in ours:
        if isinstance(block, IVVAEResnetBlock):
            source = resnets.pop(0)
            if upsample is None:
                _copy_resnet(block, source)
            else:
                _copy_resnet_behind(upsample[0], block, upsample[1], source)
            upsample = None
        elif isinstance(block, IVVAEDownsample):
            _copy_conv(block.conv_3d, resamples.pop(0).conv)
        elif isinstance(block, IVVAEUpsample):
            upsample = block, resamples.pop(0).conv
        else:
            nn.init.zeros_(block.attention_3d.to_out.weight)
            nn.init.zeros_(block.attention_3d.to_out.bias)
        if isinstance(block, IVVAEDownsample | IVVAEUpsample) and block.time_conv is not None:
            _set_time_conv(block.time_conv)


def _copy_resnet(ours: Any, theirs: Any) -> None:
    _copy_norm(ours.norm1, theirs.norm1)
    _copy_conv(ours.conv1, theirs.conv1)
    _copy_norm(ours.norm2, theirs.norm2)
    _copy_conv(ours.conv2, theirs.conv2)
    if ours.conv_shortcut is not None:
        _copy_conv(ours.conv_shortcut, theirs.conv_shortcut)


def _copy_resnet_behind(our_upsample: Any, ours: Any, conv: nn.Conv2d, theirs: Any) -> None:
    """Set an upsampling that halves the channels, and the block behind it, from those that keep all channels.

    The channels are projected to half of them: by the shortcut of the block where ours has none, so that the shortcut
    is exact, and else to the directions in which the weights of the upsampling are largest.
    """
    shortcut = theirs.conv_shortcut
    if shortcut is not None:
        matrix, offset = shortcut.weight[:, :, 0, 0], shortcut.bias
    else:
        matrix, offset = torch.eye(conv.out_channels), torch.zeros(conv.out_channels)
    if ours.conv_shortcut is None:
        project, back = matrix, torch.linalg.pinv(matrix)
    else:
        left = torch.linalg.svd(conv.weight.flatten(1), full_matrices=False)[0][:, : conv.out_channels // 2]
        project, back = left.t(), left
        _copy_weights(ours.conv_shortcut, (matrix @ back)[:, :, None, None], offset)
        offset = torch.zeros(())
    weight = torch.einsum("ij,jkhw->ikhw", project, conv.weight)
    _copy_weights(our_upsample.conv_3d, weight, project @ conv.bias + offset)  # type: ignore[operator]
    nn.init.constant_(ours.norm1.weight, theirs.norm1.weight.mean().item())  # of directions no channel is
    _copy_weights(ours.conv1, torch.einsum("okhw,kj->ojhw", theirs.conv1.weight, back), theirs.conv1.bias)
    _copy_norm(ours.norm2, theirs.norm2)
    _copy_conv(ours.conv2, theirs.conv2)


def _copy_mid(ours: Any, theirs: Any) -> None:
    blocks = list(ours)
    _copy_resnet(blocks[0], theirs.resnets[0])
    _copy_resnet(blocks[-1], theirs.resnets[1])
    if len(blocks) == 3:
        attention: BranchAttention = blocks[1].attention_3d
        source = theirs.attentions[0]
        _copy_norm(attention.norm, source.group_norm)
        layers = (source.to_q, source.to_k, source.to_v)
        attention.to_qkv.weight.copy_(torch.cat([layer.weight for layer in layers])[:, :, None, None])
        attention.to_qkv.bias.copy_(torch.cat([layer.bias for layer in layers]))  # type: ignore[union-attr]
        attention.to_out.weight.copy_(source.to_out[0].weight[:, :, None, None])
        attention.to_out.bias.copy_(source.to_out[0].bias)  # type: ignore[union-attr]


def _copy_norm(ours: Any, theirs: Any) -> None:
    ours.weight.copy_(theirs.weight)


def _copy_conv(ours: Any, theirs: Any) -> None:
    _copy_weights(ours, theirs.weight, theirs.bias)


def _copy_weights(ours: Any, kernel: torch.Tensor, bias: torch.Tensor) -> None:
    if isinstance(ours, BranchConv3d):
        _place(ours.conv_3d, kernel, bias, branch=0)
    else:
        ours.weight.copy_(kernel)
        ours.bias.copy_(bias)


def _identity_conv(dim: int) -> nn.Conv2d:
    conv = nn.Conv2d(dim, dim, 1)
    nn.init.dirac_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv

"""IV-VAE: a video autoencoder with a keyframe and a motion branch and group causal convolutions (arXiv 2411.06449).

Read in the order of use: layers -> encoder -> decoder -> `AutoencoderKLIVVAE`; the public methods that all video
autoencoders share (`encode`, `decode`, `forward`) are in `video_autoencoder.py`.

Every feature map `(B, 2w, T, H, W)` has two halves of `w` channels: the first is the keyframe (2D) branch, the second
the motion (3D) branch. In time there is the first frame, then groups of four frames, of which two and one are left at
the smaller sizes. Convolutions look both ways within a group, and back to the last frame of the group before.

The ablations of the paper are config values: without the keyframe branch every feature map is the motion branch's
alone, and `(B, w, T, H, W)`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..checks import check_choice, is_integer
from ..conversion import ivvae
from .temporal_cache import WHOLE, Chunk
from .video_autoencoder import Part, VideoAutoencoder
from .video_config import check_sizes, check_statistics, check_switches
from .video_layers import FrameConv2d, LayerChain, attend_within_frames, convolve


def split_first(x: torch.Tensor, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """The first frame of the video, or no frame, and the groups."""
    return x.tensor_split((int(chunk.is_first),), dim=2)  # type: ignore[return-value]


# ---- layers ---------------------------------------------------------------------------------------------------------


class GroupCausalConv3d(nn.Conv3d):
    """A 3x3x3 convolution that sees the frames of a group and the last one before it.

    Beyond the last frame of a group there are zeros; the first frame of the video is a group that follows itself.

    Attributes:
        name: Of what it remembers; the model sets it.
    """

    name = ""

    def __init__(self, in_dim: int, out_dim: int, group_size: int):
        super().__init__(in_dim, out_dim, 3, padding=(0, 1, 1))
        self.group_size = group_size

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        before = chunk.recall(self.name, x)
        before = x[:, :, :1] if before is None else before
        chunk.remember(self.name, x[:, :, -1:])
        first, groups = split_first(x, chunk)
        parts = [self._convolve(first, before, 1)] if first.shape[2] else []
        before = first if first.shape[2] else before
        if groups.shape[2]:
            parts.append(self._convolve(groups, before, self.group_size))
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

    def _convolve(self, x: torch.Tensor, before: torch.Tensor, group_size: int) -> torch.Tensor:
        groups = x.unflatten(2, (-1, group_size))  # (B, c, groups, frames, H, W)
        last = torch.cat((before, groups[:, :, :-1, -1]), dim=2).unsqueeze(3)  # of the group before each
        windows = torch.cat((last, groups, torch.zeros_like(last)), dim=3).transpose(1, 2).flatten(0, 1)
        windows = convolve(windows, self.weight, self.bias, self.stride, self.padding, self.dilation)  # type: ignore[arg-type]
        return windows.unflatten(0, groups.shape[:3:2]).transpose(1, 2).flatten(2, 3)


class CausalConv3d(nn.Conv3d):
    """A 3x3x3 convolution that sees the two frames before, be they of the group or not: an ablation.

    Before the first frame of the video that frame repeats.

    Attributes:
        name: Of what it remembers; the model sets it.
    """

    name = ""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, 3, padding=(0, 1, 1))

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        before = chunk.recall(self.name, x)
        x = torch.cat((x[:, :, :1].expand(-1, -1, 2, -1, -1) if before is None else before, x), dim=2)
        chunk.remember(self.name, x[:, :, -2:])
        return convolve(x, self.weight, self.bias, self.stride, self.padding, self.dilation)  # type: ignore[arg-type]


class PlainConv3d(nn.Conv3d):
    """A convolution that needs nothing of the frames around a group."""

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        return convolve(x, self.weight, self.bias, self.stride, self.padding, self.dilation)  # type: ignore[arg-type]


class Design(NamedTuple):
    """What all parts of a model share: which branches there are, and what they are made of."""

    has_keyframes: bool
    is_group_causal: bool
    attention: str
    use_pyramid: bool
    dropout: float

    @property
    def num_branches(self) -> int:
        return 1 + self.has_keyframes

    def branch_conv(self, in_channels: int, out_dim: int, kernel_size: int, group_size: int = 1) -> "BranchConv3d":
        return BranchConv3d(in_channels, out_dim, kernel_size, group_size, self)

    def frame_conv(self, in_dim: int, out_dim: int, kernel_size: int) -> FrameConv2d:
        dims = self.num_branches * in_dim, self.num_branches * out_dim
        return FrameConv2d(*dims, kernel_size, padding=kernel_size // 2)

    def resnet(self, in_dim: int, out_dim: int, group_size: int) -> "IVVAEResnetBlock":
        return IVVAEResnetBlock(in_dim, out_dim, group_size, self)

    def attentions(self, dim: int, is_mid: bool = False) -> list[nn.Module]:
        """One layer of attention, or none where the model has none."""
        return [IVVAEAttention(dim, self)] if self.attention == "all" or (is_mid and self.attention == "mid") else []


class BranchConv3d(nn.Module):
    """Both branches from both: a 2D convolution of every frame and a group causal one."""

    def __init__(self, in_channels: int, out_dim: int, kernel_size: int, group_size: int, design: Design):
        super().__init__()
        padding = kernel_size // 2
        self.conv_2d = (
            FrameConv2d(in_channels, out_dim, kernel_size, padding=padding) if design.has_keyframes else None
        )
        if kernel_size == 1:
            self.conv_3d: nn.Module = PlainConv3d(in_channels, out_dim, 1)
        elif design.is_group_causal:
            self.conv_3d = GroupCausalConv3d(in_channels, out_dim, group_size)
        else:
            self.conv_3d = CausalConv3d(in_channels, out_dim)

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        if self.conv_2d is None:
            return self.conv_3d(x, chunk)
        return torch.cat((self.conv_2d(x), self.conv_3d(x, chunk)), dim=1)


class BranchRMSNorm(nn.Module):
    """RMS norm over the channels of each branch."""

    def __init__(self, dim: int, num_branches: int):
        super().__init__()
        self.num_branches = num_branches
        self.weight = nn.Parameter(torch.ones(num_branches * dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = x.unflatten(1, (self.num_branches, -1))
        weight = self.weight.view(self.num_branches, -1, 1, 1, 1)
        return (branches * self._inverse_rms(branches) * weight).flatten(1, 2)

    def _inverse_rms(self, branches: torch.Tensor) -> torch.Tensor:
        """One over the root of the mean square; the norm is at least 1e-12."""
        num_channels = branches.shape[2]
        if branches.dtype in (torch.float32, torch.float64):  # on a CPU PyTorch's norm over channels is slow
            square = branches.square().sum(dim=2, keepdim=True).clamp_min(1e-24)
            return square.rsqrt() * num_channels**0.5
        norm = torch.linalg.vector_norm(branches, dim=2, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
        return (num_channels**0.5 / norm).to(branches.dtype)  # squares would not fit into 16 bits


class IVVAEResnetBlock(nn.Module):
    """Two norms, activations and convolutions with a residual; with `group_size` 1 every frame by itself."""

    def __init__(self, in_dim: int, out_dim: int, group_size: int, design: Design):
        super().__init__()

        def conv(in_dim: int, kernel_size: int) -> nn.Module:
            if group_size > 1:
                return design.branch_conv(design.num_branches * in_dim, out_dim, kernel_size, group_size)
            return design.frame_conv(in_dim, out_dim, kernel_size)

        self.norm1 = BranchRMSNorm(in_dim, design.num_branches)
        self.conv1 = conv(in_dim, 3)
        self.norm2 = BranchRMSNorm(out_dim, design.num_branches)
        self.dropout = nn.Dropout(design.dropout)
        self.conv2 = conv(out_dim, 3)
        self.conv_shortcut = conv(in_dim, 1) if in_dim != out_dim else None

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)), chunk)
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))), chunk)
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x, chunk))


class BranchAttention(nn.Module):
    """Self-attention with one head over the positions of each frame, of one branch, with a residual."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = BranchRMSNorm(dim, num_branches=1)
        self.to_qkv = FrameConv2d(dim, 3 * dim, 1)
        self.to_out = FrameConv2d(dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Contiguous, or PyTorch would take the kernel whose memory is the square of `h * w`.
        tokens = self.to_qkv(self.norm(x)).permute(0, 2, 3, 4, 1).flatten(2, 3).contiguous()  # (B, T, h * w, 3w)
        attended = attend_within_frames(tokens.chunk(3, dim=-1), x.shape[3:])  # type: ignore[arg-type]
        return x + self.to_out(attended.permute(0, 4, 1, 2, 3))


class IVVAEAttention(nn.Module):
    """Attention of both branches, each by itself."""

    def __init__(self, dim: int, design: Design):
        super().__init__()
        self.attention_2d = BranchAttention(dim) if design.has_keyframes else None
        self.attention_3d = BranchAttention(dim)

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        if self.attention_2d is None:
            return self.attention_3d(x)
        keyframes, motion = x.chunk(2, dim=1)
        return torch.cat((self.attention_2d(keyframes), self.attention_3d(motion)), dim=1)


class IVVAEDownsample(nn.Module):
    """Half the height and width of both branches, and with time half the frames of every group."""

    def __init__(self, dim: int, is_temporal: bool, design: Design):
        super().__init__()
        self.conv_2d = FrameConv2d(dim, dim, 3, stride=2) if design.has_keyframes else None
        self.conv_3d = FrameConv2d(dim, dim, 3, stride=2)
        self.time_conv = PlainConv3d(dim, dim, (2, 1, 1), stride=(2, 1, 1)) if is_temporal else None

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        x = F.pad(x, (0, 1, 0, 1))  # zeros on the right and below only
        if self.conv_2d is None:
            return self._halve_motion(self.conv_3d(x), chunk)
        keyframes, motion = x.chunk(2, dim=1)
        keyframes, motion = self.conv_2d(keyframes), self.conv_3d(motion)
        if self.time_conv is not None:
            first, groups = split_first(keyframes, chunk)
            keyframes = torch.cat((first, groups[:, :, ::2]), dim=2)
        return torch.cat((keyframes, self._halve_motion(motion, chunk)), dim=1)

    def _halve_motion(self, motion: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        if self.time_conv is None:
            return motion
        first, groups = split_first(motion, chunk)
        return torch.cat((first, self.time_conv(groups)) if groups.shape[2] else (first,), dim=2)


class IVVAEUpsample(nn.Module):
    """With time twice the frames of every group; twice the height and width, and half the channels."""

    def __init__(self, dim: int, is_temporal: bool, design: Design):
        super().__init__()
        self.conv_2d = FrameConv2d(dim, dim // 2, 3, padding=1) if design.has_keyframes else None
        self.conv_3d = FrameConv2d(dim, dim // 2, 3, padding=1)
        self.time_conv = PlainConv3d(dim, 2 * dim, 1) if is_temporal else None

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        if self.conv_2d is None:
            return self.conv_3d(_twice_the_size(self._double_motion(x, chunk)))
        keyframes, motion = x.chunk(2, dim=1)
        if self.time_conv is not None:
            first, groups = split_first(keyframes, chunk)
            keyframes = torch.cat((first, groups.repeat_interleave(2, dim=2)), dim=2)
        motion = self._double_motion(motion, chunk)
        return torch.cat((self.conv_2d(_twice_the_size(keyframes)), self.conv_3d(_twice_the_size(motion))), dim=1)

    def _double_motion(self, motion: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        if self.time_conv is None:
            return motion
        first, groups = split_first(motion, chunk)
        if groups.shape[2]:  # channels become frames
            groups = self.time_conv(groups).unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return torch.cat((first, groups), dim=2)


def _twice_the_size(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)


class PyramidConv2d(nn.Module):
    """Convolutions of several dilations, merged: the last layer of the encoder."""

    DILATIONS = (0, 1, 3, 6, 9, 12)  # 0: a 1x1 convolution

    def __init__(self, in_dim: int, out_dim: int, num_branches: int):
        super().__init__()
        self.num_branches = num_branches
        in_dim, out_dim = num_branches * in_dim, num_branches * out_dim
        self.convs = nn.ModuleDict(
            {
                str(dilation): FrameConv2d(
                    in_dim, out_dim, 3 if dilation else 1, padding=dilation, dilation=max(dilation, 1)
                )
                for dilation in self.DILATIONS
            }
        )
        self.merge = FrameConv2d(len(self.DILATIONS) * out_dim, out_dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = zip(*(conv(x).chunk(self.num_branches, dim=1) for conv in self.convs.values()), strict=True)
        return self.merge(torch.cat([part for branch in branches for part in branch], dim=1))


def _mid_blocks(dim: int, design: Design) -> LayerChain:
    frame_resnets = [design.resnet(dim, dim, 1) for _ in range(2)]
    return LayerChain([frame_resnets[0], *design.attentions(dim, is_mid=True), frame_resnets[1]])


# ---- encoder and decoder --------------------------------------------------------------------------------------------


class IVVAEEncoder(nn.Module):
    """Three levels that halve the size, of which two halve the groups; a fourth of single frames with attention."""

    def __init__(self, latent_dim: int, dims: list[int], num_layers: int, design: Design):
        super().__init__()
        self.num_branches = design.num_branches
        self.conv_in = design.branch_conv(3, dims[0], 3, group_size=4)
        blocks: list[nn.Module] = []
        for level, (in_dim, dim) in enumerate(zip([dims[0], *dims[:2]], dims[:3], strict=True)):
            group_size = (4, 4, 2)[level]
            blocks += [design.resnet(in_dim if i == 0 else dim, dim, group_size) for i in range(num_layers)]
            blocks += [IVVAEDownsample(dim, level > 0, design)]
        self.num_local_blocks = len(blocks)
        blocks += design.attentions(dims[2])
        for i in range(num_layers):
            blocks += [design.resnet(dims[3 if i else 2], dims[3], 1), *design.attentions(dims[3])]
        self.blocks = LayerChain(blocks)
        self.mid = _mid_blocks(dims[3], design)
        self.norm_out = BranchRMSNorm(dims[3], design.num_branches)
        moments_dim = 2 * latent_dim // design.num_branches
        self.conv_out = (
            PyramidConv2d(dims[3], moments_dim, design.num_branches)
            if design.use_pyramid
            else design.frame_conv(dims[3], moments_dim, 3)
        )
        self.quant_conv = design.branch_conv(2 * latent_dim, moments_dim, 1)

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE, part: Part = "all") -> torch.Tensor:
        """Moments `(B, 2z, t, h, w)` of pixels; `(B, 2w, t, h, w)` lies between the parts."""
        hidden = x if part == "whole" else self._local(x, chunk)
        return hidden if part == "local" else self._whole(hidden, chunk)

    def _local(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        return self.blocks.run(self.conv_in(x, chunk), chunk, stop=self.num_local_blocks)

    def _whole(self, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        hidden = self.mid(self.blocks.run(hidden, chunk, start=self.num_local_blocks), chunk)
        moments = self.quant_conv(self.conv_out(F.silu(self.norm_out(hidden))), chunk)
        if self.num_branches == 1:
            return moments
        mean_2d, logvar_2d, mean_3d, logvar_3d = moments.chunk(4, dim=1)
        return torch.cat((mean_2d, mean_3d, logvar_2d, logvar_3d), dim=1)


class IVVAEDecoder(nn.Module):
    """The way back; each upsampling halves the channels before the next level's blocks."""

    def __init__(self, latent_dim: int, dims: list[int], num_layers: int, design: Design):
        super().__init__()
        self.num_branches = design.num_branches
        branch_dim = latent_dim // design.num_branches
        self.post_quant_conv = design.branch_conv(latent_dim, branch_dim, 1)
        self.conv_in = design.frame_conv(branch_dim, dims[3], 3)
        self.mid = _mid_blocks(dims[3], design)
        blocks: list[nn.Module] = []
        for _ in range(num_layers + 1):
            blocks += [design.resnet(dims[3], dims[3], 1), *design.attentions(dims[3])]
        self.num_whole_blocks = len(blocks)
        for level, (in_dim, dim) in enumerate(zip(dims[:0:-1], dims[2::-1], strict=True)):
            group_size = (2, 4, 4)[level]
            blocks += [IVVAEUpsample(in_dim, level < 2, design)]
            blocks += [design.resnet(dim if i else in_dim // 2, dim, group_size) for i in range(num_layers + 1)]
        self.blocks = LayerChain(blocks)
        self.norm_out = BranchRMSNorm(dims[0], design.num_branches)
        self.conv_out = design.branch_conv(design.num_branches * dims[0], 3, 3, group_size=4)

    def forward(self, z: torch.Tensor, chunk: Chunk = WHOLE, part: Part = "all") -> torch.Tensor:
        """Pixels `(B, 3, T, H, W)` of latents; `(B, 2w, t, h, w)` lies between the parts."""
        hidden = z if part == "local" else self._whole(z, chunk)
        return hidden if part == "whole" else self._local(hidden, chunk)

    def _whole(self, z: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        hidden = self.mid(self.conv_in(self.post_quant_conv(z, chunk)), chunk)
        return self.blocks.run(hidden, chunk, stop=self.num_whole_blocks)

    def _local(self, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        hidden = self.blocks.run(hidden, chunk, start=self.num_whole_blocks)
        pixels = self.conv_out(F.silu(self.norm_out(hidden)), chunk)
        if self.num_branches == 1:
            return pixels
        keyframes, motion = pixels.chunk(2, dim=1)
        # The first frame of every group is the keyframe branch's, the others are the motion branch's.
        index = torch.arange(keyframes.shape[2], device=keyframes.device) - int(chunk.is_first)
        is_keyframe = (index < 0) | (index % 4 == 0)
        return torch.where(is_keyframe.view(-1, 1, 1), keyframes, motion)


# ---- the autoencoder ------------------------------------------------------------------------------------------------


class AutoencoderKLIVVAE(VideoAutoencoder):
    """IV-VAE, a video autoencoder with KL posterior, a keyframe and a motion branch (arXiv 2411.06449).

    Pixels are in `[-1, 1]`, videos `(batch_size, 3, num_frames, height, width)` with `num_frames` = 4 * n + 1 and
    sizes that are multiples of 8. Latents are *not* normalised, unlike the original's: `(latents -
    config.latents_mean) * config.scaling_factor` are those.

    The defaults are those of the released model with 16 channels and width 64. The values of `convolution`,
    `use_keyframe_branch`, `use_pyramid` and `attention` that are not the defaults are ablations, as in the paper.

    Args:
        latent_channels: Channels of the latents, an even number: those of the keyframe branch, then of the motion one.
            Without the keyframe branch any number.
        base_channels: Width of each branch at full size.
        channel_multipliers: Widths of the four levels, relative to `base_channels`.
        num_layers: Residual blocks of each level of the encoder; the decoder has one more.
        dropout: In the residual blocks, while training.
        convolution: `"group_causal"`, or `"causal"`: the motion branch sees the frame and the two before it.
        use_keyframe_branch: Whether there is one; else the motion branch puts out all frames. On single frames such a
            model is an image autoencoder.
        use_pyramid: Whether the last layer of the encoder is a pyramid of dilations, and not one 3x3 convolution.
        attention: `"all"`; `"mid"`: between the residual blocks in the middle alone, as image autoencoders have it; or
            `"none"`.
        scaling_factor: Factor that pipelines apply to latents for diffusion.
        latents_mean: Mean of each latent channel, or `None`.
        latents_std: Standard deviation of each latent channel, or `None`.
    """

    _no_split_modules = ["IVVAEResnetBlock", "IVVAEAttention"]
    # `encode` and `decode` do not pass through the model's `forward`, so what they call must be offloaded by itself.
    _group_offload_block_modules = ["encoder", "decoder"]
    _repeated_blocks = ["IVVAEResnetBlock"]
    conversion = ivvae

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        base_channels: int = 64,
        channel_multipliers: tuple[int, int, int, int] = (1, 2, 4, 4),
        num_layers: int = 2,
        dropout: float = 0.0,
        convolution: str = "group_causal",
        use_keyframe_branch: bool = True,
        use_pyramid: bool = True,
        attention: str = "all",
        scaling_factor: float = 1.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ):
        super().__init__()
        check_choice("convolution", convolution, ("group_causal", "causal"))
        check_choice("attention", attention, ("all", "mid", "none"))
        check_sizes(latent_channels=latent_channels, base_channels=base_channels, num_layers=num_layers)
        check_switches(use_keyframe_branch=use_keyframe_branch, use_pyramid=use_pyramid)
        design = Design(use_keyframe_branch, convolution == "group_causal", attention, use_pyramid, dropout)
        if latent_channels % design.num_branches:
            raise ValueError(f"`latent_channels` must be a positive even number, got {latent_channels}.")
        if len(channel_multipliers) != 4 or not all(
            is_integer(factor) and factor > 0 for factor in channel_multipliers
        ):
            raise ValueError(f"`channel_multipliers` must be four positive integers, got {channel_multipliers}.")
        dims = [base_channels * multiplier for multiplier in channel_multipliers]
        if any(dim % 2 for dim in dims[1:]):
            raise ValueError(
                f"`base_channels` must make even widths of all levels but the first (upsampling halves them), got "
                f"{base_channels}."
            )
        check_statistics(latent_channels, latents_mean, latents_std, scaling_factor)
        self.encoder = IVVAEEncoder(latent_channels, dims, num_layers, design)
        self.decoder = IVVAEDecoder(latent_channels, dims, num_layers, design)
        self._name_layers(GroupCausalConv3d, CausalConv3d)

        self.in_channels = 3
        self.latent_channels = latent_channels
        self.temporal_compression_ratio = 4
        self.spatial_compression_ratio = 8
        # Group by group as the original: memory that does not grow with the clip, and no slower.
        self.num_frames_per_step = 5
        # How far convolutions reach, in latents: a level of the encoder has its blocks and the downsampling, the first
        # one the input's convolution too; a level of the decoder the upsampling and its blocks, the last one the
        # output's.
        level = 2 * num_layers + 1
        self.encoder_halo = -(-((level + 1) + 2 * level + 4 * level) // 8)
        level = 1 + 2 * (num_layers + 1)
        self.decoder_halo = -(-(4 * level + 2 * level + level + 1) // 8)
        self.num_frames_per_chunk = 4 * self.temporal_compression_ratio + 1

    def _encode_local(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        return self.encoder(x, chunk, part="local")

    def _encode_whole(self, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        return self.encoder(hidden, chunk, part="whole")

    def _decode_whole(self, z: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        return self.decoder(z, chunk, part="whole")

    def _decode_local(self, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        return self.decoder(hidden, chunk, part="local")

"""WF-VAE: a video autoencoder whose backbone is fed by a multi-level wavelet transform (arXiv 2411.17459).

Read in the order of use: layers -> encoder -> decoder -> `AutoencoderKLWFVAE`; the public methods that all video
autoencoders share (`encode`, `decode`, `forward`) are in `video_autoencoder.py`.

Shape letters in the margins: B batch, T H W frames and pixels; t h w latent frames and size; b base channels, e and d
channels of the energy flow in encoder and decoder, z latent channels. Everything is channels-first `(B, c, T, H, W)`.

Time is causal: convolutions see the current and earlier frames, before the first frame that frame repeated. The one
exception is the linear interpolation of the decoder's temporal upsampling, which looks one frame ahead: the output of
a stream comes so much later (`num_delayed_frames`).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..checks import check_choice
from ..conversion import wfvae
from ..conversion.wfvae import HAAR_3D
from .temporal_cache import WHOLE, Chunk
from .video_autoencoder import Part, VideoAutoencoder
from .video_config import check_counts, check_sizes, check_statistics, check_switches
from .video_layers import FrameConv2d, LayerChain, attend_within_frames, convolve
from .wavelets import haar_analysis_2d, haar_analysis_3d, haar_synthesis_2d, haar_synthesis_3d


# ---- wavelets -------------------------------------------------------------------------------------------------------


class Wavelet(NamedTuple):
    """A Haar transform of RGB videos, of space or of space and time; sub-bands are channels, `band * 3 + colour`."""

    is_temporal: bool

    @property
    def channels(self) -> int:
        return 24 if self.is_temporal else 12

    def analyze(self, x: torch.Tensor, is_first: bool) -> torch.Tensor:
        """`(B, 3, T, H, W)` to `(B, 24, (T + 1) / 2, H / 2, W / 2)`, or without time to `(B, 12, T, H / 2, W / 2)`.

        At the start of a video its first frame is transformed together with itself; a later chunk has T / 2 frames.
        """
        if not self.is_temporal:
            return haar_analysis_2d(x) * 0.5
        if is_first:
            x = torch.cat((x[:, :, :1], x), dim=2)
        return haar_analysis_3d(x) * HAAR_3D

    def synthesize(self, subbands: torch.Tensor, is_first: bool) -> torch.Tensor:
        """The way back; with time one frame less at the start of a video, and larger by 8 * 0.3536^2 = 1.000264."""
        if not self.is_temporal:
            return haar_synthesis_2d(subbands) * 2
        x = haar_synthesis_3d(subbands) * (8 * HAAR_3D)
        return x[:, :, 1:] if is_first else x


# ---- layers ---------------------------------------------------------------------------------------------------------


class CausalConv3d(nn.Conv3d):
    """A convolution that sees the current and earlier frames; the first frame repeats before the start.

    Attributes:
        name: Of what it remembers; the model sets it.
    """

    name = ""

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel > 1 and x.shape[2] > 0:
            past = chunk.recall(self.name, x)
            if past is None:
                past = x[:, :, :1].expand(-1, -1, kernel - 1, -1, -1)
            x = torch.cat((past, x), dim=2)
            chunk.remember(self.name, x[:, :, x.shape[2] - (kernel - stride) :])
        return convolve(x, self.weight, self.bias, self.stride, self.padding, self.dilation)  # type: ignore[arg-type]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels at every position."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm of every frame by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.transpose(1, 2).flatten(0, 1)).unflatten(0, x.shape[:3:2]).transpose(1, 2)


class Layers(NamedTuple):
    """Building blocks that all parts of a model share."""

    norm_type: str
    dropout: float
    interpolation: str

    def norm(self, dim: int, of_frames: bool = False) -> nn.Module:
        if self.norm_type == "layer_norm":
            return ChannelNorm(dim, eps=1e-6)
        return (FrameGroupNorm if of_frames else nn.GroupNorm)(32, dim, eps=1e-6)

    def resnet(self, in_dim: int, out_dim: int | None = None) -> "WFVAEResnetBlock":
        return WFVAEResnetBlock(in_dim, in_dim if out_dim is None else out_dim, self)

    def frame_resnet(self, dim: int) -> "WFVAEResnetBlock":
        return WFVAEResnetBlock(dim, dim, self, of_frames=True)


class WFVAEResnetBlock(nn.Module):
    """Two norms, activations and convolutions with a residual; of space and time, or of every frame."""

    def __init__(self, in_dim: int, out_dim: int, layers: Layers, of_frames: bool = False):
        super().__init__()
        make = partial(FrameConv2d, padding=1) if of_frames else partial(CausalConv3d, padding=(0, 1, 1))
        self.norm1 = layers.norm(in_dim, of_frames)
        self.conv1 = make(in_dim, out_dim, 3)
        self.norm2 = layers.norm(out_dim, of_frames)
        self.dropout = nn.Dropout(layers.dropout)
        self.conv2 = make(out_dim, out_dim, 3)
        self.conv_shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)), chunk)
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))), chunk)
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class WFVAEAttention(nn.Module):
    """Self-attention with one head over the positions of each frame, with a residual."""

    def __init__(self, dim: int, layers: Layers):
        super().__init__()
        self.norm = layers.norm(dim)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        if x.shape[2] == 0:
            return x
        tokens = self.norm(x).permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, t, h * w, c)
        qkv = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        return x + self.to_out(attend_within_frames(qkv, x.shape[3:])).permute(0, 4, 1, 2, 3)


class WFVAEDownsample(nn.Module):
    """Half the height and width, and with time half the frames, of which the first stays by itself."""

    def __init__(self, dim: int, is_temporal: bool):
        super().__init__()
        self.conv = (CausalConv3d if is_temporal else FrameConv2d)(dim, dim, 3, stride=2)

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)), chunk)  # zeros on the right and below only


class WFVAEUpsample(nn.Module):
    """Twice the height and width, nearest, and a convolution of every frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = FrameConv2d(dim, dim, 3, padding=1)

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        return self.conv(x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4))


class WFVAETemporalUpsample(nn.Module):
    """Twice the height, width and frames, and a convolution; the first frame stays by itself.

    Frames are interpolated linearly among those after the first, so that the last frame of a chunk waits for the next.
    """

    name = ""  # of what it remembers; the model sets it

    def __init__(self, dim: int, layers: Layers):
        super().__init__()
        self.is_linear = layers.interpolation == "linear"
        self.conv = CausalConv3d(dim, dim, 3, padding=(0, 1, 1))

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        first, later = (x[:, :, :1], x[:, :, 1:]) if chunk.is_first else (x[:, :, :0], x)
        later = self._more_frames(later, chunk) if self.is_linear else later.repeat_interleave(2, dim=2)
        frames = torch.cat((first, later), dim=2)
        if frames.shape[2] == 0:
            frames = x.new_empty(*x.shape[:2], 0, 2 * x.shape[3], 2 * x.shape[4])
        else:
            size = (frames.shape[2], 2 * x.shape[3], 2 * x.shape[4])
            frames = F.interpolate(frames, size=size, mode="trilinear", align_corners=False)
        return self.conv(frames, chunk)

    def _more_frames(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Two frames for each, a fourth of the way to its neighbours; the ends have themselves as neighbours."""
        last = chunk.recall(self.name, x, is_optional=True)
        x = x if last is None else torch.cat((last, x), dim=2)
        if x.shape[2] == 0:
            return x
        chunk.remember(self.name, x[:, :, -1:])
        before = torch.cat((x[:, :, :1], x[:, :, :-1]), dim=2)
        after = torch.cat((x[:, :, 1:], x[:, :, -1:]), dim=2)
        frames = torch.stack((0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after), dim=3).flatten(2, 3)
        # What stands before the second half of the remembered frame was put out with it; what stands after the first
        # half of the last frame is known when the next frame comes, or that none comes.
        return frames[:, :, int(last is not None) : frames.shape[2] - int(not chunk.is_last)]


def _mid_layers(in_dim: int, dim: int, out_dim: int, use_attention: bool, layers: Layers) -> LayerChain:
    attention: list[nn.Module] = [WFVAEAttention(dim, layers)] if use_attention else []
    return LayerChain([layers.resnet(in_dim, dim), *attention, layers.resnet(dim, out_dim)])


# ---- encoder --------------------------------------------------------------------------------------------------------


class WFVAEEncoderLevel(nn.Module):
    """Convolution, residual blocks, downsampling; then the next wavelet level may join: the energy flow."""

    def __init__(
        self, in_dim: int, dim: int, flow_dim: int, num_layers: int, wavelet: Wavelet, layers: Layers, of_frames: bool
    ):
        super().__init__()
        make = layers.frame_resnet if of_frames else layers.resnet
        self.wavelet = wavelet
        self.conv_in = FrameConv2d(in_dim, dim, 3, padding=1)
        self.resnets = LayerChain([make(dim) for _ in range(num_layers)])
        self.downsample = WFVAEDownsample(dim, wavelet.is_temporal)
        self.flow = FrameConv2d(wavelet.channels, flow_dim, 3, padding=1) if flow_dim else None

    def forward(self, x: torch.Tensor, low: torch.Tensor, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states with the flow behind them, and the sub-bands of `low`, the low band of the level above."""
        hidden = self.downsample(self.resnets(self.conv_in(x), chunk), chunk)
        if self.flow is None:
            return hidden, low
        subbands = self.wavelet.analyze(low, chunk.is_first)
        return torch.cat((hidden, self.flow(subbands)), dim=1), subbands


class WFVAEEncoder(nn.Module):
    """Two levels that halve the size, below a wavelet transform of the pixels, and layers at the latent size."""

    def __init__(
        self,
        latent_dim: int,
        dim: int,
        flow_dims: tuple[int, int],
        num_layers: int,
        use_attention: bool,
        wavelets: tuple[Wavelet, Wavelet, Wavelet],
        layers: Layers,
    ):
        super().__init__()
        self.wavelet = wavelets[0]
        flow1, flow2 = flow_dims  # from the pixels down; 0 where there is none
        self.levels = nn.ModuleList(
            [
                WFVAEEncoderLevel(24, dim, flow1, num_layers, wavelets[1], layers, of_frames=True),
                WFVAEEncoderLevel(dim + flow1, 2 * dim, flow2, num_layers, wavelets[2], layers, of_frames=False),
            ]
        )
        self.mid = _mid_layers(2 * dim + flow2, 4 * dim, 4 * dim, use_attention, layers)
        self.norm_out = layers.norm(4 * dim)
        self.conv_out = CausalConv3d(4 * dim, 2 * latent_dim, 3, padding=(0, 1, 1))

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE, part: Part = "all") -> torch.Tensor:
        """Moments `(B, 2z, t, h, w)` of pixels; `(B, 2b + e, t, h, w)` lies between the parts."""
        hidden = x if part == "whole" else self.levels_and_subbands(x, chunk)[0]
        return hidden if part == "local" else self._whole(hidden, chunk)

    def levels_and_subbands(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> tuple[torch.Tensor, ...]:
        """The local part, and the sub-bands of the flows, which the wavelet loss compares with the decoder's."""
        hidden = level_above = self.wavelet.analyze(x, chunk.is_first)  # (B, 24, (T + 1) / 2, H / 2, W / 2)
        subbands = []
        for level in self.levels:
            hidden, level_above = level(hidden, level_above[:, :3], chunk)
            if level.flow is not None:
                subbands.append(level_above)
        return hidden, *subbands

    def _whole(self, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        return self.conv_out(F.silu(self.norm_out(self.mid(hidden, chunk))), chunk)


# ---- decoder --------------------------------------------------------------------------------------------------------


class WFVAEDecoderFlow(nn.Module):
    """The energy flow of the decoder: sub-bands from some channels of a level, and the RGB band above them."""

    name = ""  # of what it remembers; the model sets it

    def __init__(self, dim: int, num_layers: int, wavelet: Wavelet, layers: Layers):
        super().__init__()
        self.wavelet = wavelet
        self.resnets = LayerChain([layers.resnet(dim) for _ in range(num_layers)])
        self.conv_out = FrameConv2d(dim, wavelet.channels, 3, padding=1)

    def forward(self, x: torch.Tensor, low: torch.Tensor | None, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Sub-bands, their low band corrected by `low`, and what they synthesise to."""
        subbands = _add_to_low_band(self.conv_out(self.resnets(x, chunk)), low, self.name, chunk)
        return subbands, self.wavelet.synthesize(subbands, chunk.is_first)


def _add_to_low_band(subbands: torch.Tensor, low: torch.Tensor | None, name: str, chunk: Chunk) -> torch.Tensor:
    """Sub-bands whose first three channels are added to; frames of `low` that are early wait for the next chunk."""
    if low is None:
        return subbands
    waiting = chunk.recall(name, low)
    low = low if waiting is None else torch.cat((waiting, low), dim=2)
    chunk.remember(name, low[:, :, subbands.shape[2] :])
    low = low[:, :, : subbands.shape[2]]
    return torch.cat((subbands[:, :3] + low, subbands[:, 3:]), dim=1)


class WFVAEDecoderLevel(nn.Module):
    """Residual blocks, upsampling, a residual block."""

    def __init__(self, in_dim: int, dim: int, out_dim: int, num_layers: int, is_temporal: bool, layers: Layers):
        super().__init__()
        self.resnets = LayerChain([layers.resnet(in_dim if i == 0 else dim, dim) for i in range(num_layers)])
        self.upsample = WFVAETemporalUpsample(dim, layers) if is_temporal else WFVAEUpsample(dim)
        self.resnet_out = layers.resnet(dim, out_dim)

    def forward(self, x: torch.Tensor, chunk: Chunk = WHOLE) -> torch.Tensor:
        return self.resnet_out(self.upsample(self.resnets(x, chunk), chunk), chunk)


class WFVAEDecoder(nn.Module):
    """The way back: what a level splits off becomes sub-bands, which pass the backbone and are added at its end."""

    name = ""  # of what it remembers; the model sets it

    def __init__(
        self,
        latent_dim: int,
        dim: int,
        flow_dims: tuple[int, int],
        num_layers: int,
        num_flow_layers: int,
        use_attention: bool,
        wavelets: tuple[Wavelet, Wavelet, Wavelet],
        layers: Layers,
    ):
        super().__init__()
        self.wavelet = wavelets[0]
        self.flow_dims = flow_dims  # from the latent size upward; 0 where there is none
        self.conv_in = CausalConv3d(latent_dim, 4 * dim, 3, padding=(0, 1, 1))
        self.mid = _mid_layers(4 * dim, 4 * dim, 4 * dim + flow_dims[0], use_attention, layers)
        self.flows = nn.ModuleList(
            [
                WFVAEDecoderFlow(flow_dim, num_flow_layers, wavelet, layers)
                for flow_dim, wavelet in zip(flow_dims, (wavelets[2], wavelets[1]), strict=True)
                if flow_dim
            ]
        )
        sizes = ((4 * dim, 4 * dim, 4 * dim + flow_dims[1], wavelets[2]), (4 * dim, 2 * dim, 2 * dim, wavelets[1]))
        self.levels = nn.ModuleList(
            [
                WFVAEDecoderLevel(in_dim, level_dim, out_dim, num_layers, wavelet.is_temporal, layers)
                for in_dim, level_dim, out_dim, wavelet in sizes
            ]
        )
        self.resnets_out = LayerChain([layers.resnet(2 * dim, dim), layers.resnet(dim)])
        self.norm_out = layers.norm(dim)
        self.conv_out = FrameConv2d(dim, wavelets[0].channels, 3, padding=1)

    def forward(self, z: torch.Tensor, chunk: Chunk = WHOLE, part: Part = "all", subbands: bool = False) -> Any:
        """Pixels `(B, 3, T, H, W)` of latents; `(B, 4b + d, t, h, w)` lies between the parts.

        With `subbands` those of the flows come along, as of [`frames_and_subbands`].
        """
        hidden = z if part == "local" else self.mid(self.conv_in(z, chunk), chunk)
        if part == "whole":
            return hidden
        outputs = self.frames_and_subbands(hidden, chunk)
        return outputs if subbands else outputs[0]

    def frames_and_subbands(self, hidden: torch.Tensor, chunk: Chunk = WHOLE) -> tuple[torch.Tensor, ...]:
        """The local part, and the sub-bands of the flows, the larger ones first as in the encoder."""
        low, subbands, flows = None, [], iter(self.flows)
        for level, flow_dim in zip(self.levels, self.flow_dims, strict=True):
            if flow_dim:
                hidden, branch = hidden.split((hidden.shape[1] - flow_dim, flow_dim), dim=1)
                bands, low = next(flows)(branch, low, chunk)
                subbands.insert(0, bands)
            hidden = level(hidden, chunk)
        hidden = self.conv_out(F.silu(self.norm_out(self.resnets_out(hidden, chunk))))
        return self.wavelet.synthesize(_add_to_low_band(hidden, low, self.name, chunk), chunk.is_first), *subbands


# How far convolutions reach from latent 0 to both sides, walked from what is computed to what is read. Indices are
# those of the sizes passed: a latent has two elements at a fourth of the pixels' size, and four at half of it.


def _encoder_reach(num_layers: int) -> int:
    level = 1 + 2 * num_layers
    low, high = -level, 2 + level  # downsampling reads two to the right
    low, high = 2 * low - level, 2 * high + 2 + level
    return max(-(low // 4), high // 4)


def _decoder_reach(num_layers: int, num_flow_layers: int, is_8x: bool) -> int:
    def interpolate(low: int, high: int) -> tuple[int, int]:
        return (low - 1) // 2, (high + 1) // 2  # an odd index also reads to the right, an even one to the left

    def latents(low: int, high: int) -> int:
        # Of what the first level gives: a block and a convolution, upsampling, and the level's blocks.
        low, high = interpolate(low - 3, high + 3)
        return max(-low, high) + 2 * num_layers

    low, high = -8, 3 + 8  # at half the size the last convolution, three blocks, the upsampling's convolution
    low, high = interpolate(low, high) if is_8x else (low // 2, high // 2)
    backbone = latents(low - 2 * num_layers, high + 2 * num_layers)
    flow = 2 * num_flow_layers + 1
    return max(backbone, latents(-flow, 1 + flow), flow)


# ---- the autoencoder ------------------------------------------------------------------------------------------------


class AutoencoderKLWFVAE(VideoAutoencoder):
    """WF-VAE, a video autoencoder with KL posterior and a wavelet energy flow (arXiv 2411.17459).

    Pixels are in `[-1, 1]`, videos `(batch_size, 3, num_frames, height, width)` with `num_frames` = 4 * n + 1 (8 * n +
    1 for a temporal ratio of 8) and sizes that are multiples of 8. Latents are *not* normalised: use
    `config.latents_mean` and `config.latents_std`, as your pipeline does.

    The defaults are those of WF-VAE-L with 16 channels; fewer `num_wavelet_levels` than three are ablations.

    Args:
        latent_channels: Channels of the latents.
        base_channels: Width at half the size; twice and four times as many at the smaller sizes.
        encoder_flow_channels: Width of the energy flow of the encoder.
        decoder_flow_channels: Width of the energy flow of the decoder.
        num_encoder_layers: Residual blocks of each level of the encoder.
        num_decoder_layers: Residual blocks of each level of the decoder.
        num_flow_layers: Residual blocks in each flow of the decoder.
        use_attention: Whether the layers at the latent size have attention within each frame.
        norm_type: `"layer_norm"`, or `"group_norm"` with 32 groups, whose statistics span the whole video, so that
            nothing can be streamed or tiled.
        temporal_interpolation: `"linear"` or `"nearest"`, of the decoder's temporal upsampling.
        temporal_compression_ratio: 4, or 8 (then the second wavelet level is one of time, too).
        num_wavelet_levels: Levels of the wavelet transform that take part: 3; 2: without the energy flow at the latent
            size; 1: without any energy flow, the pixels alone are transformed.
        dropout: In the residual blocks, while training.
        scaling_factor: Factor that pipelines apply to latents for diffusion.
        latents_mean: Mean of each latent channel, or `None`.
        latents_std: Standard deviation of each latent channel, or `None`.
    """

    _no_split_modules = ["WFVAEResnetBlock", "WFVAEAttention"]
    # `encode` and `decode` do not pass through the model's `forward`, so what they call must be offloaded by itself.
    _group_offload_block_modules = ["encoder", "decoder"]
    _repeated_blocks = ["WFVAEResnetBlock"]
    conversion = wfvae

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        base_channels: int = 192,
        encoder_flow_channels: int = 128,
        decoder_flow_channels: int = 128,
        num_encoder_layers: int = 2,
        num_decoder_layers: int = 2,
        num_flow_layers: int = 1,
        use_attention: bool = True,
        norm_type: str = "layer_norm",
        temporal_interpolation: str = "linear",
        temporal_compression_ratio: int = 4,
        num_wavelet_levels: int = 3,
        dropout: float = 0.0,
        scaling_factor: float = 1.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ):
        super().__init__()
        check_choice("norm_type", norm_type, ("layer_norm", "group_norm"))
        check_choice("temporal_interpolation", temporal_interpolation, ("linear", "nearest"))
        check_choice("temporal_compression_ratio", temporal_compression_ratio, (4, 8))
        check_choice("num_wavelet_levels", num_wavelet_levels, (3, 2, 1))
        check_sizes(
            latent_channels=latent_channels, base_channels=base_channels, num_decoder_layers=num_decoder_layers
        )
        check_counts(num_encoder_layers=num_encoder_layers, num_flow_layers=num_flow_layers)
        # Without a flow its width does not matter.
        check_flow = check_sizes if num_wavelet_levels > 1 else check_counts
        check_flow(encoder_flow_channels=encoder_flow_channels, decoder_flow_channels=decoder_flow_channels)
        check_switches(use_attention=use_attention)
        check_statistics(latent_channels, latents_mean, latents_std, scaling_factor)
        layers = Layers(norm_type, dropout, temporal_interpolation)
        wavelets = (Wavelet(True), Wavelet(temporal_compression_ratio == 8), Wavelet(True))  # from the pixels down
        self.encoder = WFVAEEncoder(
            latent_channels,
            base_channels,
            (encoder_flow_channels * (num_wavelet_levels > 1), encoder_flow_channels * (num_wavelet_levels > 2)),
            num_encoder_layers,
            use_attention,
            wavelets,
            layers,
        )
        self.decoder = WFVAEDecoder(
            latent_channels,
            base_channels,
            (decoder_flow_channels * (num_wavelet_levels > 2), decoder_flow_channels * (num_wavelet_levels > 1)),
            num_decoder_layers,
            num_flow_layers,
            use_attention,
            wavelets,
            layers,
        )
        self._name_layers(CausalConv3d, WFVAETemporalUpsample, WFVAEDecoderFlow, WFVAEDecoder)

        self.in_channels = 3
        self.latent_channels = latent_channels
        self.temporal_compression_ratio = temporal_compression_ratio
        self.spatial_compression_ratio = 8
        # In a stream each temporal upsampling waits for one frame, at the rate that it puts out.
        delays = {"nearest": 0, "linear": 2 if temporal_compression_ratio == 4 else 6}
        self.num_delayed_frames = delays[temporal_interpolation]
        self.encoder_halo = _encoder_reach(num_encoder_layers)
        self.decoder_halo = _decoder_reach(num_decoder_layers, num_flow_layers, temporal_compression_ratio == 8)
        self.can_stream = norm_type == "layer_norm"
        self.num_frames_per_chunk = 4 * temporal_compression_ratio + 1

    # ---- sub-bands, for training ------------------------------------------------------------------------------------

    def analyze(self, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Sub-bands of the flows, larger ones first; what `decode_subbands` should predict."""
        band, subbands = self.encoder.wavelet.analyze(sample, is_first=True), []
        for level in self.encoder.levels:
            if level.flow is not None:
                band = level.wavelet.analyze(band[:, :3], is_first=True)  # type: ignore[operator, union-attr]
                subbands.append(band)
        return tuple(subbands)

    def decode_subbands(self, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Decode latents `(batch_size, z, t, h, w)` to pixels and to the sub-bands of the flows."""
        return self.decoder(z, subbands=True)

    # ---- the parts --------------------------------------------------------------------------------------------------

    def _encode_local(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        return self.encoder(x, chunk, part="local")

    def _encode_whole(self, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        return self.encoder(hidden, chunk, part="whole")

    def _decode_whole(self, z: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        return self.decoder(z, chunk, part="whole")

    def _decode_local(self, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        return self.decoder(hidden, chunk, part="local")

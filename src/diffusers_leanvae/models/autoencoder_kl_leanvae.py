"""LeanVAE: an ultra-efficient reconstruction VAE for video diffusion models (arXiv 2503.14325).

Read in the order of use: encoder -> bottleneck -> decoder -> `AutoencoderKLLeanVAE`, whose `_encode_chunk` and
`_decode_chunk` are the whole network. The layers are in `leanvae_blocks.py`, sub-bands and patches in
`leanvae_patches.py`, the public methods that all video autoencoders share (`encode`, `decode`, `forward`) in
`video_autoencoder.py`, all short.

Shape letters in the margins: B batch, C pixel channels, T H W frames and pixels; t h w latent frames and size; c
width of the tokens; z latent channels. Tokens are channels-last `(B, t, h, w, c)` from the patch embedding to the
last projection.
"""

import importlib.util
import math
import os
import platform
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..checks import check_choice, is_integer
from ..conversion import leanvae
from ..kernels import Kernels, slabs
from ..kernels import get as get_kernels
from ..kernels.slabs import SlabKernels
from .leanvae_blocks import (
    CausalDepthwiseConv3d,
    LeanVAEBlocks,
    by_strips,
    inner_dim,
    keep,
    slice_elements,
    update_tokens,
    works_in_place,
)
from .leanvae_fused import FusedLeanVAE, is_plain
from .leanvae_memory import LeanVAEMemory
from .leanvae_patches import LeanVAEPatchGeometry, Subbands, merge_patches, patch_projection, split_patches, synthesize
from .temporal_cache import WHOLE, Chunk
from .video_autoencoder import VideoAutoencoder
from .video_config import check_counts, check_factor, check_sizes, check_statistics, check_switches
from .video_layers import is_autocast_on
from .wavelets import haar_analysis_2d, haar_analysis_3d


class LeanVAEEncoder(nn.Module):
    """Wavelet, patch embedding, branch layers for the low and the high bands, fusion layers.

    With a `"joint"` or `"no_wavelet"` patch embedding there are no branches: one stack of all layers at full width.
    """

    def __init__(
        self,
        geometry: LeanVAEPatchGeometry,
        low_dim: int,
        high_dim: int,
        num_branch: int,
        num_fusion: int,
        norm: bool,
        pixel_factor: float,
    ):
        super().__init__()
        self.geometry = geometry
        self.pixel_factor = pixel_factor
        self.separate = geometry.patch_embedding_type == "separate"
        dim = low_dim + high_dim
        image_dim, image_low, video_dim, video_low = (
            geometry.image_dim,
            geometry.image_low_dim,
            geometry.video_dim,
            geometry.video_low_dim,
        )
        if self.separate:
            self.image_low_proj = patch_projection(image_low, low_dim, norm)
            self.image_high_proj = patch_projection(image_dim - image_low, high_dim, norm)
            self.video_low_proj = patch_projection(video_low, low_dim, norm)
            self.video_high_proj = patch_projection(video_dim - video_low, high_dim, norm)
            self.low_layers = LeanVAEBlocks(low_dim, num_branch)
            self.high_layers = LeanVAEBlocks(high_dim, num_branch)
            self.fusion_layers = LeanVAEBlocks(dim, num_fusion)
        else:
            self.image_proj = patch_projection(image_dim, dim, norm)
            self.video_proj = patch_projection(video_dim, dim, norm)
            self.fusion_layers = LeanVAEBlocks(dim, num_branch + num_fusion)

    def transform(self, frames: torch.Tensor, image: bool) -> torch.Tensor:
        """Sub-bands of the first frame (2D) or of the later ones (3D); the pixels themselves without wavelet."""
        if self.geometry.patch_embedding_type == "no_wavelet":
            return frames
        return haar_analysis_2d(frames) if image else haar_analysis_3d(frames)

    def forward(self, image: torch.Tensor | None, video: torch.Tensor | None, chunk: Chunk = WHOLE) -> torch.Tensor:
        frames = [part for part in (image, video) if part is not None]
        height = frames[0].shape[3] // (2 * self.geometry.patch_size[1])
        elements_per_row = 6 * sum(part.numel() for part in frames) // height
        branches = list(by_strips(self._embed, (image, video), (3, 2), height, elements_per_row, chunk))
        if self.separate:
            layers = (self.low_layers, self.high_layers)
            branches = [layer(tokens, chunk) for layer, tokens in zip(layers, branches, strict=True)]
        tokens = torch.cat(branches, dim=-1) if self.separate else branches[0]
        del branches
        return self.fusion_layers(tokens, chunk)  # (B, t, h, w, c)

    def _embed(self, image: torch.Tensor | None, video: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Tokens of each branch, `(B, t, h, w, low_dim)` and `(..., high_dim)`; one tensor without branches."""
        geometry, tokens = self.geometry, []
        if image is not None:  # (B, C, 1, H, W) -> (B, 1, h, w, image_dim)
            patches = split_patches(self.transform(image * self.pixel_factor, image=True), geometry.image_patch)
            if self.separate:
                low, high = patches.tensor_split((geometry.image_low_dim,), dim=-1)
                tokens.append((self.image_low_proj(low), self.image_high_proj(high)))
            else:
                tokens.append((self.image_proj(patches),))
        if video is not None:  # (B, C, T-1, H, W) -> (B, t-1, h, w, video_dim)
            patches = split_patches(self.transform(video * self.pixel_factor, image=False), geometry.video_patch)
            if self.separate:
                low, high = patches.tensor_split((geometry.video_low_dim,), dim=-1)
                tokens.append((self.video_low_proj(low), self.video_high_proj(high)))
            else:
                tokens.append((self.video_proj(patches),))
        return tuple(torch.cat(parts, dim=1) for parts in zip(*tokens, strict=True))


class ISTAIteration(nn.Module):
    """One unrolled iteration of ISTA-Net+ (paper, section 3.3): gradient step, then a learned proximal step."""

    def __init__(self, dim: int, num_layers: int):
        super().__init__()
        self.step_size = nn.Parameter(torch.tensor(1.0))
        self.threshold = nn.Parameter(torch.tensor([0.01]))
        self.forward_transform = LeanVAEBlocks(dim, num_layers, residual=False)
        self.backward_transform = LeanVAEBlocks(dim, num_layers, residual=False)

    def forward(
        self, hidden_states: torch.Tensor, latents: torch.Tensor, phi: torch.Tensor, chunk: Chunk = WHOLE
    ) -> torch.Tensor:
        step_size, threshold = self.step_size.to(phi.dtype), self.threshold.to(phi.dtype)
        error = step_size * (F.linear(hidden_states, phi) - latents)  # (B, t, h, w, z)
        width = 4 * phi.shape[1]
        hidden_states = update_tokens(
            lambda tokens, error: tokens - F.linear(error, phi.t()), hidden_states, error, width=width, chunk=chunk
        )
        sparse = self.forward_transform(keep(hidden_states, chunk), chunk)
        sparse = update_tokens(lambda tokens: _soft_threshold(tokens, threshold), sparse, width=width, chunk=chunk)
        change = self.backward_transform(sparse, chunk)
        return update_tokens(torch.add, hidden_states, change, width=width, chunk=chunk)


def _soft_threshold(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return torch.sign(x) * F.relu(torch.abs(x) - threshold)


class CompressedSensingBottleneck(nn.Module):
    """Linear sensing of `dim` features into `latent_channels`, and their reconstruction by unrolled ISTA-Net+.

    Both directions go through `forward`, so that offloading hooks see the parameters used.
    """

    def __init__(self, dim: int, latent_channels: int, num_iterations: int, num_layers: int):
        super().__init__()
        self.phi = nn.Parameter(torch.randn(latent_channels, dim) / math.sqrt(dim))
        self.initial = nn.Parameter(self.phi.detach().t().clone(memory_format=torch.contiguous_format))
        self.iterations = nn.ModuleList([ISTAIteration(dim, num_layers) for _ in range(num_iterations)])

    def forward(self, hidden_states: torch.Tensor, chunk: Chunk = WHOLE, *, reconstruct: bool = False) -> torch.Tensor:
        phi = self.phi.to(hidden_states.dtype)
        if not reconstruct:
            return F.linear(hidden_states, phi)  # (B, t, h, w, c) -> (B, t, h, w, z)
        latents = hidden_states
        hidden_states = F.linear(latents, self.initial.to(latents.dtype))  # (B, t, h, w, z) -> (B, t, h, w, c)
        for iteration in self.iterations:
            hidden_states = iteration(hidden_states, latents, phi, chunk)
        return hidden_states


class LinearBottleneck(nn.Module):
    """Plain linear autoencoder of the features (ablation 2 of the paper)."""

    def __init__(self, dim: int, latent_channels: int):
        super().__init__()
        self.compress = nn.Linear(dim, latent_channels)
        self.expand = nn.Linear(latent_channels, dim)

    def forward(self, hidden_states: torch.Tensor, chunk: Chunk = WHOLE, *, reconstruct: bool = False) -> torch.Tensor:
        return self.expand(hidden_states) if reconstruct else self.compress(hidden_states)


class LeanVAEDecoder(nn.Module):
    """Mirror of the encoder: fusion layers, branch layers, projection to sub-bands."""

    def __init__(
        self,
        geometry: LeanVAEPatchGeometry,
        low_dim: int,
        high_dim: int,
        num_branch: int,
        num_fusion: int,
        pixel_factor: float,
    ):
        super().__init__()
        self.pixel_factor = pixel_factor
        self.geometry = geometry
        self.low_dim = low_dim
        self.separate = geometry.patch_embedding_type == "separate"
        dim = low_dim + high_dim
        image_dim, image_low, video_dim, video_low = (
            geometry.image_dim,
            geometry.image_low_dim,
            geometry.video_dim,
            geometry.video_low_dim,
        )
        if self.separate:
            self.fusion_layers = LeanVAEBlocks(dim, num_fusion)
            self.low_layers = LeanVAEBlocks(low_dim, num_branch)
            self.high_layers = LeanVAEBlocks(high_dim, num_branch)
            self.image_low_proj = nn.Linear(low_dim, image_low)
            self.image_high_proj = nn.Linear(high_dim, image_dim - image_low)
            self.video_low_proj = nn.Linear(low_dim, video_low)
            self.video_high_proj = nn.Linear(high_dim, video_dim - video_low)
        else:
            self.fusion_layers = LeanVAEBlocks(dim, num_branch + num_fusion)
            self.image_proj = nn.Linear(dim, image_dim)
            self.video_proj = nn.Linear(dim, video_dim)

    def forward(
        self, hidden_states: torch.Tensor, chunk: Chunk = WHOLE, subbands: bool = False
    ) -> "torch.Tensor | Subbands":
        """Features `(B, t, h, w, c)` to pixels or sub-bands; the first latent frame of a video is an image's."""
        hidden_states = self.fusion_layers(hidden_states, chunk)
        tokens: tuple[torch.Tensor, ...] = (hidden_states,)
        if self.separate:
            low, high = hidden_states.tensor_split((self.low_dim,), dim=-1)
            tokens = (self.low_layers(low, chunk), self.high_layers(high, chunk))
        if subbands:
            return self._project(tokens, chunk.is_first)
        height = hidden_states.shape[2]
        elements_per_row = 6 * hidden_states[:, :, 0, :, 0].numel() * self.geometry.video_dim

        def synthesize_rows(*tokens: torch.Tensor) -> tuple[torch.Tensor]:
            return (synthesize(self._project(tokens, chunk.is_first), self.pixel_factor),)

        return by_strips(synthesize_rows, tokens, (2, 3), height, elements_per_row, chunk)[0]

    def _project(self, tokens: tuple[torch.Tensor, ...], has_image: bool) -> Subbands:
        """Last tokens of each branch, or rows of them, to sub-bands."""
        image = video = None
        num_image = int(has_image)
        if self.separate:
            low, high = tokens
            if has_image:
                image = torch.cat((self.image_low_proj(low[:, :1]), self.image_high_proj(high[:, :1])), dim=-1)
            if low.shape[1] > num_image:
                low, high = low[:, num_image:], high[:, num_image:]
                video = torch.cat((self.video_low_proj(low), self.video_high_proj(high)), dim=-1)
        else:
            image = self.image_proj(tokens[0][:, :1]) if has_image else None
            video = self.video_proj(tokens[0][:, num_image:]) if tokens[0].shape[1] > num_image else None
        geometry = self.geometry
        image = None if image is None else merge_patches(image, geometry.image_patch)
        video = None if video is None else merge_patches(video, geometry.video_patch)
        if geometry.patch_embedding_type == "no_wavelet":  # the patches are pixels
            image = None if image is None else haar_analysis_2d(image)
            video = None if video is None else haar_analysis_3d(video)
        return Subbands(image, video)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _initialize(module: nn.Module, std: float) -> None:
    """The reference's training initialisation (`std` 0.02); the bottleneck's own parameters initialise themselves."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv3d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]


class AutoencoderKLLeanVAE(VideoAutoencoder):
    """LeanVAE, a video autoencoder with KL posterior (arXiv 2503.14325).

    Pixels are in `[-1, 1]`, videos `(batch_size, in_channels, num_frames, height, width)` with `num_frames` = 4 * n +
    1 (1, 5, 9, ...) and sizes that are multiples of 8 for the default patch size; the first frame is an image of its
    own, every later group of four frames shares one latent frame. Latents are *not* normalised: multiply by
    `config.scaling_factor` or use `config.latents_mean` / `config.latents_std`, as your pipeline does.

    Args:
        in_channels: Pixel channels, of input and output.
        latent_channels: Channels of the latents (4 and 16 in the released models).
        low_freq_dim: Width of the low-frequency branch.
        high_freq_dim: Width of the high-frequency branch; the fused width is the sum of both.
        num_branch_layers: ResNAF blocks in each branch, of the encoder and of the decoder.
        num_fusion_layers: ResNAF blocks at the fused width, of the encoder and of the decoder.
        num_ista_iterations: Unrolled iterations of the bottleneck.
        num_ista_layers: NAF blocks in each of the two transforms of an iteration.
        patch_size: Patch of the sub-bands `(time, height, width)`; the compression ratios are twice as large.
        patch_embedding_type: `"separate"` (low and high bands apart, then merged), `"joint"` or `"no_wavelet"`
            (ablation 1).
        bottleneck_type: `"compressed_sensing"` or `"linear"` (ablation 2).
        patch_norm: LayerNorm inside the patch embedding (ablation 3; gives blocking artefacts, off by default).
        pixel_factor: Public pixels times this are the network's: 0.5 for released weights, 1.0 for Wan-aligned ones.
        scaling_factor: Factor that pipelines apply to latents for diffusion (0.7744 for the released 4-channel model).
        latents_mean: Mean of each latent channel, or `None`.
        latents_std: Standard deviation of each latent channel, or `None`.
    """

    is_local = True

    _no_split_modules = ["LeanVAEBlock", "ISTAIteration"]
    # `encode` and `decode` do not pass through the model's `forward`, so what they call must be offloaded by itself.
    _group_offload_block_modules = ["encoder", "bottleneck", "logvar_proj", "decoder"]
    _repeated_blocks = ["LeanVAEBlock"]
    conversion = leanvae

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 4,
        low_freq_dim: int = 128,
        high_freq_dim: int = 384,
        num_branch_layers: int = 2,
        num_fusion_layers: int = 4,
        num_ista_iterations: int = 2,
        num_ista_layers: int = 2,
        patch_size: tuple[int, int, int] = (2, 4, 4),
        patch_embedding_type: str = "separate",
        bottleneck_type: str = "compressed_sensing",
        patch_norm: bool = False,
        pixel_factor: float = 0.5,
        scaling_factor: float = 1.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ):
        super().__init__()
        check_choice("patch_embedding_type", patch_embedding_type, ("separate", "joint", "no_wavelet"))
        check_choice("bottleneck_type", bottleneck_type, ("compressed_sensing", "linear"))
        check_sizes(
            in_channels=in_channels,
            latent_channels=latent_channels,
            low_freq_dim=low_freq_dim,
            high_freq_dim=high_freq_dim,
        )
        check_counts(
            num_branch_layers=num_branch_layers,
            num_fusion_layers=num_fusion_layers,
            num_ista_iterations=num_ista_iterations,
            num_ista_layers=num_ista_layers,
        )
        check_switches(patch_norm=patch_norm)
        is_patch = len(patch_size) == 3 and all(is_integer(size) and size > 0 for size in patch_size)
        if not is_patch or patch_size[1] != patch_size[2]:
            raise ValueError(
                f"`patch_size` must be three positive integers (time, height, width) with height = width, got "
                f"{patch_size}."
            )
        check_factor("pixel_factor", pixel_factor)
        check_statistics(latent_channels, latents_mean, latents_std, scaling_factor)

        geometry = LeanVAEPatchGeometry(in_channels, (patch_size[0], *patch_size[1:]), patch_embedding_type)
        dim = low_freq_dim + high_freq_dim
        self.encoder = LeanVAEEncoder(
            geometry, low_freq_dim, high_freq_dim, num_branch_layers, num_fusion_layers, patch_norm, pixel_factor
        )
        if bottleneck_type == "compressed_sensing":
            self.bottleneck = CompressedSensingBottleneck(dim, latent_channels, num_ista_iterations, num_ista_layers)
            iterations = set(self.bottleneck.iterations.modules())
        else:
            self.bottleneck = LinearBottleneck(dim, latent_channels)
            iterations = set[nn.Module]()
        self.logvar_proj = nn.Linear(dim, latent_channels)
        self.decoder = LeanVAEDecoder(
            geometry, low_freq_dim, high_freq_dim, num_branch_layers, num_fusion_layers, pixel_factor
        )
        # The reference has 512 features. With fewer, its deviation would let nothing pass the bottleneck's thresholds.
        narrow_std = 0.02 * max(512 / dim, 1.0) ** 0.5
        for module in self.modules():
            _initialize(module, narrow_std if module in iterations else 0.02)
        self._name_layers(CausalDepthwiseConv3d)

        self.temporal_compression_ratio = 2 * patch_size[0]
        self.spatial_compression_ratio = 2 * patch_size[1]
        self.in_channels = in_channels
        self.latent_channels = latent_channels
        self.pixel_factor = pixel_factor
        # Each convolution reaches one token to every side, so this many tokens around a tile make its result exact.
        self.encoder_halo = num_branch_layers + num_fusion_layers
        self.decoder_halo = self.encoder_halo
        if bottleneck_type == "compressed_sensing":
            self.decoder_halo += 2 * num_ista_iterations * num_ista_layers

        self.num_frames_per_chunk = 4 * self.temporal_compression_ratio + 1
        self._fused: FusedLeanVAE | None = None

    # ---- sub-bands, for training ------------------------------------------------------------------------------------

    def analyze(self, sample: torch.Tensor) -> Subbands:
        """Sub-bands of a video in `[-1, 1]`, in the internal pixel range; what `decode_subbands` should predict."""
        sample = sample * self.pixel_factor
        video = sample[:, :, 1:]
        return Subbands(haar_analysis_2d(sample[:, :, :1]), haar_analysis_3d(video) if video.shape[2] else None)

    def decode_subbands(self, z: torch.Tensor) -> Subbands:
        """Decode latents `(batch_size, z, t, h, w)` to sub-bands instead of pixels; for the wavelet losses."""
        return self._decode_local(z, Chunk(), subbands=True)

    def synthesize(self, subbands: Subbands) -> torch.Tensor:
        """Video in `[-1, 1]` of sub-bands; inverse of `analyze`."""
        return synthesize(subbands, self.pixel_factor)

    # ---- one chunk of one tile --------------------------------------------------------------------------------------

    def _encode_local(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Moments `(B, 2z, t, h, w)` of frames."""
        self._mark_watched(chunk)
        if (fused := self._current_fused(x, chunk)) is not None:
            return fused.encode(x, chunk)
        image, video = (x[:, :, :1], x[:, :, 1:]) if chunk.is_first else (None, x)
        features = self.encoder(image, video if video.shape[2] else None, chunk)  # (B, t, h, w, c)
        moments = torch.cat((self.bottleneck(features), self.logvar_proj(features)), dim=-1)  # (B, t, h, w, 2z)
        return moments.permute(0, 4, 1, 2, 3).contiguous()

    def _decode_local(self, hidden: torch.Tensor, chunk: Chunk, subbands: bool = False) -> Any:
        """Pixels `(B, C, T, H, W)`, or sub-bands, of latents `(B, z, t, h, w)`."""
        self._mark_watched(chunk)
        if not subbands and (fused := self._current_fused(hidden, chunk)) is not None:
            return fused.decode(hidden, chunk)
        features = self.bottleneck(hidden.permute(0, 2, 3, 4, 1), chunk, reconstruct=True)  # (B, t, h, w, c)
        return self.decoder(features, chunk, subbands)

    def _mark_watched(self, chunk: Chunk) -> None:
        """Let layers with hooks keep what these have seen."""
        if not torch.compiler.is_compiling():
            layers = (layer for layer in self.modules() if layer is not self)
            chunk.is_watched = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)

    # ---- prepared weights -------------------------------------------------------------------------------------------

    def fuse(self, kernels: Literal["auto", "torch", "cpp", "triton"] = "auto") -> None:
        """Prepare the weights for fast inference: the same function with fewer passes over memory.

        The model and its state dict stay as they are; the prepared copies take as much memory as the weights. They
        serve `encode` and `decode` without gradients, whole, tiled or streamed. With gradients, autocast, hooks of
        layers or offloading the layers are used, and a warning says so; after weights were changed, cast or moved,
        too, until the next call of `fuse`. After a change through `Tensor.data` call `fuse` yourself. On a CPU such a
        change is seen if it is one of whole weights, as diffusers' `EMAModel` and merging of adapters make it: four
        values of each are compared. On a GPU none is. Copies and pickles are not fused. Sums are taken in another
        order, so float32 results differ by rounding. Where a processor has no products of the model's dtype (16 bits
        on older ones), they are taken of float32 copies, many times as fast and nearer to float64.

        Args:
            kernels: `"torch"`: plain PyTorch, slab by slab of tokens. `"cpp"`: the same with C++ between the matrix
                products, for float32 and bfloat16 on the CPU; it is compiled at the first call on a machine, in
                seconds, and kept in `TORCH_EXTENSIONS_DIR`. Blocks whose channels are no multiple of 16 are left to
                PyTorch. `"triton"`: whole tensors by Triton kernels. `"auto"`: Triton for a model on a GPU where it is
                installed; C++ on a CPU with Linux where there is a compiler.

        Raises:
            ValueError: If the kernels are not for this model or machine, or the model has adapters that are not
                merged, weights that another library has quantized or distributed, layers that are offloaded one by
                one, or weights of several dtypes or on several devices.
        """
        check_choice("kernels", kernels, ("auto", "torch", "cpp", "triton"))
        if kinds := sorted({type(parameter).__name__ for parameter in self.parameters() if not is_plain(parameter)}):
            raise ValueError(
                f"`fuse` must be called on plain weights, got {', '.join(kinds)}; a quantized model is as fast as its "
                "library makes it."
            )
        if self.has_moving_weights():
            raise ValueError(
                "`fuse` must be called before layers are offloaded or cast when called, got some that are."
            )
        stored = {(parameter.dtype, parameter.device.type) for parameter in self.parameters()}
        if len(stored) > 1:
            places = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in stored))
            raise ValueError(f"`fuse` must be called on a model of one dtype on one device, got {places}.")
        operations = self._find_kernels(kernels)
        self._fused = None
        with torch.no_grad():
            self._fused = FusedLeanVAE(self, operations)

    def _find_kernels(self, kernels: str) -> Kernels | SlabKernels | None:
        """Return the operations for a choice of `fuse`; `None` for plain PyTorch."""
        if kernels == "triton" or (kernels == "auto" and self.device.type == "cuda" and _has_triton()):
            return get_kernels("triton")
        is_for_cpp = self.device.type == "cpu" and self.dtype in slabs.DTYPES
        operations = slabs.load() if is_for_cpp and kernels in ("auto", "cpp") else None
        if kernels == "cpp" and operations is None:
            raise ValueError(
                "`kernels` must not be 'cpp' without a C++ compiler that works, on Linux; got "
                f"{os.environ.get('CXX') or 'none that is found'} on {platform.system()}."
                if is_for_cpp
                else "`kernels` must not be 'cpp' but for a float32 or bfloat16 model on the CPU, got one that is "
                f"{self.dtype} on {self.device}."
            )
        return operations

    def unfuse(self) -> None:
        """Undo [`fuse`]: free the prepared weights."""
        self._fused = None

    def __getstate__(self) -> dict[str, Any]:
        # Prepared weights may be in a layout that nothing but their products can read.
        return {**self.__dict__, "_fused": None}

    def _current_fused(self, x: torch.Tensor, chunk: Chunk) -> FusedLeanVAE | None:
        """Return the prepared weights if they serve here; if not, say why."""
        if self._fused is None or torch.compiler.is_compiling():  # compilers need the layers
            return None
        weight = self.logvar_proj.weight
        if chunk.is_watched:
            reason = "layers have hooks, which would see nothing"
        elif not works_in_place(chunk):
            reason = "gradients are enabled, which `torch.no_grad()` changes"
        elif is_autocast_on(x.device.type):
            reason = "autocast is on; cast the model instead"
        elif (weight.device, weight.dtype) != (x.device, x.dtype):  # hooks bring them when a layer is called
            reason = f"its weights are {weight.dtype} on {weight.device}, the input {x.dtype} on {x.device}"
        elif not self._fused.is_current(self):
            reason = "weights changed since; call `fuse` again"
        else:
            return self._fused
        warnings.warn(f"`fuse` has no effect in this call, the layers are used: {reason}.", stacklevel=2)
        return None

    # ---- memory -----------------------------------------------------------------------------------------------------

    def memory_model(self) -> LeanVAEMemory:
        return LeanVAEMemory(
            **self._memory_sizes(),
            dim=self.logvar_proj.in_features,
            branch_dim=self.config["high_freq_dim"] if self.encoder.separate else self.logvar_proj.in_features,
            inner_dim=inner_dim(self.logvar_proj.in_features),
            has_sparse_code=isinstance(self.bottleneck, CompressedSensingBottleneck),
            slice_elements=slice_elements(self.device),
            on_cpu=self.device.type == "cpu",
        )

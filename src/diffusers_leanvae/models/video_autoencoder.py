"""Base class of the video autoencoders of this package: public methods, tiles, chunks, streams.

A model brings its network in up to two parts, `_encode_local` and `_encode_whole` (and back `_decode_whole` and
`_decode_local`), says how it compresses and how far its local layers reach. Tiles and chunks are exact: every part of
a result is computed from all that it depends on.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..checks import check_positive
from .memory_planning import MemoryModel, MemoryPlan, free_memory
from .pretrained import FILE_ARGUMENTS, PretrainedModel, load_single_file
from .temporal_cache import Chunk, TemporalCache, chunks
from .tiling import Canvas, Tile, TileSizes, check_layout, grid, time_chunks
from .traced_memory import TracedMemory
from .video_config import STATISTICS, VideoAutoencoderConfig, check_statistics
from .video_layers import is_autocast_on


# Of a network: all of it, the layers that are local in space, or those that see whole frames.
Part = Literal["all", "local", "whole"]
# Blocks of several widths and kinds are compiled once each, and where a stream is, once for each place in the network.
RECOMPILE_LIMIT = 256


class VideoAutoencoder(PretrainedModel, AutoencoderMixin):
    """Encode, decode and reconstruct videos and images, whole or as streams.

    Pixels are in `[-1, 1]`, videos `(batch_size, in_channels, num_frames, height, width)`; the first frame is an image
    of its own, every later group of `temporal_compression_ratio` frames shares one latent frame.

    Attributes:
        in_channels: Pixel channels.
        latent_channels: Channels of the latents.
        temporal_compression_ratio: Frames of a latent frame after the first.
        spatial_compression_ratio: Pixels of a latent along height and along width.
        encoder_halo: How far the local layers of the encoder reach in space, in latents.
        decoder_halo: How far those of the decoder reach.
        is_local: Whether all layers are local in space. Then a tile goes through all its chunks before the next one,
            and only its state is in use. Else a chunk goes through all its tiles before the next one, since layers at
            the latent size see whole frames.
        can_stream: Whether the model computes chunks exactly.
        num_frames_per_step: Frames of a first chunk in which clips are computed without gradients, tiling or not;
            `None` for whole clips.
        num_delayed_frames: How many frames a stream of `decode` is late, because the decoder looks ahead.
        use_slicing: Whether the videos of a batch are computed one after the other.
        use_tiling: Whether videos are computed in tiles and chunks; the sizes are those of [`enable_tiling`].
        tiling_budget: Bytes, or `"auto"`, by which tile sizes are chosen for every video; `None` for fixed sizes.
    """

    in_channels: int
    latent_channels: int
    temporal_compression_ratio: int
    spatial_compression_ratio: int
    encoder_halo: int
    decoder_halo: int
    is_local: bool = False
    can_stream: bool = True
    num_frames_per_step: int | None = None
    num_delayed_frames: int = 0
    num_frames_per_chunk: int

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]

    def __init__(self) -> None:
        super().__init__()
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_height = 256
        self.tile_sample_min_width = 256
        self.tiling_budget: int | Literal["auto"] | None = None

    def _name_layers(self, *kinds: type[nn.Module]) -> None:
        """Give the layers that remember something in a stream their names in it."""
        for name, module in self.named_modules():
            if isinstance(module, kinds):
                module.name = name  # type: ignore[assignment]

    # ---- what a model brings ----------------------------------------------------------------------------------------

    def _encode_local(self, x: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Layers of the encoder that are local in space: from pixels `(B, C, T, H, W)` to `(B, c, t, h, w)`.

        Of a model that is all local these are all layers, and the result are the moments `(B, 2z, t, h, w)`.
        """
        raise NotImplementedError

    def _encode_whole(self, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """The layers after these, which see whole frames, to moments `(B, 2z, t, h, w)`."""
        raise NotImplementedError

    def _decode_whole(self, z: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Layers of the decoder that see whole frames: from latents `(B, z, t, h, w)` to `(B, c, t, h, w)`."""
        raise NotImplementedError

    def _decode_local(self, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """The layers after these, local in space, to pixels `(B, C, T, H, W)`; of an all local model all layers."""
        raise NotImplementedError

    # ---- config, loading, compiling ---------------------------------------------------------------------------------

    @property
    def config(self) -> VideoAutoencoderConfig:
        ratios = self.temporal_compression_ratio, self.spatial_compression_ratio
        return VideoAutoencoderConfig.of(self._internal_dict, self.latent_channels, *ratios)

    def register_to_config(self, **kwargs: Any) -> None:
        """Change values of the config, as of diffusers: `register_to_config(scaling_factor=0.5)`.

        Raises:
            ValueError: If these are no statistics of the model's latents; a config with them could not be loaded.
        """
        if hasattr(self, "_internal_dict"):  # not the first call, before the constructor checks its arguments
            values = {**self._internal_dict, **kwargs}
            check_statistics(*(values[name] for name in STATISTICS))
        super().register_to_config(**kwargs)

    @property
    def temperal_downsample(self) -> tuple[bool, ...]:
        """The ratios as diffusers' Wan pipelines read them: for each halving of the size, whether it halves time too.

        The name is theirs.
        """
        num_temporal = round(math.log2(self.temporal_compression_ratio))
        num_spatial = round(math.log2(self.spatial_compression_ratio))
        return (False,) * (num_spatial - num_temporal) + (True,) * num_temporal

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks that the model repeats, by `torch.compile` with these arguments.

        Blocks of one class differ in width, so that they need more than the 8 versions that PyTorch allows for one
        piece of code by default: `recompile_limit` is 256 here, where `torch.compile` takes it.
        """
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            kwargs.setdefault("recompile_limit", RECOMPILE_LIMIT)
        super().compile_repeated_blocks(*args, **kwargs)

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | Path, torch_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Self:
        """Load one file of weights: an original release, training file or safetensors layout, or of `save_pretrained`.

        Args:
            pretrained_model_link_or_path: A file, a Hub file such as `Yumic/LeanVAE/LeanVAE-dim4.ckpt`, or its URL; a
                folder or Hub repository with one checkpoint in it. Arguments in a `config.json` of the original next
                to the file are obeyed; weights of `save_pretrained` need their own there, or `config`.
            torch_dtype: Dtype to cast the weights to; as stored if `None`.
            kwargs: As of diffusers: `config` (a folder, Hub repository or file with a config, or its values; for an
                original checkpoint they replace what it tells), `subfolder` (of `config`, or else of a folder or
                repository), `config_revision`, `device`, `disable_mmap`. `revision`, `token`, `cache_dir`,
                `force_download`, `local_files_only` go to `huggingface_hub`. Any other is a config value that the
                file cannot tell (`pixel_factor=1.0` for Wan-aligned LeanVAE weights,
                `temporal_interpolation="nearest"` for WF-VAE).

        Raises:
            ValueError: If there is no such checkpoint, it is not complete, or an argument is not legal.
        """
        options = {name: kwargs.pop(name) for name in FILE_ARGUMENTS if name in kwargs}
        unknown = set(kwargs) - set(inspect.signature(cls.__init__).parameters)
        if unknown:
            raise ValueError(f"`kwargs` must be Hub or config arguments, got {', '.join(sorted(unknown))}.")
        read = cls.conversion.read_original_checkpoint
        return load_single_file(cls, pretrained_model_link_or_path, read, torch_dtype, kwargs, options)

    # ---- sizes ------------------------------------------------------------------------------------------------------

    def num_latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video of `temporal_compression_ratio * n + 1` frames, or of a later chunk of one less."""
        return (num_frames - 1) // self.temporal_compression_ratio + 1

    def num_sample_frames(self, num_latent_frames: int) -> int:
        """Frames that `num_latent_frames` latent frames decode to."""
        return (num_latent_frames - 1) * self.temporal_compression_ratio + 1

    def check_tensor(self, x: Any, name: str) -> None:
        """Raise a `ValueError` unless `x` is a tensor on the model's device, or the model comes when it is called."""
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"`{name}` must be a `torch.Tensor`, got a `{type(x).__name__}`.")
        if torch.compiler.is_compiling() or x.device == getattr(next(self.parameters(), None), "device", x.device):
            return
        devices = {str(parameter.device) for parameter in self.parameters()}
        # Where a library has replaced what is called, or looks at it before, it may bring weights or input.
        is_moved = any("forward" in vars(module) or module._forward_pre_hooks for module in self.modules())
        if str(x.device) not in devices and not is_moved:
            raise ValueError(f"`{name}` must be on the model's device {' or '.join(devices)}, got one on {x.device}.")

    def check_sample(self, x: torch.Tensor, name: str, is_first: bool = True) -> None:
        """Raise a `ValueError` unless `x` are frames that [`encode`] takes, the first of a video or later ones."""
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"`{name}` must have shape (batch_size, {self.in_channels}, num_frames, height, width) or "
                f"(batch_size, {self.in_channels}, height, width), got {tuple(x.shape)}."
            )
        self._check_size(x.shape[2], x.shape[3], x.shape[4], is_first)
        self._check_dtype(x, name)

    def _check_size(self, num_frames: int, height: int, width: int, is_first: bool = True) -> None:
        ratio_t, ratio_s = self.temporal_compression_ratio, self.spatial_compression_ratio
        if is_first and num_frames % ratio_t != 1:
            raise ValueError(
                f"`num_frames` must be {ratio_t} * n + 1 (1, {ratio_t + 1}, {2 * ratio_t + 1}, ...), got {num_frames}."
            )
        if not is_first and (num_frames == 0 or num_frames % ratio_t):
            raise ValueError(
                f"`num_frames` must be {ratio_t} * n ({ratio_t}, {2 * ratio_t}, ...) in a later chunk of a stream, "
                f"got {num_frames}."
            )
        if height == 0 or width == 0 or height % ratio_s or width % ratio_s:
            raise ValueError(
                f"`height` and `width` must be positive multiples of {ratio_s}, got {height} and {width}."
            )

    def check_latents(self, z: torch.Tensor, name: str, can_be_empty: bool = False) -> None:
        """Raise a `ValueError` unless `z` are latents that [`decode`] takes."""
        if z.ndim != 5 or z.shape[1] != self.latent_channels or 0 in z.shape[3 if can_be_empty else 2 :]:
            raise ValueError(
                f"`{name}` must have shape (batch_size, {self.latent_channels}, num_latent_frames, latent_height, "
                f"latent_width) or (batch_size, {self.latent_channels}, latent_height, latent_width), got "
                f"{tuple(z.shape)}."
            )
        self._check_dtype(z, name)

    def _check_dtype(self, x: torch.Tensor, name: str) -> None:
        if not x.is_floating_point():
            raise ValueError(f"`{name}` must be a floating-point tensor, got {x.dtype}.")
        if x.dtype != self.dtype and not is_autocast_on(x.device.type):
            raise ValueError(f"`{name}` must have the model's dtype {self.dtype}, got {x.dtype}.")

    def _check_tile(
        self,
        height: Any,
        width: Any,
        num_frames: Any,
        names: tuple[str, str, str] = ("tile_sample_min_height", "tile_sample_min_width", "num_frames_per_chunk"),
    ) -> None:
        ratio_t, ratio_s = self.temporal_compression_ratio, self.spatial_compression_ratio
        for name, size in zip(names, (height, width), strict=False):
            if not isinstance(size, int) or size < ratio_s or size % ratio_s:
                raise ValueError(f"`{name}` must be a positive multiple of {ratio_s}, got {size!r}.")
        if not isinstance(num_frames, int) or num_frames <= ratio_t or num_frames % ratio_t != 1:
            raise ValueError(
                f"`{names[2]}` must be {ratio_t} * n + 1 with n >= 1 ({ratio_t + 1}, {2 * ratio_t + 1}, ...), got "
                f"{num_frames!r}."
            )

    def check_can_stream(self, name: str) -> None:
        """Raise a `ValueError` unless the model computes chunks exactly."""
        if not self.can_stream:
            raise ValueError(f"`{name}` needs `norm_type` 'layer_norm', got a model whose norms see the whole video.")

    # ---- public -----------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(
        self, x: torch.Tensor, return_dict: bool = True, cache: TemporalCache | None = None
    ) -> AutoencoderKLOutput | tuple:
        """Encode videos or images into the posterior over latents.

        Args:
            x: Videos in `[-1, 1]`, `(batch_size, in_channels, num_frames, height, width)`, or images
                `(batch_size, in_channels, height, width)`, which are videos of one frame.
            return_dict: Whether to return an `AutoencoderKLOutput` instead of a tuple.
            cache: State of a stream; `x` is then its next chunk: `4 * n + 1` frames the first time, `4 * n` later. The
                chunks' latents, concatenated, equal those of the whole video. `None` for a whole video.

        Returns:
            The posterior, `latent_dist`: mean and log-variance (clamped to [-30, 20]) of shape `(batch_size,
            latent_channels, 1 + (num_frames - 1) / 4, height / 8, width / 8)`, not normalised. 4 and 8 stand for the
            model's compression ratios here.

        Raises:
            ValueError: If shape, size, dtype or device of `x` is not legal.
        """
        self.check_tensor(x, "x")
        x = x.unsqueeze(2) if x.ndim == 4 else x
        is_first = cache is None or cache.num_latent_frames == 0
        self.check_sample(x, "x", is_first)
        if cache is not None:
            with cache.step(self.num_latent_frames(x.shape[2])):
                moments = self.encode_moments(x, is_first, cache)
        elif self.use_slicing and x.shape[0] > 1:
            moments = torch.cat([self.encode_moments(x_slice, True, None) for x_slice in x.split(1)])
        else:
            moments = self.encode_moments(x, True, None)
        self._refuse_wrong_gradients(moments)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, cache: TemporalCache | None = None
    ) -> DecoderOutput | tuple:
        """Decode latents, not normalised, to videos.

        Args:
            z: Latents `(batch_size, latent_channels, num_latent_frames, latent_height, latent_width)`, or of images
                without the third axis.
            return_dict: Whether to return a `DecoderOutput` instead of a tuple.
            cache: State of a stream; `z` is then its next chunk, of any number of latent frames. The chunks' frames,
                concatenated, equal those of all latents decoded at once. Where `num_delayed_frames` is not zero, so
                many frames come with the next chunk only: set `cache.is_last` before the last chunk, which may be
                empty ([`StreamingDecoder`] does that). `None` for a whole video.

        Returns:
            `sample`: videos of shape `(batch_size, in_channels, 4 * (num_latent_frames - 1) + 1, 8 * latent_height,
            8 * latent_width)`, nominally in `[-1, 1]`, not clamped; 4-D for 4-D latents. 4 and 8 stand for the model's
            compression ratios here.

        Raises:
            ValueError: If shape, dtype or device of `z` is not legal.
        """
        self.check_tensor(z, "z")
        is_image = z.ndim == 4
        z = z.unsqueeze(2) if is_image else z
        is_end = cache is not None and cache.is_last and cache.num_latent_frames > 0
        self.check_latents(z, "z", can_be_empty=is_end and self.num_delayed_frames > 0)
        if cache is not None:
            with cache.step(z.shape[2]):
                sample = self.decode_sample(z, cache.num_latent_frames == 0, cache)
        elif self.use_slicing and z.shape[0] > 1:
            sample = torch.cat([self.decode_sample(z_slice, True, None) for z_slice in z.split(1)])
        else:
            sample = self.decode_sample(z, True, None)
        self._refuse_wrong_gradients(sample)
        sample = sample.squeeze(2) if is_image else sample
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple:
        """Reconstruct videos or images.

        Args:
            sample: As `x` of [`encode`].
            sample_posterior: Whether to decode a sample of the posterior instead of its mean.
            return_dict: Whether to return a `DecoderOutput` instead of a tuple.
            generator: Random generator of the posterior sample.
        """
        posterior = self.encode(sample, return_dict=False)[0]
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        reconstruction = self.decode(z, return_dict=False)[0]
        reconstruction = reconstruction.squeeze(2) if sample.ndim == 4 else reconstruction
        return DecoderOutput(sample=reconstruction) if return_dict else (reconstruction,)

    def has_moving_weights(self) -> bool:
        """Tell whether a library brings weights to their device or dtype only when a layer of the model is called."""
        layers = (layer for layer in self.modules() if layer is not self)
        return any(hasattr(layer, "_hf_hook") or hasattr(layer, "_diffusers_hook") for layer in layers)

    def _refuse_wrong_gradients(self, output: torch.Tensor) -> None:
        """Let the backward pass fail where it would go through the empty memory that offloaded weights leave."""
        if torch.compiler.is_compiling() or not output.requires_grad:
            return
        registries = [getattr(module, "_diffusers_hook", None) for module in self.modules()]
        hooks = [registry.get_hook("group_offloading") for registry in registries if registry is not None]
        if any(hook is not None and hook.group.offload_to_disk_path for hook in hooks):
            output.register_hook(_refuse_gradient)

    # ---- tiles and chunks -------------------------------------------------------------------------------------------

    def enable_tiling(
        self,
        tile_sample_min_height: int | Literal["auto"] | None = None,
        tile_sample_min_width: int | None = None,
        num_frames_per_chunk: int | None = None,
        *,
        budget: int | None = None,
        tile_sample_min_num_frames: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
        tile_sample_stride_num_frames: int | None = None,
    ) -> None:
        """Encode and decode in tiles and in chunks of time, *exactly*: tiles carry a halo as wide as the receptive
        field and are cropped, never blended; chunks hand on what the layers must remember.

        Layers that see whole frames (the attention of WF-VAE and IV-VAE at the latent size) run on whole frames. Sizes
        that are not given stay as they are: at first 256 pixels and four latent frames after the image.

        Args:
            tile_sample_min_height: Height of a tile in pixels, without halo; a multiple of the spatial ratio. `"auto"`
                chooses all three sizes for every video by what memory its device has left.
            tile_sample_min_width: Width of a tile in pixels, without halo; a multiple of the spatial ratio.
            num_frames_per_chunk: Frames of the first chunk, `temporal_compression_ratio * n + 1` with n >= 1; later
                chunks have one frame less.
            budget: Bytes to choose the sizes by, instead of what is left (see `plan`).
            tile_sample_min_num_frames: Another name of `num_frames_per_chunk`, as in diffusers.
            tile_sample_stride_height: Taken for the sake of code written for diffusers' autoencoders, whose tiles
                overlap by their size less the stride and are blended there. It must be a positive number and has no
                effect: what a tile must see beyond its borders follows from the network.
            tile_sample_stride_width: Likewise.
            tile_sample_stride_num_frames: Likewise.

        Raises:
            ValueError: If a size is not legal, or the model cannot choose sizes or be computed in chunks.
        """
        self.check_can_stream("enable_tiling")
        is_auto = tile_sample_min_height == "auto" or budget is not None
        if is_auto and not (tile_sample_min_height in ("auto", None) and tile_sample_min_width is None):
            raise ValueError("`budget` and 'auto' must come without tile sizes, got both.")
        if num_frames_per_chunk is not None and tile_sample_min_num_frames is not None:
            raise ValueError("`tile_sample_min_num_frames` must come without `num_frames_per_chunk`, got both.")
        _check_budget(budget)
        strides = {
            "tile_sample_stride_height": tile_sample_stride_height,
            "tile_sample_stride_width": tile_sample_stride_width,
            "tile_sample_stride_num_frames": tile_sample_stride_num_frames,
        }
        for name, stride in strides.items():
            if stride is not None and not (isinstance(stride, (int, float)) and stride > 0):
                raise ValueError(f"`{name}` must be a positive number, got {stride!r}.")
        height = self.tile_sample_min_height if tile_sample_min_height in ("auto", None) else tile_sample_min_height
        width = self.tile_sample_min_width if tile_sample_min_width is None else tile_sample_min_width
        num_frames = tile_sample_min_num_frames if num_frames_per_chunk is None else num_frames_per_chunk
        num_frames = self.num_frames_per_chunk if num_frames is None else num_frames
        self._check_tile(height, width, num_frames)
        self.tile_sample_min_height, self.tile_sample_min_width = int(height), width
        self.num_frames_per_chunk = num_frames
        self.tiling_budget = ("auto" if budget is None else budget) if is_auto else None
        self.use_tiling = True

    def tile_sizes(
        self,
        batch_size: int,
        num_latent_frames: int,
        latent_height: int,
        latent_width: int,
        cache: TemporalCache | None = None,
    ) -> TileSizes:
        """Tiles and chunks of latents of these sizes, as the settings say; a stream keeps what it started with."""
        ratio_t, ratio_s = self.temporal_compression_ratio, self.spatial_compression_ratio
        layout = None
        if cache is not None:
            self.check_can_stream("cache")
            layout = cache.layout
            if layout is not None:
                self._check_tile(*layout, names=("layout[0]", "layout[1]", "layout[2]"))
        if layout is None and self.use_tiling and (cache is None or cache.num_latent_frames == 0):
            layout = (self.tile_sample_min_height, self.tile_sample_min_width, self.num_frames_per_chunk)
            if self.tiling_budget is not None:
                # What memory there is, a compiler cannot know.
                make_plan: Any = torch.compiler.disable(self.plan)
                plan = make_plan(
                    self.num_sample_frames(num_latent_frames),
                    latent_height * ratio_s,
                    latent_width * ratio_s,
                    budget=None if self.tiling_budget == "auto" else self.tiling_budget,
                    batch_size=max(batch_size, 1),
                )
                layout = plan[:3]
            if cache is not None:
                cache.layout = layout
        if layout is not None:
            return TileSizes(layout[0] // ratio_s, layout[1] // ratio_s, layout[2] // ratio_t)
        # A compiler would unroll the steps, for each number of frames anew.
        has_steps = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if self.num_frames_per_step is not None and has_steps:
            return TileSizes(num_latent_frames=self.num_frames_per_step // ratio_t)
        return TileSizes()

    def encode_moments(
        self,
        x: torch.Tensor,
        is_first: bool = True,
        cache: TemporalCache | None = None,
        make_canvas: Callable[..., Canvas] = Canvas,
    ) -> torch.Tensor:
        """The work of [`encode`]: moments `(batch_size, 2 * latent_channels, t, h, w)`.

        Args:
            x: Frames, five-dimensional, as [`check_sample`] wants them.
            is_first: Whether they start with the first frame of the video.
            cache: State of a stream, as of [`encode`].
            make_canvas: What makes the canvas on which tiles are put together; it also says which are computed here.
        """
        return self._compute(False, x, is_first, cache, make_canvas)

    def decode_sample(
        self,
        z: torch.Tensor,
        is_first: bool = True,
        cache: TemporalCache | None = None,
        make_canvas: Callable[..., Canvas] = Canvas,
    ) -> torch.Tensor:
        """The work of [`decode`]: pixels `(batch_size, in_channels, T, H, W)` of latents `(batch_size, ..., h, w)`.

        The other arguments are those of [`encode_moments`].
        """
        return self._compute(True, z, is_first, cache, make_canvas)

    def _compute(
        self,
        decoding: bool,
        source: torch.Tensor,
        is_first: bool,
        cache: TemporalCache | None,
        make_canvas: Callable[..., Canvas],
    ) -> torch.Tensor:
        """The work of [`encode_moments`] or [`decode_sample`]: all tiles of all chunks of `source`.

        No result of a tile has a name here: the last one would still be in memory while the next is computed.
        """
        ratio, is_last = self.spatial_compression_ratio, cache is None or cache.is_last
        scale_in, scale_out = (1, ratio) if decoding else (ratio, 1)
        length = source.shape[2] if decoding else self.num_latent_frames(source.shape[2])
        height, width = source.shape[3] // scale_in, source.shape[4] // scale_in
        sizes = self.tile_sizes(source.shape[0], length, height, width, cache)
        tiles = grid(height, width, sizes, self.decoder_halo if decoding else self.encoder_halo)
        bounds = time_chunks(length, sizes.num_latent_frames, is_first)
        layers = self._decode_local if decoding else self._encode_local

        if self.is_local:
            num_frames = self._frames(0, length, is_first).stop if decoding else length
            canvas = make_canvas(num_frames, height, width, scale_out)
            for tile, state in _with_states(canvas.choose(tiles), sizes, cache):
                for start, stop, chunk in chunks(state, bounds, is_first, is_last):
                    latents, frames = slice(start, stop), self._frames(start, stop, is_first)
                    taken, given = (latents, frames) if decoding else (frames, latents)
                    part = tile.read(source[:, :, taken], scale_in)
                    canvas.put(tile.crop(layers(part, chunk), scale_out), given, tile)
            return canvas.take()

        outputs = []
        for start, stop, chunk in chunks(cache, bounds, is_first, is_last):
            canvas = make_canvas(None, height, width, scale_out)
            hidden = source[:, :, slice(start, stop) if decoding else self._frames(start, stop, is_first)]
            if decoding:
                hidden = self._decode_whole(hidden, chunk)
            for tile, state in _with_states(canvas.choose(tiles), sizes, chunk):
                canvas.put(tile.crop(layers(tile.read(hidden, scale_in), state), scale_out), slice(None), tile)
            hidden = canvas.take()
            outputs.append(hidden if decoding else self._encode_whole(hidden, chunk))
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]

    def _frames(self, start: int, stop: int, is_first: bool) -> slice:
        """The frames of some latent frames; the first latent frame of a video has one only."""
        ratio = self.temporal_compression_ratio
        missing = (ratio - 1) * is_first
        return slice(max(start * ratio - missing, 0), max(stop * ratio - missing, 0))

    # ---- memory -----------------------------------------------------------------------------------------------------

    def plan(
        self,
        num_frames: int,
        height: int,
        width: int,
        dtype: torch.dtype | None = None,
        budget: int | None = None,
        batch_size: int = 1,
        tile: tuple[int, int, int] | None = None,
    ) -> MemoryPlan:
        """Choose tiles and chunks that fit into a budget with the least work, and predict their peak memory.

        Args:
            num_frames: Frames of the video, `temporal_compression_ratio * n + 1`.
            height: Height in pixels, a multiple of the spatial ratio.
            width: Width in pixels, a multiple of the spatial ratio.
            dtype: Dtype of the computation, the model's by default.
            budget: Bytes above weights and input; by default what the model's device has left.
            batch_size: Videos at once.
            tile: Height, width and frames of a tile: predict for these instead of choosing.

        Raises:
            ValueError: If nothing fits, or an argument is not legal.
        """
        self.check_can_stream("plan")
        shape = (batch_size, num_frames, height, width)
        for name, size in zip(("batch_size", "num_frames", "height", "width"), shape, strict=True):
            check_positive(name, size)
        self._check_size(num_frames, height, width)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"`dtype` must be a floating-point dtype, got {dtype!r}.")
        _check_budget(budget)
        item_bytes = (dtype or self.dtype).itemsize
        model = self.memory_model()
        if tile is not None:
            check_layout("tile", tile)
            self._check_tile(*tile, names=("tile[0]", "tile[1]", "tile[2]"))
            return model.plan(shape, (tile[0], tile[1]), tile[2], item_bytes)
        return model.fit(shape, item_bytes, free_memory(self.device) if budget is None else budget)

    def memory_model(self) -> MemoryModel:
        """Return a model of the memory that videos take; [`plan`] and the functions for files ask it."""
        return TracedMemory(
            **self._memory_sizes(),
            model_class=type(self),
            config=self.to_json_string(),
            on_cpu=self.device.type == "cpu",
        )

    def _memory_sizes(self) -> dict[str, Any]:
        """The attributes of a [`MemoryModel`]."""
        return {
            "latent_channels": self.latent_channels,
            "frame_elements": self.in_channels * self.spatial_compression_ratio**2,
            "ratio_t": self.temporal_compression_ratio,
            "ratio_s": self.spatial_compression_ratio,
            "encoder_halo": self.encoder_halo,
            "decoder_halo": self.decoder_halo,
            "is_local": self.is_local,
            "num_frames_per_step": self.num_frames_per_step,
        }

    # ---- what only some models have ---------------------------------------------------------------------------------

    def fuse(self, kernels: Literal["auto", "torch", "cpp", "triton"] = "auto") -> None:
        """Prepare the weights for fast inference, where a model can."""
        raise ValueError(
            f"`fuse` needs an `AutoencoderKLLeanVAE`, got an `{type(self).__name__}`; `compile_repeated_blocks` takes "
            "every model."
        )

    def unfuse(self) -> None:
        """Undo [`fuse`]: free the prepared weights, if there are any."""


def _check_budget(budget: Any) -> None:
    if budget is not None and not (isinstance(budget, int) and budget > 0):
        raise ValueError(f"`budget` must be a positive number of bytes, got {budget!r}.")


def _with_states(tiles: list[Tile], sizes: TileSizes, state: Any) -> Iterator[tuple[Tile, Any]]:
    """Each tile with its part of `state`: of a stream, of a chunk, or `None`."""
    for tile in tiles:
        if sizes.height is None or state is None:  # the whole frame has the state itself
            yield tile, state
            continue
        with state.tile(tile) as part:
            yield tile, part


def _refuse_gradient(gradient: torch.Tensor) -> None:
    raise ValueError(
        "`offload_to_disk_path` must not be given to `enable_group_offload` for gradients, which need the weights in "
        "memory."
    )

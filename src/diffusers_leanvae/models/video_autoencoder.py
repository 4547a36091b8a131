"""What the video autoencoders of this package have in common: their public methods, and what these demand.

A model brings `_encode` and `_decode` of a checked chunk, and says how it compresses. [`TiledVideoAutoencoderMixin`]
makes them, with chunks of time and tiles, for models that attend within frames.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..conversion.leanvae import HUB_ARGUMENTS, resolve_checkpoint
from .temporal_cache import TemporalCache, tile_chunk
from .tiling import grid, time_chunks


UNTILED = 2**62  # size of a tile that holds every frame
# Of a network: all of it, the layers that are local in space, or those that see whole frames.
Part = Literal["all", "local", "whole"]


def check_statistics(latent_channels: int, latents_mean: list[float] | None, latents_std: list[float] | None) -> None:
    for name, statistics in (("latents_mean", latents_mean), ("latents_std", latents_std)):
        if statistics is not None and len(statistics) != latent_channels:
            raise ValueError(f"`{name}` must have {latent_channels} entries, got {len(statistics)}.")


class VideoAutoencoderMixin:
    r"""Encode, decode and reconstruct videos and images, whole or as streams.

    Pixels are in `[-1, 1]`, videos `(batch_size, in_channels, num_frames, height, width)`; the first frame is an image
    of its own, every later group of `temporal_compression_ratio` frames shares one latent frame.

    Attributes:
        in_channels: Pixel channels.
        latent_channels: Channels of the latents.
        temporal_compression_ratio: Frames of a latent frame after the first.
        spatial_compression_ratio: Pixels of a latent along height and along width.
        num_delayed_frames: How many frames a stream of `decode` is late, because the decoder looks ahead.
        use_slicing: Whether the videos of a batch are computed one after the other.
    """

    in_channels: int
    latent_channels: int
    temporal_compression_ratio: int
    spatial_compression_ratio: int
    num_delayed_frames: int = 0
    use_slicing: bool = False
    dtype: torch.dtype

    _original_name: ClassVar[str]  # of the model that `_read_original_checkpoint` reads, for messages
    _read_original_checkpoint: ClassVar[Callable[[Path], tuple[dict[str, Any], dict[str, torch.Tensor]]]]

    def _encode(self, x: torch.Tensor, is_first: bool, cache: TemporalCache | None) -> torch.Tensor:
        r"""Moments `(B, 2z, t, h, w)` of frames; `is_first` if they start with the image frame."""
        raise NotImplementedError

    def _decode(self, z: torch.Tensor, is_first: bool, cache: TemporalCache | None) -> torch.Tensor:
        r"""Pixels `(B, C, T, H, W)` of latent frames; `is_first` if they start with the image's."""
        raise NotImplementedError

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | Path, torch_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Self:
        r"""Load an original checkpoint: release, training file or safetensors layout.

        Args:
            pretrained_model_link_or_path: A file, a Hub file such as `Yumic/LeanVAE/LeanVAE-dim4.ckpt`, or its URL.
            torch_dtype: Dtype to cast the weights to; as stored if `None`.
            kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` go to `huggingface_hub`; any
                other is a config value that the file cannot tell (`pixel_factor=1.0` for Wan-aligned LeanVAE weights,
                `temporal_interpolation="nearest"` for WF-VAE).
        """
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        unknown = set(kwargs) - set(inspect.signature(cls.__init__).parameters)
        if unknown:
            raise ValueError(f"`kwargs` must be Hub or config arguments, got {', '.join(sorted(unknown))}.")
        path = resolve_checkpoint(pretrained_model_link_or_path, **hub_kwargs)
        config, state_dict = cls._read_original_checkpoint(path)
        model: Any = cls(**(config | kwargs))
        if torch_dtype is not None:
            state_dict = {key: tensor.to(torch_dtype) for key, tensor in state_dict.items()}
        try:
            model.load_state_dict(state_dict, strict=True, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split()).rstrip(". ")
            raise ValueError(
                f"`pretrained_model_link_or_path` must be a complete {cls._original_name} checkpoint: {reason}."
            ) from None
        return model.eval()

    # ---- sizes ------------------------------------------------------------------------------------------------------

    def num_latent_frames(self, num_frames: int) -> int:
        r"""Latent frames of a video of `num_frames` = `temporal_compression_ratio * n + 1` frames."""
        return (num_frames - 1) // self.temporal_compression_ratio + 1

    def num_sample_frames(self, num_latent_frames: int) -> int:
        r"""Frames that `num_latent_frames` latent frames decode to."""
        return (num_latent_frames - 1) * self.temporal_compression_ratio + 1

    def _check_sample(self, x: torch.Tensor, name: str, is_first: bool) -> None:
        ratio_t, ratio_s = self.temporal_compression_ratio, self.spatial_compression_ratio
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"`{name}` must have shape (batch_size, {self.in_channels}, num_frames, height, width) or "
                f"(batch_size, {self.in_channels}, height, width), got {tuple(x.shape)}."
            )
        if is_first and x.shape[2] % ratio_t != 1:
            raise ValueError(
                f"`num_frames` must be {ratio_t} * n + 1 (1, {ratio_t + 1}, {2 * ratio_t + 1}, ...), got {x.shape[2]}."
            )
        if not is_first and (x.shape[2] == 0 or x.shape[2] % ratio_t):
            raise ValueError(
                f"`num_frames` must be {ratio_t} * n ({ratio_t}, {2 * ratio_t}, ...) in a later chunk of a stream, "
                f"got {x.shape[2]}."
            )
        if x.shape[3] == 0 or x.shape[4] == 0 or x.shape[3] % ratio_s or x.shape[4] % ratio_s:
            raise ValueError(
                f"`height` and `width` must be positive multiples of {ratio_s}, got {x.shape[3]} and {x.shape[4]}."
            )
        self._check_dtype(x, name)

    def _check_latents(self, z: torch.Tensor, name: str, can_be_empty: bool = False) -> None:
        smallest = min(z.shape[3:] if can_be_empty else z.shape[2:], default=0)
        if z.ndim != 5 or z.shape[1] != self.latent_channels or smallest < 1:
            raise ValueError(
                f"`{name}` must have shape (batch_size, {self.latent_channels}, num_latent_frames, latent_height, "
                f"latent_width) or (batch_size, {self.latent_channels}, latent_height, latent_width), got "
                f"{tuple(z.shape)}."
            )
        self._check_dtype(z, name)

    def _check_dtype(self, x: torch.Tensor, name: str) -> None:
        if not x.is_floating_point():
            raise ValueError(f"`{name}` must be a floating-point tensor, got {x.dtype}.")
        if x.dtype != self.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"`{name}` must have the model's dtype {self.dtype}, got {x.dtype}.")

    def _check_tile(self, height: Any, width: Any, num_frames: int) -> None:
        ratio_t, ratio_s = self.temporal_compression_ratio, self.spatial_compression_ratio
        for name, size in (("tile_sample_min_height", height), ("tile_sample_min_width", width)):
            if not isinstance(size, int) or size < ratio_s or size % ratio_s:
                raise ValueError(f"`{name}` must be a positive multiple of {ratio_s}, got {size!r}.")
        if num_frames <= ratio_t or num_frames % ratio_t != 1:
            raise ValueError(
                f"`num_frames_per_chunk` must be {ratio_t} * n + 1 with n >= 1 ({ratio_t + 1}, {2 * ratio_t + 1}, "
                f"...), got {num_frames}."
            )

    # ---- public -----------------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(
        self, x: torch.Tensor, return_dict: bool = True, cache: TemporalCache | None = None
    ) -> AutoencoderKLOutput | tuple:
        r"""Encode videos or images into the posterior over latents.

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
            ValueError: If shape, size or dtype of `x` is not legal.
        """
        x = x.unsqueeze(2) if x.ndim == 4 else x
        is_first = cache is None or cache.num_latent_frames == 0
        self._check_sample(x, "x", is_first)
        if cache is not None:
            with cache.step(-(-x.shape[2] // self.temporal_compression_ratio)):
                moments = self._encode(x, is_first, cache)
        elif self.use_slicing and x.shape[0] > 1:
            moments = torch.cat([self._encode(x_slice, True, None) for x_slice in x.split(1)])
        else:
            moments = self._encode(x, True, None)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, cache: TemporalCache | None = None
    ) -> DecoderOutput | tuple:
        r"""Decode latents, not normalised, to videos.

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
            ValueError: If shape or dtype of `z` is not legal.
        """
        is_image = z.ndim == 4
        z = z.unsqueeze(2) if is_image else z
        is_end = cache is not None and cache.is_last and cache.num_latent_frames > 0
        self._check_latents(z, "z", can_be_empty=is_end and self.num_delayed_frames > 0)
        if cache is not None:
            with cache.step(z.shape[2]) as is_first:
                sample = self._decode(z, is_first, cache)
        elif self.use_slicing and z.shape[0] > 1:
            sample = torch.cat([self._decode(z_slice, True, None) for z_slice in z.split(1)])
        else:
            sample = self._decode(z, True, None)
        sample = sample.squeeze(2) if is_image else sample
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple:
        r"""Reconstruct videos or images.

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


class TiledVideoAutoencoderMixin(VideoAutoencoderMixin):
    r"""For models whose layers at the latent size see whole frames (attention), while all others are local in space.

    `encoder` and `decoder` are called with `is_first`, `cache` and the [`Part`] that is wanted of them.

    Attributes:
        encoder_halo: How far the local layers of the encoder reach, in latents.
        decoder_halo: How far those of the decoder reach.
        can_stream: Whether the model computes chunks exactly.
        num_frames_per_step: Frames of a first chunk in which clips are computed without gradients, tiling or not;
            `None` for whole clips.
    """

    encoder: Any
    decoder: Any
    encoder_halo: int
    decoder_halo: int
    can_stream: bool = True
    num_frames_per_step: int | None = None
    use_tiling: bool = False
    tile_sample_min_height: int = 512
    tile_sample_min_width: int = 512
    num_frames_per_chunk: int = 17

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        num_frames_per_chunk: int | None = None,
    ) -> None:
        r"""Encode and decode in chunks of time and, where the network is local in space, in tiles, *exactly*: tiles
        carry a halo as wide as the receptive field and are cropped, never blended. The layers at the latent size,
        whose attention sees the whole frame, run whole.

        Args:
            tile_sample_min_height: Height of a tile in pixels, without halo; a multiple of the spatial ratio.
            tile_sample_min_width: Width of a tile in pixels, without halo; a multiple of the spatial ratio.
            num_frames_per_chunk: Frames of the first chunk, `temporal_compression_ratio * n + 1` with n >= 1; later
                chunks have one frame less.
        """
        self._check_can_stream("enable_tiling")
        height = self.tile_sample_min_height if tile_sample_min_height is None else tile_sample_min_height
        width = self.tile_sample_min_width if tile_sample_min_width is None else tile_sample_min_width
        num_frames = self.num_frames_per_chunk if num_frames_per_chunk is None else num_frames_per_chunk
        self._check_tile(height, width, num_frames)
        self.tile_sample_min_height, self.tile_sample_min_width = height, width
        self.num_frames_per_chunk = num_frames
        self.use_tiling = True

    def _check_can_stream(self, name: str) -> None:
        if not self.can_stream:
            raise ValueError(f"`{name}` needs `norm_type` 'layer_norm', got a model whose norms see the whole video.")

    def _layout(self, cache: TemporalCache | None) -> tuple[int, int, int] | None:
        r"""Height and width of tiles, and frames per chunk; a stream keeps what it started with."""
        layout = None
        if cache is not None:
            self._check_can_stream("cache")
            layout = cache.layout
        if layout is None and self.use_tiling and (cache is None or cache.num_latent_frames == 0):
            layout = (self.tile_sample_min_height, self.tile_sample_min_width, self.num_frames_per_chunk)
            if cache is not None:
                cache.layout = layout
        if layout is None and self.num_frames_per_step is not None and not torch.is_grad_enabled():
            return UNTILED, UNTILED, self.num_frames_per_step
        return layout

    def _encode(self, x: torch.Tensor, is_first: bool, cache: TemporalCache | None) -> torch.Tensor:
        layout, ratio_t, ratio_s = self._layout(cache), self.temporal_compression_ratio, self.spatial_compression_ratio
        outputs, missing = [], (ratio_t - 1) * is_first  # frames of the first latent frame, which has one
        for start, stop, state in self._chunks(-(-x.shape[2] // ratio_t), is_first, cache, layout):
            local = partial(self.encoder, is_first=is_first and start == 0, part="local")
            part = x[:, :, max(start * ratio_t - missing, 0) : stop * ratio_t - missing]
            hidden = self._in_tiles(local, part, (ratio_s, 1), self.encoder_halo, layout, state)
            outputs.append(self.encoder(hidden, cache=state, part="whole"))
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]

    def _decode(self, z: torch.Tensor, is_first: bool, cache: TemporalCache | None) -> torch.Tensor:
        layout, outputs = self._layout(cache), []
        for start, stop, state in self._chunks(z.shape[2], is_first, cache, layout):
            local = partial(self.decoder, is_first=is_first and start == 0, part="local")
            hidden = self.decoder(z[:, :, start:stop], cache=state, part="whole")
            scales = (1, self.spatial_compression_ratio)
            outputs.append(self._in_tiles(local, hidden, scales, self.decoder_halo, layout, state))
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]

    def _chunks(
        self, num_latent_frames: int, is_first: bool, cache: TemporalCache | None, layout: tuple[int, int, int] | None
    ) -> Iterator[tuple[int, int, TemporalCache | None]]:
        r"""Bounds of the chunks in latent frames, each with its cache, which knows whether anything follows."""
        if layout is None or num_latent_frames == 0:
            yield 0, num_latent_frames, cache
            return
        chunks = time_chunks(num_latent_frames, layout[2] // self.temporal_compression_ratio, is_first)
        if cache is None and len(chunks) > 1:
            cache = TemporalCache()
            cache.is_last = True
        is_last = cache is not None and cache.is_last
        for start, stop in chunks:
            if cache is not None:
                cache.is_last = is_last and stop == num_latent_frames
            yield start, stop, cache

    def _in_tiles(
        self,
        function: Callable[..., torch.Tensor],
        x: torch.Tensor,
        scales: tuple[int, int],
        halo: int,
        layout: tuple[int, int, int] | None,
        cache: TemporalCache | None,
    ) -> torch.Tensor:
        r"""`function` of `x` and a cache, tile by tile; `scales`: elements of a latent in its input and its output."""
        if layout is None or layout[0] == UNTILED:
            return function(x, cache=cache)
        source, target = scales
        height, width = x.shape[3] // source, x.shape[4] // source
        tile = [size // self.spatial_compression_ratio for size in layout[:2]]
        output: torch.Tensor | None = None
        for rows, columns in grid(height, width, tile, halo):
            with tile_chunk(cache, rows, columns) as state:
                part = function(x[..., rows.source(source), columns.source(source)], cache=state)
            part = part[..., rows.crop(target), columns.crop(target)]
            if output is None:
                output = part.new_empty(*part.shape[:3], height * target, width * target)
            output[..., rows.target(target), columns.target(target)] = part
        assert output is not None
        return output

"""An autoencoder of diffusers-leanvae as the `VAE` that ComfyUI's nodes hand on, its own ones included.

ComfyUI keeps frames as `(num_frames, height, width, channels)` in `[0, 1]` and latents of videos as `(batch_size,
channels, num_latent_frames, latent_height, latent_width)`, both in float32 and in the memory of the processor. Videos
pass the network in steps, so that what they take on the GPU does not depend on their length.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from diffusers_leanvae import Padding, StreamingDecoder, StreamingEncoder, TemporalCache, crop_sample, pad_sample
from diffusers_leanvae.checks import check_positive, is_integer
from diffusers_leanvae.inference.padding import pad_frames
from diffusers_leanvae.latents import denormalize_latents, normalize_latents
from diffusers_leanvae.models.video_autoencoder import VideoAutoencoder
from diffusers_leanvae.video_io.pixels import sample_to_unit


NUM_FRAMES_PER_STEP = 16
FALLBACK_TILE = 256  # pixels, when whole frames do not fit on the device
Result = TypeVar("Result")


class Network(torch.nn.Module):
    """The autoencoder inside a module whose `device` can be set.

    ComfyUI writes down there where it has put a model; models of diffusers have a `device` that can only be read.
    """

    def __init__(self, autoencoder: VideoAutoencoder, device: torch.device) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.device = device


class LeanVAE:
    """What ComfyUI calls a VAE, with exact tiles, steps in time and any number and size of frames.

    Frames that the network cannot take as they are become more: edges are mirrored at the bottom and right, the last
    frame is repeated. [`decode_latents`] cuts that off again if it is told the size.

    Args:
        autoencoder: The model, in the dtype that it computes in.
        is_normalized: Whether latents are normalised with the statistics in the model's config. ComfyUI's diffusion
            models do that themselves, and want latents that are not.
    """

    latent_dim = 3
    not_video = False

    def __init__(self, autoencoder: VideoAutoencoder, is_normalized: bool = False) -> None:
        self.autoencoder = autoencoder
        self.is_normalized = is_normalized
        self.vae_dtype = autoencoder.dtype
        self.device = comfy.model_management.vae_device()
        self.output_device = comfy.model_management.intermediate_device()
        offload_device = comfy.model_management.vae_offload_device()
        self.first_stage_model = Network(autoencoder.to(offload_device), offload_device)
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=offload_device
        )
        self.latent_channels = autoencoder.latent_channels
        self.output_channels = autoencoder.in_channels
        ratio_t, ratio_s = autoencoder.temporal_compression_ratio, autoencoder.spatial_compression_ratio
        self.downscale_index_formula = self.upscale_index_formula = (ratio_t, ratio_s, ratio_s)
        self.downscale_ratio = (lambda num_frames: math.ceil((num_frames - 1) / ratio_t) + 1, ratio_s, ratio_s)
        self.upscale_ratio = (autoencoder.num_sample_frames, ratio_s, ratio_s)

    def latent_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, height and width that videos of any size are encoded to."""
        ratio = self.autoencoder.spatial_compression_ratio
        return self.downscale_ratio[0](num_frames), -(-height // ratio), -(-width // ratio)

    def sample_size(self, num_latent_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames, height and width that latents are decoded to."""
        ratio = self.autoencoder.spatial_compression_ratio
        return self.autoencoder.num_sample_frames(num_latent_frames), height * ratio, width * ratio

    def frames_as_videos(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return frames with an axis of videos, which those of one video may lack.

        Raises:
            ValueError: If they are no frames for this model.
        """
        num_channels = self.autoencoder.in_channels
        # Integers are pixels of 0 to 255, where an IMAGE has 0 to 1.
        if not (_is_batch(pixels) and pixels.is_floating_point() and pixels.shape[-1] >= num_channels):
            raise ValueError(
                f"`pixels` must be floating-point frames of shape (num_frames, height, width, {num_channels}), none "
                f"of these 0, got {_describe(pixels)}."
            )
        return pixels[None] if pixels.ndim == 4 else pixels

    def as_videos(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents with an axis of time, which those of images may lack.

        Raises:
            ValueError: If they are not of this model.
        """
        if not _is_batch(latents) or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"`samples` must have shape (batch_size, {self.latent_channels}, num_latent_frames, latent_height, "
                f"latent_width) for this model, none of these 0, got {_describe(latents)}."
            )
        return latents.unsqueeze(2) if latents.ndim == 4 else latents

    # ---- what ComfyUI's own nodes call ------------------------------------------------------------------------------

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """Encode frames as one video; see [`encode_frames`]."""
        return self.encode_tiled(pixel_samples)

    def encode_tiled(
        self,
        pixel_samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        """Encode frames in tiles.

        Args:
            pixel_samples: `(num_frames, height, width, channels)`, or several videos with an axis before these.
            tile_x: Width of a tile in pixels.
            tile_y: Height of a tile in pixels; whole frames without both.
            overlap: Taken from ComfyUI, which blends tiles; these are exact, and it has no effect.
            tile_t: Frames of a step.
            overlap_t: Likewise without effect.
        """
        pixel_samples = self.frames_as_videos(pixel_samples)
        size = tuple(pixel_samples.shape[1:4])
        padded = self.sample_size(*self.latent_size(*size))
        if padded != size:
            logging.warning(
                f"{size[0]} frames of {size[2]}x{size[1]} become {padded[0]} of {padded[2]}x{padded[1]}, by mirrored "
                "edges and a repeated last frame. LeanVAE Encode and LeanVAE Decode cut that off again."
            )
        tile = (tile_y, tile_x) if tile_y and tile_x else None
        return self.encode_frames(pixel_samples, tile, NUM_FRAMES_PER_STEP if tile_t is None else tile_t)

    def decode(self, samples_in: torch.Tensor, vae_options: dict[str, Any] | None = None, **_: Any) -> torch.Tensor:
        """Decode latents; see [`decode_latents`]. Options are those of ComfyUI's own models."""
        return self.decode_latents(samples_in)

    def decode_tiled(
        self,
        samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> torch.Tensor:
        """Decode latents in exact tiles. The arguments are those of [`encode_tiled`], in latents."""
        ratio_t, ratio_s = self.autoencoder.temporal_compression_ratio, self.autoencoder.spatial_compression_ratio
        tile = (tile_y * ratio_s, tile_x * ratio_s) if tile_y and tile_x else None
        return self.decode_latents(samples, tile, NUM_FRAMES_PER_STEP if tile_t is None else tile_t * ratio_t)

    def spacial_compression_encode(self) -> int:
        return self.autoencoder.spatial_compression_ratio

    spacial_compression_decode = spacial_compression_encode

    def temporal_compression_decode(self) -> int:
        return self.autoencoder.temporal_compression_ratio

    def get_sd(self) -> dict[str, torch.Tensor]:
        return self.autoencoder.state_dict()

    def throw_exception_if_invalid(self) -> None:
        """Do nothing: what is no autoencoder has been refused when it was loaded."""

    def is_dynamic(self) -> bool:
        return self.patcher.is_dynamic()

    # ---- what they and the nodes of this pack share -----------------------------------------------------------------

    def encode_frames(
        self,
        pixels: torch.Tensor,
        tile: tuple[int, int] | None = None,
        num_frames_per_step: int = NUM_FRAMES_PER_STEP,
    ) -> torch.Tensor:
        """Encode frames to posterior means.

        Args:
            pixels: One video `(num_frames, height, width, channels)` in `[0, 1]`, or several, with an axis before
                these. Channels after those of the model, such as alpha, are left out.
            tile: Height and width of a tile in pixels, `None` for whole frames; the result does not depend on it.
            num_frames_per_step: Frames that pass the network at once, nor on this.

        Returns:
            `(batch_size, channels, num_latent_frames, latent_height, latent_width)` in float32.
        """
        videos = self.frames_as_videos(pixels)
        num_frames, height, width = videos.shape[1:4]
        # Images are videos of one frame, as many of which are computed together as frames of a video are.
        groups = videos.split(max(num_frames_per_step // num_frames, 1))
        latents = [
            self.encode_stream(
                lambda group=group: group.split(num_frames_per_step, dim=1),
                (len(group) * num_frames, height, width),
                tile,
                num_frames_per_step,
            )
            for group in groups
        ]
        return torch.cat(latents)

    @torch.no_grad()
    def encode_stream(
        self,
        read: Callable[[], Iterable[torch.Tensor]],
        size: tuple[int | None, int, int],
        tile: tuple[int, int] | None = None,
        num_frames_per_step: int = NUM_FRAMES_PER_STEP,
    ) -> torch.Tensor:
        """Encode videos that come in pieces.

        Args:
            read: Starts them: pieces `(batch_size, n, height, width, channels)` in `[0, 1]`.
            size: Number of frames of all videos if known, height and width.
            tile: As of [`encode_frames`].
            num_frames_per_step: As of [`encode_frames`].
        """
        vae = self.autoencoder

        def run(cache: TemporalCache, step: int) -> torch.Tensor:
            samples = (self._to_sample(piece) for piece in _watched(read(), size[0], dim=1))
            if not vae.can_stream:
                sample, _ = pad_sample(
                    torch.cat([*samples], dim=2), vae.temporal_compression_ratio, vae.spatial_compression_ratio
                )
                return self._keep_latents(vae.encode(sample, return_dict=False)[0].mode())
            encoder = StreamingEncoder(vae, step, cache=cache)
            steps = (encoder.push(pad_frames(sample, vae.spatial_compression_ratio)) for sample in samples)
            latents = [self._keep_latents(z) for z in steps if z is not None]
            last = encoder.flush()
            return torch.cat(latents if last is None else [*latents, self._keep_latents(last)], dim=2)

        return self._run(run, size, tile, num_frames_per_step, decode=False)

    def decode_latents(
        self,
        latents: torch.Tensor,
        tile: tuple[int, int] | None = None,
        num_frames_per_step: int = NUM_FRAMES_PER_STEP,
        size: tuple[int, int, int] | None = None,
    ) -> torch.Tensor:
        """Decode latents to videos.

        Args:
            latents: `(batch_size, channels, num_latent_frames, latent_height, latent_width)`; of images also without
                the third axis.
            tile: As of [`encode_frames`].
            num_frames_per_step: As of [`encode_frames`].
            size: Frames, height and width to cut the videos to; uncut by default.

        Returns:
            `(batch_size, num_frames, height, width, channels)` in `[0, 1]`, float32.
        """
        latents = self.as_videos(latents)
        size = size or self.sample_size(*latents.shape[2:])
        videos = torch.empty(len(latents), *size, self.output_channels, device=self.output_device)
        per_group = max(num_frames_per_step // self.upscale_ratio[0](latents.shape[2]), 1)
        for group, target in zip(latents.split(per_group), videos.split(per_group), strict=True):

            def fill(pieces: Iterator[torch.Tensor], target: torch.Tensor = target) -> None:
                start = 0
                for frames in pieces:
                    target[:, start : start + frames.shape[1]] = frames
                    start += frames.shape[1]

            self.decode_stream(group, fill, size, tile, num_frames_per_step)
        return videos

    @torch.no_grad()
    def decode_stream(
        self,
        latents: torch.Tensor,
        write: Callable[[Iterator[torch.Tensor]], None],
        size: tuple[int, int, int],
        tile: tuple[int, int] | None = None,
        num_frames_per_step: int = NUM_FRAMES_PER_STEP,
    ) -> None:
        """Decode latents, and hand the videos on in pieces.

        Args:
            latents: `(batch_size, channels, num_latent_frames, latent_height, latent_width)`.
            write: Takes the pieces, `(batch_size, n, height, width, channels)` in `[0, 1]`. It is called again, from
                the first piece on, if whole frames do not fit on the device.
            size: Frames, height and width to cut the videos to.
            tile: As of [`encode_frames`].
            num_frames_per_step: As of [`encode_frames`].
        """
        vae = self.autoencoder

        def run(cache: TemporalCache, step: int) -> None:
            step //= vae.temporal_compression_ratio
            write(_cut(self._decoded(latents, cache, step), Padding(*size)))

        num_frames, height, width = self.sample_size(*latents.shape[2:])
        self._run(run, (len(latents) * num_frames, height, width), tile, num_frames_per_step, decode=True)

    def _decoded(self, latents: torch.Tensor, cache: TemporalCache, step: int) -> Iterator[torch.Tensor]:
        vae = self.autoencoder
        if not vae.can_stream:
            yield vae.decode(self._to_latents(latents), return_dict=False)[0]
            return
        decoder = StreamingDecoder(vae, step, cache=cache)
        for piece in _watched(latents.split(step, dim=2), len(latents) * latents.shape[2], dim=2):
            frames = decoder.push(self._to_latents(piece))
            if frames is not None:
                yield frames
        frames = decoder.flush()
        if frames is not None:
            yield frames

    def _run(
        self,
        run: Callable[[TemporalCache, int], Result],
        size: tuple[int | None, int, int],
        tile: tuple[int, int] | None,
        num_frames_per_step: int,
        decode: bool,
    ) -> Result:
        """Run with a fresh stream, and once more in tiles where whole frames do not fit on the device."""
        vae, (num_frames, height, width) = self.autoencoder, size
        check_positive("frames_per_step", num_frames_per_step)
        for side in tile or ():
            if not is_integer(side) or side < 1:
                raise ValueError(f"`tile_size` must be a positive integer, or 0 for whole frames, got {side!r}.")
        if tile is not None and not vae.can_stream:
            raise ValueError(f"`tile_size` must be 0 for this model, whose norms see the whole video, got {tile[0]}.")
        ratio_t, ratio_s = vae.temporal_compression_ratio, vae.spatial_compression_ratio
        step = max(min(num_frames_per_step, num_frames or num_frames_per_step) // ratio_t, 1) * ratio_t
        if tile is not None:
            tile = max(tile[0] // ratio_s, 1) * ratio_s, max(tile[1] // ratio_s, 1) * ratio_s
        self._load(-(-height // ratio_s) * ratio_s, -(-width // ratio_s) * ratio_s, tile, step, decode)
        try:
            return run(TemporalCache(layout=None if tile is None else (*tile, step + 1)), step)
        except torch.OutOfMemoryError:
            if tile is not None or not vae.can_stream:
                raise
        # Not inside the `except` block: the error holds all that the first try had in memory.
        logging.warning(f"Frames of {width}x{height} do not fit on {self.device}: again in tiles, which are exact.")
        comfy.model_management.soft_empty_cache()
        return run(TemporalCache(layout=(FALLBACK_TILE, FALLBACK_TILE, step + 1)), step)

    def _load(self, height: int, width: int, tile: tuple[int, int] | None, step: int, decode: bool) -> None:
        """Let ComfyUI put the model on its device, and take others off it as far as memory is needed."""
        # The model first: what is predicted depends on the device that it is on.
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        # Where memory is scarce, ComfyUI leaves layers behind and moves its own ones when they are used; not these.
        self.autoencoder.to(self.device)
        layout = (*(tile or (height, width)), step + 1)
        plan = self.autoencoder.memory_model().stream(
            (height, width), None, step, layout, self.vae_dtype.itemsize, encode=not decode, decode=decode
        )
        comfy.model_management.load_models_gpu([self.patcher], memory_required=plan.num_bytes, force_full_load=True)

    def _to_sample(self, pixels: torch.Tensor) -> torch.Tensor:
        videos = self.frames_as_videos(pixels)[..., : self.autoencoder.in_channels]
        sample = videos.movedim(-1, 1).to(self.device, torch.float32)
        return (sample * 2 - 1).to(self.vae_dtype)

    def _keep_latents(self, latents: torch.Tensor) -> torch.Tensor:
        latents = latents.to(self.output_device, torch.float32)
        return normalize_latents(latents, self.autoencoder.config) if self.is_normalized else latents

    def _to_latents(self, latents: torch.Tensor) -> torch.Tensor:
        latents = latents.to(self.device, torch.float32)
        if self.is_normalized:
            latents = denormalize_latents(latents, self.autoencoder.config)
        return latents.to(self.vae_dtype)


def _is_batch(value: Any) -> bool:
    """Tell whether this is a tensor of four or five axes, none of them empty."""
    return isinstance(value, torch.Tensor) and value.ndim in (4, 5) and value.numel() > 0


def _describe(value: Any) -> str:
    """Say what came where a tensor should."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def _cut(videos: Iterator[torch.Tensor], size: Padding) -> Iterator[torch.Tensor]:
    """Turn decoded pieces `(B, C, T, H, W)` to `(B, T, H, W, C)` in `[0, 1]`, and cut them to a size together."""
    num_left = size.num_frames
    for sample in videos:
        sample = crop_sample(sample, size._replace(num_frames=num_left))
        num_left -= sample.shape[2]
        if sample.shape[2]:
            yield sample_to_unit(sample).movedim(1, -1)


def _watched(pieces: Iterable[torch.Tensor], total: int | None, dim: int) -> Iterator[torch.Tensor]:
    """Show the progress of pieces, `dim` their axis of time, and let the user interrupt between them."""
    bar = None if total is None else comfy.utils.ProgressBar(total)
    for piece in pieces:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield piece
        if bar is not None:
            bar.update(piece.shape[0] * piece.shape[dim])

"""Base of the latent video pipelines: sampling by any scheduler, guidance, known frames, long videos, decoding.

A pipeline prepares its condition (labels, or text) and calls `_generate`; everything from noise to frames is here.
Latents are `(batch_size, latent_channels, num_latent_frames, latent_height, latent_width)`, normalised (see
`latents.py`), and stay in float32 between the steps, whatever dtype the networks have.
"""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor

from ..checks import check_choice, check_integer, check_positive, is_integer, is_number
from ..hub import pushing
from ..hub_errors import hub_reason
from ..inference.streaming import StreamingDecoder
from ..latents import denormalize_latents, normalize_latents
from ..loading import resolve_pipeline
from ..models.pretrained import check_saveable
from ..models.temporal_cache import TemporalCache
from ..models.video_autoencoder import VideoAutoencoder
from ..registration import SHIM
from .autoencoders import Autoencoder, LatentLayout, decode
from .lora import LoraLoaderMixin
from .schedulers import (
    Scheduler,
    add_noise,
    check_scheduler,
    choose_timesteps,
    guide_noise,
    prepare_scheduler,
    takes_variance,
)
from .windows import FrameDecoder, Frames, Window, plan_windows


OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# A `LeanVAELatteTransformer3DModel` or diffusers' `LatteTransformer3DModel`.
Transformer = Any
VideoInput = list | np.ndarray | torch.Tensor
Generator = torch.Generator | list[torch.Generator] | None
Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None
FramesCallback = Callable[[Any, int, Any], None] | None


@dataclass
class LatentVideoPipelineOutput(BaseOutput):
    """Output of the latent video pipelines.

    Args:
        frames: `"pil"`: a list of videos, each a list of images. `"np"`: an array
            `(batch_size, num_frames, height, width, channels)`, `"pt"`: a tensor
            `(batch_size, num_frames, channels, height, width)`, both in `[0, 1]`. `"latent"`: normalised latents.
    """

    frames: list[list] | np.ndarray | torch.Tensor


def check_tensor(name: str, value: Any) -> None:
    """Refuse the argument `name` where it is no tensor, or holds NaN or infinity, which would spread to all frames.

    Raises:
        ValueError: If it is not, or does.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` must be a tensor, got a value of type {type(value).__name__}.")
    if not value.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinite values.")


class LatentVideoPipeline(DiffusionPipeline, LoraLoaderMixin):
    """Base of the pipelines, which have a `vae`, a `transformer` and a `scheduler`, and prepare their condition."""

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    vae: Autoencoder
    transformer: Transformer
    scheduler: Scheduler

    def _set_up(self) -> None:
        self.video_processor = VideoProcessor(vae_scale_factor=1 if self.vae is None else self.layout.ratio_s)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._current_timestep: torch.Tensor | None = None
        self._interrupt = False

    # ---- the Hub ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Self:
        """Load a saved pipeline as diffusers does, also by the name of a bundled one; no code of a repository is run.

        Args:
            pretrained_model_name_or_path: A folder of `save_pretrained`, a Hub id `user/repo`, or the name of a
                bundled pipeline, before which comes a folder of that name.
            kwargs: As of diffusers.

        Raises:
            OSError: If it is not on the Hub or cannot be read from there, in one sentence.
        """
        source, options = resolve_pipeline(pretrained_model_name_or_path, kwargs)
        try:
            return super().from_pretrained(source, **options)
        except Exception as error:  # huggingface_hub lets errors of its HTTP client through
            reason = hub_reason(error, f"model {str(source)!r}", kwargs.get("revision"))
            if reason is None:
                raise
            raise OSError(
                f"`{cls.__name__}.from_pretrained` must be given a pipeline that can be read, got {str(source)!r}: "
                f"{reason}."
            ) from error

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        # A pushed pipeline names a module in its repository, which imports this package (`hub.make_shims`).
        entries = super()._dict_from_json_file(json_file)
        for name, value in entries.items():
            if isinstance(value, list) and len(value) == 2 and value[0] == SHIM:
                entries[name] = value[1] if name == "_class_name" else ["diffusers_leanvae", value[1]]
        return entries

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save all components as diffusers does.

        Raises:
            ValueError: If one has adapters, or weights that are not in memory; nothing is written then.
        """
        for component in self.components.values():
            if isinstance(component, torch.nn.Module):
                check_saveable(component)
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, commit_message: str | None = None, **options: Any) -> str:
        """Push the pipeline to the Hub with a card: [`hub.push_to_hub`], where the arguments are described."""
        return pushing.push_to_hub(self, repo_id, commit_message=commit_message, **options)

    # ---- what a pipeline defines ------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate videos, a [`LatentVideoPipelineOutput`] or a tuple."""
        raise NotImplementedError

    def _num_trained_latent_frames(self) -> int:
        """Latent frames that the transformer was made for."""
        raise NotImplementedError

    def _condition(self, tensors: dict[str, Any], num_latent_frames: int) -> dict[str, torch.Tensor]:
        """Return the transformer's arguments other than latents and timestep, for both halves of a guided batch."""
        raise NotImplementedError

    @property
    def layout(self) -> LatentLayout:
        """How the autoencoder turns videos into latents."""
        return LatentLayout.of(self.vae)

    # ---- state, which callbacks read and may change -----------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the whole call, over all windows."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # ---- inputs -----------------------------------------------------------------------------------------------------

    def _check_options(
        self,
        *,
        output_type: str,
        num_inference_steps: int,
        num_videos_per_prompt: int,
        num_guided_channels: int | None,
        strength: float,
        guidance_scale: float,
    ) -> None:
        """Check the arguments that do not depend on sizes.

        Raises:
            ValueError: With the argument, what is legal, and what came.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if not is_number(guidance_scale) or guidance_scale < 0:
            raise ValueError(f"`guidance_scale` must be a finite number from 0 on, got {guidance_scale!r}.")
        for name, count in (
            ("num_inference_steps", num_inference_steps),
            ("num_videos_per_prompt", num_videos_per_prompt),
        ):
            check_positive(name, count)
        channels = self.transformer.config.in_channels
        if num_guided_channels is not None:
            check_integer("num_guided_channels", num_guided_channels)
            if not 1 <= num_guided_channels <= channels:
                raise ValueError(f"`num_guided_channels` must be 1 to {channels}, got {num_guided_channels}.")
        latent_channels = self.layout.latent_channels
        if channels != latent_channels:
            raise ValueError(
                f"`transformer` must have the {latent_channels} channels of the latents of `vae`, got {channels}."
            )
        if not is_number(strength) or not 0 < strength <= 1:
            raise ValueError(f"`strength` must be a number more than 0 and at most 1, got {strength!r}.")
        if takes_variance(self.scheduler) and self.transformer.out_channels != 2 * channels:
            raise ValueError(
                f"`scheduler` must have a fixed `variance_type` for a transformer that predicts no variance, got "
                f"{self.scheduler.config.variance_type!r}."
            )

    def _plan_frames(
        self,
        num_frames: int | None,
        height: int | None,
        width: int | None,
        num_frames_per_window: int | None,
        num_overlap_latent_frames: int,
        reencode_overlap: bool,
    ) -> Frames:
        """Choose sizes, by default those of the transformer, and windows.

        Raises:
            ValueError: If a size is not legal.
        """
        layout = self.layout
        length = layout.num_sample_frames(self._num_trained_latent_frames())
        side: int = self.transformer.config.sample_size * layout.ratio_s
        num_frames, window = (length if n is None else n for n in (num_frames, num_frames_per_window))
        height, width = (side if size is None else size for size in (height, width))
        for name, count, ratio in (
            ("num_frames", num_frames, layout.num_frames_step),
            ("num_frames_per_window", window, layout.ratio_t),
        ):
            if not is_integer(count) or count < 1 or count % ratio != 1 % ratio:
                raise ValueError(f"`{name}` must be {ratio} * n + 1 (1, {ratio + 1}, ...), got {count!r}.")
        step = layout.ratio_s * self.transformer.config.patch_size
        for name, size in (("height", height), ("width", width)):
            if not is_integer(size) or size < step or size % step:
                raise ValueError(f"`{name}` must be a positive multiple of {step}, got {size!r}.")
        num_latent_frames, window = layout.num_latent_frames(num_frames), layout.num_latent_frames(window)
        check_integer("num_overlap_latent_frames", num_overlap_latent_frames)
        if num_latent_frames > window and not 1 <= num_overlap_latent_frames < window:
            raise ValueError(
                f"`num_overlap_latent_frames` must be 1 to {window - 1} for windows of {window} latent frames, got "
                f"{num_overlap_latent_frames}."
            )
        windows = plan_windows(num_latent_frames, window, num_overlap_latent_frames)
        if reencode_overlap and len(windows) > 1:
            is_ours = isinstance(self.vae, VideoAutoencoder) and self.vae.can_stream
            if not is_ours or self.vae.num_delayed_frames:
                why = "decodes the last frames of a window only with the next" if is_ours else "decodes whole videos"
                raise ValueError(f"`reencode_overlap` must be False for an {type(self.vae).__name__}, which {why}.")
        return Frames(num_frames, height, width, windows, reencode_overlap and len(windows) > 1)

    def prepare_latents(
        self,
        batch_size: int,
        frames: Frames,
        generator: Generator = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draw Gaussian noise of the latents' size in float32, or check the given `latents`.

        Raises:
            ValueError: If `generator`, or the shape or values of `latents`, are not legal.
        """
        layout, channels = self.layout, self.transformer.config.in_channels
        size = (frames.height // layout.ratio_s, frames.width // layout.ratio_s)
        shape = (batch_size, channels, layout.num_latent_frames(frames.num_frames), *size)
        generators = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` must be one generator or {batch_size}, one for each video, got {len(generator)}."
            )
        dtype = torch.promote_types(self.transformer.dtype, torch.float32)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        check_tensor("latents", latents)
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(self._execution_device, dtype)

    def encode_video(self, video: torch.Tensor) -> torch.Tensor:
        """Encode videos to normalised latents: posterior means, nothing is sampled.

        Args:
            video: `(batch_size, channels, num_frames, height, width)` in `[-1, 1]`.
        """
        video = video.to(self._execution_device, self.vae.dtype)
        latents = self.vae.encode(video, return_dict=False)[0].mode()
        dtype = torch.promote_types(self.transformer.dtype, torch.float32)
        return normalize_latents(latents.to(dtype), self.vae.config)

    def _encode_input(self, name: str, video: torch.Tensor, batch_size: int, num_frames: int) -> torch.Tensor:
        """Encode the argument `name`, given as videos in `[-1, 1]`, to normalised latents, one for each video."""
        in_channels = self.layout.in_channels
        if video.shape[1] != in_channels or video.shape[2] != num_frames:
            raise ValueError(
                f"`{name}` must have {num_frames} frames of {in_channels} channels, got {video.shape[2]} of "
                f"{video.shape[1]}."
            )
        check_tensor(name, video)
        if video.min() < -1 or video.max() > 1:
            raise ValueError(
                f"`{name}` must be in [0, 1] as a tensor or array, got values outside (uint8 must be divided by 255)."
            )
        if batch_size % video.shape[0]:
            raise ValueError(f"`{name}` must be one, or one for each of {batch_size} videos, got {video.shape[0]}.")
        return self.encode_video(video).repeat_interleave(batch_size // video.shape[0], dim=0)

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def _generate(
        self,
        tensors: dict[str, Any],
        batch_size: int,
        frames: Frames,
        *,
        steps: dict[str, Any],
        generator: Generator,
        latents: torch.Tensor | None,
        image: PipelineImageInput | None,
        video: VideoInput | None,
        strength: float,
        num_guided_channels: int | None,
        output_type: str,
        return_dict: bool,
        callback: Callback,
        callback_inputs: Sequence[str],
        callback_on_frames: FramesCallback,
    ) -> LatentVideoPipelineOutput | tuple:
        """Sample and decode; see the `__call__` of the pipelines for the arguments.

        Args:
            tensors: The condition, by names that callbacks may ask for and `_condition` reads.
            batch_size: Number of videos.
            frames: Of `_plan_frames`.
            steps: Keyword arguments of `set_timesteps`.
        """
        if image is not None and video is not None:
            raise ValueError("`image` and `video` must not be given together, got both.")
        for name, given in (("image", image), ("video", video)):
            if isinstance(given, Collection) and getattr(given, "ndim", 1) > 0 and len(given) == 0:
                raise ValueError(f"`{name}` must be one, or one for each of {batch_size} videos, got none.")
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            callback_inputs = callback.tensor_inputs
        if isinstance(callback_inputs, str) or not isinstance(callback_inputs, Collection):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be a list of names, among "
                f"{', '.join(self._callback_tensor_inputs)}, got {callback_inputs!r}."
            )
        unknown = set(callback_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {', '.join(self._callback_tensor_inputs)}, got "
                f"{', '.join(sorted(map(str, unknown)))}."
            )
        noise = self.prepare_latents(batch_size, frames, generator, latents)
        size, known, clean = (frames.height, frames.width), None, None
        if image is not None:
            pixels = self.video_processor.preprocess(image, *size).unsqueeze(2)
            known = self._encode_input("image", pixels, batch_size, 1)
        if video is not None:
            pixels = self.video_processor.preprocess_video(video, *size)
            clean = self._encode_input("video", pixels, batch_size, frames.num_frames)
        check_scheduler(self.scheduler, image is not None or video is not None or len(frames.windows) > 1)
        scheduler = prepare_scheduler(self.scheduler)
        step_kwargs = {"generator": generator} if "generator" in signature(scheduler.step).parameters else {}
        steps = steps | {"device": noise.device}
        timesteps = choose_timesteps(scheduler, steps, None if clean is None else strength)
        self._num_timesteps = len(timesteps) * len(frames.windows)
        self._interrupt = False

        result = noise[:, :, :0]
        decoder = self._make_decoder(frames, output_type, callback_on_frames)
        with self.progress_bar(total=self._num_timesteps) as progress:  # type: ignore
            for number, window in enumerate(frames.windows):
                if number > 0:
                    # A scheduler has state, which this resets.
                    timesteps = choose_timesteps(scheduler, steps, None if clean is None else strength)
                    self._reset_caches()
                    known = self._overlap(result, decoder if frames.reencode_overlap else None, window)

                on_step_end = partial(
                    self._on_step_end, tensors, callback, callback_inputs, progress, number * len(timesteps)
                )
                part = slice(window.start, window.stop)
                sampled = self._sample(
                    scheduler,
                    tensors,
                    noise[:, :, part],
                    None if clean is None else clean[:, :, part],
                    known,
                    timesteps,
                    num_guided_channels,
                    step_kwargs,
                    on_step_end,
                )
                new = sampled[:, :, window.num_known :]
                result = torch.cat([result, new], dim=2)
                if decoder.can_stream and (frames.reencode_overlap or callback_on_frames is not None):
                    decoder.push(new)
        self._current_timestep = None

        output: torch.Tensor | np.ndarray | list = result
        if output_type != "latent":
            output = self.video_processor.postprocess_video(decoder.decode_all(result), output_type=output_type)
        elif callback_on_frames is not None and not decoder.can_stream:
            decoder.decode_all(result)
        self.maybe_free_model_hooks()
        return LatentVideoPipelineOutput(frames=output) if return_dict else (output,)

    def _on_step_end(
        self,
        tensors: dict[str, Any],
        callback: Callback,
        names: Sequence[str],
        progress: Any,
        num_done: int,
        index: int,
        timestep: torch.Tensor,
        latents: torch.Tensor,
    ) -> torch.Tensor:
        """Call the callback after a step, and apply its changes."""
        progress.update()
        if callback is None:
            return latents
        given = tensors | {"latents": latents}
        changed = callback(self, num_done + index, timestep, {name: given[name] for name in names}) or {}  # type: ignore
        tensors.update({name: changed[name] for name in changed if name in tensors})
        return changed.get("latents", latents)

    def _reset_caches(self) -> None:
        # PyramidAttentionBroadcast and its like would hand attention of one window to the next.
        if getattr(self.transformer, "is_cache_enabled", False):
            self.transformer._reset_stateful_cache()

    def _make_decoder(self, frames: Frames, output_type: str, callback: FramesCallback) -> FrameDecoder:
        """Make the decoder of a call, which hands its frames to the callback."""
        num_kept = None
        if output_type == "latent":
            num_kept = max(self.layout.num_sample_frames(window.num_known) for window in frames.windows)
        form = "pt" if output_type == "latent" else output_type

        def on_frames(start: int, piece: torch.Tensor) -> None:
            assert callback is not None
            if not self._interrupt:  # after which windows are noise
                callback(self, start, self.video_processor.postprocess_video(piece, output_type=form))

        return FrameDecoder(
            self.vae,
            self._decode,
            self.layout.num_latent_frames(frames.num_frames),
            num_kept,
            None if callback is None else on_frames,
        )

    def _overlap(self, result: torch.Tensor, decoder: FrameDecoder | None, window: Window) -> torch.Tensor:
        """Compute the known latent frames at the start of a window.

        Taken from the middle of a video, latents do not begin with an image's, as every clip in training does. So the
        last frames, decoded, are encoded as a clip of their own; without a decoder the latents are taken as they are.
        """
        if decoder is None:
            return result[:, :, window.start :]
        return self.encode_video(decoder.last(self.layout.num_sample_frames(window.num_known)).clamp(-1, 1))

    def _sample(
        self,
        scheduler: Scheduler,
        tensors: dict[str, Any],
        noise: torch.Tensor,
        clean: torch.Tensor | None,
        known: torch.Tensor | None,
        timesteps: torch.Tensor,
        num_guided_channels: int | None,
        step_kwargs: dict[str, Any],
        on_step_end: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Sample one window from noise, or from `clean` latents with noise; the `known` first frames stay.

        The transformer has one timestep for all frames. So before every step the known ones are noised to it, unless
        the transformer was trained to be given frames without noise.
        """
        is_clean = self.config["clean_given_frames"]
        channels = self.transformer.config.in_channels
        keeps_variance = takes_variance(scheduler)
        num_known = 0 if known is None else known.shape[2]
        if clean is None:
            latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        else:
            latents = add_noise(scheduler, clean, noise, timesteps[0])
        for index, timestep in enumerate(timesteps):
            if self._interrupt:
                continue
            self._current_timestep = timestep
            if known is not None and not is_clean:
                first = add_noise(scheduler, known, noise[:, :, :num_known], timestep)
                latents = torch.cat([first, latents[:, :, num_known:]], dim=2)
            scale = getattr(scheduler, "scale_model_input", None)
            model_input = latents if scale is None else scale(latents, timestep)
            if known is not None and is_clean:
                model_input = torch.cat([known, model_input[:, :, num_known:]], dim=2)
            output = self._predict(tensors, model_input, timestep)
            if self.do_classifier_free_guidance:
                null, condition = output.chunk(2)
                output = guide_noise(condition, null, self._guidance_scale, channels, num_guided_channels)
            if not keeps_variance:
                output = output[:, :channels]
            latents = scheduler.step(output, timestep, latents, **step_kwargs, return_dict=False)[0]
            latents = on_step_end(index, timestep, latents)
        if known is not None:
            latents = torch.cat([known, latents[:, :, num_known:]], dim=2)
        return latents

    def _predict(self, tensors: dict[str, Any], latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Call the transformer, on both halves of a guided batch (null condition first), in its own dtype."""
        hidden_states = torch.cat([latents, latents]) if self.do_classifier_free_guidance else latents
        context = getattr(self.transformer, "cache_context", None)
        with context("cond_uncond") if context is not None else nullcontext():
            output = self.transformer(
                hidden_states=hidden_states.to(self.transformer.dtype),
                timestep=timestep.expand(hidden_states.shape[0]).to(latents.device),
                **self._condition(tensors, latents.shape[2]),
                return_dict=False,
            )[0]
        return output.to(latents.dtype)

    # ---- decoding ---------------------------------------------------------------------------------------------------

    def _decode(self, latents: torch.Tensor, cache: TemporalCache | None = None) -> torch.Tensor:
        latents = denormalize_latents(latents, self.vae.config).to(self.vae.dtype)
        return decode(self.vae, latents, cache)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode normalised latents to videos, all frames at once, since the frames of a video are not independent.

        `vae.enable_tiling` and [`decode_stream`] bound the memory; they change the result by rounding only.

        Args:
            latents: Latents, as a pipeline returns them for `output_type="latent"`.

        Returns:
            Videos `(batch_size, channels, num_frames, height, width)`, nominally in `[-1, 1]`.
        """
        return self._decode(latents)

    @torch.no_grad()
    def decode_stream(
        self, latents: torch.Tensor, output_type: str = "pt", num_latent_frames_per_step: int = 4
    ) -> Iterator[Any]:
        """Decode normalised latents piece by piece: a long video in the memory of a short one.

        An autoencoder of diffusers decodes them at once, and so does a WF-VAE with group norms.

        Args:
            latents: What a pipeline returns for `output_type="latent"`.
            output_type: `"pil"`, `"np"` or `"pt"`.
            num_latent_frames_per_step: Latent frames to decode at once.

        Yields:
            Consecutive frames, as [`LatentVideoPipelineOutput`] describes them, of all videos of the batch.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES[:-1])
        if not (isinstance(self.vae, VideoAutoencoder) and self.vae.can_stream):
            piece = self._decode(latents.to(self._execution_device))
            yield self.video_processor.postprocess_video(piece, output_type=output_type)
            self.maybe_free_model_hooks()
            return
        decoder = StreamingDecoder(self.vae, num_latent_frames_per_step)
        for latent_frames in latents.split(1, dim=2):
            latent_frames = denormalize_latents(latent_frames.to(self._execution_device), self.vae.config)
            piece = decoder.push(latent_frames.to(self.vae.dtype))
            if piece is not None:
                yield self.video_processor.postprocess_video(piece, output_type=output_type)
        piece = decoder.flush()
        if piece is not None:
            yield self.video_processor.postprocess_video(piece, output_type=output_type)
        self.maybe_free_model_hooks()

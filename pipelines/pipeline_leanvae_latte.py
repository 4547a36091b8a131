"""Class-conditional and unconditional video generation: Latte (arXiv 2401.03048) on the latents of an autoencoder."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.schedulers import SchedulerMixin

from diffusers_leanvae.generation.autoencoders import Autoencoder
from diffusers_leanvae.generation.pipeline import (
    Callback,
    FramesCallback,
    Generator,
    LatentVideoPipeline,
    LatentVideoPipelineOutput,
    VideoInput,
)
from diffusers_leanvae.models.transformer_latte import LeanVAELatteTransformer3DModel


ClassLabels = int | str | Sequence[int | str] | torch.Tensor | None


class LeanVAELattePipeline(LatentVideoPipeline):
    """Class-conditional or unconditional videos by a Latte transformer on the latents of a video autoencoder.

    Args:
        vae: Any video autoencoder of this package, or an `AutoencoderKLWan`, `AutoencoderKLCogVideoX` or
            `AutoencoderKLHunyuanVideo` of diffusers.
        transformer: The transformer, of as many channels as the latents have.
        scheduler: Any scheduler of diffusers that fits the training. For the original weights see
            [`generation.schedulers.make_scheduler`]; for models trained by flow matching
            `FlowMatchEulerDiscreteScheduler`.
        id2label: Name of each class. Several names of one class are separated by commas. Saved with the pipeline.
        clean_given_frames: Whether the transformer was trained to be given first frames without noise; otherwise those
            of `image`, and of windows, get the noise of the others. Saved with the pipeline.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents", "class_labels"]

    def __init__(
        self,
        vae: Autoencoder,
        transformer: LeanVAELatteTransformer3DModel,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | dict[int, str] | None = None,
        clean_given_frames: bool = False,
    ):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        # The index of a saved pipeline is JSON, which turns the ids into strings.
        id2label = None if id2label is None else {int(key): name for key, name in id2label.items()}
        self.register_to_config(
            id2label=None if id2label is None else {str(k): v for k, v in id2label.items()},
            clean_given_frames=clean_given_frames,
        )
        self.labels = {
            name.strip(): key for key, names in sorted((id2label or {}).items()) for name in names.split(",")
        }
        self._set_up()

    def _num_trained_latent_frames(self) -> int:
        return self.transformer.config.num_latent_frames

    def _condition(self, tensors: dict[str, Any], num_latent_frames: int) -> dict[str, torch.Tensor]:
        labels = tensors["class_labels"]
        if labels is None:
            return {}
        if self.do_classifier_free_guidance:
            labels = torch.cat([torch.full_like(labels, self.transformer.config.num_classes), labels])
        return {"class_labels": labels}

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1 and self.transformer.config.num_classes is not None

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Return the ids of classes by their names.

        Raises:
            ValueError: If a name is not among `id2label`.
        """
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
            if name not in self.labels:
                known = ", ".join(self.labels) if self.labels else "none, as the pipeline has no `id2label`"
                raise ValueError(f"`class_labels` must be ids or known names ({known}), got {name!r}.")
        return [self.labels[name] for name in names]

    def prepare_class_labels(self, class_labels: ClassLabels, num_videos_per_prompt: int = 1) -> torch.Tensor | None:
        """Turn the labels of [`__call__`] into a tensor with one id for every video.

        Raises:
            ValueError: If a label is unknown, or given to an unconditional transformer.
        """
        num_classes = self.transformer.config.num_classes
        if num_classes is None:
            if class_labels is not None:
                raise ValueError(f"`class_labels` must be None for an unconditional model, got {class_labels!r}.")
            return None
        if class_labels is None:
            ids = [num_classes]
        else:
            values = class_labels.tolist() if isinstance(class_labels, torch.Tensor) else class_labels
            ids = [self.get_label_ids(x)[0] if isinstance(x, str) else x for x in _flatten(values)]
            for label in ids:
                if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < num_classes:
                    raise ValueError(f"`class_labels` must be names, or ids 0 to {num_classes - 1}, got {label!r}.")
        if not ids:
            raise ValueError("`class_labels` must hold at least one label, got none.")
        labels = torch.tensor(ids, dtype=torch.long, device=self._execution_device)
        return labels.repeat_interleave(num_videos_per_prompt)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.0,
        num_guided_channels: int | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generator = None,
        latents: torch.Tensor | None = None,
        image: PipelineImageInput | None = None,
        video: VideoInput | None = None,
        strength: float = 0.8,
        num_frames_per_window: int | None = None,
        num_overlap_latent_frames: int = 2,
        reencode_overlap: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_frames: FramesCallback = None,
    ) -> LatentVideoPipelineOutput | tuple:
        """Generate videos.

        Args:
            class_labels: A label or a list, one for each video: ids, or names from `id2label`. `None` for an
                unconditional model, and for one video of the null class of a conditional one.
            num_frames: Frames, `4 * n + 1` (for a temporal ratio of 4); by default as many as the transformer was
                trained on. More are generated in windows.
            height: Height in pixels, a multiple of the spatial ratio times the patch size; by default the trained one.
                More needs `transformer.set_position_mode`.
            width: Width in pixels, likewise.
            num_inference_steps: Number of steps, which the scheduler spaces.
            timesteps: The steps instead, descending; `respaced_timesteps(n)` are those of the reference.
            sigmas: The noise levels instead, for schedulers that take them.
            guidance_scale: Classifier-free guidance, on above 1: `null + guidance_scale * (label - null)`.
            num_guided_channels: Channels that are guided, the first ones; all of the latents' by default. The
                reference guides 4 whatever the latents have. The variance is never guided.
            num_videos_per_prompt: Videos of every label.
            generator: One random generator, or one for each video: then a video does not depend on its batch.
            latents: Noise to start from, `(num_videos, channels, num_latent_frames, latent_height, latent_width)`.
            image: First frame: an image, or one for each video (PIL; arrays `(..., height, width, channels)` or
                tensors `(..., channels, height, width)` in `[0, 1]`), resized to the video's size. Its latent frame is
                kept.
            video: A video to start from, or one for each video (lists of PIL images; arrays and tensors with the
                frames before the axes of an image), of `num_frames` frames, resized likewise.
            strength: Share of the steps, the last ones, that a given `video` goes through; 1 changes it most.
            num_frames_per_window: Frames of a window, by default as many as the transformer was trained on.
            num_overlap_latent_frames: Latent frames at the start of a window that are the end of the last.
            reencode_overlap: Whether a window starts from decoded frames, encoded as a clip of their own, as training
                clips are; otherwise from the latents as they are.
            output_type: `"pil"`, `"np"`, `"pt"`, or `"latent"` (normalised, for [`decode_stream`]).
            return_dict: Whether to return a [`LatentVideoPipelineOutput`] instead of a tuple.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after every step; what it
                returns replaces the tensors. A list of them is a `MultiPipelineCallbacks`.
            callback_on_step_end_tensor_inputs: Names of the tensors it gets, among `latents` (of the current window)
                and `class_labels`.
            callback_on_frames: Called as `callback(pipeline, start, frames)` with consecutive frames of all videos and
                the number of the first of them, as soon as they are decoded: latent frame by latent frame, and for a
                long video after each window, while the next ones wait to be sampled. In the form of `output_type`,
                `"pt"` for `"latent"`, which keeps no frames. An autoencoder that decodes whole videos gives all at
                the end. `pipeline._interrupt = True` ends the sampling; nothing is handed out after it.

        Returns:
            The videos as `frames`.

        Raises:
            ValueError: If an argument is not legal.
        """
        self._check_options(
            output_type=output_type,
            num_inference_steps=num_inference_steps,
            num_videos_per_prompt=num_videos_per_prompt,
            num_guided_channels=num_guided_channels,
            strength=strength,
            guidance_scale=guidance_scale,
        )
        frames = self._plan_frames(
            num_frames, height, width, num_frames_per_window, num_overlap_latent_frames, reencode_overlap
        )
        self._guidance_scale = guidance_scale
        labels = self.prepare_class_labels(class_labels, num_videos_per_prompt)
        return self._generate(
            {"class_labels": labels},
            num_videos_per_prompt if labels is None else len(labels),
            frames,
            steps={"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas},
            generator=generator,
            latents=latents,
            image=image,
            video=video,
            strength=strength,
            num_guided_channels=num_guided_channels,
            output_type=output_type,
            return_dict=return_dict,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
            callback_on_frames=callback_on_frames,
        )


def _flatten(values: Any) -> list:
    if isinstance(values, (list, tuple)):
        return [leaf for value in values for leaf in _flatten(value)]
    return [values]

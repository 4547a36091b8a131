"""Text to video: diffusers' Latte transformer (arXiv 2401.03048) on the latents of an autoencoder."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import LatteTransformer3DModel
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
    check_tensor,
)
from diffusers_leanvae.generation.windows import Frames
from diffusers_leanvae.text_encoders import TextEmbeddings, check_length, encode_tokens, text_arguments, tokenize


class LeanVAELatteTextToVideoPipeline(LatentVideoPipeline):
    """Videos from a text by diffusers' `LatteTransformer3DModel` on the latents of a video autoencoder.

    Its config must fit: `in_channels` of the latents, `out_channels` the same or twice as many, `video_length` latent
    frames (5 for 17 frames), `sample_size` the latent size.

    Args:
        tokenizer: Tokenizer of the text encoder. It and the encoder may be `None` where embeddings are passed.
        text_encoder: T5 or any other text encoder of transformers that has `transformer.config.caption_channels` wide
            hidden states.
        vae: Any video autoencoder of this package, or an `AutoencoderKLWan`, `AutoencoderKLCogVideoX` or
            `AutoencoderKLHunyuanVideo` of diffusers.
        transformer: The transformer.
        scheduler: Any scheduler of diffusers that fits the training.
        clean_given_frames: Whether the transformer was trained to be given first frames without noise; otherwise those
            of `image`, and of windows, get the noise of the others. Saved with the pipeline.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder"]
    _callback_tensor_inputs = [
        "latents",
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    ]

    # Tokenizer and text encoder have no types here, so that the module needs no transformers.
    def __init__(
        self,
        tokenizer,
        text_encoder,
        vae: Autoencoder,
        transformer: LatteTransformer3DModel,
        scheduler: SchedulerMixin,
        clean_given_frames: bool = False,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.register_to_config(clean_given_frames=clean_given_frames)
        self._set_up()

    tokenizer: Any
    text_encoder: Any

    def _num_trained_latent_frames(self) -> int:
        return self.transformer.config.video_length

    def _condition(self, tensors: dict[str, Any], num_latent_frames: int) -> dict[str, torch.Tensor]:
        embeds, mask = tensors["prompt_embeds"], tensors["prompt_attention_mask"]
        if self.do_classifier_free_guidance:
            if tensors["negative_prompt_embeds"] is None:
                raise ValueError(
                    "`guidance_scale` must be more than 1 from the start where a callback raises it, got 1 or less."
                )
            embeds = torch.cat([tensors["negative_prompt_embeds"], embeds])
            mask = torch.cat([tensors["negative_prompt_attention_mask"], mask])
        return text_arguments(TextEmbeddings(embeds.to(self.transformer.dtype), mask), num_latent_frames)

    def _encode_text(
        self, texts: list[str], device: torch.device, max_sequence_length: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError("`prompt_embeds` must be given to a pipeline without text encoder, got a text.")
        length = check_length("max_sequence_length", max_sequence_length, self.tokenizer)
        ids, mask = (tensor.to(device) for tensor in tokenize(self.tokenizer, texts, length))
        return encode_tokens(self.text_encoder, ids, mask), mask

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Encode texts to hidden states of the text encoder, and masks of their tokens.

        Args:
            prompt: One text or a list; or `None` with `prompt_embeds`.
            negative_prompt: The same for the null half of guidance, `""` if `None`.
            do_classifier_free_guidance: Whether the null half is needed.
            num_videos_per_prompt: How often to repeat every text.
            device: Device of the result, that of the pipeline by default.
            prompt_embeds: Hidden states instead of a text, `(batch_size, length, width)`.
            prompt_attention_mask: 1 for tokens, 0 for padding, `(batch_size, length)`; all are tokens if `None`.
            negative_prompt_embeds: As `prompt_embeds`.
            negative_prompt_attention_mask: As `prompt_attention_mask`.
            max_sequence_length: Tokens that texts are padded or cut to: 120, or as many as the tokenizer takes.

        Returns:
            `prompt_embeds`, `prompt_attention_mask` and both of the null half, `None` without guidance.

        Raises:
            ValueError: If the halves differ in shape, or one cannot be made.
        """
        device = self._execution_device if device is None else device
        if prompt_embeds is None:
            texts = [prompt] if isinstance(prompt, str) else list(prompt or [])
            prompt_embeds, prompt_attention_mask = self._encode_text(texts, device, max_sequence_length)
        if not do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_attention_mask = None
        elif negative_prompt_embeds is None:
            # As long as the prompt's, wherever that came from: both are halves of one batch.
            length = prompt_embeds.shape[1]
            longest = 0 if self.tokenizer is None or self.text_encoder is None else self.tokenizer.model_max_length
            if length > longest:
                maker = f"a tokenizer of at most {longest} tokens" if longest else "a pipeline without text encoder"
                raise ValueError(
                    "`negative_prompt_embeds` must be given, or `guidance_scale` be at most 1, for "
                    f"{length} tokens of `prompt_embeds` and {maker}, got None."
                )
            texts = [negative_prompt or ""] if isinstance(negative_prompt, (str, type(None))) else negative_prompt
            texts = texts * (len(prompt_embeds) if len(texts) == 1 else 1)
            negative_prompt_embeds, negative_prompt_attention_mask = self._encode_text(texts, device, length)
        elif negative_prompt_embeds.shape != prompt_embeds.shape:
            raise ValueError(
                f"`negative_prompt_embeds` must have the shape of the prompt's, {tuple(prompt_embeds.shape)}, got "
                f"{tuple(negative_prompt_embeds.shape)}."
            )
        prompt_embeds, prompt_attention_mask = _repeat(
            prompt_embeds, prompt_attention_mask, device, num_videos_per_prompt
        )
        if negative_prompt_embeds is not None:
            negative_prompt_embeds, negative_prompt_attention_mask = _repeat(
                negative_prompt_embeds, negative_prompt_attention_mask, device, num_videos_per_prompt
            )
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        negative_prompt_attention_mask: torch.Tensor | None,
        frames: Frames,
    ) -> None:
        """Check texts, embeddings and lengths against each other.

        Raises:
            ValueError: With the argument, what is legal, and what came.
        """
        if (prompt is None) == (prompt_embeds is None):
            came = "neither" if prompt is None else "both"
            raise ValueError(f"Exactly one of `prompt` and `prompt_embeds` must be given, got {came}.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("`negative_prompt` must be None with `negative_prompt_embeds`, got both.")
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            is_list = isinstance(text, list) and len(text) > 0 and all(isinstance(one, str) for one in text)
            if not (text is None or isinstance(text, str) or is_list):
                raise ValueError(f"`{name}` must be a text or a list of texts, got {text!r}.")
        width = self.transformer.config.caption_channels
        for name, embeds, mask in (
            ("prompt", prompt_embeds, prompt_attention_mask),
            ("negative_prompt", negative_prompt_embeds, negative_prompt_attention_mask),
        ):
            for kind, tensor in (("embeds", embeds), ("attention_mask", mask)):
                if tensor is not None:
                    check_tensor(f"{name}_{kind}", tensor)
            if embeds is not None and (embeds.ndim != 3 or embeds.shape[2] != width or 0 in embeds.shape):
                raise ValueError(
                    f"`{name}_embeds` must have shape (batch_size, length, {width}), got {tuple(embeds.shape)}."
                )
            if mask is not None and (embeds is None or mask.shape != embeds.shape[:2]):
                expected = f"None without `{name}_embeds`" if embeds is None else f"of shape {tuple(embeds.shape[:2])}"
                raise ValueError(f"`{name}_attention_mask` must be {expected}, got shape {tuple(mask.shape)}.")
        batch_size = _count(prompt) if prompt_embeds is None else len(prompt_embeds)
        if isinstance(negative_prompt, list) and len(negative_prompt) not in (1, batch_size):
            raise ValueError(f"`negative_prompt` must be one text or {batch_size}, got {len(negative_prompt)}.")
        legal = (1, self.transformer.config.video_length)
        for window in frames.windows:
            if window.stop - window.start not in legal:
                length = self.layout.num_sample_frames(legal[1])
                raise ValueError(
                    f"`num_frames` must be {length}, more, or 1 for this transformer, which knows {legal[1]} latent "
                    f"frames, got {frames.num_frames}."
                )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        num_guided_channels: int | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generator = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        image: PipelineImageInput | None = None,
        video: VideoInput | None = None,
        strength: float = 0.8,
        num_overlap_latent_frames: int = 2,
        reencode_overlap: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_frames: FramesCallback = None,
    ) -> LatentVideoPipelineOutput | tuple:
        """Generate videos of texts.

        Args:
            prompt: A text or a list, one for each video.
            negative_prompt: What guidance leads away from; one text or a list as long as `prompt`, `""` by default.
            num_frames: As many frames as the transformer was trained on (the default), more (generated in windows,
                `4 * n + 1` for a temporal ratio of 4), or 1.
            height: Height in pixels, a multiple of the spatial ratio times the patch size; by default the trained one.
                For others the transformer interpolates its positions.
            width: Width in pixels, likewise.
            num_inference_steps: Number of steps, which the scheduler spaces.
            timesteps: The steps instead, descending.
            sigmas: The noise levels instead, for schedulers that take them.
            guidance_scale: Classifier-free guidance, on above 1: `null + guidance_scale * (prompt - null)`.
            num_guided_channels: Channels that are guided, the first ones; all of the latents' by default. The variance
                never is.
            num_videos_per_prompt: Videos of every text.
            generator: One random generator, or one for each video: then a video does not depend on its batch.
            latents: Noise to start from, `(num_videos, channels, num_latent_frames, latent_height, latent_width)`.
            prompt_embeds: Hidden states instead of `prompt`, `(batch_size, length, caption_channels)`.
            prompt_attention_mask: Which of them are tokens, `(batch_size, length)`; all if `None`.
            negative_prompt_embeds: As `prompt_embeds`, instead of `negative_prompt`.
            negative_prompt_attention_mask: As `prompt_attention_mask`.
            max_sequence_length: Tokens that texts are padded or cut to: 120, or as many as the tokenizer takes.
            image: First frame: an image, or one for each video (PIL; arrays `(..., height, width, channels)` or
                tensors `(..., channels, height, width)` in `[0, 1]`), resized to the video's size. Its latent frame is
                kept.
            video: A video to start from, or one for each video (lists of PIL images; arrays and tensors with the
                frames before the axes of an image), of `num_frames` frames, resized likewise.
            strength: Share of the steps, the last ones, that a given `video` goes through; 1 changes it most.
            num_overlap_latent_frames: Latent frames at the start of a window that are the end of the last.
            reencode_overlap: Whether a window starts from decoded frames, encoded as a clip of their own, as training
                clips are; otherwise from the latents as they are.
            output_type: `"pil"`, `"np"`, `"pt"`, or `"latent"` (normalised, for [`decode_stream`]).
            return_dict: Whether to return a [`LatentVideoPipelineOutput`] instead of a tuple.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after every step; what it
                returns replaces the tensors. A list of them is a `MultiPipelineCallbacks`.
            callback_on_step_end_tensor_inputs: Names of the tensors it gets, among `latents` (of the current window)
                and the four of the text.
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
        frames = self._plan_frames(num_frames, height, width, None, num_overlap_latent_frames, reencode_overlap)
        self.check_inputs(
            prompt,
            negative_prompt,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            frames,
        )
        self._guidance_scale = guidance_scale
        embeds = self.encode_prompt(
            prompt,
            negative_prompt,
            self.do_classifier_free_guidance,
            num_videos_per_prompt,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            max_sequence_length=max_sequence_length,
        )
        return self._generate(
            dict(zip(self._callback_tensor_inputs[1:], embeds, strict=True)),
            len(embeds[0]),
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


def _count(text: str | list[str] | None) -> int:
    return len(text) if isinstance(text, list) else 1


def _repeat(
    embeds: torch.Tensor, mask: torch.Tensor | None, device: torch.device, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask
    return embeds.to(device).repeat_interleave(count, dim=0), mask.to(device).repeat_interleave(count, dim=0)

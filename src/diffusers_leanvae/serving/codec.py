"""What is computed for a request, from the bytes of its body to those of the answer."""

import tempfile
from pathlib import Path

import torch

from ..latents import denormalize_latents
from ..models.video_autoencoder import VideoAutoencoder
from ..video_io import write_video
from ..video_io.pixels import as_sample, pixels_to_sample, sample_to_pixels, sample_to_unit
from ..video_io.stills import ImageFrames
from .protocol import Answer, DecodeQuery, EncodeQuery, Limits, Refusal, answer_of, refusing_value_errors, tensor_of


# First bytes of the image files that are taken: those that the client sends, and those of cameras.
IMAGE_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
MEDIA_TYPES = {"mp4": "video/mp4", "png": "image/png", "jpg": "image/jpeg"}


@torch.inference_mode()
def decode(vae: VideoAutoencoder, query: DecodeQuery, body: bytearray, is_file_wanted: bool) -> Answer:
    """Decode latents.

    Args:
        vae: The model.
        query: Parameters, checked.
        body: Numbers of the latents.
        is_file_wanted: Whether the answer to `output_type=pil` is to be an image file.

    Returns:
        A tensor, an image file or a video file:

        - `pt`: what the model gives, `(batch_size, 3, num_frames, height, width)` or without the third axis; with
          `partial_postprocess` pixels, uint8 `(num_frames or batch_size, height, width, 3)`.
        - `pil`: an image file; or float32 in `[0, 1]`, `(num_frames or batch_size, 3, height, width)`.
        - `mp4`: a video file.
    """
    latents = tensor_of(body, query.shape, query.dtype).to(vae.device, torch.float32)
    if query.scaling_factor is not None:
        latents = latents / query.scaling_factor + (query.shift_factor or 0.0)
    elif query.do_scaling:
        videos = latents if latents.ndim == 5 else latents.unsqueeze(2)
        latents = denormalize_latents(videos, vae.config).view(latents.shape)
    sample = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    if query.output_type == "pt" and not query.partial_postprocess:
        return answer_of(sample)
    frames = sample[0].transpose(0, 1) if sample.ndim == 5 else sample  # (N, C, H, W)
    if query.output_type == "pil" and not is_file_wanted:
        return answer_of(sample_to_unit(frames))
    # Frame by frame: all of them once more as floats would double the memory.
    pixels = torch.cat([sample_to_pixels(frame).permute(0, 2, 3, 1).cpu() for frame in frames.split(1)])
    if query.output_type == "pt":
        return answer_of(pixels)
    kind = "mp4" if query.output_type == "mp4" else query.image_format
    return Answer(_write_file(pixels, kind, query.fps), MEDIA_TYPES[kind], {})


@torch.inference_mode()
def encode(vae: VideoAutoencoder, query: EncodeQuery, body: bytearray, limits: Limits) -> Answer:
    """Encode videos, images or an image file to posterior means: `(latents - shift_factor) * scaling_factor`.

    Args:
        vae: The model.
        query: Parameters, checked.
        body: Numbers of a tensor, uint8 or in `[-1, 1]`, or an image file.
        limits: Of the server, for the size of an image file.
    """
    if query.shape is not None and query.dtype is not None:
        sample = as_sample(tensor_of(body, query.shape, query.dtype))
    else:
        sample = _read_image(vae, body, limits)
    latents = vae.encode(sample.to(vae.device, vae.dtype), return_dict=False)[0].mode()
    if query.shift_factor is not None or query.scaling_factor is not None:
        factor = 1.0 if query.scaling_factor is None else query.scaling_factor
        latents = ((latents.float() - (query.shift_factor or 0.0)) * factor).to(vae.dtype)
    return answer_of(latents if sample.ndim == 5 else latents.squeeze(2))


def _read_image(vae: VideoAutoencoder, body: bytearray, limits: Limits) -> torch.Tensor:
    """Read an image file to a sample `(1, 3, height, width)`; its size is checked before its pixels are read."""
    if not body.startswith(IMAGE_STARTS):
        raise Refusal(400, "The body must be a PNG or JPEG file, or the numbers of a tensor with `shape` and `dtype`.")
    with tempfile.TemporaryDirectory(prefix="leanvae-") as folder:
        path = Path(folder, "body")
        path.write_bytes(body)
        with refusing_value_errors(), ImageFrames(path, name="body") as image:
            if image.is_animated:
                raise Refusal(400, f"The body must be one image, got an animation of {image.num_frames} frames.")
            limits.check_pixels(image.width * image.height)
            vae.check_sample(torch.empty(1, 3, 1, image.height, image.width, dtype=vae.dtype, device="meta"), "image")
            pixels = torch.from_numpy(next(image.arrays_from(0)).copy())
    return pixels_to_sample(pixels).permute(2, 0, 1)[None]


def _write_file(pixels: torch.Tensor, kind: str, fps: float) -> bytes:
    with tempfile.TemporaryDirectory(prefix="leanvae-") as folder:
        path = Path(folder, f"answer.{kind}")
        write_video(path, pixels, fps)
        return path.read_bytes()

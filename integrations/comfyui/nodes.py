"""Nodes: load an autoencoder, encode and decode frames, encode and decode video files."""

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import InputImpl

from diffusers_leanvae import bundled
from diffusers_leanvae.checks import DTYPES, check_choice, parse_dtype
from diffusers_leanvae.loading import load_autoencoder
from diffusers_leanvae.video_io import VideoReader, VideoWriter, probe_video
from diffusers_leanvae.video_io.pixels import pixels_to_unit, unit_to_pixels

from .vae import NUM_FRAMES_PER_STEP, LeanVAE


CATEGORY = "leanvae"
LATENTS = ["raw", "normalized"]
KINDS = ["video", "images"]
CONTAINERS = ["mp4", "mkv", "webm"]
SIZE = "leanvae_size"  # key of the frames, height and width that latents came from
STEPS = {
    "tile_size": (
        "INT",
        {
            "default": 0,
            "min": 0,
            "max": 8192,
            "step": 16,
            "tooltip": "Side of a tile in pixels, 0 for whole frames. Tiles take less memory and change nothing.",
        },
    ),
    "frames_per_step": (
        "INT",
        {
            "default": NUM_FRAMES_PER_STEP,
            "min": 4,
            "max": 4096,
            "step": 4,
            "tooltip": "Frames that pass the network at once. Fewer take less memory and change nothing.",
        },
    ),
}


class LeanVAELoader:
    """Load a LeanVAE, WF-VAE or IV-VAE: a bundled one, one of `models/vae`, or one of the Hub."""

    DESCRIPTION = "Loads a LeanVAE, WF-VAE or IV-VAE for the nodes of LeanVAE and for ComfyUI's own."
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("VAE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (list(_models()), {"tooltip": "Bundled models, then folders and files in models/vae."}),
                "dtype": (["auto", *DTYPES], {"tooltip": "What the network computes in; auto: as ComfyUI is set."}),
                "latents": (
                    LATENTS,
                    {"tooltip": "raw for ComfyUI's diffusion models; normalized by the statistics of the model."},
                ),
            },
            "optional": {
                "source": (
                    "STRING",
                    {"default": "", "tooltip": "In place of model: user/repo on the Hub, or a path on this machine."},
                ),
            },
        }

    def load(self, model: str, dtype: str = "auto", latents: str = "raw", source: str = "") -> tuple[LeanVAE]:
        models = _models()
        check_choice("latents", latents, LATENTS)
        if not source:
            check_choice("model", model, models)
        if dtype == "auto":
            device = comfy.model_management.vae_device()
            torch_dtype = comfy.model_management.vae_dtype(device, [torch.bfloat16, torch.float32])
        else:
            torch_dtype = parse_dtype("dtype", dtype)
        return (LeanVAE(load_autoencoder(source or models[model], torch_dtype), latents == "normalized"),)


class LeanVAEEncode:
    """Encode frames of any number and size."""

    DESCRIPTION = "Encodes frames of any number and size, in constant memory and, if asked for, in exact tiles."
    CATEGORY = CATEGORY
    FUNCTION = "encode"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kinds = (KINDS, {"tooltip": "Whether the frames are one video, or an image each."})
        return {
            "required": {"pixels": ("IMAGE",), "vae": ("VAE",)},
            "optional": {"frames_are": kinds, **STEPS},
        }

    def encode(
        self,
        pixels: torch.Tensor,
        vae: LeanVAE,
        frames_are: str = "video",
        tile_size: int = 0,
        frames_per_step: int = NUM_FRAMES_PER_STEP,
    ) -> tuple[dict[str, Any]]:
        _check(vae)
        check_choice("frames_are", frames_are, KINDS)
        videos = vae.frames_as_videos(pixels)
        if frames_are == "images":
            videos = videos.flatten(0, 1)[:, None]
        samples = vae.encode_frames(videos, _tile(tile_size), frames_per_step)
        return ({"samples": samples, SIZE: tuple(videos.shape[1:4])},)


class LeanVAEDecode:
    """Decode latents to as many frames of the size that they were made from."""

    DESCRIPTION = "Decodes latents, and cuts the frames to the number and size that were encoded."
    CATEGORY = CATEGORY
    FUNCTION = "decode"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",), "vae": ("VAE",)}, "optional": dict(STEPS)}

    def decode(
        self,
        samples: dict[str, Any],
        vae: LeanVAE,
        tile_size: int = 0,
        frames_per_step: int = NUM_FRAMES_PER_STEP,
    ) -> tuple[torch.Tensor]:
        _check(vae)
        videos = vae.decode_latents(samples["samples"], _tile(tile_size), frames_per_step, _size(samples, vae))
        return (videos.flatten(0, 1),)


class LeanVAEEncodeVideo:
    """Encode a video file while it is read, so that its frames are never all in memory."""

    DESCRIPTION = "Encodes a video file while it is read: its frames are never in memory together."
    CATEGORY = CATEGORY
    FUNCTION = "encode"
    RETURN_TYPES = ("LATENT", "FLOAT")
    RETURN_NAMES = ("latent", "fps")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"video": ("VIDEO",), "vae": ("VAE",)}, "optional": dict(STEPS)}

    def encode(
        self, video: Any, vae: LeanVAE, tile_size: int = 0, frames_per_step: int = NUM_FRAMES_PER_STEP
    ) -> tuple[dict[str, Any], float]:
        _check(vae)
        if not hasattr(video, "get_components"):
            raise ValueError(f"`video` must be a VIDEO, such as Load Video gives, got a {type(video).__name__}.")
        path = _file_of(video)
        is_edited = video.has_pending_frame_edits() or video.get_active_trim_window() != (0.0, 0.0)
        if path is None or is_edited:  # only ComfyUI knows the frames
            components = video.get_components()
            (latent,) = LeanVAEEncode().encode(
                components.images, vae, tile_size=tile_size, frames_per_step=frames_per_step
            )
            return latent, float(components.frame_rate)
        info = probe_video(path)
        num_frames = 0

        def read() -> Iterator[torch.Tensor]:
            nonlocal num_frames
            num_frames = 0
            with VideoReader(path) as reader:
                for frames in reader.frames(chunk_size=frames_per_step):
                    num_frames += len(frames)
                    yield pixels_to_unit(frames)[None]

        size = info.num_frames, info.height, info.width
        samples = vae.encode_stream(read, size, _tile(tile_size), frames_per_step)
        return {"samples": samples, SIZE: (num_frames, info.height, info.width)}, float(info.fps)


class LeanVAEDecodeVideo:
    """Decode latents into a video file while it is written, so that its frames are never all in memory."""

    DESCRIPTION = "Decodes latents into a file in ComfyUI's output folder: the frames are never in memory together."
    CATEGORY = CATEGORY
    FUNCTION = "decode"
    RETURN_TYPES = ("VIDEO",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        fps = ("FLOAT", {"default": 24.0, "min": 0.01, "max": 1000.0, "step": 0.01})
        return {
            "required": {
                "samples": ("LATENT",),
                "vae": ("VAE",),
                "fps": fps,
                "filename_prefix": ("STRING", {"default": "video/LeanVAE"}),
                "container": (CONTAINERS,),
            },
            "optional": {"sound": ("VIDEO", {"tooltip": "A video whose sound is kept, from its start."}), **STEPS},
        }

    def decode(
        self,
        samples: dict[str, Any],
        vae: LeanVAE,
        fps: float,
        filename_prefix: str,
        container: str,
        sound: Any = None,
        tile_size: int = 0,
        frames_per_step: int = NUM_FRAMES_PER_STEP,
    ) -> dict[str, Any]:
        _check(vae)
        check_choice("container", container, CONTAINERS)
        latents = vae.as_videos(samples["samples"])
        size = _size(samples, vae) or vae.sample_size(*latents.shape[2:])
        if len(latents) != 1:
            raise ValueError(f"`samples` must be of one video, got a batch of {len(latents)}.")
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), size[2], size[1]
        )
        file = f"{name}_{counter:05}_.{container}"
        path = os.path.join(folder, file)

        def write(pieces: Iterator[torch.Tensor]) -> None:
            with VideoWriter(path, fps, **_sound(sound)) as writer:
                for frames in pieces:
                    writer.write(unit_to_pixels(frames[0]).cpu())

        vae.decode_stream(latents, write, size, _tile(tile_size), frames_per_step)
        shown = {"filename": file, "subfolder": subfolder, "type": "output"}
        return {"ui": {"images": [shown], "animated": (True,)}, "result": (InputImpl.VideoFromFile(path),)}


def _models() -> dict[str, str]:
    """The models to choose from, by name: bundled ones, and folders and files in `models/vae`, with their places."""
    models = {name: name for name in bundled.MODELS}
    for name in folder_paths.get_filename_list("vae"):
        found = folder_paths.get_full_path("vae", name)
        if found is None:  # a link that leads nowhere
            continue
        path = Path(found)
        if (path.parent / "config.json").is_file() and os.path.dirname(name):  # what `save_pretrained` wrote
            name, path = os.path.dirname(name), path.parent
        models[name] = str(path)
    return models


def _check(vae: Any) -> None:
    if not isinstance(vae, LeanVAE):
        raise ValueError(f"`vae` must come from Load LeanVAE, got a {type(vae).__name__}; ComfyUI's nodes take that.")


def _tile(size: int) -> tuple[int, int] | None:
    return (size, size) if size else None


def _size(samples: dict[str, Any], vae: LeanVAE) -> tuple[int, int, int] | None:
    """The size that latents were made from, unless they have been changed to those of another since."""
    size = samples.get(SIZE)
    return size if size is not None and vae.latent_size(*size) == tuple(samples["samples"].shape[-3:]) else None


def _file_of(video: Any) -> str | None:
    """The file that a video is read from, `None` for others: ComfyUI would encode all their frames to make one."""
    path = video.get_stream_source() if isinstance(video, InputImpl.VideoFromFile) else None
    return path if isinstance(path, str) else None


def _sound(video: Any) -> dict[str, Any]:
    """Arguments of `VideoWriter` by which it takes over the sound of a video, trimmed or not."""
    if video is None:
        return {}
    path = _file_of(video)
    if path is None:
        raise ValueError("`sound` must be a video from a file, got one made in this workflow.")
    return {"audio_from": path, "audio_start": Fraction(video.get_active_trim_window()[0]).limit_denominator(10**6)}


NODE_CLASS_MAPPINGS = {
    "LeanVAELoader": LeanVAELoader,
    "LeanVAEEncode": LeanVAEEncode,
    "LeanVAEDecode": LeanVAEDecode,
    "LeanVAEEncodeVideo": LeanVAEEncodeVideo,
    "LeanVAEDecodeVideo": LeanVAEDecodeVideo,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LeanVAELoader": "Load LeanVAE",
    "LeanVAEEncode": "LeanVAE Encode",
    "LeanVAEDecode": "LeanVAE Decode",
    "LeanVAEEncodeVideo": "LeanVAE Encode Video File",
    "LeanVAEDecodeVideo": "LeanVAE Decode to Video File",
}

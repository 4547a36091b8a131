"""Features of whole clips, for the Frechet video distance: I3D as StyleGAN-V uses it, or a model of transformers."""

import inspect
import re
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ..checks import one_line
from ..losses.representation import IMAGENET_MEAN, IMAGENET_STD
from .records import Metric


I3D_SOURCE = (
    "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt (also on the Hub: flateon/FVD-I3D-torchscript)"
)
_EXAMPLE = "https://huggingface.co/MCG-NJU/videomae-base"


class VideoFeatures(Protocol):
    """A frozen network with one feature vector for each clip.

    Attributes:
        name: Goes into the names of metrics: what network, and how it is used.
        description: The same as the end of a sentence.
        num_frames: Frames that it takes; `None` for any number.
    """

    name: str
    description: str
    num_frames: int | None

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute features `(num_features,)` of a uint8 clip `(num_frames, 3, height, width)`."""
        ...


def distance_metric(features: VideoFeatures, is_reconstruction: bool) -> Metric:
    """Describe the Frechet distance of features, of reconstructions from their originals or between two sets."""
    definition = (
        f"Frechet distance between features of {'reconstructed and original' if is_reconstruction else 'both'} "
    )
    return Metric(
        "rFVD" if is_reconstruction else "FVD",
        f"{definition}clips, {features.description}; covariances are divided by the number of clips.",
        better="lower",
        digits=2,
    )


class I3DFeatures:
    """I3D trained on Kinetics-400, as the torchscript of StyleGAN-V computes it: 400 values before the softmax.

    The script rescales pixels from `[0, 255]` and resizes frames to 224 itself.

    Args:
        path: The torchscript file.
        device: Where to compute.

    Raises:
        ValueError: If there is no such file, or it is none.
    """

    name = "i3d_styleganv"
    description = "by the I3D torchscript of StyleGAN-V with its own rescaling and resizing, before the softmax"
    num_frames: int | None = None

    def __init__(self, path: str | Path | None, device: torch.device | str = "cpu") -> None:
        if path is None or not Path(path).expanduser().is_file():
            came = "none" if path is None else repr(str(path))
            raise ValueError(f"FVD has no I3D: `i3d` must be the torchscript file {I3D_SOURCE}, got {came}.")
        try:
            self.network = torch.jit.load(str(Path(path).expanduser()), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"`i3d` must be the torchscript file {I3D_SOURCE}, got {str(path)!r} ({one_line(error)})."
            ) from error
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        clip = pixels.to(self.device, torch.float32).transpose(0, 1)[None]  # (1, 3, T, H, W)
        return self.network(clip, rescale=True, resize=True, return_features=True)[0].float().cpu()


class TransformerFeatures:
    """Features of a vision model of transformers: VideoMAE, ViViT, TimeSformer, or of images, such as DINOv2.

    Frames are resized to the model's size (bicubic, antialias, without keeping the ratio) and normalised as its
    `preprocessor_config.json` says. The feature is the mean of the last hidden state over all tokens; a model of
    images sees every frame, and the mean is over frames too.

    Args:
        path: A folder or a Hub id that `AutoModel.from_pretrained` takes.
        device: Where to compute.

    Raises:
        ValueError: If there is no such model, or it takes no pixels.
        ImportError: If transformers is not installed.
    """

    def __init__(self, path: str | Path | None, device: torch.device | str = "cpu") -> None:
        wanted = f"`feature_model` must be a folder or Hub id of a vision model of transformers, such as {_EXAMPLE},"
        if path is None:
            raise ValueError(f"{wanted} got none.")
        try:
            from transformers import AutoModel
            from transformers.image_processing_base import ImageProcessingMixin
        except ImportError as error:
            raise ImportError('`feature_model` needs transformers: pip install "diffusers-leanvae[text]".') from error
        try:
            model = AutoModel.from_pretrained(str(path), dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(f"{wanted} got {str(path)!r} ({one_line(error)}).") from error
        model = getattr(model, "vision_model", model)  # of CLIP and SigLIP
        if "pixel_values" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"`feature_model` must be a model of images or videos, got a {type(model).__name__}.")
        try:
            config, _ = ImageProcessingMixin.get_image_processor_dict(str(path))
        except OSError:
            config = {}
        self.model: Any = model.requires_grad_(False).eval().to(device)
        self.device = torch.device(device)
        statistics = (config.get("image_mean", IMAGENET_MEAN), config.get("image_std", IMAGENET_STD))
        self.mean, self.std = (torch.tensor(x, device=device).view(3, 1, 1) for x in statistics)
        size = model.config.image_size
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        self.num_frames: int | None = getattr(model.config, "num_frames", None)
        title = Path(path).name or str(path)
        self.name = f"{re.sub('[^a-z0-9]+', '_', title.lower()).strip('_')}_mean_of_tokens"
        self.description = f"means of the last tokens of {title} ({type(model).__name__}) at {self.size[0]} pixels"

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        frames = pixels.to(self.device, torch.float32) / 255
        frames = F.interpolate(frames, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        frames = (frames - self.mean) / self.std
        values = frames[None] if self.num_frames is not None else frames
        return self.model(pixel_values=values).last_hidden_state.flatten(0, 1).mean(dim=0).float().cpu()

"""Perceptual distances of single frames, in float32 even under autocast.

`LPIPS` (arXiv 1801.03924) needs the standard VGG16 weights; `ms_ssim` (Wang, Simoncelli, Bovik 2003) needs none.
"""

import pickle
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..checks import CHECKPOINT_SUFFIXES


VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
CLASSIFIER_PREFIXES = ("classifier.", "pre_logits.", "head.")  # torchvision's and timm's names
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW_SIZE, WINDOW_SIGMA = 11, 1.5


class LPIPS(nn.Module):
    """Learned perceptual distance on VGG16 features. Frozen; no layer behaves differently in training mode.

    The network is written out here because the implementations of torchmetrics, lpips and piqa take VGG16 from
    torchvision, which this package must not need. Names and results are those of torchvision's network.

    Args:
        state_dict: Weights under this module's own names, see `from_weights` for the files that are around;
            `None` leaves random weights.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        # Laid out as torchvision's `features`, so that the indices in the names agree; the last pooling is not used.
        layers: list[nn.Module] = []
        self.taps: list[int] = []
        num_channels = 3
        for stage in VGG16_STAGES:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for width in stage:
                layers += [nn.Conv2d(num_channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                num_channels = width
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.heads = nn.ModuleList()
        for stage in VGG16_STAGES:
            head = nn.Conv2d(stage[-1], 1, 1, bias=False)
            nn.init.uniform_(head.weight, 0.0, 1e-2)  # a distance: no negative weight
            self.heads.append(head)
        # Constants of LPIPS: ImageNet's statistics, moved to pixels in [-1, 1] and rounded.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).reshape(3, 1, 1), persistent=False)
        if state_dict is not None:
            self.load_state_dict(state_dict)
        self.requires_grad_(False).eval()

    @classmethod
    def from_weights(cls, vgg16: str | Path = "timm/vgg16.tv_in1k", linear_heads: str | Path | None = None) -> "LPIPS":
        """Load the standard weights.

        Args:
            vgg16: VGG16 trained on ImageNet, under torchvision's names: a file (`.safetensors`, `.pth`, `.pt`, `.bin`)
                or a Hub repository that holds `model.safetensors`. Its classifier is ignored.
            linear_heads: File of the five linear heads, `lin0.model.1.weight` to `lin4.model.1.weight`; by default
                those that come with torchmetrics.

        Raises:
            ValueError: If weights cannot be found or read, or are not those of VGG16 or of its heads.
        """
        trunk = _load_tensors(_resolve_vgg16(vgg16), "vgg16")
        trunk = {key: value for key, value in trunk.items() if not key.startswith(CLASSIFIER_PREFIXES)}
        if linear_heads is None:
            linear_heads = Path(str(files("torchmetrics"))) / "functional" / "image" / "lpips_models" / "vgg.pth"
        heads = _load_tensors(Path(linear_heads), "linear_heads")
        lpips = cls()
        expected = lpips.state_dict()
        head_names = {f"lin{i}.model.1.weight": f"heads.{i}.weight" for i in range(len(VGG16_STAGES))}
        _check_tensors(trunk, {key: value for key, value in expected.items() if key.startswith("features.")}, "vgg16")
        _check_tensors(heads, {key: expected[name] for key, name in head_names.items()}, "linear_heads")
        lpips.load_state_dict(trunk | {name: heads[key] for key, name in head_names.items()})
        return lpips

    def forward(self, sample: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        """Compute the distance of each pair of frames; gradients reach `reconstruction` only.

        Args:
            sample: Frames in `[-1, 1]`, shape `(num_frames, 3, height, width)`, each side at least 16.
            reconstruction: Their reconstruction, same shape.

        Returns:
            Shape `(num_frames,)`, at least 0.
        """
        _check_frames(sample, reconstruction, smallest=16)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        with torch.autocast(sample.device.type, enabled=False):
            with torch.no_grad():
                targets = self._features(sample.to(dtype))
            distance = sample.new_zeros(sample.shape[0], dtype=dtype)
            for head, target, feature in zip(
                self.heads, targets, self._features(reconstruction.to(dtype)), strict=True
            ):
                distance = distance + head((feature - target).square()).mean(dim=(1, 2, 3))
        return distance

    def _features(self, frames: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of the five stages, each pixel's features of length 1, as torchmetrics does it (epsilon inside)."""
        hidden_states, features = (frames - self.shift) / self.scale, []
        for index, layer in enumerate(self.features):
            hidden_states = layer(hidden_states)
            if index in self.taps:
                norm = (hidden_states.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()
                features.append(hidden_states / norm)
        return features


def reference_frames(num_frames: int, rng: np.random.Generator) -> list[int]:
    """Choose the frames of a clip for the perceptual term: frame 0 and the four of a random latent frame.

    Args:
        num_frames: Length of the clip, `4 * n + 1`; a single frame has no group.
        rng: Draws the group, one number per call for clips longer than one frame.
    """
    if num_frames < 1 or num_frames % 4 != 1:
        raise ValueError(f"`num_frames` must be 4 * n + 1 (1, 5, 9, ...), got {num_frames}.")
    if num_frames == 1:
        return [0]
    start = 1 + 4 * int(rng.integers(num_frames // 4))
    return [0, *range(start, start + 4)]


def ms_ssim(sample: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """One minus the multi-scale structural similarity, averaged over the frames.

    Equal to torchmetrics' (`data_range=2`) where all five scales fit, that is from 176 pixels per side; smaller frames
    have as many scales as keep 11 pixels, with the weights divided by their sum.

    Args:
        sample: Frames in `[-1, 1]`, shape `(num_frames, 3, height, width)`, each side at least 11.
        reconstruction: Their reconstruction, same shape, not clamped.

    Returns:
        A scalar in `[0, 1]`. Similarities are clamped to at least 1e-4 for the powers, whose slope at 0 is infinite.
    """
    _check_frames(sample, reconstruction, smallest=WINDOW_SIZE)
    dtype = torch.promote_types(sample.dtype, torch.float32)
    with torch.autocast(sample.device.type, enabled=False):
        sample, reconstruction = sample.to(dtype), reconstruction.to(dtype)
        num_scales = 1
        while num_scales < len(SCALE_WEIGHTS) and min(sample.shape[2:]) >> num_scales >= WINDOW_SIZE:
            num_scales += 1
        # Sum and difference instead of the two frames: four filterings instead of five, and where frames agree the
        # rounding of large squares (coarse in TF32) cancels between numerator and denominator.
        total, difference = sample + reconstruction, sample - reconstruction
        similarity = sample.new_ones(sample.shape[0])
        for scale in range(num_scales):
            if scale:
                total, difference = F.avg_pool2d(total, 2), F.avg_pool2d(difference, 2)
            weight = SCALE_WEIGHTS[scale] / sum(SCALE_WEIGHTS[:num_scales])
            value = _similarity(total, difference, with_luminance=scale == num_scales - 1)
            similarity = similarity * value.clamp(min=1e-4) ** weight
    return 1.0 - similarity.mean()


def _similarity(total: torch.Tensor, difference: torch.Tensor, with_luminance: bool) -> torch.Tensor:
    """SSIM of each frame, or without its luminance term: then over full windows only, as torchmetrics does it."""
    height, width = total.shape[2:]
    rows, columns = _gaussian_matrix(height, total), _gaussian_matrix(width, total)
    if not with_luminance:
        margin = WINDOW_SIZE // 2
        rows, columns = rows[margin:-margin], columns[margin:-margin]
    # As matrix products: a depthwise convolution of these few channels takes many times longer on a CPU.
    moments = rows @ (torch.cat((total, difference, total.square(), difference.square())) @ columns.T)
    mean_total, mean_difference, square_total, square_difference = moments.chunk(4)
    mean_total, mean_difference = mean_total.square(), mean_difference.square()
    variance_total = (square_total - mean_total).clamp(min=0.0)
    variance_difference = (square_difference - mean_difference).clamp(min=0.0)
    # SSIM's constants for a range of 2 are (2 * 0.01) ** 2 and (2 * 0.03) ** 2; doubled, like all the moments here.
    value = 1.0 - 2.0 * variance_difference / (variance_total + variance_difference + 2.0 * 0.06**2)
    if with_luminance:
        value = value * (1.0 - 2.0 * mean_difference / (mean_total + mean_difference + 2.0 * 0.02**2))
    return value.mean(dim=(1, 2, 3))


def _gaussian_matrix(size: int, like: torch.Tensor) -> torch.Tensor:
    """The Gaussian window along a side of `size` pixels, mirrored at both ends, as a `(size, size)` matrix."""
    offset = torch.arange(WINDOW_SIZE, device=like.device) - WINDOW_SIZE // 2
    window = torch.exp(-((offset.to(like.dtype) / WINDOW_SIGMA) ** 2) / 2)
    index = (torch.arange(size, device=like.device)[:, None] + offset).abs()
    index = size - 1 - (size - 1 - index).abs()
    weights = (window / window.sum()).expand(size, -1)
    return like.new_zeros(size, size).scatter_add(1, index, weights)


def _check_frames(sample: torch.Tensor, reconstruction: torch.Tensor, smallest: int) -> None:
    if sample.ndim != 4 or sample.shape[1] != 3 or min(sample.shape[2:]) < smallest:
        raise ValueError(
            f"`sample` must be frames (num_frames, 3, height, width) with sides of at least {smallest}, "
            f"got {tuple(sample.shape)}."
        )
    if reconstruction.shape != sample.shape:
        raise ValueError(
            f"`reconstruction` must have the shape of `sample`, {tuple(sample.shape)}, "
            f"got {tuple(reconstruction.shape)}."
        )


def _resolve_vgg16(vgg16: str | Path) -> Path:
    path = Path(vgg16).expanduser()
    if path.is_file():
        return path
    try:
        if path.suffix in CHECKPOINT_SUFFIXES or isinstance(vgg16, Path):
            raise FileNotFoundError("no such file")
        return Path(hf_hub_download(str(vgg16), "model.safetensors"))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"LPIPS has no weights: `vgg16` must be a file of torchvision's VGG16 weights or a Hub repository within "
            f"reach, such as a copy of https://huggingface.co/timm/vgg16.tv_in1k/resolve/main/model.safetensors, "
            f"got {str(vgg16)!r} ({type(error).__name__})."
        ) from error


def _load_tensors(path: Path, argument: str) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, SafetensorError) as error:
        raise ValueError(
            f"`{argument}` must be a readable file of weights ({', '.join(CHECKPOINT_SUFFIXES)}), got {str(path)!r}."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError(f"`{argument}` must be a file of named tensors, got something else in {str(path)!r}.")
    return tensors


def _check_tensors(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], argument: str) -> None:
    wrong = {key for key in tensors.keys() & expected.keys() if tensors[key].shape != expected[key].shape}
    wrong |= tensors.keys() ^ expected.keys()
    if wrong:
        example = min(wrong)
        shapes = [str(tuple(x[example].shape)) if example in x else "nothing" for x in (expected, tensors)]
        raise ValueError(
            f"`{argument}` must hold exactly the weights of LPIPS's VGG16: {len(wrong)} differ, "
            f"for instance {example!r} must be {shapes[0]}, got {shapes[1]}."
        )

"""Perceptual distances of single frames, in float32 even under autocast.

`LPIPS` (arXiv 1801.03924) needs the standard weights of VGG16, or of AlexNet; `ms_ssim` (Wang, Simoncelli, Bovik 2003)
needs none.
"""

import pickle
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..checks import CHECKPOINT_SUFFIXES, check_choice


CLASSIFIER_PREFIXES = ("classifier.", "pre_logits.", "head.")  # torchvision's and timm's names
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW_SIZE, WINDOW_SIGMA = 11, 1.5


class Convolution(NamedTuple):
    """A convolution of a trunk, which a ReLU follows; `pool` is the max-pooling before it, as size and stride."""

    channels: int
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1
    pool: tuple[int, int] | None = None
    is_tapped: bool = False


class Trunk(NamedTuple):
    """A network whose features LPIPS compares.

    Attributes:
        title: Name of the network.
        convolutions: From the pixels on.
        smallest: Sides that frames must have at least.
        heads: File of the linear heads in torchmetrics.
        hub: Repository of the Hub with the weights; `None` where there is none to rely on.
        source: Where the standard weights are.
    """

    title: str
    convolutions: tuple[Convolution, ...]
    smallest: int
    heads: str
    hub: str | None
    source: str


def _vgg16_convolutions() -> tuple[Convolution, ...]:
    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    return tuple(
        Convolution(width, pool=(2, 2) if number and not index else None, is_tapped=index == len(stage) - 1)
        for number, stage in enumerate(stages)
        for index, width in enumerate(stage)
    )


TRUNKS = {
    "vgg16": Trunk(
        "VGG16",
        _vgg16_convolutions(),
        16,
        "vgg.pth",
        "timm/vgg16.tv_in1k",
        "https://huggingface.co/timm/vgg16.tv_in1k/resolve/main/model.safetensors",
    ),
    "alexnet": Trunk(
        "AlexNet",
        (
            Convolution(64, 11, 4, 2, is_tapped=True),
            Convolution(192, 5, 1, 2, pool=(3, 2), is_tapped=True),
            Convolution(384, pool=(3, 2), is_tapped=True),
            Convolution(256, is_tapped=True),
            Convolution(256, is_tapped=True),
        ),
        31,
        "alex.pth",
        None,
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    ),
}


class LPIPS(nn.Module):
    """Learned perceptual distance on VGG16 or AlexNet features. Frozen; no layer behaves differently in training mode.

    The networks are written out here because the implementations of torchmetrics, lpips and piqa take them from
    torchvision, which this package must not need. Names and results are those of torchvision's networks.

    Args:
        state_dict: Weights under this module's own names, see `from_weights` for the files that are around;
            `None` leaves random weights.
        trunk: `"vgg16"` or `"alexnet"`.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, state_dict: dict[str, torch.Tensor] | None = None, trunk: str = "vgg16") -> None:
        super().__init__()
        check_choice("trunk", trunk, TRUNKS)
        self.trunk = TRUNKS[trunk]
        # Laid out as torchvision's `features`, so that the indices in the names agree; the last pooling is not used.
        layers: list[nn.Module] = []
        self.taps: list[int] = []
        self.heads = nn.ModuleList()
        num_channels = 3
        for convolution in self.trunk.convolutions:
            width, kernel_size, stride, padding, pool, is_tapped = convolution
            if pool is not None:
                layers.append(nn.MaxPool2d(*pool))
            layers += [nn.Conv2d(num_channels, width, kernel_size, stride, padding), nn.ReLU(inplace=True)]
            num_channels = width
            if is_tapped:
                self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        for convolution in self.trunk.convolutions:
            if convolution.is_tapped:
                head = nn.Conv2d(convolution.channels, 1, 1, bias=False)
                nn.init.uniform_(head.weight, 0.0, 1e-2)  # a distance: no negative weight
                self.heads.append(head)
        # Constants of LPIPS: ImageNet's statistics, moved to pixels in [-1, 1] and rounded.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).reshape(3, 1, 1), persistent=False)
        if state_dict is not None:
            self.load_state_dict(state_dict)
        self.requires_grad_(False).eval()

    @classmethod
    def from_weights(
        cls, weights: str | Path | None = None, linear_heads: str | Path | None = None, trunk: str = "vgg16"
    ) -> "LPIPS":
        """Load the standard weights.

        Args:
            weights: The trunk trained on ImageNet, under torchvision's names: a file (`.safetensors`, `.pth`, `.pt`,
                `.bin`) or a Hub repository that holds `model.safetensors`; `None` is `timm/vgg16.tv_in1k`, and needs
                VGG16. A classifier is ignored.
            linear_heads: File of the five linear heads, `lin0.model.1.weight` to `lin4.model.1.weight`; by default
                those that come with torchmetrics.
            trunk: `"vgg16"` or `"alexnet"`.

        Raises:
            ValueError: If weights cannot be found or read, or are not those of the trunk or of its heads.
        """
        lpips = cls(trunk=trunk)
        tensors = _load_tensors(_resolve_weights(weights, trunk), trunk)
        tensors = {key: value for key, value in tensors.items() if not key.startswith(CLASSIFIER_PREFIXES)}
        expected = lpips.state_dict()
        features = {key: value for key, value in expected.items() if key.startswith("features.")}
        _check_tensors(tensors, features, trunk, lpips.trunk.title)
        lpips.load_state_dict(tensors, strict=False)
        return lpips.load_heads(linear_heads)

    def load_heads(self, linear_heads: str | Path | None = None) -> "LPIPS":
        """Load the linear heads alone, from a file as of [`from_weights`]; returns itself."""
        if linear_heads is None:
            linear_heads = Path(str(files("torchmetrics"))) / "functional/image/lpips_models" / self.trunk.heads
        tensors = _load_tensors(Path(linear_heads), "linear_heads")
        names = {f"lin{i}.model.1.weight": f"heads.{i}.weight" for i in range(len(self.heads))}
        expected = self.state_dict()
        _check_tensors(tensors, {key: expected[name] for key, name in names.items()}, "linear_heads", self.trunk.title)
        self.load_state_dict({name: tensors[key] for key, name in names.items()}, strict=False)
        return self

    def forward(self, sample: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        """Compute the distance of each pair of frames; gradients reach `reconstruction` only.

        Args:
            sample: Frames in `[-1, 1]`, shape `(num_frames, 3, height, width)`, each side at least 16 (31 with
                AlexNet).
            reconstruction: Their reconstruction, same shape.

        Returns:
            Shape `(num_frames,)`, at least 0.
        """
        _check_frames(sample, reconstruction, smallest=self.trunk.smallest)
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


def _resolve_weights(weights: str | Path | None, name: str) -> Path:
    trunk = TRUNKS[name]
    if weights is None:
        weights = trunk.hub
    missing = f"LPIPS has no weights: `{name}` must be a file of torchvision's {trunk.title} weights"
    if weights is None:
        raise ValueError(f"{missing}, {trunk.source}, got none.")
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    try:
        if path.suffix in CHECKPOINT_SUFFIXES or isinstance(weights, Path):
            raise FileNotFoundError("no such file")
        return Path(hf_hub_download(str(weights), "model.safetensors"))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{missing} or a Hub repository within reach, such as a copy of {trunk.source}, got {str(weights)!r} "
            f"({type(error).__name__})."
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


def _check_tensors(
    tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], argument: str, title: str
) -> None:
    wrong = {key for key in tensors.keys() & expected.keys() if tensors[key].shape != expected[key].shape}
    wrong |= tensors.keys() ^ expected.keys()
    if wrong:
        example = min(wrong)
        shapes = [str(tuple(x[example].shape)) if example in x else "nothing" for x in (expected, tensors)]
        raise ValueError(
            f"`{argument}` must hold exactly the weights of LPIPS's {title}: {len(wrong)} differ, "
            f"for instance {example!r} must be {shapes[0]}, got {shapes[1]}."
        )

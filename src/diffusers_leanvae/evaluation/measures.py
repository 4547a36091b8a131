"""Metrics of clips by kind: each takes a clip piece by piece and keeps sums only, whatever the length."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..checks import check_choice, reason_of
from ..losses.perceptual import LPIPS
from .features import I3DFeatures, TransformerFeatures, VideoFeatures
from .ffmpeg_metrics import VMAF_MODEL, VmafStream, XpsnrStream, find_vmaf
from .metrics import (
    MS_SSIM_SMALLEST,
    PATCH_SIZE,
    flat_std,
    frame_grid,
    frame_ms_ssim,
    frame_psnr,
    frame_ssim_pair,
)
from .records import Metric
from .temporal import BLOCK_SIZE, JUMP_LEVELS, JUMP_PIXELS, GhostSums, flicker, ghost_sums, warp_error


KINDS = {
    "psnr": "PSNR of frames",
    "psnr_in_group": "PSNR of the first frame and of each place in the groups that share a latent frame",
    "ssim": "SSIM of frames, by two conventions",
    "ms_ssim": "MS-SSIM of frames",
    "lpips_vgg16": "LPIPS on VGG16",
    "lpips_alexnet": "LPIPS on AlexNet",
    "rfvd_i3d": "Frechet distance of I3D features",
    "rfvd_features": "Frechet distance of the features of a model of transformers",
    "vmaf": "VMAF, by the FFmpeg of imageio-ffmpeg",
    "xpsnr": "XPSNR of the luma, by FFmpeg",
    "flicker": "error of changes from frame to frame",
    "warp": "error of changes along the motion",
    "grid": "error that repeats with the cells of the latents, and unevenness of flat patches",
    "ghost": "share of another frame, and error, where frames that share a latent frame change abruptly",
}
_LPIPS_FRAMES = 4  # at a time: features of VGG16 take 100 MB for a frame of 256x256
_LARGEST = 100.0  # of equal frames, as for PSNR: XPSNR is infinite, and VMAF has no more
_SMALLEST_FILTERED = 18  # sides of frames; with one of 16, VMAF's process is killed
# XPSNR's blocks have sides of 4 * round(32 * sqrt(pixels / (3840 * 2160))); at 0, FFmpeg divides by it and is killed.
_XPSNR_PIXELS = 3840 * 2160 // 64**2
_PLACE = "frames over RGB with pixels in [0, 1], mean over frames and then over clips"


@dataclass(frozen=True)
class MetricOptions:
    """Where weights come from.

    Attributes:
        vgg16: File of torchvision's VGG16 or a Hub repository, `None` for the usual one; `"seed:0"` draws the weights:
            such figures compare with those of the same seed only.
        alexnet: File of torchvision's AlexNet, or a seed.
        i3d: File of StyleGAN-V's I3D torchscript.
        feature_model: Folder or Hub id of a vision model of transformers.
    """

    vgg16: str | None = None
    alexnet: str | None = None
    i3d: str | None = None
    feature_model: str | None = None


class Measure(ABC):
    """Figures of one kind for one clip after another.

    Attributes:
        metrics: The figures, by name.
    """

    metrics: dict[str, Metric]

    @abstractmethod
    def start(self, height: int, width: int) -> None:
        """Begin a clip of frames of this size.

        Raises:
            ValueError: If frames of this size cannot be measured.
        """

    @abstractmethod
    def update(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        """Take the next frames, each `(num_frames, 3, height, width)` in `[0, 1]`."""

    @abstractmethod
    def finish(self) -> dict[str, float]:
        """Return the figures of the clip; one that it has none of, such as flicker of an image, is left out."""

    def abandon(self) -> None:  # noqa: B027 (most have nothing to end)
        """End what is open, after `finish` or when a clip failed half-way."""


class FrameMeasure(Measure):
    """Means of figures of single frames.

    Args:
        metrics: The figures, by name.
        compute: From decoded and original frames to values `(num_frames,)` for each name.
        smallest: Sides that frames must have at least.
        batch_size: Frames that are computed together; `None` for all of a piece.
    """

    def __init__(
        self,
        metrics: dict[str, Metric],
        compute: Callable[[torch.Tensor, torch.Tensor], Iterable[torch.Tensor]],
        smallest: int = 1,
        batch_size: int | None = None,
    ) -> None:
        self.metrics, self.compute, self.smallest, self.batch_size = metrics, compute, smallest, batch_size

    def start(self, height: int, width: int) -> None:
        _check_sides(height, width, self.smallest)
        self.sums, self.num_frames = dict.fromkeys(self.metrics, 0.0), 0

    def update(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        size = self.batch_size or len(decoded)
        parts = [self.compute(*pair) for pair in zip(decoded.split(size), original.split(size), strict=True)]
        for name, *values in zip(self.metrics, *parts, strict=True):
            self.sums[name] += torch.cat(values).double().sum().item()
        self.num_frames += len(decoded)

    def finish(self) -> dict[str, float]:
        return {name: value / self.num_frames for name, value in self.sums.items()}


class GroupPsnr(Measure):
    """PSNR by the place of a frame: the first, and each place in the groups that share a latent frame.

    Args:
        ratio: Frames of a group.
    """

    def __init__(self, ratio: int) -> None:
        definition = f"PSNR of {_PLACE}; only of "
        self.ratio = ratio
        self.metrics = {
            f"psnr_frame_mean_rgb_{'first' if not place else f'group_{place}'}": Metric(
                f"PSNR {'first' if not place else f'place {place}'}",
                definition
                + ("the first frame." if not place else f"frame {place} of each group that shares a latent frame."),
                "dB",
                digits=2,
            )
            for place in range(ratio + 1)
        }

    def start(self, height: int, width: int) -> None:
        self.position = 0
        self.sums, self.counts = [0.0] * (self.ratio + 1), [0] * (self.ratio + 1)

    def update(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        for value in frame_psnr(decoded, original).tolist():
            place = 0 if self.position == 0 else (self.position - 1) % self.ratio + 1
            self.sums[place] += value
            self.counts[place] += 1
            self.position += 1

    def finish(self) -> dict[str, float]:
        return {
            name: total / count
            for name, total, count in zip(self.metrics, self.sums, self.counts, strict=True)
            if count
        }


class ChangeMeasure(Measure):
    """Means of figures of pairs of neighbouring frames; the last frame of a piece is kept for the next.

    Args:
        name: Of the figure.
        metric: The figure.
        compute: From decoded and original frames to sums and counts, `(num_frames - 1,)` each.
        smallest: Sides that frames must have at least.
    """

    def __init__(
        self,
        name: str,
        metric: Metric,
        compute: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        smallest: int = 1,
    ) -> None:
        self.metrics, self.compute, self.smallest = {name: metric}, compute, smallest

    def start(self, height: int, width: int) -> None:
        _check_sides(height, width, self.smallest)
        self.total, self.count = 0.0, 0
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        if self.last is not None:
            decoded, original = (torch.cat(pair) for pair in zip(self.last, (decoded, original), strict=True))
        self.last = decoded[-1:].clone(), original[-1:].clone()
        if len(decoded) > 1:
            sums, counts = self.compute(decoded, original)
            self.total += sums.double().sum().item()
            self.count += int(counts.sum())

    def finish(self) -> dict[str, float]:
        self.last = None
        return {name: self.total / self.count for name in self.metrics} if self.count else {}


class GridMeasure(Measure):
    """Error that repeats from cell to cell, and how even flat patches come back.

    Args:
        cell: Side of a cell in pixels: what a latent pixel stands for.
    """

    def __init__(self, cell: int) -> None:
        grid = (
            "Energy of the error that repeats diagonally from cell to cell over that which does not, in windows of "
            "2x2 cells over RGB, mean over windows and frames and then over clips; sides of cells are the spatial "
            "compression ratio, 8 pixels where none is known; 1 for no grid."
        )
        flat = (
            f"Standard deviation over RGB within patches of {PATCH_SIZE}x{PATCH_SIZE} pixels in which the original "
            "spans at most one level of 255, in such levels; "
        )
        name = f"flat_std_255_patch{PATCH_SIZE}"
        self.cell = cell
        self.metrics = {
            "grid_ratio_window_mean_rgb": Metric("grid", grid, better="lower", digits=3),
            name: Metric("flat std", f"{flat}mean over patches and then over clips.", better="lower", digits=3),
            f"{name}_worst": Metric(
                "flat std worst", f"{flat}worst patch, mean over clips.", better="lower", digits=3
            ),
        }

    def start(self, height: int, width: int) -> None:
        _check_sides(height, width, 2 * self.cell)
        self.grid, self.flat, self.worst, self.num_frames, self.num_flat = 0.0, 0.0, 0.0, 0, 0

    def update(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        self.grid += frame_grid(decoded, original, self.cell).double().sum().item()
        self.num_frames += len(decoded)
        deviations = flat_std(decoded, original)
        if len(deviations):
            self.flat += deviations.double().sum().item()
            self.worst = max(self.worst, deviations.max().item())
            self.num_flat += len(deviations)

    def finish(self) -> dict[str, float]:
        figures = [self.grid / self.num_frames]
        if self.num_flat:
            figures += [self.flat / self.num_flat, self.worst]
        return dict(zip(self.metrics, figures, strict=False))


class GhostMeasure(Measure):
    """Ghosts of frames that share a latent frame, by their places; a last group that is not whole does not count.

    Args:
        ratio: Frames of a group.
    """

    def __init__(self, ratio: int) -> None:
        where = (
            f"in pixels of which the original jumps by more than {JUMP_LEVELS} levels of 255 inside a group of frames "
            f"that share a latent frame, of groups with at least {JUMP_PIXELS}"
        )
        weight = (
            "Weight of the picture beyond the nearest jump in the frame, by least squares beside the picture itself "
            f"and its blur (5x5), {where}; 0 for no ghost, 0.5 for two equally strong pictures; "
        )
        error = f"Mean absolute error in levels of 255 {where}; "
        self.ratio = ratio
        self.metrics = {
            "ghost_weight": Metric("ghost", f"{weight}mean over clips.", better="lower", digits=3),
            "ghost_weight_worst": Metric(
                "ghost worst", f"{weight}worst frame, mean over clips.", better="lower", digits=3
            ),
            "ghost_mae_255": Metric("ghost error", f"{error}mean over clips.", better="lower", digits=2),
        }
        for place in range(1, ratio + 1):
            only = f"only of frame {place} of each group, mean over clips."
            self.metrics[f"ghost_weight_group_{place}"] = Metric(
                f"ghost place {place}", f"{weight}{only}", better="lower", digits=3
            )
            self.metrics[f"ghost_mae_255_group_{place}"] = Metric(
                f"ghost error place {place}", f"{error}{only}", better="lower", digits=2
            )

    def start(self, height: int, width: int) -> None:
        self.waiting: tuple[torch.Tensor, torch.Tensor] | None = None
        self.groups: list[GhostSums] = []

    def update(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        if self.waiting is None:  # the first frame has a latent frame of its own
            decoded, original = decoded[1:], original[1:]
        else:
            decoded, original = (torch.cat(pair) for pair in zip(self.waiting, (decoded, original), strict=True))
        whole = len(decoded) // self.ratio * self.ratio
        for first in range(0, whole, self.ratio):
            group = slice(first, first + self.ratio)
            sums = ghost_sums(decoded[group], original[group])
            if sums is not None:
                self.groups.append(sums)
        self.waiting = decoded[whole:].clone(), original[whole:].clone()

    def finish(self) -> dict[str, float]:
        self.waiting = None
        if not self.groups:
            return {}
        sums = GhostSums(*(torch.stack(parts) for parts in zip(*self.groups, strict=True)))
        places = GhostSums(*(part.sum(dim=0) for part in sums))
        clip = GhostSums(*(part.sum() for part in places))
        figures = [clip.weight().item(), sums.weight().max().item(), clip.mean_error().item()]
        for pair in zip(places.weight().tolist(), places.mean_error().tolist(), strict=True):
            figures += pair
        return dict(zip(self.metrics, figures, strict=True))


class FilterMeasure(Measure):
    """Means of figures of frames by a filter of FFmpeg.

    Args:
        name: Of the figure.
        metric: The figure.
        open_stream: Opens the filter for frames of a height and width.
        num_pixels: Pixels that frames must have at least.
    """

    def __init__(
        self,
        name: str,
        metric: Metric,
        open_stream: Callable[[int, int], VmafStream | XpsnrStream],
        num_pixels: int = _SMALLEST_FILTERED**2,
    ) -> None:
        self.metrics, self.open_stream, self.num_pixels = {name: metric}, open_stream, num_pixels
        self.stream: VmafStream | XpsnrStream | None = None

    def start(self, height: int, width: int) -> None:
        if min(height, width) < _SMALLEST_FILTERED or height % 2 or width % 2:
            raise ValueError(f"needs frames with even sides of at least {_SMALLEST_FILTERED}, got {height}x{width}")
        if height * width < self.num_pixels:
            raise ValueError(f"needs frames of at least {self.num_pixels} pixels, got {height}x{width}")
        self.stream = self.open_stream(height, width)

    def update(self, decoded: torch.Tensor, original: torch.Tensor) -> None:
        assert self.stream is not None
        self.stream.write(decoded, original)

    def finish(self) -> dict[str, float]:
        assert self.stream is not None
        values = self.stream.finish()
        return {name: sum(min(value, _LARGEST) for value in values) / len(values) for name in self.metrics}

    def abandon(self) -> None:
        if self.stream is not None:
            self.stream.close()


def _check_sides(height: int, width: int, smallest: int) -> None:
    if min(height, width) < smallest:
        raise ValueError(f"needs frames with sides of at least {smallest}, got {height}x{width}")


@dataclass
class Measures:
    """What is to be measured, ready to use.

    Attributes:
        clips: Measures of single clips, by kind.
        features: Networks for Frechet distances, by kind.
        missing: Why each kind that was asked for is left out, in one sentence.
    """

    clips: dict[str, Measure]
    features: dict[str, VideoFeatures]
    missing: dict[str, str]

    @property
    def metrics(self) -> dict[str, Metric]:
        """The figures of single clips, by name."""
        return {name: metric for measure in self.clips.values() for name, metric in measure.metrics.items()}


def make_measures(
    kinds: Iterable[str],
    options: MetricOptions | None = None,
    device: torch.device | str = "cpu",
    ratio: int = 4,
    cell: int = 8,
) -> Measures:
    """Make the measures of some kinds; one whose weights or programs cannot be had is left out and named.

    Args:
        kinds: Keys of [`KINDS`].
        options: Where weights come from.
        device: Where to compute.
        ratio: Frames that share a latent frame.
        cell: Side in pixels of what a latent pixel stands for.
    """
    options, made = options or MetricOptions(), Measures({}, {}, {})
    sized = {"psnr_in_group": GroupPsnr(ratio), "grid": GridMeasure(cell), "ghost": GhostMeasure(ratio)}
    for kind in kinds:
        check_choice("metrics", kind, KINDS)
        try:
            if kind == "rfvd_i3d":
                made.features[kind] = I3DFeatures(options.i3d, device)
            elif kind == "rfvd_features":
                made.features[kind] = TransformerFeatures(options.feature_model, device)
            else:
                made.clips[kind] = sized[kind] if kind in sized else _make(kind, options, device)
        except (ValueError, ImportError) as error:
            made.missing[kind] = f"{reason_of(error)}."
    return made


def _make(kind: str, options: MetricOptions, device: torch.device | str) -> Measure:
    if kind == "psnr":
        metric = Metric("PSNR", f"PSNR of {_PLACE}; at most 100.", "dB", digits=2)
        return FrameMeasure({"psnr_frame_mean_rgb": metric}, lambda *pair: [frame_psnr(*pair)])
    if kind == "ssim":
        window = "Gaussian window 11x11 of sigma 1.5, each channel"
        metrics = {
            "ssim_frame_mean_rgb": Metric("SSIM", f"SSIM of {_PLACE}; {window}, edges mirrored, as in torchmetrics."),
            "ssim_valid_frame_mean_rgb": Metric(
                "SSIM valid", f"SSIM of {_PLACE}; {window}, only where the window fits, as in the reference."
            ),
        }
        return FrameMeasure(metrics, frame_ssim_pair)
    if kind == "ms_ssim":
        metric = Metric("MS-SSIM", f"MS-SSIM of {_PLACE}; five scales, as in torchmetrics.")
        measure = {"ms_ssim_frame_mean_rgb": metric}
        return FrameMeasure(measure, lambda *pair: [frame_ms_ssim(*pair)], smallest=MS_SSIM_SMALLEST)
    if kind in ("lpips_vgg16", "lpips_alexnet"):
        trunk = kind.removeprefix("lpips_")
        return _lpips(trunk, getattr(options, trunk), device)
    if kind == "vmaf":
        program = find_vmaf()
        metric = Metric(
            "VMAF", f"VMAF ({VMAF_MODEL}) of 8-bit 4:2:0 BT.709 frames, mean over frames and clips.", digits=2
        )
        name = f"{VMAF_MODEL.replace('.', '_')}_frame_mean"
        return FilterMeasure(name, metric, lambda height, width: VmafStream(program, height, width))
    if kind == "xpsnr":
        definition = "XPSNR of the luma of 8-bit 4:2:0 BT.709 frames, mean over frames and clips; at most 100."
        metric = Metric("XPSNR", definition, "dB", digits=2)
        return FilterMeasure("xpsnr_y_frame_mean", metric, XpsnrStream, _XPSNR_PIXELS)
    if kind == "flicker":
        definition = (
            "Mean absolute difference between the changes from frame to frame of reconstruction and original, in "
            "levels of 255, mean over clips."
        )
        metric = Metric("flicker", definition, better="lower", digits=3)
        return ChangeMeasure("flicker_mae_255", metric, _count_pairs)
    definition = (
        f"As flicker, but each block of {BLOCK_SIZE}x{BLOCK_SIZE} pixels is compared with where it was in the frame "
        "before, by the motion of the original; blocks that are not found again do not count."
    )
    metric = Metric("warp error", definition, better="lower", digits=3)
    return ChangeMeasure("warp_mae_255_block16", metric, warp_error, BLOCK_SIZE)


def _count_pairs(decoded: torch.Tensor, original: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = flicker(decoded, original)
    return values, torch.ones_like(values)


def _lpips(trunk: str, weights: str | None, device: torch.device | str) -> Measure:
    seed = None
    if weights is not None and weights.startswith("seed:"):
        seed = weights.removeprefix("seed:")
        if not seed.isdecimal():
            raise ValueError(
                f"`{trunk}` must be a file, a Hub repository or a seed such as 'seed:0', got {weights!r}."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            lpips = LPIPS(trunk=trunk).load_heads()
    else:
        lpips = LPIPS.from_weights(weights, trunk=trunk)
    lpips.to(device)
    title = lpips.trunk.title
    drawn = "" if seed is None else f" with random weights of seed {seed}, good only to compare with the same"
    metric = Metric(
        f"LPIPS {title}" + ("" if seed is None else f" seed {seed}"),
        f"LPIPS on {title}{drawn}, mean over frames and clips.",
        better="lower",
    )
    name = f"lpips_{trunk}{'' if seed is None else f'_seed_{seed}'}_frame_mean"

    def compute(decoded: torch.Tensor, original: torch.Tensor) -> list[torch.Tensor]:
        return [lpips(original * 2 - 1, decoded * 2 - 1)]

    return FrameMeasure({name: metric}, compute, lpips.trunk.smallest, _LPIPS_FRAMES)

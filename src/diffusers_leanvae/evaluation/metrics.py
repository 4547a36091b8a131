"""Image metrics per frame: PSNR, grid and flatness here, SSIM and MS-SSIM from torchmetrics."""

import math

import torch

from ..checks import check_positive


WINDOW_SIZE = 11
MS_SSIM_SMALLEST = 161  # sides of frames: five scales, of which the last must be larger than 10 pixels
PATCH_SIZE = 16  # of flat patches: whole cells of compression by 8 and by 16
_ROUNDING = 1e-3  # by which values may be outside of [0, 1]: of float16, twice
_FLAT_RANGE = 1.001 / 255  # one level, and the rounding of float32


def check_frames(frames: torch.Tensor, reference: torch.Tensor, hides_nan: bool = False) -> None:
    """Refuse what is no pair of videos `(num_frames, channels, height, width)` in `[0, 1]`, before it gives a figure.

    Args:
        frames: What is measured.
        reference: What it is measured against.
        hides_nan: Whether NaN would not show in the figure, and so is refused, too.

    Raises:
        ValueError: In one sentence.
    """
    for name, x in (("frames", frames), ("reference", reference)):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"`{name}` must be a floating-point tensor, got {kind}.")
        if x.ndim != 4 or 0 in x.shape[1:]:
            raise ValueError(f"`{name}` must have shape (num_frames, 3, height, width), got {tuple(x.shape)}.")
    if frames.shape != reference.shape:
        raise ValueError(
            f"`reference` must have the shape {tuple(frames.shape)} of `frames`, got {tuple(reference.shape)}."
        )
    if not len(frames):
        return
    extremes = torch.stack([x.float() for pair in (frames, reference) for x in pair.detach().aminmax()]).tolist()
    for name, (low, high) in (("frames", extremes[:2]), ("reference", extremes[2:])):
        is_nan = hides_nan and math.isnan(low)
        if is_nan or low < -_ROUNDING or high > 1 + _ROUNDING:
            found = "NaN" if is_nan else f"{low:.6g} to {high:.6g}"
            raise ValueError(f"`{name}` must have values in [0, 1], got {found}.")


def frame_psnr(frames: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """PSNR of each frame over its three channels.

    Args:
        frames: `(num_frames, 3, height, width)` in `[0, 1]`.
        reference: Same shape and range.

    Returns:
        `(num_frames,)` in dB, at most 100 (equal frames); NaN of frames that hold some.
    """
    check_frames(frames, reference)
    error = (frames.float() - reference.float()).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()


def frame_ssim(frames: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """SSIM of each frame with mirrored edges, the first of [`frame_ssim_pair`]."""
    return frame_ssim_pair(frames, reference)[0]


def frame_ssim_pair(frames: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SSIM (Gaussian window 11, sigma 1.5, RGB mean) of each frame, by two conventions.

    Args:
        frames: `(num_frames, 3, height, width)` in `[0, 1]`.
        reference: Same shape and range.

    Returns:
        Twice `(num_frames,)`: over all pixels, with mirrored edges, as torchmetrics does it; and over those around
        which the window fits, as scikit-image and the reference do it. Frames with a side below 11 pixels have no full
        window: their edges are mirrored first.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    check_frames(frames, reference)
    shortest = min(frames.shape[2:])
    if shortest < WINDOW_SIZE:  # the window is padded by reflection, which needs more pixels than it adds
        sizes = frames.shape[2:]
        index = [torch.arange(max(size, WINDOW_SIZE)).remainder(2 * size).to(frames.device) for size in sizes]
        index = [torch.where(i < size, i, 2 * size - 1 - i) for i, size in zip(index, frames.shape[2:], strict=True)]
        frames, reference = (x.index_select(2, index[0]).index_select(3, index[1]) for x in (frames, reference))
    value, image = structural_similarity_index_measure(
        frames.float(), reference.float(), data_range=1.0, reduction="none", return_full_image=True
    )
    margin = WINDOW_SIZE // 2
    return torch.as_tensor(value), image[..., margin:-margin, margin:-margin].mean(dim=(1, 2, 3))


def frame_ms_ssim(frames: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """MS-SSIM (five scales) of each frame.

    Args:
        frames: `(num_frames, 3, height, width)` in `[0, 1]`, sides at least 161.
        reference: Same shape and range.

    Returns:
        `(num_frames,)`.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    check_frames(frames, reference)
    value = multiscale_structural_similarity_index_measure(
        frames.float(), reference.float(), data_range=1.0, reduction="none"
    )
    return torch.as_tensor(value)


def frame_grid(frames: torch.Tensor, reference: torch.Tensor, cell: int) -> torch.Tensor:
    """Error of each frame that repeats from cell to cell, relative to error that does not: a grid, if it is above 1.

    In each window of 2x2 cells, of which each has its mean taken off, the energy of the sums of diagonally
    neighbouring cells is divided by that of their differences. Sums hold the spatial frequencies of the lattice, the
    multiples of `1 / cell`; differences hold those of the lattice shifted by half a step. Along the diagonals, lines
    and edges, which are mostly upright or level and repeat along themselves, are no grid. Windows count alike, however
    large their error is, since a grid shows where there is little else.

    Both energies have that of rounding to 8 bits added, 1/12 level squared for each pixel, so that a grid far below a
    level is none. Expected are 1 for white noise and for no error, and `1 + 2 * v / (n + 1/12)` for a grid of sample
    variance `v` within a cell in white noise of variance `n`, in levels of 255 squared.

    Args:
        frames: `(num_frames, 3, height, width)` in `[0, 1]`, sides at least `2 * cell`. What windows leave over at the
            right and at the bottom does not count.
        reference: Same shape and range.
        cell: Side of a cell in pixels: what a latent pixel stands for.

    Returns:
        `(num_frames,)`, the means over windows; 0 where neighbouring cells have opposite errors.
    """
    check_frames(frames, reference)
    check_positive("cell", cell)
    if min(frames.shape[2:]) < 2 * cell:
        raise ValueError(f"`frames` must have sides of at least {2 * cell}, got {tuple(frames.shape[2:])}.")
    height, width = (size // (2 * cell) * 2 * cell for size in frames.shape[2:])
    error = 255 * (frames[..., :height, :width].float() - reference[..., :height, :width].float())
    windows = error.unflatten(3, (-1, 2, cell)).unflatten(2, (-1, 2, cell))
    windows = windows - windows.mean(dim=(4, 7), keepdim=True)
    a, b, c, d = (windows[:, :, :, y, :, :, x] for y in range(2) for x in range(2))
    rounding = 4 * error.shape[1] * (cell**2 - 1) / 12

    def energy(*parts: torch.Tensor) -> torch.Tensor:
        return rounding + torch.stack(parts).square().sum(dim=(0, 2, 4, 6))

    return (energy(a + d, b + c) / energy(a - d, b - c)).mean(dim=(1, 2))


def flat_std(frames: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Standard deviation within the patches of 16x16 pixels that are flat in the reference.

    Flat are those in which no channel of the reference spans more than one level of 255.

    Args:
        frames: `(num_frames, 3, height, width)` in `[0, 1]`.
        reference: Same shape and range.

    Returns:
        `(num_flat_patches,)` of all frames, the root mean square over the channels, in levels of 255.
    """
    check_frames(frames, reference, hides_nan=True)
    height, width = (size // PATCH_SIZE * PATCH_SIZE for size in frames.shape[2:])
    frames, reference = (
        x[..., :height, :width].float().unflatten(3, (-1, PATCH_SIZE)).unflatten(2, (-1, PATCH_SIZE))
        for x in (frames, reference)
    )
    is_flat = (reference.amax(dim=(3, 5)) - reference.amin(dim=(3, 5))).amax(dim=1) <= _FLAT_RANGE
    return 255 * frames.var(dim=(3, 5), correction=0).mean(dim=1)[is_flat].sqrt()

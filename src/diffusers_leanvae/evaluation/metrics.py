"""Image metrics per frame: PSNR here, SSIM and MS-SSIM from torchmetrics."""

import torch


WINDOW_SIZE = 11
MS_SSIM_SMALLEST = 161  # sides of frames: five scales, of which the last must be larger than 10 pixels


def frame_psnr(frames: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """PSNR of each frame over its three channels.

    Args:
        frames: `(num_frames, 3, height, width)` in `[0, 1]`.
        reference: Same shape and range.

    Returns:
        `(num_frames,)` in dB, at most 100 (equal frames).
    """
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

    value = multiscale_structural_similarity_index_measure(
        frames.float(), reference.float(), data_range=1.0, reduction="none"
    )
    return torch.as_tensor(value)

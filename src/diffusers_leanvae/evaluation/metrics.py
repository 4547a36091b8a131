"""Image metrics per frame: PSNR here, SSIM from torchmetrics."""

import torch


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
    """SSIM (Gaussian window 11, sigma 1.5, RGB mean) of each frame.

    Args:
        frames: `(num_frames, 3, height, width)` in `[0, 1]`.
        reference: Same shape and range.

    Returns:
        `(num_frames,)`. Frames with a side below 11 pixels have no full window: their edges are mirrored first.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    shortest = min(frames.shape[2:])
    if shortest < 11:  # the window is padded by reflection, which needs more pixels than it adds
        index = [torch.arange(max(size, 11)).remainder(2 * size).to(frames.device) for size in frames.shape[2:]]
        index = [torch.where(i < size, i, 2 * size - 1 - i) for i, size in zip(index, frames.shape[2:], strict=True)]
        frames, reference = (x.index_select(2, index[0]).index_select(3, index[1]) for x in (frames, reference))
    value = structural_similarity_index_measure(frames.float(), reference.float(), data_range=1.0, reduction="none")
    return torch.as_tensor(value)

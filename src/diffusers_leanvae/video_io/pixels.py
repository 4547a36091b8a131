"""Pixels in their three ranges, and frames resized, cropped and laid out in a grid.

"Pixels" are uint8 in `[0, 255]`, as files hold them; a "sample" is floating point in `[-1, 1]`, as autoencoders take
it; a "unit" tensor is floating point in `[0, 1]`, as metrics and pipelines take it. Conversions work on any shape and
device, compute in float32, and leave their argument as it is.
"""

from typing import Literal

import torch
import torch.nn.functional as F


def pixels_to_sample(pixels: torch.Tensor) -> torch.Tensor:
    """Convert pixels, uint8 or resampled and not rounded, to float32 in `[-1, 1]`."""
    return pixels.to(torch.float32, copy=True).div_(127.5).sub_(1.0)


def as_sample(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 pixels to float32 in `[-1, 1]`; floating point is taken for a sample and returned as it is."""
    return pixels_to_sample(pixels) if pixels.dtype == torch.uint8 else pixels


def pixels_to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """Convert pixels to float32 in `[0, 1]`."""
    return pixels.to(torch.float32, copy=True).div_(255)


def sample_to_unit(sample: torch.Tensor) -> torch.Tensor:
    """Convert a sample to float32 in `[0, 1]`, clipping what lies outside `[-1, 1]`."""
    return sample.float().add(1).div_(2).clamp_(0, 1)


def unit_to_pixels(unit: torch.Tensor) -> torch.Tensor:
    """Round `[0, 1]` to uint8 pixels; values outside must be clipped before.

    Raises:
        ValueError: If there is a NaN, of which pixels would be black.
    """
    if unit.isnan().any():
        raise ValueError("Frames must be numbers, got NaN: the weights hold some, or their dtype overflows.")
    return unit.float().mul(255).round_().byte()


def sample_to_pixels(sample: torch.Tensor) -> torch.Tensor:
    """Round a sample to uint8 pixels, clipping what lies outside `[-1, 1]`."""
    return unit_to_pixels(sample_to_unit(sample))


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width after scaling the shorter of them to `short_side`, the aspect ratio kept."""
    scale = short_side / min(height, width)
    return max(short_side, round(height * scale)), max(short_side, round(width * scale))


def resize_frames(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize `(num_frames, height, width, 3)` frames with antialiased bicubic weights; the dtype stays.

    `uint8` is rounded and clipped by the resampler, floating point is neither.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    # A THWC tensor seen as TCHW is channels-last, which is the layout of the fast uint8 resampler.
    resized = F.interpolate(frames.permute(0, 3, 1, 2), size=(height, width), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1)


def center_crop(
    frames: torch.Tensor, height: int, width: int, rounding: Literal["down", "even"] = "down"
) -> torch.Tensor:
    """Cut the centre out of `(num_frames, height, width, channels)` frames, as a view.

    Args:
        frames: At least as large as the crop.
        height: Height of the crop.
        width: Width of the crop.
        rounding: Half a pixel that is left over at the top or on the left goes `"down"`, or to the `"even"` number,
            which is torchvision's rule.
    """
    margins = frames.shape[1] - height, frames.shape[2] - width
    top, left = (margin // 2 if rounding == "down" else round(margin / 2) for margin in margins)
    return frames[:, top : top + height, left : left + width]


def video_grid(videos: torch.Tensor) -> torch.Tensor:
    """Arrange videos in a grid that is as wide as it is high or one wider; missing places are black.

    Args:
        videos: `(num_videos, num_frames, height, width, channels)`.

    Returns:
        `(num_frames, rows * height, columns * width, channels)`.
    """
    count, num_frames, height, width, channels = videos.shape
    columns = int(max(count - 1, 0) ** 0.5) + 1
    rows = -(-count // columns)
    grid = videos.new_zeros(rows * columns, num_frames, height, width, channels)
    grid[:count] = videos
    grid = grid.view(rows, columns, num_frames, height, width, channels).permute(2, 0, 3, 1, 4, 5)
    return grid.reshape(num_frames, rows * height, columns * width, channels)

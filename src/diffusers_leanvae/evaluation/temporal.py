"""Errors in how a video changes from frame to frame: flicker, and the same along the motion."""

import torch
import torch.nn.functional as F


BLOCK_SIZE, SEARCH_RANGE = 16, 7
# Of a block that was found again: mean absolute difference, pixels in [0, 1]. Others are uncovered or too fast.
MATCH_LIMIT = 8 / 255


def flicker(frames: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference between the changes from frame to frame of two videos.

    Args:
        frames: `(num_frames, 3, height, width)` in `[0, 1]`, at least two.
        reference: Same shape and range.

    Returns:
        `(num_frames - 1,)` in levels of 255.
    """
    difference = frames.float() - reference.float()
    return 255 * difference.diff(dim=0).abs().mean(dim=(1, 2, 3))


def warp_error(frames: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flicker along the motion of the reference: each block is compared with where it was in the frame before.

    Motion is that of blocks of 16x16 pixels by whole pixels, up to 7 in each direction, with the smallest absolute
    difference of grey; the smaller motion where two are equal. Blocks that are not found again (mean absolute
    difference above 8 levels) do not count, nor does what is left over at the right and at the bottom.

    Args:
        frames: `(num_frames, 3, height, width)` in `[0, 1]`, at least two, sides at least 16.
        reference: Same shape and range; motion comes from it alone.

    Returns:
        Sums over the blocks of the mean absolute difference in levels of 255, and numbers of blocks, each
        `(num_frames - 1,)`.
    """
    height, width = (size // BLOCK_SIZE * BLOCK_SIZE for size in frames.shape[2:])
    if not height or not width:
        raise ValueError(f"`frames` must have sides of at least {BLOCK_SIZE}, got {tuple(frames.shape[2:])}.")
    frames, reference = (x[..., :height, :width].float() for x in (frames, reference))
    grey = reference.mean(dim=1)
    before = F.pad(grey[:-1], (SEARCH_RANGE,) * 4, mode="replicate")
    steps = range(-SEARCH_RANGE, SEARCH_RANGE + 1)
    motions = sorted(((y, x) for y in steps for x in steps), key=lambda motion: motion[0] ** 2 + motion[1] ** 2)
    best = grey.new_full((len(grey) - 1, height // BLOCK_SIZE, width // BLOCK_SIZE), torch.inf)
    found = torch.zeros_like(best, dtype=torch.long)
    for number, (y, x) in enumerate(motions):
        shifted = before[:, SEARCH_RANGE + y :, SEARCH_RANGE + x :][:, :height, :width]
        distance = F.avg_pool2d((grey[1:] - shifted).abs(), BLOCK_SIZE)
        found = torch.where(distance < best, number, found)
        best = torch.minimum(distance, best)
    motion = torch.tensor(motions, device=grey.device)[found]  # (num_frames - 1, rows, columns, 2)
    motion = motion.repeat_interleave(BLOCK_SIZE, dim=1).repeat_interleave(BLOCK_SIZE, dim=2)
    row = (torch.arange(height, device=grey.device)[:, None] + motion[..., 0]).clamp(0, height - 1)
    column = (torch.arange(width, device=grey.device) + motion[..., 1]).clamp(0, width - 1)
    difference = frames - reference
    index = (row * width + column).flatten(1)[:, None].expand(-1, 3, -1)
    moved = difference[:-1].flatten(2).gather(2, index).unflatten(2, (height, width))
    change = F.avg_pool2d((difference[1:] - moved).abs().mean(dim=1), BLOCK_SIZE)
    counts = best <= MATCH_LIMIT
    return 255 * (change * counts).sum(dim=(1, 2)), counts.sum(dim=(1, 2))

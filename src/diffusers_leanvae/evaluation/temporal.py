"""Errors in how a video changes from frame to frame: flicker, the same along the motion, and ghosts."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .metrics import check_frames


BLOCK_SIZE, SEARCH_RANGE = 16, 7
# Of a block that was found again: mean absolute difference, pixels in [0, 1]. Others are uncovered or too fast.
MATCH_LIMIT = 8 / 255
JUMP_LEVELS, JUMP_PIXELS = 64, 64  # of a jump: least change in levels of 255, and pixels of a frame that have one
_SURROUNDINGS = 5  # pixels


def flicker(frames: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference between the changes from frame to frame of two videos.

    Args:
        frames: `(num_frames, 3, height, width)` in `[0, 1]`, at least two.
        reference: Same shape and range.

    Returns:
        `(num_frames - 1,)` in levels of 255.
    """
    check_frames(frames, reference)
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
    check_frames(frames, reference, hides_nan=True)
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
    index = (row * width + column).flatten(1)[:, None].expand(-1, frames.shape[1], -1)
    moved = difference[:-1].flatten(2).gather(2, index).unflatten(2, (height, width))
    change = F.avg_pool2d((difference[1:] - moved).abs().mean(dim=1), BLOCK_SIZE)
    counts = best <= MATCH_LIMIT
    return 255 * (change * counts).sum(dim=(1, 2)), counts.sum(dim=(1, 2))


class GhostSums(NamedTuple):
    """Sums over the pixels that jump, in float64, `(num_frames,)` each: what ghosts of frames are computed from.

    For each channel of such a pixel, `error` is what the frame differs by, `change` what the reference has beyond the
    jump, and `blur` the mean around it in the reference, all from the pixel's value in the reference.
    """

    error_change: torch.Tensor
    error_blur: torch.Tensor
    change_change: torch.Tensor
    change_blur: torch.Tensor
    blur_blur: torch.Tensor
    absolute_error: torch.Tensor
    count: torch.Tensor

    def weight(self) -> torch.Tensor:
        """Weight of the wrong picture, as of [`ghost_sums`]."""
        determinant = self.change_change * self.blur_blur - self.change_blur.square()
        both = (self.error_change * self.blur_blur - self.error_blur * self.change_blur) / determinant
        alone = self.error_change / self.change_change.clamp(min=1e-12)
        # Flat pictures have nothing to blur, and of some changes a blur cannot be told.
        return torch.where(determinant <= 1e-6 * self.change_change * self.blur_blur, alone, both)

    def mean_error(self) -> torch.Tensor:
        """Mean absolute error in levels of 255."""
        return 255 * self.absolute_error / self.count


def ghost_sums(frames: torch.Tensor, reference: torch.Tensor) -> GhostSums | None:
    """Find how much each frame of a group shows of the picture that comes before or after it in the group.

    A pixel jumps if the reference changes by more than 64 levels, in some channel, from one frame of the group to the
    next. There, frames are explained as their reference and two weighted differences from it (least squares over
    pixels and channels): towards the value beyond the nearest jump in time (of two equally near, the earlier), and
    towards the mean of the 5x5 pixels around in the same frame. The weight of the first is the ghost: 0 for a frame
    that shows itself alone, 0.5 for two pictures as strong as each other, 1 for the wrong picture. The second takes
    up what a frame loses by being blurred, which else would count as a ghost: strokes get the colour that was there
    before them.

    Args:
        frames: `(num_frames, 3, height, width)` in `[0, 1]`: those that share a latent frame.
        reference: Same shape and range.

    Returns:
        What the weights are computed from; `None` if fewer than 64 pixels jump.
    """
    check_frames(frames, reference, hides_nan=True)
    jumps = reference.float().diff(dim=0).abs().amax(dim=1) > JUMP_LEVELS / 255
    chosen = jumps.any(dim=0)
    if chosen.sum() < JUMP_PIXELS:
        return None
    around = F.avg_pool2d(
        reference.float(), _SURROUNDINGS, stride=1, padding=_SURROUNDINGS // 2, count_include_pad=False
    )
    frames, reference, around = (x[..., chosen].double() for x in (frames, reference, around))
    error, blur = frames - reference, around - reference
    change = torch.stack([_beyond(reference, jumps[:, chosen], place) for place in range(len(frames))]) - reference

    def total(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x * y).sum(dim=(1, 2))

    return GhostSums(
        error_change=total(error, change),
        error_blur=total(error, blur),
        change_change=total(change, change),
        change_blur=total(change, blur),
        blur_blur=total(blur, blur),
        absolute_error=total(error, error.sign()),
        count=torch.full((len(error),), error[0].numel(), dtype=error.dtype, device=error.device),
    )


def _beyond(frames: torch.Tensor, jumps: torch.Tensor, place: int) -> torch.Tensor:
    """Take what pixels `(channels, num_pixels)` have beyond the jump that is nearest to a frame."""
    found = frames[place]
    for distance in reversed(range(len(jumps))):  # what is nearer replaces what is farther
        for jump, frame in ((place + distance, place + distance + 1), (place - distance - 1, place - distance - 1)):
            if 0 <= jump < len(jumps):
                found = torch.where(jumps[jump], frames[frame], found)
    return found

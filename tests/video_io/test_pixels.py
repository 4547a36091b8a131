"""Conversions of pixels against formulas written out, at all levels and at the edges; resizing, cropping, the grid."""

import numpy as np
import pytest
import torch

from diffusers_leanvae.video_io.pixels import (
    center_crop,
    pixels_to_sample,
    pixels_to_unit,
    resize_frames,
    sample_to_pixels,
    sample_to_unit,
    short_side_size,
    unit_to_pixels,
    video_grid,
)


LEVELS = torch.arange(256, dtype=torch.uint8)


def awkward_samples() -> torch.Tensor:
    """Random numbers in and around `[-1, 1]`, both ends with their neighbours, and what cannot be a pixel."""
    random = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    ends = np.array([-1, 0, 1, -0.0], np.float32)
    near = np.concatenate([np.nextafter(ends, np.float32(way)) for way in (-2, 2)])
    return torch.cat((random, torch.from_numpy(np.concatenate([ends, near])), torch.tensor([1e30, -1e30, 1e-40])))


def test_every_level_comes_back():
    sample, unit = pixels_to_sample(LEVELS), pixels_to_unit(LEVELS)
    assert sample.dtype == unit.dtype == torch.float32
    assert (sample[0], sample[-1], unit[0], unit[-1]) == (-1, 1, 0, 1)
    assert torch.equal(sample_to_pixels(sample), LEVELS) and torch.equal(unit_to_pixels(unit), LEVELS)
    assert torch.equal(sample, LEVELS / 127.5 - 1) and torch.equal(unit, LEVELS / 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_samples_by_other_ways_of_writing_it(dtype: torch.dtype):
    sample = awkward_samples().to(dtype)
    before = sample.clone()
    unit = sample_to_unit(sample)
    assert unit.dtype == torch.float32
    assert torch.equal(unit, sample.float().clamp(-1, 1).add(1).div(2))  # clipping before or after is the same
    assert torch.equal(sample_to_pixels(sample), sample.float().clamp(-1, 1).add(1).mul(127.5).round().byte())
    assert torch.equal(sample, before)


def test_arguments_stay_as_they_are():
    values = torch.linspace(-1, 1, 101)
    for convert in (pixels_to_sample, pixels_to_unit, sample_to_unit, unit_to_pixels, sample_to_pixels):
        argument = values.clone()
        convert(argument)
        assert torch.equal(argument, values)


def test_resampled_pixels_are_not_rounded():
    resampled = torch.tensor([0.25, 127.5, 260.0])
    assert torch.equal(pixels_to_sample(resampled), resampled / 127.5 - 1)


def test_resizing():
    frames = torch.full((2, 32, 48, 3), 7, dtype=torch.uint8)
    assert torch.equal(resize_frames(frames, 16, 24), frames[:, :16, :24])
    assert resize_frames(frames, 32, 48) is frames
    assert (short_side_size(32, 48, 16), short_side_size(48, 32, 16)) == ((16, 24), (24, 16))
    assert short_side_size(7, 3, 2) == (5, 2)  # 4.67


@pytest.mark.parametrize(("size", "down", "even"), [(10, 2, 2), (9, 2, 2), (11, 1, 2), (7, 3, 4), (13, 0, 0)])
def test_the_centre(size: int, down: int, even: int):
    frames = torch.arange(14 * 14 * 3).view(1, 14, 14, 3)
    for rounding, first in (("down", down), ("even", even)):
        expected = frames[:, first : first + size, first : first + size]
        assert torch.equal(center_crop(frames, size, size, rounding), expected)
    assert center_crop(frames, 14, 6).shape[1:3] == (14, 6)


def test_grid_of_videos():
    videos = torch.arange(3)[:, None, None, None, None].expand(3, 2, 4, 6, 3) + 1
    grid = video_grid(videos)
    assert grid.shape == (2, 8, 12, 3)
    assert [grid[0, y, x, 0].item() for y, x in ((0, 0), (0, 6), (4, 0), (4, 6))] == [1, 2, 3, 0]
    assert torch.equal(video_grid(videos[:1]), videos[0])
    assert video_grid(videos[:1].expand(4, -1, -1, -1, -1)).shape == (2, 8, 12, 3)
    assert video_grid(videos[:2]).shape == (2, 4, 12, 3)


def test_no_frames_of_nan():
    frames = torch.zeros(1, 3, 2, 2)
    frames[0, 2, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="Frames must be numbers, got NaN"):
        unit_to_pixels(frames)

"""Padding to legal sizes and cutting back."""

import pytest
import torch

from diffusers_leanvae import Padding, crop_sample, pad_sample


@pytest.mark.parametrize("size", [(22, 131, 247), (1, 8, 8), (2, 1, 1), (5, 9, 3), (17, 256, 256)])
def test_round_trip(size):
    sample = torch.rand(2, 3, *size)
    padded, padding = pad_sample(sample)
    frames, height, width = padded.shape[2:]
    assert frames % 4 == 1 and height % 8 == 0 and width % 8 == 0
    assert frames - size[0] < 4 and height - size[1] < 8 and width - size[2] < 8
    assert padding == Padding(*size)
    torch.testing.assert_close(crop_sample(padded, padding), sample, rtol=0, atol=0)


def test_edges_are_mirrored_and_the_last_frame_repeated():
    sample = torch.arange(3.0).view(1, 1, 1, 1, 3).expand(1, 1, 2, 8, 3) + 10 * torch.arange(2).view(1, 1, 2, 1, 1)
    padded, _ = pad_sample(sample)
    assert padded[0, 0, 0, 0].tolist() == [0, 1, 2, 1, 0, 2, 2, 2]  # too short to mirror further: its last pixel
    assert padded[0, 0, :, 0, 0].tolist() == [0, 10, 10, 10, 10]


def test_illegal_input_is_named():
    with pytest.raises(ValueError, match="must have shape"):
        pad_sample(torch.rand(3, 8, 8))


@pytest.mark.parametrize("ratios", [(0, 8), (4, 0), (-4, 8), (4, -8), (4.0, 8), (4, None)])
def test_illegal_ratios_are_named(ratios):
    with pytest.raises(ValueError, match=r"^`(temporal|spatial)_ratio` must be a positive integer, got "):
        pad_sample(torch.rand(1, 3, 5, 8, 8), *ratios)


def test_what_cannot_be_cropped_is_named():
    with pytest.raises(ValueError, match=r"^`sample` must have shape .* got \(3, 5, 8, 8\)\.$"):
        crop_sample(torch.rand(3, 5, 8, 8), Padding(5, 8, 8))
    with pytest.raises(ValueError, match=r"^`padding` must be a `Padding`, got \(5, 8, 8\)\.$"):
        crop_sample(torch.rand(1, 3, 5, 8, 8), (5, 8, 8))
    assert crop_sample(torch.rand(1, 3, 2, 8, 8), Padding(5, 7, 8)).shape == (1, 3, 2, 7, 8)  # a piece of a stream

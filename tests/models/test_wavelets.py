"""The Haar transforms against the formula, and their inverses."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from diffusers_leanvae.models.wavelets import (
    haar_analysis_2d,
    haar_analysis_3d,
    haar_synthesis_2d,
    haar_synthesis_3d,
)


SIGNS = {"L": (1, 1), "H": (1, -1)}


@pytest.mark.parametrize("index, letters", list(enumerate(["LLL", "LLH", "LHL", "LHH", "HLL", "HLH", "HHL", "HHH"])))
def test_3d_band_is_the_signed_sum_in_the_documented_order(index: int, letters: str):
    video = torch.randn(2, 3, 4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    time, height, width = (torch.tensor(SIGNS[letter], dtype=torch.float64) for letter in letters)
    blocks = video.reshape(2, 3, 2, 2, 3, 2, 4, 2)
    expected = torch.einsum("bctihjwk,i,j,k->bcthw", blocks, time, height, width)
    band = haar_analysis_3d(video)[:, 3 * index : 3 * index + 3]
    torch.testing.assert_close(band, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("index, letters", list(enumerate(["LL", "LH", "HL", "HH"])))
def test_2d_band_has_the_width_letter_first(index: int, letters: str):
    image = torch.randn(2, 3, 1, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    width, height = (torch.tensor(SIGNS[letter], dtype=torch.float64) for letter in letters)
    expected = torch.einsum("bcthjwk,j,k->bcthw", image.reshape(2, 3, 1, 3, 2, 4, 2), height, width)
    band = haar_analysis_2d(image)[:, 3 * index : 3 * index + 3]
    torch.testing.assert_close(band, expected, rtol=0, atol=1e-14)


@hypothesis.given(st.tuples(*[st.integers(1, 3)] * 5), st.sampled_from([torch.float32, torch.float64]))
@hypothesis.settings(max_examples=15)
def test_synthesis_inverts_analysis(sizes: tuple[int, ...], dtype: torch.dtype):
    batch_size, channels, num_frames, height, width = sizes
    x = torch.randn(batch_size, channels, 2 * num_frames, 2 * height, 2 * width).to(dtype)
    atol = 64 * torch.finfo(dtype).eps  # three rounded sums forth and back on values of at most about 40
    torch.testing.assert_close(haar_synthesis_3d(haar_analysis_3d(x)), x, rtol=0, atol=atol)
    torch.testing.assert_close(haar_synthesis_2d(haar_analysis_2d(x)), x, rtol=0, atol=atol)


def test_dyadic_pixels_are_reconstructed_bit_for_bit():
    video = torch.randint(0, 256, (1, 3, 4, 8, 8), generator=torch.Generator().manual_seed(0)) / 256
    assert torch.equal(haar_synthesis_3d(haar_analysis_3d(video)), video)
    assert torch.equal(haar_synthesis_2d(haar_analysis_2d(video)), video)


def test_2d_transform_does_not_mix_frames():
    video = torch.randn(1, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    frames = [haar_analysis_2d(frame) for frame in video.split(1, dim=2)]
    assert torch.equal(haar_analysis_2d(video), torch.cat(frames, dim=2))

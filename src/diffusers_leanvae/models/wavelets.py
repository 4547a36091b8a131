"""Orthonormal-up-to-scale Haar transforms of the LeanVAE family, stateless and exactly invertible.

With the factors of the reference folded in (`2 * sqrt(2)` in 3D, `2` in 2D) every sub-band is a plain signed sum of
the 8 or 4 values of a block, so analysis needs no multiplication and `LLL` / `LL` is the sum of the block. Pinned by
the `dwt.*` tensors of the golden files (`tests/models/test_golden.py`).
"""

import torch


def _analyze(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return even + odd, even - odd


def _synthesize(low: torch.Tensor, high: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.stack((low + high, low - high), dim=dim + 1).flatten(dim, dim + 1)


def haar_analysis_3d(video: torch.Tensor) -> torch.Tensor:
    """Split a video into eight sub-bands.

    Args:
        video: Tensor of shape `(batch_size, channels, num_frames, height, width)`, all three sizes even.

    Returns:
        Tensor of shape `(batch_size, 8 * channels, num_frames / 2, height / 2, width / 2)`, sub-bands in the order
        LLL LLH LHL LHH HLL HLH HHL HHH (letters: time, height, width). LeanVAE (arXiv 2503.14325), section 3.1.
    """
    bands = [video]
    for dim in (2, 3, 4):
        bands = [half for band in bands for half in _analyze(band, dim)]
    return torch.cat(bands, dim=1)


def haar_synthesis_3d(subbands: torch.Tensor) -> torch.Tensor:
    """Invert [`haar_analysis_3d`]: `(B, 8 * C, T, H, W)` to `(B, C, 2 * T, 2 * H, 2 * W)`."""
    bands = list(subbands.chunk(8, dim=1))
    for dim in (4, 3, 2):
        bands = [_synthesize(low, high, dim) for low, high in zip(bands[::2], bands[1::2], strict=True)]
    return bands[0] * 0.125


def haar_analysis_2d(image: torch.Tensor) -> torch.Tensor:
    """Split the frames of a video into four sub-bands each, without mixing frames.

    Args:
        image: Tensor of shape `(batch_size, channels, num_frames, height, width)`, height and width even.

    Returns:
        Tensor of shape `(batch_size, 4 * channels, num_frames, height / 2, width / 2)`, sub-bands in the order
        LL LH HL HH where the first letter is *width* and the second *height* (unlike the 3D order).
    """
    bands = [image]
    for dim in (4, 3):
        bands = [half for band in bands for half in _analyze(band, dim)]
    return torch.cat(bands, dim=1)


def haar_synthesis_2d(subbands: torch.Tensor) -> torch.Tensor:
    """Invert [`haar_analysis_2d`]: `(B, 4 * C, T, H, W)` to `(B, C, T, 2 * H, 2 * W)`."""
    bands = list(subbands.chunk(4, dim=1))
    for dim in (3, 4):
        bands = [_synthesize(low, high, dim) for low, high in zip(bands[::2], bands[1::2], strict=True)]
    return bands[0] * 0.25

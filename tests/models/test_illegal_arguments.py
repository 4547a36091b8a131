"""What plans, tiles of streams and statistics of latents must not be, of LeanVAE, WF-VAE and IV-VAE alike."""

import math
from typing import Any

import pytest
import torch
from tiny_autoencoders import make, make_video

from diffusers_leanvae import TemporalCache


models = pytest.mark.parametrize("case", ["lean", "wf", "iv"])
TILE = r"must be three positive integers, height, width and frames of a tile, got"
ILLEGAL_PLANS = [
    ({"num_frames": 0}, r"^`num_frames` must be a positive integer, got 0\.$"),
    ({"num_frames": 17.0}, r"^`num_frames` must be a positive integer, got 17\.0\.$"),
    ({"num_frames": 6}, r"^`num_frames` must be 4 \* n \+ 1 \(1, 5, 9, \.\.\.\), got 6\.$"),
    ({"height": 0}, r"^`height` must be a positive integer, got 0\.$"),
    ({"height": 13}, r"^`height` and `width` must be positive multiples of 8, got 13 and 64\.$"),
    ({"width": -8}, r"^`width` must be a positive integer, got -8\.$"),
    ({"batch_size": 0}, r"^`batch_size` must be a positive integer, got 0\.$"),
    ({"dtype": torch.int8}, r"^`dtype` must be a floating-point dtype, got torch\.int8\.$"),
    ({"dtype": "bf16"}, r"^`dtype` must be a floating-point dtype, got 'bf16'\.$"),
    ({"budget": "1GiB"}, r"^`budget` must be a positive number of bytes, got '1GiB'\.$"),
    ({"budget": -1}, r"^`budget` must be a positive number of bytes, got -1\.$"),
    ({"tile": (8, 8)}, rf"^`tile` {TILE} \(8, 8\)\.$"),
    ({"tile": (0, 0, 0)}, rf"^`tile` {TILE} \(0, 0, 0\)\.$"),
    ({"tile": "auto"}, rf"^`tile` {TILE} 'auto'\.$"),
    ({"tile": (12, 8, 5)}, r"^`tile\[0\]` must be a positive multiple of 8, got 12\.$"),
    ({"tile": (64, 64, 4)}, r"^`tile\[2\]` must be 4 \* n \+ 1 with n >= 1 \(5, 9, \.\.\.\), got 4\.$"),
]


@models
@pytest.mark.parametrize("arguments, message", ILLEGAL_PLANS, ids=[str(arguments) for arguments, _ in ILLEGAL_PLANS])
def test_illegal_plans(case: str, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(case).plan(**{"num_frames": 17, "height": 64, "width": 64} | arguments)


@pytest.mark.parametrize("layout", [(16, 16), (-8, 16, 5), (0, 16, 5), (16.0, 16, 5), 16], ids=str)
def test_illegal_layouts(layout: Any):
    with pytest.raises(ValueError, match=f"^`layout` {TILE} "):
        TemporalCache(layout=layout)


@models
@pytest.mark.parametrize(
    "layout, message",
    [
        ((15, 16, 5), r"^`layout\[0\]` must be a positive multiple of 8, got 15\.$"),
        ((16, 16, 4), r"^`layout\[2\]` must be 4 \* n \+ 1 with n >= 1 \(5, 9, \.\.\.\), got 4\.$"),
    ],
    ids=str,
)
def test_layouts_of_other_ratios(case: str, layout: tuple[int, int, int], message: str):
    vae = make(case)
    with pytest.raises(ValueError, match=message):
        vae.encode(make_video(vae), cache=TemporalCache(layout=layout))


@models
@pytest.mark.parametrize(
    "config, message",
    [
        ({"latents_mean": [0.0] * 3 + [math.inf]}, "`latents_mean` must hold finite numbers, got inf"),
        ({"latents_mean": [None] * 4}, "`latents_mean` must hold finite numbers, got None"),
        ({"latents_std": [1.0] * 3 + [0.0]}, "`latents_std` must hold finite numbers above 0, got 0.0"),
        ({"latents_std": [1.0] * 3 + [math.nan]}, "`latents_std` must hold finite numbers above 0, got nan"),
        ({"latents_std": ["1"] * 4}, "`latents_std` must hold finite numbers above 0, got '1'"),
        ({"scaling_factor": 0.0}, "`scaling_factor` must be a finite number above 0, got 0.0"),
        ({"scaling_factor": "1"}, "`scaling_factor` must be a finite number above 0, got '1'"),
    ],
)
def test_illegal_statistics(case: str, config: dict[str, Any], message: str):
    statistics: dict[str, Any] = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    with pytest.raises(ValueError, match=message):
        make(case, **statistics | config)

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_leanvae.generation import generate_videos


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"seed": 2**64}, r"`seed` must be an integer from 0 to 2\*\*63 - 1, got 18446744073709551616"),
        ({"seed": None}, "`seed` must be an integer .*, got None"),
        ({"num_videos": 0}, "`num_videos` must be a positive integer, got 0"),
        ({"batch_size": 1.5}, "`batch_size` must be a positive integer, got 1.5"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be a positive integer, got 0"),
        ({"prompts": []}, r"`prompts` must be a list of at least one text or None, got \[\]"),
        ({"labels": "circle"}, "`labels` must be a list of at least one text or None, got 'circle'"),
        ({"fps": 0}, "`fps` must be at least"),
    ],
)
def test_illegal_arguments_are_refused_before_anything_is_loaded(options: Any, error: str, tmp_path: Path):
    with pytest.raises(ValueError, match=error):
        generate_videos("nobody/nothing", tmp_path / "out.mp4", device=torch.device("cpu"), **options)
    assert not list(tmp_path.iterdir())

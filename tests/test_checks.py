"""The small checks that every part of the package uses."""

import pytest
import torch

from diffusers_leanvae.checks import DTYPES, check_choice, parse_dtype, parse_video_size


def test_choices():
    check_choice("norm", "batch", ("batch", "group"))
    check_choice("norm", "batch", {"batch": 1})
    check_choice("norm", None, iter((None, "batch")))
    with pytest.raises(ValueError, match=r"^`norm` must be one of 'batch', None, got 'rms'\.$"):
        check_choice("norm", "rms", ("batch", None))
    with pytest.raises(ValueError, match=r"^`scheduler` must be one of 'ddim' for this model, got \[\]\.$"):
        check_choice("scheduler", [], {"ddim": 1}, "for this model")


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_have_long_and_short_names(name):
    dtype = getattr(torch, name)
    assert parse_dtype("dtype", name) is dtype and parse_dtype("dtype", DTYPES[name]) is dtype


def test_illegal_dtypes():
    legal = r"'float32' \(fp32\), 'float16' \(fp16\)"
    with pytest.raises(ValueError, match=rf"^`--dtype` must be one of {legal}, 'bfloat16' \(bf16\), got 'int8'\.$"):
        parse_dtype("--dtype", "int8")
    with pytest.raises(ValueError, match=rf"^`dtype` must be one of {legal}, got 'bf16'\.$"):
        parse_dtype("dtype", "bf16", ("float32", "float16"))
    assert parse_dtype("dtype", "fp16", ("float32", "float16")) is torch.float16


def test_sizes_of_videos():
    assert parse_video_size("size", "17x256x128") == (17, 256, 128)
    for text in ("256x256", "17x256x", "17x256x0", "17x-1x256", "1.5x2x3", ""):
        with pytest.raises(
            ValueError, match=rf"^`size` must be FRAMESxHEIGHTxWIDTH such as 17x256x256, got '{text}'\.$"
        ):
            parse_video_size("size", text)

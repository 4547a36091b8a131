"""Statistics of latents: those that are measured, and those that are taken over from another autoencoder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from huggingface_hub import constants
from local_hub import LocalHub
from tiny import make_tiny

from diffusers_leanvae.latents import measure_statistics, statistics_of


WAN = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
STATISTICS: dict[str, Any] = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.0, 2.0, 0.25]}
FOUND = STATISTICS | {"scaling_factor": 1.0}


def test_measured_statistics_are_those_of_all_batches_and_need_one():
    batches = [torch.tensor([0.0, 2.0]).view(1, 2, 1, 1, 1), torch.tensor([4.0, 6.0]).view(1, 2, 1, 1, 1)]
    assert measure_statistics(iter(batches), 2) == ([2.0, 4.0], [2.0, 2.0])
    with pytest.raises(ValueError, match="`latents` must hold at least one batch, got none"):
        measure_statistics(iter(()), 2)
    with pytest.raises(ValueError, match="`latents` must be finite, got infinite ones or NaN"):
        measure_statistics(iter([torch.full((1, 2, 1, 1, 1), torch.nan)]), 2)


@pytest.mark.parametrize("value", [0.0, 0.1, -123.456])
def test_a_channel_that_never_changes_can_be_normalized(value: float):
    mean, std = measure_statistics(iter([torch.full((3, 1, 5, 7, 7), value)]), 1)
    assert mean == pytest.approx([value]) and std == [1.0]


def test_of_wan():
    known = statistics_of("teacher", "wan2.1")
    with torch.device("meta"):
        config = AutoencoderKLWan().config
    assert known == {key: config[key] for key in ("latents_mean", "latents_std")} | {"scaling_factor": 1.0}
    known = statistics_of("teacher", "wan2.2")
    assert (len(known["latents_mean"]), len(known["latents_std"]), known["scaling_factor"]) == (48, 48, 1.0)
    assert known["latents_mean"][0] == -0.2289 and known["latents_mean"][-1] == -0.0667
    assert known["latents_std"][0] == 0.4765 and known["latents_std"][-1] == 0.7744
    assert min(known["latents_std"]) == 0.3523  # all positive


def test_of_a_folder_a_file_and_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    AutoencoderKLWan(**WAN, **STATISTICS).save_pretrained(tmp_path)
    assert statistics_of("teacher", str(tmp_path)) == FOUND
    assert statistics_of("teacher", str(tmp_path / "config.json")) == FOUND
    config = (tmp_path / "config.json").read_bytes()
    with LocalHub() as server:
        server.connect(monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        server.repositories = {"someone/wan": {"vae/config.json": config}}
        assert statistics_of("teacher", "someone/wan/vae") == FOUND
        with pytest.raises(ValueError, match="`teacher` must be an autoencoder, got 'someone/wan': .*config.json"):
            statistics_of("teacher", "someone/wan")


def test_of_a_config_that_is_no_object(tmp_path: Path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got a list"):
        statistics_of("teacher", str(tmp_path))


def test_of_an_autoencoder_with_a_factor(tmp_path: Path):
    make_tiny("leanvae", scaling_factor=0.7).save_pretrained(tmp_path)
    nothing = {"latents_mean": None, "latents_std": None}
    assert statistics_of("teacher", str(tmp_path)) == nothing | {"scaling_factor": 0.7}
    make_tiny("leanvae", scaling_factor=0.7, **STATISTICS).save_pretrained(tmp_path)
    assert statistics_of("teacher", str(tmp_path)) == STATISTICS | {"scaling_factor": 0.7}


def test_refusals(tmp_path: Path):
    with pytest.raises(ValueError, match=r"`teacher` must be 'wan2.1', 'wan2.2', or .* got 'wan3', which does not"):
        statistics_of("teacher", "wan3")
    config = {"_class_name": "AutoencoderKLWan", "latents_mean": [0.0] * 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`teacher` must be an autoencoder with statistics, .* without `latents_std`"):
        statistics_of("teacher", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLHunyuanVideo"}))
    with pytest.raises(ValueError, match="without `latents_mean` and `latents_std`"):
        statistics_of("teacher", str(tmp_path))

"""Original WF-VAE and IV-VAE checkpoints: both ways bit for bit, strict, found by what they hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import make_tiny
from typer.testing import CliRunner

from diffusers_leanvae import AutoencoderKLIVVAE, AutoencoderKLWFVAE
from diffusers_leanvae.cli import app
from diffusers_leanvae.conversion import ivvae, wfvae
from diffusers_leanvae.loading import load_autoencoder


WF = {"latent_channels": 8}
WF_CONFIGS = [
    {},
    {"temporal_compression_ratio": 8, "num_encoder_layers": 1},
    {"use_attention": False, "num_flow_layers": 2, "num_decoder_layers": 3},
    {"encoder_flow_channels": 8},  # as wide as two levels: no shortcut in the middle
    {"base_channels": 32, "encoder_flow_channels": 32, "decoder_flow_channels": 32, "norm_type": "group_norm"},
    {"latents_mean": [0.5] * 8, "latents_std": [2.0] * 8},
]
IV_CONFIGS = [
    {},
    {"num_layers": 1, "channel_multipliers": [1, 1, 1, 2]},
    {"num_layers": 3, "channel_multipliers": [1, 2, 4, 4], "scaling_factor": 0.5}
    | {"latents_mean": [0.25] * 4, "latents_std": [1.0] * 4},
]


def assert_equal_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("config", WF_CONFIGS, ids=str)
def test_wf_there_and_back(tmp_path: Path, config: dict[str, Any], suffix: str):
    vae = make_tiny("wfvae", **(WF | config))
    path = tmp_path / f"wf{suffix}"
    wfvae.write_original_checkpoint(path, vae.config, vae.state_dict())
    again = load_autoencoder(path)
    assert type(again) is AutoencoderKLWFVAE and not again.training
    assert_equal_weights(again.state_dict(), vae.state_dict())
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in vae.config.items() if k[0] != "_"
    }


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("config", IV_CONFIGS, ids=str)
def test_iv_there_and_back(tmp_path: Path, config: dict[str, Any], suffix: str):
    vae = make_tiny("ivvae", **config)
    path = tmp_path / f"iv{suffix}"
    ivvae.write_original_checkpoint(path, vae.config, vae.state_dict())
    again = load_autoencoder(path)
    assert type(again) is AutoencoderKLIVVAE and not again.training
    assert_equal_weights(again.state_dict(), vae.state_dict())
    keys = ("latent_channels", "base_channels", "channel_multipliers", "num_layers", "scaling_factor", "latents_mean")
    assert [again.config[key] for key in keys] == [vae.config[key] for key in keys]


class TestWFFiles:
    @pytest.fixture
    def original(self) -> dict[str, torch.Tensor]:
        vae = make_tiny("wfvae", **WF)
        return wfvae.to_original(vae.state_dict(), dict(vae.config))

    def test_training_file_prefers_averaged_weights(self, tmp_path: Path, original: dict[str, torch.Tensor]):
        trained = {key: value for key, value in original.items() if "wavelet" not in key}
        averaged = {f"module.{key}": value + 1 for key, value in trained.items()}
        parts = {"gen_model": original, "dics_model": {"main.0.weight": torch.ones(2)}}
        for name, checkpoint, shift in (
            ("both", {"state_dict": parts, "ema_state_dict": averaged, "optimizer": {"x": {"y": torch.ones(1)}}}, 1),
            ("one", {"state_dict": parts, "ema_state_dict": {}}, 0),
        ):
            path = tmp_path / f"{name}.ckpt"
            torch.save(checkpoint, path)
            loaded = wfvae.to_original(load_autoencoder(path).state_dict(), dict(load_autoencoder(path).config))
            assert all(torch.equal(loaded[key], value + shift) for key, value in trained.items())

    def test_arguments_are_checked_against_the_weights(self, original: dict[str, torch.Tensor]):
        config = wfvae.config_from_original({"t_interpolation": "nearest", "latent_dim": 8}, original)
        assert config["temporal_interpolation"] == "nearest"
        with pytest.raises(ValueError, match="`args` of the checkpoint says latent_dim = 4, its tensors 8"):
            wfvae.config_from_original({"latent_dim": 4}, original)
        with pytest.raises(ValueError, match="`attention_type` must be 'AttnBlock3DFix' for these weights"):
            wfvae.config_from_original({"attention_type": "AttnBlock3D"}, original)

    def test_statistics_of_another_length_are_unknown(self, original: dict[str, torch.Tensor]):
        assert "latents_mean" not in wfvae.config_from_original({"shift": [0.0] * 4, "scale": [0.18] * 4}, original)
        config = wfvae.config_from_original({"shift": [1.0] * 8, "scale": [0.5] * 8}, original)
        assert config["latents_mean"] == [1.0] * 8 and config["latents_std"] == [2.0] * 8

    def test_released_models_are_known_by_their_size(self):
        for config, mean in (
            ({"latent_channels": 8, "base_channels": 128, "encoder_flow_channels": 64, "num_flow_layers": 2}, -0.1621),
            ({"latent_channels": 32, "base_channels": 160, "temporal_compression_ratio": 8}, -0.2129),
        ):
            with torch.device("meta"):
                vae: Any = AutoencoderKLWFVAE(**config)
            original = wfvae.to_original(vae.state_dict(), dict(vae.config))
            found = wfvae.config_from_original({}, original)
            assert found["latents_mean"][0] == mean and len(found["latents_std"]) == config["latent_channels"]
            assert found.items() >= config.items()

    @pytest.mark.parametrize("key", ["decoder.extra.weight", "encoder.connect_l9.weight"])
    def test_unknown_key(self, tmp_path: Path, original: dict[str, torch.Tensor], key: str):
        save_file(original | {key: torch.ones(2)}, tmp_path / "wf.safetensors")
        with pytest.raises(ValueError, match=f"`state_dict` must hold WF-VAE keys only, got '{key}'"):
            AutoencoderKLWFVAE.from_single_file(tmp_path / "wf.safetensors")

    def test_missing_key(self, tmp_path: Path, original: dict[str, torch.Tensor]):
        del original["decoder.up1.0.conv1.conv.weight"]
        save_file(original, tmp_path / "wf.safetensors")
        with pytest.raises(ValueError, match="must be a complete WF-VAE checkpoint.*levels.1.resnets.0.conv1.weight"):
            AutoencoderKLWFVAE.from_single_file(tmp_path / "wf.safetensors")

    def test_other_wavelets(self, tmp_path: Path, original: dict[str, torch.Tensor]):
        original["encoder.wavelet_transform_l1.ad"] = -original["encoder.wavelet_transform_l1.ad"]
        save_file(original, tmp_path / "wf.safetensors")
        with pytest.raises(ValueError, match="must hold Haar wavelets, got something else in 'encoder.wavelet_transf"):
            AutoencoderKLWFVAE.from_single_file(tmp_path / "wf.safetensors")

    @pytest.mark.parametrize("value", [0.0, "a"])
    def test_a_scale_that_is_none(self, original: dict[str, torch.Tensor], value: Any):
        num_channels = wfvae.config_from_original({}, original)["latent_channels"]
        with pytest.raises(ValueError, match="`scale` of the checkpoint must hold numbers other than 0, got "):
            wfvae.config_from_original({"shift": [0.0] * num_channels, "scale": [value] * num_channels}, original)


def test_iv_statistics_of_released_models():
    for (channels, width), (scale, shift) in ivvae._STATISTICS.items():
        with torch.device("meta"):
            vae: Any = AutoencoderKLIVVAE(latent_channels=channels, base_channels=width)
        config = ivvae.config_from_original({}, ivvae.to_original(vae.state_dict()))
        assert config["scaling_factor"] == scale and config["latents_mean"] == [shift] * channels
        assert config["channel_multipliers"] == [1, 2, 4, 4] and config["num_layers"] == 2


def test_iv_unknown_key(tmp_path: Path):
    original = ivvae.to_original(make_tiny("ivvae").state_dict()) | {"extra": torch.ones(1)}
    save_file({key: value.contiguous() for key, value in original.items()}, tmp_path / "iv.safetensors")
    with pytest.raises(
        ValueError, match="`state_dict` must hold IV-VAE keys only, got 1 others, for instance 'extra'"
    ):
        AutoencoderKLIVVAE.from_single_file(tmp_path / "iv.safetensors")


@pytest.mark.parametrize("model_class, kind", [(AutoencoderKLWFVAE, "WF-VAE"), (AutoencoderKLIVVAE, "IV-VAE")])
def test_no_such_checkpoint(tmp_path: Path, model_class: Any, kind: str):
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"`path` must be an original {kind} checkpoint"):
        model_class.from_single_file(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="`kwargs` must be Hub or config arguments, got colour"):
        model_class.from_single_file(tmp_path / "other.safetensors", colour=1)


@pytest.mark.parametrize(
    "family, layout, kind", [("wfvae", wfvae, "WF-VAE"), ("ivvae", ivvae, "IV-VAE")], ids=["wf", "iv"]
)
def test_command_line(tmp_path: Path, family: str, layout: Any, kind: str):
    vae = make_tiny(family)
    source, folder, back = tmp_path / "a.ckpt", tmp_path / "folder", tmp_path / "b.safetensors"
    layout.write_original_checkpoint(source, vae.config, vae.state_dict())

    def run(*arguments: Any) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    run("convert", source, folder)
    run("convert", folder, back, "--to-original")
    assert_equal_weights(load_autoencoder(back).state_dict(), vae.state_dict())
    assert json.loads(run("info", folder))["class"] == type(vae).__name__
    result = CliRunner().invoke(app, ["convert", str(source), f"{folder}-2", "--pixel-factor", "1.0"])
    assert result.exit_code == 1 and f"`--pixel-factor` must not be given for a checkpoint of {kind}" in result.output


@pytest.mark.parametrize("family", ["wfvae", "ivvae"])
def test_reconstruct_command(tmp_path: Path, family: str):
    from diffusers_leanvae import bundled
    from diffusers_leanvae.video_io import probe_video

    folder, target = tmp_path / "model", tmp_path / "out.mp4"
    make_tiny(family).save_pretrained(folder)
    arguments = ["reconstruct", str(bundled.clip_path()), str(target), "--model", str(folder), "--size", "32"]
    result = CliRunner().invoke(app, [*arguments, "--num-frames", "7"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    info = probe_video(target)
    assert (info.num_frames, min(info.height, info.width)) == (7, 32)
    bounded = tmp_path / "bounded.mp4"
    options = ["reconstruct", str(target), str(bounded), "--model", str(folder), "--max-memory", "1GiB"]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0 and probe_video(bounded).num_frames == 7, result.output
    result = CliRunner().invoke(app, [*arguments, "--overwrite", "--fuse"])
    assert result.exit_code == 1 and "`--fuse` needs an `AutoencoderKLLeanVAE`" in result.output


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("wfvae", {"num_wavelet_levels": 2}, "`num_wavelet_levels` must be 3 in the original layout, got 2"),
        ("ivvae", {"attention": "mid"}, "`attention` must be 'all' in the original layout, got 'mid'"),
        ("ivvae", {"use_keyframe_branch": False}, "`use_keyframe_branch` must be True in the original layout, got F"),
    ],
)
def test_ablations_have_no_original_layout(family: str, config: dict[str, Any], message: str, tmp_path: Path):
    model = make_tiny(family, **config)
    with pytest.raises(ValueError, match=message):
        model.conversion.write_original_checkpoint(tmp_path / "x.safetensors", dict(model.config), model.state_dict())
    assert not any(tmp_path.iterdir())

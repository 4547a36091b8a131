"""Original LeanVAE checkpoints: both ways bit for bit, strict, and safe against hostile files."""

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_leanvae.conversion import checkpoints
from diffusers_leanvae.conversion import leanvae as conversion
from diffusers_leanvae.description import describe
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE


FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "leanvae_tiny.safetensors"
EXTRAS = {
    "pixel_factor": 1.0,
    "scaling_factor": 0.25,
    "latents_mean": [0.5, -1.0, 0.0, 2.0],
    "latents_std": [1.0, 2.0, 3.0, 0.25],
}


@pytest.fixture
def original(make_model: Callable) -> dict[str, torch.Tensor]:
    return conversion.to_original(make_model().state_dict())


def assert_equal_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key


class TestReferenceFixture:
    @pytest.mark.parametrize("dtype, atol", [(torch.float64, 2e-6), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
    @torch.no_grad()
    def test_numbers_of_the_reference(self, dtype: torch.dtype, atol: float):
        # Stored in float32, values of up to 6; measured 2.2e-7 (rounding of the file) and 4.1e-6.
        model = AutoencoderKLLeanVAE.from_single_file(FIXTURE, torch_dtype=dtype)
        with safe_open(FIXTURE, "pt") as file:
            tensors = {k: file.get_tensor(k).to(dtype) for k in file.keys() if not k.startswith("autoencoder.")}
        video = tensors.pop("video")
        posterior = model.encode(video).latent_dist
        image_mean = model.encode(video[:, :, 0]).latent_dist.mean
        actual = {
            "latent_mean": posterior.mean,
            "latent_logvar": posterior.logvar,
            "decoded": model.decode(tensors["latent_mean"]).sample,
            "image.latent_mean": image_mean,
            "image.decoded": model.decode(tensors["image.latent_mean"]).sample,
        }
        assert all(tensor.std() > 0.05 for tensor in tensors.values())
        torch.testing.assert_close(actual, tensors, rtol=0, atol=atol)

    def test_fixtures_are_small(self):
        files = [path for path in FIXTURE.parent.rglob("*") if path.is_file()]
        assert FIXTURE.stat().st_size < 400_000
        assert sum(path.stat().st_size for path in files) <= 1_200_000


class TestRoundTrip:
    @pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("patch_size", [(2, 4, 4), (1, 2, 2)], ids=str)
    def test_ours_original_ours(
        self, tmp_path: Path, make_model: Callable, suffix: str, dtype: torch.dtype, patch_size: tuple
    ):
        model = make_model(dtype, patch_size=patch_size, **EXTRAS)
        path = tmp_path / f"model{suffix}"
        conversion.write_original_checkpoint(path, model.config, model.state_dict())
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # no temporary file is left
        loaded = AutoencoderKLLeanVAE.from_single_file(path)
        assert not loaded.training
        assert_equal_weights(loaded.state_dict(), model.state_dict())
        ours, theirs = (
            {k: list(v) if isinstance(v, tuple) else v for k, v in c.items() if not k.startswith("_")}
            for c in (model.config, loaded.config)
        )
        assert theirs == ours
        again = tmp_path / f"again{suffix}"
        conversion.write_original_checkpoint(again, loaded.config, loaded.state_dict())
        config, tensors = conversion.read_original_checkpoint(again)
        assert_equal_weights(tensors, model.state_dict())
        assert config == conversion.read_original_checkpoint(path)[0]

    def test_keys_of_a_full_size_model(self):
        with torch.device("meta"):
            ours = AutoencoderKLLeanVAE().state_dict()
        original = conversion.to_original(ours)
        assert len(original) == len(ours)
        for key, shape in {
            "latent_bottleneck.phi": (4, 512),
            "latent_bottleneck.Q": (512, 4),
            "latent_bottleneck.forward_l.0.dconv_layer.1.ds_conv.weight": (512, 1, 3, 3, 3),
            "latent_bottleneck.backward_l.1.ffd_layer.0.1.weight": (2730, 512),
            "latent_bottleneck.weights.1": (),
            "latent_bottleneck.threshold.0": (1,),
            "encoder.video_high_proj.1.weight": (384, 672),
            "encoder.image_low_proj.1.bias": (128,),
            "encoder.fusion_layer.ffd_layer.3.4.weight": (512, 1365),
            "decoder.low_layer.ffd_layer.1.0.bias": (128,),
            "decoder.video_low_proj.0.weight": (96, 128),
            "std_layer.weight": (4, 512),
        }.items():
            assert original[key].shape == shape, key
        assert conversion.from_original(original).keys() == ours.keys()
        assert sum(tensor.numel() for tensor in ours.values()) == pytest.approx(39.77e6, abs=5e3)
        config = conversion.config_from_original({"latent_dim": 4, "unrelated": "kept out"}, original)
        assert config == {
            "latent_channels": 4,
            "low_freq_dim": 128,
            "high_freq_dim": 384,
            "num_branch_layers": 2,
            "num_fusion_layers": 4,
            "num_ista_iterations": 2,
            "num_ista_layers": 2,
            "patch_size": [2, 4, 4],
            "scaling_factor": 0.7744,
        }

    def test_wan_aligned_factor_is_an_argument(self, tmp_path: Path, original: dict[str, torch.Tensor]):
        torch.save({"args": {}, "state_dict": original}, tmp_path / "model.ckpt")
        model = AutoencoderKLLeanVAE.from_single_file(tmp_path / "model.ckpt")
        statistics = {name: EXTRAS[name] for name in ("latents_mean", "latents_std")}
        wan = AutoencoderKLLeanVAE.from_single_file(
            tmp_path / "model.ckpt", pixel_factor=1.0, torch_dtype=torch.float64, **statistics
        )
        assert (model.config.pixel_factor, model.config.scaling_factor, model.dtype) == (0.5, 0.7744, torch.float32)
        assert (wan.config.pixel_factor, wan.pixel_factor, wan.dtype) == (1.0, 1.0, torch.float64)
        assert wan.config["latents_mean"] == EXTRAS["latents_mean"]
        with pytest.raises(ValueError, match=r"`kwargs` must be Hub or config arguments, got pixelfactor\."):
            AutoencoderKLLeanVAE.from_single_file(tmp_path / "model.ckpt", pixelfactor=1.0)

    @pytest.mark.parametrize(
        "ablation", [{"patch_embedding_type": "joint"}, {"bottleneck_type": "linear"}, {"patch_norm": True}], ids=str
    )
    def test_ablations_have_no_original(self, tmp_path: Path, make_model: Callable, ablation: dict[str, Any]):
        model = make_model(**ablation)
        (name, value) = next(iter(ablation.items()))
        with pytest.raises(ValueError, match=rf"`{name}` must be .* for the original layout, got {value!r}\."):
            conversion.write_original_checkpoint(tmp_path / "model.ckpt", model.config, model.state_dict())
        assert not list(tmp_path.iterdir())

    def test_other_channels_have_no_original(self, tmp_path: Path, make_model: Callable):
        model = make_model(in_channels=1)
        with pytest.raises(ValueError, match=r"`in_channels` must be 3 for the original layout, got 1\."):
            conversion.write_original_checkpoint(tmp_path / "model.ckpt", model.config, model.state_dict())


class TestLayouts:
    def scaled(self, state_dict: dict[str, torch.Tensor], prefix: str = "", factor: float = 1.0) -> dict:
        return {prefix + key: tensor * factor for key, tensor in state_dict.items()}

    def test_lightning(self, tmp_path: Path, original: dict[str, torch.Tensor]):
        foreign = {"gan_loss.weight": torch.ones(3), "perceptual_model.lin.weight": torch.ones(2)}
        checkpoint = {
            "state_dict": foreign | self.scaled(original, "autoencoder."),
            "hyper_parameters": {"args": argparse.Namespace(latent_dim=4, l_dim=8, lr=5e-5, paths=["a"])},
            "epoch": 3,
            "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
        }
        torch.save(checkpoint, tmp_path / "model.ckpt")
        config, tensors = conversion.read_original_checkpoint(tmp_path / "model.ckpt")
        assert_equal_weights(tensors, conversion.from_original(original))
        assert (config["latent_channels"], config["low_freq_dim"], config["high_freq_dim"]) == (4, 8, 24)

    @pytest.mark.parametrize("layout", ["inside", "beside", "renamed", "nested"])
    def test_ema_is_preferred(self, tmp_path: Path, original: dict[str, torch.Tensor], layout: str):
        checkpoint: dict[str, Any] = {
            "inside": {"state_dict": self.scaled(original) | self.scaled(original, "ema.", 2.0)},
            "beside": {"state_dict": self.scaled(original), "state_dict_ema": self.scaled(original, "", 2.0)},
            "renamed": {
                "state_dict": self.scaled(original, "autoencoder.") | self.scaled(original, "autoencoder_ema.", 2.0)
            },
            "nested": {
                "ema_state_dict": self.scaled(original, "autoencoder.", 2.0),
                "state_dict": self.scaled(original, "autoencoder."),
            },
        }[layout]
        torch.save(checkpoint, tmp_path / "model.ckpt")
        _, tensors = conversion.read_original_checkpoint(tmp_path / "model.ckpt")
        assert_equal_weights(tensors, conversion.from_original(self.scaled(original, "", 2.0)))

    @pytest.mark.parametrize(
        "extra",
        [
            {"hyper_parameters": None},
            {"hyper_parameters": argparse.Namespace(args={"latent_dim": 4})},
            {"hyper_parameters": {"args": None}},
            {"args": None},
            {"args": [1]},
            {"args": {3: 4, "latent_dim": 4}},
        ],
    )
    def test_what_else_may_stand_there(self, tmp_path: Path, original: dict[str, torch.Tensor], extra: dict):
        torch.save(extra | {"state_dict": original}, tmp_path / "model.ckpt")
        _, tensors = conversion.read_original_checkpoint(tmp_path / "model.ckpt")
        assert_equal_weights(tensors, conversion.from_original(original))

    @pytest.mark.parametrize("extra", [{7: torch.ones(1)}, {"rest": {7: torch.ones(1)}}])
    def test_keys_that_are_no_names(self, tmp_path: Path, original: dict[str, torch.Tensor], extra: dict):
        torch.save(extra | {"state_dict": original}, tmp_path / "model.ckpt")
        with pytest.raises(ValueError, match=r"must hold LeanVAE keys only, got 1 others, for instance '(rest\.)?7'"):
            conversion.read_original_checkpoint(tmp_path / "model.ckpt")

    @pytest.mark.parametrize(
        ("key", "text"), [("config", "null"), ("args", "[1]"), ("config", "LeanVAE"), ("leanvae", "1")]
    )
    def test_any_text_may_be_in_metadata(self, tmp_path: Path, original: dict[str, torch.Tensor], key: str, text: str):
        path = tmp_path / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in original.items()}, path, metadata={key: text})
        _, tensors = conversion.read_original_checkpoint(path)
        assert_equal_weights(tensors, conversion.from_original(original))
        described = describe(str(path))
        assert described is not None and described["class"] == "AutoencoderKLLeanVAE"

    def test_bare_state_dict(self, tmp_path: Path, original: dict[str, torch.Tensor]):
        torch.save(original, tmp_path / "model.pt")
        _, tensors = conversion.read_original_checkpoint(tmp_path / "model.pt")
        assert_equal_weights(tensors, conversion.from_original(original))


class TestStrictness:
    def test_unknown_keys(self, tmp_path: Path, original: dict[str, torch.Tensor]):
        message = r"`state_dict` must hold LeanVAE keys only, got 2 others, for instance 'encoder\.extra'\."
        torch.save(
            {"state_dict": original | {"encoder.extra": torch.ones(1), "z": torch.ones(1)}}, tmp_path / "m.ckpt"
        )
        with pytest.raises(ValueError, match=message):
            AutoencoderKLLeanVAE.from_single_file(tmp_path / "m.ckpt")
        for convert in (conversion.from_original, conversion.to_original):
            with pytest.raises(ValueError, match=r"`state_dict` must hold LeanVAE keys only, got 1 others"):
                convert({"encoder.low_layer.dconv_layer.x.ds_conv.weight": torch.ones(1)})

    @pytest.mark.parametrize("key", ["std_layer.weight", "decoder.fusion_layer.ffd_layer.0.1.weight"])
    def test_missing_keys(self, tmp_path: Path, original: dict[str, torch.Tensor], key: str):
        ours = next(iter(conversion.from_original({key: original.pop(key)})))
        torch.save({"state_dict": original}, tmp_path / "model.ckpt")
        with pytest.raises(ValueError, match=rf'Missing key\(s\) in state_dict: "{ours}"'):
            AutoencoderKLLeanVAE.from_single_file(tmp_path / "model.ckpt")

    @pytest.mark.parametrize("key", ["encoder.image_low_proj.1.weight", "latent_bottleneck.phi"])
    def test_missing_size_keys(self, tmp_path: Path, original: dict[str, torch.Tensor], key: str):
        del original[key]
        torch.save({"state_dict": original}, tmp_path / "model.ckpt")
        with pytest.raises(ValueError, match=rf"`path` must be an? .*LeanVAE checkpoint, got .* without '{key}'"):
            AutoencoderKLLeanVAE.from_single_file(tmp_path / "model.ckpt")

    @pytest.mark.parametrize("name, value", [("latent_dim", 16), ("sep_num_layer", 2), ("ista_iter_num", 4)])
    def test_arguments_against_tensors(self, tmp_path: Path, original: dict[str, torch.Tensor], name: str, value: int):
        torch.save({"args": {name: value}, "state_dict": original}, tmp_path / "model.ckpt")
        with pytest.raises(ValueError, match=rf"`args` of the checkpoint says {name} = {value}, its tensors \d+\."):
            AutoencoderKLLeanVAE.from_single_file(tmp_path / "model.ckpt")


class Command:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


class TestHostileFiles:
    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
    def test_pickle_with_code_is_refused_and_not_run(
        self, tmp_path: Path, original: dict[str, torch.Tensor], legacy: bool
    ):
        marker, path = tmp_path / "executed", tmp_path / "model.ckpt"
        checkpoint = {"args": Command(marker), "state_dict": original}
        if legacy:
            path.write_bytes(pickle.dumps({"args": Command(marker)}, protocol=2))
        else:
            torch.save(checkpoint, path)
        with pytest.raises(
            ValueError, match=r"`path` must be a pickle of tensors and plain values, got .*'\w+\.system'"
        ):
            AutoencoderKLLeanVAE.from_single_file(path)
        assert not marker.exists()
        pickle.loads(pickle.dumps(Command(marker)))  # the trap does work
        assert marker.exists()

    @pytest.mark.parametrize(
        "content",
        [b"", b"\0", b"hello world\n" * 50, b"PK\x03\x04 not a zip", b"\x80\x04.", b"\x80\x02}q\x00.", b"\xff" * 99],
        ids=["empty", "zero", "text", "zip", "pickle", "dict", "ones"],
    )
    @pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
    def test_garbage(self, tmp_path: Path, content: bytes, suffix: str):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"`path` must .*got '.*model{suffix}'"):
            AutoencoderKLLeanVAE.from_single_file(path)

    @pytest.mark.parametrize(
        "name, content, reason",
        [
            ("model.ckpt", b"hello world", "it is no readable PyTorch file"),
            ("model.ckpt", b"", "it is empty"),
            ("model.safetensors", b"", "it is empty"),
            ("model.safetensors", b"\0", "it is shorter than a header"),
        ],
    )
    def test_garbage_has_a_reason(self, tmp_path: Path, name: str, content: bytes, reason: str):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"got '.*{name}': {reason}\.$"):
            checkpoints.read_keys(tmp_path / name)

    def test_random_bytes(self, tmp_path: Path):
        generator, path = torch.Generator().manual_seed(0), tmp_path / "model.ckpt"
        for _ in range(200):
            length = int(torch.randint(1, 40, (), generator=generator))
            path.write_bytes(bytes(torch.randint(0, 128, (length,), generator=generator).tolist()))
            with pytest.raises(ValueError, match="`path` must"):
                AutoencoderKLLeanVAE.from_single_file(path)

    def test_truncated(self, tmp_path: Path, make_model: Callable):
        model = make_model()
        for suffix in (".ckpt", ".safetensors"):
            path = tmp_path / f"model{suffix}"
            conversion.write_original_checkpoint(path, model.config, model.state_dict())
            path.write_bytes(path.read_bytes()[:-1000])
            with pytest.raises(ValueError, match="`path` must"):
                AutoencoderKLLeanVAE.from_single_file(path)

    def test_other_contents(self, tmp_path: Path):
        path = tmp_path / "model.ckpt"
        for content, message in (
            ([1, 2], "must hold a dictionary, got .* with a list"),
            ({"state_dict": {"weight": torch.ones(1)}}, "without 'latent_bottleneck.phi'"),
        ):
            torch.save(content, path)
            with pytest.raises(ValueError, match=message):
                AutoencoderKLLeanVAE.from_single_file(path)
        save_file({"weight": torch.ones(1)}, tmp_path / "m.safetensors", metadata={"args": json.dumps({})})
        with pytest.raises(ValueError, match="without 'latent_bottleneck.phi'"):
            AutoencoderKLLeanVAE.from_single_file(tmp_path / "m.safetensors")

    def test_missing_file_and_folder(self, tmp_path: Path):
        with pytest.raises(ValueError, match="`path` must be an original LeanVAE checkpoint, got .* which is no file"):
            conversion.read_original_checkpoint(tmp_path)
        with pytest.raises(ValueError, match="`reference` must name one checkpoint, got .* with none"):
            AutoencoderKLLeanVAE.from_single_file(tmp_path)
        with pytest.raises(ValueError, match="`reference` must be a file, a Hub file 'user/repo/file' or its URL"):
            AutoencoderKLLeanVAE.from_single_file(tmp_path / "absent.ckpt")


class TestReferences:
    @pytest.mark.parametrize(
        "reference, expected",
        [
            ("Yumic/LeanVAE/LeanVAE-dim4.ckpt", {}),
            ("https://huggingface.co/Yumic/LeanVAE/resolve/main/LeanVAE-dim4.ckpt", {"revision": "main"}),
            ("https://huggingface.co/Yumic/LeanVAE/blob/v1/LeanVAE-dim4.ckpt?download=true", {"revision": "v1"}),
        ],
    )
    def test_hub_files(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        make_model: Callable,
        reference: str,
        expected: dict[str, str],
    ):
        model, path, calls = make_model(), tmp_path / "LeanVAE-dim4.ckpt", []
        conversion.write_original_checkpoint(path, model.config, model.state_dict())

        def download(repo_id: str, filename: str, **kwargs: Any) -> str:
            calls.append((repo_id, filename, kwargs))
            if filename.endswith("config.json"):
                raise EntryNotFoundError(filename)  # as in most repositories
            return str(path)

        monkeypatch.setattr(checkpoints, "hf_hub_download", download)
        loaded = AutoencoderKLLeanVAE.from_single_file(reference, token="secret", local_files_only=True)
        hub = {"token": "secret", "local_files_only": True}
        assert calls == [("Yumic/LeanVAE", name, hub | expected) for name in ("LeanVAE-dim4.ckpt", "config.json")]
        assert_equal_weights(loaded.state_dict(), model.state_dict())
        checkpoints.resolve_checkpoint("user/repo/folder/file.ckpt", revision="abc")
        for call, name in zip(calls[-2:], ("file.ckpt", "config.json"), strict=True):
            assert call == ("user/repo", f"folder/{name}", {"revision": "abc"})

    @pytest.mark.parametrize(
        "reference",
        [
            "absent.ckpt",
            "user/absent.ckpt",
            "/absent/folder/file.ckpt",
            "./a/b/c.ckpt",
            "~/a/b/c.ckpt",
            "ftp://host/a/b/c",
            "https://huggingface.co/user/repo",
        ],
    )
    def test_bad_references(self, monkeypatch: pytest.MonkeyPatch, reference: str):
        monkeypatch.setattr(checkpoints, "hf_hub_download", lambda *a, **k: pytest.fail("must not download"))
        with pytest.raises(ValueError, match="`reference` must be a file, a Hub file .* got '"):
            checkpoints.resolve_checkpoint(reference)

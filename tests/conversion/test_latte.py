"""Original Latte checkpoints: both ways bit for bit, strict, averaged weights preferred."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_latents, make_tiny
from typer.testing import CliRunner

from diffusers_leanvae.cli import app
from diffusers_leanvae.conversion import latte as conversion
from diffusers_leanvae.conversion import leanvae
from diffusers_leanvae.loading import class_of_checkpoint
from diffusers_leanvae.models.transformer_latte import LeanVAELatteTransformer3DModel, latte_variant


def make_transformer(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    model = make_tiny("latte", dtype, **({"num_layers": 4} | config))
    for buffer in model.buffers():  # tables of positions are kept as a file has them, whatever they are
        buffer.add_(make_latents(*buffer.shape))
    return model


@pytest.fixture
def original() -> dict[str, torch.Tensor]:
    return conversion.to_original(make_transformer().state_dict())


def assert_equal_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key


def plain(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


class TestRoundTrip:
    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    @pytest.mark.parametrize(
        "config",
        [{}, {"num_classes": None}, {"in_channels": 16}, {"out_channels": 4, "patch_size": 4, "mlp_ratio": 2.0}],
        ids=str,
    )
    def test_ours_original_ours(self, tmp_path: Path, suffix: str, config: dict[str, Any]):
        model, path = make_transformer(**config), tmp_path / f"model{suffix}"
        conversion.write_original_checkpoint(path, model.config, model.state_dict())
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # no temporary file is left
        loaded = LeanVAELatteTransformer3DModel.from_single_file(path)
        assert not loaded.training
        assert_equal_weights(loaded.state_dict(), model.state_dict())
        ours = plain(model.config) | {"out_channels": model.out_channels}
        assert plain(loaded.config) == ours
        loaded.save_pretrained(tmp_path / "folder")
        again = LeanVAELatteTransformer3DModel.from_pretrained(tmp_path / "folder")
        assert_equal_weights(conversion.to_original(again.state_dict()), conversion.to_original(model.state_dict()))

    def test_original_ours_original(self, original: dict[str, torch.Tensor]):
        assert_equal_weights(conversion.to_original(conversion.from_original(original)), original)

    def test_dtypes(self, tmp_path: Path):
        model = make_transformer(torch.bfloat16)
        conversion.write_original_checkpoint(tmp_path / "model.pt", model.config, model.state_dict())
        loaded = LeanVAELatteTransformer3DModel.from_single_file(tmp_path / "model.pt")
        assert_equal_weights(loaded.state_dict(), model.state_dict())
        cast = LeanVAELatteTransformer3DModel.from_single_file(tmp_path / "model.pt", torch_dtype=torch.float64)
        assert {tensor.dtype for tensor in cast.state_dict().values()} == {torch.float64}

    def test_one_copy_of_the_weights(self, tmp_path: Path, original: dict[str, torch.Tensor]):
        model = make_transformer()
        conversion.write_original_checkpoint(tmp_path / "model.pt", model.config, model.state_dict())
        checkpoint = torch.load(tmp_path / "model.pt", weights_only=True)
        assert_equal_weights(checkpoint["ema"], original)
        assert_equal_weights(checkpoint["model"], original)
        size = sum(tensor.numel() * tensor.element_size() for tensor in original.values())
        assert size < (tmp_path / "model.pt").stat().st_size < 1.3 * size

    @pytest.mark.parametrize("num_classes, num_keys", [(None, 292), (101, 293)])
    def test_keys_of_a_full_size_model(self, num_classes: int | None, num_keys: int):
        with torch.device("meta"):
            ours = LeanVAELatteTransformer3DModel(**latte_variant("XL/2"), num_classes=num_classes).state_dict()
        original = conversion.to_original(ours)
        assert len(original) == num_keys  # as in the reference
        shapes = {
            "pos_embed": (1, 256, 1152),
            "temp_embed": (1, 5, 1152),
            "x_embedder.proj.weight": (1152, 4, 2, 2),
            "t_embedder.mlp.0.weight": (1152, 256),
            "t_embedder.mlp.2.bias": (1152,),
            "blocks.27.attn.qkv.weight": (3456, 1152),
            "blocks.26.attn.proj.bias": (1152,),
            "blocks.0.mlp.fc1.weight": (4608, 1152),
            "blocks.1.mlp.fc2.weight": (1152, 4608),
            "blocks.13.adaLN_modulation.1.weight": (6912, 1152),
            "final_layer.adaLN_modulation.1.bias": (2304,),
            "final_layer.linear.weight": (32, 1152),
        }
        if num_classes is not None:
            shapes["y_embedder.embedding_table.weight"] = (102, 1152)
        assert {key: tuple(original[key].shape) for key in shapes} == shapes
        assert conversion.config_from_original(original) == latte_variant("XL/2") | {
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 32,
            "num_latent_frames": 5,
            "num_classes": num_classes,
            "mlp_ratio": 4.0,
        }

    def test_order_of_rows(self, original: dict[str, torch.Tensor]):
        ours = conversion.from_original(original)
        qkv = original["blocks.3.attn.qkv.weight"]
        for index, name in enumerate(("to_q", "to_k", "to_v")):
            part = ours[f"temporal_transformer_blocks.1.attn.{name}.weight"]
            assert torch.equal(part, qkv[24 * index : 24 * (index + 1)])
            assert part.untyped_storage().nbytes() == part.numel() * 4  # a tensor of its own
        modulation = original["final_layer.adaLN_modulation.1.bias"]  # shift, scale
        assert torch.equal(ours["norm_out.linear.bias"], torch.cat((modulation[24:], modulation[:24])))


class TestReading:
    def test_averaged_weights_are_preferred(self, tmp_path: Path, original: dict[str, torch.Tensor]):
        other = {key: tensor + 1 for key, tensor in original.items()}
        torch.save({"model": other, "ema": original}, tmp_path / "both.pt")
        torch.save({"model": original}, tmp_path / "model.pt")
        torch.save(original, tmp_path / "bare.pt")
        for name in ("both.pt", "model.pt", "bare.pt"):
            config, tensors = conversion.read_original_checkpoint(tmp_path / name, num_attention_heads=2)
            assert_equal_weights(tensors, conversion.from_original(original))
            assert config["num_attention_heads"] == 2

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
    def test_prefixes_of_wrappers(self, tmp_path: Path, original: dict[str, torch.Tensor], prefix: str):
        wrapped = {prefix + key: tensor for key, tensor in original.items()}
        assert_equal_weights(conversion.from_original(wrapped), conversion.from_original(original))
        torch.save({"model": {}, "ema": wrapped}, tmp_path / "wrapped.pt")
        model = LeanVAELatteTransformer3DModel.from_single_file(tmp_path / "wrapped.pt", num_attention_heads=2)
        assert_equal_weights(conversion.to_original(model.state_dict()), original)

    def test_blocks_compiled_one_by_one(self, original: dict[str, torch.Tensor]):
        wrapped = {key.replace(".attn.", "._orig_mod.attn."): tensor for key, tensor in original.items()}
        assert wrapped.keys() != original.keys()
        assert_equal_weights(conversion.from_original(wrapped), conversion.from_original(original))

    def test_same_key_twice(self, original: dict[str, torch.Tensor]):
        original["module.pos_embed"] = original["pos_embed"]
        with pytest.raises(ValueError, match=r"`state_dict` must hold each key once"):
            conversion.from_original(original)

    @pytest.mark.parametrize(
        "name, config", [("S/2", (6, 64)), ("B/4", (12, 64)), ("L/2", (16, 64)), ("XL/8", (16, 72))]
    )
    def test_heads_of_the_named_sizes(self, name: str, config: tuple[int, int]):
        with torch.device("meta"):
            model = LeanVAELatteTransformer3DModel(**latte_variant(name))
        read = conversion.config_from_original(conversion.to_original(model.state_dict()))
        assert (read["num_attention_heads"], read["attention_head_dim"]) == config
        assert {key: read[key] for key in latte_variant(name)} == latte_variant(name)

    @pytest.mark.parametrize("heads", [None, 5, -1])
    def test_heads_of_other_sizes_must_be_given(
        self, tmp_path: Path, original: dict[str, torch.Tensor], heads: int | None
    ):
        torch.save({"ema": original}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=rf"`num_attention_heads` must divide the width 24 .* got {heads}\."):
            LeanVAELatteTransformer3DModel.from_single_file(tmp_path / "model.pt", num_attention_heads=heads)

    def test_arguments(self, tmp_path: Path):
        with pytest.raises(ValueError, match=r"`hub_kwargs` must be Hub arguments, got sample_size\."):
            LeanVAELatteTransformer3DModel.from_single_file(tmp_path / "model.pt", sample_size=64)


class TestStrictness:
    @pytest.mark.parametrize("key", ["blocks.1.attn.qkv.bias", "pos_embed", "final_layer.linear.weight"])
    def test_missing_key(self, original: dict[str, torch.Tensor], key: str):
        del original[key]
        with pytest.raises(ValueError, match=rf"`state_dict` must have all keys of a Latte model, got .*{key}"):
            conversion.from_original(original)

    def test_missing_block(self, original: dict[str, torch.Tensor]):
        state_dict = {key: tensor for key, tensor in original.items() if not key.startswith("blocks.2.")}
        with pytest.raises(ValueError, match=r"`state_dict` must have no other keys than Latte's .*blocks\.3\."):
            conversion.from_original(state_dict)

    @pytest.mark.parametrize("key", ["blocks.0.attn.q_norm.weight", "text_embedding_projection.1.weight", "x"])
    def test_foreign_key(self, original: dict[str, torch.Tensor], key: str):
        original[key] = torch.zeros(1)
        with pytest.raises(ValueError, match=rf"`state_dict` must have no other keys than Latte's .*{key}"):
            conversion.from_original(original)

    def test_fused_projections_have_no_original(self):
        model = make_transformer()
        model.fuse_qkv_projections()
        with pytest.raises(ValueError, match=r"`state_dict` must have no other keys than Latte's .*to_qkv"):
            conversion.to_original(model.state_dict())

    def test_wrong_shape(self, tmp_path: Path, original: dict[str, torch.Tensor]):
        original["blocks.1.mlp.fc2.bias"] = torch.zeros(7)
        torch.save({"ema": original}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=r"must be a complete Latte checkpoint: .*ff\.net\.2\.bias: .*[^.]\.$"):
            LeanVAELatteTransformer3DModel.from_single_file(tmp_path / "model.pt", num_attention_heads=2)

    def test_incomplete_file(self, tmp_path: Path, original: dict[str, torch.Tensor]):
        del original["x_embedder.proj.weight"]
        torch.save({"ema": original}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=r"`path` must be a complete Latte checkpoint, .* 'x_embedder\.proj\.wei"):
            conversion.read_original_checkpoint(tmp_path / "model.pt")

    def test_other_files(self, tmp_path: Path):
        torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pt")
        (tmp_path / "text.pt").write_text("hello")
        for name, message in {
            "other.pt": r"`path` must be an original Latte checkpoint, got .* without 'temp_embed'\.",
            "text.pt": r"`path` must be .* got ",
            "none.pt": r"`path` must be an original Latte checkpoint, got .* which is no file\.",
        }.items():
            with pytest.raises(ValueError, match=message):
                conversion.read_original_checkpoint(tmp_path / name)

    def test_no_code_is_run(self, tmp_path: Path, original: dict[str, torch.Tensor]):
        torch.save({"ema": original, "args": Path("x")}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=r"`path` must be a pickle of tensors and plain values, .*pathlib"):
            conversion.read_original_checkpoint(tmp_path / "model.pt")


def test_recognition(tmp_path: Path, make_model: Any, original: dict[str, torch.Tensor]):
    files = {name: tmp_path / name for name in ("latte.pt", "bare.pt", "wrapped.pt", "latte.safetensors", "vae.ckpt")}
    torch.save({"model": original, "ema": original, "args": argparse.Namespace(a=1)}, files["latte.pt"])
    torch.save(original, files["bare.pt"])
    torch.save({"ema": {f"module.{key}": tensor for key, tensor in original.items()}}, files["wrapped.pt"])
    save_file(original, files["latte.safetensors"])
    torch.save({"state_dict": make_model().state_dict()}, files["vae.ckpt"])
    for name in ("latte.pt", "bare.pt", "wrapped.pt", "latte.safetensors"):
        assert class_of_checkpoint(files[name]) is LeanVAELatteTransformer3DModel
    with pytest.raises(ValueError, match="must be an original checkpoint of LeanVAE, WF-VAE, IV-VAE, Latte, got"):
        class_of_checkpoint(files["vae.ckpt"])
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("text.pt", "list.pt", "none.pt", ""):
        with pytest.raises(ValueError, match="`path` must"):
            class_of_checkpoint(tmp_path / name)


class TestCommand:
    def run(self, *arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
        return result.exit_code, result.stderr

    def test_there_and_back(self, tmp_path: Path, original: dict[str, torch.Tensor]):
        torch.save({"model": original, "ema": original}, tmp_path / "original.pt")
        assert self.run(tmp_path / "original.pt", tmp_path / "folder", "--num-attention-heads", 2) == (0, "")
        assert self.run(tmp_path / "folder", tmp_path / "back.pt", "--to-original") == (0, "")
        assert_equal_weights(torch.load(tmp_path / "back.pt", weights_only=True)["ema"], original)
        assert self.run(tmp_path / "back.pt", tmp_path / "again", "--dtype", "bfloat16") == (0, "")
        stored = load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        assert json.loads((tmp_path / "again" / "config.json").read_text())["num_attention_heads"] == 2

    def test_options_of_the_other_kind(self, tmp_path: Path, original: dict[str, torch.Tensor], make_model: Any):
        torch.save({"ema": original}, tmp_path / "latte.pt")
        code, error = self.run(tmp_path / "latte.pt", tmp_path / "folder", "--pixel-factor", 1.0)
        assert code == 1 and "`--pixel-factor` must not be given for a checkpoint of Latte." in error
        vae = make_model()
        leanvae.write_original_checkpoint(tmp_path / "vae.ckpt", vae.config, vae.state_dict())
        code, error = self.run(tmp_path / "vae.ckpt", tmp_path / "folder", "--num-attention-heads", 2)
        assert code == 1 and "`--num-attention-heads` must not be given for a checkpoint of LeanVAE." in error
        assert not (tmp_path / "folder").exists()


FULL_SIZE_WRITE = """
import sys, torch
from diffusers_leanvae.conversion.latte import to_original
from diffusers_leanvae.models.transformer_latte import LeanVAELatteTransformer3DModel, latte_variant
with torch.device("meta"):
    meta = to_original(LeanVAELatteTransformer3DModel(**latte_variant("XL/2")).state_dict())
generator = torch.Generator().manual_seed(0)
average = {key: torch.randn(tensor.shape, generator=generator) * 0.02 for key, tensor in meta.items()}
torch.save({"model": {key: torch.zeros_like(tensor) for key, tensor in average.items()}, "ema": average}, sys.argv[1])
"""
FULL_SIZE_USE = """
import json, resource, sys, time, torch
from pathlib import Path
from diffusers_leanvae import AutoencoderKLLeanVAE, bundled
from diffusers_leanvae.models.transformer_latte import LeanVAELatteTransformer3DModel
from diffusers_leanvae.pipelines.pipeline_leanvae_latte import LeanVAELattePipeline
from diffusers_leanvae.generation.schedulers import make_scheduler
torch.set_num_threads(1)
source, folder = sys.argv[1:]
report, last = {}, time.process_time()
def mark(name):
    global last
    report[f"{name}_cpu_seconds"] = round(time.process_time() - last, 1)
    report[f"{name}_peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    last = time.process_time()
vae = AutoencoderKLLeanVAE.from_pretrained(bundled.model_path("compact-4ch"))
transformer = LeanVAELatteTransformer3DModel.from_single_file(source)
mark("convert")
LeanVAELattePipeline(vae, transformer, make_scheduler("ddpm")).save_pretrained(folder)
mark("save")
report["num_parameters"] = sum(p.numel() for p in transformer.parameters())
check = transformer.temporal_transformer_blocks[13].attn.to_v.weight[:4].clone()
del transformer
pipeline = LeanVAELattePipeline.from_pretrained(folder)
mark("load")
report["is_equal"] = torch.equal(pipeline.transformer.temporal_transformer_blocks[13].attn.to_v.weight[:4], check)
frames = pipeline(num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).frames
mark("sample")
report["shape"], report["is_finite"] = list(frames.shape), bool(frames.isfinite().all())
print(json.dumps(report))
"""


@pytest.mark.slow
def test_full_size(tmp_path: Path):
    # XL/2 with weights and averages, 5.4 GB: converted, saved, loaded and sampled with one thread. Prints its cost.
    checkpoint = tmp_path / "original.pt"
    subprocess.run([sys.executable, "-c", FULL_SIZE_WRITE, str(checkpoint)], check=True)
    command = [sys.executable, "-c", FULL_SIZE_USE, str(checkpoint), str(tmp_path / "pipeline")]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    report = json.loads(output.splitlines()[-1])
    print(report)
    assert report["num_parameters"] == 673_681_568
    assert report["is_equal"] and report["is_finite"]
    assert report["shape"] == [1, 17, 3, 256, 256]
    assert max(value for name, value in report.items() if name.endswith("peak_gib")) < 24

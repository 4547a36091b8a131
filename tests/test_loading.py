"""Models are found by what a source holds, and nothing of another class becomes a model of random weights."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from local_hub import LocalHub
from processes import run_python
from safetensors.torch import load_file, save_file
from tiny import make_tiny, make_video

from diffusers_leanvae import (
    AutoencoderKLIVVAE,
    AutoencoderKLLeanVAE,
    AutoencoderKLWFVAE,
    LeanVAELattePipeline,
    LeanVAELatteTransformer3DModel,
    bundled,
)
from diffusers_leanvae.conversion import latte, leanvae, wfvae
from diffusers_leanvae.description import describe, list_files
from diffusers_leanvae.generation.schedulers import make_scheduler
from diffusers_leanvae.loading import (
    AUTOENCODERS,
    MODEL_CLASSES,
    load_autoencoder,
    load_diffusion_pipeline,
    load_model,
    load_transformer,
    portable_reference,
)
from diffusers_leanvae.trainer.finetuning import load_vae


@pytest.fixture(scope="module")
def models() -> dict[Any, Any]:
    """A tiny model of each class."""
    made = [make_tiny(family) for family in ("leanvae", "wfvae", "ivvae", "latte")]
    assert [type(model) for model in made] == list(MODEL_CLASSES)
    return {type(model): model for model in made}


@pytest.fixture(scope="module")
def folders(models: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """Each of them saved."""
    root = tmp_path_factory.mktemp("models")
    for model_class, model in models.items():
        model.save_pretrained(root / model_class.__name__)
    return {model_class: root / model_class.__name__ for model_class in models}


@pytest.fixture(scope="module")
def pipeline_folder(models: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    transformer = models[LeanVAELatteTransformer3DModel]
    LeanVAELattePipeline(models[AutoencoderKLWFVAE], transformer, make_scheduler("ddpm")).save_pretrained(folder)
    return folder


def assert_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected) and not actual.training
    weights = actual.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(weights[key], tensor), key


def is_one_sentence(error: pytest.ExceptionInfo) -> bool:
    text = str(error.value)
    return text.endswith(".") and "\n" not in text


class TestForeignFolders:
    @pytest.mark.parametrize("asked", MODEL_CLASSES)
    @pytest.mark.parametrize("held", MODEL_CLASSES)
    def test_only_the_own_class_is_loaded(self, folders: dict, models: dict, asked: Any, held: Any):
        if asked is held:
            assert_same(asked.from_pretrained(folders[held]), models[held])
            return
        with pytest.raises(ValueError) as error:
            asked.from_pretrained(folders[held], torch_dtype=torch.bfloat16)
        assert is_one_sentence(error)
        assert f"must be given an `{asked.__name__}`" in str(error.value)
        assert f"an `{held.__name__}`: call `{held.__name__}.from_pretrained`" in str(error.value)
        assert torch.get_default_dtype() is torch.float32  # diffusers changes it while it builds a model

    def test_a_model_of_diffusers(self, tmp_path: Path):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", "z_dim": 16}))
        with pytest.raises(ValueError, match="an `AutoencoderKLWan`: call `AutoencoderKLWan.from_pretrained`"):
            AutoencoderKLLeanVAE.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="must hold a model of the class .*AutoencoderKLWan"):
            load_autoencoder(tmp_path)

    def test_a_subclass_loads_what_its_parent_saved(self, folders: dict, models: dict):
        class Special(AutoencoderKLLeanVAE):
            pass

        special = Special.from_pretrained(folders[AutoencoderKLLeanVAE])
        assert special.state_dict().keys() == models[AutoencoderKLLeanVAE].state_dict().keys()

    @pytest.mark.parametrize("model_class", [AutoencoderKLWFVAE, AutoencoderKLIVVAE])
    def test_training_starts_from_any_sibling(self, folders: dict, model_class: Any):
        assert type(load_vae(str(folders[model_class]), {})) is model_class
        with pytest.raises(ValueError, match=f"`init` must be an AutoencoderKLLeanVAE.* an {model_class.__name__}"):
            load_vae(str(folders[model_class]), {"type": "leanvae"})


class TestAbsurdConfigs:
    @pytest.mark.parametrize("model_class", MODEL_CLASSES)
    @pytest.mark.parametrize("width", [10**6, 10**12])
    def test_nothing_is_allocated(self, folders: dict, tmp_path: Path, model_class: Any, width: int):
        # The first has more parameters than memory could hold, the second more than 64 bits can count.
        name = {AutoencoderKLLeanVAE: "low_freq_dim", LeanVAELatteTransformer3DModel: "attention_head_dim"}
        config = json.loads((folders[model_class] / "config.json").read_text())
        config[name.get(model_class, "base_channels")] = width
        for with_weights in (False, True):
            (tmp_path / "config.json").write_text(json.dumps(config))
            if with_weights:
                weights = "diffusion_pytorch_model.safetensors"
                (tmp_path / weights).write_bytes((folders[model_class] / weights).read_bytes())
            with pytest.raises(ValueError, match=r"`config\.json` of '.*' must describe") as error:
                model_class.from_pretrained(tmp_path)
            assert is_one_sentence(error)

    def test_a_wrong_kind_of_value(self, folders: dict, tmp_path: Path):
        config = json.loads((folders[AutoencoderKLLeanVAE] / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"low_freq_dim": "wide"}))
        with pytest.raises(ValueError, match="`config.json` of .* must describe an `AutoencoderKLLeanVAE`: "):
            AutoencoderKLLeanVAE.from_pretrained(tmp_path)

    def test_a_class_that_is_no_name(self, folders: dict, tmp_path: Path):
        shutil.copytree(folders[AutoencoderKLLeanVAE], tmp_path, dirs_exist_ok=True)
        (tmp_path / "config.json").write_text('{"_class_name": ["A"]}')
        for load in (AutoencoderKLLeanVAE.from_pretrained, load_autoencoder, describe):
            with pytest.raises(ValueError, match=r"must (be a name,|hold a model of the class) .*\['A'\]") as error:
                load(str(tmp_path))
            assert is_one_sentence(error)

    @pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
    def test_an_index_that_is_none(self, folders: dict, tmp_path: Path, content: str):
        shutil.copytree(folders[AutoencoderKLLeanVAE], tmp_path, dirs_exist_ok=True)
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
        for load in (AutoencoderKLLeanVAE.from_pretrained, load_autoencoder, describe):
            with pytest.raises((OSError, ValueError), match="index") as error:
                load(str(tmp_path))
            assert is_one_sentence(error)

    @pytest.mark.parametrize("content, kind", [("[]", "list"), ("3", "int"), ("null", "NoneType"), ("{", None)])
    def test_no_json_object(self, folders: dict, tmp_path: Path, content: str, kind: str | None):
        (tmp_path / "config.json").write_text(content)
        weights = "diffusion_pytorch_model.safetensors"
        (tmp_path / weights).write_bytes((folders[AutoencoderKLLeanVAE] / weights).read_bytes())
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json"))) as error:
            load_autoencoder(tmp_path)
        assert is_one_sentence(error) and (kind or "valid JSON") in str(error.value)
        with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path))) as error:
            AutoencoderKLLeanVAE.from_pretrained(tmp_path)
        assert is_one_sentence(error) and (kind or "valid JSON") in str(error.value)

    def test_no_json_object_on_the_hub(self, tmp_path: Path):
        code = """
from diffusers_leanvae.loading import load_autoencoder
try:
    load_autoencoder("someone/tiny")
except ValueError as error:
    print(error)
"""
        with LocalHub() as hub:
            hub.repositories["someone/tiny"] = {"config.json": b"[]"}
            said = run_python(code, **hub.environment(tmp_path))
        assert said.strip() == "`config.json` of 'someone/tiny' must hold a JSON object, got a list."

    def test_a_pipeline_index_that_is_no_object(self, tmp_path: Path):
        (tmp_path / "model_index.json").write_text("[]")
        with pytest.raises(ValueError, match=r"`model_index\.json` of .* must hold a JSON object, got a list"):
            load_diffusion_pipeline(tmp_path)

    @pytest.mark.parametrize("model_class", MODEL_CLASSES)
    def test_weights_of_other_keys(self, folders: dict, models: dict, tmp_path: Path, model_class: Any):
        (tmp_path / "config.json").write_bytes((folders[model_class] / "config.json").read_bytes())
        weights = tmp_path / "diffusion_pytorch_model.safetensors"
        model_class.conversion.write_original_checkpoint(
            weights, dict(models[model_class].config), models[model_class].state_dict()
        )
        with pytest.raises(ValueError, match="must hold the weights that its config describes, got a file") as error:
            load_model(tmp_path)
        assert is_one_sentence(error) and weights.name in str(error.value)
        assert_same(model_class.from_single_file(weights), models[model_class])

    def test_weights_with_more_keys_are_no_mistake(self, folders: dict, models: dict, tmp_path: Path):
        model = models[AutoencoderKLLeanVAE]
        (tmp_path / "config.json").write_bytes((folders[AutoencoderKLLeanVAE] / "config.json").read_bytes())
        weights = model.state_dict() | {"head.weight": torch.ones(1)}
        save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
        assert_same(load_autoencoder(tmp_path), model)

    @pytest.mark.parametrize("model_class", MODEL_CLASSES)
    @pytest.mark.parametrize("kind", ["plain", "variant", "bin", "shards"])
    @pytest.mark.parametrize("how", ["lost", "renamed"])
    def test_a_missing_weight(self, models: dict, tmp_path: Path, model_class: Any, kind: str, how: str):
        save: dict[str, Any] = {"plain": {}, "variant": {"variant": "fp16"}, "bin": {"safe_serialization": False}}
        models[model_class].save_pretrained(tmp_path, **save.get(kind, {"max_shard_size": "40KB"}))
        path = min(tmp_path.glob("diffusion*.bin" if kind == "bin" else "diffusion*.safetensors"))
        weights = torch.load(path) if kind == "bin" else load_file(path)
        lost = next(iter(weights))
        tensor = weights.pop(lost)
        weights |= {f"{lost}_of_old": tensor} if how == "renamed" else {}
        if kind == "bin":
            torch.save(weights, path)
        else:
            save_file(weights, path)
        options = save["variant"] if kind == "variant" else {}
        message = f"{path.name}.*` of .* must hold the weights that .*without 1 of them, for instance '{lost}'[.]$"
        for more in ({}, {"low_cpu_mem_usage": False}, {"device_map": "cpu"}):
            with pytest.raises(ValueError, match=message) as error:
                model_class.from_pretrained(tmp_path, **options, **more)
            assert is_one_sentence(error)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path, **options)

    def test_layers_that_are_not_stored_or_would_be_dropped(self, folders: dict):
        folder = folders[AutoencoderKLLeanVAE]
        for num_layers, found in ((3, r"without \d+ of them"), (1, r"with \d+ others")):
            with pytest.raises(
                ValueError, match=f"got a file {found}, for instance '[^']*', '[^']*', '[^']*'[.]$"
            ) as error:
                AutoencoderKLLeanVAE.from_pretrained(folder, num_fusion_layers=num_layers)
            assert is_one_sentence(error)
        loaded, info = AutoencoderKLLeanVAE.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.config["num_fusion_layers"] == 2

    def test_a_pipeline_with_a_missing_weight(self, pipeline_folder: Path, tmp_path: Path):
        shutil.copytree(pipeline_folder, tmp_path / "pipeline")
        path = tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        lost = weights.popitem()[0]
        save_file(weights, path)
        for load in (LeanVAELattePipeline.from_pretrained, load_diffusion_pipeline, load_autoencoder):
            with pytest.raises(ValueError, match=f"without 1 of them, for instance '{lost}'"):
                load(tmp_path / "pipeline")

    def test_halves_and_variants_are_no_mistake(self, tmp_path: Path):
        make_tiny("wfvae", torch.float16).save_pretrained(tmp_path, variant="fp16")
        loaded = load_autoencoder(tmp_path, variant="fp16")
        assert loaded.dtype is torch.float32  # as diffusers does without a dtype
        assert load_autoencoder(tmp_path, torch.float16, variant="fp16").dtype is torch.float16


class TestSaving:
    """What is saved is what is loaded, whatever was in the folder."""

    @pytest.mark.parametrize("options", [{}, {"variant": "ema"}], ids=["plain", "variant"])
    @pytest.mark.parametrize("later", [{}, {"max_shard_size": "40KB"}, {"safe_serialization": False}], ids=str)
    @pytest.mark.parametrize("former", [{}, {"max_shard_size": "40KB"}, {"safe_serialization": False}], ids=str)
    def test_over_a_former_model(self, tmp_path: Path, former: dict, later: dict, options: dict):
        first, second, other = (make_tiny("leanvae", seed=seed) for seed in (1, 2, 3))
        other.save_pretrained(tmp_path, variant="fp16")
        (tmp_path / "notes.bin").write_text("mine")
        first.save_pretrained(tmp_path, **former, **options)
        second.save_pretrained(tmp_path, **later, **options)
        assert_same(AutoencoderKLLeanVAE.from_pretrained(tmp_path, **options), second)
        assert_same(AutoencoderKLLeanVAE.from_pretrained(tmp_path, variant="fp16"), other)
        second.save_pretrained(tmp_path / "new", **later, **options)
        other.save_pretrained(tmp_path / "new", variant="fp16")
        names = {path.name for path in (tmp_path / "new").iterdir()}
        if "safe_serialization" in former:  # stays, as diffusers would not load it in place of safetensors
            names.add(f"diffusion_pytorch_model{'.ema' if options else ''}.bin")
        assert {path.name for path in tmp_path.iterdir()} == names | {"notes.bin", "new"}

    def test_not_into_a_file(self, models: dict, tmp_path: Path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ValueError, match="^`save_directory` must be a folder, got '.*file', which is a file[.]$"):
            models[AutoencoderKLLeanVAE].save_pretrained(tmp_path / "file")

    @pytest.mark.parametrize("how", ["group_disk", "sequential", "disk", "meta"])
    def test_weights_that_are_not_in_memory(self, tmp_path: Path, how: str):
        model = make_tiny("leanvae")
        model.save_pretrained(tmp_path / "saved")
        before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
        if how == "group_disk":
            folder = str(tmp_path / "groups")
            model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=folder)
        elif how == "sequential":
            accelerate.cpu_offload(model, torch.device("cpu"))
        elif how == "disk":
            accelerate.disk_offload(model, str(tmp_path / "weights"), torch.device("cpu"))
        else:
            model = model.to("meta")
        with pytest.raises(
            ValueError, match="^`save_pretrained` must be called on a model with its weights in"
        ) as error:
            model.save_pretrained(tmp_path / "saved")
        assert is_one_sentence(error)
        assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
        if how != "group_disk":  # whose weights say nothing of it
            with pytest.raises(ValueError, match="^`state_dict` must hold weights in memory, got .* for instance "):
                leanvae.write_original_checkpoint(tmp_path / "x.pt", dict(model.config), model.state_dict())
            assert not (tmp_path / "x.pt").exists()

    def test_groups_that_are_offloaded_to_memory(self, tmp_path: Path):
        model, expected = make_tiny("leanvae"), make_tiny("leanvae")
        model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        model.save_pretrained(tmp_path)
        assert_same(load_autoencoder(tmp_path), expected)


class TestAutoencoders:
    @pytest.mark.parametrize("model_class", AUTOENCODERS)
    def test_folders(self, folders: dict, models: dict, model_class: Any):
        assert_same(load_autoencoder(folders[model_class]), models[model_class])
        assert load_autoencoder(str(folders[model_class]), torch.bfloat16).dtype is torch.bfloat16
        root, name = folders[model_class].parent, folders[model_class].name
        assert_same(load_autoencoder(root, subfolder=name), models[model_class])

    def test_pipelines(self, pipeline_folder: Path, models: dict):
        assert_same(load_autoencoder(pipeline_folder), models[AutoencoderKLWFVAE])
        assert_same(load_autoencoder(pipeline_folder / "vae"), models[AutoencoderKLWFVAE])

    @pytest.mark.parametrize("name", bundled.MODELS)
    def test_bundled(self, name: str):
        assert_same(load_autoencoder(name), AutoencoderKLLeanVAE.from_pretrained(bundled.model_path(name)).eval())

    def test_of_a_bundled_pipeline(self):
        assert_same(load_autoencoder("mini-shapes"), load_autoencoder(bundled.PIPELINES["mini-shapes"].model))

    @pytest.mark.parametrize("model_class", AUTOENCODERS)
    @pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
    @torch.no_grad()
    def test_originals(self, models: dict, tmp_path: Path, model_class: Any, is_folder: bool):
        vae = models[model_class]
        path = tmp_path / "original.pth"
        model_class.conversion.write_original_checkpoint(path, dict(vae.config), vae.state_dict())
        loaded = load_autoencoder(tmp_path if is_folder else path)
        assert_same(loaded, vae)
        # Nothing beside the weights was left behind on the meta device, where the model is built.
        video = make_video(1, 3, 5, 32, 32)
        latents = vae.encode(video).latent_dist.mode()
        assert torch.equal(loaded.encode(video).latent_dist.mode(), latents)
        assert torch.equal(loaded.decode(latents).sample, vae.decode(latents).sample)

    def test_config_values_that_a_file_does_not_tell(self, models: dict, tmp_path: Path):
        vae = models[AutoencoderKLLeanVAE]
        state_dict = leanvae.to_original(vae.state_dict())
        torch.save(state_dict, tmp_path / "bare.pt")
        assert load_autoencoder(tmp_path / "bare.pt").config["pixel_factor"] == 0.5
        assert load_autoencoder(tmp_path / "bare.pt", pixel_factor=1.0).config["pixel_factor"] == 1.0
        with pytest.raises(ValueError, match="`kwargs` must be Hub or config arguments, got colour"):
            load_autoencoder(tmp_path / "bare.pt", colour=1)

    @pytest.mark.parametrize("load", [AutoencoderKLLeanVAE.from_pretrained, load_autoencoder, load_diffusion_pipeline])
    def test_an_empty_path_is_not_the_current_folder(self, folders: dict, load: Any, monkeypatch: Any):
        monkeypatch.chdir(folders[AutoencoderKLLeanVAE])
        with pytest.raises(ValueError, match="must be .*, got ''") as error:
            load("")
        assert is_one_sentence(error)

    @pytest.mark.parametrize("source", ["nowhere", "nowhere.ckpt", "./no/such/folder", "/no/such/folder", "a/b.ckpt"])
    def test_nothing_there(self, source: str):
        with pytest.raises(ValueError) as error:
            load_autoencoder(source)
        assert is_one_sentence(error)
        for legal in ("'compact-16ch'", "'compact-4ch'", "a folder of `save_pretrained`", "on the Hub", repr(source)):
            assert legal in str(error.value)

    @pytest.mark.parametrize(
        "source",
        ["compact16ch", "here/vae", "here/run 1/vae", "here/vae.v2", "../vae/x", "a/../b", "user/name/", "~/vae/x"],
    )
    def test_the_hub_is_not_asked_for_what_is_no_id(self, source: str, tmp_path: Path, monkeypatch: Any):
        (tmp_path / "work" / "here").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "work")
        with LocalHub() as hub:
            hub.connect(monkeypatch)
            for load in (load_autoencoder, load_transformer, load_model, load_diffusion_pipeline):
                with pytest.raises(ValueError, match="which does not exist") as error:
                    load(source)
                assert is_one_sentence(error) and repr(source) in str(error.value)
        assert hub.unknown == []

    def test_a_name_that_was_perhaps_meant(self):
        with pytest.raises(ValueError, match="'compact16ch', which does not exist; perhaps 'compact-16ch' is meant"):
            load_autoencoder("compact16ch")
        with pytest.raises(ValueError, match="'mini-shape', which does not exist; perhaps 'mini-shapes' is meant"):
            load_diffusion_pipeline("mini-shape")
        with pytest.raises(ValueError, match="'xyz', which does not exist[.]$"):
            load_autoencoder("xyz")

    def test_references_for_later(self, folders: dict, models: dict, tmp_path: Path, monkeypatch: Any):
        folder = folders[AutoencoderKLLeanVAE]
        monkeypatch.chdir(folder.parent)
        assert portable_reference(folder.name) == (str(folder.resolve()), None)
        assert portable_reference("compact-4ch") == ("compact-4ch", None)
        address = "https://huggingface.co/user/repo/resolve/main/vae.ckpt"
        assert portable_reference(address) == (address, None)
        assert portable_reference("someone/unknown") == ("someone/unknown", None)
        code = """
from diffusers_leanvae.loading import load_autoencoder, portable_reference
name, commit = portable_reference("someone/tiny")
assert commit is None
load_autoencoder(name)
name, commit = portable_reference("someone/tiny")
load_autoencoder(name, revision=commit)
print(name, commit)
"""
        with LocalHub() as hub:
            hub.repositories["someone/tiny"] = {path.name: path.read_bytes() for path in folder.iterdir()}
            said = run_python(code, **hub.environment(tmp_path))
            assert said.split() == ["someone/tiny", hub.commit_id("someone/tiny")]

    def test_other_models_and_files(self, folders: dict, models: dict, tmp_path: Path):
        with pytest.raises(ValueError, match="must hold a model of the class .*LeanVAELatteTransformer3DModel"):
            load_autoencoder(folders[LeanVAELatteTransformer3DModel])
        transformer = models[LeanVAELatteTransformer3DModel]
        latte.write_original_checkpoint(tmp_path / "latte.pt", dict(transformer.config), transformer.state_dict())
        with pytest.raises(ValueError, match="^`source` must be an original checkpoint of LeanVAE, WF-VAE, IV-VAE, "):
            load_autoencoder(tmp_path / "latte.pt")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="`reference` must name one checkpoint, got .*empty' with none"):
            load_autoencoder(tmp_path / "empty")
        torch.save({}, tmp_path / "another.pt")
        with pytest.raises(ValueError, match="must name one checkpoint, got .* with another.pt, latte.pt"):
            load_autoencoder(tmp_path)


class TestOriginalConfigs:
    """Content of the `config.json` next to original weights, as the Hub has them of WF-VAE."""

    @pytest.fixture(params=["merged.ckpt", "diffusion_pytorch_model.safetensors"])
    def original(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
        vae = make_tiny("wfvae", temporal_interpolation="nearest")
        path = tmp_path / request.param
        weights = wfvae.to_original(vae.state_dict(), dict(vae.config))
        if path.suffix == ".ckpt":
            torch.save({"state_dict": {"gen_model": weights}}, path)
        else:
            from safetensors.torch import save_file

            save_file({key: value.contiguous() for key, value in weights.items()}, path)
        (tmp_path / "config.json").write_text(json.dumps(self.config(t_interpolation="nearest")))
        return vae, path

    def config(self, **values: Any) -> dict[str, Any]:
        return {
            "_class_name": "WFVAEModel",
            "_diffusers_version": "0.30.0",
            "latent_dim": 4,
            "base_channels": 4,
            "encoder_energy_flow_hidden_size": 3,
            "decoder_energy_flow_hidden_size": 2,
            "norm_type": "layernorm",
            "attention_type": "AttnBlock3DFix",
            "l1_dowmsample_block": "Downsample",
            "scale": [0.18215] * 3,
            "shift": [0.0] * 3,
        } | values

    def test_they_are_read(self, original: tuple[Any, Path]):
        vae, path = original
        for loaded in (
            AutoencoderKLWFVAE.from_single_file(path),
            AutoencoderKLWFVAE.from_single_file(path.parent),
            load_autoencoder(path),
            load_autoencoder(path.parent),
            load_autoencoder(path.parent.parent, subfolder=path.parent.name),
        ):
            assert_same(loaded, vae)
            assert loaded.config["temporal_interpolation"] == "nearest" and loaded.config["latents_mean"] is None

    def test_and_win_nothing_over_the_tensors(self, original: tuple[Any, Path]):
        _, path = original
        path.with_name("config.json").write_text(json.dumps(self.config(latent_dim=8)))
        with pytest.raises(ValueError, match="`args` of the checkpoint says latent_dim = 8, its tensors 4"):
            AutoencoderKLWFVAE.from_single_file(path)

    @pytest.mark.parametrize("text", ["{", "[]", '{"_class_name": "AutoencoderKLWFVAE"}', '{"a": 1}'])
    def test_other_configs_are_left_alone(self, original: tuple[Any, Path], text: str):
        _, path = original
        path.with_name("config.json").write_text(text)
        assert AutoencoderKLWFVAE.from_single_file(path).config["temporal_interpolation"] == "linear"

    def test_from_pretrained_says_what_to_call(self, original: tuple[Any, Path]):
        folder = original[1].parent
        with pytest.raises(ValueError) as error:
            AutoencoderKLWFVAE.from_pretrained(folder)
        assert is_one_sentence(error)
        assert f"call `AutoencoderKLWFVAE.from_single_file('{folder}')`" in str(error.value)
        with pytest.raises(ValueError, match="an `WFVAEModel`: .*`diffusers_leanvae.loading.load_autoencoder`"):
            AutoencoderKLLeanVAE.from_pretrained(folder)


class TestFoldersWithBundledNames:
    """A folder in the working directory comes before the bundled model or pipeline of its name, whoever asks."""

    @pytest.fixture(autouse=True)
    def working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize("load", [load_autoencoder, load_model, AutoencoderKLLeanVAE.from_pretrained, load_vae])
    def test_models(self, folders: dict, models: dict, load: Any):
        Path("compact-4ch").symlink_to(folders[AutoencoderKLLeanVAE])
        loaded = load("compact-4ch", {}) if load is load_vae else load("compact-4ch")
        assert_same(loaded.eval(), models[AutoencoderKLLeanVAE])
        assert portable_reference("compact-4ch") == (str(folders[AutoencoderKLLeanVAE].resolve()), None)
        assert describe("compact-4ch") == describe(str(folders[AutoencoderKLLeanVAE]))
        assert list_files("compact-4ch") == {
            name: Path("compact-4ch", name) for name in list_files(folders[AutoencoderKLLeanVAE])
        }
        assert_same(load_autoencoder(Path("compact-16ch")), load_autoencoder(bundled.model_path("compact-16ch")))

    def test_pipelines(self, pipeline_folder: Path, models: dict):
        Path("mini-shapes").symlink_to(pipeline_folder)
        assert_same(load_autoencoder("mini-shapes"), models[AutoencoderKLWFVAE])
        assert_same(load_transformer("mini-shapes"), models[LeanVAELatteTransformer3DModel])
        for load in (load_diffusion_pipeline, LeanVAELattePipeline.from_pretrained):
            assert_same(load("mini-shapes").vae, models[AutoencoderKLWFVAE])

    def test_a_bundled_pipeline_keeps_its_own_autoencoder(self, folders: dict):
        name = bundled.PIPELINES["mini-shapes"].model
        Path(name).symlink_to(folders[AutoencoderKLWFVAE])
        assert_same(load_diffusion_pipeline("mini-shapes").vae, load_autoencoder(bundled.model_path(name)))
        assert_same(load_autoencoder("mini-shapes"), load_autoencoder(bundled.model_path(name)))

    def test_a_file_is_no_folder(self):
        Path("compact-4ch").write_text("notes")
        assert_same(load_autoencoder("compact-4ch"), load_autoencoder(bundled.model_path("compact-4ch")))


class TestTransformersAndPipelines:
    def test_transformers(self, folders: dict, models: dict, pipeline_folder: Path, tmp_path: Path):
        transformer = models[LeanVAELatteTransformer3DModel]
        assert_same(load_transformer(folders[LeanVAELatteTransformer3DModel]), transformer)
        assert_same(load_transformer(pipeline_folder), transformer)
        assert load_transformer("mini-shapes", torch.float64).dtype is torch.float64
        torch.save(latte.to_original(transformer.state_dict()), tmp_path / "latte.pt")
        assert_same(load_transformer(tmp_path / "latte.pt", num_attention_heads=2), transformer)
        with pytest.raises(ValueError, match="`source` must be 'mini-shapes', a folder of .* got 'nowhere'"):
            load_transformer("nowhere")
        with pytest.raises(ValueError, match="must hold a model of the class LeanVAELatteTransformer3DModel, got"):
            load_transformer(folders[AutoencoderKLLeanVAE])

    def test_pipelines(self, pipeline_folder: Path, models: dict):
        pipeline: Any = load_diffusion_pipeline(pipeline_folder)
        assert type(pipeline) is LeanVAELattePipeline
        assert_same(pipeline.vae, models[AutoencoderKLWFVAE])
        pipeline = load_diffusion_pipeline("mini-shapes", torch.float32)
        assert_same(pipeline.vae, load_autoencoder("compact-4ch"))
        with pytest.raises(ValueError, match="`source` must be a bundled pipeline .* got 'nowhere'"):
            load_diffusion_pipeline("nowhere")
        with pytest.raises(ValueError, match="`source` must be a pipeline, got "):
            load_diffusion_pipeline(pipeline_folder / "vae")

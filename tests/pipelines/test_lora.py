"""Low-rank adapters of the pipelines: loaded, weighed, fused and saved, in diffusers' form."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LatteTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import seeded
from white_adapter import train_white_adapter

from diffusers_leanvae.generation import load_pipeline
from diffusers_leanvae.generation.lora import _check_fits, save_lora


peft = pytest.importorskip("peft", reason="adapters need peft (extra: lora)")
FILE = "pytorch_lora_weights.safetensors"


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def add_adapter(transformer: Any, seed: int = 0, **options: Any) -> None:
    """Add an adapter that is not zero, and whose output is scaled by 3 / 2."""
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["to_q", "to_v"], "init_lora_weights": False} | options
    with seeded(seed):
        transformer.add_adapter(peft.LoraConfig(**config))


def run(case: Any, pipeline: Any) -> torch.Tensor:
    return case.run(pipeline, output_type="latent")


@pytest.fixture
def folder(case, tmp_path: Path) -> Path:
    transformer = case.components()["transformer"]
    add_adapter(transformer)
    save_lora(transformer, tmp_path / "lora")
    return tmp_path / "lora"


def test_adapters_are_loaded_weighed_and_unloaded(case, folder: Path):
    pipeline, adapted = case.pipeline(), case.pipeline()
    plain = run(case, pipeline)
    add_adapter(adapted.transformer)
    expected = run(case, adapted)
    assert (expected - plain).abs().max() > 0.01
    pipeline.load_lora_weights(folder, adapter_name="one")
    assert torch.equal(run(case, pipeline), expected)
    pipeline.set_adapters("one", 0.5)
    half = run(case, pipeline)
    assert (half - plain).abs().max() > 0.005 and (half - expected).abs().max() > 0.005
    pipeline.set_adapters("one", 0.0)
    close(run(case, pipeline), plain, atol=1e-5)
    pipeline.set_adapters("one", 1.0)
    pipeline.disable_lora()
    assert torch.equal(run(case, pipeline), plain)
    pipeline.enable_lora()
    assert torch.equal(run(case, pipeline), expected)
    pipeline.unload_lora_weights()
    assert torch.equal(run(case, pipeline), plain) and pipeline.get_list_adapters() == {}
    assert not [name for name in pipeline.transformer.state_dict() if "lora" in name]


def test_adapters_are_added_up(case, folder: Path, tmp_path: Path):
    other = case.components()["transformer"]
    add_adapter(other, seed=1, target_modules=["to_k"])
    save_lora(other, tmp_path / "other")
    pipeline = case.pipeline()
    for name, place in (("one", folder), ("other", tmp_path / "other")):
        pipeline.load_lora_weights(place, adapter_name=name)
    assert pipeline.get_list_adapters() == {"transformer": ["one", "other"]}
    pipeline.set_adapters(["one", "other"], [1.0, 0.5])
    both = run(case, pipeline)
    for name in ("one", "other"):
        pipeline.set_adapters(name)
        assert pipeline.get_active_adapters() == [name] and (run(case, pipeline) - both).abs().max() > 0.005
    pipeline.delete_adapters("other")
    assert pipeline.get_list_adapters() == {"transformer": ["one"]}


def test_fused_adapters_are_weights_like_others(case, folder: Path, tmp_path: Path):
    pipeline = case.pipeline()
    plain = run(case, pipeline)
    pipeline.load_lora_weights(folder)
    expected = run(case, pipeline)
    pipeline.fuse_lora()
    close(run(case, pipeline), expected, atol=1e-4)
    pipeline.unfuse_lora()
    close(run(case, pipeline), expected, atol=1e-4)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = run(case, pipeline)
    close(fused, expected, atol=1e-4)
    assert (fused - plain).abs().max() > 0.01
    pipeline.save_pretrained(tmp_path / "fused")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "fused")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(case, loaded), fused)


def test_the_file_is_one_of_diffusers(case, folder: Path):
    assert [path.name for path in folder.iterdir()] == [FILE]
    with safe_open(folder / FILE, "pt") as file:
        assert all(name.startswith("transformer.") for name in file.keys())  # noqa: SIM118
        assert '"transformer.lora_alpha": 3' in file.metadata()["lora_adapter_metadata"]
    pipeline = case.pipeline()
    pipeline.load_lora_weights(folder)
    expected, transformer = run(case, pipeline), case.components()["transformer"]
    transformer.load_lora_adapter(folder, weight_name=FILE, adapter_name="x")
    assert torch.equal(run(case, case.pipeline(transformer=transformer)), expected)
    transformer.save_lora_adapter(folder / "bare", "x")
    with pytest.raises(ValueError, match=r"names that begin with `transformer.`, got \w*transformer_blocks"):
        pipeline.load_lora_weights(folder / "bare")
    with pytest.raises(ValueError, match="`adapter_name` must be one of x, got 'default'"):
        save_lora(transformer, folder)
    with pytest.raises(ValueError, match="`folder` must be a folder or not exist, got the file '.*safetensors'"):
        save_lora(transformer, folder / FILE, "x")


def test_what_is_no_adapter_of_the_transformer_is_refused(case, folder: Path):
    pipeline, weights = case.pipeline(), load_file(folder / FILE)
    key, weight = next((key, weight) for key, weight in weights.items() if ".lora_A." in key)
    other = key.replace("blocks.0", "blocks.99")
    wide = torch.cat([weight, weight], dim=1)
    bad = [
        (weights | {other: weight}, "must be one of this transformer, got '.*blocks.99.*' of a layer that it lacks"),
        (weights | {key: wide}, rf"has \d+ in_features, got weights of \(2, {wide.shape[1]}\) for '{key}'"),
        ({key: weight}, "must have two matrices for each layer, got one for "),
        (weights | {key: weight * torch.nan}, f"must be finite, got others in '{key}'"),
        ("", r"must be a folder, a file, a Hub id 'user/repo' or weights, got '', which does not exist"),
        (folder / "none", r"must be a folder, a file, a Hub id 'user/repo' or weights, got '.*none', which does not"),
    ]
    for source, message in bad:
        with pytest.raises(ValueError, match=message):
            pipeline.load_lora_weights(source)
    for name in ("a.b", "", 3):
        with pytest.raises(ValueError, match="`adapter_name` must be a name without dots or None, got "):
            pipeline.load_lora_weights(folder, adapter_name=name)
    assert not getattr(pipeline.transformer, "peft_config", None)


def test_packed_weights_are_not_taken_for_those_of_another_transformer(case, folder: Path):
    class Packed(torch.nn.Linear):
        """A quantised layer: as wide as another, with its weights in one column."""

        def __init__(self, layer: torch.nn.Linear) -> None:
            super().__init__(layer.in_features, layer.out_features)
            self.weight = torch.nn.Parameter(layer.weight.detach().reshape(-1, 1))

    transformer = case.components()["transformer"]
    for name, layer in list(transformer.named_modules()):
        if name.endswith(("to_q", "to_v")):
            transformer.set_submodule(name, Packed(layer))
    _check_fits(load_file(folder / FILE), transformer, "transformer")


def test_a_pipeline_with_an_adapter_is_not_saved_unloadable(case, folder: Path, tmp_path: Path):
    pipeline = case.pipeline()
    pipeline.load_lora_weights(folder)
    with pytest.raises(
        ValueError, match="^`save_pretrained` must be called on a model without adapters, got one with"
    ):
        pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "saved")
    assert torch.equal(run(case, type(pipeline).from_pretrained(tmp_path / "saved")), run(case, pipeline))


def test_components_keep_their_class(text_case):
    pipeline = text_case.pipeline()
    assert type(pipeline.transformer) is LatteTransformer3DModel
    again = pickle.loads(pickle.dumps(pipeline.transformer))
    assert torch.equal(run(text_case, text_case.pipeline(transformer=again)), run(text_case, pipeline))


def test_a_trained_adapter_changes_what_the_bundled_generator_shows(tmp_path: Path):
    pipeline = load_pipeline("mini-shapes", torch.device("cpu"), torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def brightness() -> float:
        """Of a video whose background is dark, as all are that the generator was trained on."""
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
        return pipeline("red circle left", generator=generator, **options).frames.mean().item()

    dark = brightness()
    layers = ["to_q", "to_k", "to_v", "ff.net.0.proj", "proj_out"]
    train_white_adapter(pipeline, lambda *noisy: pipeline.transformer(*noisy, torch.arange(4)).sample, layers, 4, 20)
    save_lora(pipeline.transformer, tmp_path)
    assert (tmp_path / FILE).stat().st_size < 0.1 * sum(
        4 * weight.numel() for weight in pipeline.transformer.parameters()
    )
    pipeline.unload_lora_weights()
    assert brightness() == dark
    pipeline.load_lora_weights(tmp_path, adapter_name="white")
    bright = brightness()
    pipeline.set_adapters("white", 0.5)
    between = brightness()
    assert dark < 0.35 and bright > 0.8 and dark + 0.1 < between < bright - 0.04  # 0.26, 0.80, 0.96

"""`tune: lora` of train_lvdm.py: it trains adapters alone, resumes, and leaves them by themselves and merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from runs import Script, assert_same_run, changed
from safetensors.torch import load_file


pytest.importorskip("peft", reason="`tune: lora` needs peft (extra: lora)")
FILE = "pytorch_lora_weights.safetensors"
PLAIN = ("batch_size=2", "validation.data=null", "validation.num_samples=0")
LORA = ("tune=lora", "lora.rank=2", "optimizer.learning_rate=1e-2", "ema_decay=0.5", "num_steps=4", *PLAIN)
TEXT = (
    "data={kind: scenes, clip_size: [5, 48, 48], num_clips: 6}",
    "num_classes=null",
    "text.config={d_model: 8, d_kv: 4, d_ff: 8, num_layers: 1, num_heads: 2}",
)


@pytest.fixture(scope="module")
def base(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of classes; its learning rate is high, so that no layer is zero any more."""
    folder = tmp_path_factory.mktemp("base")
    return script.train(folder, "num_steps=3", "optimizer.learning_rate=3e-2", "ema_decay=0", *PLAIN) / "pipeline"


@pytest.fixture(scope="module")
def tuned(script: Script, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.train(tmp_path_factory.mktemp("tuned"), f"init={base}", *LORA)


def weights(pipeline: Path) -> dict[str, torch.Tensor]:
    return load_file(pipeline / "transformer" / "diffusion_pytorch_model.safetensors")


def generate(pipeline: Any, **condition: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    return pipeline(**condition, **options, generator=generator).frames


def check_adapter(run: Path, base: Path, **condition: Any) -> None:
    """The base with the adapter of a run generates what the pipeline of the run does, and not what it did alone."""
    assert [path.name for path in (run / "adapter").iterdir()] == [FILE]
    pipeline = DiffusionPipeline.from_pretrained(base)
    plain = generate(pipeline, **condition)
    pipeline.load_lora_weights(run / "adapter")
    adapted = generate(pipeline, **condition)
    assert (adapted - plain).abs().max() > 1e-3
    merged = generate(DiffusionPipeline.from_pretrained(run / "pipeline"), **condition)
    torch.testing.assert_close(merged, adapted, rtol=0, atol=2e-5)


def test_adapters_are_trained_and_nothing_else(tuned: Path, base: Path):
    before, after = weights(base), weights(tuned / "pipeline")
    targets = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
    assert changed(before, after) == {name for name in before if name.endswith(targets)}
    assert before.keys() == after.keys()
    assert "fine-tuned from" in (card := (tuned / "pipeline/README.md").read_text())
    assert ": low-rank adapters, merged." in card
    check_adapter(tuned, base, class_labels=[3])


def test_an_interrupted_run_resumes_to_the_same_numbers(script: Script, base: Path, tuned: Path, tmp_path: Path):
    assert script.interrupt(tmp_path / "run", f"init={base}", *LORA, update=4) == [1, 2, 3]
    assert_same_run(script.train(tmp_path / "run", f"init={base}", *LORA), tuned)


def test_a_model_of_texts_is_tuned_like_one_of_classes(script: Script, tmp_path: Path):
    new = ("text.encoder=new", "text.train_text_encoder=true", "optimizer.learning_rate=3e-2", "ema_decay=0")
    base = script.train(tmp_path / "base", "num_steps=3", *PLAIN, *TEXT, *new) / "pipeline"
    frozen = ("text.encoder=null", "text.config={}")
    run = script.train(tmp_path / "tuned", f"init={base}", *LORA, *TEXT, *frozen)
    encoders = [load_file(folder / "text_encoder/model.safetensors") for folder in (base, run / "pipeline")]
    assert not changed(*encoders)
    assert all(".attn" in name for name in changed(weights(base), weights(run / "pipeline")))
    check_adapter(run, base, prompt="a red circle moves left above a blue square moving down")
    with pytest.raises(ValueError, match=r"`init` must have `proj_out.weight` of shape \(\d+, \d+\) for this recipe"):
        script.train(tmp_path / "x", f"init={base}", *LORA, *TEXT, *frozen, "objective.name=epsilon")
    with pytest.raises(ValueError, match="`text.train_text_encoder` must be false with `tune: lora`, got true"):
        script.train(tmp_path / "x", f"init={base}", *LORA, *TEXT, *new)


def test_recipes_that_cannot_work_are_refused(script: Script, base: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="`tune` must be 'full' for a new model, got 'lora' without `init`"):
        script.train(tmp_path, "tune=lora")
    with pytest.raises(ValueError, match=r"`lora` must fit the model, got \['nothing'\] of rank 2: "):
        script.train(tmp_path, f"init={base}", *LORA, "lora.targets=[nothing]")

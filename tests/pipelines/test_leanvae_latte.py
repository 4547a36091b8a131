"""The class-conditional and unconditional pipeline: labels, guidance, schedulers, known frames, long videos, errors."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from safetensors import safe_open

from diffusers_leanvae import LeanVAELattePipeline, LeanVAELatteTransformer3DModel
from diffusers_leanvae.generation import plan_windows, set_timesteps, video_grid
from diffusers_leanvae.latents import normalize_latents
from diffusers_leanvae.schedulers import make_scheduler, respaced_timesteps


GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
LABELS = {0: "red circle, disc", 1: "blue square", 2: "green star"}


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# --- Labels ----------------------------------------------------------------------------------------------------------


def test_labels_by_name_and_by_id(class_case, tmp_path: Path):
    pipeline = class_case.pipeline(id2label=LABELS)
    expected = class_case.run(pipeline, class_labels=[0, 2], output_type="latent")
    for labels in (["disc", "green star"], ["red circle", 2], torch.tensor([0, 2]), np.array([0, 2]).tolist()):
        assert torch.equal(class_case.run(pipeline, class_labels=labels, output_type="latent"), expected)
    pipeline.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.labels == pipeline.labels == {"red circle": 0, "disc": 0, "blue square": 1, "green star": 2}
    assert json.loads((tmp_path / "model_index.json").read_text())["id2label"] == {str(k): v for k, v in LABELS.items()}


def test_one_label_makes_one_video(class_case):
    pipeline = class_case.pipeline(id2label=LABELS)
    assert len(class_case.run(pipeline, class_labels="disc")) == len(class_case.run(pipeline, class_labels=1)) == 1


def test_no_label_is_the_null_class(class_case):
    pipeline = class_case.pipeline()
    seen = []

    def look(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        seen.extend(tensors["class_labels"].tolist())
        return {}

    class_case.run(
        pipeline,
        class_labels=None,
        num_videos_per_prompt=2,
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["class_labels"],
    )
    assert set(seen) == {3}


def test_unconditional_model(class_case):
    pipeline = class_case.pipeline(**class_case.components(num_classes=None))
    frames = class_case.run(pipeline, class_labels=None, num_videos_per_prompt=2)
    assert frames.shape == (2, 9, 3, 32, 32) and not pipeline.do_classifier_free_guidance
    with pytest.raises(ValueError, match="`class_labels` must be None for an unconditional model, got"):
        class_case.run(pipeline)


# --- Guidance and schedulers ------------------------------------------------------------------------------------------


def golden(name: str) -> tuple[Any, LeanVAELatteTransformer3DModel, dict]:
    path = GOLDEN / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"needs the golden tensors {path}")
    from diffusers_leanvae.conversion.latte import convert_original_state_dict

    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    weights = {k.removeprefix("state_dict."): v for k, v in tensors.items() if k.startswith("state_dict.")}
    return tensors, weights, convert_original_state_dict  # type: ignore[return-value]


def test_ancestral_sampling_keeps_the_variance_and_the_rest_drops_it(class_case):
    for name in ("ddpm", "ddim", "dpm++", "flow"):
        pipeline = class_case.pipeline(name)
        widths: list[int] = []
        step = pipeline.scheduler.step

        def record(output: torch.Tensor, *args: Any, step=step, widths=widths, **kwargs: Any) -> Any:
            widths.append(output.shape[1])
            return step(output, *args, **kwargs)

        record.__signature__ = __import__("inspect").signature(step)  # the pipeline looks for `generator` there
        pipeline.scheduler.step = record
        class_case.run(pipeline)
        assert set(widths) == ({8} if name == "ddpm" else {4}), name

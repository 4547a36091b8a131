"""The script that makes the bundled text-to-video pipeline."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffusers_leanvae.data.scenes import MovingScenes, Scene, SceneObject
from diffusers_leanvae.generation import load_pipeline


SCRIPT = Path(__file__).parents[2] / "scripts" / "make_mini_scenes.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("accelerate", reason="the script uses the training module, which needs accelerate")
    spec = importlib.util.spec_from_file_location("make_mini_scenes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scenes_are_painted_as_they_are_drawn(script: ModuleType):
    rows, captions = script.describe_range((3, 5, 17, 64, 2))
    scenes = MovingScenes(17, 64, 64, seed=3, num_clips=17)
    drawn = torch.stack([scenes[number].pixels for number in range(5, 17)])
    torch.testing.assert_close(script.paint(torch.from_numpy(rows), 64), drawn, rtol=0, atol=1e-6)  # measured 2.4e-7
    assert captions == [scenes.captions(number, 2) for number in range(5, 17)]


def test_captions_are_labelled_by_what_they_say(script: ModuleType):
    circle = SceneObject("circle", "red", "small", "left", "fast")
    square = SceneObject("square", "blue", "large", "down", "slow")
    scene = Scene(circle, square, "above", "green")
    first, second = [0, 0, 0, 0, 1], [1, 2, 1, 3, 0]
    label = script.label_caption
    full = "Above a large blue square moving down slowly, a small red circle quickly goes left, on a green background."
    assert label(scene, full) == [*first, *second, 0, 2, *second, *first, 0]
    # Sizes, speeds and the background have one number more for what is not said.
    first[2] = second[2] = first[4] = second[4] = 2
    short = "a red circle moves left over a blue square moving down"
    assert label(scene, short) == [*first, *second, 0, 3, *first, *second, 1]
    assert label(Scene(circle, circle, "above", "green"), short)[12:] == [-100] * 11


@pytest.mark.slow
def test_from_captions_to_a_pipeline(tmp_path: Path):
    def run(command: str, *arguments: str) -> None:
        line = [sys.executable, str(SCRIPT), command, "--output", str(tmp_path / outputs[command]), *arguments]
        subprocess.run(line, check=True)

    outputs = {"text": "text", "pool": "pool.pt", "train": "run"}
    text = ("--text", str(tmp_path / "text"))
    run("text", "--steps", "50", "--batch-size", "8")
    sizes = ("--side", "64", "--num-scenes", "16", "--num-held-out", "16", "--batch-size", "16", "--workers", "1")
    run("pool", *text, *sizes, "--device", "cpu")
    model = ("--patch", "2", "--heads", "2", "--layers", "2", "--steps", "12", "--probe", "1", "--batch-size", "8")
    run("train", *text, "--pool", str(tmp_path / "pool.pt"), *model, "--device", "cpu")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["right_0.5"] for row in rows if "right_0.5" in row]
    assert len(losses) == 6 and losses[-1] < losses[0]
    pipeline = load_pipeline(str(tmp_path / "run" / "pipeline"), torch.device("cpu"), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline("a red circle moves left", num_inference_steps=1, output_type="pt").frames
    assert video.shape == (1, 17, 3, 64, 64)

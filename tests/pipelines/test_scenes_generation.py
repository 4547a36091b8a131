"""The benchmark of text-to-video pipelines on scenes: what it asks for, how it judges, and a whole run."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from diffusers_leanvae.data.scenes import HELD_OUT, MovingScenes, Scene, SceneObject, draw_scene
from diffusers_leanvae.evaluation.scenes_detector import ObjectDetection, SceneDetection


ROOT = Path(__file__).resolve().parents[2]
# A look that is held out, whatever the list is, and one that is not.
NEW = SceneObject(*sorted(HELD_OUT)[0][:2], "large", sorted(HELD_OUT)[0][2], "fast")
CIRCLE = next(
    SceneObject("circle", "red", "small", direction, "slow")
    for direction in ("left", "right", "up", "down")
    if ("circle", "red", direction) not in HELD_OUT
)
SCENE = Scene(CIRCLE, NEW, "above", "gray")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("scenes_generation")
    monkeypatch.setitem(sys.modules, "scenes_generation", module)  # and out of it again
    return module


def as_found(scene: Scene) -> SceneDetection:
    first, second = (ObjectDetection(**vars(item)) for item in (scene.first, scene.second))
    return SceneDetection(first, second, scene.relation, scene.background)


def test_prompts_name_everything(benchmark: ModuleType):
    scenes = MovingScenes(seed=1000, num_clips=200)
    prompts = benchmark.choose_prompts(scenes)
    for index, prompt in enumerate(prompts):
        scene = scenes.scene(index)
        words = prompt.lower()
        for item in (scene.first, scene.second):
            assert f"{item.size} {item.color} {item.shape}" in words and item.direction in words
            adverbs = ("slowly",) if item.speed == "slow" else ("quickly", "fast")
            assert any(adverb in words for adverb in adverbs)
        assert f"{scene.background} background" in words
    assert sum("It is" in prompt for prompt in prompts) > 20 and sum(prompt[0] == "o" for prompt in prompts) > 10


def test_shares_count_objects_and_properties(benchmark: ModuleType):
    found = [
        as_found(SCENE),
        as_found(replace(SCENE, first=replace(CIRCLE, size="large", speed="fast"))),
        as_found(replace(SCENE, relation="left of", background="green")),
        SceneDetection(None, None, None, "gray"),
    ]
    assert benchmark.judge([SCENE] * 4, found) == {
        "num_videos": 4,
        "first_object": 0.5,
        "one_object": 0.75,
        "both_objects": 0.5,
        "everything": 0.25,
        "found": 0.75,
        "shape": 0.75,
        "color": 0.75,
        "size": 0.625,
        "direction": 0.75,
        "speed": 0.625,
        "relation": 0.5,
        "background": 0.75,
        "held_out_objects": 0.75,
    }
    assert "held_out_objects" not in benchmark.judge([replace(SCENE, second=CIRCLE)], found[:1])


def run(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    output = folder / "bench.json"
    monkeypatch.setattr("sys.argv", ["scenes_generation.py", *arguments, "--output", str(output)])
    num_threads = torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(num_threads)
    return json.loads(output.read_text())["rows"]


class Painter:
    """A pipeline that draws what a prompt of known scenes asks for, but where guidance is 1 with the wrong ground."""

    def __init__(self, benchmark: ModuleType) -> None:
        self.vae = SimpleNamespace(spatial_compression_ratio=8, num_sample_frames=lambda count: 4 * count - 3)
        self.transformer = SimpleNamespace(config=SimpleNamespace(sample_size=8, video_length=3))
        self.scenes = {}
        for held_out in (False, True):
            scenes = MovingScenes(9, 64, 64, seed=5, num_clips=4, held_out=held_out)
            self.scenes |= {text: scenes.scene(i) for i, text in enumerate(benchmark.choose_prompts(scenes))}

    def set_progress_bar_config(self, **options: Any) -> None: ...

    def encode_prompt(self) -> None: ...

    def __call__(self, prompt: list[str], guidance_scale: float, generator: list, **options: Any) -> tuple:
        assert len(generator) == len(prompt) and options["output_type"] == "pt"
        videos = []
        for text in prompt:
            scene = self.scenes[text]
            if guidance_scale == 1:
                scene = replace(scene, background="gray" if scene.background == "black" else "black")
            videos.append(draw_scene(scene, 9, 64, 64, seed=9).permute(1, 0, 2, 3) / 2 + 0.5)
        return (torch.stack(videos),)


def test_what_is_drawn_as_asked_is_right(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(benchmark, "load_pipeline", lambda *_: Painter(benchmark))
    judge_drawn = benchmark.judge_drawn
    monkeypatch.setattr(benchmark, "judge_drawn", lambda _, *rest: judge_drawn(None, *rest))
    arguments = ["painter", "--guidance", "1", "2", "--num-videos", "4", "--batch-size", "3", "--seed", "5"]
    sheet = tmp_path / "sheet.png"
    rows = run(benchmark, monkeypatch, tmp_path, *arguments, "--sheet", str(sheet), "--num-shown", "3")
    generated = [row for row in rows if row["videos"] == "generated by painter"]
    assert [(row["guidance_scale"], row["looks"]) for row in generated] == [
        (scale, looks) for scale in (1, 2) for looks in ("trained", "held out")
    ]
    for row in generated:
        assert row["num_videos"] == 4 and row["both_objects"] == row["relation"] == 1
        assert row["everything"] == row["background"] == (0 if row["guidance_scale"] == 1 else 1)
        assert row.get("held_out_objects", 1) == 1 and ("held_out_objects" in row) == (row["looks"] == "held out")
    drawn = [row for row in rows if row["videos"] == "drawn"]
    assert [row["everything"] for row in drawn] == [1, 1] and len(rows) == 8
    with Image.open(sheet) as picture:
        assert picture.size == (2 * (5 * 64 + 320), 4 * (16 + 2 * 66))


def test_a_run_on_a_random_pipeline(text_case, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    transformer = text_case.components(sample_size=6)["transformer"]
    text_case.pipeline(transformer=transformer).save_pretrained(tmp_path / "run" / "pipeline")
    arguments = [str(tmp_path / "run" / "pipeline"), "--guidance", "2", "--num-videos", "2", "--seed", "5"]
    rows = run(benchmark, monkeypatch, tmp_path, *arguments, "--num-inference-steps", "2")
    assert [row["videos"] for row in rows] == [
        *["generated by run/pipeline"] * 2,
        *["drawn, through the autoencoder of run/pipeline", "drawn"] * 2,
    ]
    assert [row["everything"] for row in rows] == [0, 0, 0, 1, 0, 1]
    with pytest.raises(ValueError, match="must be text-to-video pipelines, got 'mini-shapes'"):
        run(benchmark, monkeypatch, tmp_path, "mini-shapes")

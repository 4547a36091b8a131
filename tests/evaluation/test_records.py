"""An evaluation goes to JSON and back."""

import json
import math
import random
import subprocess
from pathlib import Path

import pytest

from diffusers_leanvae.evaluation import results
from diffusers_leanvae.evaluation.records import Evaluation, Metric, mean_over_clips, read_evaluation


def make_evaluation() -> Evaluation:
    clips = {"a.mp4": {"psnr": 31.23456789, "ssim": 0.912345678}, "b/c.mp4": {"psnr": 29.87654321}}
    return Evaluation(
        model="compact-16ch",
        dataset="val",
        protocol={"name": "val-17x256", "num_frames": 17, "resolution": 256},
        metrics={
            "psnr": Metric("PSNR", "Of something.", "dB", digits=2),
            "ssim": Metric("SSIM", "Of something else."),
            "rfvd": Metric("rFVD", "Of all.", better="lower", digits=1),
        },
        totals=mean_over_clips(clips) | {"rfvd": 12.3456},
        clips=clips,
        about={"num_parameters": 5, "dtype": "float32"},
        failed={"bad.mp4": "It is short."},
        missing={"ssim": "1 of 2 clips is too small."},
        latents={"channel_mean": [0.123456789], "std": 1.0},
        timing={"encode_frames_per_second": 12.34567, "peak_memory_bytes": 7},
    )


def test_a_file_holds_rounded_figures_under_their_own_names(tmp_path: Path):
    evaluation = make_evaluation()
    evaluation.write(tmp_path / "a.json")
    written = json.loads((tmp_path / "a.json").read_text())
    assert (written["psnr"], written["ssim"], written["rfvd"]) == (30.5556, 0.912346, 12.346)
    assert written["clips"]["a.mp4"] == {"psnr": 31.2346, "ssim": 0.912346}
    assert (written["num_videos"], written["num_failed"], written["num_parameters"]) == (2, 1, 5)
    assert (written["num_frames"], written["resolution"], written["dtype"]) == (17, 256, "float32")
    assert written["latents"]["channel_mean"] == [0.123457] and written["timing"]["peak_memory_bytes"] == 7
    assert "command" in written["provenance"]
    assert read_evaluation(tmp_path / "a.json") == evaluation.rounded() != evaluation


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_file_holds_no_number_that_json_does_not_have(value: float, tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("former")
    with pytest.raises(ValueError, match="^`result` must hold finite numbers alone to go into '.*a.json': "):
        results.write_result(path, {"rows": [{"psnr": value}]})
    assert path.read_text() == "former" and list(tmp_path.iterdir()) == [path]


def test_the_commit_is_that_of_this_package(tmp_path: Path, monkeypatch):
    root = Path(results.__file__).resolve().parents[3]
    assert len(results.provenance()["commit"] or "-" * 12) == 12
    answers = {"of another": f"{root.parent}\n0123456789ab\n", "of this": f"{root}\n0123456789ab\n", "of none": ""}
    for whose, answer in answers.items():
        done = subprocess.CompletedProcess([], 0, answer, "")
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        assert results.provenance()["commit"] == ("0123456789ab" if whose == "of this" else None)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no git
    make_evaluation().write(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["provenance"]["commit"] is None


def test_nothing_is_lost_on_the_way_to_json_and_back():
    evaluation = make_evaluation()
    assert Evaluation.from_json(json.loads(json.dumps(evaluation.to_json()))) == evaluation


def test_means_do_not_depend_on_the_order_of_clips():
    rng = random.Random(0)
    clips = {str(i): {"psnr": rng.uniform(1e-9, 1e9)} for i in range(200)}
    shuffled = rng.sample(sorted(clips), len(clips))
    assert mean_over_clips(clips) == mean_over_clips({name: clips[name] for name in shuffled})


@pytest.mark.parametrize("text", ["nothing", "[]", '{"model": "a"}'])
def test_other_files_are_refused(tmp_path: Path, text: str):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="`path` must be a file of `leanvae eval --output`"):
        read_evaluation(path)

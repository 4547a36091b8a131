"""One protocol scores clips, whoever asks: published numbers and validation during training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from diffusers_leanvae.cli import app
from diffusers_leanvae.data import Share, read_center_clip
from diffusers_leanvae.evaluation.metrics import frame_psnr, frame_ssim
from diffusers_leanvae.evaluation.reconstruction import evaluate_reconstruction, round_scores, score_clip
from diffusers_leanvae.trainer.validation import gather_failures, load_validation_clips, score_clips, summarize
from diffusers_leanvae.video_io import read_video, write_video


NAMES = ["psnr_frame_mean_rgb", "ssim_frame_mean_rgb"]


def test_the_score_of_a_clip(make_model, make_video):
    vae, clip = make_model(), make_video(3, 5, 16, 24)
    score = score_clip(vae, clip)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(clip[None]).latent_dist.mode()).sample[0]
    unit, original = (x.transpose(0, 1).add(1).div(2).clamp(0, 1) for x in (decoded, clip))
    assert torch.equal(score.reconstruction, unit) and torch.equal(score.original, original)
    assert decoded.abs().max() > 1  # the clamp counts
    assert score.psnr == frame_psnr(unit, original).mean().item()
    assert score.ssim == frame_ssim(unit, original).mean().item()
    half = score_clip(make_model(torch.bfloat16), clip)
    assert torch.equal(half.original, clip.bfloat16().float().transpose(0, 1).add(1).div(2))


def test_evaluation_and_validation_agree(make_model, clips: Path):
    vae = make_model()
    result = evaluate_reconstruction(vae, clips, num_frames=5, size=32)
    record = summarize(score_clips(vae, load_validation_clips(clips, 5, 32).clips))
    assert list(result["clips"]) == list(record["clips"]) == ["a.mp4", "b.mp4", "nested/c.mp4"]
    assert {name: scores[NAMES[0]] for name, scores in result["clips"].items()} == record["clips"]
    assert {name: scores[NAMES[1]] for name, scores in result["clips"].items()} == record["clips_ssim"]
    assert [result[name] for name in NAMES] == [record[name] for name in NAMES]
    for name in NAMES:  # of numbers that nobody rounded
        assert result[name] == sum(scores[name] for scores in result["clips"].values()) / 3
    score = score_clip(vae, read_center_clip(clips / "b.mp4", 5, 32))
    assert result["clips"]["b.mp4"] == dict(zip(NAMES, score[:2], strict=True))
    assert (result["num_videos"], result["num_frames"], result["resolution"]) == (3, 5, 32)
    assert result["num_failed"] == record["num_failed"] == 0 and result["failed"] == record["failed"] == {}


def test_rounding_is_for_files(make_model, clips: Path):
    result = evaluate_reconstruction(make_model(), clips, num_frames=5, size=32)
    rounded = round_scores(result)
    assert rounded.keys() == result.keys() and rounded["dtype"] == "float32"
    pairs = [(rounded, result), *((rounded["clips"][name], scores) for name, scores in result["clips"].items())]
    for short, exact in pairs:
        assert short[NAMES[0]] == round(exact[NAMES[0]], 4) != exact[NAMES[0]]
        assert short[NAMES[1]] == round(exact[NAMES[1]], 5) != exact[NAMES[1]]


def test_videos_of_one_name_are_all_counted(make_model, clips: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    shutil.copy(clips / "a.mp4", tmp_path / "a.mp4")
    shutil.copy(clips / "b.mp4", tmp_path / "other" / "a.mp4")
    lines: list[str] = []
    result = evaluate_reconstruction(make_model(), tmp_path, 5, 32, lines.append)
    assert list(result["clips"]) == ["a.mp4", "other/a.mp4"] and result["num_videos"] == len(lines) == 2


def test_an_empty_folder_is_refused(make_model, tmp_path: Path):
    with pytest.raises(ValueError, match="`folder` must hold at least one video, got none"):
        evaluate_reconstruction(make_model(), tmp_path)


# --- Bad files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(clips: Path, tmp_path: Path) -> Path:
    """Two sound videos between a text file, half a video and one of too few frames."""
    folder = tmp_path / "mixed"
    (folder / "z").mkdir(parents=True)
    shutil.copy(clips / "a.mp4", folder / "a.mp4")
    shutil.copy(clips / "b.mp4", folder / "z/b.mp4")
    (folder / "0.mp4").write_bytes(b"not a video")
    (folder / "half.mp4").write_bytes((clips / "a.mp4").read_bytes()[:500])
    write_video(folder / "short.mp4", read_video(clips / "a.mp4", num_frames=3)[0], fps=24)
    return folder


def test_evaluation_goes_on_past_bad_files(make_model, clips: Path, mixed: Path):
    vae, lines = make_model(), []
    result = evaluate_reconstruction(vae, mixed, 5, 32, lines.append)
    alone = evaluate_reconstruction(vae, clips, 5, 32)["clips"]
    assert result["clips"] == {"a.mp4": alone["a.mp4"], "z/b.mp4": alone["b.mp4"]}
    for name in NAMES:
        assert result[name] == (alone["a.mp4"][name] + alone["b.mp4"][name]) / 2
    assert list(result["failed"]) == ["0.mp4", "half.mp4", "short.mp4"]
    assert (result["num_videos"], result["num_failed"], len(lines)) == (2, 3, 5)
    assert "must have at least 5 frames, got 3" in result["failed"]["short.mp4"]
    assert [line.split()[0] for line in lines if " failed: " in line] == ["0.mp4", "half.mp4", "short.mp4"]
    assert round_scores(result)["failed"] == result["failed"]
    for name in ("a.mp4", "z/b.mp4"):
        (mixed / name).unlink()
    with pytest.raises(ValueError, match="at least one usable video, got 3 that failed, the first of them: .*0.mp4"):
        evaluate_reconstruction(vae, mixed, 5, 32)


def test_the_command_counts_bad_files(mixed: Path, tmp_path: Path):
    options = ["--num-frames", "5", "--size", "32", "--output", str(tmp_path / "scores.json")]
    finished = CliRunner().invoke(app, ["eval", str(mixed), *options])
    assert finished.exit_code == 0
    assert "3 of 5 files failed: 0.mp4, half.mp4, short.mp4" in finished.stderr
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["num_failed"] == 3 and list(written["failed"]) == ["0.mp4", "half.mp4", "short.mp4"]
    for path in (mixed / "a.mp4", mixed / "z/b.mp4"):
        path.unlink()
    finished = CliRunner().invoke(app, ["eval", str(mixed), *options])
    assert finished.exit_code != 0


def test_validation_goes_on_past_bad_files(make_model, mixed: Path):
    with pytest.warns(UserWarning, match="Skipping a video of `validation.folder`: ") as warned:
        loaded = load_validation_clips(mixed, 5, 32)
    assert len(warned) == 3 and [clip.name for clip in loaded.clips] == ["a.mp4", "z/b.mp4"]
    record = summarize(score_clips(make_model(), loaded.clips), gather_failures(loaded))
    assert record["num_failed"] == 3 and list(record["failed"]) == ["0.mp4", "half.mp4", "short.mp4"]
    assert list(record["clips"]) == ["a.mp4", "z/b.mp4"]
    with pytest.warns(UserWarning):
        parts = [load_validation_clips(mixed, 5, 32, Share(rank, 2)) for rank in range(2)]
    assert sorted(clip.name for part in parts for clip in part.clips) == ["a.mp4", "z/b.mp4"]
    assert sorted(name for part in parts for name in part.failed) == list(record["failed"])
    with pytest.raises(ValueError, match="`validation.folder` must hold at least one usable video, got 3 that failed"):
        gather_failures(loaded._replace(clips=[]))

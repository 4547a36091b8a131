"""One protocol scores clips, whoever asks: published numbers and validation during training."""

import shutil
from pathlib import Path

import pytest
import torch

from diffusers_leanvae.data import read_center_clip
from diffusers_leanvae.evaluation.metrics import frame_psnr, frame_ssim
from diffusers_leanvae.evaluation.reconstruction import evaluate_reconstruction, round_scores, score_clip
from diffusers_leanvae.trainer.validation import load_validation_clips, score_clips, summarize


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
    record = summarize(score_clips(vae, load_validation_clips(clips, 5, 32)))
    assert list(result["clips"]) == list(record["clips"]) == ["a.mp4", "b.mp4", "nested/c.mp4"]
    assert {name: scores[NAMES[0]] for name, scores in result["clips"].items()} == record["clips"]
    assert {name: scores[NAMES[1]] for name, scores in result["clips"].items()} == record["clips_ssim"]
    assert [result[name] for name in NAMES] == [record[name] for name in NAMES]
    for name in NAMES:  # of numbers that nobody rounded
        assert result[name] == sum(scores[name] for scores in result["clips"].values()) / 3
    score = score_clip(vae, read_center_clip(clips / "b.mp4", 5, 32))
    assert result["clips"]["b.mp4"] == dict(zip(NAMES, score[:2], strict=True))
    assert (result["num_videos"], result["num_frames"], result["resolution"]) == (3, 5, 32)


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

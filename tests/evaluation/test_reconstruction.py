"""One protocol scores clips, whoever asks: published numbers and validation during training."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from safetensors.torch import save_file
from tiny import make_tiny
from typer.testing import CliRunner

from diffusers_leanvae.cli import app
from diffusers_leanvae.data import Share, read_center_clip
from diffusers_leanvae.evaluation.journal import Journal
from diffusers_leanvae.evaluation.measures import MetricOptions
from diffusers_leanvae.evaluation.metrics import frame_psnr, frame_ssim
from diffusers_leanvae.evaluation.protocols import Protocol
from diffusers_leanvae.evaluation.reconstruction import evaluate_reconstruction, score_clip
from diffusers_leanvae.evaluation.reconstructors import AutoencoderReconstructor, Reconstruction
from diffusers_leanvae.evaluation.records import Evaluation
from diffusers_leanvae.evaluation.streaming import StreamingReconstructor
from diffusers_leanvae.losses.perceptual import LPIPS
from diffusers_leanvae.trainer.validation import gather_failures, load_validation_clips, score_clips, summarize
from diffusers_leanvae.video_io import read_video, write_video


NAMES = ["psnr_frame_mean_rgb", "ssim_frame_mean_rgb"]
TINY = Protocol("tiny", 5, 32)


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


def make_judged(vae: Any, **about: Any) -> AutoencoderReconstructor:
    return AutoencoderReconstructor(vae, "tiny", {"temporal_compression_ratio": 4} | about)


def test_the_score_of_a_clip(make_model, make_video):
    vae, clip = make_model(), make_video(3, 5, 16, 24)
    score = score_clip(vae, clip)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(clip[None]).latent_dist.mode()).sample[0]
    unit, original = (x.transpose(0, 1).add(1).div(2).clamp(0, 1) for x in (decoded, clip))
    assert torch.equal(score.reconstruction, unit) and torch.equal(score.original, original)
    assert decoded.abs().max() > 1  # the clamp counts
    assert score.psnr == frame_psnr(unit, original).double().mean().item()
    assert score.ssim == frame_ssim(unit, original).double().mean().item()
    half = score_clip(make_model(torch.bfloat16), clip)
    assert torch.equal(half.original, clip.bfloat16().float().transpose(0, 1).add(1).div(2))


def test_evaluation_and_validation_agree(make_model, clips: Path):
    vae = make_model()
    result = evaluate_reconstruction(make_judged(vae), clips, TINY)
    record = summarize(score_clips(vae, load_validation_clips(clips, 5, 32).clips))
    assert list(result.clips) == list(record["clips"]) == ["a.mp4", "b.mp4", "nested/c.mp4"]
    assert {name: scores[NAMES[0]] for name, scores in result.clips.items()} == record["clips"]
    assert {name: scores[NAMES[1]] for name, scores in result.clips.items()} == record["clips_ssim"]
    for name in NAMES:  # of numbers that nobody rounded
        assert result.totals[name] == math.fsum(scores[name] for scores in result.clips.values()) / 3
        assert result.totals[name] == pytest.approx(record[name], rel=1e-12)
    score = score_clip(vae, read_center_clip(clips / "b.mp4", 5, 32))
    assert [result.clips["b.mp4"][name] for name in NAMES] == list(score[:2])
    assert result.failed == record["failed"] == {} and record["num_failed"] == 0


def test_videos_of_one_name_are_all_counted(make_model, clips: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    shutil.copy(clips / "a.mp4", tmp_path / "a.mp4")
    shutil.copy(clips / "b.mp4", tmp_path / "other" / "a.mp4")
    lines: list[str] = []
    result = evaluate_reconstruction(make_judged(make_model()), tmp_path, TINY, progress=lines.append)
    assert list(result.clips) == ["a.mp4", "other/a.mp4"] and result.num_videos == len(lines) == 2


def test_an_empty_folder_is_refused(make_model, tmp_path: Path):
    with pytest.raises(ValueError, match="`folder` must hold at least one video, got none"):
        evaluate_reconstruction(make_judged(make_model()), tmp_path)


@pytest.mark.parametrize("name", ["leanvae", "wfvae", "ivvae"])
def test_pieces_give_what_whole_clips_give(name: str, make_video, clips: Path, tmp_path: Path):
    vae = make_tiny(name, torch.float64)
    clips = Path(shutil.copytree(clips, tmp_path / "clips"))
    jumps = torch.randint(256, (17, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_video(clips / "jumps.mkv", jumps.repeat_interleave(8, 1).repeat_interleave(8, 2), fps=24, codec="ffv1")
    protocol = replace(TINY, num_frames=None, metrics=(*TINY.metrics, "warp"))
    whole = evaluate_reconstruction(make_judged(vae), clips, protocol)
    assert {"grid_ratio_window_mean_rgb", "ghost_weight", "warp_mae_255_block16"} <= whole.totals.keys()
    for chunk in (5, 9):
        pieces = evaluate_reconstruction(
            StreamingReconstructor(vae, "tiny", {"temporal_compression_ratio": 4}, chunk), clips, protocol
        )
        for clip, figures in whole.clips.items():
            assert pieces.clips[clip] == pytest.approx(
                figures, abs=1e-5, rel=0
            )  # measured: 1.9e-6, flicker in float32
        assert pieces.latents["channel_std"] == pytest.approx(whole.latents["channel_std"], abs=1e-14, rel=0)
        assert pieces.about["chunk"] == chunk
    cut = replace(protocol, num_frames=8)
    with pytest.raises(ValueError, match=r"`num_frames` must be 4 \* n \+ 1 for clips in pieces, got 8"):
        evaluate_reconstruction(StreamingReconstructor(vae, "tiny", {"temporal_compression_ratio": 4}, 5), clips, cut)
    for chunk in (1, 6):
        with pytest.raises(ValueError, match=r"`chunk` must be 4 \* n \+ 1"):
            StreamingReconstructor(vae, "tiny", None, chunk)


def test_latents_and_rate(make_model, clips: Path):
    vae = make_model()
    result = evaluate_reconstruction(make_judged(vae), clips, TINY)
    samples = torch.stack([read_center_clip(clips / name, 5, 32) for name in result.clips])
    with torch.no_grad():
        latents = vae.encode(samples).latent_dist.mode().double()
    channels = latents.transpose(0, 1).flatten(1)
    assert result.latents is not None
    assert result.latents["channel_mean"] == pytest.approx(channels.mean(dim=1).tolist(), abs=1e-6, rel=0)
    std = channels.std(dim=1, correction=0).tolist()
    assert result.latents["channel_std"] == pytest.approx(std, abs=1e-6, rel=0) and min(std) > 0.01
    assert result.latents["largest"] == pytest.approx(latents.abs().max().item(), abs=1e-6, rel=0)
    assert result.latents["std"] == pytest.approx(latents.std(correction=0).item(), abs=1e-6, rel=0)
    assert result.totals["bits_per_pixel"] == pytest.approx(8 * latents[0].numel() / (5 * 32 * 32), rel=1e-12)
    assert result.timing is not None and result.timing["peak_memory_bytes"] > 2**20
    assert result.timing["encode_frames_per_second"] > 0 and result.timing["decode_frames_per_second"] > 0


def test_the_places_in_a_group(make_model, clips: Path):
    vae = make_model()
    result = evaluate_reconstruction(make_judged(vae), clips, replace(TINY, num_frames=9, metrics=("psnr_in_group",)))
    score = score_clip(vae, read_center_clip(clips / "a.mp4", 9, 32))
    values = frame_psnr(score.reconstruction, score.original).double()
    prefix = "psnr_frame_mean_rgb_"
    expected = {f"{prefix}first": values[0].item()}
    expected |= {f"{prefix}group_{place}": ((values[place] + values[place + 4]) / 2).item() for place in range(1, 5)}
    figures = {name: value for name, value in result.clips["a.mp4"].items() if name != "bits_per_pixel"}
    assert figures == pytest.approx(expected, abs=1e-12, rel=0) and len({*expected.values()}) == 5


# --- Runs that end, and several processes ----------------------------------------------------------------------------


def figures_of(result: Evaluation) -> dict[str, Any]:
    return {name: value for name, value in result.to_json().items() if name != "timing"}


def test_a_run_that_was_ended_gives_the_same(make_model, clips: Path, tmp_path: Path, monkeypatch):
    judged, journal = make_judged(make_model()), tmp_path / "journal"
    expected = figures_of(evaluate_reconstruction(judged, clips, TINY))
    count = 0

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_reconstruction(judged, clips, TINY, resume=journal, progress=interrupt)
    lines = (journal / "clips-0.jsonl").read_bytes()
    assert lines.count(b"\n") == 1
    (journal / "clips-0.jsonl").write_bytes(lines + lines[:40])  # the second was being written

    reconstruct = judged.reconstruct

    def counted(clip: torch.Tensor) -> Reconstruction:
        nonlocal count
        count += 1
        return reconstruct(clip)

    monkeypatch.setattr(judged, "reconstruct", counted)
    assert figures_of(evaluate_reconstruction(judged, clips, TINY, resume=journal)) == expected and count == 2
    assert figures_of(evaluate_reconstruction(judged, clips, TINY, resume=journal)) == expected and count == 2
    other = evaluate_reconstruction(judged, clips, replace(TINY, resolution=40), resume=journal)
    assert count == 5 and other.totals != expected and other.clips.keys() == expected["clips"].keys()
    copy = tmp_path / "copy"
    shutil.copytree(clips, copy)
    shutil.copy(clips / "b.mp4", copy / "a.mp4")
    changed = evaluate_reconstruction(judged, copy, TINY, resume=journal)  # of the same names
    assert changed.clips["a.mp4"] == expected["clips"]["b.mp4"]
    with torch.no_grad():
        judged.vae.logvar_proj.bias.add_(1.0)
        next(judged.vae.decoder.parameters()).add_(0.1)
    seen = count
    retrained = evaluate_reconstruction(judged, clips, TINY, resume=journal)  # a model of the same name and class
    assert count == seen + 3 and retrained.totals != expected
    Journal.remove(journal)
    assert not journal.exists()


def evaluate_share(rank: int, folder: str, clips: str) -> None:
    """Work of each process: evaluate, and write the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    judged = make_judged(make_tiny("leanvae"))
    result = evaluate_reconstruction(judged, clips, TINY, resume=f"{folder}/journal")
    Path(folder, f"result-{rank}.json").write_text(json.dumps(figures_of(result)))
    dist.destroy_process_group()


def test_two_processes_give_the_bits_of_one(make_model, mixed: Path, tmp_path: Path):
    expected = figures_of(evaluate_reconstruction(make_judged(make_model()), mixed, TINY))
    run_ranks(evaluate_share, str(tmp_path), str(mixed), num_processes=2, output=tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"result-{rank}.json").read_text()) == expected
    assert len(list((tmp_path / "journal").glob("clips-*.jsonl"))) == 2


# --- Bad files -------------------------------------------------------------------------------------------------------


def test_evaluation_goes_on_past_bad_files(make_model, clips: Path, mixed: Path):
    judged, lines = make_judged(make_model()), []
    result = evaluate_reconstruction(judged, mixed, TINY, progress=lines.append)
    alone = evaluate_reconstruction(judged, clips, TINY).clips
    assert result.clips == {"a.mp4": alone["a.mp4"], "z/b.mp4": alone["b.mp4"]}
    for name in NAMES:
        assert result.totals[name] == math.fsum((alone["a.mp4"][name], alone["b.mp4"][name])) / 2
    assert list(result.failed) == ["0.mp4", "half.mp4", "short.mp4"]
    assert (result.num_videos, len(lines)) == (2, 5)
    assert "must have at least 5 frames, got 3" in result.failed["short.mp4"]
    failures = [line.split()[:2] for line in lines if " failed: " in line]
    assert failures == [["[1/5]", "0.mp4"], ["[3/5]", "half.mp4"], ["[4/5]", "short.mp4"]]
    for name in ("a.mp4", "z/b.mp4"):
        (mixed / name).unlink()
    with pytest.raises(ValueError, match="at least one usable video, got 3 that failed, the first of them: .*0.mp4"):
        evaluate_reconstruction(judged, mixed, TINY)


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


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_clips_of_which_nothing_finite_comes_back_are_left_out(name: str, make_model, clips: Path):
    class Broken(AutoencoderReconstructor):
        """Makes something infinite of the first clip."""

        is_first = True

        def reconstruct(self, clip: torch.Tensor) -> Reconstruction:
            result = super().reconstruct(clip)
            if self.is_first:
                self.is_first, values = False, getattr(result, name)
                assert values is not None
                values[-1, -1, -1, -1] = math.nan if name == "pixels" else math.inf
            return result

    result = evaluate_reconstruction(Broken(make_model(), "tiny"), clips, TINY)
    alone = evaluate_reconstruction(AutoencoderReconstructor(make_model(), "tiny"), clips, TINY)
    assert result.failed == {"a.mp4": f"tiny made {name} of it that are not finite numbers."}
    assert result.clips == {name: figures for name, figures in alone.clips.items() if name != "a.mp4"}


def test_the_command_writes_nothing_of_a_model_of_nan(make_model, clips: Path, tmp_path: Path):
    vae = make_model()
    with torch.no_grad():
        next(vae.decoder.parameters()).fill_(math.nan)
    vae.save_pretrained(tmp_path / "broken")
    options = ["--num-frames", "5", "--size", "32", "--output", str(tmp_path / "scores.json")]
    finished = CliRunner().invoke(app, ["eval", str(clips), "--model", str(tmp_path / "broken"), *options])
    assert finished.exit_code == 1 and finished.stderr.count("\n") == 1
    assert re.search("got 3 that failed, the first of them: .*broken made pixels of it that are not", finished.stderr)
    assert not (tmp_path / "scores.json").exists()


def test_figures_that_are_not_finite_are_named_and_left_out(make_model, clips: Path, tmp_path: Path):
    trunk = {key: x for key, x in LPIPS(trunk="alexnet").state_dict().items() if key.startswith("features.")}
    save_file({key: x * math.nan for key, x in trunk.items()}, tmp_path / "alexnet.safetensors")
    protocol = replace(TINY, metrics=("psnr", "lpips_alexnet"))
    options = MetricOptions(alexnet=str(tmp_path / "alexnet.safetensors"))
    result = evaluate_reconstruction(make_judged(make_model()), clips, protocol, options)
    assert result.missing == {"lpips_alexnet": "3 of 3 clips: gave figures that are not finite."}
    assert "psnr_frame_mean_rgb" in result.totals and not any("lpips" in name for name in result.metrics)


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

"""Subjects are compared on the same clips, and the report says what was measured."""

import csv
import json
import re
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from tiny import make_tiny
from typer.testing import CliRunner

from diffusers_leanvae.cli import app
from diffusers_leanvae.evaluation.comparison import Comparison, Example, compare
from diffusers_leanvae.evaluation.protocols import Protocol
from diffusers_leanvae.evaluation.reconstruction import evaluate_reconstruction
from diffusers_leanvae.evaluation.reconstructors import AutoencoderReconstructor
from diffusers_leanvae.evaluation.records import Evaluation, Metric
from diffusers_leanvae.evaluation.report import (
    error_map,
    find_crop,
    read_report,
    render_page,
    side_by_side,
    write_report,
)
from diffusers_leanvae.loading import load_autoencoder
from diffusers_leanvae.video_io import read_video


PROTOCOL = Protocol("tiny", num_frames=5, resolution=32, metrics=("psnr",))
PSNR = "psnr_frame_mean_rgb"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    for number in range(2):
        make_tiny("leanvae", seed=number, latent_channels=4 + number).save_pretrained(folder / f"model{number}")
    config = {"block_out_channels": [4], "norm_num_groups": 2}
    (folder / "images.json").write_text(json.dumps(config))
    return [str(folder / "model0"), str(folder / "model1"), f"AutoencoderKL:{folder / 'images.json'}"]


def test_each_subject_scores_what_it_scores_alone(models: list[str], clips: Path, tmp_path: Path):
    lines: list[str] = []
    comparison = compare(
        models, clips, PROTOCOL, tmp_path / "kept", codecs=["x264", "av1"], num_examples=2, progress=lines.append
    )
    names = [evaluation.model for evaluation in comparison.evaluations]
    # 4 and 5 channels of 2 x 4 x 4 latents in 5 x 32 x 32 pixels; the model with random weights sets no rate.
    rates = [8 * channels * 2 * 4 * 4 / (5 * 32 * 32) for channels in (4, 5)]
    assert names == [*models, *(f"{codec} at {rate:.3g} bit/px" for rate in rates for codec in ("x264", "av1"))]
    assert [line for line in lines if line.startswith("---")] == [f"--- {name}" for name in names]
    for name, evaluation in zip(models[:2], comparison.evaluations, strict=False):
        alone = evaluate_reconstruction(AutoencoderReconstructor(load_autoencoder(name), name), clips, PROTOCOL)
        assert evaluation.clips == alone.clips and evaluation.totals == alone.totals
    assert [evaluation.about["class"] for evaluation in comparison.evaluations[:3]] == [
        "AutoencoderKLLeanVAE",
        "AutoencoderKLLeanVAE",
        "AutoencoderKL",
    ]
    assert [example.clip for example in comparison.examples] == ["a.mp4", "b.mp4"]
    for example in comparison.examples:
        assert list(example.reconstructions) == names and example.fps == 24
        decoded = example.reconstructions[models[0]].float()
        error = (decoded - example.original.float()).square().mean(dim=(1, 2, 3))
        measured = comparison.evaluations[0].clips[example.clip][PSNR]
        # The pictures are in 8 bits, which moved it by 0.003 dB.
        assert abs((-10 * (error / 255**2).log10()).mean().item() - measured) < 0.02


def test_a_comparison_that_was_ended_gives_the_same(models: list[str], clips: Path, tmp_path: Path):
    whole = compare(models[:2], clips, PROTOCOL, tmp_path / "whole", codecs=["x264"], num_examples=1)

    class Ended(Exception):
        pass

    seen: list[str] = []

    def end(line: str) -> None:
        seen.append(line)
        if len(seen) == 6:  # in the middle of the second model
            raise Ended

    with pytest.raises(Ended):
        compare(models[:2], clips, PROTOCOL, tmp_path / "part", codecs=["x264"], num_examples=1, progress=end)
    again: list[str] = []
    rest = compare(
        models[:2], clips, PROTOCOL, tmp_path / "part", codecs=["x264"], num_examples=1, progress=again.append
    )
    assert len([line for line in again if "PSNR" in line]) == 12 - len([line for line in seen if "PSNR" in line])
    for one, other in zip(whole.evaluations, rest.evaluations, strict=True):
        assert (one.totals, one.clips, one.latents) == (other.totals, other.clips, other.latents)
    assert_equal_examples(whole.examples, rest.examples)


def test_whole_videos_are_cut_to_what_all_give_back(models: list[str], clips: Path, tmp_path: Path):
    protocol = replace(PROTOCOL, num_frames=None)
    comparison = compare(models, clips, protocol, tmp_path / "kept", codecs=["x264"], num_examples=3)
    for example, length in zip(comparison.examples, (9, 13, 13), strict=True):  # of 12, 13 and 14 frames
        assert {len(video) for video in (example.original, *example.reconstructions.values())} == {length}
        assert len(example.reconstructions) == 5
    again = compare(models, clips, protocol, tmp_path / "kept", codecs=["x264"], num_examples=3)
    assert_equal_examples(comparison.examples, again.examples)  # made anew: the results were there
    assert write_report(tmp_path / "report", comparison)


def assert_equal_examples(examples: list[Example], others: list[Example]) -> None:
    assert examples
    for one, other in zip(examples, others, strict=True):
        assert torch.equal(one.original, other.original) and one.reconstructions.keys() == other.reconstructions.keys()
        assert all(torch.equal(video, other.reconstructions[name]) for name, video in one.reconstructions.items())


def test_what_another_comparison_left_is_not_taken(models: list[str], clips: Path, tmp_path: Path):
    compare(models[:2], clips, PROTOCOL, tmp_path / "kept", num_examples=1)
    changed = replace(PROTOCOL, resolution=40)
    found, fresh = (compare(models[:1], clips, changed, tmp_path / name, num_examples=1) for name in ("kept", "fresh"))
    assert found.evaluations[0].clips == fresh.evaluations[0].clips
    assert_equal_examples(found.examples, fresh.examples)


def make_comparison() -> Comparison:
    metrics = {
        "bits_per_pixel": Metric("rate", "Of bits.", "bit/px", None),
        PSNR: Metric("PSNR", "Of <pixels>.", "dB", digits=2),
    }
    evaluations = []
    abouts = [
        {"class": "A", "num_parameters": 10**6},
        {"class": "B"},
        {"class": "C", "weights": "random"},
        {"codec": "x"},
    ]
    for number, about in enumerate(abouts):
        figures = {"bits_per_pixel": 0.1 * (number + 1), PSNR: 20.0 + number}
        evaluations.append(
            Evaluation(
                model=f"folder/subject{number}",
                dataset="set & more",
                protocol={"name": "tiny", "num_frames": 2},
                metrics=metrics,
                totals=figures,
                clips={"a.mp4": figures, "</script>.mp4": {PSNR: 1.23456}},
                about=about,
                failed={"bad.mp4": "It is short."},
                timing={"encode_frames_per_second": 12.0, "decode_frames_per_second": 1234.4},
            )
        )
    generator = torch.Generator().manual_seed(0)
    original = torch.randint(256, (2, 112, 128, 3), generator=generator, dtype=torch.uint8)
    found = {evaluation.model: original // (number + 1) for number, evaluation in enumerate(evaluations)}
    return Comparison(evaluations, [Example("</script>.mp4", Fraction(8), original, found)])


def test_the_files_of_a_report(tmp_path: Path):
    comparison = make_comparison()
    written = write_report(tmp_path / "report", comparison)
    assert [path.name for path in written] == ["report.html", "report.json", "report.csv", "side_by_side.mp4"]
    assert read_report(written[1]) == [evaluation.rounded() for evaluation in comparison.evaluations]
    assert "provenance" in json.loads(written[1].read_text())
    rows = list(csv.DictReader(written[2].open()))
    assert len(rows) == 12 and list(rows[0]) == ["model", "clip", "bits_per_pixel", PSNR]
    assert rows[3] == {"model": "folder/subject1", "clip": "", "bits_per_pixel": "0.2", PSNR: "21.0"}
    assert rows[5] == {"model": "folder/subject1", "clip": "</script>.mp4", "bits_per_pixel": "", PSNR: "1.2346"}
    # Five pictures of 128x112 with a name above, in a grid of three columns.
    assert read_video(written[3])[0].shape == (2, 2 * (112 + 18), 3 * 128, 3)


def test_the_page_is_one_file_and_shows_all(tmp_path: Path):
    comparison = make_comparison()
    page = render_page(comparison)
    # Nothing is loaded from anywhere, and no text of a user's becomes a tag.
    assert not re.findall(
        r"""(?:src|href)=["'](?!data:)|url\(|@import|fetch\(|https?://(?!www\.w3\.org/2000/svg)""", page
    )
    assert page.count("<script>") == page.count("</script>") == 1
    assert "set &amp; more" in page and "Of &lt;pixels&gt;." in page and "It is short." in page
    assert page.count("data:video/mp4;base64,") == 1
    # The middle frame whole, once for each of five (in the script), and crops: one of the original, two of the others.
    assert page.count("data:image/png;base64,") == 5 + 1 + 2 * 4
    body = page.split("<tbody>")[1].split("</tbody>")[0]
    cells = [re.sub(r"<[^>]+>", "", cell).split() for cell in re.findall(r"<td.*?</td>", body)]
    assert cells[:8] == [
        ["folder/subject0", "A"],
        ["1.0"],
        [],
        ["0.1000"],
        ["20.00"],
        ["12"],
        ["1234"],
        ["folder/subject1", "B"],
    ]
    # Bold is the best of the two trained ones, not of the codec or of random weights, and no rate is.
    assert re.findall(r'class="best">([^<]+)', body) == ["21.00"]
    points = json.loads(re.search(r"const points = (\[.*?\]), quality", page)[1])  # type: ignore[index]
    assert [point["kind"] for point in points] == ["trained", "trained", "random", "codec"]
    assert [point["label"] for point in points] == [f"subject{number}" for number in range(4)]
    assert points[1]["rate"] == 0.2 and points[1]["seconds"] == pytest.approx(1 / 12 + 1 / 1234.4, rel=1e-12)
    assert render_page(comparison._replace(examples=[])).count("data:") == 0


def test_error_maps_and_crops():
    original = torch.full((64, 128, 3), 100, dtype=torch.uint8)
    decoded = original.clone()
    decoded[:, 64:] += 64  # a quarter of the range
    shown = error_map(decoded, original)
    assert (
        shown.dtype == torch.uint8 and shown[0, 0].tolist() == [0, 0, 4] and shown[0, 100].tolist() == [252, 255, 164]
    )
    decoded = original.clone()
    decoded[40:, 100:] += 32
    far = torch.zeros_like(original)
    example = Example("a", Fraction(8), original[None], {"x": decoded[None], "y": decoded[None], "z": far[None]})
    assert find_crop(example, size=32) == (0, 32, 96)
    assert side_by_side(example).shape == (1, 2 * 82, 256, 3)
    assert torch.equal(side_by_side(example)[0, 18:82, :128], original)


def test_the_command_compares(models: list[str], clips: Path, tmp_path: Path):
    (tmp_path / "report" / ".progress").mkdir(parents=True)
    (tmp_path / "report" / ".progress" / "clips-3.jsonl").write_text("of a run with more processes\n")
    options = ["--num-frames", "5", "--size", "32", "--metric", "psnr", "--report", str(tmp_path / "report")]
    run = CliRunner().invoke(app, ["eval", str(clips), "--compare", *models[:2], "--codec", "x264", *options])
    assert run.exit_code == 0, run.output
    evaluations = read_report(tmp_path / "report" / "report.json")
    assert [evaluation.model for evaluation in evaluations[:2]] == models[:2] and len(evaluations) == 4
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.html",
        "report.json",
        "report.csv",
        "side_by_side.mp4",
    }
    table = run.stdout.split("\n\n")[1].splitlines()
    assert table[0].split()[:2] == ["PSNR", "rate"] and len(table) >= 5
    assert table[1].split()[1] == f"{evaluations[0].totals[PSNR]:.2f}"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["one", "two"], "Only one FOLDER must be given without `--compare`"),
        (["folder", "--model", "nope"], "`--model` 'nope' cannot be loaded: "),
        (["--generated", "a"], "both `--generated` and `--real`, must be given"),
        (["folder", "--generated", "a", "--real", "b"], "Either FOLDER, or both"),
        ([], "Either FOLDER, or both"),
        (["folder", "--compare", "a", "--output", "x.json"], "must not be given with a comparison"),
        (["folder", "--compare", "compact-4ch", "compact-4ch"], "`--compare` must be names that differ"),
        (["folder", "--codec", "mpeg2"], "`--codec` must be one of 'x264'"),
        (["--generated", "a", "--real", "b", "--chunk", "5"], "must not be given with `--generated`"),
        (["--generated", "a", "--real", "b", "--codec", "x264"], "must not be given with `--generated`"),
    ],
)
def test_the_command_refuses(arguments: list[str], message: str):
    run = CliRunner().invoke(app, ["eval", *arguments])
    assert run.exit_code == 1 and message in run.stderr


@pytest.mark.parametrize(
    "models, options, message",
    [
        (["nope"], [], "`--compare` 'nope' cannot be loaded: .* got 'nope', which does not exist"),
        (["AutoencoderKL:nope.json"], [], "`--compare` 'AutoencoderKL:nope.json' cannot be loaded: "),
        ([], ["--codec", "x265", "--size", "8"], "`--codec` 'x265' does not take these clips: .* got 8 by 8"),
        (["compact-16ch"], ["--num-frames", "8"], "`--compare` 'compact-16ch' does not take these .* got 8"),
        ([], ["--size", "36"], "`--compare` 'compact-4ch' does not take these clips: `height` and `width` must be"),
    ],
)
def test_every_subject_is_looked_at_before_the_first_is_measured(
    clips: Path, tmp_path: Path, models: list[str], options: list[str], message: str
):
    sizes = ["--num-frames", "5", "--size", "32", "--report", str(tmp_path / "folder" / "report")]
    run = CliRunner().invoke(app, ["eval", str(clips), "--compare", "compact-4ch", *models, *sizes, *options])
    assert run.exit_code == 1 and run.stdout == "" and re.match(f"error: {message}", run.stderr), run.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_folders(clips: Path, tmp_path: Path):
    """A distance from features that are known: a model of transformers, tiny and random."""
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    VideoMAEModel(config).save_pretrained(tmp_path / "mae")
    (tmp_path / "protocol.yaml").write_text(
        "num_frames: 4\nnum_feature_frames: 4\nresolution: 32\nmetrics: [rfvd_features]\n"
    )
    other = tmp_path / "other"
    shutil.copytree(clips / "nested", other / "nested")
    shutil.copy(clips / "b.mp4", other / "b.mp4")
    (other / "bad.mp4").write_bytes(b"not a video")
    options = ["--protocol", str(tmp_path / "protocol.yaml"), "--feature-model", str(tmp_path / "mae")]
    values = []
    for generated in (clips, other):
        target = tmp_path / "fvd.json"
        sides = ["--generated", str(generated), "--real", str(clips), "--output", str(target)]
        run = CliRunner().invoke(app, ["eval", *sides, *options])
        assert run.exit_code == 0, run.output
        written = json.loads(target.read_text())
        values.append(written["fvd_mae_mean_of_tokens"])
    assert values[0] == 0 and values[1] > 1e-6
    assert (written["num_generated"], written["num_real"], list(written["failed"])) == (2, 3, ["generated: bad.mp4"])
    run = CliRunner().invoke(app, ["eval", "--generated", str(clips), "--real", str(clips)])
    assert run.exit_code == 1 and "FVD has no I3D: `--i3d` must be the torchscript file" in run.stderr

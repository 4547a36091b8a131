"""Protocols by name and from files, the clips that they take, and the command."""

import json
import re
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffusers_leanvae.cli import app
from diffusers_leanvae.data import read_center_clip
from diffusers_leanvae.evaluation.clips import list_clips, read_clip, read_pieces
from diffusers_leanvae.evaluation.protocols import PROTOCOLS, Protocol, first_frames, get_protocol
from diffusers_leanvae.evaluation.records import read_evaluation
from diffusers_leanvae.video_io import VideoError, VideoReader, read_video


def test_names_fix_every_choice(tmp_path: Path):
    val, davis = get_protocol("val-17x256"), get_protocol("davis-17x256")
    assert (val.num_frames, val.resolution, val.layout, davis.layout) == (17, 256, "videos", "frames")
    assert get_protocol("ucf101-17x256").metrics == davis.metrics and "rfvd_i3d" in davis.metrics
    fvd = get_protocol("fvd2048_16f")
    assert (fvd.num_frames, fvd.stride, fvd.start, fvd.min_frames, fvd.max_clips) == (16, 3, "random", 48, 2048)
    assert (fvd.resampling, fvd.jpeg_quality, fvd.span) == ("lanczos", 75, 48)
    generated = first_frames(fvd)
    assert (generated.num_frames, generated.stride, generated.start, generated.span) == (16, 1, "first", 16)
    (tmp_path / "mine.yaml").write_text("num_frames: 9\nmetrics: [psnr, warp]\n")
    assert get_protocol(tmp_path / "mine.yaml") == Protocol("mine", 9, metrics=("psnr", "warp"))
    for protocol in PROTOCOLS.values():
        assert Protocol(**protocol.to_json()) == protocol
    with pytest.raises(ValueError, match="`protocol` must be one of val-17x256, .*, or a .yaml file, got 'davis'"):
        get_protocol("davis")


@pytest.mark.parametrize(
    "text, message",
    [
        ("num_frame: 9", "got 'num_frame' .did you mean 'num_frames'"),
        ("resolution: big", "`resolution` must be a whole number of at least 8, got 'big'"),
        ("stride: 0", "`stride` must be a whole number of at least 1, got 0"),
        ("jpeg_quality: 101", "`jpeg_quality` must be a whole number from 1 to 100, got 101"),
        ("layout: folders", "`layout` must be one of 'videos', 'frames'"),
        ("metrics: psnr", "`metrics` must be a list"),
        ("metrics: [psnr, fid]", "`metrics` must be one of .* got 'fid'"),
        ("num_frames: null\nstride: 2", "`num_frames` must be a number where"),
        ("- 1", "must be a YAML file of keys and values"),
        ("a: [", "must be a readable YAML file"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        get_protocol(tmp_path / "mine.yaml")


# --- Clips -----------------------------------------------------------------------------------------------------------


def test_the_first_frames_are_those_of_every_published_figure(clips: Path):
    with VideoReader(clips / "a.mp4") as video:
        assert torch.equal(read_clip(video, Protocol("a", 5, 32), "a.mp4"), read_center_clip(clips / "a.mp4", 5, 32))
        whole = read_clip(video, Protocol("a", None, 32), "a.mp4")
        assert torch.equal(whole, read_center_clip(clips / "a.mp4", 12, 32))
        pieces = list(read_pieces(video, Protocol("a", None, 32), 5, 4))
        assert [piece.shape[1] for piece in pieces] == [5, 4]
        assert torch.equal(torch.cat(pieces, dim=1), whole[:, :9])
        pieces = list(read_pieces(video, Protocol("a", 9, 32), 13, 4))
        assert torch.equal(torch.cat(pieces, dim=1), whole[:, :9])
        for protocol in (Protocol("a", 13, 32), Protocol("a", 5, 32, min_frames=13)):
            with pytest.raises(VideoError, match="at least 13 frames, got 12"):
                read_clip(video, protocol, "a.mp4")
            with pytest.raises(VideoError, match="at least 13 frames, got 12"):
                list(read_pieces(video, protocol, 5, 4))


def test_random_starts_stride_lanczos_and_jpeg(clips: Path):
    frames, _ = read_video(clips / "a.mp4")  # (12, 48, 64, 3)
    protocol = Protocol("a", 4, 24, start="random", stride=3, resampling="lanczos", jpeg_quality=75)
    squares = [Image.fromarray(x).resize((24, 24), Image.Resampling.LANCZOS) for x in frames[:, :, 8:56].numpy()]
    starts = set()
    with VideoReader(clips / "a.mp4") as video:
        for name in ("a.mp4", "b", "c", "d", "e", "f"):
            clip = read_clip(video, protocol, name)
            assert torch.equal(clip, read_clip(video, protocol, name))
            for start in range(3):
                files = []
                for square in squares[start::3][:4]:
                    files.append(BytesIO())
                    square.save(files[-1], format="JPEG", quality=75)
                expected = np.stack([np.asarray(Image.open(file)) for file in files])
                if np.abs(((clip + 1) * 127.5).permute(1, 2, 3, 0).numpy() - expected).max() < 4e-5:
                    starts.add(start)
        assert starts == {0, 1, 2}
        plain = read_clip(video, replace(protocol, jpeg_quality=None, start="first"), "a.mp4")
        expected = np.stack([np.asarray(square) for square in squares[::3]])
        np.testing.assert_allclose(((plain + 1) * 127.5).permute(1, 2, 3, 0).numpy(), expected, rtol=0, atol=4e-5)


def test_folders_of_pictures_are_clips(clips: Path, tmp_path: Path):
    frames, _ = read_video(clips / "a.mp4")
    for folder in ("JPEGImages/480p/bear", "JPEGImages/480p/camel"):
        (tmp_path / folder).mkdir(parents=True)
        for number, frame in enumerate(frames.numpy()):
            Image.fromarray(frame).save(tmp_path / folder / f"{number}.png")
    found = list(list_clips(tmp_path, Protocol("a", 5, 32, layout="frames")))
    assert [clip.name for clip in found] == ["JPEGImages/480p/bear", "JPEGImages/480p/camel"]
    with found[0].open() as video:
        clip = read_clip(video, Protocol("a", 12, 32), found[0].name)
    assert torch.equal(clip, read_center_clip(clips / "a.mp4", 12, 32))  # 10.png comes after 9.png
    with pytest.raises(ValueError, match="`folder` must hold folders of pictures"):
        list(list_clips(clips, Protocol("a", layout="frames")))
    assert [clip.name for clip in list_clips(clips, Protocol("a", max_clips=2))] == ["a.mp4", "b.mp4"]


def test_data_sets_of_the_hub_are_clips(clips: Path, tmp_path: Path):
    pytest.importorskip("datasets", reason="needs datasets")
    shutil.copy(clips / "a.mp4", tmp_path / "a.mp4")
    shutil.copy(clips / "b.mp4", tmp_path / "b.mp4")
    found = list(list_clips(f"hub:{tmp_path}", Protocol("a", 5, 32)))
    assert [clip.name for clip in found] == ["000000", "000001"]
    for clip, name in zip(found, ("a.mp4", "b.mp4"), strict=True):
        with clip.open() as video:
            assert torch.equal(
                read_clip(video, Protocol("a", 5, 32), clip.name), read_center_clip(clips / name, 5, 32)
            )


# --- The command -----------------------------------------------------------------------------------------------------


def test_the_command_takes_a_protocol_and_names_what_is_missing(clips: Path, tmp_path: Path):
    torch.jit.script(Means()).save(str(tmp_path / "i3d.pt"))
    (tmp_path / "mine.yaml").write_text(
        "num_frames: 5\nresolution: 32\nnum_feature_frames: 5\nmetrics: [psnr, rfvd_i3d, lpips_alexnet]"
    )
    output = tmp_path / "scores.json"
    options = ["--protocol", str(tmp_path / "mine.yaml"), "--i3d", str(tmp_path / "i3d.pt"), "--output", str(output)]
    finished = CliRunner().invoke(app, ["eval", str(clips), *options])
    assert finished.exit_code == 0, finished.output
    assert "left out: lpips_alexnet: LPIPS has no weights: `alexnet` must be a file" in finished.stderr
    evaluation = read_evaluation(output)
    assert list(evaluation.metrics) == ["psnr_frame_mean_rgb", "bits_per_pixel", "rfvd_i3d_styleganv"]
    assert evaluation.totals["rfvd_i3d_styleganv"] > 0 and evaluation.protocol["name"] == "mine"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # the journal is gone
    written = json.loads(output.read_text())
    assert written["model"] == "compact-16ch" and len(written["weights_sha256"]) == 64
    finished = CliRunner().invoke(app, ["eval", str(clips), *options, "--chunk", "5", "--size", "40"])
    assert finished.exit_code == 0, finished.output
    changed = read_evaluation(output)
    assert changed.protocol["name"] == "mine at 5x40" and changed.about["chunk"] == 5


class Means(torch.nn.Module):
    """Takes what StyleGAN-V's I3D takes."""

    def forward(self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        return x.mean(dim=[2, 3, 4])


@pytest.mark.parametrize(
    "options, message, is_written",
    [
        (["--metric", "rfvd_i3d"], "one that can be computed, got rfvd_i3d: FVD has no I3D: `--i3d` must be", False),
        (["--metric", "xpsnr", "--metric", "ms_ssim"], "one that suits the clips, got xpsnr, ms_ssim.", True),
    ],
)
def test_the_command_fails_if_nothing_is_scored(
    clips: Path, tmp_path: Path, options: list[str], message: str, is_written: bool
):
    size = ["--num-frames", "5", "--size", "32", "--output", str(tmp_path / "scores.json")]
    finished = CliRunner().invoke(app, ["eval", str(clips), *size, *options])
    assert finished.exit_code == 1 and f"error: `metrics` must have {message}" in finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"] * is_written
    if is_written:  # what there is: the rate and the latents
        assert "left out: xpsnr: 3 of 3 clips: needs frames of at least 2025 pixels, got 32x32." in finished.stderr
        assert list(read_evaluation(tmp_path / "scores.json").totals) == ["bits_per_pixel"]


def test_outputs_are_looked_at_before_anything_is_measured(tmp_path: Path):
    """The data does not exist, which would be an error of its own: it is not looked for."""
    (tmp_path / "file").touch()
    for option, name, message in (
        ("--output", ".", "`--output` must be a file, got"),
        ("--output", "file/scores.json", "`--output` must lead to a folder to write to, got .*file' is a file"),
        ("--report", "file", "`--report` must lead to a folder to write to, got .*file' is a file"),
        ("--report", "file/report", "`--report` must lead to a folder to write to, got .*file' is a file"),
    ):
        finished = CliRunner().invoke(app, ["eval", "nowhere", option, str(tmp_path / name)])
        assert finished.exit_code == 1 and re.match(f"error: {message}", finished.stderr), finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_that_fails_at_once_leaves_nothing(clips: Path, tmp_path: Path):
    options = ["--num-frames", "8", "--size", "32", "--output", str(tmp_path / "scores.json")]
    finished = CliRunner().invoke(app, ["eval", str(clips), *options])
    assert finished.exit_code == 1 and "`--num-frames` must be 4 * n + 1" in finished.stderr
    assert list(tmp_path.iterdir()) == []

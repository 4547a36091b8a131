"""Files of the kinds that people have reported to other tools, where they are at hand: what becomes of each."""

import warnings
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from clips import Footage, from_codes
from tiny import make_tiny
from typer.testing import CliRunner

from diffusers_leanvae.cli import app
from diffusers_leanvae.data import open_training_data
from diffusers_leanvae.video_io import VideoReader, read_video, write_video


INPUTS = Path(__file__).resolve().parents[3] / "shared" / "inputs"
pytestmark = pytest.mark.skipif(not INPUTS.is_dir(), reason="the shared inputs are not beside this checkout")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_tiny("leanvae").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def reconstruct(model: str, tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """`reconstruct(source, name, *options)` gives what was written and what was said on the way."""

    def run(source: str, name: str, *options: object) -> tuple[Path, str]:
        arguments = ["reconstruct", INPUTS / source, tmp_path / name, "--model", model, *options]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.stderr
        return tmp_path / name, result.stderr

    return run


def times_of(path: Path) -> list[Fraction]:
    with VideoReader(path) as video:
        return [time for chunk in video.timed_frames() for time in chunk.times]


def check_times(target: Path, source: Path) -> None:
    times, expected = (np.array(times_of(path), float) for path in (target, source))
    np.testing.assert_allclose(times, expected, rtol=0, atol=0.001)


def sound_of(path: Path, track: int = 0) -> np.ndarray:
    """A sound track as one channel, from the first picture on, 1000 samples per second."""
    with av.open(str(path)) as container:
        origin = next(iter(container.decode(video=0))).time
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=48000)
        frames = [new for frame in container.decode(audio=track) for new in resampler.resample(frame)]
    start = round((float(frames[0].time or 0) - float(origin or 0)) * 48000)
    wave = np.abs(np.concatenate([frame.to_ndarray()[0] for frame in frames]))
    wave = np.concatenate([np.zeros(max(start, 0)), wave[max(-start, 0) :]])
    return wave[: len(wave) // 48 * 48].reshape(-1, 48).mean(1)


def extent_of(path: Path, track: int = 0) -> tuple[float, float]:
    """When a tone begins and ends, in seconds from the first picture on."""
    wave = sound_of(path, track)
    loud = np.flatnonzero(wave > wave.max() / 2)
    return loud[0] / 1000, loud[-1] / 1000


def check_sound(target: Path, source: Path) -> None:
    """The tone begins where it did, and ends where it did up to what is padding of a packet."""
    (start, end), (expected_start, expected_end) = extent_of(target), extent_of(source)
    assert start == pytest.approx(expected_start, abs=0.02) and end == pytest.approx(expected_end, abs=0.03)


def reference(path: Path, matrix: str) -> np.ndarray:
    """The first frame as floats, by the matrix that is named: each chroma sample counts for four pixels."""
    with av.open(str(path)) as container:
        frame = next(iter(container.decode(video=0)))
    planes = [
        np.frombuffer(bytes(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
        for plane in frame.planes
    ]
    luma, *chroma = planes
    codes = np.stack([luma, *(plane.repeat(2, 0).repeat(2, 1) for plane in chroma)], -1).astype(np.float64)
    return from_codes(codes, Footage("", "", frame.format.name, matrix=matrix), 8)


def streams_of(path: Path) -> Counter[str]:
    with av.open(str(path)) as container:
        return Counter(stream.type for stream in container.streams)


def test_pixels_that_are_not_square_stay_so_or_become_square(reconstruct):
    with VideoReader(INPUTS / "sar.mp4") as video:
        assert video.info.pixel_aspect_ratio == Fraction(16, 11) and (video.info.width, video.info.height) == (72, 58)
    target, _ = reconstruct("sar.mp4", "out.mp4")
    info = read_video(target)[1]
    assert info.pixel_aspect_ratio == Fraction(16, 11) and (info.width, info.height) == (72, 58)
    target, _ = reconstruct("sar.mp4", "square.mp4", "--square-pixels")
    info = read_video(target)[1]
    assert info.pixel_aspect_ratio == 1 and info.width / info.height == pytest.approx(72 * 16 / 11 / 58, rel=0.03)


def test_a_variable_rate_keeps_its_times_and_sound_its_place(reconstruct):
    source = INPUTS / "vfr.mp4"
    with VideoReader(source) as video:
        assert video.info.is_variable_rate
    target, _ = reconstruct("vfr.mp4", "out.mp4")
    check_times(target, source)
    check_sound(target, source)
    target, _ = reconstruct("vfr.mp4", "constant.mp4", "--fps", 25)
    times = times_of(target)
    assert set(np.diff(times)) == {Fraction(1, 25)} and float(times[-1]) == pytest.approx(4, abs=0.1)
    check_sound(target, source)


def test_high_dynamic_range_is_tone_mapped_and_said_to_be_what_it_is(reconstruct):
    with VideoReader(INPUTS / "hdr.mp4") as video:
        assert (video.info.transfer, video.info.primaries) == ("smpte2084", "bt2020")
        frames = video.read()
    with av.open(str(INPUTS / "hdr.mp4")) as container:
        relabelled = next(iter(container.decode(video=0))).to_ndarray(format="rgb24")
    assert np.abs(frames[0].numpy().astype(float) - relabelled).mean() > 3
    target, _ = reconstruct("hdr.mp4", "out.mp4")
    info = read_video(target)[1]
    assert (info.transfer, info.primaries, info.matrix) == ("bt709", "bt709", "bt709")


@pytest.mark.parametrize("is_tagged", [True, False])
def test_high_definition_is_read_by_its_own_matrix(tmp_path, is_tagged):
    source = INPUTS / "hd_tagged.mp4"
    if not is_tagged:  # the same pixels, in a file that says nothing
        with av.open(str(source)) as container, av.open(str(tmp_path / "untagged.mkv"), "w") as output:
            stream: Any = output.add_stream("ffv1", rate=10)
            stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
            for frame in container.decode(video=0):
                frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc = 2, 0, 2, 2
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        source = tmp_path / "untagged.mkv"
    frames, info = read_video(source)
    assert info.matrix == "bt709"
    expected = reference(source, "bt709")
    assert np.abs(expected - reference(source, "bt601")).max() > 10  # the other one would show
    np.testing.assert_allclose(frames[0].numpy(), expected, rtol=0, atol=1)


def test_a_grey_ramp_is_exact_and_stays_so(tmp_path):
    frames, _ = read_video(INPUTS / "ramp.mp4")
    expected = reference(INPUTS / "ramp.mp4", "bt709")
    np.testing.assert_allclose(frames[0].numpy(), expected, rtol=0, atol=1)
    assert abs((frames[0].numpy() - expected).mean()) < 0.1
    first = frames
    for number in range(10):
        path = tmp_path / f"{number}.mp4"
        write_video(path, frames, 10, codec="libx264", crf=0, preset="ultrafast")
        frames, _ = read_video(path)
    assert abs((frames.double() - first.double()).mean()) < 0.1
    assert (frames.int() - first.int()).abs().max() <= 2


def test_a_gap_in_the_stamps_stays_a_gap(reconstruct):
    times = times_of(INPUTS / "gap.mp4")
    assert len(times) == 20 and float(max(np.diff(times))) == pytest.approx(3.1, abs=0.001)
    target, _ = reconstruct("gap.mp4", "out.mp4")
    check_times(target, INPUTS / "gap.mp4")
    check_sound(target, INPUTS / "gap.mp4")


@pytest.mark.parametrize("extension", [".mp4", ".mkv"])
def test_tracks_subtitles_chapters_and_metadata_come_along(reconstruct, extension):
    target, said = reconstruct("multi.mp4", f"out{extension}")
    found = streams_of(target)
    assert (found["video"], found["audio"], found["subtitle"]) == (1, 2, 1)
    with av.open(str(target)) as container:
        languages = [stream.metadata.get("language") for stream in container.streams.audio]
        assert languages == ["eng", "deu"]
        assert container.metadata.get("title", container.metadata.get("TITLE")) == "My holiday"
        chapters: Any = container.chapters()
        assert [chapter["metadata"]["title"] for chapter in chapters] == ["One", "Two"]
    assert said.count("\n") <= 1


def test_what_a_container_cannot_hold_is_said_in_one_line(reconstruct):
    target, said = reconstruct("multi.mp4", "out.gif")
    assert streams_of(target) == {"video": 1}
    assert said.count("warning: ") == said.count("\n") == 1 and "left out: 2 sound tracks" in said


def test_sound_of_an_avi_goes_into_mp4(reconstruct):
    target, _ = reconstruct("pcm_audio.avi", "out.mp4")
    assert streams_of(target) == {"video": 1, "audio": 1}
    check_sound(target, INPUTS / "pcm_audio.avi")


@pytest.mark.parametrize("name", ["exif6.jpg", "exif6.tif"])
def test_pictures_are_upright(reconstruct, name, tmp_path):
    from PIL import Image, ImageOps

    frames, info = read_video(INPUTS / name)
    stored = Image.open(INPUTS / name)
    upright = np.asarray(ImageOps.exif_transpose(stored).convert("RGB")).astype(int)
    assert info.rotation == 90 and (info.height, info.width) == upright.shape[:2] == (96, 64)
    assert np.abs(frames[0].numpy() - upright).max() <= 2  # decoders of JPEG may differ
    target, _ = reconstruct(name, "out.png")
    assert read_video(target)[0].shape == (1, 96, 64, 3)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / name).write_bytes((INPUTS / name).read_bytes())
    data: Any = open_training_data(str(tmp_path / "train"), batch_size=1, clip_sizes=[[1, 96, 64]])
    assert data.num_skipped == 0 and data[0].pixels.shape == (3, 1, 96, 64)


def test_an_animation_is_a_video(reconstruct):
    from PIL import Image

    frames, info = read_video(INPUTS / "anim.webp")
    delays = []
    with Image.open(INPUTS / "anim.webp") as image:
        for number in range(image.n_frames):  # pyright: ignore[reportAttributeAccessIssue]
            image.seek(number)
            image.load()
            delays.append(image.info["duration"])
    assert len(frames) == len(delays) == 9 and info.is_image
    times = times_of(INPUTS / "anim.webp")
    assert [round(1000 * time) for time in np.diff(times)] == delays[:-1]
    target, _ = reconstruct("anim.webp", "out.webp")
    assert len(read_video(target)[0]) == 9


def test_sixteen_bits_become_eight(reconstruct):
    from PIL import Image

    frames, info = read_video(INPUTS / "gray16.png")
    expected = np.asarray(Image.open(INPUTS / "gray16.png")).astype(float) / 257
    assert info.is_image and expected.std() > 1
    np.testing.assert_allclose(frames[0].numpy(), np.stack([expected] * 3, -1), rtol=0, atol=1)
    reconstruct("gray16.png", "out.png")


@pytest.mark.parametrize("name", ["image_sequence/f_%04d.png", "image_sequence"])
def test_pictures_of_a_film_are_a_film(reconstruct, name, model, tmp_path):
    if "%" not in name:  # on the command line a folder is its files, one by one
        frames, info = read_video(INPUTS / name)
        assert len(frames) == 10 and info.fps == 25
        return
    frames, _ = read_video(INPUTS / name)
    files = sorted((INPUTS / "image_sequence").iterdir())
    assert torch.equal(frames, torch.cat([read_video(file)[0] for file in files]))
    target, _ = reconstruct(name, "out.mp4")
    assert len(read_video(target)[0]) == 10
    target, _ = reconstruct(name, "frame_%03d.png")
    assert sorted(path.name for path in tmp_path.glob("frame_*")) == [f"frame_{n:03d}.png" for n in range(1, 11)]


def test_dots_in_names_of_members_are_reported(tmp_path):
    """webdataset ends the key at the first dot, so that three films of the shard have one key."""
    with pytest.raises(ValueError, match=r"one video for each key, .* got '2024-05-01 12' with .* in '.*dots\.tar'"):
        open_training_data(str(INPUTS / "dots.tar"), batch_size=1, clip_sizes=[[1, 16, 16]])


def test_resource_forks_are_no_films():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data: Any = open_training_data(str(INPUTS / "resource_forks.tar"), batch_size=1, clip_sizes=[[1, 16, 16]])
    assert len(data) == 1 and data.num_skipped == 0

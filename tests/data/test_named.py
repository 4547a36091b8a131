"""Data sets by name: what counts as a video and a class, and which frames and pixels a clip takes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patterns import drifting_pattern

from diffusers_leanvae.data.metadata import number_labels
from diffusers_leanvae.data.named import NamedDataset, open_named_dataset
from diffusers_leanvae.video_io import read_video, write_video


def numbered(num_frames: int, height: int = 16, width: int = 16) -> torch.Tensor:
    """Frame `i` is grey `2 * i`, so that the pixels of a clip tell which frames it took."""
    return (2 * torch.arange(num_frames, dtype=torch.uint8))[:, None, None, None].expand(-1, height, width, 3)


def places(pixels: torch.Tensor) -> list[int]:
    values = pixels.float().mean((0, 2, 3))
    values = values if pixels.dtype == torch.uint8 else (values + 1) * 127.5
    return (values / 2).round().int().tolist()


def write(path: Path, frames: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, frames, fps=24, codec="ffv1")


def write_frames(folder: Path, frames: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        write_video(folder / f"a2b_{number}.png", frame[None], fps=1)


@pytest.fixture(scope="module")
def ucf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ucf")
    for name, num_frames in (("Swing/v_1", 70), ("Archery/v_2", 20), ("Swing/v_3", 30), ("Archery/g1/v_4", 12)):
        write(folder / f"{name}.mkv", numbered(num_frames))
    return folder


@pytest.fixture(scope="module")
def sky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sky")
    for name, num_frames in (("x/x_1", 16), ("x/x_2", 22), ("y/y_1", 15), ("z/z_1", 13)):
        write_frames(folder / name, numbered(num_frames))
    return folder


def starts(data: NamedDataset, video: int) -> set[int]:
    return {places(data.clip(video * data.num_draws + draw).pixels)[0] for draw in range(data.num_draws)}


def test_ucf101_spreads_frames_over_a_window_as_the_reference_does(ucf: Path):
    data = open_named_dataset("ucf101", ucf, 5, 16, "reference", num_draws=60)
    assert data.class_names == ("Archery", "Swing")
    assert [video.name for video in data.videos] == [
        "Archery/g1/v_4.mkv",
        "Archery/v_2.mkv",
        "Swing/v_1.mkv",
        "Swing/v_3.mkv",
    ]
    assert [data.metadata(video * 60)["class_label"] for video in range(4)] == [0, 0, 1, 1]
    assert data.metadata(180) == {
        "file_name": "Swing/v_3.mkv",
        "class_label": 1,
        "class_name": "Swing",
        "captions": (),
    }
    # A window of 15: 0, 3.5, 7, 10.5, 14 behind the start. 20 frames: starts up to 20 - 15 - 1, the last never.
    assert places(data.clip(60).pixels) in [[s, s + 3, s + 7, s + 10, s + 14] for s in range(5)]
    assert starts(data, 1) == {0, 1, 2, 3, 4}
    assert starts(data, 0) == {0} and places(data.clip(0).pixels) == [0, 2, 5, 8, 11]  # shorter: taken densely
    # The published setting: 17 frames of a window of 51.
    full = open_named_dataset("ucf101", ucf, 17, 16, "reference").clip(2)
    expected = np.trunc(np.arange(17) * 3.125)
    assert (np.array(places(full.pixels)) - places(full.pixels)[0]).tolist() == expected.tolist()
    assert places(full.pixels)[0] <= 70 - 51 - 1


def test_exact_sampling_has_one_stride_and_all_starts(ucf: Path):
    data = open_named_dataset("ucf101", ucf, 5, 16, num_draws=60)
    assert starts(data, 1) == set(range(8))  # the last one too
    for draw in range(5):
        taken = places(data.clip(60 + draw).pixels)
        assert np.diff(taken).tolist() == [3] * 4
    with pytest.warns(UserWarning, match="must have more frames for a clip, got 12"):
        assert data[0].class_label == 0 and data[0].pixels.shape == (3, 5, 16, 16)  # the next video, of one class
    single = open_named_dataset("ucf101", ucf, 1, 16, sample_stride=5)
    assert single[3].pixels.shape == (3, 1, 16, 16) and single[3].pixels.dtype == torch.uint8


def test_folders_of_frames_are_sorted_by_number_and_sampled_by_stride(sky: Path):
    data = open_named_dataset("skytimelapse", sky, 5, 16, "reference", num_draws=60)
    assert [video.name for video in data.videos] == ["x/x_1", "x/x_2"]  # more than 15 frames
    assert data.class_names is None and data.clip(0).class_label is None
    assert starts(data, 0) == {0} and starts(data, 1) == set(range(7))
    assert places(data.clip(0).pixels) == [0, 3, 6, 9, 12]  # 10 comes behind 9, not behind 1
    assert starts(open_named_dataset("skytimelapse", sky, 5, 16, num_draws=60), 0) == {0, 1, 2, 3}
    taichi = open_named_dataset("taichi", sky, 5, 16, "reference", num_draws=60)
    assert [video.name for video in taichi.videos] == ["x/x_1", "x/x_2", "y/y_1", "z/z_1"]  # all that reach frame 12
    assert starts(taichi, 1) == set(range(7))
    with pytest.raises(ValueError, match="`size` must be that of the frames, 16 x 16 in .*, got 8"):
        open_named_dataset("taichi", sky, 5, 8, "reference")[0]
    assert open_named_dataset("taichi", sky, 5, 8)[0].pixels.shape == (3, 5, 8, 8)


def test_spatial_rules_of_the_reference(tmp_path: Path):
    frames = drifting_pattern(20, 48, 70, seed=1)
    write(tmp_path / "ffs" / "a.mkv", frames)
    write_frames(tmp_path / "sky" / "a", frames)
    images = frames[[0, 3, 7, 10, 14]].permute(0, 3, 1, 2).float()
    ffs = open_named_dataset("ffs", tmp_path / "ffs", 5, 32, "reference", flip=False, num_draws=50)
    clip = next(c for c in map(ffs.clip, range(50)) if _starts_at(c.pixels, frames, 0))
    scaled = F.interpolate(images, scale_factor=32 / 48, mode="bilinear", align_corners=False)
    assert scaled.shape[2:] == (32, 46)
    expected = (scaled[..., 7:39] / 127.5 - 1).permute(1, 0, 2, 3)
    torch.testing.assert_close(clip.pixels, expected, rtol=0, atol=1e-6)

    sky = open_named_dataset("skytimelapse", tmp_path / "sky", 5, 32, "reference", num_draws=50)
    clip = next(c for c in map(sky.clip, range(50)) if _starts_at(c.pixels, frames, 0))
    images = frames[[0, 3, 6, 9, 12]].permute(0, 3, 1, 2).float()[..., 11:59]
    expected = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False).permute(1, 0, 2, 3)
    torch.testing.assert_close(clip.pixels, expected / 127.5 - 1, rtol=0, atol=1e-6)
    # 49 * (32 / 49) is a little less than 32 in floating point: the clip still has its size.
    write(tmp_path / "odd" / "a.mkv", drifting_pattern(20, 49, 60, seed=1))
    assert open_named_dataset("ffs", tmp_path / "odd", 5, 32, "reference")[0].pixels.shape == (3, 5, 32, 32)


def _starts_at(pixels: torch.Tensor, frames: torch.Tensor, start: int) -> bool:
    """Check that the mean of the first frame is nearest to that of frame `start`."""
    means = frames[:, :, 11:59].float().mean((1, 2)) / 127.5 - 1
    return int((means - pixels[:, 0].mean((1, 2))).abs().sum(1).argmin()) == start


def test_mirroring_is_by_data_set_and_by_choice(tmp_path: Path):
    ramp = torch.arange(16, dtype=torch.uint8).mul(10)[:, None].expand(20, 16, 16, 3)
    for name in ("ucf101", "ffs", "videofolder"):
        write(tmp_path / name / "class" / "a.mkv", ramp)
    for name in ("taichi", "skytimelapse"):
        write_frames(tmp_path / name / "a", ramp)

    def share(name: str, **options) -> float:
        data = open_named_dataset(name, tmp_path / name, 5, 16, num_draws=60, **options)
        mirrored = [clip.pixels[0, 0, 0, 0] > clip.pixels[0, 0, 0, -1] for clip in map(data.clip, range(60))]
        return float(np.mean(mirrored))

    assert all(0.25 < share(name) < 0.75 for name in ("ucf101", "ffs", "taichi"))
    assert share("skytimelapse") == share("videofolder") == share("ffs", flip=False) == 0
    assert 0.25 < share("videofolder", flip=True) < 0.75


def test_videofolder_takes_labels_from_a_list_or_from_folders(tmp_path: Path):
    for name in ("b/0.mkv", "a/1.mkv", "a/deep/2.mkv"):
        write(tmp_path / name, numbered(20))
    data = open_named_dataset("videofolder", tmp_path, 5, 16)
    assert data.class_names == ("a", "b") and [clip.class_label for clip in map(data.clip, range(3))] == [0, 0, 1]
    rows = [
        {"file_name": "b/0.mkv", "label": "zebra", "caption": "one"},
        {"file_name": "a/1.mkv", "label": "ant", "caption": "two"},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = open_named_dataset("videofolder", tmp_path, 5, 16)
    assert data.class_names == ("ant", "zebra") and len(data) == 2
    assert data[0].class_label == 1 and data[0].captions == ("one",) and data[1].captions == ("two",)
    (tmp_path / "metadata.jsonl").unlink()
    write(tmp_path / "loose.mkv", numbered(20))
    loose = open_named_dataset("videofolder", tmp_path, 5, 16)
    assert loose.class_names is None and loose[0].class_label is None and len(loose) == 4
    with pytest.raises(ValueError, match="must have a folder per class and no videos next to them, got .*loose"):
        open_named_dataset("ucf101", tmp_path, 5, 16)


def test_labels_are_numbers_or_names():
    assert number_labels([{"label": 3}, {"cls": " 5\n"}, {}]) == ([3, 5, None], None)
    assert number_labels([{"label": "b"}, {"class_label": "a"}, {}]) == ([1, 0, None], ("a", "b"))
    most = 2**63 - 1  # in a tensor
    assert number_labels([{"label": most}, {"label": str(most)}]) == ([most, most], None)
    for rows, shown in (
        ([{"label": "b"}, {"label": 1}], "'b', 1"),
        ([{"label": 1}, {"label": -1}], "-1"),
        ([{"label": 0.5}], "0.5"),
        ([{"label": 1}, {"label": most + 1}], f"{most + 1}"),
        ([{"label": f"{most + 1}"}], f"{most + 1}"),
        ([{"label": 1e300}], f"{int(1e300)}"),
    ):
        wanted = f"Labels must be all numbers from 0 to {most} or all names, got [{shown}]."
        with pytest.raises(ValueError, match=re.escape(wanted)):
            number_labels(rows)


def test_a_clip_follows_from_seed_and_index(ucf: Path):
    def draw(seed: int) -> list[torch.Tensor]:
        data = open_named_dataset("ucf101", ucf, 5, 16, "reference", seed, num_draws=3)
        return [data.clip(index).pixels for index in (4, 8, 7, 6)]

    assert all(map(torch.equal, draw(0), draw(0)))
    assert not all(map(torch.equal, draw(0), draw(1)))


def test_bad_arguments_and_files_are_named(ucf: Path, tmp_path: Path):
    for arguments, message in (
        (
            ("kinetics", ucf),
            "`name` must be one of 'ucf101', 'skytimelapse', 'ffs', 'taichi', 'videofolder', got 'kinetics'",
        ),
        (("ffs", ucf, 5, 16, "fast"), "`sampling` must be one of 'exact', 'reference', got 'fast'"),
        (("ffs", ucf, 0), "`num_frames` must be at least 1, got 0"),
        (("ffs", tmp_path / "none"), "`folder` must be an existing folder, got"),
        (("taichi", ucf, 5), "`folder` must hold at least one folder of 13 frames for 'taichi', got none in"),
        (("ffs", tmp_path), "`folder` must hold at least one video for 'ffs', got none in"),
    ):
        with pytest.raises(ValueError, match=message):
            open_named_dataset(*arguments)
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="Skipping a video"), pytest.raises(ValueError, match="at least one usable"):
        open_named_dataset("ffs", tmp_path, 5)[0]
    folder = tmp_path / "frames" / "a"
    write_frames(folder, numbered(12))
    write_video(folder / "a2b_12.png", torch.zeros(1, 8, 8, 3, dtype=torch.uint8), fps=1)
    with pytest.raises(ValueError, match="must have one size, got several"):
        open_named_dataset("taichi", tmp_path / "frames", 13, 16, sample_stride=1).clip(0)
    assert read_video(folder / "a2b_3.png")[0].shape == (1, 16, 16, 3)

"""Training clips: a pure function of seed and index, whatever was drawn before and by whom."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from encoded_clips import count_opens
from torch.utils.data import DataLoader

from diffusers_leanvae.data import (
    Share,
    StepBatches,
    StepSchedule,
    VideoFolder,
    pixels_to_sample,
    read_center_clip,
)
from diffusers_leanvae.video_io import VideoError, VideoReader, read_video


RANDOM = {"clip_sizes": [[5, 16, 24], [1, 32, 32]], "batch_size": 2, "stride": [1, 2], "max_zoom_out": 1.8}


def test_the_i_th_clip_depends_on_seed_and_index_alone(clips: Path):
    cached, decoding = VideoFolder(clips, **RANDOM, seed=3), VideoFolder(clips, **RANDOM, seed=3, cache_gib=0)
    assert (cached.num_cached, decoding.num_cached) == (3, 0)
    forwards = [cached[index] for index in range(12)]
    for index in reversed(range(12)):
        clip = decoding[index]
        assert clip.index == index and clip.pixels.dtype == torch.uint8
        assert torch.equal(clip.pixels, forwards[index].pixels)
    other = VideoFolder(clips, **RANDOM, seed=4)
    assert not all(torch.equal(other[index].pixels, forwards[index].pixels) for index in range(0, 12, 2))


def test_workers_change_nothing(clips: Path):
    dataset = VideoFolder(clips, **RANDOM, cache_gib=0)
    batches = StepBatches(StepSchedule(batch_size=2), start_step=0, num_steps=3)
    alone = [clip.pixels for clip in DataLoader(dataset, batch_sampler=batches)]
    shared = [clip.pixels for clip in DataLoader(dataset, batch_sampler=batches, num_workers=1)]
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_sizes_are_drawn_per_batch_and_every_video_is_visited_each_epoch(clips: Path):
    dataset = VideoFolder(clips, **RANDOM)
    shapes = [tuple(dataset[index].pixels.shape) for index in range(40)]
    assert shapes[::2] == shapes[1::2] and set(shapes) == {(3, 5, 16, 24), (3, 1, 32, 32)}
    for epoch in range(3):
        assert sorted(dataset[index].video for index in range(3 * epoch, 3 * epoch + 3)) == [0, 1, 2]


def test_a_clip_is_a_window_of_its_video(clips: Path, tmp_path: Path):
    shutil.copy(clips / "a.mp4", tmp_path)
    frames, _ = read_video(tmp_path / "a.mp4")
    dataset = VideoFolder(tmp_path, clip_sizes=[[5, 48, 64]], stride=[1, 2])
    seen = set()
    for index in range(40):
        pixels = dataset[index].pixels.permute(1, 2, 3, 0)
        for stride in (1, 2):
            for start in range(12 - 4 * stride):
                window = frames[start : start + 4 * stride + 1 : stride]
                for mirrored in (False, True):
                    if torch.equal(pixels, window.flip(2) if mirrored else window):
                        seen.add((index, stride, mirrored))
    assert {index for index, _, _ in seen} == set(range(40))
    assert {(stride, mirrored) for _, stride, mirrored in seen} == {(1, False), (1, True), (2, False), (2, True)}


def test_bad_videos_are_skipped_with_a_warning_and_their_place_is_taken(clips: Path, tmp_path: Path):
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(clips / name, tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    whole = (clips / "a.mp4").read_bytes()
    (tmp_path / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="Skipping a video: Cannot read .*(broken|truncated)"):
        cached = VideoFolder(tmp_path, clip_sizes=[[5, 16, 16]])
    assert (len(cached), cached.num_cached, cached.num_skipped) == (4, 2, 2)
    decoding = VideoFolder(tmp_path, clip_sizes=[[5, 16, 16]], cache_gib=0)
    with pytest.warns(UserWarning, match="Skipping"):
        drawn = [decoding[index] for index in range(8)]
    assert decoding.num_skipped == 2
    assert sum(clip.num_skipped for clip in drawn) >= 4  # each of the two is met in each of the two epochs
    for index, clip in enumerate(drawn):
        assert torch.equal(clip.pixels, cached[index].pixels) and clip.num_skipped == cached[index].num_skipped


def test_a_clip_opens_its_file_once(clips: Path, monkeypatch: pytest.MonkeyPatch):
    opens = count_opens(monkeypatch)
    dataset = VideoFolder(clips, clip_sizes=[[5, 16, 16]], stride=[1, 2], cache_gib=0)
    for index in range(9):  # the first three also look how long the video is
        video = dataset[index].video
        assert opens == [dataset.paths[video].name]
        opens.clear()
    cached = VideoFolder(clips, clip_sizes=[[5, 16, 16]], stride=[1, 2])
    assert sorted(opens) == [path.name for path in cached.paths]
    cached[0], read_center_clip(clips / "a.mp4", num_frames=5, size=32)
    assert len(opens) == 4


def test_a_header_that_promises_too_much_costs_only_the_clips_beyond(clips: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(VideoReader, "count_frames", lambda video: 40)
    decoding = VideoFolder(clips, clip_sizes=[[5, 16, 16]], cache_gib=0)
    with pytest.warns(UserWarning, match="Skipping a part of a video"):
        drawn = [decoding[index] for index in range(3)]
    assert decoding.num_skipped == 0 and sum(clip.num_skipped for clip in drawn) > 0
    again = VideoFolder(clips, clip_sizes=[[5, 16, 16]], cache_gib=0)
    with pytest.warns(UserWarning, match="Skipping a part of a video"):
        assert all(torch.equal(again[index].pixels, drawn[index].pixels) for index in (2, 1, 0))
    cached = VideoFolder(clips, clip_sizes=[[5, 16, 16]])
    assert sorted(shape[0] for shape in cached.videos.shapes.values() if shape) == [12, 13, 14]


def test_videos_that_hold_no_clip(clips: Path, tmp_path: Path):
    with (
        pytest.warns(UserWarning, match="holds no clip"),
        pytest.raises(ValueError, match="at least one usable video"),
    ):
        VideoFolder(clips, clip_sizes=[[17, 16, 16]])
    with pytest.raises(ValueError, match="`folder` must hold at least one video"):
        VideoFolder(tmp_path)
    with pytest.raises(ValueError, match="`folder` must be an existing folder"):
        VideoFolder(tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_sizes": [[5, 16]]}, r"`clip_sizes` must hold \[num_frames, height, width\] triples, got \[5, 16\]"),
        ({"clip_sizes": []}, "`clip_sizes` must hold at least one"),
        ({"stride": 0}, "`stride` must be an integer from 1 or .lowest, highest. of them, got 0"),
        ({"max_zoom_out": 0.5}, "`max_zoom_out` must be at least 1.0, got 0.5"),
    ],
)
def test_arguments_are_checked(clips: Path, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        VideoFolder(clips, **arguments)


def test_metadata_lists_the_videos(clips: Path, tmp_path: Path):
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(clips / name, tmp_path)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b.mp4", "caption": "drift"}) + "\n\n")
    assert VideoFolder(tmp_path, clip_sizes=[[5, 16, 16]]).paths == [tmp_path / "b.mp4"]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"caption": "drift"}))
    with pytest.raises(ValueError, match="must give a `file_name` in every row, got the columns caption in line 1 of"):
        VideoFolder(tmp_path)


def test_large_videos_are_scaled_down_and_the_cache_is_capped(clips: Path):
    dataset = VideoFolder(clips, clip_sizes=[[5, 16, 16]], short_side=24)
    assert {tuple(frames.shape[1:]) for frames in dataset.videos.cache.values()} == {(24, 32, 3)}
    one_video = 12 * 48 * 64 * 3 / 2**30
    assert VideoFolder(clips, clip_sizes=[[5, 16, 16]], cache_gib=1.5 * one_video).num_cached == 1


@pytest.mark.parametrize(("num_parts", "world_size"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_processes_and_accumulation_share_the_clips_of_a_step(num_parts: int, world_size: int):
    per_process = [
        list(StepBatches(StepSchedule(8), 3, 5, Share(rank, world_size, num_parts))) for rank in range(world_size)
    ]
    for step in (3, 4):
        parts = slice((step - 3) * num_parts, (step - 2) * num_parts)
        drawn = sorted(index for batches in per_process for part in batches[parts] for index in part)
        assert drawn == list(range(8 * step, 8 * step + 8))
    assert (
        len(StepBatches(StepSchedule(8), 3, 5, Share(0, world_size, num_parts)))
        == 2 * num_parts
        == len(per_process[0])
    )


def test_the_batch_must_divide():
    with pytest.raises(
        ValueError, match="`batch_size` must be a multiple of 2 accumulation steps times 2 processes, got 6"
    ):
        StepBatches(StepSchedule(6), 0, 1, Share(0, 2, 2))


def test_the_evaluation_view(clips: Path):
    clip = read_center_clip(clips / "a.mp4", num_frames=5, size=32)
    assert clip.shape == (3, 5, 32, 32) and clip.dtype == torch.float32 and clip.abs().max() <= 1.0
    frames, _ = read_video(clips / "a.mp4", num_frames=5)
    whole = read_center_clip(clips / "a.mp4", num_frames=5, size=48)
    assert torch.equal(whole, pixels_to_sample(frames[:, :, 8:56]).permute(3, 0, 1, 2))
    with pytest.raises(VideoError, match="must have at least 17 frames, got 12"):
        read_center_clip(clips / "a.mp4", num_frames=17, size=32)

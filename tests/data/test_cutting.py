"""Steps and their clips: images mixed in, aspect buckets, strides, rescaling, workers, bad files."""

import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from patterns import drifting_pattern
from torch.utils.data import DataLoader

from diffusers_leanvae.data import Clip, ClipDataset, Share, StepBatches, StepSchedule, open_training_data
from diffusers_leanvae.data.cutting import ClipOptions, VideoOrder, VideoSet
from diffusers_leanvae.data.sources import FileSource
from diffusers_leanvae.video_io import read_video, write_video


def batches(data: ClipDataset, start: int, stop: int, num_workers: int = 0) -> Iterator[Clip]:
    yield from DataLoader(data, batch_sampler=data.batches(start, stop), num_workers=num_workers)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five wide videos, two tall ones, a square one; sorted by name in this order."""
    folder = tmp_path_factory.mktemp("shapes")
    for number, (height, width) in enumerate([(32, 64)] * 5 + [(64, 32)] * 2 + [(48, 48)]):
        write_video(folder / f"{number}.mp4", drifting_pattern(8, height, width, seed=number), fps=8)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        write_video(folder / f"{number}.png", drifting_pattern(1, 40, 40, seed=10 + number), fps=8)
    return folder


def test_image_steps_come_at_the_ratio_and_their_indices_are_their_own():
    schedule = StepSchedule(batch_size=4, image_ratio=0.3, image_batch_factor=2)
    kinds = [schedule.is_image_step(step) for step in range(1000)]
    assert sum(kinds) == 300 and max(sum(kinds[i : i + 10]) for i in range(0, 1000, 10)) == 3
    assert all(schedule.num_image_steps(step) == sum(kinds[:step]) for step in range(0, 1000, 7))
    lists = [list(StepBatches(schedule, 0, 20, Share(rank, 2, 2))) for rank in range(2)]
    for step in range(20):
        drawn = sorted(index for rank in lists for batch in rank[2 * step : 2 * step + 2] for index in batch)
        assert drawn == list(range(8 * step, 8 * step + (8 if kinds[step] else 4)))


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1 / 3])
def test_extreme_ratios(ratio: float):
    schedule = StepSchedule(2, ratio)
    assert sum(schedule.is_image_step(step) for step in range(300)) == round(300 * ratio)
    assert [schedule.num_clips(step) for step in range(5)] == [2] * 5


def test_images_are_frames_of_the_videos(clips: Path):
    options = {"clip_sizes": [[5, 48, 64]], "image_ratio": 0.5, "image_batch_factor": 3, "flip": False}
    cached = open_training_data(str(clips), batch_size=2, **options)
    decoding = open_training_data(str(clips), batch_size=2, **options, cache_gib=0)
    frames = [read_video(path)[0] for path in cached.videos.source.paths]
    drawn = list(batches(cached, 0, 6))
    assert [tuple(batch.pixels.shape) for batch in drawn] == [(2, 3, 5, 48, 64), (6, 3, 1, 48, 64)] * 3
    for one, other in zip(drawn, batches(decoding, 0, 6), strict=True):
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.index, other.index)
    images = [
        (image, int(video)) for batch in drawn[1::2] for image, video in zip(batch.pixels, batch.video, strict=True)
    ]
    for image, video in images:
        assert any(torch.equal(image[:, 0].permute(1, 2, 0), frame) for frame in frames[video])
    assert Counter(video for _, video in images) == {0: 6, 1: 6, 2: 6}
    assert Counter(int(v) for batch in drawn[::2] for v in batch.video) == {0: 2, 1: 2, 2: 2}  # its own epochs


def test_images_of_a_folder(clips: Path, pictures: Path):
    data = open_training_data(
        str(clips), batch_size=3, clip_sizes=[[5, 40, 40]], image_ratio=0.5, images=str(pictures), flip=False
    )
    assert data.describe() == "3 videos and 3 images, 6 in memory, 0 skipped"
    originals = [read_video(path)[0][0] for path in sorted(pictures.iterdir())]
    clip_batch, image_batch = batches(data, 0, 2)
    assert clip_batch.pixels.shape == (3, 3, 5, 40, 40) and image_batch.pixels.shape == (3, 3, 1, 40, 40)
    assert sorted(image_batch.video.tolist()) == [0, 1, 2]
    for image, number in zip(image_batch.pixels, image_batch.video, strict=True):
        assert torch.equal(image[:, 0].permute(1, 2, 0), originals[number])


def test_a_step_takes_one_aspect_ratio_and_every_video_is_visited_once_an_epoch(shapes: Path):
    data = open_training_data(
        str(shapes), batch_size=2, clip_sizes=[[5, 16, 32], [5, 32, 16], [3, 16, 16]], aspect_buckets=True
    )
    size_of = [(5, 16, 32)] * 5 + [(5, 32, 16)] * 2 + [(3, 16, 16)]
    visits, sizes = Counter(), []
    for batch in batches(data, 0, 160):
        sizes.append(tuple(batch.pixels.shape[2:]))
        assert {size_of[video] for video in batch.video} == {sizes[-1]}
        visits.update(batch.video.tolist())
    assert visits == dict.fromkeys(range(8), 40)  # 160 steps of 2 are 40 epochs of 8 videos
    assert Counter(sizes) == {(5, 16, 32): 100, (5, 32, 16): 40, (3, 16, 16): 20}
    assert sizes[:80] != sizes[80:]
    again = open_training_data(
        str(shapes), batch_size=2, clip_sizes=[[5, 16, 32], [5, 32, 16], [3, 16, 16]], aspect_buckets=True, cache_gib=0
    )
    for index in (319, 11, 200, 3):
        assert torch.equal(again[index].pixels, data[index].pixels)


def test_a_bucket_has_all_sizes_of_its_ratio_and_a_video_goes_where_it_fits(shapes: Path):
    sizes = [(5, 16, 32), (3, 32, 64), (5, 64, 64)]
    options = ClipOptions(sizes, aspect_buckets=True)
    order = VideoOrder(VideoSet(FileSource(shapes), sizes, options), sizes, 2, [0])
    ((drawn, members),) = order.buckets  # nothing is 64x64: tall and square videos take the wide size that fits them
    assert drawn == sizes[:2] and members.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    with (
        pytest.raises(ValueError, match="`clip_sizes` must fit at least one of the 8 videos"),
        pytest.warns(UserWarning),
    ):
        VideoOrder(VideoSet(FileSource(shapes), [(5, 96, 96)], options), [(5, 96, 96)], 2, [0])


def test_the_stride_is_fixed_or_drawn(tmp_path: Path):
    frames = torch.arange(0, 240, 10, dtype=torch.uint8)[:, None, None, None].expand(24, 16, 16, 3)
    write_video(tmp_path / "ramp.mkv", frames, fps=8, codec="ffv1")

    def steps(stride: object, num_frames: int = 5) -> set[int]:
        data = open_training_data(str(tmp_path), batch_size=1, clip_sizes=[[num_frames, 16, 16]], stride=stride)
        found = set()
        for index in range(40):
            differences = data[index].pixels[0, :, 0, 0].int().diff()
            assert len(set(differences.tolist())) == 1
            found.add(int(differences[0]) // 10)
        return found

    assert steps(1) == {1} and steps(3) == {3} and steps([2, 4]) == {2, 3, 4}
    assert steps(3, num_frames=12) == {2}  # 24 frames hold no more


def test_a_step_is_rescaled_by_one_factor_and_keeps_its_window(clips: Path):
    options = {"batch_size": 2, "clip_sizes": [[5, 48, 64]], "flip": False}
    plain = open_training_data(str(clips), **options)
    scaled = open_training_data(str(clips), **options, rescale_factors=[1, 1.25, 1.5, 2, 2.5])
    seen = Counter(tuple(batch.pixels.shape[3:]) for batch in batches(scaled, 0, 60))
    # 48 / 1.25 = 38.4 -> 32, 48 / 1.5 = 32, 48 / 2 = 24 -> 32 (ties to even), 48 / 2.5 = 19.2 -> 16
    assert set(seen) == {(48, 64), (32, 48), (32, 32), (16, 32)} and min(seen.values()) > 3
    half = open_training_data(str(clips), **options, rescale_factors=[1.5])
    for index in range(3):
        small, large = half[index].pixels.float(), plain[index].pixels.float()
        assert small.shape == (3, 5, 32, 48)
        assert abs(small.mean(dim=(2, 3)) - large.mean(dim=(2, 3))).max() < 1.0  # the same frames, whole


def test_workers_and_processes_change_nothing(clips: Path):
    options = {"clip_sizes": [[5, 16, 24], [3, 32, 32]], "stride": [1, 2], "max_zoom_out": 1.5, "cache_gib": 0}
    options |= {"image_ratio": 0.4, "image_batch_factor": 2, "rescale_factors": [1, 1.5]}
    alone = list(batches(open_training_data(str(clips), batch_size=4, **options), 2, 7))
    shared = list(batches(open_training_data(str(clips), batch_size=4, **options), 2, 7, num_workers=2))
    ranks = [
        list(batches(open_training_data(str(clips), batch_size=4, rank=rank, world_size=2, **options), 2, 7))
        for rank in (0, 1)
    ]
    for number, batch in enumerate(alone):
        assert torch.equal(batch.pixels, shared[number].pixels)
        assert torch.equal(batch.pixels, torch.cat([rank[number].pixels for rank in ranks]))
        assert torch.equal(batch.index, torch.cat([rank[number].index for rank in ranks]))


def test_bad_files_are_counted_in_workers_too(clips: Path, tmp_path: Path):
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(clips / name, tmp_path)
    for number in range(2):
        (tmp_path / f"broken{number}.mp4").write_bytes(b"not a video")
    data = open_training_data(str(tmp_path), batch_size=4, clip_sizes=[[5, 16, 16]], cache_gib=0)
    counts = [int(batch.num_skipped.sum()) for batch in batches(data, 0, 4, num_workers=2)]
    assert all(2 <= count <= 8 for count in counts) and data.num_skipped == 0  # workers found them, not this process
    with warnings.catch_warnings(action="ignore"):
        assert counts == [int(batch.num_skipped.sum()) for batch in batches(data, 0, 4)]
    assert data.num_skipped == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 0}, r"`stride` must be an integer from 1 or \[lowest, highest\] of them, got 0"),
        ({"stride": [3, 2]}, r"`stride` must be .* got \[3, 2\]"),
        ({"short_side": 0}, "`short_side` must be at least 1 or None, got 0"),
        ({"rescale_factors": []}, r"`rescale_factors` must hold at least one positive number, got \[\]"),
        ({"image_ratio": 1.5}, "`image_ratio` must be from 0 to 1, got 1.5"),
        ({"image_batch_factor": 0}, "`image_batch_factor` must be at least 1, got 0"),
        ({"world_size": 3}, "`batch_size` must be a multiple of 1 accumulation steps times 3 processes, got 4"),
        ({"images": "nowhere"}, "must be a folder of videos, .* got 'nowhere'"),
    ],
)
def test_options_are_checked(clips: Path, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        open_training_data(str(clips), batch_size=4, **arguments)

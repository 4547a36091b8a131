"""Sources that `train` may name: folders, lists, tar shards, streams; a stream resumes exactly."""

import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from patterns import drifting_pattern
from torch.utils.data import DataLoader

from diffusers_leanvae.data import Clip, ClipDataset, open_training_data
from diffusers_leanvae.data.latent_samples import LatentData
from diffusers_leanvae.data.sources import expand_braces, open_source
from diffusers_leanvae.data.streams import VideoStream
from diffusers_leanvae.video_io import write_video


NUM_VIDEOS = 10
OPTIONS = {"clip_sizes": [[5, 16, 16], [3, 16, 24]], "cache_gib": 0, "stride": [1, 2]}


def draw(data: ClipDataset, start: int, stop: int, num_workers: int = 0) -> list[Clip]:
    return list(DataLoader(data, batch_sampler=data.batches(start, stop), num_workers=num_workers))


def equal(one: list[Clip], other: list[Clip]) -> bool:
    return all(
        a.pixels.shape == b.pixels.shape and torch.equal(a.pixels, b.pixels) and torch.equal(a.video, b.video)
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos with captions in a `metadata.jsonl`, as `datasets` writes and reads them."""
    folder = tmp_path_factory.mktemp("listed")
    for number in range(NUM_VIDEOS):
        write_video(folder / f"{number}.mp4", drifting_pattern(9, 32, 32, seed=number), fps=8)
    rows = [{"file_name": f"{number}.mp4", "caption": f"drift {number}"} for number in range(NUM_VIDEOS)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def shards(listed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same videos in two tar files, five in each, with captions as text and a number as JSON."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for number in range(5 * shard, 5 * shard + 5):
                archive.add(listed / f"{number}.mp4", f"train/{number}.mp4")
                for name, text in (("json", f'{{"speed": {number}}}'), ("txt", f"drift {number}")):
                    member = tarfile.TarInfo(f"train/{number}.{name}")
                    member.size = len(text)
                    archive.addfile(member, io.BytesIO(text.encode()))
    return folder


def test_folders(listed: Path, tmp_path: Path):
    for name in ("surf/0.mp4", "climb/1.mp4"):  # the `videofolder` layout: a folder per class
        (tmp_path / name).parent.mkdir()
        shutil.copy(listed / Path(name).name, tmp_path / name)
    nested = open_training_data(str(tmp_path), batch_size=1, **OPTIONS)
    assert [nested.metadata(number) for number in range(2)] == [
        {"file_name": "climb/1.mp4"},
        {"file_name": "surf/0.mp4"},
    ]
    with_list = open_training_data(str(listed), batch_size=1, **OPTIONS)
    clip = with_list[4]
    assert with_list.metadata(clip.video) == {"file_name": f"{clip.video}.mp4", "caption": f"drift {clip.video}"}


def test_shards_give_the_clips_of_the_folder(listed: Path, shards: Path):
    folder = open_training_data(str(listed), batch_size=2, **OPTIONS)
    for train in (shards, f"{shards}/{{000..001}}.tar", f"{shards}/*.tar"):
        data = open_training_data(str(train), batch_size=2, **OPTIONS)
        assert len(data) == NUM_VIDEOS
        assert all(torch.equal(data[index].pixels, folder[index].pixels) for index in (17, 3, 0))
    assert equal(draw(data, 3, 6, num_workers=2), draw(folder, 3, 6))
    assert open_training_data(str(shards), batch_size=2, clip_sizes=[[5, 16, 16]]).num_cached == NUM_VIDEOS
    assert data.metadata(6) == {"speed": 6, "txt": "drift 6", "file_name": f"{shards}/001.tar/train/6.mp4"}


def test_a_damaged_member_is_passed_over(listed: Path, tmp_path: Path):
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.add(tmp_path / "broken.mp4", "0.mp4")
        archive.add(listed / "1.mp4", "1.mp4")
    data = open_training_data(str(tmp_path / "0.tar"), batch_size=1, **OPTIONS)
    with pytest.warns(UserWarning, match="Skipping a video: Cannot read"):
        drawn = [data[index] for index in range(4)]
    assert {clip.video for clip in drawn} == {1} and sum(clip.num_skipped for clip in drawn) == 2


def test_names_that_lead_nowhere(listed: Path, tmp_path: Path):
    assert expand_braces("a{08..11}/{0..1}.tar")[1:4] == ["a08/1.tar", "a09/0.tar", "a09/1.tar"]
    with pytest.raises(ValueError, match="`train` must be a folder of videos, .* which is not there"):
        open_source(tmp_path / "{000..001}.tar")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ValueError, match="at least one video, got none in 1 files"):
        open_source(tmp_path)
    with tarfile.open(tmp_path / "zipped.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match="`train` must name uncompressed tar files"):
        open_source(tmp_path / "zipped.tar")
    shutil.copy(listed / "1.mp4", tmp_path)
    with pytest.raises(ValueError, match="a folder of videos or of tar files, got both"):
        open_source(tmp_path)


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets", reason="datasets is an optional dependency")


STREAM = {"shuffle_buffer": 4, **OPTIONS}  # blocks of 4: an epoch ends inside one


def test_a_stream_visits_everything_once_an_epoch_in_a_new_order(listed: Path, datasets):
    data = open_training_data(f"hub:{listed}", batch_size=2, **STREAM)
    assert isinstance(data, VideoStream)
    captions = []
    for batch in DataLoader(data, batch_sampler=data.batches(0, 20)):
        captions += [data.metadata(video)["caption"] for video in batch.video.tolist()]
    for twice in (captions[:20], captions[20:]):  # five blocks of four are two epochs
        assert Counter(twice) == {f"drift {number}": 2 for number in range(NUM_VIDEOS)}
    blocks = ["".join(caption[-1] for caption in captions[i : i + 4]) for i in range(0, 40, 4)]
    assert len(set(blocks)) == 10 and any(list(block) != sorted(block) for block in blocks)
    data.close()
    assert not data.root.exists()


def test_latent_data_takes_a_stream_block_by_block(listed: Path, datasets):
    data = open_training_data(f"hub:{listed}", batch_size=2, **STREAM)
    samples = LatentData(data, has_latents=False)
    loader = DataLoader(samples, batch_sampler=samples.batches(2, 0, 300), collate_fn=lambda batch: batch)
    for batch in loader:
        assert len(batch.videos) == 2
    assert len(list(data.root.iterdir())) < 50  # of 150 blocks: those that no worker can ask for are removed
    data.close()


@pytest.mark.parametrize(("kind", "world_size"), [("videofolder", 1), ("videofolder", 2), ("webdataset", 2)])
def test_a_resumed_stream_equals_an_uninterrupted_one(
    kind: str, world_size: int, listed: Path, shards: Path, datasets
):
    train = f"hub:{listed}" if kind == "videofolder" else f"file://{shards}/{{000..001}}.tar"
    mixed = {"image_ratio": 0.25, "image_batch_factor": 2}
    seen: list[set[str]] = []
    for rank in range(world_size):

        def start(rank: int = rank) -> VideoStream:
            data = open_training_data(train, batch_size=4, rank=rank, world_size=world_size, **STREAM, **mixed)
            assert isinstance(data, VideoStream)
            return data

        straight = start()
        whole = draw(straight, 0, 7)
        assert [len(batch.pixels) * world_size for batch in whole] == [4, 4, 4, 8, 4, 4, 4]
        assert equal(draw(start(), 0, 7, num_workers=2), whole)
        assert equal(draw(start(), 5, 7), whole[5:])  # by reading what was consumed
        before = start()
        draw(before, 0, 5)
        state = json.loads(json.dumps(before.state_dict(5)))
        resumed = start()
        resumed.load_state_dict(state)
        assert state["block"] > 0
        del resumed.reader.states[0]  # so it cannot read that again
        assert equal(draw(resumed, 5, 7), whole[5:])
        assert torch.equal(straight[5].pixels, start()[5].pixels)
        key = "caption" if kind == "videofolder" else "txt"
        seen.append({straight.metadata(int(video))[key] for batch in whole[:2] for video in batch.video})
    assert len(set.union(*seen)) == 8  # nothing twice, on any process


def test_a_state_of_another_run_is_not_taken(listed: Path, datasets):
    state = open_training_data(f"hub:{listed}", batch_size=2, **STREAM).state_dict(0)
    data = open_training_data(f"hub:{listed}", batch_size=2, seed=1, **STREAM)
    with pytest.warns(UserWarning, match="found by reading from its start"):
        data.load_state_dict(state)


def test_bad_examples_of_a_stream_are_passed_over(listed: Path, tmp_path: Path, datasets):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number in range(4):
            archive.add(listed / f"{number}.mp4", f"{number}.mp4")
        (tmp_path / "broken").write_bytes(b"not a video")
        archive.add(tmp_path / "broken", "4.mp4")
    data = open_training_data(f"file://{tmp_path}/0.tar", batch_size=5, shuffle_buffer=5, **OPTIONS)
    with pytest.warns(UserWarning, match="Skipping a video"):
        (batch,) = draw(data, 0, 1)
    assert int(batch.num_skipped.sum()) == 1 and data.num_skipped == 1


def test_streams_without_videos(tmp_path: Path, datasets):
    (tmp_path / "rows.jsonl").write_text('{"caption": "words"}\n')
    with pytest.raises(ValueError, match="a column of videos or images, got the columns caption"):
        open_training_data(f"hub:{tmp_path}", batch_size=1)
    with pytest.raises(ValueError, match="`train` must name tar files when it is a URL"):
        open_training_data("https://example.org/videos.zip", batch_size=1)

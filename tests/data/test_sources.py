"""Sources that `train` may name: folders, lists, tar shards, streams; a stream resumes exactly."""

import gzip
import io
import json
import shutil
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from patterns import drifting_pattern
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_leanvae.data import Clip, ClipDataset, open_training_data
from diffusers_leanvae.data.latent_samples import LatentData
from diffusers_leanvae.data.metadata import find_captions
from diffusers_leanvae.data.sources import expand_braces, open_source, split_member
from diffusers_leanvae.data.streams import VideoStream, write_example
from diffusers_leanvae.video_io import VideoError, VideoReader, write_video


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


def test_a_bad_member_of_a_shard_has_a_name_of_its_own(tmp_path: Path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        member = tarfile.TarInfo("bad.mp4")
        member.size = 7
        archive.addfile(member, io.BytesIO(b"nothing"))
    source, shown = open_source(tmp_path / "0.tar"), f"Cannot read '{tmp_path / '0.tar/bad.mp4'}' as a video"
    with pytest.raises(VideoError, match=shown), source.open(0) as path, VideoReader(path):
        pass
    data = open_training_data(str(tmp_path / "0.tar"), batch_size=1, **OPTIONS)
    with pytest.warns(UserWarning, match=f"Skipping a video: {shown}"), pytest.raises(ValueError):
        data[0]


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
    with pytest.raises(ValueError, match="`train` must be a folder of videos, .*, of which '.*000.tar' is not there"):
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


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a.mp4", ("a", "mp4")),
        ("a.front.MP4", ("a", "front.mp4")),
        ("x.y/a.b.mp4", ("x.y/a", "b.mp4")),
        ("./a.mp4", ("./a", "mp4")),
        ("2024-05-01 12.30.05.mp4", ("2024-05-01 12", "30.05.mp4")),
        ("a", None),
        ("x.y/a", None),
        ("._a.mp4", None),
        ("x/._a.mp4", None),
        ("x/.hidden", None),
    ],
)
def test_members_are_split_as_webdataset_splits_them(name: str, split: tuple[str, str] | None):
    assert split_member(name) == split


def test_members_that_share_a_key_are_neither_merged_nor_lost(listed: Path, tmp_path: Path):
    video = (listed / "1.mp4").read_bytes()
    dotted = [("day 12.30.mp4", video), ("day 12.30.txt", b"half past"), ("day 12.45.mp4", video), ("b.mp4", video)]
    write_tar(tmp_path / "dots.tar", dotted)
    with pytest.raises(
        ValueError, match=r"one video for each key, .* got 'day 12' with '30.mp4' and '45.mp4' in '.*dots"
    ):
        open_source(tmp_path / "dots.tar")
    source = open_source(write_tar(tmp_path / "one.tar", [dotted[0], dotted[1], dotted[3], ("b.txt", b"")]))
    rows = [source.metadata(number) for number in range(2)]
    assert [find_captions(row) for row in rows] == [("half past",), ()]
    assert rows[0]["file_name"].endswith("one.tar/day 12.30.mp4")

    twice = write_tar(tmp_path / "twice.tar", [("a.mp4", video), ("b.mp4", video), ("a.MP4", video), ("b.mp4", b"")])
    with pytest.raises(ValueError, match=r"every name once, got 'a.mp4' and 1 others twice in '.*twice.tar'"):
        open_source(twice)


def test_a_film_goes_before_its_picture_and_apart_members_join(listed: Path, tmp_path: Path):
    video = (listed / "1.mp4").read_bytes()
    members = [("a.jpg", b"poster"), ("a.mp4", video), ("b.jpg", b"an image"), ("a.txt", "\ufeffsaid".encode())]
    source = open_source(write_tar(tmp_path / "0.tar", members))
    assert [source.name(number).rpartition("/")[2] for number in range(2)] == ["a.mp4", "b.jpg"]
    assert source.metadata(0)["txt"] == "said"
    with source.open(0) as path:
        assert path.read_bytes() == video


def test_resource_forks_of_a_tar_are_no_examples(listed: Path, tmp_path: Path):
    video = (listed / "1.mp4").read_bytes()
    members = [("./._a.mp4", b"Mac OS X"), ("./a.mp4", video), ("__MACOSX/._b.mp4", b"Mac OS X"), ("._a.txt", b"no")]
    source = open_source(write_tar(tmp_path / "0.tar", members))
    assert len(source) == 1 and source.metadata(0) == {"file_name": f"{tmp_path}/0.tar/./a.mp4"}
    (tmp_path / "._0.tar").write_bytes(b"Mac OS X")
    assert len(open_source(tmp_path)) == 1


def test_damaged_metadata_of_a_tar_is_passed_over(listed: Path, tmp_path: Path):
    members = [("a.mp4", (listed / "1.mp4").read_bytes()), ("a.json", b'{"label": '), ("a.txt", b"said")]
    source = open_source(write_tar(tmp_path / "0.tar", members))
    with pytest.warns(UserWarning, match="Skipping metadata: .*a.mp4' has a damaged .json"):
        assert find_captions(source.metadata(0)) == ("said",)


def test_of_a_damaged_shard_the_beginning_is_used(listed: Path, tmp_path: Path):
    videos = [(f"{number}.mp4", (listed / f"{number}.mp4").read_bytes()) for number in range(3)]
    path = write_tar(tmp_path / "0.tar", videos)
    with tarfile.open(path) as archive:
        last = archive.getmember("2.mp4")
    whole = path.read_bytes()
    path.write_bytes(whole[: last.offset] + b"x" * 100 + whole[last.offset + 100 :])
    with pytest.warns(UserWarning, match="Skipping the end of '.*0.tar', which is damaged: "):
        assert len(open_source(path)) == 2
    path.write_bytes(whole[: last.offset_data + 10])  # cut off within a video
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = open_training_data(str(path), batch_size=1, **OPTIONS)
        assert {data[index].video for index in range(9)} == {0, 1}


def test_metadata_in_a_sub_folder_is_not_ignored_without_a_word(listed: Path, tmp_path: Path):
    shutil.copytree(listed, tmp_path / "train")
    with pytest.warns(UserWarning, match="Not reading '.*train/metadata.jsonl': metadata must lie in "):
        open_source(tmp_path)


def test_one_video_is_a_data_set(listed: Path, tmp_path: Path):
    shutil.copy(listed / "3.mp4", tmp_path / "film.MP4")
    (tmp_path / "film.txt").write_text("three")
    data = open_training_data(str(tmp_path / "film.MP4"), batch_size=2, **OPTIONS)
    assert data.describe() == "1 videos, 0 in memory, 0 skipped"
    assert data.metadata(0) == {"file_name": "film.MP4", "caption": "three"}
    folder = open_training_data(str(tmp_path), batch_size=2, **OPTIONS)
    assert equal(draw(data, 0, 2), draw(folder, 0, 2))


def test_numbered_frames_are_one_video(tmp_path: Path):
    frames = drifting_pattern(7, 24, 24, seed=5)
    for number, frame in enumerate(frames, start=3):
        Image.fromarray(frame.numpy()).save(tmp_path / f"f_{number:04d}.png")
    data = open_training_data(f"{tmp_path}/f_%04d.png", batch_size=1, clip_sizes=[[7, 24, 24]], flip=False)
    assert len(data) == 1 and data.metadata(0) == {"file_name": "f_%04d.png"}
    assert torch.equal(data[0].pixels, frames.permute(3, 0, 1, 2))
    (tmp_path / "f_0005.png").unlink()
    with pytest.raises(ValueError, match="f_%04d.png"):
        open_training_data(f"{tmp_path}/f_%04d.png", batch_size=1)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.TGZ"])
def test_compressed_shards_are_refused_where_they_cannot_be_indexed(name: str, tmp_path: Path):
    with tarfile.open(tmp_path / name, "w:gz"):
        pass
    for train in (tmp_path / name, tmp_path, f"{tmp_path}/*{name[1:]}"):
        with pytest.raises(ValueError, match=r"uncompressed tar files, got .*gunzip.*or stream it as 'file:///.*/x\."):
            open_source(train)


def test_files_of_another_kind(listed: Path, tmp_path: Path):
    (tmp_path / "notes.pdf").touch()
    for train, reason in {
        tmp_path / "notes.pdf": "which is a file of another kind",
        f"{listed}/[0-3].mp4": "which matches '0.mp4'",
        tmp_path / "absent.mp4": "which is not there",
        f"{tmp_path}/*.tar": "which is not there",
    }.items():
        with pytest.raises(ValueError, match=f"`train` must be a folder of videos, .*, {reason}"):
            open_source(train)


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


def test_a_compressed_shard_is_streamed(listed: Path, tmp_path: Path, datasets):
    members = [(f"{number}.mp4", (listed / f"{number}.mp4").read_bytes()) for number in range(4)]
    write_tar(tmp_path / "0.tar", members)
    with open(tmp_path / "0.tar", "rb") as source, gzip.open(tmp_path / "0.tar.gz", "wb") as target:
        shutil.copyfileobj(source, target)
    options = {"batch_size": 2, "shuffle_buffer": 2, **OPTIONS}
    plain, compressed = (open_training_data((tmp_path / name).as_uri(), **options) for name in ("0.tar", "0.tar.gz"))
    assert equal(draw(plain, 0, 2), draw(compressed, 0, 2))


def test_a_stream_may_have_a_column_of_file_names(tmp_path: Path):
    example = {"video": b"encoded", "file_name": "original.mp4", "caption": "words"}
    row = write_example(example, "video", tmp_path, 3)
    assert (tmp_path / row["file_name"]).read_bytes() == b"encoded" and row["caption"] == "words"

"""Latents and clips at URLs: the same files and items as on disk, each file whole or not there."""

import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from processes import Piped
from torch.utils.data import DataLoader

from diffusers_leanvae.data import open_training_data
from diffusers_leanvae.data.clip_lists import ClipSelection, open_clip_list
from diffusers_leanvae.data.latent_cache import encode_dataset
from diffusers_leanvae.data.latent_samples import LatentData
from diffusers_leanvae.data.latent_shards import LatentFolder
from diffusers_leanvae.data.sources import open_source
from diffusers_leanvae.data.storage import RemotePath, open_path, write_json, write_whole
from diffusers_leanvae.data.streams import BlockReader


OPTIONS = {"num_clips": 10, "seed": 3, "clip_size": (5, 16, 24), "shard_size": 4, "batch_size": 3}


class PlainFileSystem(MemoryFileSystem):
    """Files that grow under their names while they are written, as over SSH."""

    protocol = "plain"
    store: dict[str, Any] = {}
    fails = False  # to write
    error: Exception | None = None  # of downloads of videos
    num_downloads = 0  # before that error

    def get_file(self, rpath: str, lpath: Any, **options: Any) -> None:
        if self.error is not None and rpath.endswith(".mp4"):
            if self.num_downloads == 0:
                raise self.error
            type(self).num_downloads -= 1
        super().get_file(rpath, lpath, **options)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        super().pipe_file(path, value[:9], **options)
        if self.fails:
            raise RuntimeError("connection lost")
        super().pipe_file(path, value, **options)


@pytest.fixture(autouse=True)
def places(copies: Path) -> Iterator[None]:
    """An empty memory, the file system above, and copies in a folder of the test."""
    fsspec.register_implementation("plain", PlainFileSystem, clobber=True)
    yield
    PlainFileSystem.store.clear()
    PlainFileSystem.fails, PlainFileSystem.error = False, None


@pytest.fixture(scope="module")
def vae(make_model) -> Any:
    return make_model()


@pytest.fixture(scope="module")
def local(vae, tmp_path_factory: pytest.TempPathFactory) -> LatentFolder:
    return encode_dataset(vae, "shapes", tmp_path_factory.mktemp("cache"), **OPTIONS)


def contents(url: str) -> dict[str, bytes]:
    """All files below a URL, hidden ones too."""
    file_system, path = fsspec.core.url_to_fs(url)
    return {file.rpartition("/")[2]: file_system.cat_file(file) for file in file_system.find(path)}


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("protocol", ["memory", "plain", "file"])
@pytest.mark.parametrize("file_format", ["safetensors", "webdataset"])
def test_latents_at_a_url_are_those_on_disk(protocol: str, file_format: Any, vae, local: LatentFolder, tmp_path: Path):
    url = (tmp_path / "there").as_uri() if protocol == "file" else f"{protocol}://bucket/there"
    options = OPTIONS | {"file_format": file_format}
    written = encode_dataset(vae, "shapes", url, **options)
    expected = encode_dataset(vae, "shapes", tmp_path / "here", **options)
    assert contents(url) == {path.name: path.read_bytes() for path in expected.path.iterdir()}
    assert isinstance(written.path, Path) == (protocol == "file")
    assert file_names(tmp_path / "copies") == []  # measuring statistics leaves nothing
    for index in range(10):
        assert torch.equal(written[index].latents, local[index].latents)
        assert written[index][1:] == local[index][1:] and written.name(index) == local.name(index)
    shards = [] if protocol == "file" else [path.name for path in sorted(expected.path.glob("latents-*"))]
    assert file_names(tmp_path / "copies") == shards
    read = [item.latents[0] for item in DataLoader(written, num_workers=1)]
    assert all(torch.equal(latents, local[index].latents) for index, latents in enumerate(read))
    data = LatentData(LatentFolder(url), has_latents=True)
    assert data.stored is not None and torch.equal(data.stored[0][7], local[7].latents)


def test_a_lost_connection_leaves_no_half_file_and_the_next_run_resumes(vae, tmp_path: Path):
    here = encode_dataset(vae, "shapes", tmp_path / "here", **OPTIONS).path
    url = "plain://bucket/there"

    def lose_connection(*_: int) -> None:
        PlainFileSystem.fails = True

    with pytest.raises(OSError, match="latents-00001.safetensors' cannot be reached: connection lost"):
        encode_dataset(vae, "shapes", url, progress=lose_connection, **OPTIONS)
    found = contents(url)
    assert set(found) == {"settings.json", "latents-00000.safetensors", ".latents-00001.safetensors.partial"}
    assert all(found[name] == (here / name).read_bytes() for name in found if not name.startswith("."))
    with pytest.raises(
        ValueError, match="`path` must be a finished folder of `leanvae encode-dataset`, got 'plain://"
    ):
        LatentFolder(url)
    PlainFileSystem.fails = False
    first = open_path(f"{url}/latents-00000.safetensors")
    assert isinstance(first, RemotePath)
    created = first.file_system.created(first.path)
    encode_dataset(vae, "shapes", url, **OPTIONS)
    assert contents(url) == {path.name: path.read_bytes() for path in here.iterdir()}
    assert first.file_system.created(first.path) == created  # what was whole is not written again
    with pytest.raises(ValueError, match="same settings, got 'plain://bucket/there', where `seed` was 3"):
        encode_dataset(vae, "shapes", url, **OPTIONS | {"seed": 4})


def test_copies_follow_what_is_at_the_url(vae, local: LatentFolder):
    url = "memory://bucket/there"
    assert torch.equal(encode_dataset(vae, "shapes", url, **OPTIONS)[0].latents, local[0].latents)
    MemoryFileSystem.store.clear()
    again = encode_dataset(vae, "shapes", url, **OPTIONS | {"seed": 4})[0].latents
    assert not torch.equal(again, local[0].latents)
    MemoryFileSystem.store.clear()
    assert torch.equal(encode_dataset(vae, "shapes", url, **OPTIONS)[0].latents, local[0].latents)


@pytest.fixture(scope="module")
def videos(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos in two folders, two of them with captions."""
    folder = tmp_path_factory.mktemp("videos")
    shutil.copytree(clips, folder, dirs_exist_ok=True)
    (folder / "a.txt").write_text("one caption")
    (folder / "nested" / "c.txt").write_text("two\ncaptions")
    (folder / ".hidden.mp4").write_bytes(b"nothing")
    return folder


def upload(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            write_whole(open_path(f"{url}/{path.relative_to(folder)}"), path.read_bytes())


@pytest.mark.parametrize("is_listed", [False, True])
def test_clips_at_a_url_are_those_on_disk(is_listed: bool, vae, videos: Path, tmp_path: Path):
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    if is_listed:
        rows = [{"file_name": name, "label": name, "text": f"it is {name}"} for name in ("nested/c.mp4", "a.mp4")]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    upload(folder, "memory://bucket/videos")
    options = {"clip_size": (5, 16, 24), "num_crops": 2, "seed": 3, "num_clips": None}
    sources = (str(folder), "memory://bucket/videos", folder.as_uri())
    caches = [encode_dataset(vae, source, tmp_path / f"{n}", **options) for n, source in enumerate(sources)]
    found = [
        {path.name: path.read_bytes() for path in cache.path.glob("*") if path.name != "settings.json"}
        for cache in caches
    ]  # type: ignore[union-attr]
    assert found[0] == found[1] == found[2]
    captions = [caches[1].captions(index) for index in range(0, len(caches[1]), 2)]
    assert captions == (
        [("it is nested/c.mp4",), ("it is a.mp4",)] if is_listed else [("one caption",), (), ("two", "captions")]
    )
    batches = []
    for source in sources[:2]:
        data = open_training_data(source, batch_size=2, clip_sizes=[[5, 16, 24]], cache_gib=0.0)
        batches += DataLoader(data, batch_sampler=data.batches(0, 2), num_workers=1)
    assert torch.equal(batches[0].pixels, batches[2].pixels) and torch.equal(batches[1].pixels, batches[3].pixels)


@pytest.mark.parametrize(
    ("error", "num_downloads"),
    [(RuntimeError("connection lost"), 0), (RuntimeError("connection lost"), 1), (PermissionError("expired"), 0)],
)
def test_a_lost_connection_is_no_bad_video(error: Exception, num_downloads: int, vae, videos: Path, tmp_path: Path):
    """Else a clip would be missing from the latents for ever."""
    upload(videos, "plain://bucket/videos")
    options = {"clip_size": (5, 16, 24), "num_crops": 2}
    PlainFileSystem.error, PlainFileSystem.num_downloads = error, num_downloads
    with pytest.raises(ConnectionError, match=f"plain://bucket/videos/a.mp4' cannot be reached: {error}"):
        encode_dataset(vae, "plain://bucket/videos", tmp_path, **options)
    assert PlainFileSystem.num_downloads == 0 and [path.name for path in tmp_path.iterdir()] == ["settings.json"]
    PlainFileSystem.error = None
    assert len(encode_dataset(vae, "plain://bucket/videos", tmp_path, **options)) == 6


def test_a_lost_connection_is_no_bad_example_of_a_stream(videos: Path, tmp_path: Path):
    datasets = pytest.importorskip("datasets", reason="datasets is an optional dependency")
    upload(videos, "plain://bucket/videos")
    names = ("plain://bucket/videos/a.mp4", "plain://bucket/none.mp4", "nowhere://a.mp4", None)
    rows = [{"mp4": {"bytes": None, "path": name}} for name in names]
    reader = BlockReader(datasets.Dataset.from_list(rows).to_iterable_dataset(), 4, tmp_path, seed=0)
    PlainFileSystem.error = RuntimeError("connection lost")
    with pytest.raises(ConnectionError, match="plain://bucket/videos/a.mp4' cannot be reached: connection lost"):
        reader.fetch(0)
    PlainFileSystem.error = None
    reader = BlockReader(datasets.Dataset.from_list(rows).to_iterable_dataset(), 4, tmp_path, seed=0)
    found = sorted(path.read_bytes() for path in reader.fetch(0).iterdir() if path.name != "metadata.jsonl")
    assert found == [b"", b"", b"", (videos / "a.mp4").read_bytes()]


def test_a_bad_video_at_a_url_is_named_by_it(vae, videos: Path, tmp_path: Path):
    upload(videos, "memory://bucket/videos")
    write_whole(open_path("memory://bucket/videos/bad.mp4"), b"nothing")
    with pytest.warns(UserWarning, match="Skipping a video: Cannot read 'memory:///bucket/videos/bad.mp4' as a video"):
        encode_dataset(vae, "memory://bucket/videos", tmp_path, clip_size=(5, 16, 24))


@pytest.mark.parametrize("protocol", ["memory", "plain"])
def test_a_url_without_a_latent_may_be_begun_anew(protocol: str, vae, videos: Path, local: LatentFolder):
    url = f"{protocol}://bucket/there"
    with pytest.warns(UserWarning, match="Skipping"), pytest.raises(ValueError, match="at least one usable clip"):
        encode_dataset(vae, str(videos), url, clip_size=(5, 320, 32))
    assert contents(url) == {}
    write_json(open_path(f"{url}/settings.json"), {"seed": 1})
    assert torch.equal(encode_dataset(vae, "shapes", url, **OPTIONS)[0].latents, local[0].latents)


def test_a_file_that_a_web_server_forbids_is_missing(tmp_path: Path):
    place = open_path("plain://bucket/a.mp4")
    for status in (403, 500):
        PlainFileSystem.error = RuntimeError("sorry")
        PlainFileSystem.error.status = status  # type: ignore[attr-defined]  # as aiohttp's errors have it
        with pytest.raises(FileNotFoundError if status == 403 else ConnectionError, match="a.mp4' cannot be .*sorry"):
            place.download(tmp_path / "a.mp4")


def test_a_look_that_fails_does_not_take_a_file_for_missing(vae, monkeypatch: pytest.MonkeyPatch):
    """Else the settings of finished latents would be replaced by those of others."""
    url = "plain://bucket/there"
    encode_dataset(vae, "shapes", url, **OPTIONS)
    before, info, errors = contents(url), PlainFileSystem.info, [RuntimeError("connection lost")]

    def fail_once(file_system: Any, path: str, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return info(file_system, path, **options)

    monkeypatch.setattr(PlainFileSystem, "info", fail_once)
    with pytest.raises(ConnectionError, match="settings.json' cannot be reached: connection lost"):
        encode_dataset(vae, "shapes", url, **OPTIONS | {"seed": 4})
    assert errors == [] and contents(url) == before


def test_captions_at_a_url_are_read_once(videos: Path, monkeypatch: pytest.MonkeyPatch):
    url = "plain://bucket/videos"
    upload(videos, url)
    there, here = open_source(url), open_source(videos)
    PlainFileSystem.store.clear()
    assert [there.metadata(number) for number in range(3)] == [here.metadata(number) for number in range(3)]
    upload(videos, url)
    monkeypatch.setattr(PlainFileSystem, "cat_file", partial(fail, RuntimeError("connection lost")))
    with pytest.raises(ConnectionError, match="plain://bucket/videos/a.txt' cannot be reached: connection lost"):
        open_source(url)


def fail(error: Exception, *_: Any, **options: Any) -> None:
    raise error


@pytest.mark.parametrize("source", ["memory://bucket/videos", "{videos}", "ffs:{videos}", "shapes"])
def test_opened_clips_can_be_sent(source: str, videos: Path):
    """As those of Ray are, to every reader."""
    upload(videos, "memory://bucket/videos")
    size = [5, 16, 16]
    clips = open_clip_list(ClipSelection(source.format(videos=videos), size, stride=1, num_clips=3))
    sent = pickle.loads(pickle.dumps(clips))
    for ours, theirs in zip(clips.read(range(3)), sent.read(range(3)), strict=True):
        assert ours is not None and torch.equal(ours.pixels, theirs.pixels) and ours[1:] == theirs[1:]


def test_folders_at_a_url_without_videos_are_named():
    for name in ("metadata.csv", "metadata.jsonl"):
        write_whole(open_path(f"memory://two/{name}"), b'{"file": 1}')
    write_whole(open_path("memory://bad/metadata.jsonl"), b'{"file": 1}')
    write_whole(open_path("memory://tars/000.tar"), b"")
    for name, message in (
        ("none", "`train` must be a folder of videos, or tar files .*, got no video in 'memory:///none'"),
        ("tars", "`train` must be a folder of videos, or tar files such as 's3://bucket/{000..003}.tar', where it is"),
        ("two", "`train` must hold one metadata file, got metadata.csv and metadata.jsonl in 'memory:///two'"),
        (
            "bad",
            "must give a `file_name` in every row, got the columns file in line 1 of 'memory:///bad/metadata.jsonl'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            open_training_data(f"memory://{name}", batch_size=1)


def test_paths():
    assert open_path("a/b") == Path("a/b") and open_path(Path("a")) == Path("a")
    assert open_path("file:///a/b") == Path("/a/b")
    path = open_path("memory://bucket/a.b/c.tar")
    assert isinstance(path, RemotePath)
    assert (str(path), path.name, path.suffix) == ("memory:///bucket/a.b/c.tar", "c.tar", ".tar")
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        path.read_bytes()
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.exists() and path.read_text() == "two"
    cached = open_path("filecache::memory://bucket/a.b/c.tar")  # a file system whose name holds "file"
    assert isinstance(cached, RemotePath) and cached.exists() and cached.read_text() == "two"


def open_store_without_its_package() -> None:
    sys.modules.update({"s3fs": None})
    try:
        open_path("s3://bucket/latents")
    except ImportError as error:
        print(error)


def test_urls_that_cannot_be_reached_are_named():
    with pytest.raises(ValueError, match="A URL must have a protocol of fsspec, got 'nowhere://a'"):
        open_path("nowhere://a")
    # Of the packages for stores none is needed here, and some may be there: they are hidden from a fresh process.
    _, out, err = Piped(open_store_without_its_package).communicate()
    assert out == b"'s3://bucket/latents' cannot be reached without another package: Install s3fs to access S3.\n", err

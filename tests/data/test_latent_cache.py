"""Latent caches: what encoding on the way would give, the same files whoever writes them and however often killed."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_runs import contents, launch_runs
from tiny import make_tiny
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from diffusers_leanvae.cli import app
from diffusers_leanvae.data import latent_cache
from diffusers_leanvae.data.clip_lists import CHECKSUMS, ClipSelection, open_clip_list
from diffusers_leanvae.data.latent_cache import encode_dataset
from diffusers_leanvae.data.latent_samples import LatentData
from diffusers_leanvae.data.latent_shards import LatentFolder, serialize_shard
from diffusers_leanvae.data.named import open_named_dataset
from diffusers_leanvae.data.scenes import MovingScenes
from diffusers_leanvae.data.shapes import CLASS_NAMES, MovingShapes
from diffusers_leanvae.latents import encode_batch
from diffusers_leanvae.video_io import write_video


SIZE = {"clip_size": (5, 16, 24), "shard_size": 4, "batch_size": 3}


def encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    return encode_batch(vae, pixels[None])[0]


@pytest.fixture(scope="module")
def vae(make_model) -> Any:
    return make_model()


@pytest.fixture(scope="module")
def cache(vae, tmp_path_factory: pytest.TempPathFactory) -> LatentFolder:
    return encode_dataset(vae, "shapes", tmp_path_factory.mktemp("cache"), num_clips=10, seed=3, **SIZE)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos and a file that is none, with labels and captions."""
    folder = tmp_path_factory.mktemp("videos")
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        frames = torch.randint(0, 256, (9, 20, 32, 3), generator=generator, dtype=torch.uint8)
        write_video(folder / f"{number}.mkv", frames, fps=8, codec="ffv1")
    (folder / "3.mkv").write_bytes(b"nothing")
    rows = [{"file_name": f"{n}.mkv", "label": "even" if n % 2 == 0 else "odd", "text": f"no {n}"} for n in range(4)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_cached_latents_match_online_encoding(cache: LatentFolder, vae):
    clips = MovingShapes(5, 16, 24, seed=3, num_clips=10)
    assert len(cache) == 10 and cache.class_names == CLASS_NAMES
    for index, clip in enumerate(clips[index] for index in range(10)):
        item = cache[index]
        assert (item.class_label, item.captions) == (clip.class_label, (clip.caption,))
        assert cache.name(index) == f"shapes-3#{index}"
        assert item.latents.shape == (4, 2, 2, 3) and item.latents.dtype == torch.float32
        # Batches of 3 there and of 1 here: the same up to the rounding of sums.
        torch.testing.assert_close(item.latents, encode(vae, clip.pixels), rtol=0, atol=1.5e-5)
    with pytest.raises(IndexError):
        cache[10]


@pytest.mark.parametrize("family", ["wfvae", "ivvae"])
def test_latents_of_any_autoencoder(family: str, tmp_path: Path):
    sibling = make_tiny(family)
    cache = encode_dataset(sibling, "shapes", tmp_path, num_clips=2, seed=3, **SIZE)
    clips = MovingShapes(5, 16, 24, seed=3, num_clips=2)
    assert len(cache) == 2 and cache.settings["vae"]["class"] == type(sibling).__name__
    for index in range(2):
        # A batch of 2 there and of 1 here, of order 1 (measured: 4e-6).
        expected = encode(sibling, clips[index].pixels)
        torch.testing.assert_close(cache[index].latents, expected, rtol=0, atol=1.5e-5)


def test_statistics_index_and_settings_of_the_folder(cache: LatentFolder):
    latents = torch.stack([cache[index].latents for index in range(10)]).double().transpose(0, 1).flatten(1)
    assert cache.statistics["num_items"] == 10
    np.testing.assert_allclose(cache.statistics["mean"], latents.mean(1), rtol=0, atol=1e-9)
    np.testing.assert_allclose(cache.statistics["std"], latents.std(1, correction=0), rtol=0, atol=1e-9)
    assert cache.index["num_captions"] == 10
    assert cache.index["shape"] == [4, 2, 2, 3] and (cache.index["num_skipped"], cache.index["skipped"]) == (0, [])
    assert [shard["num_items"] for shard in cache.index["shards"]] == [4, 4, 2]
    assert (
        cache.settings["vae"]["config"]["latent_channels"] == 4 and len(cache.settings["vae"]["weights_sha256"]) == 64
    )
    assert sorted(path.name for path in cache.path.iterdir()) == [
        "index.json",
        *(f"latents-0000{number}.safetensors" for number in range(3)),
        "settings.json",
        "statistics.json",
    ]


def test_training_reads_it_in_workers_and_in_memory(cache: LatentFolder):
    read = [item.latents[0] for item in DataLoader(cache, num_workers=1)]
    assert all(torch.equal(latents, cache[index].latents) for index, latents in enumerate(read))
    for gib in (0.0, 1.0):
        data = LatentData(cache, has_latents=True, has_labels=True, in_memory_gib=gib)
        batch = data.__getitems__([0, 1, 2])
        orders = [data.order(index) for index in range(3)]
        assert torch.equal(batch.videos, torch.stack([cache[index].latents for index in orders]))
        assert batch.class_labels is not None
        assert batch.class_labels.tolist() == [cache[index].class_label for index in orders]


def test_captions_of_cached_scenes_are_those_drawn_on_the_fly(vae, tmp_path: Path):
    size = {**SIZE, "clip_size": (5, 48, 48)}
    options = {"num_clips": 4, "num_captions": 3, "seed": 5, **size}
    cached = encode_dataset(vae, "scenes", tmp_path / "cache", **options)
    tar = encode_dataset(vae, "scenes", tmp_path / "tar", file_format="webdataset", **options)
    scenes = MovingScenes(5, 48, 48, seed=5, num_clips=4, num_captions=3)
    assert len(set(cached.captions(0))) == 3
    for index in range(4):
        captions = tuple(scenes.captions(index))
        assert cached[index].captions == cached.captions(index) == tar.captions(index) == captions
    with tarfile.open(tmp_path / "tar" / "latents-00000.tar") as archive:
        text = archive.extractfile("00000-00002.txt").read().decode()  # pyright: ignore[reportOptionalMemberAccess]
    assert tuple(text.split("\n")) == cached.captions(2)

    drawn = LatentData(scenes, has_latents=False, has_captions=True, seed=1)
    by_index: dict[int, set[str]] = {index: set() for index in range(4)}
    for gib in (0.0, 1.0):
        data = LatentData(cached, has_latents=True, has_captions=True, seed=1, in_memory_gib=gib)
        for start in range(0, 80, 8):
            indices = range(start, start + 8)
            captions = data.__getitems__(indices).captions
            assert captions is not None and (start or captions == drawn.__getitems__(indices).captions)
            for index, caption in zip(indices, captions, strict=True):
                by_index[data.order(index)].add(caption)
        assert data.__getitems__([7, 3]).captions == [data.__getitems__([index]).captions[0] for index in (7, 3)]  # pyright: ignore[reportOptionalSubscript]
        (first,) = data.first(4, 4)
        assert first.captions == [scenes[index].caption for index in range(4)]
    assert all(found == set(scenes.captions(index)) for index, found in by_index.items())  # each gets its turn
    assert LatentData(cached, has_latents=True).__getitems__([0]).captions is None
    batch = next(iter(DataLoader(data, batch_sampler=data.batches(2, 0, 1), num_workers=1, collate_fn=lambda b: b)))
    assert batch.captions == data.__getitems__([0, 1]).captions


def test_captions_must_be_known(vae, videos: Path, tmp_path: Path):
    (tmp_path / "videos").mkdir()
    for number in range(2):
        (tmp_path / "videos" / f"{number}.mkv").write_bytes((videos / f"{number}.mkv").read_bytes())
    (tmp_path / "videos" / "0.txt").write_text("one\n")
    latents = encode_dataset(vae, str(tmp_path / "videos"), tmp_path / "cache", **SIZE)
    assert [latents.captions(index) for index in range(2)] == [("one",), ()]
    with pytest.raises(ValueError, match="`captions` must be known of every item, got none for item 1"):
        LatentData(latents, has_latents=True, has_captions=True)
    with pytest.raises(ValueError, match="`num_images` must be 0 with `has_captions`, got 2"):
        LatentData(latents, has_latents=True, has_captions=True, num_images=2)
    settings = json.loads((latents.path / "settings.json").read_text())
    (latents.path / "settings.json").write_text(json.dumps(settings | {"version": 1}))
    with pytest.raises(ValueError, match="`path` must hold latents of version 2, got version 1"):
        LatentFolder(latents.path)


def test_captions_of_videos_that_stand_in_for_others(videos: Path, tmp_path: Path):
    for number in (0, 2):
        (tmp_path / f"{number}.mkv").write_bytes((videos / f"{number}.mkv").read_bytes())
        (tmp_path / f"{number}.txt").write_text(f"no {number}")
    (tmp_path / "1.mkv").write_bytes(b"nothing")
    items = open_named_dataset("videofolder", tmp_path, 5, 16, sample_stride=1)
    data = LatentData(items, has_latents=False, has_captions=True)
    with pytest.warns(UserWarning, match="Skipping a video"):
        batch = data.__getitems__(range(3))
    captions = {0: "no 0", 1: "no 2", 2: "no 2"}
    assert batch.captions == [captions[data.order(index)] for index in range(3)] and batch.num_skipped == 1


def test_two_processes_and_a_killed_run_write_the_same_files(cache: LatentFolder, vae, tmp_path: Path):
    vae.save_pretrained(tmp_path / "model")
    launch_runs(tmp_path, "shapes", {"num_clips": 10, "seed": 3, **SIZE}, fatal="latents-00002")
    expected = contents(tmp_path / "one")
    assert expected.keys() == contents(cache.path).keys()
    for index, item in enumerate(LatentFolder(tmp_path / "one")):  # type: ignore[arg-type]
        torch.testing.assert_close(item.latents, cache[index].latents, rtol=0, atol=1.5e-5)
    assert contents(tmp_path / "two") == expected

    before = contents(tmp_path / "before")
    assert "latents-00001.safetensors" in before and "latents-00002.safetensors" not in before
    assert "index.json" not in before and any("partial" in name for name in before)
    with pytest.raises(ValueError, match="`path` must be a finished folder of `leanvae encode-dataset`, got"):
        LatentFolder(tmp_path / "before")
    assert contents(tmp_path / "killed") == expected
    times = [(tmp_path / name / "latents-00001.safetensors").stat().st_mtime_ns for name in ("before", "killed")]
    assert times[0] == times[1]  # what was whole is not written again


def test_other_settings_are_refused(cache: LatentFolder, make_model, vae):
    before = contents(cache.path)
    for model, options, message in (
        (vae, {"seed": 4}, "`seed` was 3 and is now 4"),
        (vae, {"seed": 3, "dtype": "float16"}, "`dtype` was 'float32' and is now 'float16'"),
        (make_model(seed=1), {"seed": 3}, "`vae` was .* and is now"),
    ):
        with pytest.raises(ValueError, match=f"`output` must be a new folder, or one begun with .*{message}"):
            encode_dataset(model, "shapes", cache.path, num_clips=10, **SIZE, **options)
    assert contents(cache.path) == before


def interrupt(folder: Path, shard: str) -> None:
    """Leave what a run leaves that is killed before it writes a shard."""
    for name in ("index.json", "statistics.json", shard):
        (folder / name).unlink()


@pytest.mark.parametrize("kind", ["folder", "listed", "tar", "ffs", "videofolder"])
def test_other_clips_are_refused(kind: str, vae, videos: Path, tmp_path: Path):
    """Else those that changed their place in the list would be lost, or be there twice."""
    folder, options = tmp_path / "videos", {**SIZE, "clip_size": (5, 16, 16), "shard_size": 1, "stride": 1}
    folder.mkdir()
    for number in range(3):
        (folder / f"v{number}.mkv").write_bytes((videos / f"{number}.mkv").read_bytes())
    source = {"tar": f"{folder}/0.tar", "folder": f"{folder}", "listed": f"{folder}"}.get(kind, f"{kind}:{folder}")

    def write_list(caption: str = "no 0", label: str = "even") -> None:
        names = sorted(path.name for path in folder.glob("*.mkv"))
        rows = [{"file_name": name, "caption": f"no {n}", "label": "odd"} for n, name in enumerate(names)]
        rows[0] |= {"caption": caption, "label": label}
        if kind == "listed":
            (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if kind == "tar":
            with tarfile.open(folder / "0.tar", "w") as archive:
                for name, row in zip(names, rows, strict=True):
                    archive.add(folder / name, name)
                    content = json.dumps({"caption": row["caption"]}).encode()
                    member = tarfile.TarInfo(f"{name.partition('.')[0]}.json")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        if kind in ("folder", "videofolder"):
            for row in rows:
                (folder / row["file_name"]).with_suffix(".txt").write_text(row["caption"])

    write_list()
    whole = encode_dataset(vae, source, tmp_path / "cache", **options)
    expected = contents(whole.path)
    interrupt(whole.path, "latents-00001.safetensors")
    (folder / "v0.mkv").rename(folder / "w0.mkv")
    write_list()
    with pytest.raises(ValueError, match="`output` must be a new folder, .*`clip_names_sha256` was '.*' and is now"):
        encode_dataset(vae, source, whole.path, **options)
    (folder / "w0.mkv").rename(folder / "v0.mkv")
    if kind != "ffs":
        write_list("another caption")
        with pytest.raises(ValueError, match="where `clip_captions_sha256` was '.*' and is now"):
            encode_dataset(vae, source, whole.path, **options)
    if kind == "listed":
        write_list(label="odd")
        with pytest.raises(ValueError, match="where `clip_labels_sha256` was '.*' and is now"):
            encode_dataset(vae, source, whole.path, **options)
    write_list()
    encode_dataset(vae, source, whole.path, **options)
    assert contents(whole.path) == expected

    # A folder of an earlier version, which says nothing of names.
    settings = {key: value for key, value in whole.settings.items() if key not in CHECKSUMS}
    (whole.path / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    assert len(LatentFolder(whole.path)) == 3
    interrupt(whole.path, "latents-00002.safetensors")
    assert len(encode_dataset(vae, source, whole.path, **options)) == 3
    assert {**contents(whole.path), "settings.json": b""} == {**expected, "settings.json": b""}


def test_only_the_clips_that_are_taken_are_compared(vae, videos: Path, tmp_path: Path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.mkv").write_bytes((videos / f"{number}.mkv").read_bytes())
    cache = encode_dataset(vae, str(folder), tmp_path / "cache", num_clips=3, num_crops=2, **SIZE)
    expected = contents(cache.path)
    (folder / "2.mkv").rename(folder / "3.mkv")
    interrupt(cache.path, "latents-00000.safetensors")
    encode_dataset(vae, str(folder), cache.path, num_clips=3, num_crops=2, **SIZE)
    assert contents(cache.path) == expected


def test_a_folder_without_a_latent_may_be_begun_anew(vae, videos: Path, tmp_path: Path):
    cache, expected = tmp_path / "cache", tmp_path / "expected"
    options = {"num_clips": 3, **SIZE, "shard_size": 2}
    with pytest.warns(UserWarning, match="Skipping a video"), pytest.raises(ValueError, match="usable clip, got none"):
        encode_dataset(vae, str(videos), cache, **options | {"clip_size": (5, 320, 32)})
    assert not cache.exists()
    encode_dataset(vae, str(videos), expected, **options)
    for name, file_format in (("killed", "safetensors"), ("tar", "webdataset")):  # earlier versions left such shards
        encode_dataset(vae, str(videos), cache, **options | {"seed": 1, "file_format": file_format})
        for path in cache.iterdir():
            if path.name.startswith("latents-"):
                path.write_bytes(serialize_shard(torch.empty(0, 4, 2, 2, 3), [], "00000", file_format))
            elif path.name != "settings.json":
                path.unlink()
        encode_dataset(vae, str(videos), cache, **options)
        assert contents(cache) == contents(expected), name
        shutil.rmtree(cache)
    encode_dataset(vae, str(videos), cache, **options)
    interrupt(cache, "latents-00001.safetensors")
    before = contents(cache)
    with pytest.raises(ValueError, match="one begun with the same settings, got .*`seed` was 0 and is now 1"):
        encode_dataset(vae, str(videos), cache, **options | {"seed": 1})
    (cache / "latents-00000.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="one begun with the same settings, got .*`seed` was 0 and is now 1"):
        encode_dataset(vae, str(videos), cache, **options | {"seed": 1})
    assert contents(cache) == {**before, "latents-00000.safetensors": b"damaged"}


def test_a_run_whose_settings_were_replaced_ends(vae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = {"num_clips": 3, **SIZE, "shard_size": 2}
    encode_batch_of, is_first = latent_cache.encode_batch, [True]

    def begin_another_first(*arguments: Any) -> Any:
        if is_first.pop() if is_first else False:
            encode_dataset(vae, "shapes", tmp_path, seed=4, **options)
        return encode_batch_of(*arguments)

    monkeypatch.setattr(latent_cache, "encode_batch", begin_another_first)
    with pytest.raises(ValueError, match="one begun with the same settings, got .*`seed` was 4 and is now 3"):
        encode_dataset(vae, "shapes", tmp_path, seed=3, **options)
    assert LatentFolder(tmp_path).name(2) == "shapes-4#2"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_damaged_settings_are_named(content: bytes, cache: LatentFolder, vae, tmp_path: Path):
    shutil.copytree(cache.path, tmp_path, dirs_exist_ok=True)
    for name in ("settings.json", "index.json", "statistics.json"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"`path` must be a finished folder of .*{tmp_path / name}'") as error:
            LatentFolder(tmp_path)
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match=f"{tmp_path / name}'"):
            encode_dataset(vae, "shapes", tmp_path, num_clips=10, seed=3, **SIZE)
        shutil.copy(cache.path / name, tmp_path)
    (tmp_path / "index.json").write_text('{"shards": [1], "class_names": null}')
    with pytest.raises(ValueError, match=f"`path` must hold a sound index, got '{tmp_path / 'index.json'}'"):
        LatentFolder(tmp_path)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="`path` must hold latents of version 2, got version None"):
        LatentFolder(tmp_path)


def test_float16_and_webdataset(cache: LatentFolder, vae, tmp_path: Path):
    options = {"num_clips": 10, "seed": 3, "dtype": "float16", "file_format": "webdataset", **SIZE}
    half = encode_dataset(vae, "shapes", tmp_path, **options)
    for index in range(10):
        assert torch.equal(half[index].latents, cache[index].latents.half().float())
        assert half[index][1:] == cache[index][1:] and half.name(index) == cache.name(index)
    with tarfile.open(tmp_path / "latents-00001.tar") as archive:
        names = archive.getnames()
        content = {name: archive.extractfile(name).read() for name in names}  # pyright: ignore[reportOptionalMemberAccess]
    assert names[:4] == ["00001-00000.npy", "00001-00000.json", "00001-00000.cls", "00001-00000.txt"]
    array = np.load(io.BytesIO(content["00001-00000.npy"]))
    assert array.dtype == np.float16 and np.array_equal(array, cache[4].latents.half().numpy())
    assert content["00001-00000.cls"] == str(cache[4].class_label).encode()
    assert (content["00001-00000.txt"].decode(),) == cache[4].captions
    with torch.no_grad():
        vae = type(vae).from_config(vae.config)
        for parameter in vae.parameters():
            parameter.fill_(1e6)
    with pytest.raises(ValueError, match="`dtype` .`--save-dtype`. must hold the latents, got float16, in which some"):
        encode_dataset(vae, "shapes", tmp_path / "large", num_clips=1, dtype="float16", **SIZE)


def test_crops_and_mirrors_of_a_folder(vae, videos: Path, tmp_path: Path):
    options = {"num_crops": 2, "stride": 2, "seed": 7, **SIZE}
    with pytest.warns(UserWarning, match="Skipping a video"):
        both = encode_dataset(vae, str(videos), tmp_path / "both", flip="both", **options)
    assert both.index["num_skipped"] == 2 and both.index["skipped"] == ["3.mkv#0", "3.mkv#1"]
    assert len(both) == 12 and both.class_names == ("even", "odd")
    assert [both[index].class_label for index in range(0, 12, 4)] == [0, 1, 0]
    assert [both.name(index) for index in range(4)] == ["0.mkv#0", "0.mkv#0#mirrored", "0.mkv#1", "0.mkv#1#mirrored"]
    assert both[6].captions == ("no 1",)
    clips = open_clip_list(ClipSelection(str(videos), SIZE["clip_size"], num_crops=2, flip="both", stride=2, seed=7))
    for number, clip in enumerate(clips.read(range(6))):
        assert clip is not None and clip.pixels.dtype == torch.uint8
        for mirrored, pixels in enumerate((clip.pixels, clip.pixels.flip(-1))):
            item = both[2 * number + mirrored]
            torch.testing.assert_close(item.latents, encode(vae, pixels), rtol=0, atol=1.5e-5)
    assert not torch.equal(both[0].latents, both[2].latents)  # two crops
    with pytest.warns(UserWarning, match="Skipping a video"):
        plain = encode_dataset(vae, str(videos), tmp_path / "plain", num_workers=1, **options)
        random = encode_dataset(vae, str(videos), tmp_path / "random", flip="random", **options)
    assert len(plain) == len(random) == 6
    same = [torch.equal(plain[index].latents, random[index].latents) for index in range(6)]
    assert any(same) and not all(same)
    assert all(torch.allclose(plain[n].latents, both[2 * n].latents, rtol=0, atol=1.5e-5) for n in range(6))


def test_tar_shards_and_streams(vae, videos: Path, tmp_path: Path):
    with tarfile.open(tmp_path / "000.tar", "w") as archive:
        for number in range(3):
            archive.add(videos / f"{number}.mkv", f"{number}.mkv")
            member = tarfile.TarInfo(f"{number}.cls")
            member.size = 1
            archive.addfile(member, io.BytesIO(b"7"))
    tar = encode_dataset(vae, str(tmp_path / "*.tar"), tmp_path / "tar", seed=5, **SIZE)
    with pytest.warns(UserWarning, match="Skipping a video"):
        folder = encode_dataset(vae, str(videos), tmp_path / "folder", seed=5, **SIZE)
    for index in range(3):
        assert torch.equal(tar[index].latents, folder[index].latents) and tar[index].class_label == 7

    clean = tmp_path / "clean"
    clean.mkdir()
    rows = [{"file_name": f"{number}.mkv", "label": number, "caption": f"no {number}"} for number in range(3)]
    for number in range(3):
        (clean / f"{number}.mkv").write_bytes((videos / f"{number}.mkv").read_bytes())
    (clean / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = encode_dataset(vae, f"hub:{clean}", tmp_path / "stream", num_clips=6, num_crops=2, **SIZE)
    assert sorted({(stream[index].class_label, stream[index].captions) for index in range(6)}) == [
        (number, (f"no {number}",)) for number in range(3)
    ]
    assert not torch.equal(stream[0].latents, stream[1].latents)  # two crops of one video
    with pytest.raises(ValueError, match="`num_clips` must be given for a stream, got None"):
        encode_dataset(vae, f"hub:{clean}", tmp_path / "other", **SIZE)


def test_named_data_sets(vae, videos: Path, tmp_path: Path):
    for number, name in enumerate(("Swing", "Archery", "Swing")):
        (tmp_path / "ucf" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "ucf" / name / f"{number}.mkv").write_bytes((videos / f"{number}.mkv").read_bytes())
    source, options = f"ucf101:{tmp_path / 'ucf'}", {**SIZE, "clip_size": (5, 16, 16), "stride": 2, "num_crops": 2}
    cached = encode_dataset(vae, source, tmp_path / "cache", sampling="reference", seed=1, **options)
    clips = open_named_dataset("ucf101", tmp_path / "ucf", 5, 16, "reference", seed=1, sample_stride=2, num_draws=2)
    assert cached.class_names == ("Archery", "Swing") and len(cached) == 6
    for index in range(6):
        clip = clips[index]
        assert cached[index].class_label == clip.class_label == int(index >= 2)
        torch.testing.assert_close(cached[index].latents, encode(vae, clip.pixels), rtol=0, atol=1.5e-5)


def test_bad_files_of_tar_shards_streams_and_named_data_sets(vae, videos: Path, tmp_path: Path):
    good = [(videos / f"{number}.mkv").read_bytes() for number in range(2)]
    contents = [good[0], b"nothing", good[0][:200], good[1]]
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number, content in enumerate(contents):
            member = tarfile.TarInfo(f"{number}.mkv")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (tmp_path / "ffs").mkdir()
    for number, content in enumerate(contents):
        (tmp_path / "ffs" / f"{number}.mkv").write_bytes(content)
    size = {**SIZE, "clip_size": (5, 16, 16), "stride": 1}
    for number, (source, prefix, options) in enumerate(
        (
            (f"{tmp_path}/*.tar", f"{tmp_path}/0.tar/", {}),
            (f"ffs:{tmp_path / 'ffs'}", "", {"flip": "none"}),
            ((tmp_path / "0.tar").as_uri(), "", {"num_clips": 4}),
        )
    ):
        with pytest.warns(UserWarning, match="Skipping a video") as caught:
            found = encode_dataset(vae, source, tmp_path / f"cache-{number}", **size, **options)
        name = (f"{tmp_path}/0.tar/1.mkv", f"{tmp_path}/ffs/1.mkv", f"{tmp_path}/0.tar/1")[number]
        said = [text for warning in caught if (text := str(warning.message)).startswith("Skipping")]
        assert any(f"{name}'" in text for text in said) and not any("leanvae-" in text for text in said), said
        is_stream = source.startswith("file:")
        skipped = [f"{bad}#0" if is_stream else f"{prefix}{bad}.mkv#0" for bad in (1, 2)]
        assert len(found) == 2 and found.index["num_skipped"] == 2 and found.index["skipped"] == skipped


def test_unusable_videos_of_a_named_data_set_are_counted(videos: Path, tmp_path: Path):
    for number in range(3):
        (tmp_path / f"{2 * number}.mkv").write_bytes((videos / f"{number}.mkv").read_bytes())
    for number in (1, 3):
        (tmp_path / f"{number}.mkv").write_bytes(b"nothing")
    items = open_named_dataset("ffs", tmp_path, 5, 16, sample_stride=1, flip=False)
    data = LatentData(items, has_latents=False)
    with pytest.warns(UserWarning, match="Skipping a video"):
        held_out = list(data.first(5, 1))
    assert [batch.index.tolist() for batch in held_out] == [[0], [2], [4]]  # no other stands in for them
    assert [batch.num_skipped for batch in held_out] == [0, 1, 1]
    with pytest.warns(UserWarning, match="Skipping a video"):
        (held_out,) = data.first(5, 8)
    assert held_out.index.tolist() == [0, 2, 4] and held_out.num_skipped == 2
    with pytest.warns(UserWarning, match="Skipping a video"):
        batch = data.__getitems__(range(5))  # in training the next one does
    assert len(batch.videos) == 5 and batch.num_skipped == 2


def test_bad_arguments_are_named(vae, videos: Path, tmp_path: Path):
    for source, options, message in (
        ("shapes", {"clip_size": (5, 16)}, r"`clip_size` must be \[num_frames, height, width\], got \[5, 16\]"),
        ("shapes", {"clip_size": (6, 16, 16)}, r"`clip_size` must be .*, got \[6, 16, 16\]"),
        ("shapes", {"flip": "both"}, "`flip` and `num_crops` must be 'none' and 1 for shapes"),
        ("shapes", {"flip": "yes"}, "`flip` must be one of 'auto', 'none', 'random', 'both', got 'yes'"),
        ("shapes", {"dtype": "int8"}, r"`dtype` must be one of 'float32' \(fp32\), 'float16' \(fp16\), got 'int8'"),
        ("shapes", {"file_format": "zip"}, "`file_format` must be one of 'safetensors', 'webdataset', got 'zip'"),
        ("shapes", {"shard_size": 0}, "`shard_size` must be at least 1, got 0"),
        ("shapes", {"num_clips": 0}, "`num_clips` must be at least 1, got 0"),
        (f"ffs:{videos}", {}, "`clip_size` must be square and `short_side` None for ffs"),
        ("nowhere", {}, "`train` must be a folder of videos"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_dataset(vae, source, tmp_path / "bad", **{**SIZE, "num_clips": 2, **options})
        assert not (tmp_path / "bad").exists(), message
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "0.mkv").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="Skipping"), pytest.raises(ValueError, match="at least one usable clip"):
        encode_dataset(vae, str(tmp_path / "none"), tmp_path / "empty", **SIZE)
    assert not (tmp_path / "empty").exists()
    (tmp_path / "file").write_bytes(b"something")
    for output in (tmp_path / "file", tmp_path / "file" / "sub" / "folder"):
        with pytest.raises(
            ValueError, match=f"^`output` must lead to a folder .* got '{output}': '.*/file' is a file"
        ):
            encode_dataset(vae, "shapes", output, num_clips=2, **SIZE)
    assert (tmp_path / "file").read_bytes() == b"something"


def test_on_the_command_line(cache: LatentFolder, vae, tmp_path: Path):
    vae.save_pretrained(tmp_path / "model")
    arguments = ["encode-dataset", "shapes", tmp_path / "out", "--model", tmp_path / "model", "--clip-size", "5x16x24"]
    arguments += ["--num-clips", 10, "--seed", 3, "--shard-size", 4, "--batch-size", 3]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0 and "10 latents of 4 x 2 x 2 x 3" in result.stdout, result.output
    assert contents(tmp_path / "out") == contents(cache.path)
    result = CliRunner().invoke(app, ["encode-dataset", "shapes", str(tmp_path / "out"), "--clip-size", "5x16"])
    assert result.exit_code == 1 and "`--clip-size` must be FRAMESxHEIGHTxWIDTH" in result.stderr
    result = CliRunner().invoke(app, ["encode-dataset", "shapes", str(tmp_path / "out"), "--save-dtype", "bf16"])
    assert result.exit_code == 1 and "error: `--save-dtype` must be one of 'float32' (fp32)" in result.stderr
    result = CliRunner().invoke(app, ["encode-dataset", "shapes", str(tmp_path / "out"), "--seed", "-1"])
    assert result.exit_code == 2 and "--seed" in result.stderr
    (tmp_path / "file").touch()
    arguments[2] = tmp_path / "file"
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 1 and "error: `output` must lead to a folder to write to" in result.stderr

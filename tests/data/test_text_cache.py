"""Text embeddings beside latents: what encoding on the way would give, each text once, however they were written."""

import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_runs import contents, launch_runs
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from diffusers_leanvae.cli import app
from diffusers_leanvae.data import text_cache
from diffusers_leanvae.data.latent_cache import encode_dataset
from diffusers_leanvae.data.latent_samples import LatentData
from diffusers_leanvae.data.latent_shards import LatentFolder
from diffusers_leanvae.data.scenes import MovingScenes
from diffusers_leanvae.data.text_cache import check_text_encoder
from diffusers_leanvae.text_encoders import TextEncoder, load_text_encoder, make_text_encoder
from diffusers_leanvae.video_io import write_video


pytest.importorskip("transformers", reason="transformers is an optional dependency")

LENGTH = 40
OPTIONS = {
    "clip_size": (5, 48, 48),
    "num_clips": 5,
    "num_captions": 3,
    "seed": 5,
    "shard_size": 2,
    "text_max_length": LENGTH,
}


def save_encoder(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    scenes = MovingScenes(5, 48, 48, num_clips=200)
    small = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    made = make_text_encoder((text for index in range(200) for text in scenes.captions(index)), small, LENGTH)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"), seed=0)


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> TextEncoder:
    return load_text_encoder(encoder_folder, max_length=LENGTH)


@pytest.fixture(scope="module")
def vae(make_model) -> Any:
    return make_model()


@pytest.fixture(scope="module")
def cache(vae, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentFolder:
    folder = tmp_path_factory.mktemp("cache")
    return encode_dataset(vae, "scenes", folder, text_encoder=encoder_folder, **OPTIONS)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    for number in range(2):
        frames = torch.full((5, 16, 16, 3), 40 * number, dtype=torch.uint8)
        write_video(tmp_path / "videos" / f"{number}.mkv", frames, fps=8, codec="ffv1")
    return tmp_path / "videos"


def test_cached_embeddings_match_encoding_on_the_fly(cache: LatentFolder, encoder: TextEncoder):
    scenes = MovingScenes(5, 48, 48, seed=5, num_clips=5, num_captions=3)
    for index in range(5):
        texts = scenes.captions(index)
        assert cache.captions(index) == tuple(texts)
        for number in range(3):
            cached, (embeds, mask) = cache.text(index, number), encoder([texts[number]])
            assert torch.equal(cached.mask, mask) and cached.mask.dtype == mask.dtype
            assert 10 < mask.sum() < LENGTH and (cached.embeds[mask == 0] == 0).all()
            # Encoded six at a time there and alone here, which other processors may round otherwise (values to 2.8).
            torch.testing.assert_close(cached.embeds[mask == 1], embeds[mask == 1], rtol=0, atol=3e-6)
            assert embeds[mask == 1].std() > 0.1
    null, (embeds, mask) = cache.null_text, encoder([""])
    assert null is not None and torch.equal(null.mask, mask) and null.mask.sum() == 1
    torch.testing.assert_close(null.embeds[mask == 1], embeds[mask == 1], rtol=0, atol=3e-6)
    with pytest.raises(IndexError):
        cache.text(5)


def test_training_gets_the_embeddings_of_the_captions_it_gets(cache: LatentFolder, encoder: TextEncoder):
    for gib in (0.0, 1.0):
        data = LatentData(cache, has_latents=True, has_captions=True, seed=1, in_memory_gib=gib)
        loader = DataLoader(data, batch_sampler=data.batches(4, 0, 3), num_workers=1, collate_fn=lambda batch: batch)
        for number, batch in enumerate(loader):
            again = data.__getitems__(range(4 * number, 4 * number + 4))
            assert batch.captions == again.captions and torch.equal(batch.text.embeds, again.text.embeds)
            embeds, mask = encoder(batch.captions)
            assert torch.equal(batch.text.mask, mask)
            torch.testing.assert_close(batch.text.embeds[mask == 1], embeds[mask == 1], rtol=0, atol=3e-6)
        (first,) = data.first(2, 2)
        assert first.captions == [cache.captions(index)[0] for index in range(2)] and first.text is not None
        assert torch.equal(first.text.embeds, torch.cat([cache.text(index).embeds for index in range(2)]))
    assert LatentData(cache, has_latents=True).__getitems__([0]).text is None


def test_embeddings_are_not_read_where_they_are_not_wanted(cache: LatentFolder, monkeypatch: pytest.MonkeyPatch):
    wanted, unwanted = (LatentData(cache, True, has_captions=True, has_text=has_text) for has_text in (True, False))
    expected = wanted.__getitems__(range(4))
    assert expected.text is not None
    monkeypatch.setattr(LatentFolder, "text", None)  # which may not be called
    batch, (first,) = unwanted.__getitems__(range(4)), unwanted.first(2, 2)
    assert batch.text is first.text is None and batch.captions == expected.captions
    assert torch.equal(batch.videos, expected.videos)


def test_files_hold_tokens_only_and_every_text_once(vae, videos: Path, encoder_folder: Path, tmp_path: Path):
    (videos / "0.txt").write_text("a red circle\na blue square\n")
    (videos / "1.txt").write_text("a blue square\n")
    options = {"clip_size": (5, 16, 16), "num_crops": 2, "flip": "both", "text_max_length": 8}
    cached = encode_dataset(vae, str(videos), tmp_path / "cache", text_encoder=encoder_folder, **options)
    assert len(cached) == 8
    stored = load_file(tmp_path / "cache" / "texts-00000.safetensors")
    assert stored["ends"].tolist() == [4, 8] and stored["embeds"].shape == (8, 16)  # three words and the end
    assert stored["embeds"].dtype == torch.float32
    assert torch.equal(cached.text(0, 1).embeds, cached.text(7).embeds)
    assert not torch.equal(cached.text(0, 0).embeds, cached.text(0, 1).embeds)
    assert cached.text_settings is not None and cached.text_settings["source"] == str(encoder_folder)
    assert (cached.text_settings["max_length"], cached.text_settings["width"]) == (8, 16)


@pytest.mark.parametrize("kind", ["CLIPTextModel", "Qwen2Model"])
def test_other_kinds_of_text_encoders(kind: str, vae, encoder: TextEncoder, tmp_path: Path):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {
        "num_key_value_heads": 2,
        "vocab_size": len(encoder.tokenizer),
        "eos_token_id": 1,
        "max_position_embeddings": LENGTH,
    }
    model_class = getattr(transformers, kind)
    model_class(model_class.config_class(**sizes)).save_pretrained(tmp_path / "encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "encoder")
    options = OPTIONS | {"num_clips": 2, "text_encoder": tmp_path / "encoder"}
    cached = encode_dataset(vae, "scenes", tmp_path / "cache", **options)
    other = load_text_encoder(tmp_path / "encoder", max_length=LENGTH)
    assert type(other.model).__name__ == kind
    for text, captions in ((cached.text(1, 2), [cached.captions(1)[2]]), (cached.null_text, [""])):
        embeds, mask = other(captions)
        assert text is not None and torch.equal(text.mask, mask) and embeds[mask == 1].std() > 0.1
        torch.testing.assert_close(text.embeds[mask == 1], embeds[mask == 1], rtol=0, atol=3e-6)


def test_embeddings_may_come_later_and_in_another_dtype(cache: LatentFolder, vae, encoder_folder, tmp_path: Path):
    plain = encode_dataset(vae, "scenes", tmp_path, **OPTIONS | {"text_max_length": None})
    assert plain.text_settings is plain.null_text is None
    with pytest.raises(ValueError, match="`path` must hold text embeddings, got none in"):
        plain.text(0)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    encode_dataset(vae, "scenes", tmp_path, text_encoder=encoder_folder, **OPTIONS)
    assert contents(tmp_path) == contents(cache.path)
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in times.items())
    encode_dataset(vae, "scenes", tmp_path, **OPTIONS | {"text_max_length": None})  # leaves them where they are
    assert LatentFolder(tmp_path).text_settings == cache.text_settings

    for name in [path.name for path in tmp_path.glob("text*")]:
        (tmp_path / name).unlink()
    half = encode_dataset(vae, "scenes", tmp_path, text_encoder=encoder_folder, text_dtype="bf16", **OPTIONS)
    embeds, expected = half.text(2, 1).embeds, load_text_encoder(encoder_folder, torch.bfloat16, max_length=LENGTH)
    assert embeds.dtype == torch.bfloat16
    found = expected(half.captions(2) + half.captions(3))  # all texts of the shard, as they were encoded
    kept = found.mask[1] == 1
    assert torch.equal(found.embeds[1][kept], embeds[0][kept])
    torch.testing.assert_close(embeds.float(), cache.text(2, 1).embeds, rtol=0, atol=0.07)  # measured 0.046


def test_two_processes_and_a_killed_run_write_the_same_files(
    cache: LatentFolder, vae, encoder_folder: Path, tmp_path: Path
):
    vae.save_pretrained(tmp_path / "model")
    launch_runs(tmp_path, "scenes", OPTIONS | {"text_encoder": str(encoder_folder)}, fatal="texts-00001")
    expected = contents(tmp_path / "one")
    assert expected.keys() == contents(cache.path).keys() >= {"texts-00002.safetensors", "text_null.safetensors"}
    assert contents(tmp_path / "two") == expected

    before = contents(tmp_path / "before")
    assert "texts-00000.safetensors" in before and "texts-00001.safetensors" not in before
    assert "text_index.json" not in before and any("partial" in name for name in before)
    assert LatentFolder(tmp_path / "before").text_settings is None  # the latents are whole
    assert contents(tmp_path / "killed") == expected
    times = [(tmp_path / name / "texts-00000.safetensors").stat().st_mtime_ns for name in ("before", "killed")]
    assert times[0] == times[1]  # what was whole is not written again


def test_another_text_encoder_is_refused(cache: LatentFolder, vae, encoder_folder: Path, tmp_path: Path):
    before = contents(cache.path)
    other = save_encoder(tmp_path / "other", seed=1)
    for options, message in (
        ({"text_encoder": other}, "`weights_sha256` was .* and is now"),
        ({"text_encoder": encoder_folder, "text_max_length": 20}, "`max_length` was 40 and is now 20"),
        ({"text_encoder": encoder_folder, "text_dtype": "bfloat16"}, "`dtype` was 'float32' and is now 'bfloat16'"),
    ):
        with pytest.raises(ValueError, match=f"`text_encoder` must be the one that the embeddings in .*{message}"):
            encode_dataset(vae, "scenes", cache.path, **OPTIONS | options)
    assert contents(cache.path) == before


def test_a_text_encoder_that_encoded_nothing_may_be_replaced(
    cache: LatentFolder, vae, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As one that failed at the first text."""
    other, options = save_encoder(tmp_path / "other", seed=1), {**OPTIONS, "text_encoder": encoder_folder}
    folder, encode = tmp_path / "cache", text_cache._encode

    def fail(*_: Any) -> Any:
        raise ValueError("not finite")

    monkeypatch.setattr(text_cache, "_encode", fail)
    with pytest.raises(ValueError, match="not finite"):
        encode_dataset(vae, "scenes", folder, **options | {"text_encoder": other})
    assert (folder / "text_settings.json").exists()

    def begin_another_first(*arguments: Any) -> Any:
        monkeypatch.setattr(text_cache, "_encode", encode)
        encode_dataset(vae, "scenes", folder, **options)
        return encode(*arguments)

    monkeypatch.setattr(text_cache, "_encode", begin_another_first)
    with pytest.raises(ValueError, match="`text_encoder` must be the one that the embeddings in .*got another"):
        encode_dataset(vae, "scenes", folder, **options | {"text_encoder": other})
    assert contents(folder) == contents(cache.path)


@pytest.mark.parametrize("content", [b"{", b"[]"])
def test_damaged_settings_are_named(content: bytes, cache: LatentFolder, vae, encoder_folder: Path, tmp_path: Path):
    shutil.copytree(cache.path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "text_settings.json").write_bytes(content)
    for call in (
        lambda: encode_dataset(vae, "scenes", tmp_path, text_encoder=encoder_folder, **OPTIONS),
        lambda: LatentFolder(tmp_path),
    ):
        with pytest.raises(ValueError, match=f"{tmp_path / 'text_settings.json'}'"):
            call()


def test_weights_are_read_only_where_they_can_be_compared(
    cache: LatentFolder, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = cache.text_settings
    assert settings is not None
    check_text_encoder(load_text_encoder(encoder_folder, max_length=LENGTH), settings)
    other = save_encoder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="`text.encoder` must be the one of the stored .*, whose `weights_sha256` is"):
        check_text_encoder(load_text_encoder(other, max_length=LENGTH), settings)
    half = load_text_encoder(encoder_folder, torch.bfloat16, max_length=LENGTH)
    monkeypatch.setattr(text_cache, "checksum_of_weights", None)  # which may not be called
    check_text_encoder(half, settings)


def test_bad_arguments_are_named(vae, videos: Path, encoder_folder: Path, tmp_path: Path):
    size = {"clip_size": (5, 16, 16)}
    for options, message in (
        ({"text_max_length": 8}, "`text_max_length` must be None without `text_encoder`, got 8"),
        ({"text_encoder": encoder_folder, "text_dtype": "int8"}, "`text_dtype` must be one of .*, got 'int8'"),
        ({"text_encoder": tmp_path / "nothing"}, "`text_encoder` cannot be loaded: .*nothing"),
        ({"text_encoder": encoder_folder, "text_max_length": 4000}, "`text_encoder` cannot be loaded: .*got 4000.$"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_dataset(vae, str(videos), tmp_path / "bad", **size, **options)
        assert not (tmp_path / "bad").exists(), message


def test_clips_without_captions_are_refused(vae, videos: Path, encoder_folder: Path, tmp_path: Path):
    options = {"clip_size": (5, 16, 16), "stride": 1, "text_encoder": encoder_folder}
    message = "`text_encoder` must be None where no clip has a caption, as in"
    for number, source in enumerate((str(videos), f"videofolder:{videos}")):  # known before anything is done
        with pytest.raises(ValueError, match=f"{message} '{source}'"):
            encode_dataset(vae, source, tmp_path / f"{number}", **options)
        assert not (tmp_path / f"{number}").exists()
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.add(videos / "0.mkv", "0.mkv")
    with pytest.raises(ValueError, match=f"{message} '{tmp_path / 'stream'}'"):  # known when it was read
        encode_dataset(vae, (tmp_path / "0.tar").as_uri(), tmp_path / "stream", num_clips=1, **options)
    assert LatentFolder(tmp_path / "stream").text_settings is None
    assert not list((tmp_path / "stream").glob("texts-*"))


def test_embeddings_at_a_url(cache: LatentFolder, vae, encoder_folder, copies: Path):
    url = "memory://texts"
    remote = encode_dataset(vae, "scenes", url, text_encoder=encoder_folder, **OPTIONS)
    assert remote.text_settings == cache.text_settings and remote.null_text is not None
    for index in range(5):
        for ours, theirs in zip(remote.text(index, 2), cache.text(index, 2), strict=True):
            assert torch.equal(ours, theirs)
    assert len([path for path in copies.rglob("texts-*") if path.is_file()]) == 3


def test_on_the_command_line(cache: LatentFolder, vae, encoder_folder: Path, tmp_path: Path):
    vae.save_pretrained(tmp_path / "model")
    arguments = ["encode-dataset", "scenes", tmp_path / "out", "--model", tmp_path / "model", "--clip-size", "5x48x48"]
    arguments += ["--num-clips", 5, "--num-captions", 3, "--seed", 5, "--shard-size", 2]
    arguments += ["--text-encoder", encoder_folder, "--text-max-length", LENGTH]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0 and "5 latents of 4 x 2 x 6 x 6" in result.stdout, result.output
    assert contents(tmp_path / "out") == contents(cache.path)

"""Whatever a file is that people have, training, caches and scores go on, and say what they left out."""

import io
import random
import struct
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from patterns import drifting_pattern
from PIL import Image

from diffusers_leanvae.data import encode_dataset, open_training_data, read_center_clip
from diffusers_leanvae.evaluation.protocols import Protocol
from diffusers_leanvae.evaluation.reconstruction import evaluate_reconstruction
from diffusers_leanvae.evaluation.reconstructors import AutoencoderReconstructor
from diffusers_leanvae.video_io import write_video


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG of that size, with the pixels of a small one."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def mutate(content: bytes, other: bytes, kind: int, rng: random.Random) -> bytes:
    """Flip bits, cut off the end, or put the beginning of another file on."""
    if kind == 0:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 10, 100))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 1:
        return content[: rng.randrange(len(content))]
    start = rng.randrange(1, 400)
    return other[:start] + content[start:]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of many kinds: odd sizes and rates, stills, animations."""
    folder = tmp_path_factory.mktemp("good")
    for name, shape, fps in (("a.mp4", (12, 34, 50), 24), ("b.mkv", (9, 41, 33), 7.3), ("c.mov", (6, 40, 48), 120)):
        write_video(
            folder / name, drifting_pattern(*shape, seed=0)[:, : shape[1] // 2 * 2, : shape[2] // 2 * 2], fps=fps
        )
    still = drifting_pattern(1, 47, 39, seed=1)[0].numpy()
    for name in ("d.png", "e.jpg", "f.webp", "g.tif"):
        Image.fromarray(still).save(folder / name)
    frames = [Image.fromarray(frame.numpy()) for frame in drifting_pattern(7, 40, 40, seed=2)]
    frames[0].save(folder / "h.gif", save_all=True, append_images=frames[1:], duration=40)
    return folder


@pytest.fixture(scope="module")
def mutated(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("mutated"), random.Random(14)
    paths = sorted(good.iterdir())
    contents = [path.read_bytes() for path in paths]
    for number in range(48):
        which = number % len(paths)
        content = mutate(contents[which], rng.choice(contents), number % 3, rng)
        (folder / f"{number:02d}{paths[which].suffix}").write_bytes(content)
    (folder / "huge.png").write_bytes(png_header(100_000, 100_000))
    (folder / "sound.mp4").write_bytes(contents[0])
    return folder


def test_sizes_rates_stills_and_animations_train(good: Path):
    data = open_training_data(str(good), batch_size=2, clip_sizes=[[5, 32, 32]], image_ratio=0.5, cache_gib=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clips = [data[index] for index in range(64)]
    assert {clip.video for clip in clips if clip.pixels.shape[1] == 1} == set(range(8))
    assert {clip.video for clip in clips if clip.pixels.shape[1] == 5} == {0, 1, 2, 7}


@pytest.mark.parametrize("cache_gib", [0, 1])
def test_mutated_files_end_no_training(mutated: Path, cache_gib: float):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = open_training_data(
            str(mutated), batch_size=2, clip_sizes=[[5, 32, 32]], image_ratio=0.5, cache_gib=cache_gib
        )
        clips = [data[index] for index in range(80)]
    assert {clip.pixels.shape[1:] for clip in clips} == {(5, 32, 32), (1, 32, 32)}
    said = [str(warning.message) for warning in caught]
    assert said and all(text.startswith("Skipping a ") and "\n" not in text for text in said)
    assert sum("huge.png' claims" in text or "100000x100000" in text for text in said) == 1
    assert 0 < data.num_skipped < len(list(mutated.iterdir()))


def test_mutated_files_end_no_evaluation_and_no_cache(make_model, mutated: Path, tmp_path: Path):
    vae, num_files = make_model(), len(list(mutated.iterdir()))
    result = evaluate_reconstruction(AutoencoderReconstructor(vae, "tiny"), mutated, Protocol("tiny", 5, 32))
    assert len(result.clips) + len(result.failed) == num_files and "sound.mp4" in result.clips
    assert all("\n" not in reason for reason in result.failed.values()) and "huge.png" in result.failed
    with pytest.warns(UserWarning, match="Skipping"):
        cache = encode_dataset(vae, str(mutated), tmp_path / "cache", clip_size=(5, 32, 32))
    assert len(cache) + cache.index["num_skipped"] == num_files
    assert "huge.png#0" in cache.index["skipped"] and len(cache.index["skipped"]) == cache.index["num_skipped"]


def test_what_is_transparent_is_white(tmp_path: Path):
    picture = Image.new("RGBA", (40, 40), (255, 0, 0, 0))  # red that nobody sees
    picture.paste((0, 0, 255, 255), (0, 0, 40, 20))
    content = io.BytesIO()
    picture.save(content, "png")
    (tmp_path / "a.png").write_bytes(content.getvalue())
    data = open_training_data(str(tmp_path), batch_size=1, clip_sizes=[[1, 40, 40]], flip=False)
    pixels = data[0].pixels
    assert torch.equal(pixels[:, 0, 20:].unique(dim=1), torch.full((3, 1, 40), 255, dtype=torch.uint8))
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 255]
    assert read_center_clip(tmp_path / "a.png", 1, 40)[:, 0, -1, 0].tolist() == [1.0, 1.0, 1.0]

"""Moving shapes: clips that are what their label says, by a detector that knows nothing of how they were drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_leanvae import bundled
from diffusers_leanvae.data.shapes import (
    CLASS_NAMES,
    NUM_CLASSES,
    MovingShapes,
    caption,
    class_label,
    class_parts,
    draw_clip,
    write_shapes,
)
from diffusers_leanvae.evaluation.shapes_detector import detect
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.video_io import read_video, write_video
from diffusers_leanvae.video_io.pixels import sample_to_pixels


def test_classes_are_numbered_by_shape_color_and_direction():
    assert NUM_CLASSES == 36 == len(set(CLASS_NAMES))
    assert [class_label(*class_parts(label)) for label in range(NUM_CLASSES)] == list(range(NUM_CLASSES))
    assert class_parts(0) == ("circle", "red", "left") and class_parts(35) == ("cross", "blue", "down")
    assert caption(class_label("triangle", "yellow", "up")) == "a yellow triangle moving up"
    assert CLASS_NAMES[class_label("triangle", "yellow", "up")] == "yellow triangle up"
    with pytest.raises(ValueError, match="`shape` must be one of 'circle', 'triangle', 'cross', got 'square'"):
        class_label("square", "red", "left")
    with pytest.raises(ValueError, match="`label` must be from 0 to 35, got 36"):
        class_parts(36)


def test_a_clip_follows_from_seed_index_and_class():
    clip = draw_clip(7, 5, 24, 40, seed=3, index=11)
    assert clip.shape == (3, 5, 24, 40) and clip.dtype == torch.float32
    assert -1 <= clip.min() < -0.2 and 0.4 < clip.max() <= 1
    assert torch.equal(clip, draw_clip(7, 5, 24, 40, seed=3, index=11))
    for other in ({"seed": 4, "index": 11}, {"seed": 3, "index": 12}):
        assert (clip - draw_clip(7, 5, 24, 40, **other)).abs().max() > 0.1
    assert draw_clip(0, 1, 16, 16).shape == (3, 1, 16, 16)
    for arguments, message in (
        ((0, 0), "`num_frames` must be at least 1, got 0"),
        ((0, 5, 8, 64), "`height` and `width` must be at least 16, got 8 and 64"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_clip(*arguments)


def test_edges_are_antialiased_and_the_shape_stays_inside():
    for label in (0, 13, 26):
        clip = draw_clip(label, 17, 64, 64, seed=1)
        borders = torch.cat([clip[:, :, edge] for edge in (0, -1)] + [clip[:, :, :, edge] for edge in (0, -1)])
        assert borders.std(dim=1).max() < 0.35  # a background does not move, and what touches the border barely does
        frame = clip[:, 0].amax(0)  # backgrounds end at -0.2, shapes begin at 0.6
        covered, between = (frame > 0.2).sum().item(), ((frame > -0.1) & (frame < 0.5)).sum().item()
        assert 250 < covered < 650 and 10 < between < 100, (covered, between)


def test_every_36_clips_show_every_class_in_a_new_order():
    shapes = MovingShapes(5, 16, 16, seed=0, num_clips=72)
    labels = [shapes.label(index) for index in range(72)]
    assert sorted(labels[:36]) == sorted(labels[36:]) == list(range(36)) and labels[:36] != labels[36:]
    batch = next(iter(DataLoader(shapes, batch_size=4)))
    assert batch.pixels.shape == (4, 3, 5, 16, 16) and batch.class_label.tolist() == labels[:4]
    assert list(batch.caption) == [caption(label) for label in labels[:4]]
    assert torch.equal(batch.pixels[2], draw_clip(labels[2], 5, 16, 16, seed=0, index=2))
    assert len(shapes) == 72
    with pytest.raises(IndexError):
        shapes[72]
    with pytest.raises(ValueError, match="`num_clips` must be at least 1, got 0"):
        MovingShapes(num_clips=0)


@pytest.mark.parametrize(
    ("num_clips", "size"), [(400, (17, 64, 64)), (36, (9, 64, 96)), (36, (33, 48, 40)), (36, (5, 128, 128))]
)
def test_the_detector_names_what_was_drawn(num_clips: int, size: tuple[int, int, int]):
    shapes = MovingShapes(*size, seed=123, num_clips=num_clips)
    assert [detect(clip.pixels).class_label for clip in map(shapes.__getitem__, range(num_clips))] == [
        shapes.label(index) for index in range(num_clips)
    ]


@pytest.mark.parametrize("name", bundled.MODELS)
def test_the_bundled_autoencoders_keep_the_class(name: str):
    vae = AutoencoderKLLeanVAE.from_pretrained(bundled.model_path(name)).eval()
    shapes = MovingShapes(seed=7, num_clips=36)
    for clip in map(shapes.__getitem__, range(36)):
        with torch.no_grad():
            sample = vae.decode(vae.encode(clip.pixels[None]).latent_dist.mode()).sample[0]
        assert detect(sample).class_label == clip.class_label, clip.caption


def test_the_detector_follows_what_is_done_to_a_clip():
    clip = draw_clip(class_label("triangle", "red", "left"), seed=2)
    assert detect(clip)[:3] == ("triangle", "red", "left")
    assert detect(clip.flip(1)).direction == "right"  # backwards in time
    assert detect(clip.flip(3)).direction == "right"  # mirrored
    assert detect(clip.transpose(2, 3)).direction == "up"
    assert detect(clip.flip(0))[:3] == ("triangle", "blue", "left")  # red and blue exchanged
    noisy = clip + 0.1 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    assert detect(noisy)[:3] == ("triangle", "red", "left")


def test_the_detector_says_nothing_where_nothing_is_clear():
    clip = draw_clip(class_label("circle", "blue", "down"), seed=2)
    assert detect(clip[:, :1].repeat(1, 17, 1, 1)) == ("circle", "blue", None, None)  # does not move
    assert detect(clip[:, :1])[2:] == (None, None)  # one frame
    assert detect(clip.mean(0, keepdim=True).repeat(3, 1, 1, 1)) == (None, None, None, None)  # grey
    assert detect(clip[[0, 2, 1]]).color is None  # green
    assert detect(torch.full((3, 17, 64, 64), 0.3)) == (None, None, None, None)
    halves = torch.cat([clip[..., ::2], draw_clip(class_label("circle", "blue", "down"), seed=3)[..., ::2]], dim=3)
    assert detect(halves).shape is None  # two objects
    for video in (clip[None], clip.to(torch.uint8)):
        with pytest.raises(ValueError, match="`video` must be floating point, of shape"):
            detect(video)


def test_a_clip_always_becomes_the_same_file(tmp_path: Path):
    # A clip of which x264's AVX-512 code made more than ten different files, by what memory had held before.
    frames = sample_to_pixels(MovingShapes(9, 64, 64, seed=4, num_clips=3)[1].pixels).permute(1, 2, 3, 0)
    rng, contents = np.random.default_rng(0), set()
    for _ in range(30):
        # What these leave behind in memory was seen in the file.
        remains = [torch.randn(size) for size in rng.integers(1_000, 300_000, rng.integers(7)).tolist()]
        del remains
        write_video(tmp_path / "clip.mp4", frames, fps=8, crf=12)
        contents.add((tmp_path / "clip.mp4").read_bytes())
    assert len(contents) == 1


def test_clips_become_a_folder_of_videos_and_a_killed_call_resumes(tmp_path: Path):
    shapes = MovingShapes(9, 64, 64, seed=4, num_clips=3)
    write_shapes(tmp_path, shapes)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["000000.mp4", "000001.mp4", "000002.mp4"]
    for index, row in enumerate(rows):
        assert row["label"] == shapes.label(index) and row["caption"] == shapes[index].caption
        frames, info = read_video(tmp_path / row["file_name"])
        pixels = frames.permute(3, 0, 1, 2) / 127.5 - 1
        assert info.fps == 8 and pixels.shape == (3, 9, 64, 64)
        assert (pixels - shapes[index].pixels).abs().mean() < 0.03
        assert detect(pixels).class_label == row["label"]
    first, second = tmp_path / "000000.mp4", tmp_path / "000001.mp4"
    content, before = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    (tmp_path / "metadata.jsonl").unlink()
    write_shapes(tmp_path, shapes)
    assert second.read_bytes() == content and first.stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(row["file_name"] for row in rows), "metadata.jsonl"]

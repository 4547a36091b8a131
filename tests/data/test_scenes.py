"""Moving scenes: clips and captions are what they say, by a detector that knows nothing of how they were drawn."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_leanvae.data.clip_lists import ClipSelection, open_clip_list
from diffusers_leanvae.data.scenes import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    HELD_OUT,
    RELATIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    MovingScenes,
    Scene,
    SceneObject,
    describe_scene,
    draw_scene,
    write_scenes,
)
from diffusers_leanvae.evaluation.scenes_detector import ObjectDetection, SceneDetection, count_matches, detect_scene
from diffusers_leanvae.video_io import read_video


CIRCLE = SceneObject("circle", "red", "large", "left", "fast")
SQUARE = SceneObject("square", "blue", "small", "down", "slow")
SCENE = Scene(CIRCLE, SQUARE, "above", "gray")


def as_detected(scene: Scene) -> SceneDetection:
    first, second = (
        ObjectDetection(item.shape, item.color, item.size, item.direction, item.speed)
        for item in (scene.first, scene.second)
    )
    return SceneDetection(first, second, scene.relation, scene.background)


# Few of each kind are drawn always, and enough for a share of them where there is time.
@pytest.mark.parametrize(
    ("num_clips", "size", "held_out"),
    [
        *((8, size, held_out) for size in ((17, 64, 64), (9, 64, 112)) for held_out in (False, True)),
        *((4, size, held_out) for size, held_out in (((17, 96, 96), False), ((33, 80, 56), True))),
        pytest.param(100, (17, 96, 96), False, marks=pytest.mark.slow),
        pytest.param(60, (17, 64, 64), True, marks=pytest.mark.slow),
        pytest.param(30, (9, 64, 112), False, marks=pytest.mark.slow),
        pytest.param(30, (33, 80, 56), True, marks=pytest.mark.slow),
    ],
)
def test_the_detector_names_everything_that_was_drawn(num_clips: int, size: tuple[int, int, int], held_out: bool):
    scenes = MovingScenes(*size, seed=123, num_clips=num_clips, held_out=held_out)
    right = [detect_scene(scenes[index].pixels) == as_detected(scenes.scene(index)) for index in range(num_clips)]
    assert sum(right) >= 0.99 * num_clips


def test_a_clip_follows_from_scene_seed_and_index():
    clip = draw_scene(SCENE, 5, 48, 64, seed=3, index=11)
    assert clip.shape == (3, 5, 48, 64) and clip.dtype == torch.float32 and -1 <= clip.min() and clip.max() <= 1
    assert torch.equal(clip, draw_scene(SCENE, 5, 48, 64, seed=3, index=11))
    for other in ({"seed": 4, "index": 11}, {"seed": 3, "index": 12}):
        assert (clip - draw_scene(SCENE, 5, 48, 64, **other)).abs().max() > 0.1
    for size, message in (
        ((0, 64, 64), "`num_frames` must be at least 1, got 0"),
        ((5, 40, 64), "`height` and `width` must be at least 48, got 40 and 64"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_scene(SCENE, *size)
    with pytest.raises(ValueError, match="`speed` must be one of 'slow', 'fast', got 'medium'"):
        Scene(replace(CIRCLE, speed="medium"), SQUARE, "above", "gray")
    with pytest.raises(ValueError, match="`relation` must be one of 'above', 'left of', got 'below'"):
        Scene(CIRCLE, SQUARE, "below", "gray")


def test_held_out_objects_appear_only_when_asked_for():
    assert len(HELD_OUT) == 8
    for place, values in enumerate((SHAPES, COLORS, DIRECTIONS)):
        assert [sum(look[place] == value for look in HELD_OUT) for value in values] == [2] * 4
    known, new = (MovingScenes(seed=1, num_clips=500, held_out=held_out) for held_out in (False, True))
    for index in range(500):
        scene = known.scene(index)
        assert not {scene.first.look, scene.second.look} & HELD_OUT
        scene = new.scene(index)
        assert {scene.first.look, scene.second.look} & HELD_OUT
    looks = {item.look for index in range(500) for item in (known.scene(index).first, known.scene(index).second)}
    assert len(looks) == 64 - 8  # all others do appear


def test_every_value_appears_about_equally_often():
    scenes = [MovingScenes(seed=2, num_clips=2000).scene(index) for index in range(2000)]
    objects = [item for scene in scenes for item in (scene.first, scene.second)]
    legal = {"shape": SHAPES, "color": COLORS, "size": SIZES, "direction": DIRECTIONS, "speed": SPEEDS}
    assert legal.keys() == vars(CIRCLE).keys()
    found_and_legal = [([getattr(item, name) for item in objects], values) for name, values in legal.items()]
    found_and_legal += [([scene.relation for scene in scenes], RELATIONS)]
    found_and_legal += [([scene.background for scene in scenes], BACKGROUNDS)]
    for found, values in found_and_legal:
        for value in values:
            assert 0.8 < found.count(value) * len(values) / len(found) < 1.2


def read_caption(caption: str, scene: Scene) -> None:
    """Assert that a caption says nothing wrong, and names shape, colour, direction and place of both objects."""
    text = caption.rstrip(".").lower()
    clauses = re.split(r"\b(?:above|over|below|under|to the left of|to the right of)\b", text)
    found = [set(re.findall(r"[a-z]+", clause)) for clause in clauses]
    relation = re.search(r"\b(above|over|below|under|to the left of|to the right of)\b", text)
    assert relation is not None
    swapped = relation[0] in ("below", "under", "to the right of")
    assert ("left of" if "of" in relation[0] else "above") == scene.relation
    if re.search(rf"^(on an? \w+ background, )?{relation[0]}", text):  # "above a ..., a ..."
        halves = text.split(relation[0], 1)[1].split(", ")
        found = [set(re.findall(r"[a-z]+", half)) for half in (halves[1], halves[0])]
    words_one, words_other = found[0], found[-1]
    one, other = (scene.second, scene.first) if swapped else (scene.first, scene.second)
    for item, words in ((one, words_one), (other, words_other)):
        assert {item.shape, item.color, item.direction} <= words, caption
        assert not words & ({*SHAPES} - {item.shape}) and not words & ({*DIRECTIONS} - {item.direction}), caption
        assert not words & ({*SIZES} - {item.size}), caption
        assert not words & ({"slowly"} if item.speed == "fast" else {"quickly", "fast"}), caption
    if "background" in text:
        assert f"{scene.background} background" in text


def test_captions_say_what_is_shown_in_many_ways():
    scenes = MovingScenes(seed=6, num_clips=300)
    for index in range(300):
        for text in scenes.captions(index, 3):
            read_caption(text, scenes.scene(index))
    texts = {describe_scene(SCENE, np.random.default_rng(seed)) for seed in range(300)}
    assert len(texts) > 150
    for named in ("small", "slowly", "background", "it is", "that", "which", "below", "above"):
        share = sum(named in text.lower() for text in texts) / len(texts)
        assert 0.1 < share < 0.95, named
    assert scenes.captions(0, 3)[0] == scenes[0].caption
    assert MovingScenes(5, 48, 48, num_captions=3).captions(0) == MovingScenes(5, 48, 48).captions(0, 3)


def test_matches_are_counted_object_by_object():
    found = as_detected(SCENE)
    assert count_matches(SCENE, found) == (1, 1)
    slower = replace(CIRCLE, speed="slow")
    assert count_matches(replace(SCENE, first=slower), found) == (0, 1)
    assert count_matches(replace(SCENE, first=slower), found, frozenset({"speed"})) == (1, 1)
    assert count_matches(replace(SCENE, first=SQUARE, second=CIRCLE), found) == (0, 0)
    assert count_matches(SCENE, SceneDetection(None, None, None, "gray")) == (0, 0)


def test_the_detector_follows_what_is_done_to_a_clip():
    clip = draw_scene(SCENE, 17, 96, 96, seed=2)
    found = as_detected(SCENE)
    assert detect_scene(clip) == found
    assert found.first is not None and found.second is not None
    backwards = detect_scene(clip.flip(1))
    assert backwards.first == found.first._replace(direction="right")
    assert backwards.second == found.second._replace(direction="up")
    turned = detect_scene(clip.flip(2))  # upside down
    assert (turned.first, turned.second) == (found.second._replace(direction="up"), found.first)
    assert detect_scene(clip.transpose(2, 3)).relation == "left of"
    noisy = clip + 0.05 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    assert detect_scene(noisy) == found


def test_the_detector_says_nothing_where_nothing_is_clear():
    clip = draw_scene(SCENE, 17, 96, 96, seed=2)
    still = detect_scene(clip[:, :1].repeat(1, 17, 1, 1))
    assert still.first == ("circle", "red", "large", None, None)
    assert detect_scene(torch.full((3, 17, 64, 64), -0.2)) == (None, None, None, "gray")
    assert detect_scene(torch.full((3, 17, 64, 64), 1.0)).background is None
    one = clip.clone()
    one[:, :, :48] = one[:, :, :1, :1]
    assert detect_scene(one)[:2] == (None, None)  # one object
    for video in (clip[None], clip.to(torch.uint8)):
        with pytest.raises(ValueError, match="`video` must be floating point, of shape"):
            detect_scene(video)


def test_clips_are_batched_and_bounded():
    scenes = MovingScenes(5, 48, 48, seed=0, num_clips=6)
    batch = next(iter(DataLoader(scenes, batch_size=4)))
    assert batch.pixels.shape == (4, 3, 5, 48, 48) and list(batch.caption) == [scenes[i].caption for i in range(4)]
    assert len(scenes) == 6
    with pytest.raises(IndexError):
        scenes[6]
    with pytest.raises(ValueError, match="`num_clips` must be at least 1, got 0"):
        MovingScenes(num_clips=0)
    with pytest.raises(ValueError, match="`num_captions` must be at least 1, got 0"):
        MovingScenes(num_captions=0)


def test_scenes_are_a_source_of_latents():
    selection = ClipSelection("scenes", (5, 48, 48), num_clips=3, seed=2)
    clips, scenes = list(open_clip_list(selection).read(range(3))), MovingScenes(5, 48, 48, seed=2)
    for index, clip in enumerate(clips):
        assert clip is not None and torch.equal(clip.pixels, scenes[index].pixels)
        assert clip[1:] == (None, (scenes[index].caption,), f"scenes-2#{index}")
    several = ClipSelection("scenes", (5, 48, 48), num_clips=3, seed=2, num_captions=4)
    for index, clip in enumerate(open_clip_list(several).read(range(3))):
        assert clip is not None and clip.captions == tuple(scenes.captions(index, 4)) and len(set(clip.captions)) > 1
    with pytest.raises(ValueError, match="`num_captions` must be 1 for all but scenes, got 2"):
        ClipSelection("shapes", (5, 48, 48), num_captions=2)
    with pytest.raises(ValueError, match="`caption_column` must be None for scenes, .* got 'text'"):
        open_clip_list(ClipSelection("scenes", (5, 48, 48), caption_column="text"))
    with pytest.raises(ValueError, match="must be 'none' and 1 for scenes, .* got 'both' and 1"):
        open_clip_list(ClipSelection("scenes", (5, 48, 48), flip="both"))


def test_clips_become_a_folder_of_videos_and_a_killed_call_resumes(tmp_path: Path):
    scenes = MovingScenes(9, 96, 96, seed=4, num_clips=3)
    write_scenes(tmp_path, scenes, num_captions=2)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["000000.mp4", "000001.mp4", "000002.mp4"]
    for index, row in enumerate(rows):
        assert row["captions"] == scenes.captions(index, 2)
        frames, info = read_video(tmp_path / row["file_name"])
        pixels = frames.permute(3, 0, 1, 2) / 127.5 - 1
        assert info.fps == 8 and detect_scene(pixels) == as_detected(scenes.scene(index))
    first, second = tmp_path / "000000.mp4", tmp_path / "000001.mp4"
    content, before = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    write_scenes(tmp_path, scenes)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == [scenes[index].caption for index in range(3)]
    assert second.read_bytes() == content and first.stat().st_mtime_ns == before

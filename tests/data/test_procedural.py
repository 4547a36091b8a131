"""Procedural footage: every kind shows what it claims, and its share of the training clips is exact."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_leanvae.data import Clip, ClipDataset, StepSchedule, open_training_data
from diffusers_leanvae.data.procedural import (
    BACKGROUNDS,
    OVERLAYS,
    READOUT_SHARE,
    Footage,
    Shot,
    compose,
    draw_footage,
    draw_shot,
    film,
    plan_footage,
)


SIZE = (17, 48, 64)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, 9])


def draw_many(name: str, count: int, size: tuple[int, int, int] = SIZE) -> Iterator[np.ndarray]:
    """Backgrounds of a kind as levels, or what overlays of a kind cover."""
    for seed in range(count):
        yield draw_shot(Shot(name), rng(seed), size) if name in BACKGROUNDS else OVERLAYS[name](rng(seed), size)


def changes(frames: np.ndarray) -> list[int]:
    """The frames that differ from the one before; time is the last but two axis."""
    moved = np.abs(np.diff(frames, axis=-3)).max(axis=(-2, -1))
    return (np.flatnonzero(moved.max(axis=0) if moved.ndim == 2 else moved) + 1).tolist()


# --- All of it -------------------------------------------------------------------------------------------------------


def test_a_clip_follows_from_seed_index_and_size():
    clips = [draw_footage(SIZE, seed=3, index=index) for index in range(40)]
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    torch.set_num_threads(2)
    again = [draw_footage(SIZE, seed=3, index=index) for index in reversed(range(40))]
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(clips, reversed(again), strict=True))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
    assert not any(torch.equal(clip, draw_footage(SIZE, 4, index)) for index, clip in enumerate(clips))
    assert len({clip.numpy().tobytes() for clip in clips}) == 40


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 16, 16), (2, 3, 5), (5, 32, 24), (33, 40, 16)])
def test_any_size_will_do(size: tuple[int, int, int]):
    for index in range(60):
        clip = draw_footage(size, index=index)
        assert clip.shape == (3, *size) and clip.dtype == torch.uint8 and clip.is_contiguous()
        assert size[0] > 1 or plan_footage(np.random.default_rng([0, 6, index]), 1).change is None
    with pytest.raises(ValueError, match=r"`size` must be three numbers from 1, got \(5, 0, 16\)"):
        draw_footage((5, 0, 16))


def test_every_kind_occurs():
    plans = [plan_footage(rng(seed), 17) for seed in range(2200)]
    readouts = [plan for plan in plans if plan.shots[0].has_readout]
    assert len(readouts) == pytest.approx(2200 * READOUT_SHARE, abs=95)  # four deviations, like those below
    assert all(plan.shots[0].overlays == () and plan.change is None and not plan.has_fade for plan in readouts)
    assert {plan.shots[0].background for plan in readouts} == set(BACKGROUNDS)
    assert sum(plan.has_grain for plan in readouts) == pytest.approx(0.2 * len(readouts), abs=56)
    plans = [plan for plan in plans if plan not in readouts]
    shots = [shot for plan in plans for shot in plan.shots]
    backgrounds = Counter(shot.background for shot in shots)
    overlays = Counter(name for shot in shots for name in shot.overlays)
    assert set(backgrounds) == set(BACKGROUNDS) and min(backgrounds.values()) > 150  # of about 1400 in six kinds
    assert set(overlays) == set(OVERLAYS) and min(overlays.values()) > 250  # of about 1330 in four kinds
    assert {len(shot.overlays) for shot in shots} == {0, 1, 2}
    counts = Counter(plan.change for plan in plans)
    assert (counts["cut"], counts["dissolve"]) == (pytest.approx(300, abs=45), pytest.approx(100, abs=30))
    assert all((plan.change is None) == (len(plan.shots) == 1) for plan in plans)
    assert sum(plan.has_fade for plan in plans) == pytest.approx(200, abs=40)
    assert sum(plan.has_grain for plan in plans) == pytest.approx(300, abs=45)


def test_levels_use_the_whole_range_and_pure_colours_stay_pure():
    clips = torch.stack([draw_footage((5, 32, 32), index=index) for index in range(200)])
    pure = ((clips == 0) | (clips == 255)).float().mean(dim=(1, 2, 3, 4))
    assert (pure == 1).any() and (pure > 0.9).sum() > 10 and (pure < 0.1).sum() > 20, pure
    assert (clips.amax(dim=(1, 2, 3, 4)) > 200).float().mean() > 0.8


def test_readouts_change_in_most_frames_and_most_are_on_a_plate():
    counts, shares = [], []
    for seed in range(100):
        plain, levels = (draw_shot(Shot("flat", has_readout=has), rng(seed), SIZE) for has in (False, True))
        counts.append(len(changes(levels)))
        stays = (levels == levels[:, :1]).all(axis=(0, 1))
        shares.append(((levels != plain).any(axis=0)[0] & stays).mean())
    # Of 16; a number is held for three frames at most, but digits may be outside or of the background's colour.
    assert sum(count >= 5 for count in counts) >= 90 and sum(count == 16 for count in counts) >= 45
    assert sum(share > 0.3 for share in shares) >= 40  # letters that stay cover less


# --- Backgrounds -----------------------------------------------------------------------------------------------------


def test_flat_colours_are_flat_and_most_are_pure():
    levels = np.stack(list(draw_many("flat", 90)))
    assert (levels == levels[:, :, :1, :1, :1]).all()
    colors = levels[:, :, 0, 0, 0]
    is_pure = np.isin(colors, (0, 255)).all(axis=1)
    assert 45 < is_pure.sum() < 75 and len(np.unique(colors[is_pure], axis=0)) == 8
    assert (np.ptp(colors[~is_pure], axis=1) > 50).all()  # the others are saturated


def test_gradients_hold_all_between_two_colours_without_a_step():
    num_turning = 0
    for levels in draw_many("gradient", 40):
        reach = np.ptp(levels, axis=(1, 2, 3))  # of each channel
        steps = max(np.abs(np.diff(levels, axis=axis)).max() for axis in (2, 3))
        assert 40 < reach.max() and steps < 255 / 40 and 0 <= levels.min() <= levels.max() <= 255
        assert len(np.unique(levels[reach.argmax(), 0].round())) > 35
        num_turning += bool(changes(levels))
    assert 10 < num_turning < 30


def test_checkerboards_have_cells_of_1_to_16_pixels():
    cells = set()
    for levels in draw_many("checkerboard", 120, (1, 48, 64)):
        board = levels[:, 0]
        (edges,) = np.nonzero((board[:, 0, 1:] != board[:, 0, :-1]).any(axis=0))
        cell = int(np.diff(edges)[0])
        cells.add(cell)
        assert len(np.unique(board.reshape(3, -1), axis=1).T) == 2
        assert (board[:, cell:, cell:] == board[:, :-cell, :-cell]).all()
        assert (board[:, cell:] != board[:, :-cell]).any(axis=0).all()
    assert cells == set(range(1, 17))


def test_checkerboards_move_by_parts_of_a_pixel():
    num_moving = 0
    for levels in draw_many("checkerboard", 40):
        colors = levels[:, 0].reshape(3, -1)
        low, high = colors.min(axis=1)[:, None], colors.max(axis=1)[:, None]
        frames = levels.reshape(3, -1)
        assert ((frames >= low - 1e-3) & (frames <= high + 1e-3)).all()
        num_moving += len(changes(levels)) == 16 and len(np.unique(levels[:, 8].reshape(3, -1), axis=1).T) > 2
    assert 12 < num_moving < 28


def test_patches_are_saturated_colours_next_to_each_other():
    counts, num_pure = [], 0
    for levels in draw_many("patches", 40, (1, 48, 64)):
        colors = np.unique(levels.reshape(3, -1), axis=1).T
        is_pure = np.isin(colors, (0, 255)).all()
        assert is_pure or (np.ptp(colors, axis=1) > 50).all()
        num_pure += is_pure
        counts.append(len(colors))
    assert min(counts) >= 1 and np.median(counts) >= 4 and 15 < num_pure < 38


@pytest.mark.parametrize("name", ["patches", "texture", "page"])
def test_pictures_stand_still_or_move_in_every_frame(name: str):
    moving = [changes(levels) for levels in draw_many(name, 40)]
    assert 4 <= moving.count([]) <= 20
    assert sum(len(frames) == 16 for frames in moving) >= 18


def test_textures_are_soft_or_hard():
    spread = [np.isin(levels.round(), np.unique(levels)[[0, -1]]).mean() for levels in draw_many("texture", 40)]
    details = [np.abs(np.diff(levels, axis=3)).mean() for levels in draw_many("texture", 40)]
    assert min(spread) < 0.05 and max(spread) > 0.4
    assert min(details) < 5 and max(details) > 10 and min(details) > 0.3


def test_a_camera_pans_zooms_and_turns_without_shrinking():
    y, x = np.mgrid[:144, :144].astype(np.float32)
    kinds = Counter()
    for seed in range(80):
        places = film(rng(seed), np.stack((x, y, x)), (9, 48, 48))[:2].astype(np.float64)
        if places.shape[1] == 1:  # stands
            kinds["still"] += 1
            assert (places[:, 0] == np.stack((x, y))[:, :48, :48]).all()
            continue
        along_x = (places[:, :, 24, 34] - places[:, :, 24, 14]) / 20  # of the picture, for a pixel to the right
        along_y = (places[:, :, 34, 24] - places[:, :, 14, 24]) / 20
        scale = np.hypot(*along_x)
        np.testing.assert_allclose(np.hypot(*along_y), scale, rtol=0, atol=1e-5)  # measured: 2e-6
        np.testing.assert_allclose((along_x * along_y).sum(axis=0), 0, rtol=0, atol=1e-5)
        assert 1 / 3 < scale.min() and scale.max() < 1 + 1e-4
        angles = np.degrees(np.arctan2(along_x[1], along_x[0]))
        kinds["zoom"] += bool(np.ptp(scale) > 1e-3)
        kinds["turn"] += bool(np.ptp(angles) > 0.1)
        center = places[:, :, 24, 24]
        ways = np.diff(center, axis=1)
        kinds["pan"] += bool(np.abs(ways).max() > 0.1)
        kinds["part of a pixel"] += bool(np.abs(center[0] - center[0].round()).max() > 0.05)
    assert min(kinds[name] for name in ("still", "zoom", "turn", "pan", "part of a pixel")) >= 8, kinds


# --- Overlays --------------------------------------------------------------------------------------------------------


def test_counters_count_at_any_place_in_a_group_of_four():
    places, most = set(), 0
    for coverage in draw_many("counter", 80):
        frames = changes(coverage)
        assert 0 < coverage.max() <= 1 and frames  # something is shown, and changes
        gaps = np.diff(frames)
        assert len(set(gaps)) <= 1  # evenly
        inside = Counter((frame - 1) // 4 for frame in frames if (frame - 1) % 4)  # groups: 1 to 4, 5 to 8, ...
        places |= {(frame - 1) % 4 for frame in frames}
        most = max(most, *inside.values(), 0)
    assert places == {0, 1, 2, 3} and most == 3


def test_words_run_or_are_replaced():
    num_running = 0
    for coverage in draw_many("words", 60):
        frames, gaps = changes(coverage), np.diff(changes(coverage))
        assert 0 < coverage.max() <= 1 and frames
        num_running += len(frames) == 16
        assert len(frames) == 16 or len(set(gaps)) <= 2  # of a text that runs, frames with gaps alone are the same
    assert 20 <= num_running <= 45


def test_lines_are_thin_antialiased_and_move():
    shares = []
    for coverage in draw_many("lines", 40):
        shares.append((coverage > 0).mean())
        between = ((coverage > 0.01) & (coverage < 0.99)).sum() / max(1, (coverage > 0).sum())
        assert 0 <= coverage.min() and coverage.max() <= 1
        assert shares[-1] < 0.4 and (between > 0.2 or shares[-1] == 0)
        assert shares[-1] < 0.01 or changes(coverage) == list(range(1, 17))
    assert np.median(shares) > 0.03


def test_shapes_move_inside_the_clip():
    for coverage in draw_many("shape", 40):
        assert 0.003 < coverage.mean() < 0.3
        assert coverage[:, [0, -1]].max() < 1 and changes(coverage)


# --- Changes, fades and grain ----------------------------------------------------------------------------------------


FLAT = Shot("flat")


def test_cuts_are_hard_and_at_any_frame():
    cuts = Counter()
    for seed in range(300):
        frames = changes(compose(Footage((FLAT, FLAT), "cut"), rng(seed), (9, 4, 4)).numpy().astype(int))
        assert len(frames) <= 1  # none, where both shots have one colour
        cuts.update(frames)
    assert set(cuts) == set(range(1, 9)) and min(cuts.values()) > 15


def test_dissolves_and_fades_are_slow():
    for footage in (Footage((FLAT, FLAT), "dissolve"), Footage((FLAT,), has_fade=True)):
        lengths, steps = [], []
        for seed in range(100):
            levels = compose(footage, rng(seed), (17, 4, 4)).numpy().astype(int)
            assert (levels == levels[:, :, :1, :1]).all()
            by_frame = np.diff(levels[:, :, 0, 0], axis=1)
            assert (by_frame >= 0).all(axis=1).sum() + (by_frame <= 0).all(axis=1).sum() >= 3  # each goes one way
            lengths.append(len(changes(levels)))
            steps.append(np.abs(by_frame).max())
        assert max(lengths) == 16 and np.median(lengths) >= 6 and np.median(steps) < 60


def test_grain_is_noise_of_its_own_in_every_frame():
    deviations, num_gray = [], 0
    for seed in range(60):
        levels = draw_shot(Shot("flat"), rng(seed), (5, 48, 48))
        noisy = compose(Footage((FLAT,), has_grain=True), rng(seed), (5, 48, 48)).numpy() - levels
        noise = noisy - noisy.mean(axis=(1, 2, 3), keepdims=True)
        deviations.append(noise.std())
        frames = noise.reshape(3, 5, -1)
        assert abs(np.corrcoef(frames[0])[0, 1]) < 0.2  # measured: up to 0.06
        colors = np.corrcoef(noise.reshape(3, -1))
        num_gray += bool(colors[np.triu_indices(3, 1)].min() > 0.5)
    assert min(deviations) < 1.5 and 15 < max(deviations) < 31 and 10 < num_gray < 50


# --- In training -----------------------------------------------------------------------------------------------------


OPTIONS = {"batch_size": 4, "clip_sizes": [[5, 16, 24], [9, 32, 32]], "seed": 3}


def batches(data: ClipDataset, start: int, stop: int, num_workers: int = 0) -> list[Clip]:
    return list(DataLoader(data, batch_sampler=data.batches(start, stop), num_workers=num_workers))


def is_procedural(batches: list[Clip]) -> list[bool]:
    return [bool(video < 0) for batch in batches for video in batch.video]


def test_procedural_clips_take_the_place_of_others_which_stay(clips: Path):
    plain = batches(open_training_data(str(clips), **OPTIONS), 0, 10)
    mixed = batches(open_training_data(str(clips), **OPTIONS, procedural=0.3), 0, 10)
    assert sum(is_procedural(mixed)) == 12 and not any(is_procedural(plain))
    for ours, theirs in zip(mixed, plain, strict=True):
        assert ours.pixels.shape == theirs.pixels.shape and torch.equal(ours.index, theirs.index)
        for pixels, other, index, video in zip(ours.pixels, theirs.pixels, ours.index, ours.video, strict=True):
            expected = draw_footage(tuple(other.shape[1:]), 3, int(index)) if video < 0 else other
            assert torch.equal(pixels, expected)
    data = open_training_data(str(clips), **OPTIONS, procedural=0.3)
    for index in range(40):
        assert torch.equal(data.cut_clip(index).pixels, plain[index // 4].pixels[index % 4])
    assert data.metadata(-1) == {} and data.captions(-1) == () and data.metadata(2)["file_name"]


def test_resuming_workers_and_processes_change_nothing(clips: Path):
    settings = OPTIONS | {"procedural": 0.4}
    straight = batches(open_training_data(str(clips), **settings), 0, 5)
    resumed = batches(open_training_data(str(clips), **settings), 2, 5, num_workers=2)
    shares = [batches(open_training_data(str(clips), **settings, rank=rank, world_size=2), 2, 5) for rank in (0, 1)]
    assert 3 <= sum(is_procedural(resumed)) <= 6
    for expected, whole, *parts in zip(straight[2:], resumed, *shares, strict=True):
        assert torch.equal(whole.pixels, expected.pixels) and torch.equal(whole.video, expected.video)
        assert torch.equal(torch.cat([part.pixels for part in parts]), expected.pixels)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1 / 3, 1.0])
@pytest.mark.parametrize("image_ratio", [0.0, 0.3, 1.0])
def test_the_share_is_exact_over_the_clips_of_all_steps(share: float, image_ratio: float):
    schedule = StepSchedule(4, image_ratio, image_batch_factor=3, procedural=share)
    drawn = [
        schedule.is_procedural(step * schedule.clips_per_step + position)
        for step in range(150)
        for position in range(schedule.num_clips(step))
    ]
    for count in range(1, len(drawn) + 1, 7):
        assert abs(sum(drawn[:count]) - share * count) < 1
    assert sum(drawn) == round(share * len(drawn))


def test_sizes_are_those_of_the_step(clips: Path):
    images = open_training_data(
        str(clips), batch_size=2, clip_sizes=[[5, 48, 64]], image_ratio=0.5, rescale_factors=[2.0], procedural=0.5
    )
    drawn = batches(images, 0, 4)
    assert [tuple(batch.pixels.shape) for batch in drawn] == [(2, 3, 5, 32, 32), (2, 3, 1, 32, 32)] * 2
    assert is_procedural(drawn) == [False, True] * 4


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_from_0_to_1(clips: Path, share: float):
    with pytest.raises(ValueError, match=f"`procedural` must be from 0 to 1, got {share}"):
        open_training_data(str(clips), batch_size=1, procedural=share)

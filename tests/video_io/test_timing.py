"""Times of frames, frame rates, and a constant rate made of any, against FFmpeg's own filter."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from encoded_clips import encode, moving_picture

from diffusers_leanvae.video_io import VideoReader, at_constant_rate, probe_video
from diffusers_leanvae.video_io.timing import Clock


def times_of(path: Path, start: int = 0, stop: int | None = None) -> list[Fraction]:
    with VideoReader(path) as video:
        return [time for chunk in video.timed_frames(start, stop, chunk_size=3) for time in chunk.times]


NTSC = Fraction(30000, 1001)


class TestTimes:
    @pytest.mark.parametrize(
        ("name", "codec", "rate"),
        [
            ("a.mp4", "libx264", NTSC),
            ("a.mkv", "libx264", NTSC),  # in milliseconds
            ("a.mkv", "ffv1", Fraction(24000, 1001)),
            ("a.webm", "libvpx-vp9", Fraction(60000, 1001)),
            ("a.mkv", "libx264", Fraction(240)),
            ("a.avi", "mpeg4", Fraction(25)),
            ("a.ts", "libx264", NTSC),
            ("a.mov", "prores_ks", Fraction(50)),
            ("a.flv", "libx264", Fraction(24)),
            ("a.h264", "libx264", Fraction(25)),  # without time stamps
            ("a.gif", "gif", Fraction(10)),
            ("a.apng", "apng", Fraction(10)),
        ],
    )
    def test_constant_rate_is_exact(self, tmp_path: Path, name: str, codec: str, rate: Fraction):
        pixel_format = {"prores_ks": "yuv422p10le", "gif": "rgb8", "apng": "rgb24"}.get(codec, "yuv420p")
        path = encode(tmp_path / name, moving_picture(90), codec, pixel_format, rate=rate)
        info = probe_video(path)
        assert (info.fps, info.is_variable_rate) == (rate, False)
        assert times_of(path) == [index / rate for index in range(90)]
        assert times_of(path, 40, 43) == [index / rate for index in (40, 41, 42)]

    @pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
    def test_variable_rate_is_kept(self, tmp_path: Path, name: str):
        pts = [0, 1, 2, 10, 11, 30, 31, 32, 33, 50]
        path = encode(tmp_path / name, moving_picture(10), pts=pts)
        assert probe_video(path).is_variable_rate
        assert times_of(path) == [Fraction(stamp, 25) for stamp in pts]
        assert times_of(path, 4) == [Fraction(stamp, 25) for stamp in pts[4:]]

    @pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
    def test_gap_is_kept(self, tmp_path: Path, name: str):
        pts = [*range(20), *range(70, 90)]
        codec, options = ("mpeg4", {}) if name == "a.avi" else ("libx264", {"bf": "0"})
        path = encode(tmp_path / name, moving_picture(40), codec, pts=pts, options=options)
        assert times_of(path) == [Fraction(stamp, 25) for stamp in pts]
        assert probe_video(path).is_variable_rate

    def test_times_begin_at_the_first_frame(self, tmp_path: Path):
        path = encode(tmp_path / "a.mkv", moving_picture(5), pts=[100, 101, 102, 103, 104])
        assert times_of(path) == [Fraction(index, 25) for index in range(5)]
        assert times_of(path, 2) == [Fraction(index, 25) for index in range(2, 5)]

    def test_clock(self):
        clock = Clock(Fraction(25), Fraction(1, 1000), 7, False)
        stamps = [7, 47, 47, None, 168, 500, 400]
        times = [clock.time(index, stamp) for index, stamp in enumerate(stamps)]
        assert times[:5] == [Fraction(index, 25) for index in range(5)]  # 47 repeated, one missing, 168 rounded
        assert times[5:] == [Fraction(493, 1000), Fraction(533, 1000)]  # off the grid, and backwards
        assert all(before < after for before, after in zip(times, times[1:], strict=False))

    def test_interlaced_frames_keep_their_times(self, tmp_path: Path):
        options = {"crf": "4", "x264-params": "tff=1:keyint=4", "flags": "+ildct+ilme"}
        path = encode(tmp_path / "a.mkv", moving_picture(12), options=options)
        assert times_of(path) == [Fraction(index, 25) for index in range(12)]
        assert times_of(path, 5, 7) == [Fraction(5, 25), Fraction(6, 25)]

    def test_animations_and_sequences(self, tmp_path: Path):
        from PIL import Image

        pictures = [Image.fromarray(frame) for frame in moving_picture(4).numpy()]
        pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=[40, 200, 100, 60])
        assert times_of(tmp_path / "a.webp") == [0, Fraction(40, 1000), Fraction(240, 1000), Fraction(340, 1000)]
        info = probe_video(tmp_path / "a.webp")
        assert (info.is_variable_rate, info.fps, info.is_image) == (True, 10, True)
        for index, picture in enumerate(pictures):
            picture.save(tmp_path / f"f_{index + 9:02d}.png")
        (tmp_path / "a.webp").unlink()
        for source in (tmp_path / "f_%02d.png", tmp_path, sorted(tmp_path.iterdir())):
            with VideoReader(source) as video:
                assert (video.info.num_frames, video.info.fps, video.info.is_image) == (4, 25, False)
                chunk = next(video.timed_frames(1))
                assert torch.equal(chunk.pixels, moving_picture(4)[1:])
                assert chunk.times == [Fraction(index, 25) for index in (1, 2, 3)]


class TestRate:
    def test_raw_dv(self, tmp_path: Path):
        """Its demuxer claims 60000 frames per second."""
        path = encode(tmp_path / "a.dv", moving_picture(10, 576, 720), "dvvideo")
        with av.open(str(path)) as container:
            assert container.streams.video[0].average_rate == 60000
        assert probe_video(path).fps == 25
        assert times_of(path) == [Fraction(index, 25) for index in range(10)]

    def test_one_frame_of_a_tick(self, tmp_path: Path):
        path = encode(tmp_path / "a.mp4", moving_picture(1), rate=Fraction(60000))
        assert probe_video(path).fps == 25

    def test_absurd_claim_beside_sane_stamps(self, tmp_path: Path):
        path = tmp_path / "a.mkv"
        encode(path, moving_picture(40), "ffv1", rate=Fraction(1000), pts=list(range(0, 1600, 40)))
        assert probe_video(path).fps == 25
        assert times_of(path) == [Fraction(index, 25) for index in range(40)]


# --- Constant rate ---------------------------------------------------------------------------------------------------


def by_filter(stamps: list[int], tick: Fraction, fps: Fraction, last: int) -> list[int]:
    """Which of the frames FFmpeg's filter puts out; the last is shown for `last` ticks."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=16, height=16, format="gray", time_base=tick)
    graph.link_nodes(source, graph.add("fps", f"fps={fps}:round=near"), graph.add("buffersink")).configure()
    numbers: list[int] = []

    def pull() -> None:
        while True:
            try:
                numbers.append(int(graph.vpull().to_ndarray()[0, 0]))
            except (BlockingIOError, EOFError):
                return

    for index, stamp in enumerate(stamps):
        frame = av.VideoFrame.from_ndarray(np.full((16, 16), index, np.uint8), format="gray")
        frame.pts, frame.time_base = stamp, tick
        frame.duration = last if index == len(stamps) - 1 else stamps[index + 1] - stamp
        graph.vpush(frame)
        pull()
    graph.vpush(None)
    pull()
    return numbers


@pytest.mark.parametrize(
    "fps", [Fraction(25), Fraction(30), Fraction(24000, 1001), Fraction(10), Fraction(7), Fraction(120)]
)
def test_constant_rate_is_that_of_the_filter(fps: Fraction):
    rng = np.random.default_rng(0)
    tick = Fraction(1, 1000)
    cases: list[tuple[list[int], int]] = [([index * 40 for index in range(50)], 40), ([0], 40), ([0, 400], 900)]
    for _ in range(20):
        steps = rng.choice([1, 10, 20, 33, 34, 40, 60, 100, 700], 60)
        cases.append(([0, *np.cumsum(steps).tolist()], int(rng.integers(1, 300))))
    for stamps, last in cases:
        frames: Any = [(index, stamp * tick) for index, stamp in enumerate(stamps)]
        # Of what is too short for any frame, the filter leaves none.
        expected = by_filter(stamps, tick, fps, last) or [len(stamps) - 1]
        assert list(at_constant_rate(frames, fps, last * tick)) == expected


def test_constant_rate_of_a_file(tmp_path: Path):
    """Half a second of 10 frames, a gap of one, half a second more: every picture stays where it was."""
    pts = [*range(5), *range(15, 20)]
    path = encode(tmp_path / "a.mp4", moving_picture(10), rate=Fraction(10), pts=pts)
    with VideoReader(path) as video:
        frames: Any = list(enumerate(times_of(path)))
        assert video.info.is_variable_rate
        assert list(at_constant_rate(frames, 10)) == [0, 1, 2, 3, *[4] * 11, 5, 6, 7, 8, 9]
        assert len(list(at_constant_rate(frames, 20))) == 40
    assert list(at_constant_rate(iter(()), 10)) == []
    assert list(at_constant_rate(frames[:5], Fraction(1, 2))) == [4]  # too short for any frame
    assert len(list(at_constant_rate(frames, 10, lambda: Fraction(3)))) == 19 + 30
    assert len(list(at_constant_rate(frames, 10, lambda: None))) == 20
    with pytest.raises(ValueError, match="`fps` must be more than 0, got 0"):
        list(at_constant_rate(frames, 0))


@pytest.mark.parametrize(
    ("times", "arguments", "message"),
    [
        ([0, 1], {"fps": float("nan")}, "`fps` must be more than 0, got nan"),
        ([0, 1], {"fps": "10"}, "`fps` must be more than 0, got '10'"),
        ([0, 2, 1], {"fps": 10}, "`frames` must come with ascending times in seconds, got 1 after 2"),
        ([float("nan")], {"fps": 10}, "`frames` must come with ascending times in seconds, got nan after 0"),
        ([0, 1], {"fps": 10, "last_duration": float("nan")}, "`last_duration` must be a number of seconds, got nan"),
    ],
)
def test_constant_rate_of_what_has_none(times: list[Any], arguments: dict[str, Any], message: str):
    frames: Any = list(enumerate(times))
    with pytest.raises(ValueError, match=message):
        list(at_constant_rate(frames, **arguments))

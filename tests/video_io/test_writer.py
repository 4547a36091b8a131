"""Writing videos and images, with sound: what comes back, what an unfinished file leaves, what is refused."""

import os
import sys
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from encoded_clips import encode, moving_picture, psnr
from PIL import Image
from processes import Piped

from diffusers_leanvae.video_io import VideoError, VideoWriter, probe_video, read_video, write_video
from diffusers_leanvae.video_io.formats import ON_GPU


def read(path: Path) -> torch.Tensor:
    return read_video(path)[0]


def write_av1(path: Path) -> None:
    write_video(path, torch.zeros(3, 48, 64, 3, dtype=torch.uint8), 25, codec="libsvtav1")


def audio_packets(path: Path) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        return [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(stream) if p.size]


def pictures(files: list[Path]) -> tuple[torch.Tensor, list[float], int | None]:
    """Frames of images or of one animation, as Pillow reads them, with delays in milliseconds and number of loops."""
    frames, delays, loops = [], [], None
    for file in files:
        with Image.open(file) as image:
            for index in range(getattr(image, "n_frames", 1)):
                image.seek(index)
                frames.append(torch.from_numpy(np.array(image.convert("RGB"))))
                delays.append(image.info.get("duration", 0))
            loops = image.info.get("loop")
    return torch.stack(frames), delays, loops


class TestWriter:
    @pytest.mark.parametrize(
        ("name", "codec", "size", "bound"),
        [
            ("a.mp4", "libx264", (131, 247), 38),
            ("a.mp4", "libx264", (48, 64), 32),
            ("a.mov", "libx265", (48, 64), 32),
            ("a.webm", "libvpx-vp9", (33, 64), 34),
            ("a.mkv", "ffv1", (33, 47), 99),
            ("a.mkv", "libx264", (1, 2), 20),
        ],
    )
    def test_round_trip(self, tmp_path: Path, name: str, codec: str, size: tuple[int, int], bound: float):
        frames = moving_picture(6, 131, 247)[:, : size[0], : size[1]]
        with VideoWriter(tmp_path / name, Fraction(30000, 1001), codec=codec, preset="fast") as writer:
            writer.write(frames[:2])
            writer.write(frames[2:].numpy())
        out, info = read_video(tmp_path / name)
        assert out.shape == (6, *size, 3)
        assert psnr(out, frames) > bound
        assert info.fps == Fraction(30000, 1001)
        even = size[0] % 2 == size[1] % 2 == 0
        assert info.pixel_format == ("bgr0" if codec == "ffv1" else "yuv420p" if even else "yuv444p")
        assert [p.name for p in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize("crf", [None, 0, 20.5])
    @pytest.mark.parametrize("codec", ON_GPU)
    def test_encoders_of_gpus(self, codec: str, crf: float | None, tmp_path: Path):
        frames, path = moving_picture(6, 160, 256), tmp_path / "a.mp4"
        try:
            write_video(path, frames, 25, codec=codec, crf=crf)
        except VideoError as error:
            assert "needs an NVIDIA GPU" in str(error) and not any(tmp_path.iterdir())
            pytest.skip("no GPU that encodes")
        out, info = read_video(path)
        assert psnr(out, frames) > 30 and info.pixel_format == "yuv420p"

    @pytest.mark.parametrize("size", [(32, 48), (31, 47), (720, 960)])
    def test_colours(self, tmp_path: Path, size: tuple[int, int]):
        colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)]
        frames = torch.tensor(colours, dtype=torch.uint8)[:, None, None].expand(-1, *size, 3)
        write_video(tmp_path / "a.mp4", frames, 25, crf=4, preset="ultrafast")
        assert (read(tmp_path / "a.mp4").int() - frames.int()).abs().max() <= 5
        with av.open(str(tmp_path / "a.mp4")) as container:
            frame = next(container.decode(video=0))
            assert (frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries) == (1, 1, 1, 1)

    @pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mp4", "libx265"), ("a.webm", "libvpx-vp9")])
    def test_quality_may_be_a_float(self, tmp_path: Path, name: str, codec: str):
        sizes, options = [], {"codec": codec, "preset": "ultrafast"}
        for crf in (12, 12.0, 40.5):
            write_video(tmp_path / name, moving_picture(6), 25, crf=crf, **options)
            sizes.append((tmp_path / name).stat().st_size)
        assert sizes[0] == sizes[1] > sizes[2]

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("a.mp4", {}),
            ("a.mp4", {"pixel_format": "yuv444p10le"}),
            ("a.mp4", {"pixel_format": "rgb24", "crf": 0}),
            ("a.mkv", {"codec": "ffv1"}),
            ("a.gif", {}),
            ("a.webp", {}),
            ("%d.jpg", {}),
            ("%d.png", {}),
        ],
    )
    @pytest.mark.parametrize("size", [(46, 64), (33, 47)])
    def test_strides_do_not_matter(self, tmp_path: Path, name: str, options: dict, size: tuple[int, int]):
        frames = moving_picture(3, *size)
        planes = frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        across = frames.transpose(1, 2).contiguous().transpose(1, 2)
        written = []
        for number, kind in enumerate((frames, planes, across)):
            path = tmp_path / str(number) / name
            path.parent.mkdir()
            with VideoWriter(path, 10, **options) as writer:
                writer.write(kind[:2])
                writer.write(frames[2:])
            written.append(torch.cat([read(file) for file in sorted(path.parent.iterdir())]))
        assert torch.equal(written[0], written[1]) and torch.equal(written[0], written[2])

    def test_float_rate(self, tmp_path: Path):
        write_video(tmp_path / "a.mp4", moving_picture(12), 30000 / 1001)
        assert probe_video(tmp_path / "a.mp4").fps == Fraction(30000, 1001)

    def test_failure_keeps_the_old_file(self, tmp_path: Path):
        path = tmp_path / "a.mp4"
        path.write_bytes(b"older")
        frames = moving_picture(3)
        with pytest.raises(KeyboardInterrupt), VideoWriter(path, 25, preset="ultrafast") as writer:
            writer.write(moving_picture(80))  # past the encoder's look-ahead
            assert len(list(tmp_path.iterdir())) == 2
            raise KeyboardInterrupt
        with pytest.raises(VideoError, match="no frame"), VideoWriter(path, 25) as writer:
            writer.write(frames[:0])
        with pytest.raises(VideoError, match=r"must be \(48, 64\)"), VideoWriter(path, 25) as writer:
            writer.write(frames)
            writer.write(frames[:, 1:])
        with pytest.raises(VideoError, match="uint8"), VideoWriter(path, 25) as writer:
            writer.write(frames.float())
        with pytest.raises(VideoError, match="shape"), VideoWriter(path, 25) as writer:
            writer.write(frames.permute(0, 3, 1, 2))
        with pytest.raises(VideoError, match="overwrite"):
            VideoWriter(path, 25, overwrite=False)
        assert path.read_bytes() == b"older"
        assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
        write_video(path, frames, 25)
        assert len(read(path)) == 3

    def test_illegal_arguments(self, tmp_path: Path):
        for name, options, message in [
            ("a.xyz", {}, r"one of \.mp4, .*got '\.xyz'"),
            ("a.webm", {"codec": "libx264"}, "`codec` must be one of libvpx-vp9"),
            ("a.mp4", {"crf": 52}, "`crf` must be 0 to 51"),
            ("a.mp4", {"preset": "warp"}, "`preset` must be"),
            ("no/a.mp4", {}, "does not exist"),
            ("a.mp4", {"audio_from": tmp_path / "none.mp4"}, "none.mp4.* does not exist"),
        ]:
            with pytest.raises(VideoError, match=message):
                VideoWriter(tmp_path / name, 25, **options)
        with pytest.raises(VideoError, match="`fps`"):
            VideoWriter(tmp_path / "a.mp4", 0)
        with pytest.raises(VideoError, match="`fps` must be at least 0.00001 and less than 100000, got 5e-324"):
            VideoWriter(tmp_path / "a.mp4", 5e-324)
        with pytest.raises(VideoError, match="one frame"):
            write_video(tmp_path / "a.png", moving_picture(2), 1)
        assert list(tmp_path.iterdir()) == []

    def test_an_empty_name_is_not_the_current_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        for name in ("000001.png", "000005.png"):
            Path(name).write_bytes(b"older")
        with pytest.raises(VideoError, match="`path` must be a path that is not empty .*, got ''"):
            write_video("", moving_picture(2), 25)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
            "000001.png": b"older",
            "000005.png": b"older",
        }
        write_video(".", moving_picture(2), 25)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["000001.png", "000002.png"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"path": "a\0.mp4"}, "`path` must be a path .* no null character, got 'a.x00.mp4'"),
            ({"path": None}, "`path` must be a path .*, got None"),
            ({"fps": "10"}, "`fps` must be at least 0.00001 and less than 100000, got '10'"),
            ({"fps": None}, "`fps` must be .*, got None"),
            ({"fps": float("nan")}, "`fps` must be .*, got nan"),
            ({"crf": "3"}, "`crf` must be 0 to 51 for libx264, got '3'"),
            ({"crf": float("nan")}, "`crf` must be 0 to 51 for libx264, got nan"),
            ({"pixel_aspect_ratio": "4:3"}, "`pixel_aspect_ratio` must be a number of more than 0, got '4:3'"),
            ({"pixel_aspect_ratio": float("inf")}, "`pixel_aspect_ratio` must be .*, got inf"),
            ({"audio_start": float("nan")}, "`audio_start` must be a number of 0 or more, got nan"),
            ({"audio_start": "1"}, "`audio_start` must be a number of 0 or more, got '1'"),
            ({"audio_start": 1}, "`audio_start` must be 0 without `audio_from`, got 1"),
        ],
    )
    def test_what_no_writer_takes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict, message: str
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(VideoError, match=message):
            VideoWriter(**{"path": "a.mp4", "fps": 25} | arguments)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"frames": None}, "`frames` must be a tensor or an array, got NoneType"),
            ({"frames": [[0]]}, "`frames` must be a tensor or an array, got list"),
            ({"frames": torch.zeros(3, 48, 64, 3, dtype=torch.bfloat16)}, r"`frames` must be uint8 in \[0, 255\]"),
            ({"times": [0, 1, float("nan")]}, "`times` must be numbers of seconds, got nan"),
            ({"times": "abc"}, "`times` must be numbers of seconds, got 'a'"),
            ({"times": 5}, "`times` must be one for each of 3 frames, got 1"),
            ({"times": [0, 1, 2], "end": float("nan")}, "`end` must be a number of seconds or None, got nan"),
            ({"times": [0, 1, 2], "end": "3"}, "`end` must be a number of seconds or None, got '3'"),
            ({"times": [0, 1, 2], "end": -1}, "`end` must be more than the time of the last frame, 2 s, got -1 s"),
            ({"times": [0, 1, 2], "end": 2}, "`end` must be more than the time of the last frame, 2 s, got 2 s"),
            ({"end": 5}, "`end` must be None where no `times` are given, got 5 s"),
        ],
    )
    def test_what_no_frames_are(self, tmp_path: Path, arguments: dict, message: str):
        with pytest.raises(VideoError, match=message), VideoWriter(tmp_path / "a.mp4", 10) as writer:
            writer.write(**{"frames": moving_picture(3)} | arguments)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("kind", [torch.tensor, np.array, tuple])
    def test_times_may_be_a_tensor(self, tmp_path: Path, kind: Callable[[list[float]], Any]):
        with VideoWriter(tmp_path / "a.mp4", 10) as writer:
            writer.write(moving_picture(3), kind([0, 0.5, 2]), 3)
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert [frame.time for frame in container.decode(video=0)] == pytest.approx([0, 0.5, 2], abs=1e-4)
            assert container.duration == 3_000_000


class TestEveryKind:
    TIMES = [Fraction(0), Fraction(1, 25), Fraction(3, 25), Fraction(1, 3), Fraction(1, 2)]

    @pytest.mark.parametrize(
        ("name", "codec"),
        [
            ("a.mp4", "libx264"),
            ("a.mp4", "libx265"),
            ("a.mp4", "libvpx-vp9"),
            ("a.mp4", "libsvtav1"),
            ("a.mkv", "libx264"),
            ("a.mkv", "libx265"),
            ("a.mkv", "libvpx-vp9"),
            ("a.mkv", "libsvtav1"),
            ("a.mkv", "ffv1"),
            ("a.mov", "libx264"),
            ("a.mov", "prores_ks"),
            ("a.webm", "libvpx-vp9"),
            ("a.webm", "libsvtav1"),
        ],
    )
    def test_times_aspect_and_tags(self, tmp_path: Path, name: str, codec: str):
        """At a variable rate, with the last frame as long as it is, in pixels that are no squares."""
        for times in (self.TIMES, None):
            with VideoWriter(tmp_path / name, 25, codec=codec, pixel_aspect_ratio=Fraction(16, 11)) as writer:
                writer.write(moving_picture(5)[:3], times and times[:3])
                writer.write(moving_picture(5)[3:], times and times[3:], None if times is None else Fraction(7, 10))
            with av.open(str(tmp_path / name)) as container:
                stream = container.streams.video[0]
                frames = list(container.decode(stream))
                assert stream.sample_aspect_ratio == Fraction(16, 11)
                assert "title" not in stream.metadata
                expected = times or [Fraction(index, 25) for index in range(5)]
                assert [float(frame.pts * frame.time_base) for frame in frames] == pytest.approx(
                    [float(time) for time in expected], rel=0, abs=6e-4 if name.endswith(("mkv", "webm")) else 6e-5
                )
                assert container.duration / 1e6 == pytest.approx(0.7 if times else 0.2, rel=0, abs=1e-3)
                if codec != "ffv1":
                    frame = frames[0]
                    assert (frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries) == (
                        1,
                        1,
                        1,
                        1,
                    )

    def test_times_rounded_to_milliseconds_are_a_constant_rate(self, tmp_path: Path):
        times = [Fraction(round(1000 * index * Fraction(1001, 30000)), 1000) for index in range(30)]
        for name, codec in [("a.mp4", "libx264"), ("a.mp4", "libx265"), ("a.mov", "libx264"), ("a.mkv", "libx264")]:
            with VideoWriter(tmp_path / name, Fraction(30000, 1001), codec=codec) as writer:
                writer.write(moving_picture(30), times)
            info = probe_video(tmp_path / name)
            assert info.fps == Fraction(30000, 1001)
            assert info.duration == pytest.approx(30 * 1001 / 30000, rel=0, abs=1e-3)

    def test_illegal_times(self, tmp_path: Path):
        frames = moving_picture(4)
        for first, second, message in [
            ([0, 1], [1, 2], "`times` must ascend"),
            ([0], None, "`times` must be one for each of 2 frames, got 1"),
            ([0, 1], None, "`times` must come with every call"),
            (None, [2, 3], "`times` must come with every call"),
            ([-1, 0], None, "`times` must ascend from 0"),
        ]:
            with pytest.raises(VideoError, match=message), VideoWriter(tmp_path / "a.mp4", 25) as writer:
                writer.write(frames[:2], first)
                writer.write(frames[2:], second)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("a.mkv", {"codec": "ffv1"}),
            ("a.mp4", {"pixel_format": "rgb24", "crf": 0}),
            ("a.webp", {}),
            ("a.apng", {}),
            ("f_%02d.png", {}),
            ("f_%02d.tif", {}),
            ("f_%d.bmp", {}),
            ("f_%d.webp", {}),
        ],
    )
    def test_without_loss(self, tmp_path: Path, name: str, options: dict):
        frames = torch.randint(0, 256, (3, 33, 47, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
        write_video(tmp_path / name, frames, 25, **options)
        if name.endswith((".mkv", ".mp4")):
            assert torch.equal(read(tmp_path / name), frames)
            return
        files = sorted(tmp_path.iterdir())
        assert len(files) == (3 if "%" in name else 1)
        assert torch.equal(pictures(files)[0], frames)

    @pytest.mark.parametrize("pixel_format", ["yuv444p", "yuv444p10le"])
    def test_x264_without_loss(self, tmp_path: Path, pixel_format: str):
        """The pixels that are stored, as FFV1 stores them."""
        stored = []
        for name, codec in [("a.mp4", "libx264"), ("a.mkv", "ffv1")]:
            write_video(tmp_path / name, moving_picture(3), 25, codec=codec, crf=0, pixel_format=pixel_format)
            with av.open(str(tmp_path / name)) as container:
                stored.append(
                    np.stack([frame.to_ndarray(format="yuv444p16le") for frame in container.decode(video=0)])
                )
        np.testing.assert_array_equal(stored[0], stored[1])

    @pytest.mark.parametrize(("name", "bound"), [("a.gif", 33), ("a.webp", 99), ("a.apng", 99)])
    def test_animations(self, tmp_path: Path, name: str, bound: float):
        frames = moving_picture(5)
        with VideoWriter(tmp_path / name, 25) as writer:
            writer.write(frames, self.TIMES, Fraction(3, 4))
        out, delays, loops = pictures([tmp_path / name])
        assert psnr(out, frames) > bound
        expected = [40, 80, 210, 170, 250] if name == "a.gif" else [40, 80, 213, 167, 250]
        if name == "a.apng":
            expected[-1] = 167  # FFmpeg repeats the delay before the last
        assert delays == pytest.approx(expected, rel=0, abs=0.4)
        assert loops == 0  # for ever
        write_video(tmp_path / name, frames[:1], 25)
        assert len(pictures([tmp_path / name])[0]) == 1

    def test_lossy_webp(self, tmp_path: Path):
        sizes = []
        for crf in (None, 5, 60):
            write_video(tmp_path / "a.webp", moving_picture(4), 25, crf=crf)
            sizes.append((tmp_path / "a.webp").stat().st_size)
            assert psnr(pictures([tmp_path / "a.webp"])[0], moving_picture(4)) > 28
        assert sizes[0] > sizes[1] > sizes[2]

    def test_gif_faster_than_players_show(self, tmp_path: Path):
        with pytest.warns(UserWarning, match="left out: 20 frames, since GIF has at most 50 a second"):
            write_video(tmp_path / "a.gif", moving_picture(60), 60)
        delays = pictures([tmp_path / "a.gif"])[1]
        assert min(delays) >= 20 and sum(delays) == pytest.approx(1000, rel=0, abs=20)

    def test_y4m(self, tmp_path: Path):
        """At a constant rate, with the matrix that programs take for granted at this size."""
        frames = moving_picture(5)
        with VideoWriter(tmp_path / "a.y4m", 25, pixel_format="yuv444p") as writer:
            writer.write(frames, self.TIMES, Fraction(3, 5))
        out = read(tmp_path / "a.y4m")
        shown = [0, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4]
        assert len(out) == 15 and (out.int() - frames[shown].int()).abs().max() <= 2

    @pytest.mark.parametrize("num_frames", [1, 2, 3])
    def test_x265_of_few_frames(self, tmp_path: Path, num_frames: int):
        for _ in range(8):  # what x265 leaves unset is zero now and then
            write_video(tmp_path / "a.mp4", moving_picture(num_frames), 25, codec="libx265", preset="ultrafast")
            assert len(read(tmp_path / "a.mp4")) == num_frames
            assert probe_video(tmp_path / "a.mp4").duration == pytest.approx(num_frames / 25, rel=0, abs=1e-3)

    def test_x265_at_sizes_where_it_writes_beyond_its_memory(self, tmp_path: Path):
        with pytest.raises(VideoError, match="libx265 needs a picture of at least 48 by 64, got 34 by 48"):
            write_video(tmp_path / "a.mp4", moving_picture(2)[:, :34, :48], 25, codec="libx265")
        with pytest.raises(VideoError, match="`pixel_format` yuv420p needs even sizes, got height 47"):
            write_video(tmp_path / "a.mp4", moving_picture(2)[:, :47], 25, pixel_format="yuv420p")
        assert list(tmp_path.iterdir()) == []

    def test_svt_av1_says_nothing(self, tmp_path: Path):
        # In a new process: how much it says is settled for good when the first encoder is made.
        code, out, err = Piped(write_av1, tmp_path / "a.mp4").communicate()
        assert (code, out, err) == (0, b"", b"") and probe_video(tmp_path / "a.mp4").codec == "av1"

    @pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list threads")
    def test_svt_av1_leaves_the_processor_to_others(self, tmp_path: Path):
        def policies() -> set[int]:
            return {os.sched_getscheduler(int(name)) for name in os.listdir("/proc/self/task")}

        frames = moving_picture(5)
        with VideoWriter(tmp_path / "a.mp4", 25, codec="libsvtav1") as writer:
            writer.write(frames[:3])
            assert os.SCHED_FIFO not in policies()
            writer.write(frames[3:])


class TestSequences:
    def test_replaced_together(self, tmp_path: Path):
        pattern = tmp_path / "f_%03d.png"
        write_video(pattern, moving_picture(5), 25)
        (tmp_path / "f_x.png").touch()
        with pytest.raises(VideoError, match="'.*f_001.png' exists and `overwrite` is false"):
            VideoWriter(pattern, 25, overwrite=False)
        with pytest.raises(KeyboardInterrupt), VideoWriter(pattern, 25) as writer:
            writer.write(moving_picture(2, 24, 32))
            raise KeyboardInterrupt
        names = [f"f_00{number}.png" for number in range(1, 6)]
        assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "f_x.png"]
        assert pictures([tmp_path / name for name in names])[0].shape == (5, 48, 64, 3)
        write_video(pattern, moving_picture(2, 24, 32), 25)  # a shorter one leaves nothing of the longer one
        assert sorted(path.name for path in tmp_path.iterdir()) == [*names[:2], "f_x.png"]

    def test_folder(self, tmp_path: Path):
        folder = tmp_path / "frames"
        write_video(f"{folder}/", moving_picture(3), 25)
        assert sorted(path.name for path in folder.iterdir()) == ["000001.png", "000002.png", "000003.png"]
        write_video(folder, moving_picture(2), 25)
        assert sorted(path.name for path in folder.iterdir()) == ["000001.png", "000002.png"]
        assert [path.name for path in tmp_path.iterdir()] == ["frames"]

    def test_long_name(self, tmp_path: Path):
        name = "é" * 125 + ".webm"
        write_video(tmp_path / name, moving_picture(2), 25)
        assert [path.name for path in tmp_path.iterdir()] == [name]


def write_in_pieces(path: str | Path, container: str | None, count: int) -> None:
    with VideoWriter(path, 25, container=container) as writer:
        for index in range(count):
            writer.write(torch.full((4, 64, 96, 3), index % 256, dtype=torch.uint8))
    sys.stderr.write(f"{writer.num_frames}")


class TestPipes:
    @pytest.mark.parametrize("container", [None, "mkv", "webm", "y4m"])
    def test_standard_output(self, tmp_path: Path, container: str | None):
        code, out, err = Piped(write_in_pieces, "-", container, 3).communicate()
        assert code == 0 and err == b"12"
        (tmp_path / f"a.{container or 'mkv'}").write_bytes(out)
        frames = read(tmp_path / f"a.{container or 'mkv'}")
        assert frames.shape == (12, 64, 96, 3)
        assert frames.float().mean(dim=(1, 2, 3)).round().tolist() == pytest.approx([0] * 4 + [1] * 4 + [2] * 4, abs=1)

    def test_a_reader_that_has_seen_enough(self):
        process = Piped(write_in_pieces, "-", "y4m", 100000)
        assert process.stdout.read(20000).startswith(b"YUV4MPEG2 W96 H64 F25:1")
        process.stdout.close()
        assert 0 < int(process.stderr.read()) < 400000
        assert process.wait(60) == 0

    def test_named_pipe(self, tmp_path: Path):
        os.mkfifo(tmp_path / "pipe.mkv")
        process = Piped(write_in_pieces, tmp_path / "pipe.mkv", None, 2)
        (tmp_path / "a.mkv").write_bytes((tmp_path / "pipe.mkv").read_bytes())
        assert process.wait(60) == 0
        assert len(read(tmp_path / "a.mkv")) == 8
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mkv", "pipe.mkv"]


class TestAudio:
    @pytest.mark.parametrize(("source", "audio_codec"), [("s.mp4", "aac"), ("s.mkv", "mp3"), ("s.ts", "mp2")])
    def test_copied_bit_for_bit(self, tmp_path: Path, source: str, audio_codec: str):
        frames = moving_picture(40)
        path = encode(tmp_path / source, frames, audio_codec=audio_codec)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            write_video(tmp_path / "out.mp4", read(path), 25, audio_from=path)
        before, after = audio_packets(path), audio_packets(tmp_path / "out.mp4")
        assert [data for _, data in before] == [data for _, data in after]
        with av.open(str(path)) as container:
            origin = float(container.streams.video[0].start_time * container.streams.video[0].time_base)
        times = torch.tensor([[t - origin for t, _ in before], [t for t, _ in after]])
        torch.testing.assert_close(times[0], times[1], rtol=0, atol=2e-3)
        info = probe_video(tmp_path / "out.mp4")
        assert info.has_audio and info.num_frames == 40
        assert psnr(read(tmp_path / "out.mp4"), frames) > 28

    def test_cut_with_a_shorter_video(self, tmp_path: Path):
        path = encode(tmp_path / "s.mp4", moving_picture(40), audio_codec="aac")
        write_video(tmp_path / "out.mp4", moving_picture(10), 25, audio_from=path)
        before, after = audio_packets(path), audio_packets(tmp_path / "out.mp4")
        assert [data for _, data in before[: len(after)]] == [data for _, data in after]
        assert 0.35 < after[-1][0] < 0.4

    @pytest.mark.parametrize(("source", "target", "codec"), [("mp4", "webm", "libvpx-vp9"), ("avi", "mp4", "libx264")])
    def test_reencoded_where_it_must_be(self, tmp_path: Path, source: str, target: str, codec: str):
        audio_codec = {"mp4": "aac", "avi": "adpcm_ms"}[source]
        path = encode(tmp_path / f"s.{source}", moving_picture(30), audio_codec=audio_codec)
        out = tmp_path / f"out.{target}"
        with pytest.warns(UserWarning, match="re-encoded") as caught:
            write_video(out, moving_picture(30), 25, codec=codec, audio_from=path)
        assert len(caught) == 1
        with av.open(str(out)) as container:
            rate = container.streams.audio[0].rate
            audio = np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], 1)
        assert abs(audio.shape[1] / rate - 1.2) < 0.1
        assert np.abs(audio).max() > 0.5

    def test_silent_source(self, tmp_path: Path):
        path = encode(tmp_path / "s.mp4", moving_picture(3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            write_video(tmp_path / "out.mp4", moving_picture(3), 25, audio_from=path)
        assert not probe_video(tmp_path / "out.mp4").has_audio

"""Writing videos and images, with sound: what comes back, what an unfinished file leaves, what is refused."""

import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from encoded_clips import encode, moving_picture, psnr

from diffusers_leanvae.video_io import VideoError, VideoWriter, probe_video, read_video, write_video


def read(path: Path) -> torch.Tensor:
    return read_video(path)[0]


def audio_packets(path: Path) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        return [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(stream) if p.size]


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
        with pytest.raises(VideoError, match="one frame"):
            write_video(tmp_path / "a.png", moving_picture(2), 1)
        assert list(tmp_path.iterdir()) == []


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

"""Reading and writing videos. All clips are made here with PyAV; the shared clips are used where they exist."""

import os
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from diffusers_leanvae.video_io import (
    VideoError,
    VideoWriter,
    iter_video,
    list_videos,
    probe_video,
    read_video,
    write_video,
)


SHARED_VIDEOS = Path(__file__).resolve().parents[3] / "shared" / "videos"
UNITY_MATRIX = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()


def moving_picture(num_frames: int, height: int = 48, width: int = 64) -> torch.Tensor:
    """Smooth colours that drift, with a bright square at a place that tells the frames apart."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    for t in range(num_frames):
        for channel in range(3):
            phase = 0.3 * t + 2 * channel
            frames[t, :, :, channel] = 120 + 60 * np.sin(x / 9 + phase) + 40 * np.cos(y / 7 - phase)
        row, column = 4 * (t % (height // 4 - 1)), 4 * (t // (height // 4 - 1))
        frames[t, row : row + 4, column : column + 4] = 250
    return torch.from_numpy(frames)


def encode(
    path: Path,
    frames: torch.Tensor,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: Fraction = Fraction(25),
    options: dict[str, str] | None = None,
    pts: list[int] | None = None,
    tags: tuple[int, int] | None = None,
    audio_codec: str | None = None,
) -> Path:
    """Encode with PyAV alone, so that the reader is not tested against the writer. `tags`: colour space, range."""
    if options is None:
        options = {"crf": "4", "preset": "ultrafast"} if codec == "libx264" else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        if tags is not None:
            stream.codec_context.colorspace, stream.codec_context.color_range = tags
        sound = container.add_stream(audio_codec, rate=44100) if audio_codec else None
        for index, image in enumerate(frames.numpy()):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24" if image.shape[2] == 3 else "rgba")
            if tags is not None:
                matrix = {1: "ITU709", 5: "ITU601"}[tags[0]]
                frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range=tags[1])
                frame.colorspace, frame.color_range = tags
            else:
                frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = pts[index] if pts else index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            seconds = len(frames) / rate
            wave = np.sin(np.arange(int(seconds * 44100)) / 20).astype(np.float32)[None]
            audio = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            audio.sample_rate, audio.pts = 44100, 0
            container.mux(sound.encode(audio))
            container.mux(sound.encode(None))
    return path


def reference(path: Path) -> torch.Tensor:
    """All frames in order, as PyAV's plain loop gives them."""
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def read(path: Path, start: int = 0, num_frames: int | None = None) -> torch.Tensor:
    return read_video(path, start, num_frames)[0]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean().clamp_min(1e-10)))


def audio_packets(path: Path) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        return [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(stream) if p.size]


class TestRanges:
    # Closed and open groups of pictures, B-frames, and a stream of intra refresh, where no seek is exact.
    @pytest.mark.parametrize(
        ("suffix", "codec", "parameters"),
        [
            (".mp4", "libx264", "keyint=8:min-keyint=8:bframes=3:scenecut=0"),
            (".mkv", "libx264", "keyint=8:min-keyint=8:bframes=3:scenecut=0:open-gop=1"),
            (".mp4", "libx264", "keyint=8:bframes=0:intra-refresh=1"),
            (".ts", "libx264", "keyint=8:bframes=2"),
            (".mp4", "libx265", "keyint=8:min-keyint=8:bframes=3:open-gop=1:log-level=none"),
            (".webm", "libvpx-vp9", "8"),
            (".avi", "mpeg4", "8"),
        ],
    )
    def test_range_equals_sequential(self, tmp_path: Path, suffix: str, codec: str, parameters: str):
        params = {"libx264": "x264-params", "libx265": "x265-params"}.get(codec, "g")
        frames = moving_picture(40)
        path = encode(tmp_path / f"clip{suffix}", frames, codec, options={params: parameters, "threads": "1"})
        whole = reference(path)
        assert len(whole) == 40
        torch.testing.assert_close(read(path), whole, rtol=0, atol=0)
        for start, count in [(0, 1), (1, 3), (7, 2), (8, 1), (9, 12), (17, 5), (31, 4), (38, 9), (39, None)]:
            stop = 40 if count is None else min(40, start + count)
            torch.testing.assert_close(read(path, start, count), whole[start:stop], rtol=0, atol=0)

    def test_seeking_saves_decoding(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        from diffusers_leanvae.video_io import reader as video_io

        path = encode(tmp_path / "clip.mp4", moving_picture(40), options={"x264-params": "keyint=8:bframes=3"})
        assert video_io._find_keyframe(path, 7) is not None
        with video_io._decode_from(path, 30, may_seek=True) as (index, frames):
            assert index == 24
            assert len(list(frames)) == 16

    def test_chunks(self, tmp_path: Path):
        path = encode(tmp_path / "clip.mp4", moving_picture(10))
        chunks = list(iter_video(path, 1, 8, chunk_size=3))
        assert [len(chunk) for chunk in chunks] == [3, 3, 2]
        assert chunks[0].dtype == torch.uint8 and chunks[0].is_contiguous()
        assert torch.equal(torch.cat(chunks), reference(path)[1:9])

    def test_illegal_arguments(self, tmp_path: Path):
        path = encode(tmp_path / "clip.mp4", moving_picture(5))
        with pytest.raises(VideoError, match=r"`start` must be less than the number of frames .* 5, got 5"):
            read(path, start=5)
        for arguments in [{"start": -1}, {"num_frames": 0}, {"chunk_size": 0}, {"backend": "x"}, {"on_error": "x"}]:
            with pytest.raises(VideoError, match=f"`{next(iter(arguments))}` must be"):
                iter_video(path, **arguments)  # before the first frame is asked for


class TestProbe:
    def test_fields(self, tmp_path: Path):
        path = encode(tmp_path / "a.mp4", moving_picture(30), rate=Fraction(30000, 1001), audio_codec="aac")
        info = probe_video(path)
        assert (info.path, info.width, info.height, info.num_frames) == (str(path), 64, 48, 30)
        assert info.fps == Fraction(30000, 1001)
        assert info.duration == pytest.approx(1.001, abs=1e-3)
        assert (info.rotation, info.has_audio, info.is_image) == (0, True, False)
        assert (info.codec, info.pixel_format) == ("h264", "yuv420p")

    @pytest.mark.parametrize("suffix", [".mkv", ".mov", ".avi", ".webm"])
    def test_exact_rate_in_other_containers(self, tmp_path: Path, suffix: str):
        codec = {".avi": "mpeg4", ".webm": "libvpx-vp9"}.get(suffix, "libx264")
        path = encode(tmp_path / f"a{suffix}", moving_picture(30), codec, rate=Fraction(24000, 1001))
        assert probe_video(path).fps == Fraction(24000, 1001)
        assert not probe_video(path).has_audio

    @pytest.mark.parametrize("num_frames", [1, 3])
    def test_very_short(self, tmp_path: Path, num_frames: int):
        path = encode(tmp_path / "a.mp4", moving_picture(num_frames))
        frames, info = read_video(path)
        assert len(frames) == num_frames == info.num_frames
        assert psnr(frames, moving_picture(num_frames)) > 30

    def test_list_videos(self, tmp_path: Path):
        for name in ["b/x.MP4", "a.png", "notes.txt", ".hidden.mp4", ".cache/y.mp4", "b/a.webm"]:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / "folder.mp4").mkdir()
        assert [p.relative_to(tmp_path).as_posix() for p in list_videos(tmp_path)] == ["a.png", "b/a.webm", "b/x.MP4"]
        with pytest.raises(VideoError, match="existing folder"):
            list_videos(tmp_path / "missing")


class TestSources:
    @pytest.mark.parametrize(
        ("matrix", "rotation", "turned"),
        [
            ((0, 1, -1, 0), 90, lambda x: x.rot90(-1, (1, 2))),
            ((-1, 0, 0, -1), 180, lambda x: x.rot90(2, (1, 2))),
            ((0, -1, 1, 0), 270, lambda x: x.rot90(1, (1, 2))),
            ((-1, 0, 0, 1), 0, lambda x: x.flip(2)),
            ((0, 1, 1, 0), 0, lambda x: x.transpose(1, 2)),
        ],
    )
    def test_display_matrix(self, tmp_path: Path, matrix: tuple[int, ...], rotation: int, turned):
        path = encode(tmp_path / "a.mp4", moving_picture(3))
        upright = read(path)
        data = path.read_bytes()
        position = data.index(UNITY_MATRIX, data.index(b"tkhd"))
        a, b, c, d = (value << 16 for value in matrix)
        patch = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()
        path.write_bytes(data[:position] + patch + data[position + len(patch) :])
        frames, info = read_video(path)
        assert torch.equal(frames, turned(upright))
        assert (info.rotation, info.height, info.width) == (rotation, *frames.shape[1:3])

    def test_ten_bit(self, tmp_path: Path):
        frames = moving_picture(4)
        path = encode(tmp_path / "a.mkv", frames, "ffv1", "yuv444p10le", tags=(1, 1))
        assert probe_video(path).pixel_format == "yuv444p10le"
        assert (read(path).int() - frames.int()).abs().max() <= 3

    def test_grey(self, tmp_path: Path):
        frames = moving_picture(4)[..., :1].expand(-1, -1, -1, 3).contiguous()
        for pix_fmt in ("gray", "gray10le"):
            out = read(encode(tmp_path / f"{pix_fmt}.mkv", frames, "ffv1", pix_fmt))
            assert (out.int() - frames.int()).abs().max() <= 2
            assert torch.equal(out[..., 0], out[..., 1]) and torch.equal(out[..., 0], out[..., 2])

    @pytest.mark.parametrize(("name", "codec", "pix_fmt"), [("a.png", "png", "rgba"), ("a.mov", "qtrle", "argb")])
    def test_alpha_is_dropped(self, tmp_path: Path, name: str, codec: str, pix_fmt: str):
        frames = moving_picture(1)
        alpha = torch.arange(64, dtype=torch.uint8).mul(4).expand(1, 48, 64)[..., None]
        path = encode(tmp_path / name, torch.cat([frames, alpha], 3), codec, pix_fmt)
        assert probe_video(path).pixel_format == pix_fmt
        assert torch.equal(read(path), frames)

    def test_variable_frame_rate(self, tmp_path: Path):
        pts = [0, 1, 2, 10, 11, 30, 31, 32, 33, 50]
        frames = moving_picture(10)
        path = encode(tmp_path / "a.mp4", frames, pts=pts)
        out, info = read_video(path)
        assert [int((out[i].int() - frames.int()).abs().sum((1, 2, 3)).argmin()) for i in range(len(out))] == [
            *range(10)
        ]
        assert 4.5 < info.fps < 5.1  # 10 frames in 51 ticks of 1/25 s
        assert torch.equal(read(path, 6, 3), out[6:9])

    @pytest.mark.parametrize("tags", [(1, 1), (1, 2), (5, 1), (5, 2)])
    def test_matrix_and_range_tags(self, tmp_path: Path, tags: tuple[int, int]):
        colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [90, 160, 30]])
        frames = colours.to(torch.uint8).repeat_interleave(16, 0).expand(2, 32, 96, 3).contiguous()
        path = encode(tmp_path / "a.mp4", frames, tags=tags, options={"crf": "1"})
        assert (read(path).int() - frames.int()).abs().max() <= 6

    def test_interlaced(self, tmp_path: Path):
        # A bar that moves 4 pixels per field, woven: without deinterlacing its edge is a comb.
        fields = torch.zeros(24, 48, 64, 3, dtype=torch.uint8)
        for t in range(24):
            fields[t, :, 2 * t : 2 * t + 12] = 255
        woven = fields[0::2].clone()
        woven[:, 1::2] = fields[1::2, 1::2]
        options = {"crf": "4", "x264-params": "tff=1:keyint=4", "flags": "+ildct+ilme"}
        path = encode(tmp_path / "a.mp4", woven, options=options)
        raw, out = reference(path), read(path)
        assert len(out) == 12

        def comb(x: torch.Tensor) -> float:
            return float((x[:, 1:].int() - x[:, :-1].int()).abs().float().mean())

        assert comb(raw) > 8
        assert comb(out) < 0.5 * comb(raw)
        for start, count in [(0, 1), (3, 4), (5, 1), (11, 1)]:
            assert torch.equal(read(path, start, count), out[start : start + count])
        single = encode(tmp_path / "one.mp4", woven[:1], options=options)
        assert len(read(single)) == 1

    def test_size_change(self, tmp_path: Path):
        first = encode(tmp_path / "a.h264", moving_picture(5))
        second = encode(tmp_path / "b.h264", moving_picture(5, 32, 32))
        path = tmp_path / "c.h264"
        path.write_bytes(first.read_bytes() + second.read_bytes())
        with pytest.raises(VideoError, match="frame 5: the frame size changes from 64x48 to 32x32"):
            read(path)
        assert torch.equal(torch.cat(list(iter_video(path, on_error="stop"))), read(first))

    def test_still_images(self, tmp_path: Path):
        image = moving_picture(1, 31, 45)
        for suffix, bound in [(".png", 99), (".webp", 99), (".jpg", 38), (".jpeg", 38)]:
            path = tmp_path / f"100%d{suffix}"  # not a pattern
            write_video(path, image, fps=1)
            frames, info = read_video(path)
            assert psnr(frames, image) > bound
            assert (info.is_image, info.num_frames, info.duration) == (True, 1, None)
        assert len(list(tmp_path.iterdir())) == 4

    def test_animated_images(self, tmp_path: Path):
        frames = moving_picture(5)
        path = encode(tmp_path / "a.gif", frames, "gif", "rgb8", rate=Fraction(10))
        out, info = read_video(path)
        assert (len(out), info.is_image) == (5, True)
        assert psnr(out, frames) > 15
        assert torch.equal(read(path, 2, 2), out[2:4])


class TestBadFiles:
    def check(self, path: Path, message: str) -> None:
        for function in (probe_video, read_video, iter_video):
            with pytest.raises(VideoError, match=message) as caught:
                function(path)
            assert repr(str(path)) in str(caught.value)

    def test_not_a_video(self, tmp_path: Path):
        self.check(tmp_path / "missing.mp4", "does not exist")
        self.check(tmp_path, "folder")
        for name, content, message in [
            ("empty.mp4", b"", "empty"),
            ("text.mp4", b"this is a text, no video\n" * 100, "Cannot read"),
            ("ansi.mp4", b"\x1b[31mred\x1b[0m\r\n" * 200, "Cannot read"),
            (
                "playlist.mp4",
                b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/hostname\n#EXT-X-ENDLIST\n",
                "Cannot",
            ),
            ("zeros.mkv", bytes(5000), "Cannot read"),
        ]:
            (tmp_path / name).write_bytes(content)
            self.check(tmp_path / name, message)

    def test_audio_only(self, tmp_path: Path):
        path = tmp_path / "sound.m4a"
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("aac", rate=44100)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 44100
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        self.check(path, "only audio")

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
    def test_permission(self, tmp_path: Path):
        path = encode(tmp_path / "a.mp4", moving_picture(2))
        path.chmod(0)
        self.check(path, "ermission")

    def test_truncated(self, tmp_path: Path):
        frames = moving_picture(40)
        options = {"crf": "10", "bf": "2", "movflags": "faststart"}
        late = encode(tmp_path / "late.mp4", frames, options=options)  # index at the end: nothing can be read
        late.write_bytes(late.read_bytes()[:-200])
        self.check(late, "truncated")
        path = tmp_path / "early.mp4"
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
            stream.height, stream.width = 48, 64
            for index, image in enumerate(frames.numpy()):
                frame = av.VideoFrame.from_ndarray(image).reformat(format="yuv420p")
                frame.pts = index
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        whole = read(path)
        path.write_bytes(path.read_bytes()[: int(0.6 * path.stat().st_size)])
        with pytest.raises(VideoError, match=r"past frame \d+: .*truncated"):
            read(path)
        good = torch.cat(list(iter_video(path, on_error="stop")))
        assert 5 < len(good) < 40
        assert torch.equal(good, whole[: len(good)])

    @pytest.mark.parametrize("codec", ["libx264", "ffv1", "mjpeg"])
    def test_corrupt_in_the_middle(self, tmp_path: Path, codec: str):
        pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        options = {"libx264": {"crf": "4", "x264-params": "keyint=10"}, "ffv1": {"slicecrc": "1", "level": "3"}}
        path = encode(tmp_path / "a.mkv", moving_picture(40), codec, pix_fmt, options=options.get(codec, {}))
        whole = read(path)
        with av.open(str(path)) as container:
            victim = next(p for i, p in enumerate(container.demux(video=0)) if i == 20)
            needle = bytes(victim)
        data = bytearray(path.read_bytes())
        position = bytes(data).index(needle) + len(needle) // 3
        data[position : position + len(needle) // 3] = b"\xa5" * (len(needle) // 3)
        path.write_bytes(bytes(data))
        good = torch.cat(list(iter_video(path, chunk_size=7, on_error="stop")))
        assert 10 <= len(good) <= 20
        assert torch.equal(good, whole[: len(good)])
        with pytest.raises(VideoError, match=f"past frame {len(good)}: "):
            read(path)

    def test_undecodable_codec(self, tmp_path: Path):
        path = encode(tmp_path / "a.mp4", moving_picture(3))
        path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
        self.check(path, "Cannot read")


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
            ("a.webm", {}, "`codec` must be one of libvpx-vp9"),
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
    @pytest.mark.parametrize(("source", "audio_codec"), [("s.mp4", "aac"), ("s.mkv", "flac"), ("s.ts", "mp2")])
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
        with pytest.warns(UserWarning, match="no audio stream"):
            write_video(tmp_path / "out.mp4", moving_picture(3), 25, audio_from=path)
        assert not probe_video(tmp_path / "out.mp4").has_audio


@pytest.mark.skipif(not SHARED_VIDEOS.is_dir(), reason="the shared clips are not here")
def test_real_clips():
    for path in list_videos(SHARED_VIDEOS / "val")[:2]:
        whole = reference(path)
        frames, info = read_video(path)
        assert len(frames) == info.num_frames
        assert torch.equal(frames, whole)
        assert torch.equal(read(path, 41, 7), whole[41:48])


class TestTorchcodec:
    def test_same_pixels(self, tmp_path: Path):
        try:
            import torchcodec.decoders  # noqa: F401
        except (ImportError, RuntimeError):
            pytest.skip("torchcodec with FFmpeg is not installed")
        for name, pix_fmt, tags in [("a", "yuv420p", None), ("b", "yuv420p10le", (1, 1)), ("c", "yuvj420p", None)]:
            path = encode(tmp_path / f"{name}.mp4", moving_picture(20), pix_fmt=pix_fmt, tags=tags)
            assert torch.equal(read_video(path, 3, 9, backend="torchcodec")[0], read(path, 3, 9))
        with pytest.raises(VideoError, match="`start` must be less"):
            read_video(path, 20, backend="torchcodec")

    def test_missing_package_names_the_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(__import__("sys").modules, "torchcodec.decoders", None)
        path = encode(tmp_path / "a.mp4", moving_picture(2))
        with pytest.raises(ImportError, match=r"diffusers-leanvae\[torchcodec\]"):
            iter_video(path, backend="torchcodec")

"""Reading videos. The clips are made here with PyAV; the shared clips are used where they exist."""

import gc
from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from encoded_clips import count_opens, encode, moving_picture, psnr, read, reference

from diffusers_leanvae.video_io import (
    VideoError,
    VideoReader,
    VideoWriter,
    decoding,
    iter_video,
    list_videos,
    probe_video,
    read_video,
    write_video,
)
from diffusers_leanvae.video_io.inputs import list_frames
from diffusers_leanvae.video_io.pixels import resize_frames


SHARED_VIDEOS = Path(__file__).resolve().parents[3] / "shared" / "videos"


def turn(path: Path, matrix: tuple[float, float, float, float]) -> None:
    """Set the display matrix `(a, b, c, d)` of an MP4 file."""
    data = path.read_bytes()
    place = data.index(b"tkhd") + 4 + 40  # a, b, u, c, d, v, x, y, w
    a, b, c, d = (round(value * (1 << 16)) for value in matrix)
    patch = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()
    path.write_bytes(data[:place] + patch + data[place + len(patch) :])


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of frames that decoders gave to readers, from now on."""
    count, decode = [0], decoding._decode

    def counting(*arguments: Any) -> Iterator[av.VideoFrame]:
        for frame in decode(*arguments):
            count[0] += 1
            yield frame

    monkeypatch.setattr(decoding, "_decode", counting)
    return count


RANGES = [(0, 1), (1, 4), (7, 9), (8, 9), (9, 21), (17, 22), (31, 35), (38, 47), (39, None)]


class TestRanges:
    # Closed and open groups of pictures, B-frames, and a stream of intra refresh, where no seek is exact. The last
    # column: how often one reader opens the file for `RANGES` forwards and backwards, that is, once, and again for
    # every step back where a format cannot be rewound.
    @pytest.mark.parametrize(
        ("suffix", "codec", "parameters", "num_opens"),
        [
            (".mp4", "libx264", "keyint=8:min-keyint=8:bframes=3:scenecut=0", 1),
            (".mkv", "libx264", "keyint=8:min-keyint=8:bframes=3:scenecut=0:open-gop=1", 1),
            (".mp4", "libx264", "keyint=8:bframes=0:intra-refresh=1", 1),
            (".ts", "libx264", "keyint=8:bframes=2", 10),
            (".mp4", "libx265", "keyint=8:min-keyint=8:bframes=3:open-gop=1:log-level=none", 1),
            (".webm", "libvpx-vp9", "8", 1),
            (".avi", "mpeg4", "8", 10),
        ],
    )
    def test_range_equals_sequential(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        suffix: str,
        codec: str,
        parameters: str,
        num_opens: int,
    ):
        params = {"libx264": "x264-params", "libx265": "x265-params"}.get(codec, "g")
        frames = moving_picture(40)
        path = encode(tmp_path / f"clip{suffix}", frames, codec, options={params: parameters, "threads": "1"})
        whole = reference(path)
        assert len(whole) == 40
        torch.testing.assert_close(read(path), whole, rtol=0, atol=0)
        opens = count_opens(monkeypatch)
        for start, stop in RANGES:
            count = None if stop is None else stop - start
            torch.testing.assert_close(read(path, start, count), whole[start:stop], rtol=0, atol=0)
        assert len(opens) == len(RANGES)
        opens.clear()
        with VideoReader(path) as video:  # ascending, overlapping, descending
            for start, stop in [*RANGES, *RANGES[::-1]]:
                torch.testing.assert_close(video.read(start, stop), whole[start:stop], rtol=0, atol=0)
        assert len(opens) == num_opens

    @pytest.mark.parametrize("suffix", [".mp4", ".ts"])
    def test_successive_ranges_decode_every_frame_once(self, tmp_path: Path, monkeypatch, suffix: str):
        path = encode(tmp_path / f"clip{suffix}", moving_picture(40), options={"x264-params": "keyint=8:bframes=3"})
        whole, opens, decoded = reference(path), count_opens(monkeypatch), count_decoded(monkeypatch)
        with VideoReader(path) as video:
            for start in range(0, 40, 5):
                assert torch.equal(video.read(start, start + 5), whole[start : start + 5])
        assert (len(opens), decoded[0]) == (1, 40)

    def test_seeking_saves_decoding(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        path = encode(tmp_path / "clip.mp4", moving_picture(40), options={"x264-params": "keyint=8:bframes=3"})
        whole, opens, decoded = reference(path), count_opens(monkeypatch), count_decoded(monkeypatch)
        with VideoReader(path) as video:
            assert torch.equal(video.read(30, 32), whole[30:32])
            assert decoded[0] == 1 + 8  # the first frame; 24, where a group of pictures begins, to 31
            assert torch.equal(video.read(10, 12), whole[10:12])
            assert decoded[0] == 1 + 8 + 4  # 8 to 11
            assert torch.equal(video.read(39), whole[39:])
        assert (len(opens), decoded[0]) == (1, 1 + 8 + 4 + 8)

    def test_interlaced_ranges_of_one_reader(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        options = {"crf": "4", "x264-params": "tff=1:keyint=4", "flags": "+ildct+ilme"}
        path = encode(tmp_path / "a.mp4", moving_picture(12), options=options)
        whole = read(path)
        assert not torch.equal(whole, reference(path))  # deinterlaced
        opens = count_opens(monkeypatch)
        with VideoReader(path) as video:
            for start in range(0, 12, 3):
                assert torch.equal(video.read(start, start + 3), whole[start : start + 3])
            assert len(opens) == 1
            assert torch.equal(video.read(2, 7), whole[2:7])
        assert len(opens) == 2

    def test_one_range_at_a_time(self, tmp_path: Path):
        path = encode(tmp_path / "clip.mp4", moving_picture(10))
        with VideoReader(path) as video:
            first = video.frames(0, 8, chunk_size=2)
            assert torch.equal(next(first), reference(path)[:2])
            assert len(video.read(5, 6)) == 1
            with pytest.raises(VideoError, match="the reader was closed, or another range begun"):
                next(first)
            last = video.frames(chunk_size=2)
            next(last)
        with pytest.raises(VideoError, match="the reader was closed"):
            next(last)
        with pytest.raises(VideoError, match="the reader is closed"):
            video.read()

    def test_chunks(self, tmp_path: Path):
        path = encode(tmp_path / "clip.mp4", moving_picture(10))
        chunks = list(iter_video(path, 1, 8, chunk_size=3))
        assert [len(chunk) for chunk in chunks] == [3, 3, 2]
        assert chunks[0].dtype == torch.uint8 and chunks[0].permute(0, 3, 1, 2).is_contiguous()
        assert torch.equal(torch.cat(chunks), reference(path)[1:9])
        for size in (1, 2, 99):  # memory is used again, but never that of frames which somebody holds
            chunks = list(iter_video(path, chunk_size=size))
            assert {len(chunk) for chunk in chunks} == {min(size, 10)}
            assert torch.equal(torch.cat(chunks), reference(path))
            assert all(chunk.untyped_storage().nbytes() <= 2 * chunk.nbytes for chunk in chunks)

    def test_chunks_that_are_held_stay_as_they_are(self, tmp_path: Path):
        path = encode(tmp_path / "clip.mp4", moving_picture(24))
        expected, held = reference(path), []
        for number, chunk in enumerate(iter_video(path, chunk_size=2)):
            if number % 3 == 0:
                held.append((number, chunk))
        assert all(torch.equal(chunk, expected[2 * number : 2 * number + 2]) for number, chunk in held)

    def test_count_without_a_header(self, tmp_path: Path):
        path = encode(tmp_path / "clip.mkv", moving_picture(11))
        with VideoReader(path) as video:
            frames = video.frames(3)
            next(frames)
            assert video.info.num_frames is None and video.count_frames() == 11
            assert torch.equal(video.read(2, 5), reference(path)[2:5])

    def test_illegal_arguments(self, tmp_path: Path):
        path = encode(tmp_path / "clip.mp4", moving_picture(5))
        with pytest.raises(VideoError, match=r"`start` must be less than the number of frames .* 5, got 5"):
            read(path, start=5)
        with (
            VideoReader(path) as video,
            pytest.raises(VideoError, match="`stop` must be more than `start`, 3, or None"),
        ):
            video.frames(3, 3)
        for arguments in [
            {"start": -1},
            {"num_frames": 0},
            {"chunk_size": 0},
            {"background": (0, 300, 0)},
            {"on_error": "x"},
        ]:
            with pytest.raises(VideoError, match=f"`{next(iter(arguments))}` must be"):
                iter_video(path, **arguments)  # before the first frame is asked for


class TestProbe:
    def test_everything_opens_a_file_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        path = encode(tmp_path / "a.mp4", moving_picture(30), options={"x264-params": "keyint=8"})
        opens = count_opens(monkeypatch)
        for use in (
            lambda: probe_video(path),
            lambda: read_video(path, num_frames=9),
            lambda: read_video(path, start=20),
            lambda: list(iter_video(path, start=11, chunk_size=2)),
        ):
            use()
            assert opens == ["a.mp4"]
            opens.clear()

    def test_counting_frames(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        with_count = encode(tmp_path / "a.mp4", moving_picture(12))
        without = encode(tmp_path / "a.ts", moving_picture(12))
        for path, is_known in ((with_count, True), (without, False)):
            with VideoReader(path) as video:
                assert (video.info.num_frames is not None) == is_known
                assert video.count_frames() == video.count_frames() == 12
                assert torch.equal(video.read(3, 5), reference(path)[3:5])

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

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"path": ""}, "`source` must be a path that is not empty .*, got ''"),
            ({"path": "\0"}, "`source` must be a path .* no null character, got '.x00'"),
            ({"path": ["000001.png", ""]}, "`source` must be a path that is not empty .*, got ''"),
            ({"path": None}, "`source` must be a path or a list of paths, got None"),
            ({"path": 5}, "`source` must be a path or a list of paths, got 5"),
            ({"background": None}, "`background` must be three integers from 0 to 255, got None"),
            ({"start": 1.5}, "`start` must be an integer, got 1.5"),
            ({"start": "1"}, "`start` must be an integer, got '1'"),
            ({"num_frames": 1.5}, "`num_frames` must be an integer, got 1.5"),
        ],
    )
    def test_what_names_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict, message: str):
        monkeypatch.chdir(tmp_path)
        write_video(".", moving_picture(3), 25)
        assert len(read_video(".")[0]) == 3
        with pytest.raises(VideoError, match=message):
            read_video(**{"path": "."} | arguments)
        for function in (list_videos, list_frames):
            with pytest.raises(VideoError, match="`folder` must be a path that is not empty .*, got ''"):
                function("")

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
        turn(path, matrix)
        frames, info = read_video(path)
        assert torch.equal(frames, turned(upright))
        assert (info.rotation, info.height, info.width) == (rotation, *frames.shape[1:3])

    def test_other_angles_are_refused(self, tmp_path: Path):
        path = encode(tmp_path / "a.mp4", moving_picture(3))
        turn(path, (0.8660254, 0.5, -0.5, 0.8660254))
        for function in (probe_video, read_video, iter_video):
            with pytest.raises(
                VideoError, match=r"a.mp4': its picture is to be turned by 30.0 degrees, and only mult"
            ):
                function(path)
        turn(path, (1.0, 0.0005, -0.0005, 1.0))  # rounding
        assert probe_video(path).rotation == 0

    def test_side_data_that_pyav_does_not_know(self, tmp_path: Path):
        """JPEG pictures with EXIF: its orientation is applied, and its type is not in the table of PyAV 18."""
        from PIL import Image

        images, exif = [], Image.Exif()
        exif[0x0112] = 6
        for frame in moving_picture(3).numpy():
            file = BytesIO()
            Image.fromarray(frame).save(file, "jpeg", quality=95, exif=exif)
            images.append(file.getvalue())
        path = tmp_path / "a.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mjpeg", rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
            for index, image in enumerate(images):
                packet = av.Packet(image)
                packet.stream, packet.pts, packet.dts, packet.time_base = stream, index, index, Fraction(1, 25)
                packet.is_keyframe = True
                container.mux(packet)
        frames, info = read_video(path)
        assert (info.rotation, info.height, info.width, info.color_range) == (90, 64, 48, "full")
        assert psnr(frames, moving_picture(3).rot90(-1, (1, 2))) > 30

    def test_tags_in_a_foreign_encoding(self, tmp_path: Path):
        path, copy = tmp_path / "a.mkv", tmp_path / "b.mkv"
        with av.open(str(path), "w") as container:
            container.metadata["title"] = "title of 8"
            stream = container.add_stream("ffv1", rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            for frame in moving_picture(2).numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        path.write_bytes(path.read_bytes().replace(b"title of 8", "Gr\xfc\xdfe an 8".encode("latin-1")))
        frames, _ = read_video(path)
        assert len(frames) == 2
        with VideoWriter(copy, 25, codec="ffv1", audio_from=path) as writer:
            writer.write(frames)
        assert torch.equal(read_video(copy)[0], frames)

    def test_no_frame_waits_for_the_collector(self, tmp_path: Path):
        path = encode(tmp_path / "a.mp4", moving_picture(30))
        turn(path, (0, 1, -1, 0))
        read_video(path)  # what is imported only now may leave cycles
        gc.collect()
        gc.disable()
        try:
            with VideoReader(path) as video:
                count = sum(len(frames) for frames in video.frames(chunk_size=4))
            # Frames alone are counted, since a test before this one may have left other things. A decoder keeps an
            # empty one or two.
            num_waiting = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
            assert count == 30 and num_waiting < 5
        finally:
            gc.enable()

    @pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, 1)])
    @pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le", "yuvj420p", "gray"])
    def test_packed(self, tmp_path: Path, pix_fmt: str, matrix):
        path = encode(tmp_path / "a.mp4", moving_picture(5), pix_fmt=pix_fmt)
        turn(path, matrix)
        with VideoReader(path) as video:
            for chunk_size in (1, 2, 99):
                planes = list(video.frames(chunk_size=chunk_size))
                packed = list(video.frames(chunk_size=chunk_size, packed=True))
                assert torch.equal(torch.cat(planes), torch.cat(packed))
                assert all(chunk.permute(0, 3, 1, 2).is_contiguous() for chunk in planes)
                assert all(chunk.is_contiguous() for chunk in packed)

    @pytest.mark.parametrize(
        ("size", "ratio", "square"),
        [
            ((48, 64), Fraction(16, 11), (48, 94)),
            ((48, 64), Fraction(3, 4), (64, 64)),
            ((49, 65), Fraction(4, 3), (49, 87)),
            ((48, 64), Fraction(1), (48, 64)),
        ],
    )
    @pytest.mark.parametrize("is_turned", [False, True])
    def test_pixel_aspect_ratio(self, tmp_path: Path, size, ratio: Fraction, square, is_turned: bool):
        frames = moving_picture(3, *size)
        path = encode(tmp_path / "a.mp4", frames, pix_fmt="yuv444p", sample_aspect_ratio=ratio)
        if is_turned:
            turn(path, (0, 1, -1, 0))
            size, square, ratio = size[::-1], square[::-1], 1 / ratio
        stored, info = read_video(path)
        assert (info.height, info.width) == stored.shape[1:3] == size
        assert (info.pixel_aspect_ratio, info.display_size) == (ratio, square[::-1])
        with VideoReader(path, square_pixels=True) as video:
            assert (video.info.height, video.info.width, video.info.pixel_aspect_ratio) == (*square, 1)
            out = video.read()
        assert torch.equal(out, resize_frames(stored, *square))

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

    @pytest.mark.parametrize(
        ("name", "codec", "pix_fmt"),
        [
            ("a.png", "png", "rgba"),
            ("a.mov", "qtrle", "argb"),
            ("b.mov", "png", "rgba"),
            ("a.mkv", "ffv1", "bgra"),
            ("b.mkv", "ffv1", "gbrap10le"),
            ("c.mkv", "ffv1", "yuva444p"),
            ("d.mkv", "ffv1", "yuva420p10le"),
            ("c.mov", "prores_ks", "yuva444p10le"),
            ("a.webm", "libvpx-vp9", "yuva420p"),
            ("b.webm", "libvpx", "yuva420p"),
        ],
    )
    def test_alpha_is_composed(self, tmp_path: Path, name: str, codec: str, pix_fmt: str):
        # Hidden red becomes the background, and half of it half of both.
        frames = torch.zeros(1, 48, 64, 4, dtype=torch.uint8)
        frames[..., 0], frames[..., 32:, 3] = 255, 255
        frames[..., 24:, :, 3] = 128
        options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}  # which it needs for alpha
        path = encode(tmp_path / name, frames, codec, pix_fmt, options=options)
        assert probe_video(path).pixel_format.replace("12le", "10le") == pix_fmt
        with VideoReader(path, background=(0, 0, 255)) as video:
            out = video.read()[0].int()
        bound = 4 if codec[:3] in ("pro", "lib") else 0 if pix_fmt.startswith(("rgb", "bgr", "arg")) else 1
        for place, colour in {(8, 8): (0, 0, 255), (8, 56): (255, 0, 0), (40, 30): (128, 0, 127)}.items():
            assert (out[place] - torch.tensor(colour)).abs().max() <= bound
        assert read(path)[0, 8, 8].tolist() == [255, 255, 255]

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

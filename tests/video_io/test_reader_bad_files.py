"""Reading what is damaged, cut off, or no video at all."""

import os
import resource
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from encoded_clips import encode, moving_picture, read, reference

from diffusers_leanvae.video_io import (
    VideoError,
    VideoReader,
    iter_video,
    list_videos,
    probe_video,
    read_video,
)


SHARED_VIDEOS = Path(__file__).resolve().parents[3] / "shared" / "videos"


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

    @pytest.mark.parametrize(
        ("name", "codec", "pix_fmt", "stored", "claimed"),
        [
            ("a.avi", "rawvideo", "yuv420p", (64, 48, "<II"), (100000, 100000)),
            ("a.avi", "ffv1", "yuv420p", (64, 48, "<II"), (100000, 100000)),
            ("a.avi", "ffv1", "yuv420p", (64, 48, "<II"), (30000, 30000)),
            ("a.mov", "prores_ks", "yuv422p10le", (64, 48, ">HH"), (60000, 60000)),
            ("a.mov", "qtrle", "rgb24", (64, 48, ">HH"), (65535, 65535)),
            ("a.mov", "png", "rgb24", (64, 48, ">II"), (100000, 100000)),
        ],
    )
    def test_claims_of_size(self, tmp_path: Path, name: str, codec: str, pix_fmt: str, stored, claimed):
        path = encode(tmp_path / name, moving_picture(2), codec, pix_fmt)
        *size, layout = stored
        data = path.read_bytes()
        assert struct.pack(layout, *size) in data
        path.write_bytes(data.replace(struct.pack(layout, *size), struct.pack(layout, *claimed)))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.check(
            path,
            "its header claims 60000x60000 pixels, expected at most 134217728" if codec == "prores_ks" else "Cannot",
        )
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes

    @pytest.mark.parametrize("num_b_frames", [0, 2])
    @pytest.mark.parametrize("place", [3, 22, 39])
    def test_cut_between_packets(self, tmp_path: Path, num_b_frames: int, place: int):
        """FFmpeg takes what is left for a whole file."""
        options = {"crf": "10", "bf": str(num_b_frames)}
        path = encode(
            tmp_path / "a.mp4", moving_picture(40), options=options, container_options={"movflags": "faststart"}
        )
        whole = read(path)
        with av.open(str(path)) as container:
            position = next(p.pos for i, p in enumerate(container.demux(video=0)) if i == place)
        path.write_bytes(path.read_bytes()[:position])
        with av.open(str(path)) as container:
            assert sum(packet.size > 0 for packet in container.demux(video=0)) == place
        with pytest.raises(VideoError, match=r"past frame \d+: the file is truncated"):
            read(path)
        good = torch.cat(list(iter_video(path, on_error="stop")))
        assert place - 2 <= len(good) <= place
        assert torch.equal(good, whole[: len(good)])
        with VideoReader(path) as video, pytest.raises(VideoError, match="truncated"):
            video.read(len(good) - 1)

    def test_edit_lists_are_no_damage(self, tmp_path: Path):
        """The first frames are left out, as phones do after a cut."""
        path = encode(tmp_path / "a.mp4", moving_picture(40), options={"x264-params": "keyint=8:bframes=2"})
        whole = read(path)
        data = bytearray(path.read_bytes())
        place = data.index(b"elst") + 4
        version, count, duration, start = struct.unpack(">IIII", data[place : place + 16])
        assert (version, count) == (0, 1)
        with av.open(str(path)) as container:
            ticks = container.streams.video[0].time_base.denominator // 25
        data[place + 8 : place + 16] = struct.pack(">II", duration - 5 * 1000 // 25, start + 5 * ticks)
        path.write_bytes(bytes(data))
        frames, info = read_video(path)
        assert torch.equal(frames, whole[5:])
        assert info.num_frames == 35

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
        with av.open(str(path)) as container:  # between two packets, FFmpeg would take it for a shorter file
            position, size = next((p.pos, p.size) for i, p in enumerate(container.demux(video=0)) if i == 22)
        path.write_bytes(path.read_bytes()[: position + size // 2])
        with pytest.raises(VideoError, match=r"past frame \d+: .*truncated"):
            read(path)
        good = torch.cat(list(iter_video(path, on_error="stop")))
        assert 5 < len(good) < 40
        assert torch.equal(good, whole[: len(good)])
        with VideoReader(path) as video:  # the damage stays where it is, and what is before it stays good
            for _ in range(2):
                with pytest.raises(VideoError, match=f"past frame {len(good)}: .*truncated"):
                    video.read(len(good) - 2)
                assert torch.equal(video.read(2, 5), whole[2:5])

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


@pytest.mark.skipif(not SHARED_VIDEOS.is_dir(), reason="the shared clips are not here")
def test_real_clips():
    for path in list_videos(SHARED_VIDEOS / "val")[:2]:
        frames, info = read_video(path)
        whole = reference(path)
        assert len(frames) == info.num_frames
        assert info.matrix == "bt709" or torch.equal(frames, whole)
        assert torch.equal(read(path, 41, 7), whole[41:48])

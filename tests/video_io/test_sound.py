"""Sound, subtitles, chapters and metadata in other files: in time, whole, and named where they are left out.

The clips flash and click at the same moment once a second; a file is in time when its clicks fall on its flashes.
"""

import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from diffusers_leanvae.video_io import VideoWriter
from diffusers_leanvae.video_io.sound import copy_streams


FPS = Fraction(25)
SECONDS = 4
FIRST_FLASH = Fraction(13, 25)  # and one each second after it


def make_clip(
    path: Path,
    audio_codec: str = "aac",
    *,
    video_codec: str = "libx264",
    rate: int = 48000,
    layout: str = "stereo",
    video_delay: Fraction = Fraction(0),
    audio_delay: Fraction = Fraction(0),
    audio_seconds: int = SECONDS,
    attach: Callable[[Any], Callable[[], None]] | None = None,
) -> Path:
    """Write a clip with B frames whose picture and sound begin after `video_delay` and `audio_delay` seconds."""
    channels = av.AudioLayout(layout).nb_channels
    wave = np.zeros((channels, audio_seconds * rate), np.float32)
    for second in range(SECONDS + 4):
        begin = round((second + FIRST_FLASH + video_delay - audio_delay) * rate)
        if 0 <= begin < wave.shape[1]:
            wave[:, begin : begin + rate // 100] = (
                0.9 * np.sign(np.sin(0.3 * np.arange(rate // 100)))[None][:, : wave.shape[1] - begin]
            )
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "bf": "2", "b-adapt": "0"} if video_codec == "libx264" else {}
        video = container.add_stream(video_codec, rate=FPS, options=options)
        video.width, video.height, video.pix_fmt, video.time_base = 64, 48, "yuv420p", 1 / FPS
        audio = container.add_stream(audio_codec, rate=rate)
        audio.layout = layout
        finish = attach(container) if attach is not None else lambda: None
        position = 0
        for index in range(int(SECONDS * FPS)):
            is_flash = (index - int(FIRST_FLASH * FPS)) % int(FPS) == 0
            image = np.full((48, 64, 3), 250 if is_flash else 10, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = index + round(video_delay * FPS), 1 / FPS
            container.mux(video.encode(frame))
            end = (index + 1) / FPS + video_delay - audio_delay if index < SECONDS * FPS - 1 else 10**6
            while position < min(wave.shape[1], end * rate):
                samples = np.ascontiguousarray(wave[:, position : position + 1024].T).reshape(1, -1)
                sound = av.AudioFrame.from_ndarray(samples, format="flt", layout=layout)
                sound.sample_rate, sound.time_base = rate, Fraction(1, rate)
                sound.pts = position + round(audio_delay * rate)
                container.mux(audio.encode(sound))
                position += 1024
        finish()
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    return path


def pictures(path: Path) -> tuple[torch.Tensor, list[Fraction]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        times = [(frame.pts - frames[0].pts) * frame.time_base for frame in frames]
        return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in frames]), times


def flashes(path: Path) -> list[float]:
    frames, times = pictures(path)
    return [float(time) for frame, time in zip(frames, times, strict=True) if frame.float().mean() > 128]


def sound_pieces(path: Path, track: int = 0) -> Iterator[tuple[float, np.ndarray, int]]:
    """Decoded sound: seconds after the first picture, samples `(channels, n)` in [-1, 1], rate."""
    with av.open(str(path)) as container:
        first = next(container.decode(video=0))
        origin = first.pts * first.time_base
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="flt")
        for frame in container.decode(audio=track):
            for piece in resampler.resample(frame):
                samples = piece.to_ndarray().reshape(-1, piece.layout.nb_channels).T
                yield float(frame.pts * frame.time_base - origin), samples, piece.sample_rate


def clicks(path: Path, track: int = 0) -> list[float]:
    found: list[float] = []
    for time, samples, rate in sound_pieces(path, track):
        for index in np.flatnonzero(np.abs(samples).max(0) > 0.3):
            if not found or time + index / rate > found[-1] + 0.2:
                found.append(time + index / rate)
    return found


def span(path: Path, track: int = 0) -> tuple[float, float]:
    """Begin and end of the sound, in seconds after the first picture."""
    pieces = list(sound_pieces(path, track))
    time, samples, rate = pieces[-1]
    return pieces[0][0], time + samples.shape[1] / rate


def write(
    source: Path, target: Path, start: int = 0, stop: int | None = None, expect: str | None = None, **options: Any
) -> None:
    """Write the frames `start` to `stop` of a clip again, with its sound."""
    frames, times = pictures(source)
    options = {"preset": "ultrafast", "audio_from": source, "audio_start": times[start]} | options
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with VideoWriter(target, FPS, **options) as writer:
            writer.write(frames[start:stop], [time - times[start] for time in times[start:stop]])
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (expect is not None), messages
    if expect is not None:
        assert expect in messages[0] and str(target) in messages[0]


def assert_in_time(path: Path, expected: int) -> None:
    """Clicks lie on flashes: within 6 ms, about four times what Matroska's ticks and MP3's filter take."""
    pairs = [(click, flash) for flash in flashes(path) for click in clicks(path) if abs(click - flash) < 0.3]
    assert len(pairs) == expected
    for click, flash in pairs:
        assert click == pytest.approx(flash, rel=0, abs=6e-3)


SOURCES = {
    "aac.mp4": {"audio_codec": "aac", "rate": 44100},
    "pcm.mov": {"audio_codec": "pcm_s16le", "rate": 44100},
    "flac.mkv": {"audio_codec": "flac", "rate": 44100},
    "opus.webm": {"audio_codec": "libopus", "video_codec": "libvpx-vp9"},
    "ac3.mkv": {"audio_codec": "ac3", "layout": "5.1"},
    "pcm.avi": {"audio_codec": "pcm_s16le", "video_codec": "mpeg4"},
    "aac.ts": {"audio_codec": "aac"},
    "mp2.ts": {"audio_codec": "mp2"},
}
# Source, extension of the output -> codec there, and what the warning says of it.
RE_ENCODED = {
    ("pcm.mov", "mp4"): ("aac", "pcm_s16le to aac"),
    ("pcm.avi", "mp4"): ("aac", "pcm_s16le to aac"),
    ("flac.mkv", "mp4"): ("aac", "flac to aac"),
    ("flac.mkv", "mov"): ("aac", "flac to aac"),
    ("opus.webm", "mp4"): ("aac", "opus to aac"),
    ("opus.webm", "mov"): ("aac", "opus to aac"),
} | {(name, "webm"): ("opus", "to opus") for name in SOURCES if name != "opus.webm"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, options in SOURCES.items():
        make_clip(folder / name, **options)
    return folder


class TestTracks:
    @pytest.mark.parametrize("target", ["mp4", "mkv", "webm", "mov"])
    @pytest.mark.parametrize("source", SOURCES)
    def test_whole_clip(self, clips: Path, tmp_path: Path, source: str, target: str):
        out = tmp_path / f"out.{target}"
        codec, note = RE_ENCODED.get((source, target), (None, None))
        write(clips / source, out, expect=note)
        with av.open(str(clips / source)) as before, av.open(str(out)) as after:
            kept = before.streams.audio[0].codec_context.codec.canonical_name
            sound = after.streams.audio[0]
            written = sound.codec_context.codec.canonical_name
            assert written == (codec or kept) or {written, kept} == {"mp2", "mp3"}  # which MP4 does not tell apart
            assert sound.layout.nb_channels == before.streams.audio[0].layout.nb_channels
        assert_in_time(out, SECONDS)
        assert span(out)[1] == pytest.approx(span(clips / source)[1], rel=0, abs=0.025)  # a packet of AAC is 23 ms

    @pytest.mark.parametrize("target", ["mp4", "mkv", "webm", "mov"])
    @pytest.mark.parametrize("source", SOURCES)
    def test_cut(self, clips: Path, tmp_path: Path, source: str, target: str):
        out = tmp_path / f"out.{target}"
        write(clips / source, out, 17, 80, RE_ENCODED.get((source, target), (None, None))[1])
        assert_in_time(out, 2)  # at 38 and 63 of the frames 17 to 80
        begin, end = span(out)
        # Whole packets are copied: of AC-3 they take 32 ms, of AAC 23 ms.
        assert -0.035 < begin < 0.035
        assert 63 / 25 - 0.001 < end < 63 / 25 + 0.035

    def test_packets_are_copied_bit_for_bit(self, clips: Path, tmp_path: Path):
        for source, target in [("aac.mp4", "mov"), ("flac.mkv", "mkv"), ("opus.webm", "mkv"), ("ac3.mkv", "mp4")]:
            write(clips / source, tmp_path / f"out.{target}")
            data = []
            for path in (clips / source, tmp_path / f"out.{target}"):
                with av.open(str(path)) as container:
                    data.append([bytes(packet) for packet in container.demux(audio=0) if packet.size])
            assert data[0] == data[1]

    @pytest.mark.parametrize(("codec", "suffix"), [("pcm_s16le", "mov"), ("pcm_s16le", "mkv"), ("flac", "mkv")])
    def test_lossless_sound_is_cut_at_the_sample(self, tmp_path: Path, codec: str, suffix: str):
        source, out = make_clip(tmp_path / f"in.{suffix}", codec, rate=44100), tmp_path / f"out.{suffix}"
        write(source, out, 17, 80)
        before = np.concatenate([samples for _, samples, _ in sound_pieces(source)], axis=1)
        after = np.concatenate([samples for _, samples, _ in sound_pieces(out)], axis=1)
        assert after.shape[1] == 63 * 1764
        begin = 17 * 1764 + np.argmax(np.abs(before[0, 17 * 1764 :]) > 0) - np.argmax(np.abs(after[0]) > 0)
        assert abs(begin - 17 * 1764) <= (0 if suffix == "mov" else 45)  # Matroska rounds times to 1 ms
        np.testing.assert_array_equal(after, before[:, begin : begin + 63 * 1764])

    @pytest.mark.parametrize(
        ("name", "options", "lead", "begin", "end", "num_clicks"),
        [
            ("late.mp4", {"audio_delay": Fraction(7, 10)}, 0, 0.68, 4.7, 3),
            ("early.mkv", {"video_delay": Fraction(6, 10), "audio_codec": "libopus"}, 0.6, -0.6, 3.4, 3),
            ("early.ts", {"video_delay": Fraction(6, 10)}, 0.6, -0.62, 3.4, 3),
            ("tail.mp4", {"audio_seconds": 6}, 0, 0, 6, 4),
            ("tail.mkv", {"audio_seconds": 6, "audio_codec": "flac"}, 0, 0, 6, 4),
            ("short.mp4", {"audio_seconds": 2}, 0, 0, 2, 2),
        ],
    )
    @pytest.mark.parametrize("target", ["mp4", "mkv"])
    def test_begin_and_end(
        self,
        tmp_path: Path,
        target: str,
        name: str,
        options: dict,
        lead: float,
        begin: float,
        end: float,
        num_clicks: int,
    ):
        source, out = make_clip(tmp_path / name, **options), tmp_path / f"out.{target}"
        is_kept = target == "mkv" or options.get("audio_codec", "aac") == "aac"
        write(source, out, expect=None if is_kept else "to aac")
        assert span(out) == pytest.approx((begin, end), rel=0, abs=0.035)
        assert_in_time(out, num_clicks)
        with av.open(str(out)) as container:  # sound before the first picture is heard, too
            stream = container.streams.video[0]
            assert float(stream.start_time * stream.time_base) == pytest.approx(lead, rel=0, abs=0.045)
        write(source, out, 0, 50, expect=None if is_kept else "to aac")
        assert span(out)[1] == pytest.approx(2, rel=0, abs=0.1)

    @pytest.mark.parametrize(("layout", "rate"), [("mono", 22050), ("5.1", 96000), ("7.1", 44100), ("stereo", 50000)])
    def test_layouts_and_rates(self, tmp_path: Path, layout: str, rate: int):
        source = make_clip(tmp_path / "in.mkv", "pcm_s16le", layout=layout, rate=rate)
        for target, codec in [("mp4", "aac"), ("webm", "opus")]:
            out = tmp_path / f"out.{target}"
            write(source, out, expect=f"1 sound track (pcm_s16le to {codec})")
            with av.open(str(out)) as container:
                sound = container.streams.audio[0]
                assert sound.layout.nb_channels == av.AudioLayout(layout).nb_channels
                assert sound.rate == (48000 if codec == "opus" or rate == 50000 else rate)
            assert_in_time(out, SECONDS)

    def test_gap_in_time_stamps(self, tmp_path: Path):
        """Sound that is missing for a second is silent for a second."""
        source = make_clip(tmp_path / "in.mkv", "pcm_s16le")
        damaged = tmp_path / "gap.mkv"
        with av.open(str(source)) as before, av.open(str(damaged), "w") as after:
            copies = [after.add_stream_from_template(stream, opaque=True) for stream in before.streams]
            for packet in before.demux():
                time = 0 if packet.pts is None else packet.pts * packet.time_base
                if packet.size and not (packet.stream.type == "audio" and 1 < time < 2):
                    packet.stream = copies[packet.stream_index]
                    after.mux(packet)
        write(damaged, tmp_path / "out.mp4", expect="to aac")
        assert_in_time(tmp_path / "out.mp4", SECONDS - 1)

    @pytest.mark.parametrize("target", ["mp4", "webm"])
    @pytest.mark.parametrize("jump", [60, 7200])
    def test_absurd_time_stamp_at_the_end(self, clips: Path, tmp_path: Path, target: str, jump: int):
        source = tmp_path / "in.mkv"
        with av.open(str(clips / "aac.mp4")) as before, av.open(str(source), "w") as after:
            copies = [after.add_stream_from_template(stream, opaque=True) for stream in before.streams]
            packets = [packet for packet in before.demux() if packet.size]
            last = max((p for p in packets if p.stream.type == "audio"), key=lambda p: p.pts)
            last.pts = last.dts = last.pts + jump * 44100
            for packet in packets:
                packet.stream = copies[packet.stream_index]
                after.mux(packet)
        with av.open(str(source)) as container:
            assert container.duration / 1e6 > jump
        frames, times = pictures(clips / "aac.mp4")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with VideoWriter(tmp_path / f"out.{target}", FPS, audio_from=source, preset="ultrafast") as writer:
                writer.write(frames, times)
        with av.open(str(tmp_path / f"out.{target}")) as container:
            assert container.duration / 1e6 < SECONDS + 0.1
        assert_in_time(tmp_path / f"out.{target}", SECONDS)

    def test_damaged_sound_does_not_cost_the_picture(self, clips: Path, tmp_path: Path):
        data, num_damaged = bytearray((clips / "aac.ts").read_bytes()), 0
        for packet in range(0, len(data), 188):  # the payload of all sound after the first second
            pid = (data[packet + 1] & 31) << 8 | data[packet + 2]
            if pid == 257 and packet > len(data) // 4:
                data[packet + 60 : packet + 188] = bytes(128)
                num_damaged += 1
        assert num_damaged > 100
        (tmp_path / "in.ts").write_bytes(data)
        frames, times = pictures(clips / "aac.ts")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for target in ("mp4", "webm"):
                with VideoWriter(tmp_path / f"out.{target}", FPS, audio_from=tmp_path / "in.ts") as writer:
                    writer.write(frames, times)
                assert len(pictures(tmp_path / f"out.{target}")[0]) == len(frames)
        heard = clicks(tmp_path / "out.webm")  # encoded again: what could not be decoded is silent
        assert heard[0] == pytest.approx(float(FIRST_FLASH), rel=0, abs=6e-3) and len(heard) < SECONDS

    def test_formats_without_sound(self, clips: Path, tmp_path: Path):
        write(clips / "aac.mp4", tmp_path / "out.gif", expect="left out: 1 sound track (aac).")
        write(clips / "aac.mp4", tmp_path / "f_%d.png")  # pictures never had any


class TestEverythingElse:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        """Two languages, subtitles, chapters and metadata."""

        def attach(container: Any) -> Callable[[], None]:
            second = container.add_stream("aac", rate=44100)
            texts = container.add_mux_stream("subrip", time_base=Fraction(1, 1000))
            container.streams.audio[0].metadata.update({"language": "eng", "title": "Original"})
            second.metadata["language"], second.disposition = "deu", av.stream.Disposition.comment
            texts.metadata["language"] = "fra"
            container.metadata.update({"title": "My holiday", "artist": "Somebody", "camera": "Box"})
            unit = Fraction(1, 1000)
            container.set_chapters(
                [
                    {"id": 1, "start": 0, "end": 2000, "time_base": unit, "metadata": {"title": "One"}},
                    {"id": 2, "start": 2000, "end": 4000, "time_base": unit, "metadata": {"title": "Two"}},
                ]
            )

            def finish() -> None:
                silence = av.AudioFrame.from_ndarray(
                    np.zeros((2, 4 * 44100), np.float32), format="fltp", layout="stereo"
                )
                silence.sample_rate, silence.pts = 44100, 0
                container.mux(second.encode(silence))
                container.mux(second.encode(None))
                for start, text in [(500, b"hello"), (1800, b"there"), (3500, b"end")]:
                    packet = av.Packet(text)
                    packet.pts = packet.dts = start
                    packet.duration, packet.time_base, packet.stream = 1000, unit, texts
                    container.mux(packet)

            return finish

        return make_clip(tmp_path / "in.mkv", attach=attach)

    @staticmethod
    def shown(path: Path) -> list[tuple[float, float, str]]:
        """Begin and end of the subtitles in seconds after the first picture, and their words."""
        with av.open(str(path)) as container:
            video = container.streams.video[0]
            origin = video.start_time * video.time_base
            found = []
            for packet in container.demux(subtitles=0):
                if packet.size > 2:
                    begin = float(packet.pts * packet.time_base - origin)
                    text = bytes(packet).lstrip(b"\0\1\2\3\4\5\6\7").decode()
                    found.append((begin, begin + float(packet.duration * packet.time_base), text))
            return found

    @pytest.mark.parametrize("target", ["mp4", "mov", "mkv", "webm"])
    def test_is_kept(self, source: Path, tmp_path: Path, target: str):
        out = tmp_path / f"out.{target}"
        lost = "left out: metadata (CAMERA)" if target == "mp4" else None
        write(source, out, expect="2 sound tracks (aac to opus)" if target == "webm" else lost)
        with av.open(str(out)) as container:
            languages = [stream.language for stream in (*container.streams.audio, *container.streams.subtitles)]
            assert languages == ["eng", "ger" if target == "mov" else "deu", "fra"]
            if target in ("mp4", "mkv"):  # the others have no place for it
                assert container.streams.audio[1].disposition & av.stream.Disposition.comment
            metadata = {key.lower(): value for key, value in container.metadata.items()}
            assert metadata["title"] == "My holiday" and metadata["artist"] == "Somebody"
            assert metadata.get("camera") == (None if lost else "Box")
            titles = [
                stream.metadata.get("title", stream.metadata.get("handler_name")) for stream in container.streams.audio
            ]
            assert titles[0] == "Original"
            chapters = [(float(c["start"] * c["time_base"]), c["metadata"]["title"]) for c in container.chapters()]
        assert [title for _, title in chapters] == ["One", "Two"]
        assert [time for time, _ in chapters] == pytest.approx([0, 2], rel=0, abs=0.03)
        subtitles = self.shown(out)
        assert [text for _, _, text in subtitles] == ["hello", "there", "end"]
        times = [time for begin, end, _ in subtitles for time in (begin, end)]
        assert times == pytest.approx([0.5, 1.5, 1.8, 2.8, 3.5, 4.5], rel=0, abs=0.003)

    @pytest.mark.parametrize("target", ["mp4", "mkv"])
    def test_is_cut(self, source: Path, tmp_path: Path, target: str):
        out = tmp_path / f"out.{target}"
        write(source, out, 25, 60, expect="left out: metadata (CAMERA)" if target == "mp4" else None)
        with av.open(str(out)) as container:
            chapters = [
                (float(c["start"] * c["time_base"]), float(c["end"] * c["time_base"])) for c in container.chapters()
            ]
            assert container.duration / 1e6 == pytest.approx(1.4, rel=0, abs=0.05)
        assert np.array(chapters) == pytest.approx(np.array([[0, 1], [1, 1.4]]), rel=0, abs=0.03)
        subtitles = self.shown(out)
        assert [text for _, _, text in subtitles] == ["hello", "there"]
        times = [time for begin, end, _ in subtitles for time in (begin, end)]
        assert times == pytest.approx([0, 0.5, 0.8, 1.4], rel=0, abs=0.03)
        assert_in_time(out, 1)

    def test_copy_streams_and_back(self, source: Path, tmp_path: Path):
        """What lies beside latents comes back as from the video itself."""
        frames, times = pictures(source)
        for start, stop in [(0, 100), (25, 60)]:
            side = tmp_path / "side.mkv"
            assert copy_streams(source, side, times[start], None if stop == 100 else times[stop])
            assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".mkv") == ["in.mkv", "side.mkv"]
            with av.open(str(side)) as container:
                assert len(container.streams.audio) == 2 and len(container.chapters()) == 2
            shown = [time - times[start] for time in times[start:stop]]
            with pytest.warns(UserWarning, match=r"left out: metadata \(CAMERA\)\.$"):
                with VideoWriter(tmp_path / "out.mp4", FPS, audio_from=side, preset="ultrafast") as writer:
                    writer.write(frames[start:stop], shown)
            assert_in_time(tmp_path / "out.mp4", SECONDS if stop == 100 else 1)
            assert len(self.shown(tmp_path / "out.mp4")) == (3 if stop == 100 else 2)

    @pytest.mark.parametrize("target", ["mp4", "mov", "mkv"])
    def test_tags_of_phones(self, tmp_path: Path, target: str):
        tags = {"com.apple.quicktime.make": "Apple", "com.android.version": "14", "location": "+48.1000+011.5000/"}
        source = make_clip(
            tmp_path / "in.mkv", attach=lambda container: container.metadata.update(tags) or (lambda: None)
        )
        for stop in (None, 60):
            write(source, tmp_path / f"out.{target}", 0, stop)
            with av.open(str(tmp_path / f"out.{target}")) as container:
                metadata = {key.lower(): value for key, value in container.metadata.items()}
            assert {key: metadata.get(key) for key in tags} == tags

    def test_metadata_of_a_silent_video(self, tmp_path: Path):
        frames = torch.zeros(3, 48, 64, 3, dtype=torch.uint8)
        with av.open(str(tmp_path / "titled.mkv"), "w") as container:
            container.metadata["title"] = "Silence"
            stream = container.add_stream("ffv1", rate=FPS, width=64, height=48, pix_fmt="bgr0")
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
            container.mux(stream.encode(None))
        assert copy_streams(tmp_path / "titled.mkv", tmp_path / "side.mkv", Fraction(0), None)
        for source in ("titled.mkv", "side.mkv"):
            with VideoWriter(tmp_path / "out.mp4", FPS, audio_from=tmp_path / source) as writer:
                writer.write(frames)
            with av.open(str(tmp_path / "out.mp4")) as container:
                assert container.metadata["title"] == "Silence" and not container.streams.audio
                assert container.duration == 3 / FPS * 1_000_000

    def test_nothing_to_copy(self, tmp_path: Path):
        with VideoWriter(tmp_path / "silent.mp4", FPS) as writer:
            writer.write(torch.zeros(3, 48, 64, 3, dtype=torch.uint8))
        assert not copy_streams(tmp_path / "silent.mp4", tmp_path / "side.mkv", Fraction(0), None)
        assert [path.name for path in tmp_path.iterdir()] == ["silent.mp4"]

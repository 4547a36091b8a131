"""Real footage through the autoencoder: its shape, its time and its sound come out as they went in."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open

from diffusers_leanvae.inference.files import WHOLE, Excerpt, decode_video, encode_video, reconstruct_video
from diffusers_leanvae.inference.latents_file import (
    LatentsInfo,
    LatentsWriter,
    copy_sound,
    open_latents,
    read_times,
    weights_sha256,
)
from diffusers_leanvae.video_io import VideoReader, VideoWriter, probe_video, read_video, write_video


TICK = Fraction(1, 600)
# Frames at 25 per second, then a pause, then a burst.
UNEVEN = [Fraction(n, 25) for n in range(6)] + [
    Fraction(1),
    Fraction(6, 5),
    *(Fraction(130 + 2 * n, 100) for n in range(6)),
]


@pytest.fixture(scope="module")
def vae(make_model):
    return make_model()


def film(
    path: Path,
    times: list[Fraction],
    *,
    aspect: Fraction = Fraction(1),
    sound: tuple[str, ...] = (),
    seconds: float = 2.0,
    size: tuple[int, int] = (32, 48),
) -> Path:
    """A film whose brightness rises with every frame, with beeps of 50 ms where a second begins."""
    height, width = size
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.time_base = width, height, "yuv444p", TICK
        stream.codec_context.sample_aspect_ratio = aspect
        tracks = [container.add_stream(codec, rate=48000, layout="mono") for codec in sound]
        for index, time in enumerate(times):
            pixels = np.full((height, width, 3), 20 + 10 * (index % 20), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="yuv444p", dst_colorspace=1)
            frame.pts, frame.time_base = round(time / TICK), TICK
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        place = np.arange(round(48000 * seconds))
        wave = (np.sin(place / 8) * 20000 * (place % 48000 < 2400)).astype(np.int16)[None]
        for track in tracks:
            resampler = av.AudioResampler(track.format, "mono", 48000, frame_size=track.frame_size or 1024)
            frame = av.AudioFrame.from_ndarray(wave, "s16", "mono")
            frame.rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
            for piece in [*resampler.resample(frame), *resampler.resample(None)]:
                container.mux(track.encode(piece))
            container.mux(track.encode(None))
    return path


def times_in(path: Path) -> list[Fraction]:
    with VideoReader(path) as video:
        return [chunk.times[0] for chunk in video.timed_frames(chunk_size=1)]


def beeps(path: Path, track: int = 0) -> tuple[list[float], float]:
    """When beeps begin, and where the sound ends, in seconds from the first frame."""
    with av.open(path) as container:
        first = next(iter(container.decode(video=0))).time
    samples: dict[int, np.ndarray] = {}
    with av.open(path) as container:
        for frame in container.decode(audio=track):
            samples[round((frame.time - first) * frame.rate)] = frame.to_ndarray().astype(np.float64)[0]
            rate = frame.rate
    end = max(start + len(values) for start, values in samples.items())
    wave = np.zeros(end)
    for start, values in samples.items():
        wave[max(start, 0) : start + len(values)] = values[max(-start, 0) :]
    loud = np.abs(wave) > 0.2 * np.abs(wave).max()
    places = np.flatnonzero(loud)
    starts = places[np.diff(places, prepend=-rate) > rate // 10]
    return [start / rate for start in starts], end / rate


def through(vae, how: str, source: Path | str, target: Path, excerpt: Excerpt = WHOLE, **options) -> None:
    """Reconstruct a file directly, or by way of a file of latents."""
    if how == "reconstruct":
        reconstruct_video(vae, source, target, excerpt=excerpt, **options)
    else:
        latents = target.with_suffix(".safetensors")
        encode_video(vae, source, latents, model="", excerpt=excerpt)
        decode_video(vae, latents, target, **options)


BOTH = pytest.mark.parametrize("how", ["reconstruct", "latents"])


@BOTH
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm"])
def test_frames_and_sound_keep_their_times(vae, tmp_path: Path, how: str, suffix: str):
    source = film(tmp_path / "in.mp4", UNEVEN, sound=("aac",))
    assert probe_video(source).is_variable_rate
    through(vae, how, source, tmp_path / f"out{suffix}")
    shown = times_in(tmp_path / f"out{suffix}")
    assert len(shown) == len(UNEVEN)
    assert max(abs(a - b) for a, b in zip(shown, UNEVEN, strict=True)) <= Fraction(1, 1000)  # Matroska's unit
    starts, end = beeps(tmp_path / f"out{suffix}")
    assert starts == pytest.approx([0, 1], abs=0.02) and end == pytest.approx(2, abs=0.05)  # the tail stays


@BOTH
@pytest.mark.parametrize("rate", [Fraction(10), Fraction(30000, 1001)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_constant_rate_stays_one(vae, tmp_path: Path, how: str, rate: Fraction, suffix: str):
    picture = torch.randint(0, 256, (1, 48, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    frames = torch.cat([picture.roll(3 * n, dims=2) for n in range(13)])  # so that there are B frames
    write_video(tmp_path / "in.mkv", frames, rate)  # whose time stamps are rounded to milliseconds
    through(vae, how, tmp_path / "in.mkv", tmp_path / f"out{suffix}")
    with VideoReader(tmp_path / f"out{suffix}") as video:
        times = [chunk.times[0] for chunk in video.timed_frames(chunk_size=1)]
        assert video.info.fps == rate and not video.info.is_variable_rate
        assert video.info.duration == pytest.approx(float(13 / rate), abs=0.002)
    assert times == [n / rate for n in range(13)]


@BOTH
def test_a_constant_rate_repeats_and_drops(vae, tmp_path: Path, how: str):
    source = film(tmp_path / "in.mkv", UNEVEN, sound=("aac",))
    through(vae, how, source, tmp_path / "out.mkv", Excerpt(fps=Fraction(10)), codec="ffv1")
    frames, info = read_video(tmp_path / "out.mkv")
    assert info.fps == 10 and not info.is_variable_rate
    # At each time the last frame that is rounded to it, or to one before it.
    shown = [max(i for i, time in enumerate(UNEVEN) if round(float(time) * 10) <= n) for n in range(14)]
    write_video(tmp_path / "even.mkv", read_video(source)[0][shown], 10, codec="ffv1")
    through(vae, how, tmp_path / "even.mkv", tmp_path / "expected.mkv", codec="ffv1")
    assert torch.equal(frames, read_video(tmp_path / "expected.mkv")[0])
    starts, _ = beeps(tmp_path / "out.mkv")
    assert starts == pytest.approx([0, 1], abs=0.02)


@BOTH
def test_a_cut_cuts_the_sound(vae, tmp_path: Path, how: str):
    times = [Fraction(n, 25) for n in range(75)]
    source = film(tmp_path / "in.mkv", times, sound=("aac", "pcm_s16le"), seconds=3)
    through(vae, how, source, tmp_path / "out.mkv", Excerpt(start=20, num_frames=40))
    info = probe_video(tmp_path / "out.mkv")
    assert info.audio_codecs == ("aac", "pcm_s16le")
    for track in range(2):
        starts, end = beeps(tmp_path / "out.mkv", track)
        assert starts == pytest.approx([0.2, 1.2], abs=0.02)  # 1 s and 2 s of the source, which begins at 0.8 s
        assert end == pytest.approx(1.6, abs=0.03)


def test_sound_comes_from_where_it_is_asked_for(vae, tmp_path: Path):
    times = [Fraction(n, 25) for n in range(50)]
    source = film(tmp_path / "in.mkv", times, sound=("aac",))
    other = film(tmp_path / "other.mkv", times, sound=("flac", "flac"))
    encode_video(vae, source, tmp_path / "z.safetensors", model="", excerpt=Excerpt(start=20, num_frames=20))
    decode_video(vae, tmp_path / "z.safetensors", tmp_path / "same.mkv", audio_from=source)
    assert beeps(tmp_path / "same.mkv")[0] == pytest.approx([0.2], abs=0.02)
    decode_video(vae, tmp_path / "z.safetensors", tmp_path / "new.mkv", audio_from=other)
    assert probe_video(tmp_path / "new.mkv").audio_codecs == ("flac", "flac")
    assert beeps(tmp_path / "new.mkv")[0] == pytest.approx([0], abs=0.02)
    # A file of the same name is another one, and the same file under another name is the one.
    (tmp_path / "elsewhere").mkdir()
    namesake = film(tmp_path / "elsewhere" / "in.mkv", times, sound=("flac",), seconds=0.6)
    decode_video(vae, tmp_path / "z.safetensors", tmp_path / "namesake.mkv", audio_from=namesake)
    assert beeps(tmp_path / "namesake.mkv")[0] == pytest.approx([0], abs=0.02)
    source.rename(tmp_path / "renamed.mkv")
    decode_video(vae, tmp_path / "z.safetensors", tmp_path / "again.mkv", audio_from=tmp_path / "renamed.mkv")
    assert beeps(tmp_path / "again.mkv")[0] == pytest.approx([0.2], abs=0.02)
    silent = film(tmp_path / "silent.mkv", times)
    with pytest.warns(UserWarning, match="'.*quiet.mkv' has no sound: '.*silent.mkv' has none at this time"):
        decode_video(vae, tmp_path / "z.safetensors", tmp_path / "quiet.mkv", audio_from=silent)


@BOTH
def test_oblong_pixels(vae, tmp_path: Path, how: str):
    source = film(tmp_path / "in.mp4", [Fraction(n, 25) for n in range(5)], aspect=Fraction(4, 3))
    for excerpt, size, aspect in (
        (Excerpt(), (48, 32), Fraction(4, 3)),
        (Excerpt(square_pixels=True), (64, 32), Fraction(1)),
        (Excerpt(size="16"), (24, 16), Fraction(4, 3)),
        (Excerpt(size="64x32"), (64, 32), Fraction(1)),
        (Excerpt(size="32x32"), (32, 32), Fraction(2)),
        (Excerpt(size="16", square_pixels=True), (32, 16), Fraction(1)),
    ):
        through(vae, how, source, tmp_path / "out.mp4", excerpt)
        info = probe_video(tmp_path / "out.mp4")
        assert ((info.width, info.height), info.pixel_aspect_ratio) == (size, aspect), excerpt


@BOTH
def test_transparency_shows_the_background(vae, tmp_path: Path, how: str):
    from PIL import Image

    for suffix in (".png", ".webp"):
        pixels = np.zeros((32, 32, 4), np.uint8)
        pixels[..., 0] = 255  # red, which is hidden
        Image.fromarray(pixels, "RGBA").save(tmp_path / f"in{suffix}", lossless=True)
        levels = {}
        for name, background in (("white", (255, 255, 255)), ("blue", (0, 0, 255))):
            with VideoReader(tmp_path / f"in{suffix}", background=background) as video:
                assert video.read()[0, 0, 0].tolist() == list(background)
            write_video(tmp_path / "opaque.png", torch.tensor(background, dtype=torch.uint8).expand(1, 32, 32, 3), 1)
            through(vae, how, tmp_path / f"in{suffix}", tmp_path / "out.png", Excerpt(background=background))
            levels[name] = read_video(tmp_path / "out.png")[0]
            through(vae, how, tmp_path / "opaque.png", tmp_path / "expected.png")
            assert torch.equal(levels[name], read_video(tmp_path / "expected.png")[0])
        assert not torch.equal(levels["white"], levels["blue"])


@BOTH
@pytest.mark.parametrize("kind", ["pattern", "folder"])
def test_numbered_pictures_are_a_video(vae, tmp_path: Path, how: str, kind: str):
    frames = torch.stack([torch.full((32, 48, 3), 10 * n, dtype=torch.uint8) for n in range(12)])
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "f_%d.png", frames, 25)
    write_video(tmp_path / "in.mkv", frames, 25, codec="ffv1")
    source = tmp_path / "in" if kind == "folder" else tmp_path / "in" / "f_%d.png"
    through(vae, how, source, tmp_path / "out.mkv", Excerpt(fps=Fraction(12)), codec="ffv1")
    through(vae, how, tmp_path / "in.mkv", tmp_path / "expected.mkv", codec="ffv1")
    actual, info = read_video(tmp_path / "out.mkv")
    assert torch.equal(actual, read_video(tmp_path / "expected.mkv")[0]) and len(actual) == 12
    assert info.fps == 12
    through(vae, how, source, tmp_path / "again_%03d.png")
    written = sorted(path.name for path in tmp_path.glob("again_*.png"))
    assert written == [f"again_{n:03d}.png" for n in range(1, 13)]
    assert torch.equal(read_video(tmp_path / "again_%03d.png")[0], actual)


def test_a_pipe_is_read_once_for_pictures_and_sound(vae, tmp_path: Path):
    import os
    import threading

    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    source = film(tmp_path / "in.mkv", [Fraction(n, 25) for n in range(50)], sound=("aac",))
    os.mkfifo(tmp_path / "pipe.mkv")
    feeder = threading.Thread(target=lambda: (tmp_path / "pipe.mkv").write_bytes(source.read_bytes()))
    feeder.start()
    reconstruct_video(vae, tmp_path / "pipe.mkv", tmp_path / "out.mp4")
    feeder.join()
    assert beeps(tmp_path / "out.mp4")[0] == pytest.approx([0, 1], abs=0.02)
    os.mkfifo(tmp_path / "bad.mkv")
    feeder = threading.Thread(target=lambda: (tmp_path / "bad.mkv").write_bytes(b"no video"))
    feeder.start()
    with pytest.raises(ValueError, match="bad.mkv") as error:
        reconstruct_video(vae, tmp_path / "bad.mkv", tmp_path / "bad.mp4")
    feeder.join()
    assert "leanvae-" not in str(error.value)  # the name of a temporary copy


def test_what_a_file_of_latents_remembers(vae, tmp_path: Path):
    source = film(tmp_path / "in.mp4", UNEVEN, aspect=Fraction(4, 3), sound=("aac",))
    info = encode_video(vae, source, tmp_path / "z.safetensors", model="m", revision="r", excerpt=Excerpt(start=2))
    with open_latents(tmp_path / "z.safetensors") as (_, read):
        assert read == info
    assert info.pixel_aspect_ratio == "4/3" and info.start == "2/25" and info.has_sound
    assert info.weights_sha256 == weights_sha256(vae) and (info.model, info.revision) == ("m", "r")
    times = read_times(tmp_path / "z.safetensors")
    assert times is not None and times == [time - UNEVEN[2] for time in UNEVEN[2:]]
    copy_sound(tmp_path / "z.safetensors", tmp_path / "sound.mkv")
    assert probe_video(tmp_path / "sound.mkv").audio_codecs == ("aac",)
    write_video(tmp_path / "even.mp4", torch.zeros(7, 16, 16, 3, dtype=torch.uint8), Fraction(30000, 1001))
    info = encode_video(vae, tmp_path / "even.mp4", tmp_path / "even.safetensors", model="")
    assert read_times(tmp_path / "even.safetensors") is None and info.fps == "30000/1001" and not info.has_sound
    with safe_open(tmp_path / "even.safetensors", "pt") as file:
        assert list(file.keys()) == ["latents"]


def test_files_of_earlier_versions_decode(vae, tmp_path: Path):
    source = film(tmp_path / "in.mp4", [Fraction(n, 25) for n in range(5)])
    encode_video(vae, source, tmp_path / "z.safetensors", model="m")
    decode_video(vae, tmp_path / "z.safetensors", tmp_path / "new.mkv", codec="ffv1")
    import json

    from safetensors.torch import load_file, save_file

    old = ("model", "fps", "num_frames", "height", "width", "source", "is_image", "version")
    with safe_open(tmp_path / "z.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["leanvae"])
    tensors = load_file(tmp_path / "z.safetensors")
    header = {"format": "pt", "leanvae": json.dumps({name: metadata[name] for name in old})}
    save_file({"latents": tensors["latents"]}, tmp_path / "z.safetensors", header)
    info = decode_video(vae, tmp_path / "z.safetensors", tmp_path / "old.mkv", codec="ffv1", checksum="of others")
    assert info.weights_sha256 == "" and info.pixel_aspect_ratio == "1"
    assert torch.equal(*(read_video(tmp_path / name)[0] for name in ("new.mkv", "old.mkv")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_tensors_lie_where_they_are_looked_for(tmp_path: Path, dtype: torch.dtype):
    latents = torch.randn(1, 1, 3, 1, 1, generator=torch.Generator().manual_seed(0)).to(dtype)  # 6 bytes in 16 bits
    (tmp_path / "sound").write_bytes(bytes(range(7)))
    times = [Fraction(0), Fraction(1, 3), Fraction(5, 7)]
    info = LatentsInfo("m", "25", 3, 8, 8, "in.mp4", False)
    with LatentsWriter(tmp_path / "z.safetensors") as writer:
        writer.write(latents)
        info = writer.close(info, times, tmp_path / "sound")
    assert info.time_unit == "1/21" and read_times(tmp_path / "z.safetensors") == times
    with safe_open(tmp_path / "z.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("latents"), latents)
    copy_sound(tmp_path / "z.safetensors", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == bytes(range(7))
    primes = [Fraction(n, prime) for n, prime in enumerate((2, 1009, 1013, 1019, 1021), start=1)]
    with LatentsWriter(tmp_path / "z.safetensors") as writer:
        writer.write(latents)
        writer.close(replace(info, num_frames=5), sorted(primes))
    read = read_times(tmp_path / "z.safetensors")
    assert read is not None and max(abs(a - b) for a, b in zip(read, sorted(primes), strict=True)) <= Fraction(
        1, 10**9
    )


def test_sound_that_cannot_be_read_is_named_by_where_it_is_kept(vae, tmp_path: Path):
    source = film(tmp_path / "in.mp4", [Fraction(n, 25) for n in range(5)], sound=("aac",))
    encode_video(vae, source, tmp_path / "z.safetensors", model="m")
    content = bytearray((tmp_path / "z.safetensors").read_bytes())
    start = content.index(b"\x1aE\xdf\xa3")  # of a Matroska file
    content[start:] = bytes(len(content) - start)
    (tmp_path / "z.safetensors").write_bytes(content)
    (tmp_path / "bad.mka").write_bytes(b"no sound")
    for options, shown in (
        ({}, f"the sound in '{tmp_path / 'z.safetensors'}'"),
        ({"audio_from": tmp_path / "bad.mka"}, f"'{tmp_path / 'bad.mka'}'"),
    ):
        with pytest.raises(ValueError, match=f"^Cannot read {shown}: Invalid data") as error:
            decode_video(vae, tmp_path / "z.safetensors", tmp_path / "out.mp4", **options)
        assert "leanvae-" not in str(error.value)  # the name of a temporary copy


def test_other_weights_are_noticed(vae, make_model, tmp_path: Path):
    source = film(tmp_path / "in.mp4", [Fraction(n, 25) for n in range(5)])
    info = encode_video(vae, source, tmp_path / "z.safetensors", model="m")
    assert weights_sha256(make_model()) == info.weights_sha256  # the same weights
    assert weights_sha256(make_model().bfloat16()) != info.weights_sha256
    other = make_model()
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match="`vae` must have the weights that encoded '.*z.safetensors', those of 'm'"):
        decode_video(other, tmp_path / "z.safetensors", tmp_path / "o.mp4", checksum=weights_sha256(other))
    assert not (tmp_path / "o.mp4").exists()
    decode_video(other, tmp_path / "z.safetensors", tmp_path / "o.mp4")  # who does not ask is not told
    # In 16 bits the weights are not those that were stored, and the sum says nothing.
    assert encode_video(make_model().bfloat16(), source, tmp_path / "b.safetensors", model="").weights_sha256 == ""


@BOTH
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("kind", ["gap", "second frame late", "burst", "slow end"])
def test_the_last_frame_ends_in_time(vae, tmp_path: Path, how: str, suffix: str, kind: str):
    steps = {
        "gap": [4, 4, 200, 4, 4, 4],
        "second frame late": [8, 4, 4, 4, 4, 4],
        "burst": [40, 40, 40, 2, 2, 2],
        "slow end": [4, 4, 4, 4, 80],
    }[kind]
    times = [Fraction(sum(steps[:n]), 100) for n in range(len(steps) + 1)]
    source = film(tmp_path / "in.mkv", times)
    through(vae, how, source, tmp_path / f"out{suffix}")
    with VideoReader(tmp_path / f"out{suffix}") as video:
        shown = [chunk.times[0] for chunk in video.timed_frames(chunk_size=1)]
        end = times[-1] + Fraction(4, 100)  # which is what the header of the source says of all frames
        assert shown == pytest.approx(times, abs=0.001)
        assert video.info.duration == pytest.approx(float(end), abs=0.012)


@BOTH
@pytest.mark.parametrize("source_suffix", [".gif", ".webp", ".mkv", ".mp4"])
@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".webm"])
def test_the_last_frame_is_shown_as_long_as_in_the_file(
    vae, tmp_path: Path, how: str, source_suffix: str, suffix: str
):
    source = tmp_path / f"in{source_suffix}"
    frames = torch.stack([torch.full((48, 64, 3), 40 * n, dtype=torch.uint8) for n in range(5)])
    with VideoWriter(source, 10) as writer:
        writer.write(frames, [Fraction(n, 10) for n in range(5)], end=Fraction(34, 10))
    through(vae, how, source, tmp_path / f"out{suffix}")
    with VideoReader(tmp_path / f"out{suffix}") as video:
        assert [time for chunk in video.timed_frames() for time in chunk.times] == [Fraction(n, 10) for n in range(5)]
        assert video.end == Fraction(34, 10)
    latents = (tmp_path / "out.safetensors").exists()
    assert latents == (how == "latents")
    if suffix == ".mp4":
        through(vae, how, source, tmp_path / "ten.mkv", Excerpt(fps=Fraction(10)))
        assert len(times_in(tmp_path / "ten.mkv")) == 34
        through(vae, how, source, tmp_path / "cut.mp4", Excerpt(num_frames=4))  # the last of these is not the file's
        with VideoReader(tmp_path / "cut.mp4") as video:
            assert video.info.duration < 1.2


@BOTH
def test_a_last_frame_shorter_than_the_average_ends_in_time_with_all_sound(vae, tmp_path: Path, how: str):
    times = [Fraction(n, 5) for n in range(5)] + [Fraction(n, 25) for n in range(25, 50)]
    source = film(tmp_path / "in.mp4", times, sound=("aac",), seconds=2.5)
    with VideoReader(source) as video:
        assert len(video.read()) == 30 and video.end == 2
    through(vae, how, source, tmp_path / "out.mp4")
    with VideoReader(tmp_path / "out.mp4") as video:
        assert len(video.read()) == 30 and video.end == 2
    assert beeps(tmp_path / "out.mp4")[1] == pytest.approx(2.5, abs=0.05)


def test_errors_of_who_uses_latents_are_not_of_the_file(tmp_path: Path):
    with LatentsWriter(tmp_path / "z.safetensors") as writer:
        writer.write(torch.zeros(1, 1, 3, 1, 1))
        writer.close(LatentsInfo("m", "25", 3, 8, 8, "in.mp4", False), [Fraction(n, 25) for n in range(2)])
    with pytest.raises(KeyError, match="mine"), open_latents(tmp_path / "z.safetensors"):
        raise KeyError("mine")
    with pytest.raises(ValueError, match="z.safetensors' .`times` must be int64, as many as frames, 3, got .*(2,)"):
        read_times(tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match="`path` must be a latents file .*z.safetensors"):
        copy_sound(tmp_path / "z.safetensors", tmp_path / "sound")
    for name, value in (("start", "-1"), ("start", "x"), ("time_unit", "0")):
        with pytest.raises(TypeError, match=f"`{name}` must be"):
            LatentsInfo("m", "25", 3, 8, 8, "in.mp4", False, **{name: value})

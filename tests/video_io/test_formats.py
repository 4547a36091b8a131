"""Outputs that are refused before any work, and what every kind of output holds by default."""

import os
from pathlib import Path

import av
import numpy as np
import pytest

from diffusers_leanvae.video_io import VideoError, formats, write_video
from diffusers_leanvae.video_io.formats import (
    CODECS,
    CONTAINERS,
    IMAGES,
    ON_GPU,
    check_output,
    find_output,
    is_sequence,
)
from diffusers_leanvae.video_io.inputs import find_sequence


ENCODERS = {"rawvideo": "wrapped_avframe"}


class TestTable:
    @pytest.mark.parametrize("codec", CODECS)
    def test_encoders_take_the_pixel_formats(self, codec: str):
        if codec in ON_GPU and codec not in av.codec.codecs_available:
            pytest.skip("this FFmpeg was built without it")
        taken = {form.name for form in av.Codec(ENCODERS.get(codec, codec), "w").video_formats or ()}
        if codec == "libx264":
            taken |= {form.name for form in av.Codec("libx264rgb", "w").video_formats or ()}
        assert not taken or set(CODECS[codec].pixel_formats) <= taken

    @pytest.mark.parametrize(
        ("name", "codec", "crf", "even", "odd"),
        [
            ("a.mp4", "libx264", 16, "yuv420p", "yuv444p"),
            ("a.MOV", "libx264", 16, "yuv420p", "yuv444p"),
            ("a.mkv", "libx264", 16, "yuv420p", "yuv444p"),
            ("a.webm", "libvpx-vp9", 16, "yuv420p", "yuv444p"),
            ("a.gif", "gif", None, "pal8", "pal8"),
            ("a.webp", "libwebp", 0, "bgra", "bgra"),
            ("a.y4m", "rawvideo", None, "yuv420p", "yuv444p"),
            ("a.png", "png", None, "rgb24", "rgb24"),
            ("a.jpeg", "mjpeg", None, "yuvj444p", "yuvj444p"),
            ("a_%03d.tif", "tiff", None, "rgb24", "rgb24"),
        ],
    )
    def test_defaults(self, name: str, codec: str, crf: float | None, even: str, odd: str):
        output = find_output(name)
        assert (output.codec, output.crf) == (codec, crf)
        assert CODECS[codec].pixel_format(48, 64) == even
        assert CODECS[codec].pixel_format(47, 64) == CODECS[codec].pixel_format(48, 63) == odd

    def test_sound(self):
        assert CONTAINERS[".mov"].holds_sound("pcm_s24be") and not CONTAINERS[".mp4"].holds_sound("pcm_s24be")
        assert not CONTAINERS[".mp4"].holds_sound("flac") and CONTAINERS[".mkv"].holds_sound("flac")
        assert not CONTAINERS[".webm"].holds_sound("aac") and CONTAINERS[".webm"].holds_sound("opus")


class TestSequences:
    def test_names(self, tmp_path: Path):
        for name, number, expected in [
            ("f_%04d.png", 7, "f_0007.png"),
            ("%d.jpg", 12, "12.jpg"),
            ("100%%_%2d.bmp", 3, "100%_03.bmp"),
        ]:
            assert is_sequence(tmp_path / name)
            assert find_output(tmp_path / name).image_path(number) == tmp_path / expected
        assert find_output(f"{tmp_path}/frames/").image_path(7) == tmp_path / "frames" / "000007.png"
        assert find_output(tmp_path).image_path(7) == tmp_path / "000007.png"  # a folder that exists
        for name in ("a%20b.png", "my%20dog.png", "%10d.png", "%s.png", "f_%04d.mp4", "%d_%d.png", "f_%%04d.png"):
            assert not is_sequence(tmp_path / name)

    def test_existing_images(self, tmp_path: Path):
        for name in ("f_0001.png", "f_0010.png", "f_12345.png", "f_1.png", "f_00002.png", "f_0003.jpg", "f_x.png"):
            (tmp_path / name).touch()
        assert sorted(find_output(tmp_path / "f_%04d.png").existing_images()) == [1, 10, 12345]
        assert sorted(find_output(tmp_path / "f_%d.png").existing_images()) == [1, 12345]
        assert find_output(f"{tmp_path}/none/").existing_images() == {}


class TestCheckOutput:
    def test_what_is_legal(self, tmp_path: Path):
        (tmp_path / "there.mp4").touch()
        os.mkfifo(tmp_path / "pipe.mkv")
        for name, options in [
            ("a.mp4", {"codec": "libsvtav1", "crf": 63}),
            ("a.mkv", {"codec": "ffv1", "crf": 99, "pixel_format": "gbrp12le"}),  # which has no quality to choose
            ("a.mov", {"codec": "prores_ks"}),
            ("a.gif", {"codec": "libx264", "crf": 20}),  # which an animation does not use
            ("a.webp", {"crf": 100, "num_images": 30}),
            ("a.png", {"num_images": 1}),
            ("f_%d.png", {"num_images": 30, "overwrite": False}),
            ("there.mp4", {}),
            ("pipe.mkv", {"overwrite": False}),
            ("é" * 125 + ".webm", {}),
        ]:
            check_output(tmp_path / name, **options)
        check_output("-")
        check_output("-", container="y4m", overwrite=False)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe.mkv", "there.mp4"]

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("a.xyz", {}, r"one of \.mp4, .*\.tiff, got '\.xyz'"),
            ("a", {}, "got ''"),
            (
                "a.webm",
                {"codec": "libx264"},
                r"`codec` must be one of libvpx-vp9, libsvtav1 for \.webm, got 'libx264'",
            ),
            ("a.mp4", {"codec": "ffv1"}, "`codec` must be one of libx264, .* for .mp4, got 'ffv1'"),
            ("a.mp4", {"crf": 52}, "`crf` must be 0 to 51 for libx264, got 52"),
            ("a.mkv", {"codec": "libvpx-vp9", "crf": -1}, "`crf` must be 0 to 63 for libvpx-vp9, got -1"),
            ("a.webp", {"crf": 101}, "`crf` must be 0 to 100"),
            ("a.mp4", {"pixel_format": "bgr0"}, "`pixel_format` must be one of yuv420p, .* for libx264, got 'bgr0'"),
            ("no/a.mp4", {}, "the folder '.*no' does not exist"),
            ("no/f_%d.png", {}, "the folder '.*no' does not exist"),
            ("no/frames/", {}, "the folder '.*no' does not exist"),
            ("folder.mp4", {}, "it is a folder"),
            ("there.mp4/", {}, "it is a file, expected a folder"),
            ("there.mp4", {"overwrite": False}, "it exists and `overwrite` is false"),
            ("f_%d.png", {"overwrite": False}, "'.*f_3.png' exists and `overwrite` is false"),
            ("a.png", {"num_images": 2}, r"an image file holds one frame, got 2; .*'a_%04d\.png'"),
            ("a" * 252 + ".mp4", {}, "a name may have 255 bytes, got 256"),
            ("a.gif", {"codec": "nonsense"}, "`codec` must be one of libx264, .*, got 'nonsense'"),
            ("a.png", {"codec": "nonsense"}, "`codec` must be one of libx264, .*, got 'nonsense'"),
            ("a.gif", {"pixel_format": "nonsense"}, "`pixel_format` must be one of yuv420p, .*, got 'nonsense'"),
            ("f_%d.png", {"pixel_format": "nonsense"}, "`pixel_format` must be one of yuv420p, .*, got 'nonsense'"),
            ("a.mp4", {"container": "mkv"}, "`container` must be None"),
            ("pipe.mp4", {}, r"it is a pipe, which needs \.mkv"),
        ],
    )
    def test_what_is_not(self, tmp_path: Path, name: str, options: dict, message: str):
        (tmp_path / "folder.mp4").mkdir()
        (tmp_path / "there.mp4").write_bytes(b"older")
        (tmp_path / "f_3.png").touch()
        os.mkfifo(tmp_path / "pipe.mp4")
        before = sorted(tmp_path.iterdir())
        with pytest.raises(VideoError, match=message):
            check_output(f"{tmp_path}/{name}", **options)
        assert sorted(tmp_path.iterdir()) == before

    @pytest.mark.parametrize("codec", ON_GPU)
    def test_encoders_of_gpus(self, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        # Not by a graphics card that may be there: `test_writer.py` takes what there is.
        monkeypatch.setattr(formats, "_can_encode", lambda name: name == "h264_nvenc")
        if codec == "h264_nvenc":
            assert check_output(tmp_path / "a.mov", codec=codec).crf == 16
        else:
            with pytest.raises(VideoError, match="`codec` hevc_nvenc needs an NVIDIA GPU that encodes videos, .*none"):
                check_output(tmp_path / "a.mkv", codec=codec)
        with pytest.raises(VideoError, match=r"`codec` must be one of libvpx-vp9, libsvtav1 for \.webm"):
            check_output(tmp_path / "a.webm", codec=codec)

    def test_an_encoder_that_opens_and_one_that_is_not_there(self):
        assert formats._can_encode("libx264") and not formats._can_encode("no_such_encoder")

    def test_standard_output(self):
        with pytest.raises(VideoError, match="`container` must be one of mkv, webm, y4m for '-', got 'mp4'"):
            check_output("-", container="mp4")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_folder_that_is_not_writable(self, tmp_path: Path):
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(VideoError, match="is not writable"):
            check_output(tmp_path / "locked" / "a.mp4")

    def test_every_extension_has_a_codec(self):
        for held in CONTAINERS.values():
            assert set(held.codecs) <= set(CODECS)
        assert set(IMAGES.values()) <= set(CODECS)


def test_numbers_are_padded_alike_on_both_sides(tmp_path: Path):
    """`%4d` is `%04d`, as FFmpeg has it: what is written is found again, and not replaced without a word."""
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    write_video(tmp_path / "f_%4d.png", frames, 25)
    assert find_sequence(tmp_path / "f_%4d.png") == [tmp_path / "f_0001.png", tmp_path / "f_0002.png"]
    with pytest.raises(VideoError, match="f_0001.png' exists"):
        check_output(tmp_path / "f_%4d.png", overwrite=False)

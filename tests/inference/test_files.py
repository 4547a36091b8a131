"""Files through an autoencoder: what is read and how often, which part of it, what is refused, stages in threads."""

import json
import math
import os
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from encoded_clips import count_opens, encode, moving_picture
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_leanvae.evaluation.metrics import frame_psnr, frame_ssim
from diffusers_leanvae.inference import files
from diffusers_leanvae.inference.files import Excerpt, decode_video, encode_video, reconstruct_video
from diffusers_leanvae.inference.latents_file import LatentsInfo, LatentsWriter, open_latents, read_times
from diffusers_leanvae.inference.memory import VideoJob, frames_ahead, plan_streams
from diffusers_leanvae.inference.padding import crop_sample, pad_sample
from diffusers_leanvae.video_io import VideoError, VideoInfo, read_video
from diffusers_leanvae.video_io.pixels import pixels_to_sample, pixels_to_unit, resize_frames, sample_to_unit
from diffusers_leanvae.video_io.sound import copy_streams


@pytest.fixture(scope="module")
def vae(make_model):
    return make_model()


@pytest.mark.parametrize("excerpt", [Excerpt(), Excerpt(5, 4), Excerpt(9, None, "32")])
def test_pictures_are_read_by_one_opening(vae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excerpt: Excerpt):
    source = encode(tmp_path / "in.mp4", moving_picture(14), options={"x264-params": "keyint=4"})
    opens = count_opens(monkeypatch)
    summary = reconstruct_video(vae, source, tmp_path / "out.mp4", excerpt=excerpt)
    # Once for its pictures; what else it may hold has an opening of its own, after one that finds the first frame.
    assert opens == ["in.mp4"] * 3
    info = encode_video(vae, source, tmp_path / "out.safetensors", model="", excerpt=excerpt)
    assert opens == ["in.mp4"] * 6
    num_frames = excerpt.num_frames or 14 - excerpt.start
    assert summary["num_frames"] == info.num_frames == num_frames
    assert len(read_video(tmp_path / "out.mp4")[0]) == num_frames


def test_figures_are_of_the_frames_read(vae, tmp_path: Path):
    source = encode(tmp_path / "in.mkv", moving_picture(11), "ffv1", "bgr0")
    excerpt = Excerpt(start=2, num_frames=6, size="42x30")
    summary = reconstruct_video(
        vae, source, tmp_path / "out.mkv", excerpt=excerpt, side_by_side=True, metrics=True, codec="ffv1"
    )
    frames = resize_frames(read_video(source, 2, 6)[0], 30, 42)
    sample, padding = pad_sample(pixels_to_sample(frames.permute(3, 0, 1, 2)[None]))
    with torch.no_grad():
        decoded = sample_to_unit(crop_sample(vae(sample).sample, padding)[0].transpose(0, 1))
    reference = pixels_to_unit(frames).permute(0, 3, 1, 2)
    assert summary["psnr_frame_mean_rgb"] == pytest.approx(frame_psnr(decoded, reference).mean().item(), abs=1e-3)
    assert summary["ssim_frame_mean_rgb"] == pytest.approx(frame_ssim(decoded, reference).mean().item(), abs=1e-4)
    written = read_video(tmp_path / "out.mkv")[0]
    assert torch.equal(written[:, :, :42], frames)
    close = (written[:, :, 42:].permute(0, 3, 1, 2) - decoded * 255).abs()
    assert close.max() <= 0.51 and decoded.std() > 0.05  # rounding to 256 levels


def test_a_file_can_take_its_own_place(vae, tmp_path: Path):
    source = encode(tmp_path / "in.mp4", moving_picture(6))
    reconstruct_video(vae, source, source)
    assert len(read_video(source)[0]) == 6 and list(tmp_path.iterdir()) == [source]


def test_excerpts():
    info = VideoInfo("", 80, 60, Fraction(25), 20, None, 0, False, "h264", "yuv420p", False)
    excerpts = Excerpt(), Excerpt(5), Excerpt(5, 7), Excerpt(18, 7)
    assert [excerpt.length(info, False) for excerpt in excerpts] == [20, 15, 7, 2]
    assert Excerpt(30).length(info, False) == 1  # a header can be wrong
    twice = Excerpt(5, fps=Fraction(50))
    # A rate that pictures are only shown at repeats none of them.
    assert (twice.length(info, True), twice.length(info, False)) == (30, 15)
    unknown = VideoInfo("", 80, 60, Fraction(25), None, None, 0, False, "h264", "yuv420p", False)
    assert [Excerpt(5).length(unknown, True), Excerpt(5, 7).length(unknown, True)] == [None, 7]
    assert [Excerpt(size=size).resized(60, 80) for size in (None, "30", "64x48")] == [(60, 80), (30, 40), (48, 64)]
    for size in ("", "x", "0", "4x", "1x2x3", "-3", "big"):
        with pytest.raises(ValueError, match=f"`size` must be a short side .* got '{size}'"):
            Excerpt(size=size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_laid_out_whatever_pieces_they_come_in(tmp_path: Path, dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr("diffusers_leanvae.inference.latents_file._COPY_BYTES", 100)  # several copies of few frames
    latents = torch.randn(1, 3, 7, 2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    info = LatentsInfo("m", "25", 25, 16, 40, "in.mp4", False)
    with LatentsWriter(tmp_path / "z.safetensors") as writer:
        for piece in latents.split([1, 4, 2], dim=2):
            writer.write(piece)
            writer.write(None)
        assert not (tmp_path / "z.safetensors").exists()
        writer.close(info)
    assert torch.equal(load_file(tmp_path / "z.safetensors")["latents"], latents)
    with open_latents(tmp_path / "z.safetensors") as (lazy, read):
        assert torch.equal(lazy[:, 1:, 2:4], latents[:, 1:, 2:4]) and read == info
    with pytest.raises(VideoError, match="'in.mp4' must hold at least one frame, got none"):
        with LatentsWriter(tmp_path / "empty.safetensors") as writer:
            writer.close(info)
    assert [path.name for path in tmp_path.iterdir()] == ["z.safetensors"]


def test_a_single_latent_is_written_and_comes_back(vae, tmp_path: Path):
    source = tmp_path / "in.png"
    Image.fromarray(np.asarray(moving_picture(1)[0, :8, :8])).save(source)
    encode_video(vae, source, tmp_path / "z.safetensors", model="")
    assert load_file(tmp_path / "z.safetensors")["latents"].shape[2:] == (1, 1, 1)
    decode_video(vae, tmp_path / "z.safetensors", tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (8, 8)


def test_latents_that_are_not_finite_are_refused_and_leave_nothing(vae, tmp_path: Path):
    path, latents = tmp_path / "z.safetensors", torch.zeros(1, vae.latent_channels, 9, 1, 1)
    with LatentsWriter(path) as writer:
        writer.write(latents)
        writer.close(LatentsInfo("m", "25", 33, 8, 8, "in.mp4", False))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["latents"][:, :, 7] = torch.nan
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="^`source` must hold finite latents, got infinite ones or NaN in .*z.safet"):
        decode_video(vae, path, tmp_path / "out.mp4")
    other = tmp_path / "y.safetensors"
    with pytest.raises(VideoError, match="Latents must be finite"), LatentsWriter(other) as writer:
        writer.write(latents / 0)
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_that_gives_no_numbers_writes_nothing(make_model, tmp_path: Path):
    vae, source = make_model(), encode(tmp_path / "in.mp4", moving_picture(6))
    for part, error in ((vae.decoder, "Frames must be numbers"), (vae.encoder, "Latents must be finite")):
        with torch.no_grad():
            next(iter(part.parameters())).fill_(torch.nan)
        with pytest.raises(ValueError, match=error):
            if part is vae.decoder:
                reconstruct_video(vae, source, tmp_path / "out.mp4")
            else:
                encode_video(vae, source, tmp_path / "out.safetensors", model="")
        assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("metadata", "times", "reason"),
    [
        ({"other": "x"}, [0, 1], r"\(it must have metadata named 'leanvae', got none\)"),
        ({"leanvae": "[]"}, [0, 1], r"\(its metadata 'leanvae' must be a mapping, got \[\]\)"),
        (None, [0.0, math.nan], r"\(`times` must be int64, as many as frames, 2, got torch.float32 of shape \(2,\)\)"),
        (None, [0], r"\(`times` must be int64, .* got torch.int64 of shape \(1,\)\)"),
    ],
)
def test_damaged_latents_say_what_is_wrong(tmp_path: Path, metadata: dict[str, str] | None, times: list, reason: str):
    info = LatentsInfo("m", "25", 2, 8, 8, "in.mp4", False, time_unit="1/25")
    tensors = {"latents": torch.zeros(1, 4, 1, 1, 1), "times": torch.tensor(times)}
    save_file(tensors, tmp_path / "z.safetensors", metadata or {"leanvae": json.dumps(asdict(info))})
    with pytest.raises(ValueError, match="^`path` must be a latents file of `leanvae encode`, got .*" + reason):
        read_times(tmp_path / "z.safetensors")


# --- Stages in threads -----------------------------------------------------------------------------------------------


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch):
    """A context in which no stage has a thread of its own."""
    open_streams = files._open_streams

    @contextmanager
    def context():
        with monkeypatch.context() as patch:
            patch.setattr(files, "_open_streams", lambda *given: open_streams(*given)._replace(num_ahead=0))
            yield

    return context


def stage_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("leanvae-stage")]


def test_stages_side_by_side_give_the_same_files(vae, tmp_path: Path, in_turn, monkeypatch: pytest.MonkeyPatch):
    source = encode(tmp_path / "in.mp4", moving_picture(23), pts=[2 * t + t // 3 for t in range(23)])
    names, threads = ("out.mp4", "z.safetensors", "decoded.mp4", "summary"), []

    def run(folder: Path) -> None:
        folder.mkdir()
        summary = reconstruct_video(
            vae,
            source,
            folder / "out.mp4",
            excerpt=Excerpt(2, size="36"),
            side_by_side=True,
            metrics=True,
            num_frames_per_step=4,
            progress=lambda *_: threads.append(len(stage_threads())),
        )
        encode_video(vae, source, folder / "z.safetensors", model="", num_frames_per_step=4)
        decode_video(vae, folder / "z.safetensors", folder / "decoded.mp4", num_frames_per_step=4)
        (folder / "summary").write_text(str(summary))

    run(tmp_path / "side by side")
    assert max(threads) == 2  # a reader and a writer
    threads.clear()
    with in_turn():
        run(tmp_path / "in turn")
    assert len(threads) == 21 and not any(threads)
    for name in names:
        assert (tmp_path / "side by side" / name).read_bytes() == (tmp_path / "in turn" / name).read_bytes(), name


def test_an_error_of_any_stage_is_that_of_stages_in_turn_and_leaves_nothing(vae, tmp_path: Path, in_turn):
    source = encode(tmp_path / "in.mp4", moving_picture(40), container_options={"movflags": "faststart"})
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(source.read_bytes()[: -source.stat().st_size // 3])
    num_steps = []

    def fail(*_: object) -> None:
        num_steps.append(1)
        if len(num_steps) % 4 == 0:
            raise RuntimeError("the network has failed")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    options: dict = {"num_frames_per_step": 4}
    cases: dict[str, tuple[Callable[[Path], object], type[BaseException], str]] = {
        "reader": (
            lambda path: reconstruct_video(vae, damaged, path, **options),
            VideoError,
            "damaged.mp4. past frame",
        ),
        "network": (lambda path: reconstruct_video(vae, source, path, **options), RuntimeError, "network has failed"),
        "writer": (
            lambda path: reconstruct_video(vae, source, path, excerpt=Excerpt(size="33x25"), pixel_format="yuv420p"),
            VideoError,
            "yuv420p needs even sizes",
        ),
        "caller": (
            lambda path: reconstruct_video(vae, source, path, progress=stop, **options),
            KeyboardInterrupt,
            "^$",
        ),
    }
    for stage, (call, kind, expected) in cases.items():
        said = []
        for is_in_turn in (False, True):
            handle = vae.decoder.register_forward_pre_hook(fail) if stage == "network" else None
            try:
                with pytest.raises(kind, match=expected) as error:
                    if is_in_turn:
                        with in_turn():
                            call(tmp_path / "out.mp4")
                    else:
                        call(tmp_path / "out.mp4")
            finally:
                if handle is not None:
                    handle.remove()
            assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.mp4", "in.mp4"], stage
            assert stage_threads() == [], stage
            said.append(str(error.value))
        assert said[0] == said[1]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux alone limits sizes of files for a process")
def test_a_full_disk_ends_all_in_one_sentence(vae, tmp_path: Path):
    import resource

    silent = encode(tmp_path / "silent.mkv", moving_picture(60, 64, 96), "ffv1", "bgr0")
    source = tmp_path / "in.mkv"
    with av.open(silent) as pictures, av.open(source, "w") as container:
        stream = container.add_stream_from_template(pictures.streams.video[0])
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")  # whose file is open as well
        for packet in pictures.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), "s16", "mono")
        frame.rate = 8000
        container.mux(sound.encode(frame))
    silent.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, limits[1]))
    try:
        with pytest.raises(VideoError, match=r"^Cannot write '.*out.mkv': \[Errno 27\] File too large[^\n]*$"):
            reconstruct_video(vae, source, tmp_path / "out.mkv", codec="ffv1", num_frames_per_step=4)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, limits[1]))
        with pytest.raises(VideoError, match=r"^Cannot write '.*out.safetensors': \[Errno 27\] File too large"):
            encode_video(vae, source, tmp_path / "out.safetensors", model="")
        with pytest.raises(VideoError, match=r"^Cannot write '.*sound.mkv': \[Errno 27\] File too large"):
            copy_streams(source, tmp_path / "sound.mkv", Fraction(0), None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [source] and stage_threads() == []


def test_frames_ahead_fit_the_bound(vae):
    job = VideoJob(200, 48, 64)
    plan, _ = plan_streams(vae, job, 2**30)
    assert frames_ahead(job, plan, 2**30) == plan.num_frames_per_step == 16
    frame = 2 * 48 * 64 * 3  # one that was read and one that is to be written
    assert [frames_ahead(job, plan, plan.bound + spare) for spare in (0, frame - 1, frame, 5 * frame)] == [0, 0, 1, 5]
    beside = VideoJob(200, 48, 64, keeps_originals=True)
    assert frames_ahead(beside, plan, plan.bound + 5 * frame) == 3
    one_way = VideoJob(200, 48, 64, decode=False)
    assert frames_ahead(one_way, plan, plan.bound + 5 * frame) == 10

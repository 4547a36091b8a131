"""The command line as a user meets it: right results, one clear sentence for bad input, never half a file."""

import io
import json
import logging
import re
import shutil
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import typer
from processes import run_python
from safetensors.torch import load_file
from tiny import make_tiny
from typer.testing import CliRunner

from diffusers_leanvae import bundled
from diffusers_leanvae.cli import app, demo
from diffusers_leanvae.cli.common import in_one_sentence, load_model, place
from diffusers_leanvae.cli.jobs import Jobs, process
from diffusers_leanvae.cli.videos import live
from diffusers_leanvae.inference import files
from diffusers_leanvae.inference.memory import parse_memory
from diffusers_leanvae.models.memory_planning import MemoryModel
from diffusers_leanvae.video_io import probe_video, read_video, write_video


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    return str(folder)


def clip(path: Path, num_frames: int = 9, height: int = 48, width: int = 64, fps: Fraction = Fraction(25), **options):
    y, x = np.mgrid[:height, :width]
    frames = np.stack(
        [np.stack(((x * 3 + 5 * t) % 256, (y * 4) % 256, (x + y + t) % 256), -1) for t in range(num_frames)]
    )
    write_video(path, torch.from_numpy(frames.astype(np.uint8)), fps, **options)
    return path


def leanvae(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("num_frames", "height", "width"), [(22, 131, 247), (1, 48, 64), (3, 48, 64), (9, 64, 32), (5, 9, 7), (4, 1, 1)]
)
def test_every_size_and_length_comes_back_as_it_was(model, tmp_path, num_frames, height, width):
    source = clip(tmp_path / "in.mkv", num_frames, height, width, Fraction(30000, 1001), codec="ffv1")
    code, out, err = leanvae("reconstruct", source, tmp_path / "out.mp4", "--model", model, "--metrics")
    assert code == 0, err
    assert "PSNR" in out and "SSIM" in out
    code, _, err = leanvae("encode", source, tmp_path / "out.safetensors", "--model", model)
    assert code == 0, err
    code, _, err = leanvae("decode", tmp_path / "out.safetensors", tmp_path / "decoded.mp4")
    assert code == 0, err
    for name in ("out.mp4", "decoded.mp4"):
        frames, info = read_video(tmp_path / name)
        assert frames.shape == (num_frames, height, width, 3)
        assert info.fps == Fraction(30000, 1001)
    reconstructed, decoded = (read_video(tmp_path / name)[0] for name in ("out.mp4", "decoded.mp4"))
    torch.testing.assert_close(reconstructed, decoded, rtol=0, atol=0)  # one path through the model, two ways to it
    assert entries(tmp_path) == ["decoded.mp4", "in.mkv", "out.mp4", "out.safetensors"]


def test_reconstruction_is_the_models(make_model, tmp_path):
    vae = make_model()
    source = clip(tmp_path / "in.mkv", 21, 40, 56, codec="ffv1")
    files.reconstruct_video(vae, source, tmp_path / "out.mkv", codec="ffv1")  # lossless on both sides
    sample = read_video(source)[0].permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = ((vae(sample).sample[0] + 1) * 127.5).clamp(0, 255).permute(1, 2, 3, 0)
    assert expected.std() > 10
    actual = read_video(tmp_path / "out.mkv")[0].float()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.51)  # rounding to 256 levels


def test_side_by_side_start_and_size(model, tmp_path):
    source = clip(tmp_path / "in.mp4", 12, 96, 128)
    target = tmp_path / "out.mp4"
    options = ("--side-by-side", "--start", 4, "--num-frames", 5, "--size", "64x48", "--dtype", "bf16")
    code, _, err = leanvae("reconstruct", source, target, "--model", model, *options)
    assert code == 0, err
    frames, _ = read_video(target)
    assert frames.shape == (5, 48, 128, 3)
    expected = torch.nn.functional.interpolate(
        read_video(source, start=4, num_frames=5)[0].permute(0, 3, 1, 2), size=(48, 64), mode="bicubic", antialias=True
    )
    assert (frames[:, :, :64].permute(0, 3, 1, 2).float() - expected.float()).abs().mean() < 6


# Of the least bound are the smallest tiles, whose halos are wider in the others; and their networks are traced first.
@pytest.mark.parametrize(
    "family, height, width",
    [
        ("leanvae", 44, 70),
        pytest.param("wfvae", 12, 20, marks=pytest.mark.slow),
        pytest.param("ivvae", 12, 20, marks=pytest.mark.slow),
    ],
)
def test_the_least_bound_on_memory_that_is_named_works(family, height, width, tmp_path, tmp_path_factory):
    model = str(tmp_path_factory.mktemp("model"))
    make_tiny(family).save_pretrained(model)
    source = clip(tmp_path / "in.mkv", 11, height, width, codec="ffv1")
    for command, target in (("reconstruct", "out.mp4"), ("encode", "z.safetensors"), ("decode", "decoded.mp4")):
        path = tmp_path / "z.safetensors" if command == "decode" else source
        arguments = (command, path, tmp_path / target, "--model", model, "--max-memory")
        code, _, err = leanvae(*arguments, "1MiB")
        match = re.fullmatch(r"error: `--max-memory` must be at least about (\d+) MiB for .*, got 1 MiB\.\n", err)
        assert code == 1 and match is not None, err
        least = int(match[1])
        code, _, err = leanvae(*arguments, f"{least - 1}MiB")
        assert code == 1 and f"at least about {least} MiB for" in err
        code, _, err = leanvae(*arguments, f"{least}MiB")
        assert code == 0, err
    assert entries(tmp_path) == ["decoded.mp4", "in.mkv", "out.mp4", "z.safetensors"]
    for name in ("out.mp4", "decoded.mp4"):
        assert read_video(tmp_path / name)[0].shape == (11, height, width, 3)


def test_a_bound_on_memory_changes_no_pixel(make_model, tmp_path, monkeypatch):
    vae = make_model()
    source = clip(tmp_path / "in.mkv", 14, 44, 70, codec="ffv1")
    plan = vae.memory_model().stream((48, 72), 14, 8, (24, 32, 5), 4, is_parked=True)._replace(overhead=7.4)
    assert plan.layout == (24, 32, 5)
    # Sizes at which the planner itself needs tiles would take minutes: it is told to choose these.
    for choice in (
        plan,
        plan._replace(layout=(8, 72, 9), is_parked=False),
        plan._replace(layout=None, is_parked=False),
    ):
        warned = pytest.warns(
            UserWarning, match="`max_memory` leaves room for small tiles only: about 7 times the work"
        )
        with monkeypatch.context() as patch, warned:
            patch.setattr(MemoryModel, "fit_stream", lambda *_, choice=choice, **__: choice)
            options: dict = {"max_memory": 2**30, "codec": "ffv1"}
            files.reconstruct_video(vae, source, tmp_path / "out.mkv", **options)
            files.encode_video(vae, source, tmp_path / "z.safetensors", model="", max_memory=2**30)
            files.decode_video(vae, tmp_path / "z.safetensors", tmp_path / "decoded.mkv", **options)
        files.reconstruct_video(vae, source, tmp_path / "whole.mkv", codec="ffv1")
        files.encode_video(vae, source, tmp_path / "whole.safetensors", model="")
        latents, expected = (load_file(tmp_path / f"{n}.safetensors")["latents"] for n in ("z", "whole"))
        assert expected.std() > 0.1
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
        whole = read_video(tmp_path / "whole.mkv")[0].int()
        for name in ("out.mkv", "decoded.mkv"):
            difference = (read_video(tmp_path / name)[0].int() - whole).abs()
            assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3  # what lay between two levels
    assert not vae.use_tiling
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_fused_latents_are_those_of_the_layers_up_to_rounding(model, tmp_path):
    source, names = clip(tmp_path / "in.mp4"), ("eager.safetensors", "fused.safetensors")
    for name, options in zip(names, ((), ("--fuse",)), strict=True):
        code, _, err = leanvae("encode", source, tmp_path / name, "--model", model, *options)
        assert code == 0, err
    eager, fused = (load_file(tmp_path / name)["latents"] for name in names)
    assert 0 < (fused - eager).abs().max() < 1e-4 * eager.abs().max()


def test_sizes_of_memory():
    assert parse_memory("2GiB") == parse_memory(" 2 gib ") == parse_memory("2G") == 2**31
    assert parse_memory("800MiB") == 800 * 2**20 and parse_memory("1.5GB") == 15 * 10**8
    assert parse_memory("123456") == parse_memory("123456B") == 123456
    for text in ("", "2 apples", "-1GiB", "GiB", "0", "1e9"):
        with pytest.raises(ValueError, match="`max_memory` must be a size such as 2GiB or 800MiB, got"):
            parse_memory(text)


def test_images(model, tmp_path):
    write_video(tmp_path / "in.png", torch.randint(0, 256, (1, 33, 50, 3), dtype=torch.uint8), 1)
    assert leanvae("reconstruct", tmp_path / "in.png", tmp_path / "out.png", "--model", model)[0] == 0
    assert leanvae("encode", tmp_path / "in.png", tmp_path / "z.safetensors", "--model", model)[0] == 0
    assert leanvae("decode", tmp_path / "z.safetensors", tmp_path / "decoded.png")[0] == 0
    reconstructed, decoded = (read_video(tmp_path / name)[0] for name in ("out.png", "decoded.png"))
    assert reconstructed.shape == (1, 33, 50, 3)
    torch.testing.assert_close(reconstructed, decoded, rtol=0, atol=0)


def test_a_folder_goes_on_past_a_bad_file_and_continues_where_it_stopped(model, tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    (source / "deeper").mkdir(parents=True)
    clip(source / "a.mp4")
    clip(source / "deeper" / "b.mp4")
    (source / "broken.mp4").write_text("this is not a video")
    code, out, err = leanvae("reconstruct", source, target, "--model", model)
    assert code == 1
    assert entries(target) == ["a.mp4", "b.mp4", "deeper"]
    assert "broken.mp4" in err and "1 of 3 files failed" in err
    before = (target / "a.mp4").stat().st_mtime_ns
    (target / "deeper" / "b.mp4").unlink()
    (source / "broken.mp4").unlink()
    code, out, err = leanvae("reconstruct", source, target, "--model", model)
    assert code == 0
    assert "done already" in err and (target / "deeper" / "b.mp4").exists()
    assert (target / "a.mp4").stat().st_mtime_ns == before
    assert leanvae("reconstruct", source, target, "--model", model, "--overwrite")[0] == 0
    assert (target / "a.mp4").stat().st_mtime_ns > before
    assert leanvae("encode", source, tmp_path / "z", "--model", model)[0] == 0
    assert leanvae("decode", tmp_path / "z", tmp_path / "y")[0] == 0
    assert entries(tmp_path / "y") == ["a.mp4", "b.mp4", "deeper"]


def test_a_folder_with_one_file_is_a_folder(model, tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    clip(source / "a.mp4", 1)
    assert leanvae("reconstruct", source, target, "--model", model)[0] == 0
    before = (target / "a.mp4").stat().st_mtime_ns
    code, _, err = leanvae("reconstruct", source, target, "--model", model)
    assert code == 0 and "done already, skipped" in err
    assert (target / "a.mp4").stat().st_mtime_ns == before


def test_no_file_is_written_over_its_source_or_another_output(model, tmp_path):
    video = clip(tmp_path / "a.mp4", 1)
    content = video.read_bytes()
    for output in (video, tmp_path):  # the folder stands for the file of this name in it
        code, _, err = leanvae("reconstruct", video, output, "--model", model, "--overwrite")
        assert code == 1 and err.startswith("error: OUT must not be a file that is read")
    code, _, err = leanvae("reconstruct", tmp_path, tmp_path, "--model", model, "--overwrite")
    assert code == 1 and err.startswith("error: OUT must not be the folder that is read")
    assert video.read_bytes() == content
    clip(tmp_path / "a.mkv", 1, height=24)
    clip(tmp_path / "a.mov", 1, height=40)
    for command, source, target, suffix in (
        ("encode", tmp_path, "latents", "safetensors"),
        ("reconstruct", tmp_path, "out", "mp4"),
        ("decode", tmp_path / "latents", "decoded", None),
    ):
        code, _, err = leanvae(command, source, tmp_path / target, "--model", model)
        assert code == 0, err
        names = [f"a.mkv.{suffix}", f"a.mov.{suffix}", f"a.mp4.{suffix}"]
        assert entries(tmp_path / target) == (names if suffix else ["a.mkv.mp4", "a.mov.mp4", "a.mp4.mp4"])
    for folder in ("out", "decoded"):
        heights = {path.name: probe_video(path).height for path in (tmp_path / folder).iterdir()}
        assert heights == {"a.mkv.mp4": 24, "a.mov.mp4": 40, "a.mp4.mp4": 48}


def test_one_output_is_replaced_only_if_asked(model, tmp_path):
    source, target, latents = clip(tmp_path / "a.mov", 3), tmp_path / "b.mp4", tmp_path / "b.safetensors"
    for arguments in (("reconstruct", source, target), ("encode", source, latents), ("decode", latents, target)):
        target.unlink(missing_ok=True) if arguments[0] == "decode" else None
        code, _, err = leanvae(*arguments, "--model", model)
        assert code == 0, err
        before = arguments[2].stat().st_mtime_ns
        # A model that does not exist would be an error as well: it is not looked for.
        code, _, err = leanvae(*arguments, "--model", "nowhere")
        assert code == 1 and err == f"error: OUT must not exist without `--overwrite`, got {str(arguments[2])!r}.\n"
        assert arguments[2].stat().st_mtime_ns == before
        code, _, err = leanvae(*arguments, "--model", model, "--overwrite")
        assert code == 0 and arguments[2].stat().st_mtime_ns > before


def test_without_a_model_it_is_said_which_weights_are_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip(tmp_path / "a.mkv", 1, 16, 16)
    for command, target in (("reconstruct", "b.mp4"), ("encode", "b.safetensors")):
        code, out, err = leanvae(command, "a.mkv", target, "--device", "cpu")
        assert code == 0 and err == "uses the demonstration weights compact-16ch; `--model` names others\n"
        code, out, err = leanvae(command, "a.mkv", target, "--device", "cpu", "--model", "compact-16ch", "--overwrite")
        assert code == 0 and err == ""


def test_a_model_that_does_not_exist_is_named_at_once(tmp_path):
    source = clip(tmp_path / "a.mkv", 1, 16, 16)
    for name in ("compact16ch", "models/vae", "./vae", str(tmp_path / "vae")):
        (tmp_path / "models").mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            begin = time.monotonic()
            code, _, err = leanvae("reconstruct", source, tmp_path / "b.mp4", "--model", name)
            assert time.monotonic() - begin < 5  # one try of the Hub without a network takes 23 s
        assert code == 1 and f"`--model` {name!r} cannot be loaded" in err and err.count("\n") == 1
        assert "'compact-16ch', 'compact-4ch'" in err
    assert (
        "perhaps 'compact-16ch' is meant"
        in leanvae("encode", source, tmp_path / "z.safetensors", "--model", "compact16ch")[2]
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [(None, "cpu"), ("cuda", "cuda"), ("mps", "mps"), ("xpu", "xpu"), ("privateuseone", "cpu")],
)
def test_the_device_is_the_accelerator_that_there_is(monkeypatch, found, expected):
    accelerator = None if found is None else torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerator)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)  # there is no such device here
    device, dtype = place("auto", "auto")
    assert device.type == expected and dtype is (torch.bfloat16 if expected == "cuda" else torch.float32)
    assert place("cpu", "auto")[0].type == "cpu"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("`x` must be\n  small, got 9."), "error: `x` must be small, got 9."),
        (FileNotFoundError(2, "No such file", "x.mp4"), "error: [Errno 2] No such file: 'x.mp4'"),
        (ImportError("install the extra `text`"), "error: install the extra `text`"),
        (MemoryError(), "error: out of memory; try smaller or fewer frames"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "error: out of memory; try smaller or fewer frames"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out of memory; try smaller"),
        (KeyError("weight"), "error: KeyError: 'weight' (`LEANVAE_TRACEBACK=1 leanvae ...` shows where"),
    ],
)
def test_every_error_is_one_sentence(monkeypatch, capsys, error, sentence):
    def command() -> None:
        raise error

    monkeypatch.delenv("LEANVAE_TRACEBACK", raising=False)
    with pytest.raises(typer.Exit) as raised:
        in_one_sentence(command)()
    output = capsys.readouterr()
    assert raised.value.exit_code == 1 and output.out == ""
    assert output.err.startswith(sentence) and output.err.count("\n") == 1
    monkeypatch.setenv("LEANVAE_TRACEBACK", "1")
    with pytest.raises(type(error)):
        in_one_sentence(command)()


def test_an_interrupted_command_says_so(capsys):
    def command() -> None:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as raised:
        in_one_sentence(command)()
    assert raised.value.exit_code == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_bad_file_of_a_folder_stops_no_other_whatever_its_error(tmp_path, capsys):
    jobs = Jobs([(tmp_path / name, tmp_path / "out" / name) for name in "abc"], is_folder=True)

    def work(source: Path, target: Path, progress: Any) -> dict[str, Any]:
        if source.name == "b":
            raise RuntimeError("can't allocate memory")
        return {"width": 4, "height": 2, "num_frames": 1}

    with pytest.raises(ValueError, match="1 of 3 files failed: .*b"):
        process(jobs, False, work)
    output = capsys.readouterr()
    assert output.out == "".join(f"{tmp_path / 'out' / name}  4x2  1 frame\n" for name in "ac")
    assert output.err.startswith("error: out of memory")


def test_messages_name_what_the_user_gave(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").write_bytes(bytes(16 * 24 * 3) + b"x")
    monkeypatch.chdir(tmp_path)
    for options, expected in (
        (
            (),
            "Standard input must hold whole frames of 24x16 RGB24, 1152 bytes each, got 1 bytes after 1 whole frames.",
        ),
        (("--num-frames-per-step", "3"), "`--num-frames-per-step` must be a positive multiple of 4, got 3."),
    ):
        with open("in") as source, open("out", "w") as target, pytest.raises(SystemExit):
            monkeypatch.setattr("sys.stdin", source)
            monkeypatch.setattr("sys.stdout", target)
            app(["live", "--width", "24", "--height", "16", "--model", model, *options])
        assert capsys.readouterr().err == f"error: {expected}\n"
    for arguments, expected in (
        (("eval", "nothing"), "FOLDER must be a folder of videos"),
        (("encode-dataset", "nothing", "z", "--model", model), "SOURCE must be a folder of videos"),
        (("push", "nothing", "user/name"), "FOLDER must be that of a saved model"),
        (("export", "nothing", "new"), "MODEL 'nothing' cannot be loaded: it must be 'compact-16ch', "),
        (("generate", "--model", "nothing"), "`--model` 'nothing' cannot be loaded: it must be a bundled pipeline"),
    ):
        code, _, err = leanvae(*arguments)
        assert code == 1 and err.startswith(f"error: {expected}") and err.count("\n") == 1, err


def test_progress_bars_of_loading_are_for_terminals(monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr("sys.stderr", io.StringIO())
    code = "import sys; from diffusers_leanvae.cli.common import place; place('cpu', 'fp32'); "
    code += "print('transformers' in sys.modules); from transformers.utils import logging; "
    assert run_python(code + "print(logging.is_progress_bar_enabled())").split()[1] == "False"
    monkeypatch.setattr(logging, "_tqdm_active", True)
    place("cpu", "fp32")
    assert not logging.is_progress_bar_enabled()


def test_a_folder_here_gives_its_name(model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "vae")
    for number in (1, 2):
        write_video(tmp_path / "vae" / f"{number}.png", torch.zeros(1, 16, 16, 3, dtype=torch.uint8), 1)
    monkeypatch.chdir(tmp_path / "vae")
    for target, expected in (("../a/", "a/vae.mp4"), (f"{tmp_path}/b/", "b/vae.mp4")):
        code, _, err = leanvae("reconstruct", ".", target, "--frames", "--model", model)
        assert code == 0 and (tmp_path / expected).is_file(), err
    pytest.importorskip("onnxscript", reason="without it there is no page")
    code, _, err = leanvae("page", ".", tmp_path / "page")
    assert code == 0 and json.loads((tmp_path / "page" / "page.json").read_text())["model"] == "vae", err


def test_live_chooses_the_step_of_its_model(tmp_path, monkeypatch, capsys):
    make_tiny("wfvae", temporal_compression_ratio=8, num_encoder_layers=1).save_pretrained(tmp_path / "wf8")
    (tmp_path / "in").write_bytes(np.random.default_rng(0).bytes(10 * 16 * 24 * 3))
    with open(tmp_path / "in") as source, open(tmp_path / "out", "w") as target:  # files have what pipes have
        monkeypatch.setattr("sys.stdin", source)
        monkeypatch.setattr("sys.stdout", target)
        live(24, 16, str(tmp_path / "wf8"))
        with pytest.raises(ValueError, match="`num_frames_per_step` must be a positive multiple of 8, got 4"):
            live(24, 16, str(tmp_path / "wf8"), num_frames_per_step=4)
    assert (tmp_path / "out").stat().st_size == (tmp_path / "in").stat().st_size
    assert capsys.readouterr().err == "10 frames\n"


def damaged(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "bad.mp4"
    if kind == "missing":
        return path
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("WEBVTT\n\nthis is text\n" * 50)
    elif kind == "truncated":
        clip(path, 60)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "corrupt":
        clip(path, 120, 96, 128, preset="ultrafast")
        data = bytearray(path.read_bytes())
        middle = len(data) // 2
        data[middle : middle + 2000] = np.random.default_rng(0).bytes(2000)
        path.write_bytes(data)
    elif kind == "audio":
        with av.open(path, "w") as container:
            stream = container.add_stream("aac", rate=16000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
            frame.rate = 16000
            container.mux(stream.encode(frame) + stream.encode(None))
    return path


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "corrupt", "audio"])
@pytest.mark.parametrize("command", ["reconstruct", "encode"])
def test_bad_files_give_one_sentence_and_leave_nothing(model, tmp_path, command, kind):
    source = damaged(tmp_path, kind)
    output = tmp_path / "out"
    output.mkdir()
    target = output / ("out.mp4" if command == "reconstruct" else "out.safetensors")
    code, _, err = leanvae(command, source, target, "--model", model)
    assert code == 1
    assert err.startswith("error: ") and err.count("\n") == 1 and "bad.mp4" in err and "Traceback" not in err
    assert entries(output) == []


def test_bad_arguments_give_one_sentence(model, tmp_path):
    source = clip(tmp_path / "in.mp4")
    for arguments, expected in [
        (("reconstruct", source, tmp_path / "o.mp4", "--model", tmp_path / "nothing.ckpt"), "cannot be loaded"),
        (("reconstruct", source, tmp_path / "o.mp4", "--model", tmp_path / "nothing"), "cannot be loaded"),
        (("reconstruct", source, tmp_path / "o.mp4", "--model", model, "--dtype", "int8"), "`--dtype` must be"),
        (("reconstruct", source, tmp_path / "o.mp4", "--model", model, "--device", "cuda:7"), "`--device` must be"),
        (("reconstruct", source, tmp_path / "o.mp4", "--model", model, "--size", "big"), "`--size` must be"),
        (("reconstruct", source, tmp_path / "o.mp4", "--model", model, "--start", 99), "in.mp4"),
        (("reconstruct", source, tmp_path / "o.xyz", "--model", model), ".mp4"),
        (("encode", source, tmp_path / "o.safetensors", "--model", model, "--max-memory", "much"), "2GiB or 800MiB"),
        (("encode", source, tmp_path / "o.safetensors", "--model", model, "--max-memory", "1MiB"), "must be at least"),
        (("encode", source, tmp_path / "o.mp4", "--model", model), "must end in .safetensors"),
        (("decode", source, tmp_path / "o.mp4"), "must be a latents file"),
        (("reconstruct", source, "", "--model", model), "OUT must not be empty, got ''."),
        (("encode", "", tmp_path / "o.safetensors", "--model", model), "IN must not be empty, got ''."),
        (("encode-dataset", tmp_path, "", "--model", model), "OUT must not be empty, got ''."),
        (("generate", "--output", ""), "`--output` must not be empty, got ''."),
        (("convert", model, tmp_path / "o.onnx", "--to-original"), "must end in"),
        (("convert", source, tmp_path / "o"), f"IN '{source}' cannot be converted: "),
        (("convert", model, source), f"OUT must be a folder, got '{source}', which is a file"),
        (("convert", "nothing", tmp_path / "o.pt", "--to-original"), "IN 'nothing' cannot be converted: "),
        (
            ("convert", model, tmp_path / "o.pt", "--to-original", "--latents-like", "wan2.1"),
            "`--latents-like` must not be given with `--to-original`",
        ),
        (("convert", model, tmp_path / "o", "--latents-like", "wan"), "`--latents-like` must be 'wan2.1', 'wan2.2'"),
        (("info", tmp_path / "nothing.mp4"), "nothing.mp4"),
        (("demo", "--output", source), f"`--output` must lead to a folder to write to, got '{source}'"),
        (("demo", "--output", "/proc/x"), "`--output` must lead to a folder to write to, got '/proc/x'"),
        (("bench", "--output", "/proc/x.json"), "`--output` must lead to a folder to write to, got '/proc/x.json'"),
        (("page", model, "/proc/x"), "OUT must lead to a folder to write to, got '/proc/x'"),
        (("export", model, "/proc/x"), "OUT must lead to a folder to write to, got '/proc/x'"),
        (("convert", model, "/proc/x"), "OUT must lead to a folder to write to, got '/proc/x'"),
        (("pull", "user/name", "/proc/x"), "FOLDER must lead to a folder to write to, got '/proc/x'"),
        (("eval", tmp_path, "--report", "/proc/x"), "`--report` must lead to a folder to write to, got '/proc/x'"),
        (
            ("encode", source, "/proc/x.safetensors"),
            "OUT must lead to a folder to write to, got '/proc/x.safetensors'",
        ),
        (
            ("decode", source, tmp_path / "o.mp4", "--audio-from", "nope"),
            "`--audio-from` must be a file that exists, got 'nope'",
        ),
        (
            ("decode", source, tmp_path / "o.mp4", "--audio-from", tmp_path),
            f"`--audio-from` must be a file that exists, got '{tmp_path}'",
        ),
    ]:
        code, _, err = leanvae(*arguments)
        assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and expected in err, (arguments, err)
    assert entries(tmp_path) == ["in.mp4"]


def test_convert_there_and_back(model, make_model, tmp_path):
    assert leanvae("convert", model, tmp_path / "original.ckpt", "--to-original")[0] == 0
    (tmp_path / "teacher.json").write_text(json.dumps({"latents_mean": [1, 0, 0, 0], "latents_std": [2, 1, 1, 1]}))
    options = ("--latents-like", tmp_path / "teacher.json")
    make_model(scaling_factor=0.7744).save_pretrained(tmp_path / "scaled")
    assert leanvae("convert", tmp_path / "scaled", tmp_path / "scaled.ckpt", "--to-original")[0] == 0
    assert leanvae("convert", tmp_path / "scaled.ckpt", tmp_path / "aligned", *options)[0] == 0
    config = json.loads((tmp_path / "aligned" / "config.json").read_text())
    assert config["latents_mean"] == [1.0, 0.0, 0.0, 0.0] and config["latents_std"] == [2.0, 1.0, 1.0, 1.0]
    assert config["scaling_factor"] == 1.0  # that of the teacher, which has none; applied once more it would be wrong
    code, out, err = leanvae("convert", tmp_path / "original.ckpt", tmp_path / "other", "--latents-like", "wan2.1")
    assert code == 1 and "`latents_mean` must have 4 entries, got 16" in err
    code, out, err = leanvae("convert", tmp_path / "original.ckpt", tmp_path / "back")
    assert code == 0, err
    back = type(make_model()).from_pretrained(tmp_path / "back")
    for key, tensor in make_model().state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor)


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_convert_replaces_only_what_it_is_told_to(model, tmp_path):
    original, folder = tmp_path / "original.ckpt", tmp_path / "folder"
    assert leanvae("convert", model, original, "--to-original")[0] == 0
    assert leanvae("convert", original, folder)[0] == 0
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"of another model")
    for name in ("videos", "foreign", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"")
    (tmp_path / "foreign" / "config.json").write_text("{}")
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "weights.ckpt").mkdir()
    before = stamps(tmp_path)

    for arguments, expected in [
        ((model, original, "--to-original"), "OUT must not exist without `--overwrite`"),
        ((original, folder), "OUT must not exist without `--overwrite`"),
        ((original, tmp_path / "videos", "--overwrite"), "OUT must be new, empty or a model folder"),
        ((original, tmp_path / "foreign", "--overwrite"), "OUT must be new, empty or a model folder"),
        ((original, tmp_path / "damaged", "--overwrite"), "OUT must be new, empty or a model folder"),
        (
            (model, tmp_path / "weights.ckpt", "--to-original", "--overwrite"),
            "OUT must be a file with `--to-original`",
        ),
    ]:
        code, _, err = leanvae("convert", *arguments)
        assert code == 1 and err.startswith(f"error: {expected}") and str(arguments[1]) in err, (arguments, err)
    assert stamps(tmp_path) == before

    assert leanvae("convert", original, folder, "--overwrite")[0] == 0
    assert entries(folder) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert leanvae("convert", folder, original, "--to-original", "--overwrite")[0] == 0
    (tmp_path / "empty").mkdir()
    assert leanvae("convert", original, tmp_path / "empty")[0] == 0
    assert entries(tmp_path / "empty") == entries(folder)


def test_convert_never_replaces_what_it_reads(model, tmp_path, monkeypatch):
    folder, weights = tmp_path / "model", tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    shutil.copytree(model, folder)
    original, link = folder / "original.ckpt", tmp_path / "link.safetensors"
    link.symlink_to(weights)
    assert leanvae("convert", folder, original, "--to-original")[0] == 0
    shutil.copytree(folder, tmp_path / "teacher")
    (tmp_path / "source").mkdir()
    shutil.copy(original, tmp_path / "source" / "original.ckpt")
    before = stamps(tmp_path)
    for arguments in [
        (folder, weights, "--to-original"),
        (folder, link, "--to-original"),
        (original, original, "--to-original"),
        (original, folder),
        (weights, folder),
        (tmp_path / "source", tmp_path / "teacher", "--latents-like", tmp_path / "teacher"),
    ]:
        code, _, err = leanvae("convert", *arguments, "--overwrite")
        assert code == 1 and f"OUT must not replace a file that is read, got '{arguments[1]}'" in err, (arguments, err)
    monkeypatch.chdir(folder)
    code, _, err = leanvae("convert", tmp_path / "source" / "original.ckpt", ".", "--overwrite")
    assert code == 1 and "OUT must not be the current folder, which would be replaced, got '.'" in err
    assert stamps(tmp_path) == before


@pytest.mark.skipif(not bundled.clip_path().exists(), reason="the bundled clip is not in this checkout")
def test_demo(tmp_path):
    code, out, err = leanvae("demo", "--output", tmp_path, "--num-frames", 5, "--json")
    assert code == 0 and err.startswith("A clip of 512x288") and f"{tmp_path / 'frames.png'}\n" in err
    assert "pipeline components" not in err
    told = json.loads(out)
    names = ["frames.png", "generated.mp4", "generated.png", "latents.safetensors", "side_by_side.mp4"]
    assert entries(tmp_path) == names
    assert probe_video(tmp_path / "side_by_side.mp4").width == 2 * probe_video(bundled.clip_path()).width
    assert (told["num_frames"], told["generator"]) == (5, "mini-scenes") and told["psnr_frame_mean_rgb"] > 30.0
    assert sorted(Path(path).name for path in told.values() if str(path).startswith(str(tmp_path))) == names
    info = probe_video(tmp_path / "generated.mp4")
    assert (info.width, info.height, info.num_frames) == (256, 128, 17)


def test_demo_replaces_only_what_it_is_told_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stop = ("--device", "nowhere")  # which is looked at afterwards
    for name in demo.FILES:
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text("mine")
        code, _, err = leanvae("demo", "--output", folder, *stop)
        assert code == 1
        assert err == f"error: Results in `--output` must not exist without `--overwrite`, got '{folder / name}'.\n"
        assert "`--device` must be" in leanvae("demo", "--output", folder, *stop, "--overwrite")[2]
        (folder / name).unlink()
        (folder / name).mkdir()
        code, _, err = leanvae("demo", "--output", folder, *stop, "--overwrite")
        assert err == f"error: Results in `--output` must be files, got '{folder / name}', which is a folder.\n"
    demo.FOLDER.mkdir(parents=True)
    (demo.FOLDER / "frames.png").write_text("of the last time")
    assert "`--device` must be" in leanvae("demo", *stop)[2]


def test_demo_without_transformers_and_accelerate(tmp_path, monkeypatch, capsys):
    for name in ("transformers", "accelerate"):
        monkeypatch.setattr(f"diffusers.utils.import_utils._{name}_available", False)
    monkeypatch.setattr(demo, "NUM_STEPS", 1)
    warned = []
    monkeypatch.setattr(logging.getLogger("diffusers"), "handle", warned.append)
    load_model(bundled.DEFAULT, "cpu")
    demo.generate_two(tmp_path, torch.device("cpu"), print)
    out = capsys.readouterr().out
    assert out.startswith('Videos from texts need transformers: pip install "diffusers-leanvae[text]"; these are of')
    assert out.count("\n") == 4 and warned == []
    info = probe_video(tmp_path / "generated.mp4")
    assert (info.width, info.height, info.num_frames) == (128, 64, 17)

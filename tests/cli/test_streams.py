"""The command line between other programs: pipes, addresses, numbered pictures, other folders and other weights."""

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from fractions import Fraction
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from processes import Piped
from tiny import make_tiny
from typer.testing import CliRunner

from diffusers_leanvae.cli import app
from diffusers_leanvae.cli.videos import check_format
from diffusers_leanvae.video_io import VideoReader, probe_video, read_video, write_video


MAIN = "import sys; from diffusers_leanvae.cli import app; app(sys.argv[1:])"


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    frames = torch.randint(0, 256, (7, 24, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_video(tmp_path / "clip.mkv", frames, Fraction(24), codec="ffv1")
    return tmp_path / "clip.mkv"


def leanvae(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def run_app(*arguments: object) -> None:
    app([str(argument) for argument in arguments])


def run_anew(*arguments: object, data: bytes) -> tuple[int, bytes, bytes]:
    """Run the command in an interpreter of its own, where nothing is imported yet."""
    command = [sys.executable, "-c", MAIN, *map(str, arguments)]
    finished = subprocess.run(command, input=data, capture_output=True, env=os.environ, timeout=300)
    return finished.returncode, finished.stdout, finished.stderr


@pytest.mark.parametrize("container", ["mkv", "y4m", "webm"])
def test_from_standard_input_to_standard_output(model, clip, tmp_path, container):
    arguments = ("reconstruct", "-", "-", "--model", model, "--format", container)
    if container == "mkv":
        code, out, err = run_anew(*arguments, data=clip.read_bytes())
    else:  # what differs from here on does not depend on how the process began
        code, out, err = Piped(run_app, *arguments).communicate(clip.read_bytes())
    assert code == 0 and err == b"-  32x24  7 frames\n"
    path = tmp_path / f"out.{container}"
    path.write_bytes(out)
    code, _, err = leanvae("reconstruct", clip, tmp_path / f"expected.{container}", "--model", model)
    assert code == 0, err
    actual, expected = read_video(path), read_video(tmp_path / f"expected.{container}")
    assert actual[1].fps == 24 and len(actual[0]) == 7
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0)


def test_a_bad_pipe_is_one_sentence(model, tmp_path):
    for data, reason in ((b"", b"nothing came through the pipe"), (b"no video" * 100, b"'-'")):
        process = Piped(run_app, "reconstruct", "-", tmp_path / "out.mp4", "--model", model)
        code, out, err = process.communicate(data)
        assert code == 1 and out == b""
        assert err.startswith(b"error: ") and err.count(b"\n") == 1 and reason in err
    assert list(tmp_path.iterdir()) == []


def test_standard_input_is_not_written_over(model, clip):
    content = clip.read_bytes()
    process = Piped(run_app, "reconstruct", "-", clip, "--model", model, "--overwrite", stdin=clip)
    code, _, err = process.communicate()
    assert code == 1 and err.startswith(b"error: OUT must not be a file that is read")
    assert clip.read_bytes() == content


def test_a_reader_that_has_seen_enough(model, tmp_path):
    frames = torch.randint(0, 256, (200, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_video(tmp_path / "long.mkv", frames, 24, preset="ultrafast")
    process = Piped(run_app, "reconstruct", tmp_path / "long.mkv", "-", "--model", model, "--metrics")
    process.stdout.read(1000)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 0 and b"error" not in said and b"Traceback" not in said, said


def test_a_reader_of_lines_that_has_seen_enough_ends_a_batch_quietly(model, clip, tmp_path):
    for name in "bcd":
        shutil.copy(clip, tmp_path / f"{name}.mkv")
    process = Piped(run_app, "reconstruct", tmp_path, tmp_path / "out", "--model", model, "--json")
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 141 and said == b""
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.mp4"]  # whole, and nothing half-written


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("arguments", [["--version"], ["models"]])
def test_a_full_standard_output_is_named(arguments, capsys, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.stdout", open("/dev/full", "w"))
        app(arguments)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: Cannot write to standard output: [Errno 28] No space left on device\n"


LIVE = ["live", "--width", "16", "--height", "16"]


@pytest.mark.parametrize(
    "arguments", [LIVE, ["info", "-"], ["reconstruct", "-", "out.mp4"], ["decode", "IN", "o.mp4", "--audio-from", "-"]]
)
def test_standard_input_that_gives_nothing(arguments, clip, capsys, monkeypatch):
    arguments = [str(clip) if argument == "IN" else argument for argument in arguments]
    terminal, end = os.openpty()
    with open(end) as stream:
        for given, found in ((None, "a closed one"), (stream, "a terminal")):
            monkeypatch.setattr("sys.stdin", given)
            with pytest.raises(SystemExit) as ended:
                app(arguments)
            said = capsys.readouterr().err
            assert ended.value.code == 1
            assert said == f"error: Standard input must be a file or pipe, got {found}.\n"
    os.close(terminal)


@pytest.mark.parametrize("arguments", [LIVE, ["reconstruct", "IN", "-"], ["decode", "IN", "-"]])
def test_a_closed_standard_output(arguments, clip, capsys, monkeypatch):
    with monkeypatch.context() as patch, open(clip) as source, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.stdin", source)
        patch.setattr("sys.stdout", None)
        app([str(clip) if argument == "IN" else argument for argument in arguments])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said == "error: Standard output must be a file, a pipe or a terminal, got a closed one.\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_from_named_pipe_to_named_pipe(model, clip, tmp_path):
    received = []
    os.mkfifo(tmp_path / "in.mkv")
    os.mkfifo(tmp_path / "out.mkv")
    sender = threading.Thread(target=lambda: (tmp_path / "in.mkv").write_bytes(clip.read_bytes()))
    receiver = threading.Thread(target=lambda: received.append((tmp_path / "out.mkv").read_bytes()))
    sender.start()
    receiver.start()
    code, _, err = leanvae("reconstruct", tmp_path / "in.mkv", tmp_path / "out.mkv", "--model", model)
    assert code == 0, err
    sender.join(60)
    receiver.join(60)
    (tmp_path / "copy.mkv").write_bytes(received[0])
    assert leanvae("reconstruct", clip, tmp_path / "expected.mkv", "--model", model)[0] == 0
    assert torch.equal(*(read_video(tmp_path / name)[0] for name in ("copy.mkv", "expected.mkv")))


def test_addresses(model, clip, tmp_path, monkeypatch):
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        address = f"http://127.0.0.1:{server.server_address[1]}"
        (tmp_path / "out").mkdir()
        code, out, err = leanvae("reconstruct", f"{address}/clip.mkv", tmp_path / "out", "--model", model)
        assert code == 0, err
        code, _, err = leanvae("encode", f"{address}/clip.mkv", tmp_path / "out", "--model", model)
        assert code == 0, err
        code, _, err = leanvae("reconstruct", f"{address}/none.mkv", tmp_path / "none.mp4", "--model", model)
        assert code == 1 and "the server answered 404" in err and not (tmp_path / "none.mp4").exists()
        server.shutdown()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip.mp4", "clip.safetensors"]
    process = Piped(run_app, "decode", "-", tmp_path / "back.mp4")
    code, _, said = process.communicate((tmp_path / "out" / "clip.safetensors").read_bytes())
    assert code == 0, said
    torch.testing.assert_close(
        *(read_video(tmp_path / name)[0] for name in ("back.mp4", "out/clip.mp4")), rtol=0, atol=0
    )


def test_pictures_in_and_out(model, clip, tmp_path):
    code, out, err = leanvae("reconstruct", clip, tmp_path / "new" / "f_%03d.png", "--model", model)
    assert code == 0, err
    names = [f"f_{number:03d}.png" for number in range(1, 8)]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    for index, (source, extra) in enumerate(
        ((tmp_path / "new" / "f_%03d.png", ()), (tmp_path / "new", ("--frames",)))
    ):
        for rate, options in ((25, ()), (12, ("--fps", 12))):
            target = tmp_path / f"out_{index}_{rate}.mp4"
            code, _, err = leanvae("reconstruct", source, target, "--model", model, *extra, *options)
            assert code == 0, err
            info = probe_video(target)
            assert info.fps == rate and info.num_frames == 7
    # Without the option each of them is a picture of its own.
    code, out, err = leanvae("reconstruct", tmp_path / "new", tmp_path / "apart", "--model", model)
    assert code == 0 and sorted(path.name for path in (tmp_path / "apart").iterdir()) == names


def test_a_folder_in_another_format(model, clip, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(clip, tmp_path / "in" / "a.mkv")
    write_video(tmp_path / "in" / "still.jpg", torch.zeros(1, 16, 16, 3, dtype=torch.uint8), 1)
    for name, expected in (
        ("gif", ["a.gif", "still.png"]),
        ("webm", ["a.webm", "still.png"]),
        ("jpg", [*(f"a/{number:06d}.jpg" for number in range(1, 8)), "still.jpg"]),
    ):
        arguments = ("reconstruct", tmp_path / "in", tmp_path / name, "--model", model, "--format", name)
        code, _, err = leanvae(*arguments)
        assert code == 0, err
        found = sorted(p.relative_to(tmp_path / name).as_posix() for p in (tmp_path / name).rglob("*") if p.is_file())
        assert found == expected
        code, _, err = leanvae(*arguments)
        assert code == 0 and err.count("done already, skipped") == 2
    code, _, err = leanvae("reconstruct", tmp_path / "in", tmp_path / "x", "--model", model, "--format", "xyz")
    assert code == 1 and "`--format` must be one of 'mp4'" in err
    code, _, err = leanvae("reconstruct", clip, tmp_path / "x.mp4", "--model", model, "--format", "webm")
    assert code == 1 and "`--format` must not be given where OUT has an extension, got 'webm'" in err
    check_format("webm", str(tmp_path / "in"), str(tmp_path / "v1.0"))  # a folder as IN makes a folder of OUT
    with pytest.raises(ValueError, match="`--format` must not be given where OUT has an extension, got 'webm'"):
        check_format("webm", str(tmp_path / "in"), str(tmp_path / "v1.0"), frames=True)
    code, _, err = leanvae("reconstruct", clip, "-", "--model", model, "--format", "mp4")
    assert code == 1 and "`--format` must be one of 'mkv', 'webm', 'y4m' on standard output, got 'mp4'" in err


def test_a_bad_file_leaves_no_empty_folder(model, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "bad.mp4").write_text("no video")
    code, _, err = leanvae("reconstruct", tmp_path / "in", tmp_path / "out", "--model", model)
    assert code == 1 and "1 of 1 files failed" in err
    assert not (tmp_path / "out" / "deep").exists()


def test_lossless_output(model, clip, tmp_path):
    common = ("reconstruct", clip)
    for name, options in (
        ("a.mkv", ("--codec", "ffv1")),
        ("b.mp4", ("--crf", 0, "--pix-fmt", "rgb24")),
        ("%d.png", ()),
    ):
        code, _, err = leanvae(*common, tmp_path / name, "--model", model, *options)
        assert code == 0, err
    frames = [read_video(tmp_path / name)[0] for name in ("a.mkv", "b.mp4", "%d.png")]
    assert torch.equal(frames[0], frames[1]) and torch.equal(frames[0], frames[2])
    with VideoReader(tmp_path / "a.mkv") as video:
        assert video.info.codec == "ffv1"


@pytest.mark.parametrize(
    "options, message",
    [
        (("--fps", "0"), "`--fps` must be a rate of at most 1000 such as 25 or 30000/1001, got '0'"),
        (("--fps", "1/0"), "`--fps` must be a rate"),
        (("--fps", "fast"), "`--fps` must be a rate"),
        (("--background", "vermillionish"), "`--background` must be a colour such as white or #102030"),
        (("--codec", "libvpx"), "`--codec` must be one of libx264"),
        (("--pix-fmt", "yuv"), "`--pix-fmt` must be one of yuv420p"),
        (("--crf", "63"), "`--crf` must be 0 to 51 for libx264, got 63"),
        (("--frames",), "IN must be a folder with `--frames`"),
    ],
)
def test_options_are_looked_at_before_any_work(clip, tmp_path, options, message):
    code, _, err = leanvae("reconstruct", clip, tmp_path / "out.mp4", "--model", "nowhere", *options)
    assert code == 1 and message in err and err.count("\n") == 1


def test_transparency_over_a_colour(model, tmp_path):
    from PIL import Image

    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "in.png")
    for colour, level in (("#203040", (32, 48, 64)), ("white", (255, 255, 255))):
        Image.new("RGB", (16, 16), level).save(tmp_path / "opaque.png")
        for source, target in (("in.png", "out.png"), ("opaque.png", "expected.png")):
            arguments = ("reconstruct", tmp_path / source, tmp_path / target, "--model", model, "--overwrite")
            code, _, err = leanvae(*arguments, "--background", colour)
            assert code == 0, err
        assert torch.equal(*(read_video(tmp_path / name)[0] for name in ("out.png", "expected.png")))


def test_names_of_255_bytes(model, clip, tmp_path):
    stem = "\u96ea" * 83 + "x"
    (tmp_path / "in").mkdir()
    source = clip.rename(tmp_path / "in" / f"{stem}y.mkv")
    assert len(os.fsencode(source.name)) == 255
    for command, place, folder in (
        ("reconstruct", source, "one"),
        ("reconstruct", source.parent, "out"),
        ("encode", source.parent, "z"),
        ("decode", tmp_path / "z", "back"),
    ):
        (tmp_path / folder).mkdir()
        code, _, err = leanvae(command, place, tmp_path / folder, "--model", model)
        assert code == 0, err
        (written,) = (tmp_path / folder).iterdir()
        assert len(os.fsencode(written.name)) <= 255 and written.name.startswith(stem[:40])


def test_links_to_folders_of_latents_are_followed_once(model, clip, tmp_path):
    (tmp_path / "z").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for target in (tmp_path / "z" / "a.safetensors", tmp_path / "elsewhere" / "b.safetensors"):
        assert leanvae("encode", clip, target, "--model", model)[0] == 0
    (tmp_path / "z" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "z" / "circle").symlink_to(tmp_path / "z")
    (tmp_path / "z" / "._a.safetensors").write_bytes(b"of macOS")
    code, _, err = leanvae("decode", tmp_path / "z", tmp_path / "out")
    assert code == 0, err
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.mp4"))
    assert found == ["a.mp4", "link/b.mp4"]


# --- The model of a file of latents ----------------------------------------------------------------------------------


def test_latents_find_their_model_from_anywhere(clip, tmp_path, monkeypatch):
    make_tiny("leanvae").save_pretrained(tmp_path / "here" / "models" / "vae")
    monkeypatch.chdir(tmp_path / "here")
    code, _, err = leanvae("encode", clip, tmp_path / "z.safetensors", "--model", "models/vae")
    assert code == 0, err
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    code, _, err = leanvae("decode", tmp_path / "z.safetensors", "out.mp4")
    assert code == 0, err
    shutil.rmtree(tmp_path / "here")
    code, _, err = leanvae("decode", tmp_path / "z.safetensors", "again.mp4")
    assert code == 1 and str(tmp_path / "here" / "models" / "vae") in err and "does not exist" in err


def test_other_weights_are_refused(clip, tmp_path):
    folder, latents = tmp_path / "vae", tmp_path / "z.safetensors"
    make_tiny("leanvae").save_pretrained(folder)
    assert leanvae("encode", clip, latents, "--model", folder)[0] == 0
    vae = make_tiny("leanvae")
    vae.conversion.write_original_checkpoint(tmp_path / "vae.ckpt", dict(vae.config), vae.state_dict())
    for options in ((), ("--model", tmp_path / "vae.ckpt"), ("--dtype", "bf16"), ("--dtype", "fp16"), ("--fuse",)):
        code, _, err = leanvae("decode", latents, tmp_path / "out.mp4", "--overwrite", *options)
        assert code == 0, err  # the same weights, in whatever file and dtype
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1e-3
    vae.save_pretrained(folder)  # other weights under the same name
    for options in ((), ("--model", folder)):
        code, _, err = leanvae("decode", latents, tmp_path / "bad.mp4", *options)
        assert (
            code == 1
            and err.startswith("error: `--model` must have the weights that encoded '")
            and err.count("\n") == 1
        )
        assert "`--any-weights` decodes all the same" in err and not (tmp_path / "bad.mp4").exists()
    code, _, err = leanvae("decode", latents, tmp_path / "bad.mp4", "--any-weights")
    assert code == 0, err
    described = json.loads(leanvae("info", latents)[1])
    assert len(described["weights_sha256"]) == 64 and described["model"] == str(folder)

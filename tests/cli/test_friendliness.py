"""Help, completion and machine-readable results: what the command line offers beside its work."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from huggingface_hub import constants, snapshot_download
from local_hub import LocalHub
from tiny import make_tiny
from typer.testing import CliRunner

from diffusers_leanvae import bundled
from diffusers_leanvae.checks import DTYPES
from diffusers_leanvae.cli import COMMANDS, app, choices
from diffusers_leanvae.evaluation.codecs import CODECS
from diffusers_leanvae.evaluation.measures import KINDS
from diffusers_leanvae.evaluation.protocols import PROTOCOLS
from diffusers_leanvae.generation.schedulers import SCHEDULERS
from diffusers_leanvae.loading import load_autoencoder
from diffusers_leanvae.registration import MODELS
from diffusers_leanvae.video_io import formats, write_video


def leaves(name: str) -> list[tuple[str, Any]]:
    """The command, or those in the group of this name."""
    parsed: Any = typer.main.get_command(app)
    inside = getattr(parsed.commands[name], "commands", None)
    return [(name, parsed.commands[name])] if inside is None else [(f"{name} {key}", inside[key]) for key in inside]


def invoke(*arguments: object, **options) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def complete(*words: str) -> list[str]:
    """Return what the script of bash gets for the last of the words."""
    environment = {
        "_LEANVAE_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("leanvae", *words)),
        "COMP_CWORD": str(len(words)),
    }
    return invoke(env=environment)[1].split()


# --- Help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_h_is_help(command):
    arguments = [] if command is None else [command]
    code, out, err = invoke(*arguments, "-h")
    assert (code, err) == (0, "") and "Usage: leanvae" in out
    assert invoke(*arguments, "--help")[1] == out


def test_names_in_help_are_those_of_the_tables():
    assert set(choices.DTYPE_NAMES) == {*DTYPES, *DTYPES.values()}
    assert set(choices.METRICS) == set(KINDS)
    assert set(choices.PROTOCOLS) == set(PROTOCOLS)
    assert set(choices.RATE_CODECS) == set(CODECS)
    assert set(choices.SCHEDULERS) == set(SCHEDULERS)
    assert set(choices.VIDEO_CODECS) < set(formats.CODECS)
    assert {f".{name}" for name in choices.FILE_FORMATS} == set(formats.CONTAINERS)
    assert {f".{name}" for name in (*choices.IMAGE_FORMATS, "webp")} == set(formats.IMAGES)
    streamable = {name for name, container in formats.CONTAINERS.items() if container.is_streamable}
    assert {f".{name}" for name in choices.STREAM_FORMATS} == streamable


# --- Empty texts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, command", [leaf for name in COMMANDS for leaf in leaves(name)])
def test_no_command_takes_an_empty_text(name, command):
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            given, shown = ["--", ""], next(p for p in command.params if p.param_type_name == "argument").metavar
        elif getattr(parameter, "is_flag", False) or parameter.name in ("help", "prompt"):
            continue
        else:
            given, shown = [parameter.opts[0], ""], f"`{parameter.opts[0]}`"
        code, out, err = invoke(*name.split(), *given)
        assert (code, out, err) == (1, "", f"error: {shown.strip('[]')} must not be empty, got ''.\n")
    if name == "generate":  # a model of texts may be given none
        assert "`--device` must be" in invoke("generate", "--prompt", "", "--device", "nowhere")[2]


# --- Completion ------------------------------------------------------------------------------------------------------


def test_commands_options_and_names_are_completed():
    assert complete("enc") == ["encode", "encode-dataset"]
    assert complete("reconstruct", "--over") == ["--overwrite"]
    assert complete("reconstruct", "a.mp4", "b.mp4", "--model", "comp") == list(bundled.MODELS)
    assert complete("encode", "--dtype", "f") == ["float32", "fp32", "float16", "fp16"]
    assert complete("encode-dataset", "--flip", "") == ["auto", "none", "random", "both"]
    assert complete("eval", "--metric", "psnr") == ["psnr", "psnr_in_group"]
    assert complete("bench", "--peer", "AutoencoderKLC") == ["AutoencoderKLCogVideoX", "AutoencoderKLCosmos"]
    assert complete("reconstruct", "clips/") == []  # of which bash then makes files


def test_the_script_of_bash_works_and_help_imports_little(tmp_path):
    program = tmp_path / "leanvae"
    program.write_text(
        f"#!{sys.executable}\n"
        "import atexit, sys\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'huggingface_hub', 'av', 'yaml'}\n"
        "atexit.register(lambda: print('heavy:', *heavy & sys.modules.keys(), file=sys.stderr))\n"
        "from diffusers_leanvae.cli import app\n"
        "app()\n"
    )
    program.chmod(0o755)
    script = """
        leanvae --help > /dev/null
        source <(leanvae --show-completion bash)
        COMP_WORDS=(leanvae inf) COMP_CWORD=1
        _leanvae_completion leanvae
        echo "${COMPREPLY[@]}"
    """
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0 and result.stdout == "info\n", result.stderr
    assert result.stderr == "heavy:\n" * 3


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    generator = torch.Generator().manual_seed(0)
    for name in "ab":
        frames = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8, generator=generator)
        write_video(folder / f"{name}.mkv", frames, 25, codec="ffv1")
    make_tiny("leanvae").save_pretrained(folder / "vae")
    return folder


def test_files_are_told_line_by_line(clips, tmp_path):
    model = ("--model", clips / "vae", "--json")
    code, out, err = invoke("reconstruct", clips, tmp_path / "out", *model, "--metrics")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and [Path(line["input"]).name for line in lines] == ["a.mkv", "b.mkv"]
    for line in lines:
        assert Path(line["output"]).is_file() and -1 < line["ssim_frame_mean_rgb"] < 1 < line["psnr_frame_mean_rgb"]
        assert (line["width"], line["height"], line["num_frames"], line["fps"]) == (32, 32, 5, "25")
    told = {"num_frames": 5, "height": 32, "width": 32, "fps": "25"}
    latents, video = tmp_path / "z.safetensors", tmp_path / "decoded.mkv"
    for command, source, target in (("encode", clips / "a.mkv", latents), ("decode", latents, video)):
        code, out, err = invoke(command, source, target, *model)
        assert json.loads(out) == {"input": str(source), "output": str(target), **told}, err
    code, out, err = invoke("decode", latents, "-", *model)
    assert (code, out) == (1, "")
    assert err == "error: `--json` must not be given with standard output as OUT, got '-'.\n"


def test_models_and_data_sets_are_told_on_one_line(clips, tmp_path):
    code, out, err = invoke("info", clips / "vae")
    code_of_line, line, _ = invoke("info", clips / "vae", "--json")
    assert code == code_of_line == 0 and json.loads(out) == json.loads(line)
    assert out.count("\n") > 10 and line.count("\n") == 1
    num_parameters = json.loads(line)["num_parameters"]
    original, folder = tmp_path / "original.safetensors", tmp_path / "converted"
    assert invoke("convert", clips / "vae", original, "--to-original")[0] == 0
    code, out, err = invoke("convert", original, folder, "--json")
    told = {"output": str(folder), "class": "AutoencoderKLLeanVAE", "num_parameters": num_parameters}
    assert json.loads(out) == told, err
    options = ("--model", clips / "vae", "--clip-size", "5x16x16", "--num-clips", 3, "--json")
    code, out, err = invoke("encode-dataset", "shapes", tmp_path / "latents", *options)
    told = {"num_items": 3, "shape": [4, 2, 2, 2], "num_skipped": 0, "num_captions": 3}
    assert json.loads(out) == {"output": str(tmp_path / "latents")} | told, err


def test_an_evaluation_is_told_as_its_file_is_written(clips, tmp_path):
    protocol = ("--num-frames", 5, "--size", 32, "--metric", "psnr", "--json")
    output = tmp_path / "result.json"
    code, out, err = invoke("eval", clips, "--model", clips / "vae", "--output", output, *protocol)
    told, written = json.loads(out), json.loads(output.read_text())
    assert code == 0 and written.pop("provenance") and told == written
    assert err.splitlines()[0].startswith("[1/2] a.mkv") and told["num_videos"] == 2
    code, out, err = invoke("eval", clips, "--compare", clips / "vae", "--report", tmp_path / "report", *protocol)
    told = json.loads(out)
    assert code == 0 and [one["model"] for one in told["evaluations"]] == [str(clips / "vae")]
    assert told["evaluations"][0]["clips"] == written["clips"]
    assert all(Path(path).is_file() for path in told["report"]) and len(told["report"]) == 4


# --- Models on this machine ------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the Hub with a repository of each kind."""
    folders = {name: tmp_path / name for name in ("vae", "parts", "checkpoints", "pipeline", "foreign", "half")}
    vae = make_tiny("leanvae", torch.float16)
    vae.save_pretrained(folders["vae"])
    vae.save_pretrained(folders["parts"] / "small")
    vae.save_pretrained(folders["half"])
    folders["checkpoints"].mkdir()
    for name in ("leanvae", "ivvae"):
        model = make_tiny(name)
        path = folders["checkpoints"] / f"{name}.ckpt"
        model.conversion.write_original_checkpoint(path, dict(model.config), model.state_dict())
    torch.save({"optimizer": [1, 2]}, folders["checkpoints"] / "optimizer.pt")
    vae.save_pretrained(folders["pipeline"] / "vae")
    make_tiny("latte").save_pretrained(folders["pipeline"] / "transformer")
    own = ["diffusers_leanvae", "ModelMixin"]
    index = {"_class_name": "LeanVAELattePipeline", "vae": own, "transformer": own}
    (folders["pipeline"] / "model_index.json").write_text(json.dumps(index))
    folders["foreign"].mkdir()
    (folders["foreign"] / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    (folders["foreign"] / "weights.pt").write_bytes(b"no pickle")
    with LocalHub() as server:
        server.connect(monkeypatch)
        for name, folder in folders.items():
            files = [path for path in folder.rglob("*") if path.is_file()]
            server.repositories[f"user/{name}"] = {
                path.relative_to(folder).as_posix(): path.read_bytes() for path in files
            }
            left_out = ["*.safetensors"] if name == "half" else None  # as an interrupted download does
            snapshot_download(f"user/{name}", cache_dir=tmp_path / "cache", ignore_patterns=left_out)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_bundled_and_cached_models_are_listed_as_they_are_named(cache):
    code, out, err = invoke("models", "--json")
    told = json.loads(out)
    assert (code, err, told["cache"]) == (0, "", str(cache))
    models = {model["name"]: model for model in told["models"]}
    cached = ["checkpoints/ivvae.ckpt", "checkpoints/leanvae.ckpt", "parts/small", "pipeline", "vae"]
    assert list(models) == [*bundled.MODELS, *bundled.PIPELINES, *(f"user/{name}" for name in cached)]
    for name, model in models.items():
        is_cached = name.startswith("user/")
        assert model["revision"] == ("main" if is_cached else None) and Path(model["path"]).exists()
        if model["class"] in MODELS:
            loaded = load_autoencoder(model["path"])
            assert type(loaded).__name__ == model["class"]
            assert sum(parameter.numel() for parameter in loaded.parameters()) == model["num_parameters"]
            for key in ("latent_channels", "temporal_compression_ratio", "spatial_compression_ratio"):
                assert getattr(loaded, key) == model[key]
    assert models["user/pipeline"]["num_bytes"] > models["user/vae"]["num_bytes"] > 0
    code, out, err = invoke("models")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:5] == ["name", "revision", "class", "channels", "compression"] and len(lines) == 1 + len(models)
    assert lines[-1][:5] == ["user/vae", "main", "AutoencoderKLLeanVAE", "4", "4x8x8"]


def test_a_cache_that_is_a_file_is_named(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", __file__)
    code, out, err = invoke("models")
    assert (code, out) == (1, "")
    assert err == f"error: The cache of the Hub, HF_HUB_CACHE, must be a folder, got the file '{__file__}'.\n"


def test_an_empty_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    code, out, err = invoke("models")
    assert code == 0 and len(out.splitlines()) == 1 + len(bundled.MODELS) + len(bundled.PIPELINES)
    assert err == f"none in the cache of the Hub, {tmp_path / 'none'}\n"

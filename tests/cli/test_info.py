"""`leanvae info` describes files and models by their headers and configs, and as the loaded models are."""

import functools
import json
import os
import subprocess
import sys
import threading
from fractions import Fraction
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import av
import numpy as np
import pytest
import torch
from tiny import make_tiny
from typer.testing import CliRunner

from diffusers_leanvae import bundled, registration
from diffusers_leanvae.cli import app
from diffusers_leanvae.conversion.headers import read_header
from diffusers_leanvae.description import FAMILIES, describe
from diffusers_leanvae.video_io import write_video


# Family and what differs from its smallest config.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "leanvae": ("leanvae", {}),
    "leanvae_2x4": ("leanvae", {"patch_size": [1, 2, 2]}),
    "wfvae": ("wfvae", {}),
    "wfvae_8x": ("wfvae", {"temporal_compression_ratio": 8, "num_encoder_layers": 1}),
    "ivvae": ("ivvae", {}),
    "latte": ("latte", {}),
}


def info(path: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["info", str(path)])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def error(path: object) -> str:
    result = CliRunner().invoke(app, ["info", str(path)])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one_file", "shards"])
def test_models_are_what_they_are_when_loaded(name, options, tmp_path):
    family, config = MODELS[name]
    model = make_tiny(family, torch.float16, **config)
    model.save_pretrained(tmp_path, **options)
    described = describe(str(tmp_path))
    assert described is not None
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert described["class"] == type(model).__name__ and described["family"] == model.conversion.NAME
    assert described["num_parameters"] == num_parameters and described["dtypes"] == {"float16": num_parameters}
    assert described["num_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or not options
    for ratio in ("temporal_compression_ratio", "spatial_compression_ratio"):
        assert described.get(ratio) == getattr(model, ratio, None)
    config = json.loads(json.dumps({key: value for key, value in model.config.items() if not key.startswith("_")}))
    assert described["config"] == config


def test_every_family_is_known():
    assert FAMILIES.keys() == registration.MODELS.keys()


ORIGINALS = [(name, ".safetensors") for name in MODELS if name != "leanvae_2x4"]  # the original has one patch size
ORIGINALS += [("leanvae", ".ckpt"), ("wfvae", ".ckpt"), ("ivvae", ".ckpt"), ("latte", ".ckpt")]


@pytest.mark.parametrize("name, suffix", ORIGINALS)
def test_an_original_checkpoint_is_described_like_its_folder(name, suffix, tmp_path):
    family, config = MODELS[name]
    model = make_tiny(family, **config)
    model.save_pretrained(tmp_path / "folder")
    path = tmp_path / f"original{suffix}"
    model.conversion.write_original_checkpoint(path, dict(model.config), model.state_dict())
    assert (describe(str(path)) is None) == (suffix == ".ckpt")  # a pickle is loaded
    described = info(tmp_path / "folder"), info(path)
    expected, actual = ({key: value for key, value in d.pop("config").items() if value} for d in described)
    assert len(expected.keys() & actual.keys()) > 3
    assert all(actual[key] == expected[key] for key in expected.keys() & actual.keys())
    from_folder, from_file = ({key: value for key, value in d.items() if key != "num_bytes"} for d in described)
    assert from_file == from_folder


@pytest.mark.parametrize("name", [{}, {"_class_name": "WFVAEModel"}], ids=["unnamed", "named"])
def test_the_folder_of_an_original_model(name, tmp_path):
    model, path = make_tiny("wfvae"), tmp_path / "diffusion_pytorch_model.safetensors"
    model.conversion.write_original_checkpoint(path, dict(model.config), model.state_dict())
    (tmp_path / "config.json").write_text(json.dumps({model.conversion.CONFIG_ANCHOR: 3} | name))
    assert info(tmp_path) == info(path) and info(path)["family"] == "WF-VAE"


def test_bundled_models_and_pipelines():
    vae, pipeline = info("compact-4ch"), info("mini-shapes")
    assert vae["class"] == "AutoencoderKLLeanVAE" and vae["num_parameters"] > 1e6
    assert pipeline["kind"] == "pipeline" and pipeline["class"] == "LeanVAELattePipeline"
    assert pipeline["components"]["vae"] == vae
    transformer = pipeline["components"]["transformer"]
    assert transformer["family"] == "Latte"
    assert pipeline["num_parameters"] == vae["num_parameters"] + transformer["num_parameters"]
    assert (
        len(pipeline["labels"]) == transformer["config"]["num_classes"] and pipeline["labels"][1] == "red circle right"
    )


def test_videos_images_and_latents(tmp_path):
    write_video(tmp_path / "in.mp4", torch.zeros(9, 48, 64, 3, dtype=torch.uint8), 25)
    write_video(tmp_path / "in.PNG", torch.zeros(1, 48, 64, 3, dtype=torch.uint8), 1)
    described = info(tmp_path / "in.mp4")
    assert described["kind"] == "video" and described["num_frames"] == 9 and described["fps"] == "25"
    assert described["frame_rate"] == "constant" and described["audio_codecs"] == [] and not described["has_audio"]
    assert info(tmp_path / "in.PNG")["kind"] == "image"
    (tmp_path / "noname").write_bytes((tmp_path / "in.mp4").read_bytes())  # what a file is, it says itself
    assert info(tmp_path / "noname")["num_frames"] == 9
    make_tiny("leanvae").save_pretrained(tmp_path / "vae")
    model = ["--model", str(tmp_path / "vae")]
    CliRunner().invoke(app, ["encode", str(tmp_path / "in.mp4"), str(tmp_path / "z.safetensors"), *model])
    described = info(tmp_path / "z.safetensors")
    assert described["kind"] == "latents" and described["shape"] == [1, 4, 3, 6, 8] and described["dtype"] == "float32"
    assert described["num_frames"] == 9 and described["source"] == "in.mp4" and described["height"] == 48
    (tmp_path / "folder" / "below").mkdir(parents=True)
    for name in ("a.safetensors", "below/b.safetensors"):
        (tmp_path / "folder" / name).write_bytes((tmp_path / "z.safetensors").read_bytes())
    described = info(tmp_path / "folder")
    assert described["kind"] == "folder of latents" and described["num_files"] == 2 and described["num_frames"] == 18
    assert described["models"] == [str(tmp_path / "vae")]
    (tmp_path / "folder" / "notes.txt").touch()
    assert "must" in error(tmp_path / "folder")


def test_what_a_video_says_about_its_pixels_its_time_and_its_sound(tmp_path):
    path = tmp_path / "in.mov"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 64, 48, "yuv420p10le", Fraction(1, 100)
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        stream.codec_context.colorspace, stream.codec_context.color_range = 9, 2  # BT.2020, full
        stream.codec_context.color_primaries, stream.codec_context.color_trc = 9, 14
        sounds = [container.add_stream(name, rate=48000, layout="mono") for name in ("aac", "pcm_s16le")]
        for time in (0, 4, 20, 24, 60):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24").reformat(format="yuv420p10le")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for sound in sounds:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 24000), np.int16), "s16", "mono")
            frame.rate = 48000
            container.mux(sound.encode(frame) + sound.encode(None))
    described = info(path)
    expected = {
        "pixel_aspect_ratio": "4/3",
        "display_width": 86,
        "display_height": 48,
        "pixel_format": "yuv420p10le",
        "matrix": "bt2020",
        "primaries": "bt2020",
        "transfer": "bt2020-10",
        "color_range": "full",
        "frame_rate": "variable",
        "audio_codecs": ["aac", "pcm_s16le"],
        "has_audio": True,
        "num_frames": 5,
    }
    assert {key: described[key] for key in expected} == expected


def test_videos_that_are_no_files(tmp_path, monkeypatch):
    for number in (3, 4, 5):
        write_video(tmp_path / f"f_{number}.png", torch.zeros(1, 48, 64, 3, dtype=torch.uint8), 1)
    assert info(tmp_path / "f_%d.png")["num_frames"] == 3
    write_video(tmp_path / "in.mkv", torch.zeros(9, 48, 64, 3, dtype=torch.uint8), 25)
    result = CliRunner().invoke(app, ["info", "-"], input=(tmp_path / "in.mkv").read_bytes())
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["width"] == 64

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert info(f"{address}/in.mkv")["width"] == 64
        assert "404" in error(f"{address}/nothing.mkv")
        server.shutdown()


def test_a_data_set_of_latents(tmp_path):
    make_tiny("leanvae").save_pretrained(tmp_path / "vae")
    arguments = ["--model", str(tmp_path / "vae"), "--clip-size", "5x16x16", "--num-clips", "3", "--seed", "7"]
    result = CliRunner().invoke(app, ["encode-dataset", "shapes", str(tmp_path / "latents"), *arguments])
    assert result.exit_code == 0, result.output
    described = info(tmp_path / "latents")
    assert described["kind"] == "data set of latents" and described["is_complete"] is True
    assert described["num_items"] == 3 and described["shape"] == [4, 2, 2, 2] and described["settings"]["seed"] == 7
    (tmp_path / "latents" / "index.json").unlink()
    assert info(tmp_path / "latents")["is_complete"] is False


def test_what_is_none_of_these(tmp_path):
    (tmp_path / "empty").mkdir()
    legal = "it must be a video, an image, latents, a model or pipeline, here or on the Hub, or one of compact-16ch, "
    for name, reason in (
        (tmp_path / "empty", "which holds none of these."),
        (tmp_path / "nothing.mp4", "which does not exist."),
        ("compact16ch", "which does not exist; perhaps 'compact-16ch' is meant."),
    ):
        said = error(name)
        assert f"PATH '{name}' cannot be described: {legal}" in said and said.endswith(f"got '{name}', {reason}\n")
    (tmp_path / "short.safetensors").write_bytes(b"\xff" * 12)
    assert "must be a valid safetensors file" in error(tmp_path / "short.safetensors")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    assert "must hold valid JSON" in error(tmp_path / "damaged")
    make_tiny("leanvae").save_pretrained(tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign" / "config.json").read_text()) | {"patch_size": "2"}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    said = error(tmp_path / "foreign")
    assert "The config must be one of an AutoencoderKLLeanVAE" in said and f"PATH '{tmp_path / 'foreign'}' " in said
    (tmp_path / "text.mp4").write_text("this is not a video")
    assert "text.mp4" in error(tmp_path / "text.mp4")
    with pytest.raises(ValueError, match="must be a valid safetensors file"):
        read_header(tmp_path / "text.mp4")


def test_nothing_heavy_is_imported(tmp_path):
    code = """
import sys
from diffusers_leanvae import bundled
from diffusers_leanvae.description import describe
for source in (str(bundled.clip_path()), *bundled.MODELS, *bundled.PIPELINES, sys.argv[1]):
    assert describe(source), source
print(*sorted({"diffusers", "torch"} & sys.modules.keys()))
"""
    if not bundled.clip_path().exists():
        pytest.skip("the bundled clip is not in this checkout")
    model, path = make_tiny("wfvae"), tmp_path / "original.safetensors"
    model.conversion.write_original_checkpoint(path, dict(model.config), model.state_dict())
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert result.returncode == 0 and result.stdout == "\n", result.stderr

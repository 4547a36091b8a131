"""`leanvae generate`: files of a pipeline, by seed, label, prompt and picture; one clear sentence for bad input."""

import json
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan
from typer.testing import CliRunner

from diffusers_leanvae import bundled
from diffusers_leanvae.cli import app
from diffusers_leanvae.generation.schedulers import make_scheduler
from diffusers_leanvae.video_io import probe_video, read_video, write_video


def leanvae(*arguments: object) -> tuple[int, str, str]:
    arguments = ("generate", "--output", *arguments, "--device", "cpu")
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def model(class_case, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = class_case.pipeline("ddpm", id2label={0: "red circle", 1: "blue square", 2: "green star"})
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text_model(text_case, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("text_pipeline")
    text_case.pipeline("flow").save_pretrained(folder)
    return str(folder)


def test_one_file_for_each_video(model: str, tmp_path: Path):
    out = tmp_path / "videos"
    labels = ("--label", "red circle", "--label", 1)
    code, stdout, err = leanvae(out, "--model", model, *labels, "--num-videos", 3, "--steps", 2, "--seed", 5)
    assert code == 0, err
    names = ["000-red-circle.mp4", "001-1.mp4", "002-red-circle.mp4"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert stdout.split() == [str(out / name) for name in names]
    info = probe_video(out / names[0])
    assert (info.width, info.height, info.num_frames, info.fps) == (32, 32, 9, 8)
    code, stdout, err = leanvae(tmp_path / "one.mp4", "--model", model, *labels[:2], "--steps", 1, "--json")
    assert (code, json.loads(stdout)) == (0, {"model": model, "files": [str(tmp_path / "one.mp4")]}), err


def test_videos_depend_on_their_seed_only(model: str, tmp_path: Path):
    common = ("--model", model, "--label", 2, "--steps", 2, "--crf", 0)
    for folder, extra in (
        ("a", ("--num-videos", 3)),
        ("b", ("--num-videos", 3, "--batch-size", 1)),
        ("c", ("--seed", 2)),
    ):
        assert leanvae(tmp_path / folder, *common, *extra)[0] == 0
    third, alone = (read_video(tmp_path / name)[0].float() for name in ("a/002-2.mp4", "c/000-2.mp4"))
    one_by_one = read_video(tmp_path / "b/002-2.mp4")[0].float()
    first = read_video(tmp_path / "a/000-2.mp4")[0].float()
    assert (third - alone).abs().mean() < 1 and (third - one_by_one).abs().mean() < 1
    assert (third - first).abs().mean() > 10


def test_a_grid(model: str, tmp_path: Path):
    code, stdout, err = leanvae(
        tmp_path / "new" / "grid.mp4",
        "--model",
        model,
        *("--num-videos", 5, "--steps", 2, "--num-frames", 13, "--scheduler", "ddim", "--fps", 12),
        *("--guidance-scale", 2, "--height", 16, "--width", 32, "--max-memory", "100MiB"),
    )
    assert code == 0, err
    info = probe_video(tmp_path / "new" / "grid.mp4")
    assert (info.width, info.height, info.num_frames, info.fps) == (3 * 32, 2 * 16, 13, 12)
    assert stdout.strip() == str(tmp_path / "new" / "grid.mp4")


def test_the_command_does_what_the_pipeline_does(model: str, tmp_path: Path):
    code, _, err = leanvae(
        tmp_path / "out.mkv", "--model", model, "--label", 1, "--steps", 3, "--scheduler", "dpm++", "--crf", 0
    )
    assert code == 0, err
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model)
    pipeline.scheduler = make_scheduler("dpm++")
    generator = [torch.Generator().manual_seed(0)]
    frames = pipeline(1, num_inference_steps=3, generator=generator, output_type="pt").frames[0]
    expected = (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    write_video(tmp_path / "expected.mkv", expected, fps=8, crf=0)  # which halves the colours' resolution as well
    actual, expected = (read_video(tmp_path / name)[0].float() for name in ("out.mkv", "expected.mkv"))
    assert (actual - expected).abs().mean() < 1


@pytest.mark.parametrize("name", ["grid.gif", "grid.webp", "grid.webm", "grid_%03d.png"])
def test_a_grid_of_every_kind(model: str, tmp_path: Path, name: str):
    code, stdout, err = leanvae(tmp_path / name, "--model", model, "--num-videos", 2, "--steps", 2)
    assert code == 0, err
    assert stdout.strip() == str(tmp_path / name)
    frames, info = read_video(tmp_path / name)
    assert frames.shape == (9, 32, 64, 3) and len(list(tmp_path.iterdir())) == (9 if "%" in name else 1)
    assert frames.float().std() > 10
    if "%" not in name:
        assert float(info.fps) == pytest.approx(8, abs=0.1)  # GIF counts in hundredths of a second


def test_files_that_exist_are_replaced_only_if_asked(model: str, tmp_path: Path):
    common = ("--model", model, "--label", 1, "--steps", 2)
    for name, file in (("out.mp4", "out.mp4"), ("videos/", "videos/000-1.mp4"), ("f_%d.png", "f_9.png")):
        target, path = f"{tmp_path}/{name}", tmp_path / file
        assert leanvae(target, *common)[0] == 0 and path.is_file()
        before = path.stat().st_mtime_ns
        code, _, err = leanvae(target, *common)
        assert code == 1 and "exists and `--overwrite` is false" in err and err.count("\n") == 1
        assert path.stat().st_mtime_ns == before
        assert leanvae(target, *common, "--overwrite")[0] == 0 and path.stat().st_mtime_ns > before
    assert leanvae(f"{tmp_path}/videos", *common[:-4], "--label", 2, "--steps", 2)[0] == 0  # another file there


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("out.xyz", (), "the extension must be one of .mp4"),
        ("out.png", ("--num-frames", 5), "an image file holds one frame, and there would be 5; .*`--num-frames 1`"),
        ("out.mp4", ("--fps", 0), "`--fps` must be at least 0.00001 and less than 100000, got 0"),
        ("out.mp4", ("--fps", "nan"), "`--fps` must be at least 0.00001 and less than 100000, got nan"),
        ("videos/", ("--fps", -8), "`--fps` must be at least 0.00001 and less than 100000, got -8"),
        ("out.webm", ("--codec", "libx264"), "`--codec` must be one of libvpx-vp9, libsvtav1 for .webm, got"),
        ("out.mp4", ("--crf", 60), "`--crf` must be 0 to 51 for libx264, got 60"),
        ("out.mp4", ("--pix-fmt", "rgb"), "`--pix-fmt` must be one of"),
        ("file/out.mp4", (), "the folder '.*file' is no folder"),
        ("file/", (), "the folder '.*file' is no folder"),
    ],
)
def test_outputs_are_looked_at_before_any_sampling(tmp_path: Path, name: str, options: tuple, message: str):
    (tmp_path / "file").write_text("")
    # The model does not exist, which would be an error of its own: it is not looked for.
    code, _, err = leanvae(f"{tmp_path}/{name}", "--model", "nowhere", *options)
    assert code == 1 and re.search(message, err) and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_one_frame_is_a_picture(model: str, tmp_path: Path):
    common = ("--model", model, "--label", 1, "--steps", 2)
    for name, count, shape in (("one.png", 1, (1, 32, 32, 3)), ("grid.bmp", 3, (1, 64, 64, 3))):
        code, stdout, err = leanvae(tmp_path / name, *common, "--num-frames", 1, "--num-videos", count)
        assert code == 0 and stdout.strip() == str(tmp_path / name), err
        assert read_video(tmp_path / name)[0].shape == shape
    code, _, err = leanvae(tmp_path / "as-trained.jpg", *common)
    assert code == 1 and "one frame, and there would be 9; `num_frames=1` (`--num-frames 1`) makes one" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.bmp", "one.png"]


@pytest.mark.parametrize("seed", [-1, 99999999999999999999])
def test_seeds_have_a_range(seed: int, tmp_path: Path):
    code, _, err = leanvae(tmp_path / "out.mp4", "--seed", seed)
    assert code == 2 and "'--seed'" in err and list(tmp_path.iterdir()) == []


def test_a_picture_is_the_first_frame(model: str, tmp_path: Path):
    picture = tmp_path / "picture.png"
    write_video(picture, torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8), fps=1)
    code, _, err = leanvae(tmp_path / "out.mp4", "--model", model, "--image", picture, "--steps", 2)
    assert code == 0, err
    assert probe_video(tmp_path / "out.mp4").num_frames == 9


def test_text(text_model: str, tmp_path: Path):
    code, _, err = leanvae(
        tmp_path, "--model", text_model, "--prompt", "a burger", "--prompt", "a squirrel", "--steps", 2
    )
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000-a-burger.mp4", "001-a-squirrel.mp4"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--label", "dog"), "`--label` must be ids or known names"),
        (("--prompt", "a dog"), "`--prompt` must not be given to this pipeline, got one"),
        (("--scheduler", "flow"), "`--scheduler` must be one of 'ddpm', 'ddim', 'dpm++' for this model, got 'flow'"),
        (("--num-frames", 8), "`--num-frames` must be 4 * n + 1"),
        (("--dtype", "int8"), "`--dtype` must be auto, float32 (fp32)"),
        (("--image", "nowhere.png"), "nowhere.png"),
        (("--max-memory", "much"), "`--max-memory` must be a size"),
    ],
)
def test_errors(model: str, arguments: tuple, message: str, tmp_path: Path):
    code, stdout, err = leanvae(tmp_path / "out.mp4", "--model", model, "--steps", 1, *arguments)
    assert code == 1 and stdout == "" and message in err
    assert err.startswith("error: ") and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_errors_about_the_model(text_model: str, tmp_path: Path):
    code, _, err = leanvae(tmp_path / "out.mp4", "--model", tmp_path)
    assert code == 1 and "cannot be loaded" in err
    code, _, err = leanvae(tmp_path / "out.mp4", "--model", text_model)
    assert code == 1 and "`--prompt` must be given to this pipeline, got none" in err
    code, _, err = leanvae(tmp_path / "out.mp4", "--model", text_model, "--label", 1, "--prompt", "a")
    assert code == 1 and "`--label` must not be given to a text-to-video pipeline, got 1" in err
    with pytest.raises(ValueError, match="`name` must be one of 'mini-shapes', 'mini-scenes', got 'maxi'"):
        bundled.pipeline_path("maxi")


def test_a_memory_limit_needs_a_model_whose_memory_is_known(class_case, tmp_path: Path):
    folder, target = tmp_path / "pipeline", tmp_path / "out.mp4"
    wan = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    class_case.pipeline(vae=wan).save_pretrained(folder)
    code, stdout, err = leanvae(target, "--model", folder, "--steps", 1, "--max-memory", "1GiB")
    assert code == 1 and stdout == "" and not target.exists()
    assert err == "error: `--max-memory` needs an autoencoder of this package, got an `AutoencoderKLWan`.\n"


@pytest.mark.parametrize("scale", ["nan", "inf", "-3"])
def test_guidance_is_a_finite_number(scale, tmp_path: Path):
    code, _, err = leanvae(tmp_path / "a.mp4", "--guidance-scale", scale)
    assert code == 1 and err.startswith("error: `--guidance-scale` must be a finite number from 0 on, got ")


def test_pipelines_take_finite_guidance(class_case):
    with pytest.raises(ValueError, match="`guidance_scale` must be a finite number from 0 on, got nan"):
        class_case.run(class_case.pipeline("ddpm"), guidance_scale=float("nan"))

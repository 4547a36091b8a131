"""docs/text_to_video.md is run as it stands, from the folder of clips to the pipeline that was pushed.

The commands come from the page, word for word, and `make_smaller` adds to them; clips, transformer and text encoders
are tiny, and the Hub is a local one.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import LatteTransformer3DModel
from local_hub import LocalHub
from patterns import drifting_pattern
from processes import run_python
from runs import changed, read_log
from safetensors.torch import load_file
from tiny import LATTE_TEXT

from diffusers_leanvae.data import LatentFolder, open_training_data
from diffusers_leanvae.text_encoders import make_text_encoder
from diffusers_leanvae.video_io import probe_video, write_video


pytest.importorskip("peft", reason="the page trains an adapter (extra: lora)")
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "text_to_video.md").read_text(encoding="utf-8")
ENCODE, TRAIN, GENERATE = ["leanvae", "encode-dataset"], ["python", "training/train_lvdm.py"], ["leanvae", "generate"]
SMALLER = {
    tuple(ENCODE): "--clip-size 9x32x32 --device cpu",
    tuple(TRAIN): "num_steps=2 batch_size=4 data.num_workers=0 num_threads=1 log_every=1 save_every=2 "
    "validation.every=2 validation.num_samples=1 validation.num_inference_steps=2",
    tuple(GENERATE): "--steps 2 --device cpu",
}
# Of a model that starts from no other.
SMALL_MODEL = ["variant=null", "model={num_attention_heads: 2, attention_head_dim: 12, num_layers: 2, patch_size: 2}"]
# One after the other in one process, to import everything once; its Hub is the one of its environment.
RUN = """
import json, os, sys
from accelerate.state import AcceleratorState
from diffusers_leanvae.cli import app
from diffusers_leanvae.training import train_lvdm

os.chdir(sys.argv[1])
for program, *arguments in json.loads(sys.argv[2]):
    AcceleratorState._reset_state(reset_partial_state=True)
    if program == "leanvae":
        assert not app(arguments, standalone_mode=False)  # the exit status
    else:
        train_lvdm.main(arguments[1:])
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if not line.startswith("pip install")]


def make_smaller(command: list[str]) -> list[str]:
    more = SMALLER[tuple(command[:2])].split()
    if command[0] == "python":  # a model that starts from another is as small as that
        is_new = not any(word.startswith("init=") for word in command)
        more += SMALL_MODEL if is_new else SMALL_MODEL[:1]
    return [*command, *more]


# --- What the page takes for granted ---------------------------------------------------------------------------------


def write_clips(folder: Path) -> list[dict[str, Any]]:
    """The files that the page's metadata names, and the metadata."""
    (text,) = blocks("json")
    rows = [json.loads(line) for line in text.splitlines()]
    for number, row in enumerate(rows):
        path = folder / row["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, drifting_pattern(26, height=40, width=56, seed=number), fps=24)
    (folder / "metadata.jsonl").write_text(text)
    return rows


def publish(server: LocalHub, name: str, folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    server.repositories[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def publish_models(server: LocalHub, folder: Path) -> None:
    """The models of the Hub that the page names, tiny: two text encoders and Latte-1, each of another width."""
    names = {"google/flan-t5-base": 16, "google/t5-v1_1-xxl": 24, "maxin-cn/Latte-1": 32}
    for name, width in names.items():
        torch.manual_seed(width)
        config = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        encoder = make_text_encoder(["a white rabbit hops across a wet street at night"], config)
        parts = {"tokenizer": encoder.tokenizer, "text_encoder": encoder.model}
        for part, model in parts.items():
            model.save_pretrained(folder / name / (part if "Latte" in name else ""))
    latte = LatteTransformer3DModel(
        **(LATTE_TEXT | {"num_layers": 1, "sample_size": 8, "caption_channels": 32, "video_length": 16})
    )
    latte.save_pretrained(folder / "maxin-cn/Latte-1/transformer")
    for name in names:
        publish(server, name, folder / name)


# --- The page --------------------------------------------------------------------------------------------------------


class Done(NamedTuple):
    """The folder where everything ran, what was pushed, what a fresh process said, and the page's metadata."""

    folder: Path
    pushed: dict[str, bytes]
    said: list[Any]
    rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("page")
    (folder / "training").symlink_to(ROOT / "training")
    rows = write_clips(folder / "clips")
    write_video(folder / "first.png", drifting_pattern(1, height=40, width=56, seed=7), fps=24)
    with LocalHub() as server:
        server.user = {"name": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        publish_models(server, folder / "models")
        environment = server.environment(folder)
        run_python(RUN, folder, json.dumps([make_smaller(command) for command in commands()]), **environment)
        python = ["import json, os, sys\nos.chdir(sys.argv[1])\n", *blocks("python")]
        python += ["print(json.dumps([len(frames), frames[0].size, list(video.shape), float(video.std())]))"]
        said = run_python("".join(python), folder, **environment).splitlines()[-1]
        assert server.unknown == []
        return Done(folder, server.repositories["user/rabbits"], json.loads(said), rows)


def test_every_command_is_of_a_kind_that_is_run():
    assert {tuple(command[:2]) for command in commands()} == set(SMALLER)


def test_the_three_commands_come_first():
    assert [command[:2] for command in commands()[:3]] == [ENCODE, TRAIN, GENERATE]


@pytest.mark.slow
def test_all_clips_and_captions_are_encoded(done: Done):
    captions = {row["file_name"]: row["caption"] for row in done.rows}
    for name in ("clips", "t5"):
        latents = LatentFolder(str(done.folder / "latents" / name))
        assert len(latents) == 4 * len(done.rows)  # crops
        for number in range(len(latents)):
            given = captions[latents.name(number).split("#")[0]]
            assert latents.captions(number) == ((given,) if isinstance(given, str) else tuple(given))
    settings = latents.text_settings
    assert settings and settings["source"] == "google/t5-v1_1-xxl" and latents.text(0, 0).embeds.shape[2] == 24


@pytest.mark.slow
def test_every_run_leaves_a_pipeline_of_its_text_encoder(done: Done):
    widths = {"text": 16, "t5": 24, "new": 128, "tuned": 16, "lora": 16, "latte": 32}
    assert {path.name for path in (done.folder / "runs").iterdir()} == set(widths)
    for name, width in widths.items():
        run = done.folder / "runs" / name
        assert all(torch.tensor(record["loss"]).isfinite() for record in read_log(run)), name
        config = json.loads((run / "pipeline/text_encoder/config.json").read_text())
        transformer = json.loads((run / "pipeline/transformer/config.json").read_text())
        assert config["d_model"] == transformer["caption_channels"] == width, name
        assert probe_video(run / "validation/step-0000002.mp4").num_frames == 9


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline/transformer/diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_fine_tuning_starts_from_the_first_run(done: Done):
    text, tuned, lora = (weights(done.folder / "runs" / name) for name in ("text", "tuned", "lora"))
    assert changed(text, tuned) and all(".attn" in name for name in changed(text, lora))
    for name, weight in text.items():  # two small steps of AdamW
        torch.testing.assert_close(tuned[name], weight, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_what_is_generated(done: Done):
    for name in ("rabbit.mp4", "river.mp4", "from_image.mp4", "rain.mp4"):
        video = probe_video(done.folder / name)
        assert (video.num_frames, video.height, video.width) == (9, 32, 32), name


@pytest.mark.slow
def test_the_pushed_pipeline_is_that_of_the_first_run_and_works_in_a_new_process(done: Done):
    folder = done.folder / "runs/text/pipeline"
    shims = {"modeling_leanvae.py", "vae/modeling_leanvae.py"}  # only what is on the Hub has them
    assert set(done.pushed) - shims == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert shims <= set(done.pushed)
    count, size, shape, std = done.said
    assert (count, size, shape) == (9, [32, 32], [9, 3, 32, 32]) and std > 0


@pytest.mark.slow
def test_captions_in_text_files_are_the_same(done: Done, tmp_path: Path):
    write_clips(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    for row in done.rows:
        lines = [row["caption"]] if isinstance(row["caption"], str) else row["caption"]
        (tmp_path / row["file_name"]).with_suffix(".txt").write_text("\n".join(lines) + "\n")
    sizes = {"batch_size": 1, "clip_sizes": [[9, 32, 32]]}
    plain, listed = (open_training_data(str(folder), **sizes) for folder in (tmp_path, done.folder / "clips"))
    numbers = range(len(done.rows))
    captions = [{data.metadata(n)["file_name"]: data.captions(n) for n in numbers} for data in (plain, listed)]
    assert captions[0] == captions[1] and len(captions[0]) == len(done.rows)

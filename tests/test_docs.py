"""Documentation is run: every Python block of the Markdown files, and every example."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import make_tiny

from diffusers_leanvae.video_io import write_video


ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])
# Their blocks go on from their commands: tests/training/test_text_to_video_page.py and tests/export/test_export.py run
# both.
STORIES = (ROOT / "docs" / "text_to_video.md", ROOT / "docs" / "export.md")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = {
    "reconstruct_video": ["vae", "clips/a.mp4", "out.mp4"],
    "encode_folder": ["vae", "clips", "latents", "9", "64"],
    "latent_diffusion_step": ["vae", "clips", "2"],
}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in STORIES], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    # One namespace per page, as a reader who pastes the blocks one after another has it.
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), namespace)  # line numbers are those of the page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_the_tree_of_the_readme_is_that_of_the_project():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```\n(.*?)^```$", text.split("\n## Layout\n")[1], re.MULTILINE | re.DOTALL)
    told, parent = set(), ""
    for line in block.splitlines():
        name = line.split()[0]
        parent, path = (parent, parent + name) if line.startswith(" ") else (name, name)
        assert (ROOT / path).is_dir() if name.endswith("/") else (ROOT / path).is_file(), f"{path} is not there"
        told.add(path.rstrip("/"))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"git knows no files here: {listed.stderr}")
    paths = [Path(line) for line in listed.stdout.splitlines()]
    package = Path("src/diffusers_leanvae")
    folders = {path.parts[0] for path in paths if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    inside = {(package / path.relative_to(package).parts[0]).as_posix() for path in paths if package in path.parents}
    untold = {f"{package}/__init__.py", f"{package}/py.typed", "src"}
    assert told - {package.as_posix()} == (folders | inside) - untold


def test_every_example_is_tested():
    assert {path.stem for path in ROOT.glob("examples/*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, tmp_path, monkeypatch):
    make_tiny("leanvae").save_pretrained(tmp_path / "vae")
    (tmp_path / "clips").mkdir()
    for stem in "ab":
        frames = torch.randint(0, 256, (11, 70, 90, 3), dtype=torch.uint8)
        write_video(tmp_path / "clips" / f"{stem}.mp4", frames, fps=24)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, *EXAMPLES[name]])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert name != "reconstruct_video" or (tmp_path / "out.mp4").is_file()
    assert name != "encode_folder" or len(list((tmp_path / "latents").glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    "name, arguments, sentence",
    [
        *((name, [], f"python examples/{name}.py") for name in EXAMPLES),
        (
            "encode_folder",
            ["vae", "clips", "out", "9", "x"],
            "NUM_FRAMES and SIZE must be positive integers, got 9 x.",
        ),
        ("encode_folder", ["vae", "empty", "out"], "FOLDER must hold videos or images, got 'empty' without any."),
        ("latent_diffusion_step", ["vae", "clips", "0"], "STEPS must be a positive integer, got 0."),
        ("latent_diffusion_step", ["vae", "clips", "-1"], "STEPS must be a positive integer, got -1."),
    ],
)
def test_example_says_what_it_takes(name, arguments, sentence, tmp_path, monkeypatch):
    make_tiny("leanvae").save_pretrained(tmp_path / "vae")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert sentence in str(ended.value)

"""The Space in `examples/space`: what its tabs compute, and that its files fit together. Gradio is not needed."""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffusers_leanvae import __version__, bundled
from diffusers_leanvae.video_io import VideoError, read_video, write_video


SPACE = Path(__file__).parents[1] / "examples" / "space"
# As much of Gradio as the module meets when it is imported, and what it raises: Gradio asks for an older Pillow.
GRADIO = """
class Widget:
    made = []

    def __init__(self, *_, **options):
        self.options = options
        Widget.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def click(self, *_):
        pass


Blocks = Button = Column = Dropdown = Markdown = Number = Row = Slider = Tab = Video = Widget


class Error(Exception):
    def __init__(self, message, print_exception=True):
        super().__init__(message)
"""


@pytest.fixture
def tabs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("tabs", "app", "gradio"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))  # so that it is out again after the test
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(SPACE))
    return importlib.import_module("tabs")


@pytest.fixture
def app(tabs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "gradio.py").write_text(GRADIO, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tabs, "SHORT_SIDE", 64)
    app = importlib.import_module("app")
    yield app
    app.STORAGE.cleanup()


def test_a_clip_is_reconstructed_beside_the_original(tabs, tmp_path, monkeypatch):
    monkeypatch.setattr(tabs, "SHORT_SIDE", 64)
    output = tmp_path / "out.mp4"
    rows = tabs.compare(bundled.clip_path(), list(bundled.MODELS), 5, output)
    frames, info = read_video(output)
    original, fps = tabs.read_clip(bundled.clip_path(), 5)
    assert frames.shape == (5, 64, 3 * original.shape[2], 3) and fps == info.fps
    # H.264 of small pictures: a mean error of 4.4 levels was measured.
    assert (frames[:, :, : original.shape[2]].float() - original).abs().mean() < 18
    assert [row["Model"] for row in rows] == list(bundled.MODELS)
    first, second = (row["PSNR (dB)"] for row in rows)
    assert abs(first - 28.82) < 0.1 and abs(second - 23.43) < 0.1  # of sixteen channels and of four
    width = -(-original.shape[2] // 8)
    assert [row["Latents"] for row in rows] == [f"{channels} x 2 x 8 x {width}" for channels in (16, 4)]


def test_clips_of_any_size_come_back_with_even_sides(tabs, tmp_path):
    for height, width, expected in ((300, 601, (256, 512)), (31, 45, (30, 44)), (601, 300, (512, 256))):
        write_video(tmp_path / "in.mkv", torch.zeros(2, height, width, 3, dtype=torch.uint8), 25, codec="ffv1")
        frames, _ = tabs.read_clip(tmp_path / "in.mkv", 5)
        assert frames.shape == (2, *expected, 3)
    with pytest.raises(VideoError):
        tabs.read_clip(SPACE / "app.py", 5)


def test_videos_of_a_class_are_generated(tabs, tmp_path):
    assert len(tabs.labels()) == 36
    tabs.generate("red circle left", 2, 0, tmp_path / "out.mp4")
    assert read_video(tmp_path / "out.mp4")[0].shape == (17, 128, 128, 3)


def test_visitors_are_told_what_is_missing_or_wrong(app, tmp_path):
    (tmp_path / "words.mp4").write_text("no video")
    clip = str(bundled.clip_path())
    for sentence, function, values in (
        ("Choose a clip first.", app.reconstruct, (None, "compact-4ch", 1)),
        ("Choose a model first.", app.reconstruct, (clip, None, 1)),
        ("Choose a model first.", app.compare, (clip, "compact-4ch", None, 1)),
        ("Choose a number of frames first.", app.reconstruct, (clip, "compact-4ch", None)),
        ("Cannot read 'words.mp4' as a video", app.reconstruct, (str(tmp_path / "words.mp4"), "compact-4ch", 1)),
        ("Choose a class first.", app.generate, (None, 5, 0)),
        ("Choose a number of steps first.", app.generate, ("red circle left", None, 0)),
        ("Choose a seed first.", app.generate, ("red circle left", 5, None)),
        ("`seed` must be an integer from 0 to 2**63 - 1, got -1.", app.generate, ("red circle left", 5, -1)),
        (f"`seed` must be an integer from 0 to 2**63 - 1, got {2**64}", app.generate, ("red circle left", 5, 2**64)),
        ("`class_labels` must be ids or known names", app.generate, ("pink circle left", 5, 0)),
    ):
        with pytest.raises(app.gr.Error, match=f"^{re.escape(sentence)}"):
            function(*values)
    (seed,) = (widget.options for widget in app.gr.Widget.made if widget.options.get("label") == "Seed")
    assert (seed["minimum"], seed["maximum"]) == (0, 2**53 - 1)
    video, figures = app.reconstruct(clip, "compact-4ch", 1)
    assert Path(video).is_file() and "compact-4ch" in figures


def test_nothing_is_left_after_the_end(tmp_path):
    (tmp_path / "gradio.py").write_text(GRADIO, encoding="utf-8")
    (tmp_path / "temporary").mkdir()
    code = (
        f"import sys; sys.path[:0] = {[str(tmp_path), str(SPACE)]}; import app; print(app.FOLDER.is_dir(), app.FOLDER)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    is_there, folder = done.stdout.split(maxsplit=1)
    assert is_there == "True" and Path(folder.strip()).parent == tmp_path / "temporary"
    assert not Path(folder.strip()).exists()


def test_files_of_the_space_fit_together():
    readme = (SPACE / "README.md").read_text(encoding="utf-8")
    header = dict(re.findall(r"^(\w+): (.+)$", readme.split("---")[1], re.MULTILINE))
    assert header["sdk"] == "gradio" and (SPACE / header["app_file"]).is_file()
    assert len(header["short_description"]) <= 60  # which the Hub refuses otherwise
    assert f"diffusers_leanvae-{__version__}-py3" in (SPACE / "requirements.txt").read_text(encoding="utf-8")
    tree = ast.parse((SPACE / "app.py").read_text(encoding="utf-8"))
    used = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tabs"
    }
    defined = ast.parse((SPACE / "tabs.py").read_text(encoding="utf-8")).body
    assert used == {"compare", "generate", "labels"}
    assert used <= {node.name for node in defined if isinstance(node, ast.FunctionDef)}

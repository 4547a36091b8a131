"""The Space in `examples/space`: what its tabs compute, and that its files fit together. Gradio is not needed."""

import ast
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffusers_leanvae import __version__, bundled
from diffusers_leanvae.video_io import VideoError, read_video, write_video


SPACE = Path(__file__).parents[1] / "examples" / "space"


@pytest.fixture
def tabs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SPACE))
    import tabs  # pyright: ignore[reportMissingImports]

    monkeypatch.setitem(sys.modules, "tabs", tabs)  # and out of it again
    return tabs


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

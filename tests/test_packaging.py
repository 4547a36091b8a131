"""A wheel holds what the tree holds: a package that `pyproject.toml` forgets would be silently absent."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
# Folder of the tree -> folder of the wheel.
FOLDERS = {
    "src/diffusers_leanvae": "diffusers_leanvae",
    "pipelines": "diffusers_leanvae/pipelines",
    "training": "diffusers_leanvae/training",
}
DATA_SUFFIXES = {".py", ".yaml", ".json", ".safetensors", ".mp4", ".typed", ".j2", ".html", ".css", ".js", ".cpp"}


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    for name in ("setuptools", "pip"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed in this environment, no wheel can be built")
    # A copy: building leaves `build/` behind, and an old `build/` would hide what is missing.
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("src", "pipelines", "training"):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    result = subprocess.run([*command, "-w", str(output), str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = output.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def test_wheel_holds_the_tree(wheel_files: set[str]):
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in DATA_SUFFIXES and "__pycache__" not in path.parts
    }
    assert "diffusers_leanvae/models/autoencoder_kl_leanvae.py" in expected
    assert any(name.startswith("diffusers_leanvae/training/configs/") for name in expected)
    packed = {name for name in wheel_files if ".dist-info/" not in name}
    assert sorted(expected - packed) == []
    assert sorted(packed - expected) == []


def test_wheel_holds_the_licence(wheel_files: set[str]):
    names = {Path(name).name for name in wheel_files if ".dist-info/" in name}
    assert {"LICENSE", "NOTICE", "METADATA", "entry_points.txt"} <= names


def test_what_needs_no_torch_is_known():
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / "scripts" / "check_wheel.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    lines = ["Name: x", "Requires-Dist: torch>=2.9", "Requires-Dist: torchmetrics", "Requires-Dist: av<19,>=18"]
    lines += ['Requires-Dist: ruff; extra == "test"', 'Requires-Dist: numpy; python_version >= "3"']
    needed = script.requirements_without_torch(Parser().parsestr("\n".join(lines)))
    assert [text.split(";")[0] for text in needed] == ["av<19,>=18", "numpy"]

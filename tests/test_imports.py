"""The import rule: arrows point upwards in `ORDER`, leaves import absolutely, and all that is imported is declared."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "diffusers_leanvae"
FOLDERS = {"src/diffusers_leanvae": PACKAGE, "pipelines": f"{PACKAGE}.pipelines", "training": f"{PACKAGE}.training"}
# The one import rule: a file imports from its own folder and from what stands above it here, never from what stands
# below, and never from its own line.
ORDER = (
    ("_version", "checks", "atomic", "clock", "launching", "registration", "stages"),
    ("bundled", "hub_errors"),
    ("video_io", "kernels", "conversion"),
    ("description",),
    ("hub",),
    ("models",),
    ("latents", "losses", "text_encoders"),
    ("loading",),
    ("data",),
    ("evaluation",),
    ("inference",),
    ("generation",),
    ("serving", "export"),
    ("benchmark",),
    ("trainer",),
    ("pipelines", "training"),
    ("cli",),
)
PLACES = {folder: place for place, group in enumerate(ORDER) for folder in group}
LEAVES = ("cli", "pipelines", "training")  # which nothing of the package imports but the command line
# Packages that this project does without, so that nothing comes to depend on them by accident.
BANNED = {"torchvision", "timm", "lpips", "piqa", "calflops", "decord"}
IMPORT_NAMES = {"av": "av", "pyyaml": "yaml", "huggingface-hub": "huggingface_hub", "pillow": "PIL"}


def modules() -> Iterator[tuple[str, Path]]:
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*path.relative_to(ROOT / folder).with_suffix("").parts]
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


MODULES = dict(modules())
FILES = [pytest.param(name, path, id=name) for name, path in MODULES.items()]


def imports(name: str, path: Path) -> Iterator[tuple[str, bool, bool]]:
    """Each imported module: absolute name, whether it was written relatively, whether it runs at import time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
        for node in ast.walk(block)
    }
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False, id(node) not in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            for alias in node.names:  # `from . import hub` names a module, `from .hub import push` does not
                target = f"{source}.{alias.name}"
                yield target if target in MODULES else source, node.level > 0, id(node) not in lazy


def folder_of(name: str) -> str:
    """The folder or file at the top of the package that a module belongs to; empty for the package itself."""
    return name.removeprefix(PACKAGE).removeprefix(".").split(".")[0]


def is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def test_the_rule_sees_the_modules():
    assert f"{PACKAGE}.models.autoencoder_kl_leanvae" in MODULES and f"{PACKAGE}.training.train_vae" in MODULES
    found = set(
        imports(f"{PACKAGE}.models.autoencoder_kl_leanvae", MODULES[f"{PACKAGE}.models.autoencoder_kl_leanvae"])
    )
    assert (f"{PACKAGE}.models.temporal_cache", True, True) in found
    found = set(imports(f"{PACKAGE}.data.cutting", MODULES[f"{PACKAGE}.data.cutting"]))
    assert (f"{PACKAGE}.data.sources", True, True) in found


def test_contributors_read_the_same_list():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```\n(.*?)^```$", text.split("\n## The import rule\n")[1], re.MULTILINE | re.DOTALL)
    assert block.splitlines() == [", ".join(group) for group in ORDER]


def test_every_folder_has_a_place():
    assert {folder_of(name) for name in MODULES} - {""} == set(PLACES)


@pytest.mark.parametrize("name, path", FILES)
def test_arrows_point_upwards(name: str, path: Path):
    if name == PACKAGE:  # the public names; only leaves must stay out, or importing the package would run them
        assert [target for target, _, eager in imports(name, path) if eager and folder_of(target) in LEAVES] == []
        return
    for target, _, _ in imports(name, path):
        if not is_ours(target) or folder_of(target) == folder_of(name):
            continue
        if target == PACKAGE:  # public names, for leaves only: from below it would be a circle
            assert folder_of(name) in LEAVES, f"{name} must import {target} from its own module"
            continue
        assert PLACES[folder_of(target)] < PLACES[folder_of(name)], f"{name} must not import {target}"


def test_no_circles():
    # Of modules, imports inside functions included: a circle hidden in a function is still one for the reader.
    graph = {
        name: {target for target, _, _ in imports(name, path) if target in MODULES and target not in (name, PACKAGE)}
        for name, path in MODULES.items()
        if name != PACKAGE
    }
    tuple(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    "name, path", [p for p in FILES if folder_of(p.values[0]) in ("video_io", "kernels", "conversion")]
)
def test_numerics_know_no_diffusers(name: str, path: Path):
    assert {target.split(".")[0] for target, _, _ in imports(name, path)} & {"diffusers", "transformers"} == set()


@pytest.mark.parametrize(
    "name, path", [p for p in FILES if p.values[0].split(".")[1:2] in (["pipelines"], ["training"])]
)
def test_leaves_import_absolutely(name: str, path: Path):
    # Each of these files also runs by its path, or as a pipeline file on the Hub, where it has no parent package.
    assert [target for target, is_relative, _ in imports(name, path) if is_relative] == []
    assert {target.split(".")[0] for target, _, _ in imports(name, path)} & {"pipelines", "training"} == set()


@pytest.mark.parametrize("name, path", FILES)
def test_no_banned_package(name: str, path: Path):
    assert {target.split(".")[0] for target, _, _ in imports(name, path)} & BANNED == set()


@pytest.mark.parametrize("name, path", FILES)
def test_what_runs_at_import_time_is_declared(name: str, path: Path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = list(project["dependencies"])
    if folder_of(name) in (*LEAVES, "trainer"):  # training is an extra, and so is what its scripts use
        requirements += project["optional-dependencies"]["train"]
    if folder_of(name) == "serving":  # imported by `leanvae serve` alone
        requirements += project["optional-dependencies"]["serve"]
    if name == f"{PACKAGE}.export.onnx_files":  # imported for `to="onnx"` alone
        requirements += project["optional-dependencies"]["export"]
    if name.startswith(f"{PACKAGE}.kernels.triton_"):  # imported by `kernels.get("triton")` alone
        requirements += project["optional-dependencies"]["triton"]
    names = {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements}
    declared = {IMPORT_NAMES.get(requirement, requirement.replace("-", "_")) for requirement in names}
    used = {target.split(".")[0] for target, _, eager in imports(name, path) if eager}
    assert used - declared - {PACKAGE} - set(sys.stdlib_module_names) == set()

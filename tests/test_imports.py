"""The import rule: arrows point downwards only, leaves import absolutely, and everything imported is declared."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "diffusers_leanvae"
FOLDERS = {"src/diffusers_leanvae": PACKAGE, "pipelines": f"{PACKAGE}.pipelines", "training": f"{PACKAGE}.training"}
LEAVES = ("pipelines", "training", "cli", "demo")
# Module prefixes below the package -> layer; the longest match counts. Not listed: layer 4 (functions over models).
LAYERS = {
    "_version": 0,
    "models.wavelets": 1,
    "models.temporal_cache": 1,
    "models.tiling": 1,
    "models.naf": 1,
    "models.fused": 1,
    "models.patches": 1,
    "models.planner": 1,
    "models.video_autoencoder": 2,  # what the autoencoders have in common
    "models.video_layers": 1,
    "conversion": 1,  # functions of dictionaries: models call them, they know no model
    "kernels": 1,
    "video_io": 1,
    "recipe": 1,
    "objectives": 1,
    "regularizers": 1,
    "training_module": 1,
    "discriminator": 1,
    "perceptual": 1,
    "evaluation.metrics": 1,
    "padding": 1,
    "models": 3,
}
# Broken on the build machines, or drags in what is; see the environment notes.
BANNED = {"torchvision", "timm", "lpips", "piqa", "calflops", "decord"}
IMPORT_NAMES = {"av": "av", "pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}


def modules() -> Iterator[tuple[str, Path]]:
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*path.relative_to(ROOT / folder).with_suffix("").parts]
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


MODULES = dict(modules())
FILES = [pytest.param(name, path, id=name) for name, path in MODULES.items()]


def imports(name: str, path: Path) -> Iterator[tuple[str, bool, bool]]:
    r"""Each imported module: absolute name, whether it was written relatively, whether it runs at import time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
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


def layer(name: str) -> int:
    inner = name.removeprefix(PACKAGE).removeprefix(".")
    if inner.split(".")[0] in LEAVES:
        return 5
    matches = [prefix for prefix in LAYERS if inner == prefix or inner.startswith(f"{prefix}.")]
    return LAYERS[max(matches, key=len)] if matches else 4


def is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def test_the_rule_sees_the_modules():
    assert f"{PACKAGE}.models.autoencoder_kl_leanvae" in MODULES and f"{PACKAGE}.training.train_vae" in MODULES
    found = set(
        imports(f"{PACKAGE}.models.autoencoder_kl_leanvae", MODULES[f"{PACKAGE}.models.autoencoder_kl_leanvae"])
    )
    assert (f"{PACKAGE}.models.temporal_cache", True, True) in found
    assert [layer(f"{PACKAGE}.{name}") for name in ("models.tiling", "models.x", "streaming", "cli")] == [1, 3, 4, 5]


@pytest.mark.parametrize("name, path", FILES)
def test_arrows_point_downwards(name: str, path: Path):
    if name == PACKAGE:  # the public names; only leaves must stay out, or importing the package would run them
        assert [target for target, _, eager in imports(name, path) if eager and layer(target) == 5] == []
        return
    for target, _, eager in imports(name, path):
        if not is_ours(target) or target == name:
            continue
        if target == PACKAGE:  # public names, for leaves only: from below it would be a circle
            assert layer(name) == 5, f"{name} must import {target} from its own module"
            continue
        allowed = layer(target) < layer(name)
        if layer(name) in (1, 4):  # siblings of these layers may build on each other, models and leaves may not
            allowed |= layer(target) == layer(name)
        if layer(name) == 5 and layer(target) == 5:  # a command reaches another leaf inside its sub-command only
            allowed = not eager and name.split(".")[1] in ("cli", "demo")
        if target.removesuffix(".__init__") in (f"{PACKAGE}.models", f"{PACKAGE}.conversion"):
            continue  # an empty package on the way to a module
        assert allowed, f"{name} (layer {layer(name)}) must not import {target} (layer {layer(target)})"


@pytest.mark.parametrize("name, path", [p for p in FILES if layer(p.values[0]) == 1])
def test_lowest_layer_knows_no_diffusers(name: str, path: Path):
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
    if layer(name) == 5 or name == f"{PACKAGE}.recipe":  # training is an extra, and so is what reads its recipes
        requirements += project["optional-dependencies"]["train"]
    if name.startswith(f"{PACKAGE}.kernels.triton_"):  # imported by `kernels.get("triton")` alone
        requirements += project["optional-dependencies"]["triton"]
    names = {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements}
    declared = {IMPORT_NAMES.get(requirement, requirement.replace("-", "_")) for requirement in names}
    used = {target.split(".")[0] for target, _, eager in imports(name, path) if eager}
    assert used - declared - {PACKAGE} - set(sys.stdlib_module_names) == set()

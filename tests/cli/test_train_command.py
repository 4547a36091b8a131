"""`leanvae train`: recipes by name, a listing of their keys, and the scripts themselves."""

import json
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers_leanvae.training import train_lvdm, train_vae
from typer.testing import CliRunner

from diffusers_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.cli import app
from diffusers_leanvae.trainer.recipe import load_recipe
from diffusers_leanvae.trainer.recipe_keys import comments_of, list_keys


SCRIPTS: dict[str, Any] = {"vae": train_vae, "lvdm": train_lvdm}
CONFIGS = Path(train_vae.__file__).parent / "configs"


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_all_recipes_are_listed():
    code, out, err = invoke("recipes", "--json")
    recipes = json.loads(out)["recipes"]
    assert (code, err) == (0, "")
    assert sorted(recipe["path"] for recipe in recipes) == sorted(map(str, CONFIGS.glob("*.yaml")))
    assert all(recipe["purpose"].endswith(".") and len(recipe["purpose"]) > 30 for recipe in recipes)
    told = [line.split()[:2] for line in invoke("recipes")[1].splitlines()]
    assert told == [[recipe["kind"], recipe["name"]] for recipe in recipes]
    assert ["vae", "smoke"] in told and ["lvdm", "lvdm_smoke"] in told


@pytest.mark.parametrize("kind, name", [("vae", "smoke"), ("vae", "wan_aligned"), ("lvdm", "lvdm_text")])
def test_the_listing_of_a_recipe_is_that_recipe(kind, name, tmp_path):
    overrides = ["num_steps=2", "optimizer.learning_rate=3e-4", "model.norm=x"]
    code, out, err = invoke(kind, name, *overrides, "--keys")
    assert code == 0, err
    (tmp_path / "copy.yaml").write_text(out)
    recipe_class = SCRIPTS[kind].Recipe
    expected = load_recipe(recipe_class, CONFIGS / f"{name}.yaml", overrides)
    assert load_recipe(recipe_class, tmp_path / "copy.yaml") == expected and expected.num_steps == 2


@pytest.mark.parametrize("kind", SCRIPTS)
def test_every_key_is_listed_with_its_default_and_type(kind):
    code, out, err = invoke(kind, "--keys")
    assert code == 0, err
    recipe_class = SCRIPTS[kind].Recipe
    assert list(yaml.safe_load(out)) == [field.name for field in fields(recipe_class)]
    lines = out.splitlines()
    assert all("  # " in line for line in lines) and "Recipe(" not in out  # as Python describes a class without words
    assert "output:  # str, required; the folder of the run" in lines
    assert "  betas: [0.9, 0.999]  # list of float" in lines
    assert "trackers: []  # list of tensorboard | trackio | wandb; They get what log.jsonl gets, and" in out
    if kind == "vae":
        assert (
            "  clip_sizes: [[17, 64, 64]]  # list of list of int; [num_frames, height, width]; one is drawn per step"
            in lines
        )
    else:  # of what is absent, the keys that it would have
        assert "text: null  # null, or a section; null: not of texts" in lines
        assert "#   caption_dropout: 0.1  # float; share of samples that get the empty text" in lines


def test_comments_are_those_beside_and_above_a_field():
    found = comments_of(train_vae.Recipe)
    assert found["ema_decay"].startswith("approached as")  # of the base class, whose default is another
    assert found["init"].startswith('"spec" | "pca"') and "seed" not in found
    assert is_dataclass(train_vae.Recipe) and list_keys(train_vae.Recipe).count("\n") > 80


def test_a_recipe_that_does_not_exist_is_named_at_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = (("vae", "smok", "smoke"), ("lvdm", "smoke", "lvdm_smoke"), ("vae", "no/smoke.yaml", "smoke"))
    for kind, name, near in names:
        code, out, err = invoke(kind, name)
        assert (code, out) == (1, "") and err.count("\n") == 1
        assert err.startswith("error: `recipe` must be a YAML file, or one of ")
        assert err.endswith(f", got {name!r}; perhaps {near!r} is meant.\n")
    for override, message in (("num_step=3", "Unknown recipe key `num_step`"), ("num_steps", "An override must read")):
        code, out, err = invoke("vae", "smoke", override)
        assert (code, out) == (1, "") and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_an_absent_accelerate_is_said_in_a_sentence(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "accelerate"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "diffusers_leanvae.training.train_vae", raising=False)
    expected = 'error: Training needs accelerate: pip install "diffusers-leanvae[train]".\n'
    assert invoke("vae", "smoke") == (1, "", expected)


def test_a_run_is_that_of_the_script(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a recipe by name is found from anywhere
    try:
        code, out, err = invoke("vae", "smoke", f"data.train={clips}", "num_steps=2", "num_threads=1", "output=run")
        assert code == 0, err
        assert "saved run/vae" in out + err
    finally:
        torch.set_float32_matmul_precision("highest")
        AcceleratorState._reset_state(reset_partial_state=True)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert AutoencoderKLLeanVAE.from_pretrained(tmp_path / "run" / "vae").latent_channels == 4

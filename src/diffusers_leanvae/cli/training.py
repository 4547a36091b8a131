"""Training by the scripts in `training/`: `train vae`, `train lvdm`, `train recipes`."""

from collections.abc import Callable
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Command, Json, in_one_sentence, print_json


SCRIPTS = {"vae": "train_vae", "lvdm": "train_lvdm"}
PURPOSES = {
    "vae": "Train or fine-tune a video autoencoder: LeanVAE, WF-VAE or IV-VAE.",
    "lvdm": "Train a latent diffusion model: unconditional, of classes, or of texts.",
}
PACKAGE = "diffusers_leanvae.training"

train = typer.Typer(
    no_args_is_help=True,
    help="Train an autoencoder (vae) or a latent diffusion model (lvdm) by a recipe.",
)


def recipes_of(kind: str) -> dict[str, Path]:
    """Find the shipped recipes of a kind of training, by name."""
    from ..trainer.recipe import list_recipes

    return list_recipes(_script(kind))


def _script(kind: str) -> Path:
    return Path(str(files(PACKAGE))) / f"{SCRIPTS[kind]}.py"


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Entries of the recipe to replace, such as num_steps=1000."),
]
Keys = Annotated[
    bool,
    typer.Option(
        "--keys",
        help="Print all keys with values, types and meanings as YAML, and train nothing; of a RECIPE with its values, "
        "else with the defaults.",
    ),
]


def _recipe(kind: str) -> Any:
    return typer.Argument(
        metavar="RECIPE",
        help="Name of a recipe that is shipped, of which `leanvae train recipes` tells, or a YAML file.",
        autocompletion=lambda incomplete: [name for name in recipes_of(kind) if name.startswith(incomplete)],
    )


def _make_command(kind: str, purpose: str) -> Callable[..., None]:
    def command(
        recipe: Annotated[str | None, _recipe(kind)] = None, overrides: Overrides = None, keys: Keys = False
    ) -> None:
        run(kind, recipe, overrides or [], keys)

    command.__doc__ = f"""{purpose}

    Started again with the same recipe and output it resumes where it stopped.

    `torchrun --nproc_per_node N --no-python leanvae train {kind} ...` trains in N processes.
    """
    return command


for kind, purpose in PURPOSES.items():
    train.command(kind, cls=Command, no_args_is_help=True)(in_one_sentence(_make_command(kind, purpose)))


def run(kind: str, recipe: str | None, overrides: list[str], keys: bool) -> None:
    """Start a training script, or print the keys of its recipes."""
    from ..launching import leave_job
    from ..trainer.recipe import find_recipe, load_recipe

    if recipe is None and not keys:
        raise ValueError("RECIPE must be given without `--keys`; `leanvae train recipes` lists what is shipped.")
    file = None if recipe is None else find_recipe(recipe, _script(kind))
    try:
        script: Any = import_module(f"{PACKAGE}.{SCRIPTS[kind]}")
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] != "accelerate":
            raise
        raise ImportError('Training needs accelerate: pip install "diffusers-leanvae[train]".') from error
    if not keys:
        script.main([str(file), *overrides])
        leave_job()
        return
    from ..trainer.recipe_keys import list_keys

    loaded = None if file is None else load_recipe(script.Recipe, file, overrides)
    typer.echo(list_keys(script.Recipe, loaded), nl=False)


@train.command("recipes", cls=Command)
@in_one_sentence
def recipes(as_json: Json = False) -> None:
    """List the recipes that are shipped, and what each is for."""
    found = [
        {"kind": kind, "name": name, "purpose": _purpose(path), "path": str(path)}
        for kind in SCRIPTS
        for name, path in recipes_of(kind).items()
    ]
    if as_json:
        print_json({"recipes": found})
        return
    width = max(len(f"{recipe['kind']} {recipe['name']}") for recipe in found)
    for recipe in found:
        typer.echo(f"{recipe['kind']} {recipe['name']}".ljust(width) + f"  {recipe['purpose']}")


def _purpose(path: Path) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# ") or line.startswith(("# Expected:", "# Cost:", "# Needs:", "# Command:")):
            break
        lines.append(line.removeprefix("# "))
    return " ".join(lines)

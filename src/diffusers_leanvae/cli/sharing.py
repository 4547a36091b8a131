"""Models on the Hub: `push`, `pull`."""

from pathlib import Path
from typing import Annotated

import typer

from .. import bundled
from ..checks import check_place
from ..description import check_model_folder
from .choices import complete
from .common import Json, print_json


def push(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help=f"Folder of a saved model, pipeline or adapter, or the name of a bundled one "
            f"({', '.join((*bundled.MODELS, *bundled.PIPELINES))}).",
            autocompletion=complete(*bundled.MODELS, *bundled.PIPELINES),
        ),
    ],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to, created if it does not exist; the main one without it.")
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of writing to the branch.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence of the weights for the card, such as apache-2.0.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Repository of the model that this one comes from or belongs to, for the card."),
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Data set of the Hub that it was trained on; repeat it for several.")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="File of `leanvae eval` of these weights, for the card; repeat it for several."),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Image file that the card shows.")] = None,
    no_shim: Annotated[
        bool,
        typer.Option(
            "--no-shim", help="Leave out the files by which diffusers loads it where this package is not imported."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Push a saved model, pipeline or adapter to the Hub, with a card; a README in its folder stays as it is."""
    from .. import hub

    card = None
    if any((license, base_model, dataset, results, picture)):
        card = hub.CardOptions(license, base_model, tuple(dataset or ()), tuple(results or ()), picture)
    address = hub.push_folder(
        folder,
        repo_id,
        card=card,
        shim=not no_shim,
        private=private or None,
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
    )
    if as_json:
        print_json({"address": address})
    else:
        typer.echo(address)


def pull(
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository of a model or pipeline.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="Folder to make; without it NAME, here.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; the main branch without it.")] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the weights, such as fp16.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a model or pipeline from the Hub into a folder; every file is checked, and nothing in it is run."""
    from .. import hub

    hub.check_repo_id("USER/NAME", repo_id)
    target = Path(repo_id.split("/")[1]) if folder is None else folder
    check_place("FOLDER", target, target.parent)
    if target.exists():
        check_model_folder("FOLDER", target)
        if not overwrite:
            raise ValueError(f"FOLDER must not exist without `--overwrite`, got {str(target)!r}.")
    hub.pull(repo_id, target, revision=revision, variant=variant)
    if as_json:
        print_json({"output": target})
    else:
        typer.echo(str(target))

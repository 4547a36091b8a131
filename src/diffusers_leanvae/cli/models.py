"""Files of models: `convert`, `info`, `models`."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import bundled
from ..atomic import replace_folder
from ..checks import CHECKPOINT_SUFFIXES, check_place, one_line, parse_dtype, suggestion
from ..description import check_model_folder, describe, describe_model, list_files
from .choices import DTYPE_NAMES, complete
from .common import DTYPES_TEXT, STANDARD, Json, print_json, render_table, standard_input


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN", help="Original checkpoint: a file, or a file on the Hub. With --to-original a model folder."
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help=f"Model folder to write. With --to-original a file ({', '.join(CHECKPOINT_SUFFIXES)})."
        ),
    ],
    to_original: Annotated[
        bool, typer.Option("--to-original", help="Convert a model folder back to an original checkpoint.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Number type to cast the weights to: {DTYPES_TEXT}; without it they stay bit-equal.",
            autocompletion=complete(*DTYPE_NAMES),
        ),
    ] = None,
    pixel_factor: Annotated[
        float | None,
        typer.Option(
            help="Factor on pixels in [-1, 1], for LeanVAE: 1.0 for weights trained on [-1, 1] (aligned with Wan). "
            "Without it as stored in the file, else 0.5."
        ),
    ] = None,
    latents_like: Annotated[
        str | None,
        typer.Option(
            metavar="TEACHER",
            help="For weights that were trained to make the latents of another autoencoder: take over mean, deviation "
            "and factor of its latents. wan2.1, wan2.2, or the folder, config.json or Hub id of that autoencoder.",
            autocompletion=complete("wan2.1", "wan2.2"),
        ),
    ] = None,
    num_attention_heads: Annotated[
        int | None,
        typer.Option(min=1, help="Attention heads of a Latte checkpoint whose size is none of S, B, L and XL."),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace the file, or the whole model folder, if it exists. Without it one that exists is an error.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert original LeanVAE, WF-VAE, IV-VAE and Latte checkpoints to model folders of diffusers, and back."""
    from .. import loading
    from ..conversion.checkpoints import resolve_checkpoint
    from ..latents import statistics_of

    torch_dtype = None if dtype is None else parse_dtype("--dtype", dtype)
    if to_original:
        if target.suffix not in CHECKPOINT_SUFFIXES:
            raise ValueError(f"OUT must end in {', '.join(CHECKPOINT_SUFFIXES)}, got {str(target)!r}.")
        if target.is_dir():
            raise ValueError(f"OUT must be a file with `--to-original`, got {str(target)!r}, which is a folder.")
        given = {
            "pixel-factor": pixel_factor,
            "latents-like": latents_like,
            "num-attention-heads": num_attention_heads,
        }
        for option in [option for option, value in given.items() if value is not None]:
            raise ValueError(f"`--{option}` must not be given with `--to-original`.")
        _check_output(target, overwrite)
        _check_not_read(target, (source,))
        with _naming_source(source):
            model = loading.load_model(source, torch_dtype)
        target.parent.mkdir(parents=True, exist_ok=True)
        model.conversion.write_original_checkpoint(target, dict(model.config), model.state_dict())
    else:
        if target.suffix in CHECKPOINT_SUFFIXES:
            raise ValueError(f"OUT must be a folder without `--to-original`, got {str(target)!r}.")
        if target.exists() and not target.is_dir():
            raise ValueError(f"OUT must be a folder, got {str(target)!r}, which is a file.")
        _check_output(target, overwrite)
        statistics = {} if latents_like is None else statistics_of("--latents-like", latents_like)
        with _naming_source(source):
            file = resolve_checkpoint(source)
            model_class = loading.class_of_checkpoint(file)
        _check_not_read(target, [file] if latents_like is None else [file, latents_like])
        options = {"pixel_factor": pixel_factor, "num_attention_heads": num_attention_heads}
        options = {name: value for name, value in options.items() if value is not None}
        for name in options.keys() - set(model_class.conversion.OPTIONS):
            option = name.replace("_", "-")
            raise ValueError(f"`--{option}` must not be given for a checkpoint of {model_class.conversion.NAME}.")
        if statistics and model_class not in loading.AUTOENCODERS:
            raise ValueError(f"`--latents-like` must not be given for a checkpoint of {model_class.conversion.NAME}.")
        model = model_class.from_single_file(file, torch_dtype=torch_dtype, **options, **statistics)
        with replace_folder(target) as folder:
            model.save_pretrained(folder)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if as_json:
        print_json({"output": target, "class": type(model).__name__, "num_parameters": num_parameters})
    else:
        typer.echo(f"{target}  {num_parameters / 1e6:.2f} M parameters")


def _check_output(target: Path, overwrite: bool) -> None:
    """Refuse to replace anything without `--overwrite`, and with it any folder but that of a model."""
    check_place("OUT", target, target.parent)
    if not target.exists():
        return
    if target.is_dir():
        check_model_folder("OUT", target)
    is_empty = target.is_dir() and not any(target.iterdir())
    if not (overwrite or is_empty):
        raise ValueError(f"OUT must not exist without `--overwrite`, got {str(target)!r}.")


def _check_not_read(target: Path, sources: Iterable[str | Path]) -> None:
    """Refuse to replace a file that is read: one of the sources, or one in a source that is a folder."""
    files = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
    for source in sources if files else ():
        reading = [Path(source)] if Path(source).is_file() else list_files(source).values()
        for file in files:
            if any(file.samefile(path) for path in reading):
                raise ValueError(f"OUT must not replace a file that is read, got {str(target)!r} for {str(file)!r}.")


@contextmanager
def _naming_source(source: str) -> Iterator[None]:
    """Name the argument IN of `convert` in what is wrong with it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"IN {source!r} cannot be converted: {one_line(error)}") from None


def info(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help=f"Video or image (also -, an address or f_%04d.png), latents of `encode` or `encode-dataset`, model "
            f"folder, pipeline folder, original checkpoint, Hub id, or the name of a bundled one "
            f"({', '.join((*bundled.MODELS, *bundled.PIPELINES))}).",
            autocompletion=complete(*bundled.MODELS, *bundled.PIPELINES),
        ),
    ],
    as_json: Json = False,
) -> None:
    """Print what a file or model is, as JSON."""
    if path == STANDARD:
        standard_input()
    try:
        described = describe(path)
        if described is None:
            _check_there(path)
            described = _describe_loaded(path)
    except ValueError as error:
        from ..video_io.containers import VideoError

        if isinstance(error, VideoError):  # which names the video
            raise
        raise ValueError(f"PATH {path!r} cannot be described: {one_line(error)}") from None
    if as_json:
        print_json(described)
    else:
        typer.echo(json.dumps(described, indent=2, default=str))


def _check_there(source: str) -> None:
    """Refuse what is neither here nor on the Hub, and folders without weights; `source` is no video and no latents."""
    from ..conversion.checkpoints import is_hub_reference

    place = Path(source)
    if place.is_dir():
        files = (*place.iterdir(), *place.glob("vae/*"))  # the autoencoder of a pipeline is looked for there
        reason = None if any(file.suffix in CHECKPOINT_SUFFIXES for file in files) else "which holds none of these"
    else:
        reason = None if place.exists() or is_hub_reference(source) else "which does not exist"
    if reason is not None:
        names = (*bundled.MODELS, *bundled.PIPELINES)
        raise ValueError(
            f"it must be a video, an image, latents, a model or pipeline, here or on the Hub, or one of "
            f"{', '.join(names)}, got {source!r}, {reason}{suggestion(source, names)}."
        )


def _describe_loaded(source: str) -> dict[str, Any]:
    """Describe a model by loading it: one that is on the Hub, or in a pickle."""
    from ..loading import load_model

    model = load_model(source)
    weights = [(str(weight.dtype).removeprefix("torch."), weight.numel()) for weight in model.parameters()]
    return describe_model(type(model).__name__, weights, model.config)


def models(as_json: Json = False) -> None:
    """List the models that can be loaded without a network: the bundled ones, and those in the cache of the Hub."""
    from huggingface_hub import constants

    from .listing import list_bundled, list_cached

    found = [*list_bundled(), *list_cached(constants.HF_HUB_CACHE)]
    if as_json:
        print_json({"models": found, "cache": constants.HF_HUB_CACHE})
        return
    head = ["name", "revision", "class", "channels", "compression", "parameters", "size"]
    lines = [
        [
            model["name"],
            (model["revision"] or "bundled")[:12],
            model["class"],
            str(model.get("latent_channels", "")),
            "{temporal_compression_ratio}x{spatial_compression_ratio}x{spatial_compression_ratio}".format_map(model)
            if "spatial_compression_ratio" in model
            else "",
            f"{model['num_parameters'] / 1e6:.2f} M",
            f"{model['num_bytes'] / 1e6:.1f} MB",
        ]
        for model in found
    ]
    typer.echo(render_table([head, *lines]))
    if all(model["revision"] is None for model in found):
        typer.echo(f"none in the cache of the Hub, {constants.HF_HUB_CACHE}", err=True)

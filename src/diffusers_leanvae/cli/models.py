"""Files of models: `convert`, `info`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import bundled
from ..checks import CHECKPOINT_SUFFIXES, parse_dtype
from .common import DTYPE_NAMES, load_model


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
        typer.Option(help=f"Number type to cast the weights to: {DTYPE_NAMES}; without it they stay bit-equal."),
    ] = None,
    pixel_factor: Annotated[
        float | None,
        typer.Option(
            help="Factor on pixels in [-1, 1], for LeanVAE: 1.0 for weights trained on [-1, 1] (aligned with Wan). "
            "Without it as stored in the file, else 0.5."
        ),
    ] = None,
    num_attention_heads: Annotated[
        int | None,
        typer.Option(min=1, help="Attention heads of a Latte checkpoint whose size is none of S, B, L and XL."),
    ] = None,
) -> None:
    """Convert original LeanVAE, WF-VAE, IV-VAE and Latte checkpoints to model folders of diffusers, and back."""
    from diffusers import AutoModel

    from ..conversion.checkpoints import resolve_checkpoint
    from ..loading import family_of_checkpoint, family_of_config

    torch_dtype = None if dtype is None else parse_dtype("--dtype", dtype)
    if to_original:
        if target.suffix not in CHECKPOINT_SUFFIXES:
            raise ValueError(f"OUT must end in {', '.join(CHECKPOINT_SUFFIXES)}, got {str(target)!r}.")
        path = bundled.model_path(source) if source in bundled.MODELS else source
        config: Any = AutoModel.load_config(path)
        family = family_of_config(config, path)
        model = family.model_class.from_pretrained(path, torch_dtype=torch_dtype)
        target.parent.mkdir(parents=True, exist_ok=True)
        family.conversion.write_original_checkpoint(target, dict(model.config), model.state_dict())
    else:
        if target.suffix in CHECKPOINT_SUFFIXES:
            raise ValueError(f"OUT must be a folder without `--to-original`, got {str(target)!r}.")
        file = resolve_checkpoint(source)
        family = family_of_checkpoint(file)
        options = {"pixel_factor": pixel_factor, "num_attention_heads": num_attention_heads}
        options = {name: value for name, value in options.items() if value is not None}
        for name in options.keys() - set(family.conversion.OPTIONS):
            option = name.replace("_", "-")
            raise ValueError(f"`--{option}` must not be given for a checkpoint of {family.conversion.NAME}.")
        model = family.model_class.from_single_file(file, torch_dtype=torch_dtype, **options)
        model.save_pretrained(target)
    typer.echo(f"{target}  {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")


def info(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Video, image, latents file, model folder or checkpoint.")
    ],
) -> None:
    """Print what a file or model is, as JSON."""
    from ..inference.latents_file import open_latents
    from ..video_io import probe_video
    from ..video_io.reader import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

    suffix = Path(path).suffix.lower()
    if Path(path).is_file() and suffix in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS:
        described: dict[str, Any] = {"kind": "video", **vars(probe_video(path))}
    elif Path(path).is_file() and suffix == ".safetensors" and _is_latents(path):
        with open_latents(path) as (latents, latents_info):
            shape, kind = list(latents.get_shape()), str(latents.get_dtype())
        described = {"kind": "latents", "shape": shape, "dtype": kind, **vars(latents_info)}
    else:
        vae = load_model(path, "cpu", "float32")
        described = {
            "kind": "model",
            "class": type(vae).__name__,
            "num_parameters": sum(p.numel() for p in vae.parameters()),
            "temporal_compression_ratio": vae.temporal_compression_ratio,
            "spatial_compression_ratio": vae.spatial_compression_ratio,
            "config": {key: value for key, value in vae.config.items() if not key.startswith("_")},
        }
    typer.echo(json.dumps(described, indent=2, default=str))


def _is_latents(path: str) -> bool:
    from ..inference.latents_file import open_latents

    try:
        with open_latents(path):
            return True
    except ValueError:
        return False

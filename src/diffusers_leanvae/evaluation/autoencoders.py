"""Any autoencoder of diffusers: found by class and path, and called in one way."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch

from ..bundled import MODELS, PIPELINES
from ..checks import one_line, reason_of, sha256
from ..conversion.headers import CONFIG_NAME, WEIGHTS_NAME
from ..description import INDEX_NAME
from ..loading import load_autoencoder, resolve_bundled
from ..models.video_autoencoder import VideoAutoencoder


class OpenedAutoencoder(NamedTuple):
    """An autoencoder in evaluation mode, and what is known of it.

    Attributes:
        vae: The model.
        about: `class`, `num_parameters`, `weights` (`"random"` or `"trained"`), `weights_sha256` (`None` unless they
            are one local file), `latent_channels` and the two compression ratios (`None` where it does not tell).
    """

    vae: Any
    about: dict[str, Any]


def open_autoencoder(
    source: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> OpenedAutoencoder:
    """Open an autoencoder of this package or of diffusers.

    Args:
        source: One of

            - what [`loading.load_autoencoder`] takes: a bundled model, a folder, an original checkpoint, a Hub id;
            - a folder of another class of diffusers, which its `config.json` names;
            - `Class:place`, a class of diffusers and a folder or Hub id (`user/repo`, `user/repo/subfolder`);
            - `Class`, with the defaults of its config and random weights, or `Class:config.json`, with that config
              and random weights. They come from one seed.
        device: Where to put it.
        dtype: Dtype of the weights.

    Raises:
        ValueError: If there is no such autoencoder.
    """
    name, _, place = source.partition(":")
    is_random = False
    if (model_class := find_class(name)) is not None:
        is_random = not place or place.endswith(".json")
        vae = _build_random(model_class, place) if is_random else _load_class(model_class, place, dtype)
    elif (model_class := _class_of_folder(source)) is not None:
        vae, place = _load_class(model_class, source, dtype), source
    else:
        vae, place = load_autoencoder(source, dtype), str(resolve_bundled(source))
    # In the folder of a pipeline, the autoencoder has one of its own.
    weights = Path(place, "vae" if Path(place, INDEX_NAME).is_file() else "", WEIGHTS_NAME)
    about = {
        "class": type(vae).__name__,
        "num_parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "weights": "random" if is_random else "trained",
        "weights_sha256": None if is_random or not weights.is_file() else sha256(weights),
        "latent_channels": _number_of(vae, "latent_channels", "z_dim", "z_channels"),
        "temporal_compression_ratio": _number_of(vae, "temporal_compression_ratio", "scale_factor_temporal"),
        "spatial_compression_ratio": _number_of(vae, "spatial_compression_ratio", "scale_factor_spatial"),
    }
    # Diffusers' own `to` warns of layers that want float32; who names a dtype here wants that one.
    return OpenedAutoencoder(torch.nn.Module.to(vae.eval(), device, dtype), about)


def open_for(
    argument: str, source: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> OpenedAutoencoder:
    """Open an autoencoder as [`open_autoencoder`] does, with errors that name the argument that `source` is from."""
    try:
        return open_autoencoder(source, device, dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"`{argument}` {source!r} cannot be loaded: {one_line(error)}") from None


def find_class(name: str) -> Any | None:
    """Find a class of diffusers, or of this package, that encodes and decodes; `None` if there is none."""
    model_class = getattr(diffusers, name, None) if re.fullmatch(r"[A-Z]\w+", name) else None
    is_model = isinstance(model_class, type) and issubclass(model_class, diffusers.ModelMixin)
    return model_class if is_model and hasattr(model_class, "encode") and hasattr(model_class, "decode") else None


def _class_of_folder(source: str) -> Any | None:
    """Return the class that a local folder's config names, if it is not one of this package."""
    path = Path(source) / CONFIG_NAME
    if source in MODELS or source in PIPELINES or not path.is_file():
        return None
    try:
        model_class = find_class(json.loads(path.read_text(encoding="utf-8")).get("_class_name", ""))
    except (ValueError, AttributeError, TypeError):  # a config of something else, which the loader names
        return None
    return None if model_class is None or issubclass(model_class, VideoAutoencoder) else model_class


def _load_class(model_class: Any, place: str, dtype: torch.dtype) -> Any:
    subfolder = None
    if not Path(place).exists() and place.count("/") > 1:
        user, repository, subfolder = place.split("/", 2)
        place = f"{user}/{repository}"
    try:
        return model_class.from_pretrained(place, torch_dtype=dtype, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`source` must hold weights of {model_class.__name__}, got {place!r}: {reason_of(error)}."
        ) from None


def _build_random(model_class: Any, config: str) -> Any:
    try:
        values = json.loads(Path(config).read_text(encoding="utf-8")) if config else {}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return model_class.from_config(values)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"`source` must be the config of a {model_class.__name__}, got {config!r}: {reason_of(error)}."
        ) from None


def _number_of(vae: Any, *names: str) -> int | None:
    """Return the first of these numbers that the config has, or else the model."""
    values = [vae.config.get(name) for name in names] + [vars(vae).get(name) for name in names]
    values += [getattr(vae, name) for name in names if hasattr(type(vae), name)]
    return next((value for value in values if type(value) is int), None)


def encode(vae: Any, x: torch.Tensor) -> torch.Tensor:
    """Encode a batch with any autoencoder of diffusers; returns the posterior mean where there is a posterior."""
    output = vae.encode(x)
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mode()
    if isinstance(output, tuple):  # VidTok with codes
        return output[0]
    return output.latents if hasattr(output, "latents") else output.latent


def decode(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """Decode latents with any autoencoder of diffusers."""
    output = vae.decode(z)
    return output if isinstance(output, torch.Tensor) else output.sample


def legal_sample(vae: Any, x: torch.Tensor) -> torch.Tensor:
    """Prepare `x` for `encode`: VidTok's own `forward` repeats the first frame before it calls `encode`."""
    if type(vae).__name__ != "AutoencoderVidTok":
        return x
    return torch.cat((x[:, :, :1].expand(-1, -1, vae.temporal_compression_ratio - 1, -1, -1), x), dim=2)


def is_image_autoencoder(vae: Any) -> bool:
    """Tell whether an autoencoder takes images: its encoder has no kernel that spans frames."""
    encoder = getattr(vae, "encoder", vae)
    return not isinstance(vae, VideoAutoencoder) and all(weight.ndim < 5 for weight in encoder.parameters())

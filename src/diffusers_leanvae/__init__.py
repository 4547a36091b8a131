"""LeanVAE, WF-VAE and IV-VAE, video autoencoders, as first-class diffusers models.

The names of this package are imported when they are asked for (PEP 562): to import the package, for its registration
with diffusers or for the command line, costs nothing.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from . import registration
from ._version import __version__


if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

    from .inference.padding import Padding, crop_sample, pad_sample
    from .inference.streaming import StreamingDecoder, StreamingEncoder
    from .models.autoencoder_kl_ivvae import AutoencoderKLIVVAE
    from .models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
    from .models.autoencoder_kl_wfvae import AutoencoderKLWFVAE
    from .models.temporal_cache import TemporalCache
    from .models.transformer_latte import LeanVAELatteTransformer3DModel
    from .pipelines.pipeline_leanvae_latte import (  # pyright: ignore[reportMissingImports] - mapped from the root
        LeanVAELattePipeline,
    )
    from .pipelines.pipeline_leanvae_latte_text_to_video import (  # pyright: ignore[reportMissingImports]
        LeanVAELatteTextToVideoPipeline,
    )

__all__ = [
    "AutoencoderKLIVVAE",
    "AutoencoderKLLeanVAE",
    "AutoencoderKLWFVAE",
    "LeanVAELattePipeline",
    "LeanVAELatteTextToVideoPipeline",
    "LeanVAELatteTransformer3DModel",
    "ModelMixin",
    "Padding",
    "StreamingDecoder",
    "StreamingEncoder",
    "TemporalCache",
    "__version__",
    "crop_sample",
    "pad_sample",
]

# Public name -> module. `ModelMixin` must be one of them: diffusers looks base classes of components up here.
_MODULES = {
    **registration.MODELS,
    **registration.PIPELINES,
    "ModelMixin": "diffusers.models.modeling_utils",
    "Padding": "diffusers_leanvae.inference.padding",
    "StreamingDecoder": "diffusers_leanvae.inference.streaming",
    "StreamingEncoder": "diffusers_leanvae.inference.streaming",
    "TemporalCache": "diffusers_leanvae.models.temporal_cache",
    "crop_sample": "diffusers_leanvae.inference.padding",
    "pad_sample": "diffusers_leanvae.inference.padding",
}

registration.register()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")  # `diffusers_leanvae.loading` without an import of its own
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

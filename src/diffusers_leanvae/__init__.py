"""LeanVAE, the lightest good video autoencoder, and its siblings as first-class diffusers models."""

# `ModelMixin` must be a name of this package: diffusers looks base classes of components up here (see `hub.py`).
from diffusers.models.modeling_utils import ModelMixin

from . import hub
from ._version import __version__
from .inference.padding import Padding, crop_sample, pad_sample
from .inference.streaming import StreamingDecoder, StreamingEncoder
from .models.autoencoder_kl_ivvae import AutoencoderKLIVVAE
from .models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from .models.autoencoder_kl_wfvae import AutoencoderKLWFVAE
from .models.temporal_cache import TemporalCache
from .models.transformer_latte import LeanVAELatteTransformer3DModel


hub.register()
# The pipelines are names of this package, too, but imported only when they are asked for (PEP 562).
__getattr__ = hub.load_pipeline_class

__all__ = [
    "AutoencoderKLIVVAE",
    "AutoencoderKLLeanVAE",
    "AutoencoderKLWFVAE",
    "LeanVAELattePipeline",  # pyright: ignore[reportUnsupportedDunderAll]
    "LeanVAELatteTextToVideoPipeline",  # pyright: ignore[reportUnsupportedDunderAll]
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

"""Make diffusers find our classes by name: in `model_index.json`, in `AutoModel`, in pipelines from the Hub.

diffusers 0.42 loads a component of a pipeline only from libraries in `LOADABLE_CLASSES`; this table is not public, so
the dependency on diffusers is capped and `tests/test_hub.py` guards what we use of it.
"""

import diffusers
from diffusers.pipelines import pipeline_loading_utils

from .models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE


PUBLIC_CLASSES = (AutoencoderKLLeanVAE,)


def register() -> None:
    r"""Register the package with diffusers; runs when `diffusers_leanvae` is imported."""
    pipeline_loading_utils.LOADABLE_CLASSES["diffusers_leanvae"] = {
        "ModelMixin": ["save_pretrained", "from_pretrained"]
    }
    for public_class in PUBLIC_CLASSES:
        setattr(diffusers, public_class.__name__, public_class)

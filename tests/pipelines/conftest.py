"""Tiny pipelines whose every output is of order 1."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from tiny import LATTE_TEXT, enliven, make_tiny, seeded

import diffusers_leanvae
from diffusers_leanvae.generation.schedulers import make_scheduler


# 9 frames of 32 x 32 pixels: 3 latent frames of 4 x 4.
WORDS = "a painting of squirrel eating burger very long low quality very".split()


@dataclass
class Case:
    """A pipeline class, and what diffusers' own test mixins ask of one: components, inputs, batched arguments."""

    pipeline_class: Any
    components: Callable[..., dict[str, Any]]
    inputs: dict[str, Any]
    batched: tuple[str, ...]

    def pipeline(self, scheduler: str = "dpm++", **components: Any) -> Any:
        pipeline = self.pipeline_class(**(self.components() | {"scheduler": make_scheduler(scheduler)} | components))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def run(self, pipeline: Any, **inputs: Any) -> Any:
        """The first output, always from the same seed.

        From the last step of all, untrained networks make numbers of hundreds, in whose rounding any tolerance drowns;
        so two late steps are taken, unless a test asks for a number of steps.
        """
        steps = {} if "num_inference_steps" in inputs else {"timesteps": [200, 100]}
        return pipeline(**({"generator": torch.Generator().manual_seed(0)} | steps | self.inputs | inputs))[0]


@pytest.fixture(scope="session")
def class_case() -> Case:
    def components(num_classes: int | None = 3, num_layers: int = 4, **config: Any) -> dict[str, Any]:
        transformer = make_tiny("latte", num_classes=num_classes, num_layers=num_layers, **config)
        vae = make_tiny("leanvae", latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[1.0, 2.0, 3.0, 0.5])
        return {"vae": vae, "transformer": transformer, "scheduler": make_scheduler("dpm++")}

    inputs = {"class_labels": [1], "guidance_scale": 3.0, "output_type": "pt"}
    return Case(diffusers_leanvae.LeanVAELattePipeline, components, inputs, ("class_labels",))


def make_tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers", reason="a text pipeline needs transformers and its tokenizers")
    transformers = pytest.importorskip("transformers", reason="a text pipeline needs transformers")
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(["<pad>", "</s>", "<unk>", *WORDS]))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


@pytest.fixture(scope="session")
def text_case() -> Case:
    transformers = pytest.importorskip("transformers", reason="a text pipeline needs transformers")

    def components(num_layers: int = 2, sample_size: int = 4) -> dict[str, Any]:
        config = transformers.T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0
        )
        with seeded(0):
            changed = {"num_layers": num_layers, "sample_size": sample_size}
            transformer = diffusers.LatteTransformer3DModel(**(LATTE_TEXT | changed))
            text_encoder = transformers.T5EncoderModel(config)
        return {
            "tokenizer": make_tokenizer(),
            "text_encoder": enliven(text_encoder, seed=1),
            "vae": make_tiny("leanvae"),
            "transformer": enliven(transformer),
            "scheduler": make_scheduler("dpm++"),
        }

    inputs = {
        "prompt": "A painting of a squirrel eating a burger",
        "negative_prompt": "low quality",
        "guidance_scale": 3.0,
        "output_type": "pt",
    }
    return Case(diffusers_leanvae.LeanVAELatteTextToVideoPipeline, components, inputs, ("prompt", "negative_prompt"))


@pytest.fixture(params=["class", "text"])
def case(request: pytest.FixtureRequest) -> Case:
    """Each of the pipelines."""
    return request.getfixturevalue(f"{request.param}_case")

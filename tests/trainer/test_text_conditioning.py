"""Texts in training: captions to tokens or hidden states, dropped ones, and the transformer from another's weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import LatteTransformer3DModel
from tiny import enliven, make_tiny, seeded

from diffusers_leanvae import bundled
from diffusers_leanvae.data.latent_samples import LatentBatch
from diffusers_leanvae.text_encoders import TextEncoder, make_text_encoder
from diffusers_leanvae.trainer.text_conditioning import Captions, TextRecipe, build_text_transformer, open_captions


pytest.importorskip("transformers", reason="transformers is an optional dependency")

CAPTIONS = ["a red circle moves left", "a blue square", "a circle"]
DROP = torch.tensor([False, True, False])
CPU = torch.device("cpu")
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 4,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_latent_frames": 3,
    "sample_size": 4,
}


def make_encoder(seed: int = 0, **config: Any) -> TextEncoder:
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    with seeded(seed):
        return make_text_encoder(CAPTIONS, small | config, max_length=9)


def make_batch(**fields: Any) -> LatentBatch:
    return LatentBatch(torch.zeros(3, 1), None, None, torch.arange(3), 0, captions=list(CAPTIONS), **fields)


# --- Captions --------------------------------------------------------------------------------------------------------


def test_dropped_captions_are_the_empty_text():
    encoder = make_encoder()
    expected = encoder([CAPTIONS[0], "", CAPTIONS[2]])
    frozen, trained = (Captions(encoder, CPU, is_trained) for is_trained in (False, True))
    tokens = frozen.prepare(make_batch(), DROP)
    assert tokens.embeds.dtype == torch.int64 and tokens.mask.sum(1).tolist() == [6, 1, 3]
    assert torch.equal(frozen.place(tokens).embeds, expected.embeds)
    for ours, theirs in zip(trained.place(trained.prepare(make_batch(), DROP)), tokens, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(frozen.encode(make_batch()).embeds, encoder(CAPTIONS).embeds)


def test_a_caption_that_is_too_long_is_warned_of_once(caplog: pytest.LogCaptureFixture):
    captions = Captions(make_encoder(), CPU, is_trained=False)
    for _ in range(2):
        captions.prepare(make_batch()._replace(captions=["a circle", "a red circle " * 5]))
    assert caplog.text.count("A text of 16 tokens was cut to 9") == 1


def test_cached_hidden_states_are_taken_and_dropped_alike():
    encoder = make_encoder()
    cached = make_batch(text=encoder(CAPTIONS))
    captions = Captions(encoder, CPU, is_trained=False, null=encoder([""]))
    assert captions.prepare(cached) is captions.prepare(cached, torch.zeros(3, dtype=torch.bool)) is cached.text
    for drop in (DROP, ~DROP, torch.ones(3, dtype=torch.bool)):
        ours = captions.place(captions.prepare(cached, drop))
        theirs = encoder(["" if dropped else text for dropped, text in zip(drop, CAPTIONS, strict=True)])
        assert torch.equal(ours.mask, theirs.mask)
        torch.testing.assert_close(ours.embeds, theirs.embeds, rtol=0, atol=1e-5)


def test_held_out_hidden_states_must_be_of_the_same_encoder():
    """As their settings say: the weights of the encoder are not read again."""
    settings = {"source": "here", "num_at_once": 32, "max_length": 9, "dtype": "float32", "width": 16, "class": "T5"}
    settings |= {"weights_sha256": "a", "tokenizer_sha256": "b"}
    captions = Captions(Any, CPU, is_trained=False, null=Any, settings=settings)  # pyright: ignore[reportArgumentType]
    for other in ({}, {"source": "there"}, {"dtype": "bfloat16", "weights_sha256": "c"}):
        captions.check(SimpleNamespace(items=SimpleNamespace(text_settings=settings | other)))  # pyright: ignore[reportArgumentType]
    for key, value in (("weights_sha256", "c"), ("tokenizer_sha256", "c"), ("max_length", 8), ("width", 8)):
        data: Any = SimpleNamespace(items=SimpleNamespace(text_settings=settings | {key: value}))
        with pytest.raises(ValueError, match=f"`validation.data` must hold .*, whose `{key}` is .*, got {value!r}"):
            captions.check(data)
        Captions(Any, CPU, is_trained=True).check(data)  # pyright: ignore[reportArgumentType]


def test_a_half_precision_encoder_gives_the_transformer_float32():
    encoder = make_encoder()
    encoder.model.bfloat16()
    captions = Captions(encoder, CPU, is_trained=False)
    placed = captions.place(captions.prepare(make_batch()))
    assert placed.embeds.dtype == torch.float32 and torch.equal(placed.embeds, encoder(CAPTIONS).embeds.float())


def test_validation_takes_the_averaged_encoder_where_one_is_trained():
    encoder, other = make_encoder(), make_encoder(seed=1)
    trained, frozen = (Captions(encoder, CPU, is_trained) for is_trained in (True, False))
    assert torch.equal(trained.encode(make_batch(), other.model).embeds, other(CAPTIONS).embeds)
    assert trained.parts(other.model) == (encoder.tokenizer, other.model) and trained.trained_model is encoder.model
    assert trained.sample_arguments(["a circle"]) == {"prompt": ["a circle"]}
    assert torch.equal(frozen.encode(make_batch(), None).embeds, encoder(CAPTIONS).embeds)
    assert frozen.parts(None) == (encoder.tokenizer, encoder.model) and frozen.trained_model is None
    arguments = frozen.sample_arguments(["a circle", "a red square"])
    assert torch.equal(arguments["prompt_embeds"], encoder(["a circle", "a red square"]).embeds)
    assert torch.equal(arguments["negative_prompt_embeds"], encoder(["", ""]).embeds)
    assert arguments["negative_prompt_attention_mask"].sum(1).tolist() == [1, 1]


def open_for(recipe: TextRecipe, init: str | None = None, **items: Any) -> Captions:
    data: Any = SimpleNamespace(items=SimpleNamespace(**items), has_own_order=False)
    return open_captions(recipe, init, data, CPU)


def test_where_the_encoder_comes_from(tmp_path: Path):
    encoder = make_encoder(dropout_rate=0.1)
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder.model.eval()
    expected = encoder(CAPTIONS).embeds
    frozen = open_for(TextRecipe(), str(tmp_path))  # a pipeline to start from
    assert not any(weight.requires_grad for weight in frozen.encoder.model.parameters())
    assert torch.equal(frozen.encoder(CAPTIONS).embeds, expected)
    trained = open_for(TextRecipe(encoder=str(tmp_path), train_text_encoder=True, max_length=7))
    assert all(weight.requires_grad for weight in trained.encoder.model.parameters())
    assert trained.encoder.max_length == trained.encoder.tokenizer.model_max_length == 7
    # Without dropout, which would be another in another process.
    assert torch.equal(trained.encoder(CAPTIONS[:1]).embeds, trained.encoder(CAPTIONS[:1]).embeds)
    half = open_for(TextRecipe(encoder=str(tmp_path), dtype="bfloat16"))
    assert half.encoder.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`text.encoder` must be given where neither the latents nor `init` tell it"):
        open_for(TextRecipe())
    with pytest.raises(ValueError, match="`text.encoder` cannot be loaded: `max_length` must be 1 to .* 9, got 40"):
        open_for(TextRecipe(encoder=str(tmp_path), max_length=40))


def test_a_new_encoder_knows_the_words_of_all_captions():
    recipe = TextRecipe("new", {"d_model": 16, "num_layers": 1}, train_text_encoder=True)

    class Items:
        def __len__(self) -> int:
            return 2

        def captions(self, number: int) -> tuple[str, ...]:
            return (("a red circle", "one circle"), ("a blue square",))[number]

    data: Any = SimpleNamespace(items=Items(), has_own_order=False)
    captions = open_captions(recipe, None, data, CPU)
    words = {"a", "red", "circle", "one", "blue", "square"}
    assert set(captions.encoder.tokenizer.get_vocab()) == words | {"<pad>", "</s>", "<unk>"}
    assert captions.width == 16 and captions.encoder.max_length == 48 and not captions.encoder.model.training


# --- The transformer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latte")
    enliven(build_text_transformer(CONFIG, {}, 16, None)).save_pretrained(folder / "transformer")
    return folder


def differing(model: Any, folder: Path) -> set[str]:
    stored = LatteTransformer3DModel.from_pretrained(folder, subfolder="transformer").state_dict()
    found = model.state_dict()
    assert found.keys() == stored.keys()
    return {name for name, weight in found.items() if not torch.equal(weight, stored[name])}


def test_a_new_transformer_is_latte_1s_and_starts_from_zero():
    model = build_text_transformer(CONFIG, {}, 16, None)
    assert len(model.transformer_blocks) == len(model.temporal_transformer_blocks) == 2  # pairs
    config = model.config
    assert (config["cross_attention_dim"], config["caption_channels"], config["video_length"]) == (24, 16, 3)
    assert config["norm_type"] == "ada_norm_single" and config["attention_bias"]
    text = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not model(torch.ones(1, 4, 3, 4, 4), torch.tensor([5]), encoder_hidden_states=text).sample.any()
    assert model.transformer_blocks[0].attn1.to_q.weight.std() > 0.1
    assert build_text_transformer(CONFIG, {"dropout": 0.25}, 16, None).config["dropout"] == 0.25
    with pytest.raises(ValueError, match="`model` must hold arguments of LatteTransformer3DModel, got .*'depth'"):
        build_text_transformer(CONFIG, {"depth": 3}, 16, None)


@pytest.mark.parametrize("source", ["", "transformer"], ids=["pipeline", "transformer"])
def test_the_weights_of_a_model_of_the_same_latents_are_kept(source: str, latte: Path):
    assert differing(build_text_transformer(CONFIG, {}, 16, str(latte / source)), latte) == set()


def test_bundled_pipelines_are_known_by_their_names(latte: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoder = make_encoder()
    encoder.model.save_pretrained(latte / "text_encoder")
    encoder.tokenizer.save_pretrained(latte / "tokenizer")
    monkeypatch.setitem(bundled.PIPELINES, "texts", bundled.BundledPipeline("compact-4ch", 2.0))
    monkeypatch.setattr(bundled, "pipeline_path", {"texts": latte}.__getitem__)
    assert differing(build_text_transformer(CONFIG, {}, 16, "texts"), latte) == set()
    encoder.model.eval()
    assert torch.equal(open_for(TextRecipe(), "texts").encoder(CAPTIONS).embeds, encoder(CAPTIONS).embeds)


@pytest.mark.parametrize(
    ("config", "width", "new"),
    [
        ({"in_channels": 6, "out_channels": 6}, 16, {"pos_embed.proj.weight", "proj_out.weight", "proj_out.bias"}),
        ({"out_channels": 4}, 16, {"proj_out.weight", "proj_out.bias"}),
        ({}, 24, {"caption_projection.linear_1.weight"}),
        ({"sample_size": 8, "num_latent_frames": 5}, 16, set()),
    ],
    ids=["channels", "objective", "text encoder", "sizes"],
)
def test_only_layers_that_do_not_fit_start_anew(config: dict[str, Any], width: int, new: set[str], latte: Path):
    torch.manual_seed(0)
    model = build_text_transformer(CONFIG | config, {}, width, str(latte))
    assert differing(model, latte) == new
    assert model.config["in_channels"] == model.pos_embed.proj.in_channels == (CONFIG | config)["in_channels"]
    if "proj_out.weight" in new:
        assert not model.proj_out.weight.any()  # as of a new model
    if new:
        with pytest.raises(ValueError, match=r"`init` must have `.*` of shape \(.*\) for this recipe, got \(.*\) in"):
            build_text_transformer(CONFIG | config, {}, width, str(latte), may_start_anew=False)


def test_what_cannot_be_started_from_is_refused_in_a_sentence(latte: Path, tmp_path: Path):
    for overrides, message in (
        ({"attention_head_dim": 6}, r"`init` must have `.*` of shape \(.*\) for this recipe, got \(.*\) in"),
        ({"num_layers": 3}, r"`init` must have `.*` of shape \(.*\) for this recipe, got none in"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            build_text_transformer(CONFIG, overrides, 16, str(latte))
        assert "\n" not in str(caught.value)
    make_tiny("latte").save_pretrained(tmp_path / "classes" / "transformer")
    (tmp_path / "empty").mkdir()
    for folder in ("nothing", "empty", "classes"):
        with pytest.raises(ValueError, match="`init` must be a LatteTransformer3DModel or a pipeline with") as caught:
            build_text_transformer(CONFIG, {}, 16, str(tmp_path / folder))
        assert "\n" not in str(caught.value)

"""Text encoders of transformers, of every kind: hidden states depend on the text alone. One made from captions."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import seeded

from diffusers_leanvae.text_encoders import (
    TextEmbeddings,
    TextEncoder,
    check_length,
    encode_tokens,
    freeze_unused,
    load_text_encoder,
    make_text_encoder,
    text_arguments,
    tokenize,
)


transformers = pytest.importorskip("transformers", reason="transformers is an optional dependency")

LONGEST = "a red circle moves left above a blue square moving down slowly"
TEXTS = ["a red circle", "", LONGEST, "square"]
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
DECODER = SIZE | {"num_key_value_heads": 1, "head_dim": 8}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
CLIP = SIZE | {"max_position_embeddings": 24, "bos_token_id": 2, "eos_token_id": 1}
IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}

# What is saved, and the class that is loaded from it.
KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "t5": (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)), "T5EncoderModel"),
    "umt5": (lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)), "UMT5EncoderModel"),
    "clip": (
        lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config=CLIP, vision_config=TOWER)),
        "CLIPTextModel",
    ),
    "clip text": (lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)), "CLIPTextModel"),
    "bert": (
        lambda: transformers.BertModel(transformers.BertConfig(**SIZE, max_position_embeddings=24)),
        "BertModel",
    ),
    "gemma": (lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**DECODER, **IDS)), "GemmaModel"),
    "qwen": (lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER)), "Qwen3Model"),
}


def make_tokenizer(**special: Any) -> Any:
    """A tokenizer of words, of any length, that marks the end of a text unless it has no `eos_token`."""
    made = make_text_encoder([LONGEST], {"num_layers": 1, "d_model": 8}).tokenizer.backend_tokenizer
    if "eos_token" not in special:
        made.post_processor = None
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def save(folder: Path, kind: str, tokenizer: Any = None) -> Path:
    with seeded(0):
        KINDS[kind][0]().save_pretrained(folder)
    whole = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (make_tokenizer(**whole) if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("t5"), "t5")


def of_tokens(text: TextEmbeddings) -> Iterator[torch.Tensor]:
    """The hidden states of each text's own tokens."""
    for embeds, mask in zip(*text, strict=True):
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # padding is on the right
        yield embeds[: mask.sum()]


# --- Hidden states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_depend_on_the_text_alone(kind: str, tmp_path: Path):
    encoder = load_text_encoder(save(tmp_path, kind), max_length=20)
    assert type(encoder.model).__name__ == KINDS[kind][1] and encoder.width == 16 and not encoder.model.training
    together = encoder(TEXTS)
    assert together.embeds.shape == (4, 20, 16) and together.mask.sum(1).tolist() == [4, 1, 13, 2]
    assert not together.embeds.requires_grad and together.embeds.dtype == torch.float32
    shorter = load_text_encoder(tmp_path, max_length=13)(TEXTS)
    alone = [encoder([text]) for text in TEXTS]
    for states, at_once, by_itself in zip(of_tokens(together), of_tokens(shorter), alone, strict=True):
        assert states.std() > 0.2
        torch.testing.assert_close(at_once, states, rtol=0, atol=1e-5)  # measured: 1.1e-6
        torch.testing.assert_close(next(of_tokens(by_itself)), states, rtol=0, atol=1e-5)
    assert (together.embeds[0, 0] - together.embeds[3, 0]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["qwen", "bert"])
def test_a_tokenizer_without_padding_or_an_end(kind: str, tmp_path: Path):
    """As those of GPT and Qwen: nothing is added to a text, and `""` has no tokens."""
    save(tmp_path, kind, make_tokenizer(unk_token="<unk>"))
    encoder = load_text_encoder(tmp_path, max_length=14)
    assert encoder.tokenizer.pad_token == "<unk>"
    together = encoder(TEXTS)
    assert together.mask.sum(1).tolist() == [3, 1, 12, 1] and together.embeds.isfinite().all()
    torch.testing.assert_close(encoder([""]).embeds[0, 0], together.embeds[1, 0], rtol=0, atol=1e-5)


def test_the_end_of_a_text_pads_where_nothing_else_does(tmp_path: Path):
    save(tmp_path, "gemma", make_tokenizer(eos_token="</s>", unk_token="<unk>"))
    encoder = load_text_encoder(tmp_path, max_length=6)
    ids, mask = tokenize(encoder.tokenizer, ["a red circle", ""], 6)
    assert ids[0, 3:].tolist() == [1, 1, 1] and mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]


def test_padding_is_on_the_right_whatever_the_tokenizer_prefers(t5: Path):
    encoder = load_text_encoder(t5, max_length=8)
    expected = encoder(TEXTS[:2])
    encoder.tokenizer.padding_side = "left"
    found = encoder(TEXTS[:2])
    assert torch.equal(found.mask, expected.mask) and torch.equal(found.embeds, expected.embeds)


def test_a_text_that_is_too_long_is_cut_before_its_end_and_warned_of(t5: Path, caplog: pytest.LogCaptureFixture):
    encoder = load_text_encoder(t5, max_length=5)
    encoder(["a red circle"])
    assert not caplog.text
    ids, mask = tokenize(encoder.tokenizer, ["a", LONGEST], 5)
    assert "A text of 13 tokens was cut to 5" in caplog.text
    assert mask[1].tolist() == [1] * 5 and ids[1, 4] == encoder.tokenizer.eos_token_id
    assert torch.equal(ids[1, :4], tokenize(encoder.tokenizer, ["a red circle moves"], 8)[0][0, :4])


def test_lengths_are_those_that_tokenizer_and_model_take(t5: Path, tmp_path: Path):
    assert load_text_encoder(t5).max_length == 120  # neither says how many
    encoder = load_text_encoder(save(tmp_path, "clip text"))
    assert encoder.max_length == encoder.tokenizer.model_max_length == 24  # positions of the model
    assert encoder([40 * "red "]).embeds.shape == (1, 24, 16)
    for length in (0, 25):
        with pytest.raises(ValueError, match=f"`max_length` must be 1 to the tokenizer's 24, got {length}"):
            load_text_encoder(tmp_path, max_length=length)
        with pytest.raises(ValueError, match=f"`name` must be 1 to the tokenizer's 24, got {length}"):
            check_length("name", length, encoder.tokenizer)
    for length in (1.5, "x", True):
        with pytest.raises(ValueError, match=f"`name` must be an integer, got {length!r}"):
            check_length("name", length, encoder.tokenizer)  # type: ignore


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, t5: Path):
    embeds, mask = load_text_encoder(t5, dtype, max_length=16)(TEXTS)
    expected = load_text_encoder(t5, max_length=16)(TEXTS).embeds
    assert embeds.dtype == dtype and mask.dtype == torch.int64
    bound = 0.15 if dtype == torch.bfloat16 else 0.02  # measured: 0.026, 0.0035
    assert 0 < (embeds.float() - expected)[mask == 1].abs().max() < bound


def test_what_the_transformer_gets_hides_padding():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for dtype in (torch.float32, torch.bfloat16):
        arguments = text_arguments(TextEmbeddings(torch.ones(2, 3, 4, dtype=dtype), mask), num_latent_frames=2)
        bias = arguments["encoder_attention_mask"]
        assert bias.shape == (4, 1, 3) and bias.dtype == dtype
        assert (bias[:, 0] == 0).long().tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]
        assert bias.min() < -9000 and arguments["encoder_hidden_states"].shape == (2, 3, 4)


# --- Where encoders come from ----------------------------------------------------------------------------------------


def test_the_parts_of_a_pipeline_are_found(t5: Path, tmp_path: Path):
    encoder = load_text_encoder(t5, max_length=9)
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = load_text_encoder(tmp_path, max_length=9)
    assert torch.equal(found(TEXTS).embeds, encoder(TEXTS).embeds)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="`source` must be the folder or Hub id of a text encoder"):
        load_text_encoder(tmp_path)


def _bart(folder: Path) -> None:
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 32}
    transformers.BartConfig(**size).save_pretrained(folder)


def _two_towers(folder: Path) -> None:
    config = transformers.SiglipConfig(text_config=SIZE, vision_config=TOWER)
    transformers.SiglipModel(config).save_pretrained(folder)
    make_tokenizer(unk_token="<unk>").save_pretrained(folder)


def _autoencoder(folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKLLeanVAE", "latent_channels": 4}')


def _without_tokens(folder: Path) -> None:
    save(folder, "t5", make_tokenizer())


def _damaged(folder: Path) -> None:
    (save(folder, "t5") / "model.safetensors").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder.rmdir(), ""),
        (lambda folder: None, ""),
        (_autoencoder, ""),
        (_damaged, ""),
        (_bart, "a bart has no encoder of text that transformers loads by itself"),
        (_two_towers, "a SiglipModel gives no hidden states of texts"),
        (_without_tokens, "its tokenizer has no token to pad with"),
    ],
    ids=["no folder", "an empty folder", "an autoencoder", "damaged", "bart", "siglip", "no tokens to pad with"],
)
def test_what_is_no_text_encoder_is_refused_in_a_sentence(make: Callable[[Path], Any], reason: str, tmp_path: Path):
    folder = tmp_path / "source"
    folder.mkdir()
    make(folder)
    with pytest.raises(ValueError) as caught:
        load_text_encoder(folder)
    message = str(caught.value)
    assert message.startswith(
        f"`source` must be the folder or Hub id of a text encoder of transformers, got {str(folder)!r}: {reason}"
    )
    assert "\n" not in message and len(message) < 600


# --- One made from captions ------------------------------------------------------------------------------------------


def test_the_vocabulary_is_a_function_of_the_captions():
    """The more frequent word first, then by the alphabet: nothing comes from hashes or from the captions' order."""
    captions = ["A red circle, moving left.", "a blue square", "a red square moves up"]
    words = [
        "<pad>",
        "</s>",
        "<unk>",
        "a",
        "red",
        "square",
        ",",
        ".",
        "blue",
        "circle",
        "left",
        "moves",
        "moving",
        "up",
    ]
    for texts in (captions, captions[::-1]):
        found = make_text_encoder(texts, {"num_layers": 1, "d_model": 8}).tokenizer.get_vocab()
        assert sorted(found, key=lambda word: found[word]) == words


def test_an_encoder_of_captions(tmp_path: Path):
    with seeded(0):
        encoder = make_text_encoder(iter([LONGEST, "A big, red circle"]), {"d_model": 16, "num_layers": 1}, 12)
    assert encoder.max_length == encoder.tokenizer.model_max_length == 12 and encoder.width == 16
    assert type(encoder.model) is transformers.T5EncoderModel and encoder.model.config.dropout_rate == 0
    ids, mask = tokenize(encoder.tokenizer, ["RED, red zebra", ""], 6)
    end, unknown = encoder.tokenizer.eos_token_id, encoder.tokenizer.unk_token_id
    assert ids[0, 0] == ids[0, 2] != unknown and ids[0, 3:].tolist() == [unknown, end, encoder.tokenizer.pad_token_id]
    assert mask.sum(1).tolist() == [5, 1] and ids[1, 0] == end
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    loaded = load_text_encoder(tmp_path)
    assert loaded.max_length == 12
    assert torch.equal(loaded(TEXTS).embeds, encoder(TEXTS).embeds)


def test_gradients_reach_an_encoder_through_its_tokens(t5: Path):
    encoder = load_text_encoder(t5, max_length=8)
    hidden = encode_tokens(encoder.model, *tokenize(encoder.tokenizer, ["a red circle"], 8))
    hidden[:, :4].square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in encoder.model.parameters())


@pytest.mark.parametrize("kind", ["bert", "clip", "umt5", "qwen"])
def test_weights_that_hidden_states_do_not_need_are_frozen(kind: str, tmp_path: Path):
    encoder: TextEncoder = load_text_encoder(save(tmp_path, kind), max_length=8)
    freeze_unused(encoder.model)
    frozen = {name for name, weight in encoder.model.named_parameters() if not weight.requires_grad}
    assert frozen == ({"pooler.dense.weight", "pooler.dense.bias"} if kind == "bert" else set())
    assert all(weight.grad is None for weight in encoder.model.parameters())


@pytest.mark.parametrize("name", ["num_layer", "vocab_size"])
def test_a_new_encoder_knows_all_that_its_config_holds(name: str):
    with pytest.raises(ValueError, match=f"`config` must hold arguments of T5Config other than .* got '{name}'"):
        make_text_encoder(["a wave"], {"d_model": 8, name: 1})

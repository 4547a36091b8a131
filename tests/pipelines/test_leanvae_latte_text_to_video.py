"""The text-to-video pipeline: texts, embeddings, masks, errors; the rest it shares (see the tests beside this)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

from diffusers_leanvae.description import describe
from diffusers_leanvae.latents import normalize_latents


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_embeddings_of_prompts(text_case):
    pipeline = text_case.pipeline()
    embeds, mask, null, null_mask = pipeline.encode_prompt(["a squirrel", "a painting of a burger"])
    assert embeds.shape == null.shape == (2, 16, 16) and mask.shape == (2, 16)  # the tokenizer takes 16 tokens
    assert mask.sum(dim=1).tolist() == [3, 6] and null_mask.sum(dim=1).tolist() == [1, 1]
    embeds, _, null, null_mask = pipeline.encode_prompt("a squirrel", max_sequence_length=5, num_videos_per_prompt=3)
    assert embeds.shape == (3, 5, 16) and torch.equal(embeds[0], embeds[2])
    assert pipeline.encode_prompt("a squirrel", do_classifier_free_guidance=False)[2:] == (None, None)


def test_padding_does_not_matter(text_case):
    pipeline = text_case.pipeline()
    expected = text_case.run(pipeline, max_sequence_length=9)
    close(text_case.run(pipeline, max_sequence_length=16), expected, atol=1e-4)
    # And a mask is what makes it so.
    embeds, _, null, _ = pipeline.encode_prompt(text_case.inputs["prompt"], text_case.inputs["negative_prompt"])
    inputs = {"prompt": None, "negative_prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": null}
    assert (text_case.run(pipeline, **inputs) - expected).abs().max() > 1e-2


def test_negative_prompt(text_case):
    pipeline = text_case.pipeline()
    empty = text_case.run(pipeline, negative_prompt="")
    assert torch.equal(text_case.run(pipeline, negative_prompt=None), empty)
    assert (text_case.run(pipeline) - empty).abs().max() > 1e-3
    unguided = text_case.run(pipeline, guidance_scale=1.0)
    assert torch.equal(text_case.run(pipeline, guidance_scale=1.0, negative_prompt=""), unguided)


def test_guidance_ends_where_a_callback_says(text_case):
    pipeline = text_case.pipeline()
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    frames = text_case.run(pipeline, callback_on_step_end=callback)
    assert pipeline.guidance_scale == 0.0 and (frames - text_case.run(pipeline)).abs().max() > 1e-3


def test_a_long_text_is_cut_with_a_warning(text_case, caplog):
    pipeline = text_case.pipeline()
    pipeline.encode_prompt("very " * 30)
    assert "31 tokens was cut to 16" in caplog.text


def test_image_and_long_videos(text_case, make_video):
    pipeline = text_case.pipeline()
    image = make_video(1, 3, 32, 32) / 2 + 0.5
    latents = text_case.run(pipeline, image=image, num_frames=21, output_type="latent")
    assert latents.shape == (1, 4, 6, 4, 4) and pipeline.num_timesteps == 2 * 4
    expected = normalize_latents(pipeline.vae.encode(image * 2 - 1).latent_dist.mode(), pipeline.vae.config)
    close(latents[:, :, :1], expected, atol=1e-6)
    assert text_case.run(pipeline, num_frames=1).shape == (1, 1, 3, 32, 32)


EMBEDS = torch.zeros(1, 5, 16)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"prompt": None}, "Exactly one of `prompt` and `prompt_embeds` must be given, got neither"),
        ({"prompt_embeds": EMBEDS}, "Exactly one of `prompt` and `prompt_embeds` must be given, got both"),
        ({"negative_prompt_embeds": EMBEDS}, "`negative_prompt` must be None with `negative_prompt_embeds`"),
        ({"prompt": 3}, "`prompt` must be a text or a list of texts, got 3"),
        ({"prompt": []}, r"`prompt` must be a text or a list of texts, got \[\]"),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt` must be one text or 1, got 2"),
        ({"prompt": None, "prompt_embeds": EMBEDS[0]}, r"`prompt_embeds` must have shape \(batch_size, length, 16\)"),
        ({"prompt_attention_mask": EMBEDS[0]}, "`prompt_attention_mask` must be None without `prompt_embeds`"),
        (
            {
                "prompt": None,
                "negative_prompt": None,
                "prompt_embeds": EMBEDS,
                "negative_prompt_embeds": EMBEDS[:, 1:],
            },
            r"`negative_prompt_embeds` must have the shape of the prompt's, \(1, 5, 16\), got \(1, 4, 16\)",
        ),
        (
            {"negative_prompt": None, "negative_prompt_embeds": EMBEDS},
            r"shape of the prompt's, \(1, 16, 16\), got",
        ),
        (
            {"prompt": None, "prompt_embeds": EMBEDS.repeat(1, 4, 1)},
            "`negative_prompt_embeds` must be given, or `guidance_scale` be at most 1, for 20 tokens of .* at most 16",
        ),
        ({"max_sequence_length": 17}, "`max_sequence_length` must be 1 to the tokenizer's 16, got 17"),
        ({"max_sequence_length": 1.5}, "`max_sequence_length` must be an integer, got 1.5"),
        (
            {"prompt": None, "prompt_embeds": EMBEDS.tolist()},
            "`prompt_embeds` must be a tensor, got .* list",
        ),
        (
            {"prompt": None, "prompt_embeds": EMBEDS.numpy()},
            "`prompt_embeds` must be a tensor, got .* ndarray",
        ),
        ({"prompt": None, "prompt_embeds": EMBEDS[:0]}, r"`prompt_embeds` must have .*, got \(0, 5, 16\)"),
        ({"prompt": None, "prompt_embeds": EMBEDS[:, :0]}, r"`prompt_embeds` must have .*, got \(1, 0, 16\)"),
        ({"prompt": None, "prompt_embeds": EMBEDS / 0}, "`prompt_embeds` must be finite, got NaN or infinite"),
        (
            {"negative_prompt": None, "negative_prompt_embeds": EMBEDS / 0},
            "`negative_prompt_embeds` must be finite, got NaN or infinite",
        ),
        (
            {"prompt": None, "prompt_embeds": EMBEDS, "prompt_attention_mask": [[1] * 5]},
            "`prompt_attention_mask` must be a tensor, got a value of type list",
        ),
        ({"num_frames": 5}, "`num_frames` must be 9, more, or 1 for this transformer, .* got 5"),
        ({"callback_on_step_end_tensor_inputs": ["class_labels"]}, "must be among latents, prompt_embeds"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(text_case, inputs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        text_case.run(text_case.pipeline(), **inputs)


def test_a_callback_raises_guidance_only_where_there_is_a_null_half(text_case):
    def raise_guidance(pipeline, index, timestep, tensors):
        pipeline._guidance_scale = 3.0  # and returns nothing, which changes no tensor

    text_case.run(text_case.pipeline(), guidance_scale=2.0, callback_on_step_end=raise_guidance)
    with pytest.raises(ValueError, match="`guidance_scale` must be more than 1 from the start where a callback"):
        text_case.run(text_case.pipeline(), guidance_scale=1.0, callback_on_step_end=raise_guidance)


def test_texts_need_an_encoder(text_case):
    with pytest.raises(ValueError, match="`negative_prompt_embeds` must be given, .* and a pipeline without text enc"):
        pipeline = text_case.pipeline(tokenizer=None, text_encoder=None)
        text_case.run(pipeline, prompt=None, negative_prompt=None, prompt_embeds=EMBEDS)
    with pytest.raises(ValueError, match="`prompt_embeds` must be given to a pipeline without text encoder"):
        text_case.run(text_case.pipeline(tokenizer=None, text_encoder=None))


def test_a_description_counts_the_text_encoder(text_case, tmp_path: Path):
    pipeline = text_case.pipeline()
    pipeline.save_pretrained(tmp_path)
    parts = (pipeline.text_encoder, pipeline.transformer, pipeline.vae)
    described = describe(str(tmp_path))
    assert described is not None
    assert described["num_parameters"] == sum(weight.numel() for part in parts for weight in part.parameters())

"""The bundled text-to-video pipeline: what each of its inputs changes in what the videos show."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from white_adapter import train_white_adapter

from diffusers_leanvae.data.scenes import Scene, SceneObject, describe_scene, draw_scene
from diffusers_leanvae.evaluation.scenes_detector import detect_scene
from diffusers_leanvae.generation import load_pipeline
from diffusers_leanvae.generation.lora import save_lora
from diffusers_leanvae.text_encoders import TextEmbeddings
from diffusers_leanvae.trainer.denoising_validation import denoise


OBJECTS = "a red circle moves left above a blue square moving down"
GREEN, BLACK = f"{OBJECTS}, on a green background", f"{OBJECTS}, on a black background"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pytest.importorskip("transformers", reason="the bundled pipeline reads texts with transformers")
    pipeline = load_pipeline("mini-scenes", torch.device("cpu"), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, *prompts: str, seed: int = 0, **options: Any) -> torch.Tensor:
    """Videos `(num_videos, 3, num_frames, height, width)` in `[-1, 1]`, video `i` from the noise of `seed + i`."""
    count = len(prompts) or len(options["prompt_embeds"])
    generator = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    given = {"prompt": list(prompts)} if prompts else {}
    settings = {"num_inference_steps": 5, "guidance_scale": 2.0, "output_type": "pt"}
    return pipeline(**given, generator=generator, **settings | options).frames.transpose(1, 2) * 2 - 1


def backgrounds(videos: torch.Tensor) -> list[str | None]:
    return [detect_scene(video).background for video in videos]


def border(videos: torch.Tensor) -> torch.Tensor:
    """Mean red, green and blue of the outermost pixels, `(num_videos, 3)`: of the background."""
    sides = (videos[..., 0, :], videos[..., -1, :], videos[..., 0], videos[..., -1])
    return torch.cat(sides, dim=-1).mean((2, 3))


def greenness(videos: torch.Tensor) -> torch.Tensor:
    red, green, blue = border(videos).unbind(1)
    return green - (red + blue) / 2


def test_a_batch_holds_the_video_of_each_prompt(pipeline: Any):
    videos = generate(pipeline, GREEN, BLACK)
    assert backgrounds(videos) == ["green", "black"]
    torch.testing.assert_close(videos[1:], generate(pipeline, BLACK, seed=1), rtol=0, atol=5e-5)


def test_embeddings_are_another_way_to_give_a_prompt(pipeline: Any):
    embeds, mask, _, _ = pipeline.encode_prompt([GREEN, BLACK], do_classifier_free_guidance=False)
    videos = generate(pipeline, prompt_embeds=embeds, prompt_attention_mask=mask)
    assert backgrounds(videos) == ["green", "black"]
    torch.testing.assert_close(videos, generate(pipeline, GREEN, BLACK), rtol=0, atol=5e-5)


def test_guidance_strengthens_what_the_prompt_names(pipeline: Any):
    weak, strong = (greenness(generate(pipeline, *[GREEN] * 3, guidance_scale=scale)) for scale in (1.0, 4.0))
    assert (strong > weak + 0.03).all() and (strong < 0.6).all()


def test_a_negative_prompt_leads_away_from_what_it_says(pipeline: Any):
    prompts = [OBJECTS] * 3  # which say nothing of the background
    free = generate(pipeline, *prompts, seed=5)
    assert backgrounds(free) == ["black", "green", "green"]
    assert "green" not in backgrounds(generate(pipeline, *prompts, seed=5, negative_prompt=GREEN))
    bright = border(generate(pipeline, *prompts, seed=5, negative_prompt=BLACK)).mean(1)
    assert (bright > border(free).mean(1) + 0.1).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_given_image_is_the_first_frame_and_its_objects_stay(seed: int, pipeline: Any):
    triangle = SceneObject("triangle", "yellow", "large", "right", "fast")
    cross = SceneObject("cross", "white", "large", "up", "fast")
    scene = Scene(triangle, cross, "left of", "black")
    image = draw_scene(scene, 17, 128, 128, seed=seed)[:, 0]
    prompt = describe_scene(scene, np.random.default_rng(seed))
    video = generate(pipeline, prompt, image=image[None] / 2 + 0.5)[0]
    assert (video[:, 0] - image).abs().mean() < 0.04  # 0.031 and 0.034: what the autoencoder loses
    found = detect_scene(video)
    assert (found.relation, found.background) == ("left of", "black")
    assert found.first is not None and found.first[:3] == ("triangle", "yellow", "large")
    assert found.second is not None and found.second[:3] == ("cross", "white", "large")
    assert (video[:, -1] - video[:, 0]).abs().mean() > 0.05  # and they move


def test_a_long_video_goes_on_as_it_began(pipeline: Any):
    video = generate(pipeline, GREEN, num_frames=33)[0]
    assert video.shape == (3, 33, 128, 128)
    assert backgrounds(torch.stack([video[:, :17], video[:, 16:]])) == ["green", "green"]
    changes = (video[:, 1:] - video[:, :-1]).abs().mean((0, 2, 3))
    assert changes[16:].max() < 2 * changes[:16].max()  # no cut where the second window begins


def test_a_trained_adapter_changes_what_is_shown(pipeline: Any, tmp_path: Path):
    pytest.importorskip("peft", reason="LoRA needs peft")
    with torch.no_grad():
        embeds, mask, _, _ = pipeline.encode_prompt([GREEN], do_classifier_free_guidance=False)

    def brightness() -> float:
        return generate(pipeline, GREEN, guidance_scale=1.0)[0].mean().item()

    before = brightness()
    text = TextEmbeddings(embeds.expand(2, -1, -1), mask.expand(2, -1))
    layers = ["to_q", "to_v", "proj_out"]
    train_white_adapter(pipeline, lambda *noisy: denoise(pipeline.transformer, *noisy, text=text), layers, 2, 12)
    save_lora(pipeline.transformer, tmp_path)
    pipeline.unload_lora_weights()
    assert brightness() == before
    pipeline.load_lora_weights(tmp_path, adapter_name="white")
    bright = brightness()
    pipeline.set_adapters("white", 0.5)
    between = brightness()
    pipeline.unload_lora_weights()
    assert before + 0.1 < between < bright - 0.04 and bright > 0.5

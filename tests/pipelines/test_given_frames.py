"""Frames that are given to a pipeline: kept without noise where the model was trained so, and else noised along."""

from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from tiny import make_video

from diffusers_leanvae.generation.schedulers import add_noise, make_scheduler
from diffusers_leanvae.latents import normalize_latents


IMAGE = make_video(1, 3, 32, 32) / 2 + 0.5
# Besides those of `make_scheduler`: one that scales the model's input, and one of second order.
SCHEDULERS = {name: make_scheduler(name) for name in ("ddpm", "dpm++", "flow", "ddim")} | {
    "euler": diffusers.EulerDiscreteScheduler(),
    "heun": diffusers.HeunDiscreteScheduler(),
}


def sample(case: Any, scheduler: str, is_clean: bool, **inputs: Any) -> tuple[Any, list[Any], torch.Tensor]:
    """Generate, and return the pipeline, what its transformer saw and when, and the latents."""
    pipeline = case.pipeline(clean_given_frames=is_clean)
    pipeline.register_modules(scheduler=SCHEDULERS[scheduler])
    seen = []

    def record(module: Any, arguments: tuple, named: dict[str, Any]) -> None:
        seen.append((named["hidden_states"].clone(), named["timestep"][0].clone()))

    pipeline.transformer.register_forward_pre_hook(record, with_kwargs=True)
    settings = {"num_inference_steps": 3, "output_type": "latent", "image": IMAGE}
    return pipeline, seen, case.run(pipeline, **settings | inputs)


def first_latents(pipeline: Any) -> torch.Tensor:
    return normalize_latents(pipeline.vae.encode(IMAGE[:, :, None] * 2 - 1).latent_dist.mode(), pipeline.vae.config)


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=0, atol=atol)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_given_frames_stay_clean_at_every_step(scheduler: str, case):
    pipeline, seen, latents = sample(case, scheduler, is_clean=True)
    known = first_latents(pipeline)
    assert len(seen) == pipeline.num_timesteps >= 3
    for inputs, _ in seen:
        assert inputs.shape == (2, 4, 3, 4, 4)  # both halves of guidance
        close(inputs[:, :, :1], known)
    close(latents[:, :, :1], known)
    # The others are drawn: noise at first, and another at every step.
    assert all((one[0][:, :, 1:] - other[0][:, :, 1:]).abs().max() > 1e-3 for one, other in pairwise(seen))


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm++", "flow"])
def test_without_such_training_they_get_the_noise_of_each_step(scheduler: str, case):
    noise = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pipeline, seen, latents = sample(case, scheduler, is_clean=False, latents=noise)
    known = first_latents(pipeline)
    for inputs, timestep in seen:
        expected = add_noise(pipeline.scheduler, known, noise[:, :, :1], timestep)
        close(inputs[:, :, :1], expected)
        assert (inputs[:, :, :1] - known).abs().max() > 1e-3
    close(latents[:, :, :1], known)
    assert type(pipeline)(**pipeline.components).config["clean_given_frames"] is False  # the default


def test_without_given_frames_it_makes_no_difference(case):
    results = [sample(case, "flow", is_clean, image=None) for is_clean in (False, True)]
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("scheduler", ["ddpm", "flow", "euler"])
@pytest.mark.parametrize("image", [None, IMAGE], ids=["noise", "image"])
def test_windows_of_long_videos_go_on_from_clean_frames(image: Any, scheduler: str, case):
    options = {"image": image, "num_frames": 21, "reencode_overlap": False}
    pipeline, seen, latents = sample(case, scheduler, is_clean=True, **options)
    num_steps = len(seen) // 4  # windows 0-3, 1-4, 2-5 and 3-6 of latent frames, that overlap by 2
    assert latents.shape[2] == 6 and num_steps >= 3
    for step, (inputs, _) in enumerate(seen):
        window = step // num_steps
        num_known = 2 if window else 0 if image is None else 1
        close(inputs[:, :, :num_known], latents[:, :, window : window + num_known])
        new = inputs[:, :, num_known:] - latents[:, :, window + num_known : window + 3]
        assert new.abs().amax((0, 1, 3, 4)).min() > 1e-3


def test_windows_go_on_from_frames_that_are_encoded_again(case):
    pipeline, seen, latents = sample(case, "flow", is_clean=True, num_frames=13)
    num_steps = len(seen) // 2
    decoded = pipeline.decode_latents(latents[:, :, :3]).clamp(-1, 1)
    known = pipeline.encode_video(decoded[:, :, -5:])
    for inputs, _ in seen[num_steps:]:
        close(inputs[:, :, :2], known, atol=1e-4)
    assert (known - latents[:, :, 1:3]).abs().max() > 1e-3


def test_the_setting_is_saved_with_the_pipeline(case, tmp_path):
    case.pipeline("flow", clean_given_frames=True).save_pretrained(tmp_path)
    assert diffusers.DiffusionPipeline.from_pretrained(tmp_path).config["clean_given_frames"] is True

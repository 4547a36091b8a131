"""An adapter that is trained until the videos of a bundled generator are white."""

from collections.abc import Callable
from typing import Any

import torch
from tiny import seeded

from diffusers_leanvae.losses.diffusion import FlowMatchingObjective
from diffusers_leanvae.trainer.draws import draw_step


def train_white_adapter(
    pipeline: Any,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    target_modules: list[str],
    batch_size: int,
    num_steps: int,
) -> None:
    """Add an adapter to the transformer of a pipeline and train it.

    Args:
        pipeline: A pipeline whose transformer is trained by flow matching.
        predict: Calls the transformer with noisy latents and timesteps.
        target_modules: Layers that get an adapter.
        batch_size, num_steps: Videos of a step, and steps.
    """
    import peft

    transformer, objective = pipeline.transformer, FlowMatchingObjective()
    side = transformer.config.sample_size * pipeline.vae.spatial_compression_ratio
    with torch.no_grad():
        white = pipeline.encode_video(torch.full((1, 3, 17, side, side), 0.9)).expand(batch_size, -1, -1, -1, -1)
    with seeded(0):
        transformer.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=target_modules))
    trained = [weight for weight in transformer.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    for step in range(num_steps):
        draws = draw_step(range(batch_size * step, batch_size * (step + 1)), white.shape[1:], seed=0)
        timesteps = objective.timesteps(draws.uniform)
        output = predict(objective.add_noise(white, draws.noise, timesteps), timesteps)
        sum(term.mean() for term in objective.loss(output, white, draws.noise, timesteps).values()).backward()
        optimizer.step()
        optimizer.zero_grad()

"""The measure of how easy latents are for diffusion, on a tiny protocol."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from diffusers_leanvae import bundled
from diffusers_leanvae.evaluation.diffusability import (
    DiffusabilityProtocol,
    LatentDenoiser,
    load_clips,
    measure_diffusability,
)


TINY = DiffusabilityProtocol(
    num_steps=40, batch_size=8, width=32, num_layers=1, noise_levels=(0.02, 0.5), num_decoded_clips=2
)


class BlockMeans:
    """Latents as simple as can be: mean colors of blocks; or as hard, with the sign of each up to chance."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, scale: float = 1.0, chaotic: bool = False):
        self.scale, self.chaotic = scale, chaotic

    def encode(self, sample, return_dict):
        latents = F.avg_pool3d(sample, (1, 4, 4)) * self.scale
        if self.chaotic:
            latents = latents * torch.randn_like(latents).sign()
        self.latents = latents
        return (self,)

    def mode(self):
        return self.latents

    def decode(self, latents, return_dict):
        return (F.interpolate(latents / self.scale, scale_factor=(1.0, 4.0, 4.0)),)


def gradients(num_clips: int, seed: int) -> torch.Tensor:
    """Clips of one frame, each a color gradient of its own."""
    ends = torch.rand(num_clips, 3, 2, 1, 1, generator=torch.Generator().manual_seed(seed)) * 255
    ramp = torch.linspace(0, 1, 32)
    return torch.lerp(ends[:, :, 0], ends[:, :, 1], ramp.expand(32, 32))[:, :, None].byte()


def test_orderly_latents_are_easier():
    torch.manual_seed(0)
    train, held_out = gradients(64, seed=0), gradients(16, seed=1)
    protocol = replace(TINY, num_steps=80, learning_rate=3e-3)
    easy = measure_diffusability(BlockMeans(), train, held_out, protocol)
    hard = measure_diffusability(BlockMeans(chaotic=True), train, held_out, protocol)
    assert easy["latent_shape"] == hard["latent_shape"] == [3, 1, 8, 8]
    assert easy["levels"][1]["denoising_loss"] < 0.8 * hard["levels"][1]["denoising_loss"]
    assert easy["levels"][1]["psnr_frame_mean_rgb"] > hard["levels"][1]["psnr_frame_mean_rgb"]
    assert hard["levels"][1]["denoising_loss"] == pytest.approx(1, abs=0.013)  # nothing to find; measured: 0.003


def test_without_noise_predictions_are_reconstructions(make_model):
    clips = gradients(8, seed=0)
    protocol = replace(TINY, num_steps=1, noise_levels=(1e-5,))
    model = make_model()
    result = measure_diffusability(model, clips, clips, protocol)
    assert result["reconstruction_psnr_frame_mean_rgb"] == pytest.approx(
        result["levels"][0]["psnr_frame_mean_rgb"], abs=0.01
    )


def test_the_measure_is_repeatable_and_ignores_scale():
    train, held_out = gradients(16, seed=0), gradients(8, seed=1)
    result = measure_diffusability(BlockMeans(), train, held_out, TINY)
    torch.manual_seed(1234)  # of no consequence
    assert measure_diffusability(BlockMeans(), train, held_out, TINY) == result
    scaled = measure_diffusability(BlockMeans(scale=8.0), train, held_out, TINY)
    assert scaled["denoising_loss"] == pytest.approx(result["denoising_loss"], abs=1e-4)
    other = measure_diffusability(BlockMeans(), train, held_out, replace(TINY, seed=1))
    assert other["denoising_loss"] != result["denoising_loss"]


@pytest.mark.parametrize("shape, num_tokens", [((4, 3, 4, 6), 18), ((4, 3, 3, 4), 36)])
def test_denoiser_keeps_the_shape_of_latents(shape, num_tokens: int):
    torch.manual_seed(0)
    denoiser = LatentDenoiser(shape, 16, 1)
    assert denoiser.position.shape == (num_tokens, 16)
    latents = torch.randn(2, *shape)
    white = denoiser(latents, torch.tensor([0.0, 0.75]))  # untrained: the best linear one
    torch.testing.assert_close(white[0], -latents[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(white[1], 0.8 * latents[1], rtol=0, atol=1e-5)
    torch.nn.init.normal_(denoiser.project.weight)
    velocity = denoiser(latents, torch.tensor([0.1, 0.9]))
    assert velocity.shape == latents.shape
    assert not torch.equal(velocity, denoiser(latents, torch.tensor([0.2, 0.9])))


def test_protocol_has_about_a_million_parameters():
    protocol = DiffusabilityProtocol()
    denoiser = LatentDenoiser((16, 5, 8, 8), protocol.width, protocol.num_layers)
    assert 0.8e6 < sum(parameter.numel() for parameter in denoiser.parameters()) < 1.2e6


def test_clips_follow_from_the_seed():
    folder = bundled.clip_path().parent
    clips = load_clips(folder, 3, (5, 32, 32))
    assert clips.shape == (3, 3, 5, 32, 32) and clips.dtype == torch.uint8
    assert torch.equal(clips, load_clips(folder, 3, (5, 32, 32)))
    assert not torch.equal(clips, load_clips(folder, 3, (5, 32, 32), seed=1))


def test_too_few_clips_are_refused():
    clips = gradients(8, seed=0)
    with pytest.raises(ValueError, match="`train_clips` must be at least 8 clips, got 4."):
        measure_diffusability(BlockMeans(), clips[:4], clips, TINY)
    with pytest.raises(ValueError, match="`held_out_clips` must be at least the 2 that are decoded, got 1."):
        measure_diffusability(BlockMeans(), clips, clips[:1], TINY)

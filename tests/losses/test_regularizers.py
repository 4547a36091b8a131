"""Regularisers: transformations that agree on latents and videos, and terms that measure what they say."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusers_leanvae.losses.regularizers import (
    Transform,
    draw_mask_ratio,
    equivariance_transform,
    latent_consistency,
    local_correlation,
    low_pass_consistency,
    mask_latents,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, 5])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block_latents(sample: torch.Tensor) -> torch.Tensor:
    """A perfectly equivariant encoder: the mean color of each 4x8x8 block of pixels, the first frame by itself."""
    image, video = sample.tensor_split((1,), dim=2)
    parts = [F.avg_pool3d(image, (1, 8, 8))] + ([F.avg_pool3d(video, (4, 8, 8))] if video.shape[2] else [])
    return torch.cat(parts, dim=2)


# ---- equivariance ----


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 4, 6), (4, 5, 8), (5, 8, 8)])
def test_every_transformed_pair_is_legal(make_model, make_video, shape: tuple[int, int, int]):
    t, h, w = shape
    model, sample = make_model(), make_video(1, 3, 4 * t - 3, 8 * h, 8 * w)
    latents = randn(1, 4, t, h, w)
    for seed in range(12):
        transform = equivariance_transform(rng(seed), latents.shape)
        moved, target = transform.apply_to_latents(latents), transform.apply_to_sample(sample)
        assert model.decode(moved).sample.shape == target.shape
        assert max(moved.shape[3:]) <= max(h, w) and target.abs().max() <= 1


@pytest.mark.parametrize("num_latent_frames", [1, 4, 5])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 3])
def test_latents_and_videos_are_moved_alike(make_video, num_latent_frames: int, flip: bool, turns: int):
    sample = make_video(2, 3, 4 * num_latent_frames - 3, 32, 48)
    latents = block_latents(sample)
    transform = Transform((num_latent_frames, 4, 6), num_latent_frames > 2, (4, 6), flip, turns)
    expected = block_latents(transform.apply_to_sample(sample))
    torch.testing.assert_close(transform.apply_to_latents(latents), expected, rtol=0, atol=1e-6)
    assert expected.shape[3:] == ((6, 4) if turns % 2 else (4, 6))


def test_time_is_halved_by_averaging_groups_of_frames(make_video):
    sample = make_video(1, 3, 17, 8, 8)
    halved = Transform((5, 1, 1), True, (1, 1), False, 0).apply_to_sample(sample)
    assert halved.shape[2] == 9
    assert torch.equal(halved[:, :, 0], sample[:, :, 0])
    torch.testing.assert_close(halved[:, :, 1], (sample[:, :, 1] + sample[:, :, 2]) / 2, rtol=0, atol=1e-6)
    torch.testing.assert_close(halved[:, :, 8], (sample[:, :, 15] + sample[:, :, 16]) / 2, rtol=0, atol=1e-6)


def test_scaling_a_smooth_video_scales_its_latents():
    x = torch.linspace(-1, 1, 64)
    sample = (x[:, None] * 0.5 + x * 0.4).expand(1, 3, 5, 64, 64)
    transform = Transform((2, 8, 8), False, (4, 4), False, 0)
    scaled = transform.apply_to_sample(sample)
    assert scaled.shape == (1, 3, 5, 32, 32)
    latents, expected = transform.apply_to_latents(block_latents(sample)), block_latents(scaled)
    inner = (..., slice(1, -1), slice(1, -1))  # at the edges both repeat what is there
    torch.testing.assert_close(latents[inner], expected[inner], rtol=0, atol=1e-5)


def test_draws_follow_the_generator():
    draws = [equivariance_transform(rng(seed), (5, 8, 8)) for seed in range(64)]
    assert draws == [equivariance_transform(rng(seed), (5, 8, 8)) for seed in range(64)]
    assert {draw.quarter_turns for draw in draws} == {0, 1, 2, 3}
    assert {draw.halve_time for draw in draws} == {draw.flip for draw in draws} == {False, True}
    assert {draw.size[0] for draw in draws} == set(range(2, 9))
    assert not any(equivariance_transform(rng(seed), (5, 8, 8), temporal=False).halve_time for seed in range(64))


def test_transforms_refuse_what_they_were_not_drawn_for(make_video):
    transform = equivariance_transform(rng(), (2, 4, 4))
    with pytest.raises(ValueError, match="`latents` must end in the sizes"):
        transform.apply_to_latents(randn(1, 4, 3, 4, 4))
    with pytest.raises(ValueError, match="`sample` must be a whole multiple"):
        transform.apply_to_sample(make_video(1, 3, 5, 36, 32)[..., :33])
    with pytest.raises(ValueError, match="`min_scale` must be above 0"):
        equivariance_transform(rng(), (2, 4, 4), min_scale=0.0)


# ---- local correlation ----


def test_local_correlation_is_the_mean_over_pairs():
    latents = randn(1, 6, 3, 2, 2)
    positions = latents[0, :, 1:].flatten(1).t()  # the 8 positions of the only window of the video part
    video = np.corrcoef(positions.numpy())
    image = np.corrcoef(latents[0, :, 0].flatten(1).t().numpy())
    means = [c[np.triu_indices(len(c), k=1)].mean() for c in (image, video)]
    loss = local_correlation(latents, threshold=1.0)
    torch.testing.assert_close(loss, torch.tensor(1.0 - np.mean(means)).float(), rtol=0, atol=1e-5)


def test_local_correlation_orders_latents_by_smoothness():
    noise = randn(2, 16, 5, 8, 8)
    smooth = F.avg_pool3d(noise, 3, stride=1, padding=1)
    constant = noise[:, :, :1, :1, :1].expand(-1, -1, 5, 8, 8)
    losses = [local_correlation(x).item() for x in (noise, smooth, constant)]
    assert losses[0] == pytest.approx(0.75, abs=0.03) and losses[0] > losses[1] + 0.2
    assert losses[2] == 0.0


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 1), (2, 1, 1), (4, 5, 3)])
def test_local_correlation_takes_any_size(shape: tuple[int, int, int]):
    latents = randn(2, 4, *shape).requires_grad_()
    loss = local_correlation(latents, threshold=2.0)
    loss.backward()
    assert latents.grad is not None and latents.grad.isfinite().all()
    assert (latents.grad.abs().sum() > 0) == (shape not in [(1, 1, 1), (2, 1, 1)])


def test_local_correlation_of_a_batch_is_the_mean_of_its_clips():
    latents = torch.cat((randn(1, 8, 3, 4, 4), randn(1, 8, 1, 1, 1).expand(1, 8, 3, 4, 4)))
    separate = torch.stack([local_correlation(clip[None]) for clip in latents])
    torch.testing.assert_close(local_correlation(latents), separate.mean(), rtol=0, atol=1e-6)


def test_local_correlation_needs_channels():
    with pytest.raises(ValueError, match="`latents` must have shape"):
        local_correlation(randn(1, 1, 2, 4, 4))


# ---- masking ----


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.75])
def test_masking_hides_whole_tokens(ratio: float):
    latents = randn(2, 4, 5, 8, 8) + 10
    masked = mask_latents(latents, ratio, rng())
    hidden = masked == 0
    assert torch.equal(hidden, hidden[:1, :1].expand_as(hidden))
    assert hidden[0, 0].sum() == 320 * ratio
    assert torch.equal(masked[~hidden], latents[~hidden])
    assert torch.equal(masked, mask_latents(latents, ratio, rng()))
    assert torch.equal(masked[:1], mask_latents(latents[:1], ratio, rng()))


def test_masking_refuses_to_hide_everything():
    with pytest.raises(ValueError, match="`ratio` must be at least 0 and below 1, got 1.0."):
        mask_latents(randn(1, 4, 2, 4, 4), 1.0, rng())


def test_mask_ratios_follow_their_probabilities():
    generator = rng()
    ratios = [draw_mask_ratio(generator) for _ in range(2000)]
    shares = [np.mean(np.equal(ratios, ratio)) for ratio in (0.0, 0.25, 0.5, 0.75)]
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.1, 0.1], rtol=0, atol=0.03)


# ---- consistency ----


class BlockEncoder:
    """As much of a model as the terms of consistency need, with latents by a function of the video."""

    def __init__(self, encode):
        self.function = encode

    def encode(self, sample, return_dict):
        self.latents = self.function(sample)
        return (self,)

    def mode(self):
        return self.latents


def test_latent_consistency_is_the_relative_error_of_the_latents(make_video):
    sample, reconstruction = make_video(2, 3, 9, 32, 32), make_video(2, 3, 9, 32, 32, seed=5)
    latents, again = (block_latents(video).numpy() for video in (sample, reconstruction))
    errors = [np.square(b - a).sum() / np.square(a).sum() for a, b in zip(latents, again, strict=True)]
    assert abs(errors[0] - errors[1]) > 0.01
    for scale in (1.0, 0.25):
        encoder = BlockEncoder(lambda video, scale=scale: scale * block_latents(video))
        mean = scale * block_latents(sample)
        loss = latent_consistency(encoder, reconstruction, mean)
        torch.testing.assert_close(loss.item(), float(np.mean(errors)), rtol=1e-6, atol=0)  # measured: 0
        assert latent_consistency(encoder, sample, mean) == 0


def test_latent_consistency_has_a_target_without_a_gradient(make_model, make_video):
    model, sample = make_model(), make_video(1, 3, 5, 32, 32)
    mean = model.encode(sample).latent_dist.mode().detach().requires_grad_()
    reconstruction = model.decode(model.encode(sample).latent_dist.mode().detach()).sample
    latent_consistency(model, reconstruction, mean).backward()
    assert mean.grad is None
    for part in (model.encoder, model.decoder):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
    assert max(p.grad.abs().max() for p in model.decoder.parameters()) > 1e-4


@pytest.mark.parametrize(
    ("num_frames", "height", "width"), [(1, 32, 32), (5, 32, 32), (17, 32, 32), (5, 40, 32), (17, 24, 40)]
)
def test_low_pass_consistency_is_zero_for_block_means(make_video, num_frames: int, height: int, width: int):
    sample = make_video(2, 3, num_frames, height, width)
    loss = low_pass_consistency(BlockEncoder(block_latents), sample, block_latents(sample))
    # 4 * n frames become 2 * n, which are groups of four for an even n only: for an odd n time stays.
    torch.testing.assert_close(loss, torch.tensor(0.0), rtol=0, atol=1e-6)


def test_low_pass_consistency_ignores_scale(make_model, make_video):
    model, sample = make_model(), make_video(2, 3, 9, 32, 32)
    latents = model.encode(sample).latent_dist.mode()
    loss = low_pass_consistency(model, sample, latents)
    shrunk = BlockEncoder(lambda x: model.encode(x).latent_dist.mode() / 4)
    torch.testing.assert_close(low_pass_consistency(shrunk, sample, latents / 4), loss, rtol=0, atol=1e-5)
    assert 0.01 < loss.item() <= 2.0
    loss.backward()
    assert all(p.grad is not None for name, p in model.encoder.named_parameters())


def test_low_pass_consistency_of_a_batch_is_the_mean_of_its_clips(make_model, make_video):
    model, sample = make_model(), make_video(2, 3, 5, 32, 32)
    sample[1] *= 0.1
    latents = model.encode(sample).latent_dist.mode()
    separate = [low_pass_consistency(model, x[None], z[None]) for x, z in zip(sample, latents, strict=True)]
    whole = low_pass_consistency(model, sample, latents)
    torch.testing.assert_close(whole, torch.stack(separate).mean(), rtol=0, atol=1e-6)


def test_low_pass_consistency_takes_odd_sides_and_refuses_single_latents(make_model, make_video):
    model, sample = make_model(), make_video(1, 3, 5, 40, 24)
    loss = low_pass_consistency(model, sample, model.encode(sample).latent_dist.mode())
    assert 0.01 < loss.item() <= 2.0
    with pytest.raises(ValueError, match="`latents` must have a height and width of at least 2, got 1 and 4."):
        low_pass_consistency(model, make_video(1, 3, 5, 8, 32), randn(1, 4, 2, 1, 4))

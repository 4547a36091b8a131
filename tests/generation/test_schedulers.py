"""Schedulers, step lists and guidance against their formulas; the goldens are in tests/models/test_latte_golden.py."""

from typing import Any

import numpy as np
import pytest
import torch

from diffusers_leanvae.generation.schedulers import guide_noise, make_scheduler, respaced_timesteps


class TestRespacing:
    @pytest.mark.parametrize(
        "num_steps, first, last",
        # The reference's own lists of steps.
        [(5, [999, 749, 500], [500, 250, 0]), (250, [999, 995, 991, 987], [20, 16, 12, 8, 4, 0]), (1, [0], [0])],
    )
    def test_examples(self, num_steps: int, first: list[int], last: list[int]):
        steps = respaced_timesteps(num_steps)
        assert len(steps) == num_steps
        assert steps[: len(first)] == first and steps[-len(last) :] == last

    def test_properties(self):
        differs = []
        for num_steps in range(1, 1001):
            steps = respaced_timesteps(num_steps)
            assert len(steps) == num_steps and steps[-1] == 0
            assert all(a > b for a, b in zip(steps, steps[1:], strict=False))
            assert num_steps == 1 or steps[0] == 999
            rounded = np.round(np.linspace(0, 999, num_steps)).astype(int)[::-1]
            if steps != rounded.tolist():
                differs.append(num_steps)
                assert np.abs(np.array(steps) - rounded).max() == 1
        assert len(differs) == 278 and {21, 23, 31, 35, 43, 91} <= set(differs)  # rounding errors add up

    def test_other_numbers_of_training_steps(self):
        assert respaced_timesteps(3, num_train_timesteps=101) == [100, 50, 0]

    @pytest.mark.parametrize("num_steps", [0, -1, 1001])
    def test_errors(self, num_steps: int):
        with pytest.raises(ValueError, match=rf"`num_steps` must be between 1 and 1000, got {num_steps}\."):
            respaced_timesteps(num_steps)

    def test_no_integer(self):
        with pytest.raises(ValueError, match=r"`num_steps` must be an integer, got 1\.5\."):
            respaced_timesteps(1.5)  # type: ignore


class TestSchedulers:
    @pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++"])
    def test_tables(self, name: str):
        scheduler: Any = make_scheduler(name)
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        expected = torch.cumprod(1 - betas, dim=0).float()
        torch.testing.assert_close(scheduler.alphas_cumprod, expected, rtol=3e-5, atol=0)

    @pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++"])
    def test_takes_the_steps_of_the_reference(self, name: str):
        scheduler: Any = make_scheduler(name)
        scheduler.set_timesteps(timesteps=respaced_timesteps(21))
        assert scheduler.timesteps.tolist() == respaced_timesteps(21)

    @pytest.mark.parametrize("num_steps", [2, 7, 21])
    def test_ddim(self, num_steps: int):
        scheduler: Any = make_scheduler("ddim")
        scheduler.set_timesteps(timesteps=respaced_timesteps(num_steps))
        alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
        generator = torch.Generator().manual_seed(0)
        latents = expected = torch.randn(1, 4, 3, 4, 4, generator=generator)
        steps = respaced_timesteps(num_steps)
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            noise = torch.randn(latents.shape, generator=generator)
            latents = scheduler.step(noise, step, latents).prev_sample
            alpha, target = alphas[step], 1.0 if following is None else alphas[following]
            clean = (expected - (1 - alpha) ** 0.5 * noise) / alpha**0.5
            expected = target**0.5 * clean + (1 - target) ** 0.5 * noise
        torch.testing.assert_close(latents, expected.float(), rtol=0, atol=1e-4 * expected.abs().max().item())

    @pytest.mark.parametrize("name, num_steps, atol", [("ddim", 50, 0.05), ("dpm++", 10, 0.05), ("flow", 50, 1e-4)])
    def test_finds_the_data_with_the_ideal_model(self, name: str, num_steps: int, atol: float):
        # All data is one point: its ideal model is known, and every sampler must end there.
        scheduler: Any = make_scheduler(name)
        target = torch.tensor([0.7, -0.2]).view(1, 2, 1, 1, 1)
        sample = torch.randn(16, 2, 1, 1, 1, generator=torch.Generator().manual_seed(0))
        if name == "flow":
            scheduler.set_timesteps(num_steps)
        else:
            scheduler.set_timesteps(timesteps=respaced_timesteps(num_steps))
        for t in scheduler.timesteps:
            if name == "flow":
                level = t / 1000
                output = (sample - target) / level  # noise - data
            else:
                alpha = scheduler.alphas_cumprod[int(t)]
                output = (sample - alpha**0.5 * target) / (1 - alpha) ** 0.5
            sample = scheduler.step(output, t, sample).prev_sample
        torch.testing.assert_close(sample, target.expand_as(sample), rtol=0, atol=atol)

    def test_ddpm_wants_the_variance(self):
        scheduler: Any = make_scheduler("ddpm")
        assert scheduler.config.variance_type == "learned_range"
        scheduler.set_timesteps(timesteps=respaced_timesteps(5))
        output, latents = torch.randn(1, 8, 3, 4, 4), torch.randn(1, 4, 3, 4, 4)
        assert scheduler.step(output, 749, latents).prev_sample.shape == latents.shape

    def test_flow(self):
        scheduler: Any = make_scheduler("flow")
        scheduler.set_timesteps(4)
        assert (scheduler.config.num_train_timesteps, scheduler.config.shift) == (1000, 1.0)
        torch.testing.assert_close(scheduler.timesteps, scheduler.sigmas[:-1] * 1000, rtol=0, atol=1e-3)
        assert scheduler.sigmas[0] == 1 and scheduler.sigmas[-1] == 0

    def test_unknown_name(self):
        with pytest.raises(
            ValueError, match=r"`name` must be one of 'ddpm', 'ddim', 'dpm\+\+', 'flow', got 'euler'\."
        ):
            make_scheduler("euler")


class TestGuidance:
    @pytest.fixture
    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        conditional, unconditional = torch.randn(2, 3, 32, 5, 4, 4, generator=generator)
        return conditional, unconditional

    @pytest.mark.parametrize("num_guided_channels", [None, 1, 4, 16])
    def test_formula(self, outputs: tuple[torch.Tensor, torch.Tensor], num_guided_channels: int | None):
        conditional, unconditional = outputs
        guided, n = guide_noise(*outputs, 7.0, 16, num_guided_channels), num_guided_channels or 16
        expected = 7 * conditional[:, :n] - 6 * unconditional[:, :n]
        torch.testing.assert_close(guided[:, :n], expected, rtol=0, atol=1e-5)
        assert torch.equal(guided[:, n:], conditional[:, n:])  # the variance always among them

    def test_scales(self, outputs: tuple[torch.Tensor, torch.Tensor]):
        torch.testing.assert_close(guide_noise(*outputs, 1.0, 16), outputs[0], rtol=0, atol=1e-6)
        assert torch.equal(guide_noise(*outputs, 0.0, 16)[:, :16], outputs[1][:, :16])

    def test_without_variance(self, outputs: tuple[torch.Tensor, torch.Tensor]):
        conditional, unconditional = (x[:, :16] for x in outputs)
        guided = guide_noise(conditional, unconditional, 3.0, 16)
        assert torch.equal(guided, guide_noise(*outputs, 3.0, 16)[:, :16])

    @pytest.mark.parametrize("num_guided_channels", [0, 17, -1])
    def test_errors(self, outputs: tuple[torch.Tensor, torch.Tensor], num_guided_channels: int):
        with pytest.raises(
            ValueError, match=rf"`num_guided_channels` must be between 1 and 16, got {num_guided_channels}\."
        ):
            guide_noise(*outputs, 7.0, 16, num_guided_channels)

    @pytest.mark.parametrize("num_guided_channels", [1.5, True, "4"])
    def test_no_integers(self, outputs: tuple[torch.Tensor, torch.Tensor], num_guided_channels: Any):
        with pytest.raises(ValueError, match=f"`num_guided_channels` must be an integer, got {num_guided_channels!r}"):
            guide_noise(*outputs, 7.0, 16, num_guided_channels)

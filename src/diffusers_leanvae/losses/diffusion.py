"""Training objectives of latent diffusion: pure functions of tensors; everything random is an argument.

    timesteps = objective.timesteps(uniform)                    # (B,)
    noisy = objective.add_noise(latents, noise, timesteps)      # the model's input
    terms = objective.loss(model(noisy, timesteps), latents, noise, timesteps)
    terms["loss"].mean().backward()

Latents are normalised (`latents.normalize_latents`) and have the shape `(batch_size, channels, ...)`; every term is
one float32 number per sample.
"""

import math
from typing import Literal

import torch

from ..checks import check_choice


TimestepSampling = Literal["uniform", "logit_normal"]

_LN2 = math.log(2.0)
_BIN = 1.0 / 255.0  # half the width of a bin of the likelihood at the first timestep: that of 256 levels in [-1, 1]


class EpsilonObjective:
    """The objective of Latte (arXiv 2401.03048): noise prediction with a learned variance (arXiv 2102.09672).

    The model predicts `2 * channels` channels: the noise, then a value `v` that interpolates the logarithm of the
    variance of a reverse step between its bounds. `loss` is `mse + vb`: the squared error of the noise, and the
    variational bound in bits per element, whose gradient reaches `v` alone.

    Args:
        min_snr_gamma: Weight `mse` by `min(snr, gamma) / snr` (arXiv 2303.09556; 5.0 there); `None` for no weight.
        sampling: `"uniform"`, or `"logit_normal"`: more timesteps from the middle (arXiv 2403.03206).
        num_train_timesteps: Length of the linear noise schedule. All three defaults are those of the reference.
        beta_start: Its first variance.
        beta_end: Its last variance.
    """

    def __init__(
        self,
        min_snr_gamma: float | None = None,
        sampling: TimestepSampling = "uniform",
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
    ) -> None:
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise ValueError(f"`min_snr_gamma` must be positive or None, got {min_snr_gamma}.")
        _check_sampling(sampling)
        self.min_snr_gamma, self.sampling, self.num_train_timesteps = min_snr_gamma, sampling, num_train_timesteps
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        signal = (1.0 - betas).cumprod(0)
        before = torch.cat((signal.new_ones(1), signal[:-1]))
        # At the first step the variance of the posterior is 0: its logarithm is that of the second step.
        variance = betas * (1.0 - before) / (1.0 - signal)
        min_log_variance = torch.cat((variance[1:2], variance[1:])).log()
        # Float64 until here, as in the reference: single precision loses digits in 1 - signal. One tensor, so that
        # a batch's coefficients are gathered at once.
        rows = (
            signal.sqrt(),
            (1.0 - signal).sqrt(),
            (1.0 / signal).sqrt(),
            (1.0 / signal - 1.0).sqrt(),
            before.sqrt() * betas / (1.0 - signal),
            (1.0 - betas).sqrt() * (1.0 - before) / (1.0 - signal),
            min_log_variance,
            betas.log(),
            signal / (1.0 - signal),
        )
        self._table = torch.stack(rows).float()

    def timesteps(self, uniform: torch.Tensor) -> torch.Tensor:
        """Timesteps `(B,)` as int64 in `0 .. num_train_timesteps - 1`, from numbers `(B,)` in `[0, 1)`."""
        return self.timesteps_at(_noise_levels(uniform, self.sampling))

    def timesteps_at(self, levels: torch.Tensor) -> torch.Tensor:
        """Timesteps at shares `(B,)` in `[0, 1]` of the schedule, or the nearest of it."""
        return (levels * self.num_train_timesteps).long().clamp(0, self.num_train_timesteps - 1)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy latents at `timesteps` `(B,)`; `noise` is standard normal, shaped like `latents`."""
        scale, noise_scale = self._coefficients(timesteps, latents.ndim)[:2]
        return scale * latents + noise_scale * noise

    def model_distribution(
        self, model_output: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute mean and log-variance of the predicted reverse step, and the latents it predicts, unclipped.

        Args:
            model_output: `(B, 2 * channels, ...)`.
            noisy: The model's input, `(B, channels, ...)`.
            timesteps: `(B,)`.
        """
        if model_output.shape[1] != 2 * noisy.shape[1]:
            raise ValueError(
                f"`model_output` must have {2 * noisy.shape[1]} channels, noise and variance, got "
                f"{model_output.shape[1]}."
            )
        epsilon, value = model_output.float().chunk(2, dim=1)
        table = self._coefficients(timesteps, noisy.ndim)
        predicted = table[2] * noisy - table[3] * epsilon
        mean = table[4] * predicted + table[5] * noisy
        fraction = (value + 1.0) / 2.0
        return mean, fraction * table[7] + (1.0 - fraction) * table[6], predicted

    def loss(
        self,
        model_output: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        weight: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute `loss`, `mse` and `vb` per sample.

        Args:
            model_output: The model's output for `add_noise(latents, noise, timesteps)`, `(B, 2 * channels, ...)`.
            latents: `(B, channels, ...)`.
            noise: Shaped like `latents`.
            timesteps: `(B,)`.
            weight: What counts how much, of a shape that broadcasts to that of the latents; all the same if `None`.
        """
        latents, noise, model_output = latents.float(), noise.float(), model_output.float()
        noisy = self.add_noise(latents, noise, timesteps)
        epsilon, value = model_output.chunk(2, dim=1)
        fixed = torch.cat((epsilon.detach(), value), dim=1)  # the bound must not move the prediction
        mean, log_variance, _ = self.model_distribution(fixed, noisy, timesteps)
        table = self._coefficients(timesteps, latents.ndim)
        true_mean, true_log_variance = table[4] * latents + table[5] * noisy, table[6]
        divergence = 0.5 * (
            log_variance
            - true_log_variance
            - 1.0
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean).square() * torch.exp(-log_variance)
        )
        likelihood = _log_likelihood(latents, mean, log_variance)
        bits = [_sample_mean(term, weight) / _LN2 for term in (divergence, -likelihood)]
        mse, vb = _sample_mean((noise - epsilon).square(), weight), torch.where(timesteps == 0, bits[1], bits[0])
        factor = 1.0
        if self.min_snr_gamma is not None:
            snr = table[8].flatten()
            factor = snr.clamp(max=self.min_snr_gamma) / snr
        return {"loss": factor * mse + vb, "mse": mse, "vb": vb}

    def _coefficients(self, timesteps: torch.Tensor, ndim: int) -> torch.Tensor:
        return self._table.to(timesteps.device)[:, timesteps].view(-1, len(timesteps), *[1] * (ndim - 1))


class FlowMatchingObjective:
    """Flow matching on straight lines (arXiv 2209.03003, 2210.02747), as `FlowMatchEulerDiscreteScheduler` samples.

    Noisy latents are `(1 - level) * latents + level * noise`, the model predicts `noise - latents`, and a timestep is
    `num_train_timesteps * level`.

    Args:
        sampling: `"uniform"`, or `"logit_normal"`: more levels from the middle, where the input says least about
            the prediction (arXiv 2403.03206).
        num_train_timesteps: Of the scheduler.
        shift: Above 1 towards more noise: a level becomes `shift * level / (1 + (shift - 1) * level)`, as that of the
            scheduler of the same `shift` does (arXiv 2403.03206, section 5.3.2). Latents that say the same thing in
            many numbers show it through much noise: then what the whole looks like is decided at high levels.
    """

    def __init__(
        self, sampling: TimestepSampling = "uniform", num_train_timesteps: int = 1000, shift: float = 1.0
    ) -> None:
        _check_sampling(sampling)
        if shift <= 0:
            raise ValueError(f"`shift` must be positive, got {shift}.")
        self.sampling, self.num_train_timesteps, self.shift = sampling, num_train_timesteps, shift

    def timesteps(self, uniform: torch.Tensor) -> torch.Tensor:
        """Timesteps `(B,)` as float32 in `[0, num_train_timesteps]`, from numbers `(B,)` in `[0, 1)`."""
        levels = _noise_levels(uniform, self.sampling)
        return self.timesteps_at(self.shift * levels / (1.0 + (self.shift - 1.0) * levels))

    def timesteps_at(self, levels: torch.Tensor) -> torch.Tensor:
        """Timesteps at shares `(B,)` in `[0, 1]` of the schedule, which are the noise levels, or the nearest of it."""
        return levels.float().clamp(0.0, 1.0) * self.num_train_timesteps

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy latents at `timesteps` `(B,)`; `noise` is standard normal, shaped like `latents`."""
        level = (timesteps.float() / self.num_train_timesteps).view(-1, *[1] * (latents.ndim - 1))
        return (1.0 - level) * latents + level * noise

    def loss(
        self,
        model_output: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        weight: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute `loss` per sample, as [`EpsilonObjective.loss`] does; `model_output` is `(B, channels, ...)`."""
        if model_output.shape != latents.shape:
            raise ValueError(
                f"`model_output` must have the shape of the latents, {tuple(latents.shape)}, got "
                f"{tuple(model_output.shape)}."
            )
        return {"loss": _sample_mean((model_output.float() - (noise.float() - latents.float())).square(), weight)}


def _check_sampling(sampling: str) -> None:
    check_choice("sampling", sampling, ("uniform", "logit_normal"))


def _noise_levels(uniform: torch.Tensor, sampling: str) -> torch.Tensor:
    """Map numbers in `[0, 1)` to noise levels: unchanged, or to a logit-normal distribution, keeping their order."""
    return uniform if sampling == "uniform" else torch.sigmoid(torch.special.ndtri(uniform.double()))


def _sample_mean(values: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    if weight is None:
        return values.flatten(1).mean(1)
    weight = weight.to(values.dtype).expand_as(values)
    return (weight * values).flatten(1).sum(1) / weight.flatten(1).sum(1)


def _log_likelihood(latents: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Log-likelihood of latents under a Gaussian cut into bins, with open bins below -1 and above 1.

    This is the likelihood of image pixels with 256 levels, which the reference applies to latents as it stands.
    """
    centered, inverse_std = latents - mean, torch.exp(-0.5 * log_variance)
    upper = _approximate_normal_cdf((centered + _BIN) * inverse_std)
    lower = _approximate_normal_cdf((centered - _BIN) * inverse_std)
    inside, below, above = ((x.clamp(min=1e-12)).log() for x in (upper - lower, upper, 1.0 - lower))
    return torch.where(latents < -0.999, below, torch.where(latents > 0.999, above, inside))


def _approximate_normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """Normal distribution function by a tanh, within 4e-4, as the reference computes it."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))

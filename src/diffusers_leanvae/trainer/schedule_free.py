"""AdamW without a schedule (arXiv 2405.15682): what is exported is the optimizer's own average of the weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .whitened_muon import loss_of


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """Schedule-free AdamW (arXiv 2405.15682, Algorithm 1), with the memory of AdamW.

    Three sequences take the place of weights and momentum: `z` takes AdamW's steps without momentum, `x` is the
    average of all `z`, weighted by the square of the rate, and gradients are those at `y = (1 - beta1) z + beta1 x`.
    The module's parameters are `y`; the weights to validate and to export are `x`, which `averages` gives.

    Args:
        params: Parameters, or groups of them, as of `torch.optim.Optimizer`.
        lr: Learning rate; constant after a warm-up, which the caller sets in the groups.
        betas: Share of `x` in `y`, above 0, and decay of squared gradients.
        weight_decay: Decoupled, at `y`.
        eps: Added to the root of squared gradients.

    Raises:
        ValueError: If the first of `betas` is 0: `x` could not be told from the parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        if betas[0] <= 0:
            raise ValueError(f"The first of `betas` must be above 0 for a schedule-free optimizer, got {betas[0]}.")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, defaults | {"num_steps": 0, "sum_of_weights": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            group["num_steps"] += 1
            beta1, beta2 = group["betas"]
            rate = group["lr"] * (1 - beta2 ** group["num_steps"]) ** 0.5
            group["sum_of_weights"] += rate**2
            share = rate**2 / group["sum_of_weights"] if rate else 0.0  # of the new `z` in `x`
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["z"], state["exp_avg_sq"] = parameter.clone(), torch.zeros_like(parameter)
                y, z, grad = parameter, state["z"], parameter.grad
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                change = grad / state["exp_avg_sq"].sqrt().add_(group["eps"])
                change.add_(y, alpha=group["weight_decay"])
                # As x comes nearer to the new z by `share`, and z moves by -rate * change, so moves y between them.
                y.lerp_(z, share).add_(change, alpha=-rate * (1 - beta1 * (1 - share)))
                z.add_(change, alpha=-rate)
        return loss

    @torch.no_grad()
    def averages(self, parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
        """The weights to validate and to export.

        Args:
            parameters: Of the module. Those that are not trained, any more or at all, come back as they are.
        """
        first_betas = {p: group["betas"][0] for group in self.param_groups for p in group["params"]}
        return [
            parameter + (parameter - self.state[parameter]["z"]) * (1 / first_betas[parameter] - 1)
            if parameter.requires_grad and self.state.get(parameter)
            else parameter.detach()
            for parameter in parameters
        ]

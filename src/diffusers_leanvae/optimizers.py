"""Muon for the matrices inside a network and AdamW for everything else, as one optimizer.

`torch.optim.Muon` orthogonalises in bfloat16, which CPUs without bfloat16 arithmetic emulate at a thirtieth of their
float32 speed, and takes matrices alone. This one works in float32, on the Gram matrix, with half the operations.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


# Quintic Newton-Schulz iteration of Muon (Jordan et al. 2024): singular values go to about 1 in five rounds.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    r"""The nearest (semi-)orthogonal matrix, roughly: singular vectors kept, singular values within about [0.7, 1.2].

    Args:
        matrix: Shape `(rows, columns)`, any floating-point dtype; computed in float32.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.float()
    x = x / x.norm().clamp(min=1e-7)
    is_tall = x.shape[0] > x.shape[1]
    # Every factor is a polynomial of one small Gram matrix, so the long side is touched only twice.
    gram = x.t() @ x if is_tall else x @ x.t()
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    product = identity
    for _ in range(_NUM_ITERATIONS):
        factor = a * identity + b * gram + c * (gram @ gram)
        product = product @ factor
        gram = factor @ gram @ factor
    return (x @ product if is_tall else product @ x).to(matrix.dtype)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    r"""Whether Muon should move a parameter of a LeanVAE: the matrices of its feed-forwards.

    Input and output projections and the sensing matrix have a scale of their own; AdamW keeps it.
    """
    return parameter.ndim == 2 and name.endswith(("up_proj.weight", "down_proj.weight"))


class MuonAdamW(torch.optim.Optimizer):
    r"""Muon (K. Jordan et al. 2024; scale of Liu et al., arXiv 2502.16982) beside AdamW, with one learning rate.

    Muon's update has the root mean square of a usual AdamW update (0.2), so one learning rate serves both.

    Args:
        named_parameters: Names and parameters, such as `model.named_parameters()`.
        lr: Learning rate of both.
        betas: Of AdamW.
        momentum: Of Muon (Nesterov).
        weight_decay: Decoupled, of both.
        select: Says of a name and a parameter whether Muon moves it.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        select: Callable[[str, nn.Parameter], bool] = is_hidden_matrix,
    ) -> None:
        split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in named_parameters:
            split[select(name, parameter)].append(parameter)
        for parameter in split[True]:
            if parameter.ndim != 2:
                raise ValueError(f"`select` must choose matrices, got a parameter of shape {tuple(parameter.shape)}.")
        groups: list[dict[str, Any]] = [
            {"params": params, "use_muon": use_muon} for use_muon, params in split.items() if params
        ]
        defaults = {"lr": lr, "betas": betas, "momentum": momentum, "weight_decay": weight_decay, "eps": 1e-8}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        r"""One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            move = self._move_by_muon if group["use_muon"] else self._move_by_adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    move(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def _move_by_muon(
        self, parameter: nn.Parameter, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(grad, 1.0 - group["momentum"])
        update = orthogonalize(grad.lerp(buffer, group["momentum"]))
        parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)

    def _move_by_adamw(
        self, parameter: nn.Parameter, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        step = state["step"].item()
        state["exp_avg"].lerp_(grad, 1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        denominator = (state["exp_avg_sq"] / (1.0 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1.0 - beta1**step))

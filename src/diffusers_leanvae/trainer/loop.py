"""What the loops of all training scripts share: the optimizer of a recipe, means over processes, trackers."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from .recipe import OptimizerRecipe
from .whitened_muon import WhitenedMuon


def build_optimizer(
    recipe: OptimizerRecipe, module: torch.nn.Module, adamw_layers: Sequence[str] = ()
) -> torch.optim.Optimizer:
    """The optimizer of whatever requires a gradient in a module; `adamw_layers` as of `WhitenedMuon`."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    common: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (recipe.betas[0], recipe.betas[1]),
        "weight_decay": recipe.weight_decay,
    }
    if recipe.name == "muon":
        return WhitenedMuon(module, adamw_factor=recipe.adamw_factor, adamw_layers=adamw_layers, **common)
    if recipe.name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                '`optimizer.name: adamw8bit` needs bitsandbytes: pip install "diffusers-leanvae[adamw8bit]"'
            ) from error
        return AdamW8bit(parameters, **common)
    return torch.optim.AdamW(parameters, fused=True, **common)


def average(accelerator: Any, values: Sequence[torch.Tensor | float]) -> list[float]:
    """The mean of each value over the processes of an `accelerate.Accelerator`."""
    tensors = [torch.as_tensor(value, dtype=torch.float32, device=accelerator.device) for value in values]
    reduced: Any = accelerator.reduce(torch.stack(tensors), reduction="mean")
    return reduced.tolist()


class RunningMeans:
    """Means of named values since the last reading; nothing waits for the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[torch.Tensor | float, int]] = {}

    def update(self, values: dict[str, torch.Tensor | float]) -> None:
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)

    def read(self, accelerator: Any) -> dict[str, float]:
        names, sums = list(self.sums), list(self.sums.values())
        self.sums = {}
        if not names:
            return {}
        return dict(zip(names, average(accelerator, [total / count for total, count in sums]), strict=True))


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse trackers that are not installed, which Accelerate would leave out silently."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'`trackers: [{name}]` needs {name}: pip install "diffusers-leanvae[{name}]"')

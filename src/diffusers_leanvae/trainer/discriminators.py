"""The discriminators of `training/train_vae.py`: their section of the recipe, networks and optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from ..losses.adversarial import DiscriminatorTrainingModule, PatchDiscriminator2d, PatchDiscriminator3d
from .recipe import check_amounts, check_betas, check_counts, check_shares


@dataclass
class AdversarialRecipe:
    """The discriminator of PatchGAN (1611.07004), with LeCam (2104.03310); off while `weight` is 0."""

    weight: float = 0.0  # 0.2 in the reference
    is_adaptive: bool = False  # scale the weight by the ratio of gradients at the last layer, as VQGAN (2012.09841)
    start_step: int = 0
    kind: Literal["2d", "3d"] = "2d"
    loss: Literal["hinge", "non_saturating"] = "hinge"  # of the discriminator
    generator_loss: Literal["hinge", "non_saturating"] = "non_saturating"
    num_layers: int = 3
    num_filters: int = 64
    norm: Literal["batch", "group", "instance", "none"] = "batch"
    dropout: float = 0.0  # after every normalised convolution; 0.3 in WF-VAE
    lecam_weight: float = 0.005
    lecam_decay: float = 0.999
    update: Literal["joint", "alternate"] = "joint"  # "alternate": generator and discriminator take turns
    learning_rate: float = 1e-5
    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_betas("adversarial.betas", self.betas)
        check_counts(self, "num_layers", "num_filters", prefix="adversarial.")
        amounts = ("weight", "start_step", "lecam_weight", "learning_rate", "weight_decay")
        check_amounts(self, *amounts, prefix="adversarial.")
        check_shares(self, "dropout", "lecam_decay", prefix="adversarial.")


def build_discriminators(recipe: AdversarialRecipe, in_channels: int, count: int) -> list[DiscriminatorTrainingModule]:
    """Build `count` discriminators of videos of `in_channels`; none for a recipe without an adversarial loss."""
    network = {"2d": PatchDiscriminator2d, "3d": PatchDiscriminator3d}[recipe.kind]
    return [
        DiscriminatorTrainingModule(
            network(in_channels, recipe.num_layers, recipe.num_filters, recipe.norm, recipe.dropout),
            recipe.loss,
            recipe.lecam_weight,
            recipe.lecam_decay,
            recipe.generator_loss,
        )
        for _ in range(count if recipe.weight else 0)
    ]


def build_discriminator_optimizer(
    recipe: AdversarialRecipe, parameters: Sequence[torch.nn.Parameter]
) -> torch.optim.Optimizer | None:
    """Build the optimizer of all discriminators; `None` without parameters to move."""
    if not parameters:
        return None
    betas = (recipe.betas[0], recipe.betas[1])
    return torch.optim.AdamW(parameters, recipe.learning_rate, betas, weight_decay=recipe.weight_decay)

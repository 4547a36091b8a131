"""Training with FSDP2: every process has its share of weights, gradients, averages and the optimizer's state.

The launcher asks for it (`docs/scaling.md`). Parameters are then `DTensor`: what is computed of them one number at a
time stays as it is, and what needs all of them at once (the norm of the gradient, the whole average, a checkpoint) is
here. Without FSDP everything here does what the plain code does.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from accelerate import Accelerator
from accelerate.utils import broadcast, convert_outputs_to_fp32, disable_fsdp_ram_efficient_loading
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from ..launching import is_asked_for
from .recipe import RunRecipe


AVERAGE = "average"  # folder of a checkpoint: the shards of the averaged weights


def check_launcher(recipe: RunRecipe, can_shard: bool) -> None:
    """Refuse what a launcher asks for, by the environment, and the scripts do not do; before Accelerate starts.

    Args:
        recipe: Of the run.
        can_shard: Whether the script prepares its model with `shard`.

    Raises:
        ValueError: In one sentence, with what to do instead.
    """
    if is_asked_for("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "The launcher must not ask for DeepSpeed, which the training scripts do not support: FSDP2 with "
            "`fsdp_reshard_after_forward: false` shards what ZeRO-2 does."
        )
    if is_asked_for("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError("The launcher must not ask for Megatron-LM, which the training scripts do not support.")
    if not is_asked_for("ACCELERATE_USE_FSDP"):
        return
    if not can_shard:
        raise ValueError(
            "The launcher must not ask for FSDP, as this script keeps its small model whole in every process: start "
            "it with the configuration for several GPUs."
        )
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"`fsdp_version` of the launcher's configuration must be 2, got {version}.")
    if recipe.optimizer.name != "adamw":
        raise ValueError(f"`optimizer.name` must be 'adamw' with FSDP, got {recipe.optimizer.name!r}.")
    if recipe.post_hoc_power is not None:
        raise ValueError(f"`post_hoc_power` must be null with FSDP, got {recipe.post_hoc_power}.")
    if recipe.mixed_precision == "fp16":
        raise ValueError("`mixed_precision` must be 'bf16', 'fp32' or null with FSDP, got 'fp16'.")
    # Otherwise transformers loads pretrained weights in the first process alone, and leaves them out in the others:
    # right for a model that is sharded afterwards, wrong for those that are only used.
    disable_fsdp_ram_efficient_loading()


def shard(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, blocks: Iterable[nn.Module]
) -> nn.Module:
    """Shard a module over the processes, in place, and hand its new parameters to the optimizer.

    Args:
        accelerator: One that shards.
        module: On its device; of the processes' weights those of the first count.
        optimizer: Of all parameters of the module that are trained.
        blocks: Modules inside whose weights are put together one at a time, when they are needed.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks})
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.copy_(broadcast(tensor.data))
    if accelerator.mixed_precision == "bf16":
        # By itself Accelerate would cast the latents, the noise and everything between the blocks to bfloat16, too.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        forward = torch.autocast(accelerator.device.type, torch.bfloat16)(module.forward)
        module.forward = convert_outputs_to_fp32(forward)
    module, _ = accelerator.prepare(module, optimizer)
    return module


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip the norm of all gradients together, in place; every process calls.

    Returns:
        The norm before, the same in all processes.
    """
    return _whole(clip_grad_norm_(parameters, max_norm))


class WeightAverage(EMAModel):
    """The moving average of diffusers, of sharded weights too: each process averages and saves its own share.

    Args:
        parameters: What is averaged.
        exponent: Of an average by a power function (arXiv 2312.02696), in place of one by `decay`: the weights of step
            `i` count by `i ** exponent`, nearly. `None` for an average by `decay`.
        options: As of diffusers.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], exponent: float | None = None, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.exponent = exponent

    def get_decay(self, optimization_step: int) -> float:
        """As of diffusers, but for an `exponent`; the first step takes the weights as they are."""
        if self.exponent is None:
            return super().get_decay(optimization_step)
        return (1 - 1 / optimization_step) ** (self.exponent + 1)

    @property
    def is_sharded(self) -> bool:
        return any(isinstance(weight, DTensor) for weight in self.shadow_params)

    def step(self, parameters: Iterable[torch.Tensor]) -> None:
        """As of diffusers; what needs no gradient is taken as it is."""
        whole = self.shadow_params
        # On the shares as plain tensors: PyTorch spends seconds on how each operation on a long list of shards is to
        # be done, once.
        self.shadow_params, shares = [_share(weight) for weight in whole], [_share(weight) for weight in parameters]
        if any(share.requires_grad for share in shares):
            super().step(shares)
        else:  # what a schedule-free optimizer has averaged: diffusers wants at least one that is to be averaged
            self.optimization_step += 1
            torch._foreach_copy_(self.shadow_params, shares)
        self.shadow_params = whole

    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy the average into as many whole parameters; if it is sharded, every process calls."""
        if not self.is_sharded:
            super().copy_to(parameters)
            return
        for weight, parameter in zip(self.shadow_params, parameters, strict=True):
            parameter.data.copy_(_whole(weight))

    def state_dict(self) -> dict[str, Any]:
        """As of diffusers, with the exponent; without the weights if they are sharded, which `save_shards` saves."""
        state = super().state_dict() | {"exponent": self.exponent}
        if self.is_sharded:
            del state["shadow_params"]
        return state

    def save_shards(self, checkpoint: Path) -> None:
        """Add the weights to a checkpoint if they are sharded; every process calls."""
        if self.is_sharded:
            distributed_checkpoint.save(self._shards(), checkpoint_id=checkpoint / AVERAGE)

    def load_shards(self, checkpoint: Path) -> None:
        """Take the weights from a checkpoint, of any number of processes, if they are sharded; every process calls."""
        if self.is_sharded:
            distributed_checkpoint.load(self._shards(), checkpoint_id=checkpoint / AVERAGE)

    def _shards(self) -> dict[str, Any]:
        return {str(index): weight for index, weight in enumerate(self.shadow_params)}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _share(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_checkpoint(checkpoint: Path, is_sharded: bool) -> None:
    """Refuse a checkpoint that was written with FSDP where there is none, and the other way round."""
    was_sharded = (checkpoint / AVERAGE).is_dir()
    if was_sharded != is_sharded:
        written, now = ("with", "without") if was_sharded else ("without", "with")
        raise ValueError(
            f"A run that began {written} FSDP must go on {written} it, got the checkpoint {str(checkpoint)!r} and a "
            f"launcher {now} FSDP: use the former configuration, or start another run from the exported pipeline by "
            f"`init`."
        )

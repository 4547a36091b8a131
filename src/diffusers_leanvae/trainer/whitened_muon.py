"""The optimizer for LeanVAE: Muon on whitened inputs for all linear maps of the network, AdamW for the rest.

Why not `torch.optim.Muon` or AdamW: tokens of a video are nearly one direction, their brightness. In the covariance
of a layer's inputs the first eigenvalue is orders of magnitude above most, and fine detail lives in the small ones.
A step that is isotropic in the *weights* is too large for the first or nothing for the others: the loss rises until
the learning rate falls. Here a step is isotropic in what a layer *outputs*: of all updates that change the outputs,
for the inputs that there are, by a bounded amount, the one that lowers the loss most.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models.autoencoder_kl_leanvae import CompressedSensingBottleneck
from ..models.leanvae_blocks import CausalDepthwiseConv3d


# Quintic Newton-Schulz iteration of Muon (Jordan et al. 2024): singular values go to about 1 in five rounds.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5

# Input covariances are sampled in each of the first steps, then now and then; parameters wait for the first few.
_NUM_FIRST_LOOKS, _STEPS_PER_LOOK, _LOOKS_BEFORE_MOVING = 8, 20, 4
_SMALLEST_LOOK_WEIGHT = 0.05  # of the newest look in the running average
_TOKENS_PER_LOOK = 2  # every second in height and width: the covariance over a convolution's 27 taps is the costliest

# How far outputs move, relative to the learning rate. Hidden units are around 1, tokens and pixels far smaller; a
# latent of unit variance is decoded to tokens many times its size.
_HIDDEN_SCALE, _LATENT_SCALE = 5.0, 0.1


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrix, roughly: singular vectors kept, singular values within about [0.7, 1.2].

    In float32 (CPUs without bfloat16 arithmetic emulate it, slowly), and on the Gram matrix, with half the operations.

    Args:
        matrix: Shape `(rows, columns)`, any floating-point dtype.
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


def inverse_square_root(covariance: torch.Tensor, damping: float) -> torch.Tensor:
    """`(covariance + damping * mean eigenvalue)^(-1/2)` in float32.

    Args:
        covariance: Symmetric, `(..., dim, dim)`; the mean is taken over all matrices of a batch.
        damping: Bounds what nearly dead directions are multiplied by.
    """
    values, vectors = torch.linalg.eigh(covariance.float())
    values = values.clamp(min=0.0) + damping * values.mean().clamp(min=1e-12)
    return (vectors * values.rsqrt()[..., None, :]) @ vectors.mT


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure of a step gives, with gradients, as PyTorch's optimizers take it; `None` without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class WhitenedMuon(torch.optim.Optimizer):
    """Muon (K. Jordan et al. 2024) on whitened inputs for the linear maps of a LeanVAE, AdamW for the rest.

    It knows the layers of LeanVAE by class and by name. Of any other network it moves the weights of all `nn.Linear`
    but `adamw_layers` by Muon, which `training/train_lvdm.py` uses for transformers.

    With gradient `G` of a layer `y = W x` and `R` the inverse square root of the covariance of its inputs (factor `A`
    of K-FAC, arXiv 1503.05671), the update is `-lr * orthogonalize(G R) R`: outputs change by about `lr`, root mean
    square. A depthwise convolution is a linear map of 27 inputs for each channel.

    Linear maps are the weights of `nn.Linear` and of [`CausalDepthwiseConv3d`], and the sensing matrix of a LeanVAE
    bottleneck with its initial inverse; `logvar_proj`, norms, biases, step sizes and thresholds are moved by AdamW.

    Args:
        module: The network; hooks on its layers watch their inputs while it trains. Parameters without
            `requires_grad` are left alone.
        lr: Learning rate of linear maps: by how much outputs change in a step.
        adamw_factor: AdamW's learning rate, relative to `lr`.
        betas: Of AdamW.
        momentum: Of Muon (Nesterov).
        weight_decay: Decoupled, of both.
        damping: Added to covariances, relative to their mean eigenvalue.
        adamw_layers: Ends of the names of further linear layers that AdamW moves.

    Every parameter group has an `lr_factor`: a schedule must set `group["lr"]` to the learning rate times that.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float = 5e-4,
        adamw_factor: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        damping: float = 1e-2,
        adamw_layers: Sequence[str] = (),
    ) -> None:
        kinds: dict[torch.Tensor, tuple[str, float]] = {}  # what is moved by Muon: how, and its scale
        self._seen: dict[torch.Tensor, list[torch.Tensor]] = {}  # covariances of inputs since `zero_grad`
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear) and not name.endswith(("logvar_proj", *adamw_layers)):
                kinds[layer.weight] = ("matrix", _HIDDEN_SCALE if name.endswith("up_proj") else 1.0)
                layer.register_forward_pre_hook(self._look_at_linear)
            elif isinstance(layer, CausalDepthwiseConv3d):
                kinds[layer.weight] = ("depthwise", 1.0)
                layer.register_forward_pre_hook(self._look_at_depthwise)
            elif isinstance(layer, CompressedSensingBottleneck):
                kinds[layer.phi] = ("matrix", _LATENT_SCALE)
                kinds[layer.initial] = ("matrix", 1.0)
                layer.register_forward_pre_hook(self._look_at_bottleneck, with_kwargs=True)
        groups: dict[tuple[str, float], list[nn.Parameter]] = {}
        for parameter in module.parameters():
            if parameter.requires_grad:
                groups.setdefault(kinds.get(parameter, ("adamw", 1.0)), []).append(parameter)
        if not groups:
            raise ValueError("`module` must have parameters that require a gradient, got none.")
        factors = {kind: adamw_factor if kind == "adamw" else 1.0 for kind, _ in groups}
        built = [
            {"params": params, "kind": kind, "scale": scale, "lr": lr * factors[kind], "lr_factor": factors[kind]}
            for (kind, scale), params in groups.items()
        ]
        defaults = {"lr": lr, "betas": betas, "momentum": momentum, "weight_decay": weight_decay, "eps": 1e-8}
        super().__init__(built, defaults | {"damping": damping, "num_steps": 0})

    # ---- inputs -----------------------------------------------------------------------------------------------------

    def _wants_look(self, layer: nn.Module, weight: torch.Tensor) -> bool:
        if torch.compiler.is_compiling() or not (layer.training and weight.requires_grad):
            return False
        num_steps = self.param_groups[0]["num_steps"]
        return num_steps < _NUM_FIRST_LOOKS or num_steps % _STEPS_PER_LOOK == 0

    @torch.no_grad()
    def _look_at_rows(self, layer: nn.Module, weight: torch.Tensor, inputs: torch.Tensor) -> None:
        if self._wants_look(layer, weight):
            rows = inputs.reshape(-1, inputs.shape[-1]).float()
            with torch.autocast(rows.device.type, enabled=False):  # a covariance wants float32
                self._seen.setdefault(weight, []).append(rows.t() @ rows / rows.shape[0])

    def _look_at_linear(self, layer: nn.Linear, args: tuple[torch.Tensor, ...]) -> None:
        self._look_at_rows(layer, layer.weight, args[0])

    def _look_at_bottleneck(
        self, layer: CompressedSensingBottleneck, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]
    ) -> None:
        self._look_at_rows(layer, layer.initial if kwargs.get("reconstruct") else layer.phi, args[0])

    @torch.no_grad()
    def _look_at_depthwise(self, layer: CausalDepthwiseConv3d, args: tuple[torch.Tensor, ...]) -> None:
        if not self._wants_look(layer, layer.weight):
            return
        tokens, every = args[0].float(), _TOKENS_PER_LOOK
        _, num_steps, height, width, dim = tokens.shape
        tokens = F.pad(tokens, (0, 0, 1, 1, 1, 1, 2, 0))
        taps = [
            tokens[:, t : t + num_steps, y : y + height : every, x : x + width : every].reshape(-1, dim)
            for t in range(3)
            for y in range(3)
            for x in range(3)
        ]
        inputs = torch.stack(taps).permute(2, 0, 1).contiguous()  # (c, 27, tokens)
        with torch.autocast(inputs.device.type, enabled=False):
            self._seen.setdefault(layer.weight, []).append(inputs @ inputs.mT / inputs.shape[2])

    def _whiten(self, looks: list[torch.Tensor], state: dict[str, Any], damping: float) -> None:
        covariance = torch.stack(looks).mean(0)  # one look for each pass of a step
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(covariance)  # all processes must take the same step
            covariance = covariance / torch.distributed.get_world_size()
        state["num_looks"] = state.get("num_looks", 0) + 1
        weight = max(1.0 / state["num_looks"], _SMALLEST_LOOK_WEIGHT)
        state["covariance"] = covariance if weight == 1.0 else state["covariance"].lerp(covariance, weight)
        is_early = state["num_looks"] < _LOOKS_BEFORE_MOVING  # a few clips say little: a root of zero stands still
        state["root"] = torch.zeros_like(covariance) if is_early else inverse_square_root(state["covariance"], damping)

    # ---- updates ----------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, and the inputs seen with them."""
        super().zero_grad(set_to_none)
        self._seen.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            move = self._move_by_adamw if group["kind"] == "adamw" else self._move_by_muon
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    move(parameter, parameter.grad, self.state[parameter], group)
            group["num_steps"] += 1
        return loss

    def _move_by_muon(
        self, parameter: nn.Parameter, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        looks = self._seen.pop(parameter, None)
        if looks is not None:
            self._whiten(looks, state, group["damping"])
        elif "root" not in state:
            raise RuntimeError("WhitenedMuon saw no inputs: its hooks need forward passes that are not compiled.")
        buffer = state["momentum_buffer"].lerp_(grad, 1.0 - group["momentum"])
        direction, root = grad.lerp(buffer, group["momentum"]), state["root"]
        if group["kind"] == "depthwise":
            kernels = direction.flatten(1)[:, None] @ root  # (c, 1, 27)
            kernels = kernels / kernels.norm(dim=2, keepdim=True).clamp(min=1e-20)
            update = (kernels @ root).view_as(parameter)
        else:
            rows, columns = parameter.shape
            update = orthogonalize(direction @ root) @ root * max(rows / columns, 1.0) ** 0.5
        parameter.add_(update, alpha=-group["lr"] * group["scale"])

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

"""Reference of the fused operations: plain PyTorch, every device and floating dtype, with gradients.

What lies between input and output is computed in float32 (float64 stays float64) and rounded once, at the end: so are
the kernels, and so a kernel and its reference differ by the order of sums, not by roundings in between.
"""

import torch
import torch.nn.functional as F


def depthwise_conv_residual_norm(
    hidden_states: torch.Tensor,
    tail: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float = 1e-5,
    residual: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal depthwise 3x3x3 convolution of tokens, zero-padded in space, and the LayerNorm of its output.

    First half of a block of LeanVAE (arXiv 2503.14325, section 3.2).

    Args:
        hidden_states: Tokens `(batch_size, time, height, width, channels)`.
        tail: The two time steps before them, `(batch_size, 2, height, width, channels)`; `None` for zeros.
        weight: `(channels, 1, 3, 3, 3)`, over time, height and width.
        bias: `(channels,)`, and so are `norm_weight` and `norm_bias`.
        residual: Whether to add `hidden_states` to the convolution.

    Returns:
        The convolution, plus `hidden_states` if residual, and its LayerNorm over the channels; both contiguous, of the
        shape and dtype of `hidden_states`.
    """
    check_depthwise_arguments(hidden_states, tail, weight, bias, norm_weight, norm_bias)
    dtype = _computed_in(hidden_states)
    tokens = hidden_states.to(dtype)
    if tail is None:
        tail = tokens.new_zeros(()).expand(tokens.shape[0], 2, *tokens.shape[2:])
    # The permuted view is exactly `channels_last_3d`, for which PyTorch has its best kernel.
    padded = torch.cat((tail.to(dtype), tokens), dim=1).permute(0, 4, 1, 2, 3)
    output = F.conv3d(padded, weight.to(dtype), bias.to(dtype), padding=(0, 1, 1), groups=tokens.shape[-1])
    output = output.permute(0, 2, 3, 4, 1).contiguous()
    if residual:
        output = output + tokens
    normed = F.layer_norm(output, bias.shape, norm_weight.to(dtype), norm_bias.to(dtype), eps)
    return output.to(hidden_states.dtype), normed.to(hidden_states.dtype)


def gated_gelu(projected: torch.Tensor) -> torch.Tensor:
    """`value * gelu(gate)`, `(tokens, 2 * inner)` to `(tokens, inner)`; in a row, values and gates alternate.

    The gelu is the exact one.
    """
    check_gated_arguments(projected)
    value, gate = projected.to(_computed_in(projected)).unflatten(1, (-1, 2)).unbind(2)
    return (value * F.gelu(gate)).to(projected.dtype)


def gated_projection(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """First half of a gated feed-forward: [`gated_gelu`] of `hidden_states @ weight.T`.

    Args:
        hidden_states: `(tokens, channels)`.
        weight: `(2 * inner, channels)`, rows of values and of gates alternating.

    Returns:
        `(tokens, inner)`.
    """
    check_projection_arguments(hidden_states, weight)
    dtype = _computed_in(hidden_states)
    return gated_gelu(F.linear(hidden_states.to(dtype), weight.to(dtype))).to(hidden_states.dtype)


def soft_threshold_(hidden_states: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """`sign(x) * relu(|x| - threshold)` in place, of a threshold with one element; returns `hidden_states`."""
    check_threshold_arguments(threshold)
    dtype = _computed_in(hidden_states)
    wide = hidden_states.to(dtype)
    return hidden_states.copy_(torch.sign(wide) * F.relu(torch.abs(wide) - threshold.to(dtype)))


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """The weight of a depthwise convolution, laid out in memory as this implementation reads it; here as it is.

    Optional: weights that are not packed are packed at each call.
    """
    return weight


def _computed_in(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def check_depthwise_arguments(
    hidden_states: torch.Tensor, tail: torch.Tensor | None, weight: torch.Tensor, *vectors: torch.Tensor
) -> None:
    """Raise unless the shapes fit each other; `vectors` are bias and the parameters of the LayerNorm."""
    shape = tuple(hidden_states.shape)
    if len(shape) != 5 or 0 in shape:
        raise ValueError(
            f"`hidden_states` must be non-empty tokens (batch, time, height, width, channels), got {shape}."
        )
    if tail is not None and tuple(tail.shape) != (shape[0], 2, *shape[2:]):
        raise ValueError(f"`tail` must have the shape {(shape[0], 2, *shape[2:])}, got {tuple(tail.shape)}.")
    if tuple(weight.shape) != (shape[4], 1, 3, 3, 3):
        raise ValueError(f"`weight` must have the shape {(shape[4], 1, 3, 3, 3)}, got {tuple(weight.shape)}.")
    for name, vector in zip(("bias", "norm_weight", "norm_bias"), vectors, strict=True):
        if tuple(vector.shape) != shape[4:]:
            raise ValueError(f"`{name}` must have the shape {shape[4:]}, got {tuple(vector.shape)}.")


def check_gated_arguments(projected: torch.Tensor) -> None:
    if projected.ndim != 2 or projected.shape[1] % 2 or 0 in projected.shape:
        raise ValueError(f"`projected` must be a non-empty (tokens, 2 * inner), got {tuple(projected.shape)}.")


def check_projection_arguments(hidden_states: torch.Tensor, weight: torch.Tensor) -> None:
    if hidden_states.ndim != 2 or 0 in hidden_states.shape:
        raise ValueError(f"`hidden_states` must be non-empty (tokens, channels), got {tuple(hidden_states.shape)}.")
    if weight.ndim != 2 or weight.shape[0] % 2 or weight.shape[1] != hidden_states.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"`weight` must be (2 * inner, {hidden_states.shape[1]}) for these channels, got {tuple(weight.shape)}."
        )


def check_threshold_arguments(threshold: torch.Tensor) -> None:
    if threshold.numel() != 1:
        raise ValueError(f"`threshold` must have one element, got {tuple(threshold.shape)}.")

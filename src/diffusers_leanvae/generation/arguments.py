"""Checks of the numbers and tensors that users pass to the pipelines."""

import math
from numbers import Integral, Real
from typing import Any

import torch


def is_integer(value: Any) -> bool:
    """Tell whether a value is an integer, also one of NumPy; `True` and `False` are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number, also one of NumPy; `True` and `False` are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_integer(name: str, value: Any) -> None:
    """Refuse the argument `name` where it is no integer.

    Raises:
        ValueError: If it is not.
    """
    if not is_integer(value):
        raise ValueError(f"`{name}` must be an integer, got {value!r}.")


def check_tensor(name: str, value: Any) -> None:
    """Refuse the argument `name` where it is no tensor, or holds NaN or infinity, which would spread to all frames.

    Raises:
        ValueError: If it is not, or does.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` must be a tensor, got a value of type {type(value).__name__}.")
    if not value.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinite values.")

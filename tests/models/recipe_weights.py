"""The rule by which the golden files of WF-VAE and IV-VAE make their weights (shared/golden/README_wf_iv.md)."""

from typing import Any

import numpy as np
import torch


def recipe_weights(original: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Weights for original keys, in the order of these, and the constants of the wavelets as they are."""
    random = np.random.RandomState(seed)
    weights = {}
    for key in sorted(original):
        shape, last = original[key].shape, key.split(".")[-1]
        if "wavelet" in key:
            weights[key] = original[key]
            continue
        values: Any = torch.from_numpy(random.standard_normal(original[key].numel()).astype(np.float32)).view(shape)
        if last == "gamma":
            weights[key] = 1 + 0.2 * values
        elif len(shape) > 1:
            weights[key] = values / torch.tensor(shape[1:].numel(), dtype=torch.float32).sqrt()
        else:
            weights[key] = 1 + 0.2 * values if last == "weight" else 0.1 * values
    return weights

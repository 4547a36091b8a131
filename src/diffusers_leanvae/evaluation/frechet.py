"""The Frechet distance between two sets of features, each taken for samples of a normal distribution."""

import torch


def frechet_distance(features: torch.Tensor, others: torch.Tensor, ddof: int = 0) -> float:
    """Compute `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` of the means and covariances of two sets.

    The trace of the root is the sum of the singular values of `R1 R2^T`, where `R^T R` is a covariance and `R` the
    triangular factor of the centred features. No covariance is formed and no root of a product taken, whose rounding
    errors decide the result where there are fewer samples than features; two equal sets have a distance of 0 up to
    rounding.

    Args:
        features: `(num_samples, num_features)`, at least two samples.
        others: The other set, with as many features.
        ddof: Subtracted from the number of samples in the covariances: 0 as in StyleGAN-V, 1 as in torchmetrics.

    Returns:
        The distance, at least 0, computed in float64.
    """
    for name, value in (("features", features), ("others", others)):
        if value.ndim != 2 or len(value) < 2 or value.shape[1] != features.shape[-1]:
            raise ValueError(
                f"`{name}` must be (num_samples, num_features) of at least two samples and as many features as the "
                f"other set, got {tuple(value.shape)}."
            )
        if not torch.isfinite(value).all():
            raise ValueError(
                f"`{name}` must be finite, got {int((~torch.isfinite(value)).sum())} values that are not."
            )
    (mean, root), (other_mean, other_root) = (_mean_and_root(x.double().cpu(), ddof) for x in (features, others))
    traces = root.square().sum() + other_root.square().sum()
    cross = torch.linalg.svdvals(root @ other_root.T).sum()
    return max(0.0, ((mean - other_mean).square().sum() + traces - 2 * cross).item())


def _mean_and_root(features: torch.Tensor, ddof: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean, and `R` with `R^T R` the covariance; of as many rows as there are samples or features, if fewer."""
    mean = features.mean(dim=0)
    return mean, torch.linalg.qr((features - mean) / (len(features) - ddof) ** 0.5, mode="r").R

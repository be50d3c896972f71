"""Forward selection: of many inputs of a linear layer, those that it needs most, chosen one after another."""

import torch

from clipmap_hf.starts.calibrated.moments import Moments


__all__ = ["explained", "most_needed"]

_FLOOR = 1e-6  # of the mean variance: an input of which the others leave less unexplained is not worth a step


def most_needed(moments: Moments, count: int) -> torch.Tensor:
    """
    Chooses inputs by orthogonal least squares: each step takes the input whose part that the inputs before do not
    explain tells most of what is left of the targets.

    Args:
        moments: Of the inputs and the targets.
        count: How many to choose.

    Returns:
        The chosen inputs, ascending, `(count,)`.
    """
    covariance, left = moments.covariance, moments.cross_covariance  # (inputs, inputs), (inputs, targets)
    variance = covariance.diagonal() + _FLOOR * covariance.diagonal().mean()  # of what is not explained
    factors = covariance.new_zeros(len(covariance), count)  # of the pivoted Cholesky decomposition
    chosen = []
    for step in range(count):
        gain = left.square().sum(dim=1) / variance
        gain[chosen] = -1
        pivot = int(gain.argmax())
        chosen.append(pivot)
        factor = (covariance[:, pivot] - factors[:, :step] @ factors[pivot, :step]) / variance[pivot].sqrt()
        factor[chosen] = 0
        factors[:, step] = factor
        factors[pivot, step] = variance[pivot].sqrt()
        left = left - torch.outer(factor, left[pivot] / variance[pivot].sqrt())
        variance = variance - factor.square()
    return torch.tensor(sorted(chosen), device=covariance.device)


def explained(moments: Moments, kept: torch.Tensor) -> float:
    """How much of the targets' variance, summed, a linear layer explains that has some of the inputs alone."""
    among, products = moments.covariance[kept][:, kept], moments.cross_covariance[kept]
    among.diagonal().add_(_FLOOR * among.diagonal().mean())
    return float((products * torch.linalg.solve(among, products)).sum())

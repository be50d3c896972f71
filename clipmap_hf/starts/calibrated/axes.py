"""The principal axes of a tower's residual stream, laid so that LayerNorm commutes with the map onto them."""

import torch


__all__ = ["residual_axes", "stream_moment"]

_FINAL_WEIGHT = 4.0  # of the final LayerNorm among all: what it loses, no later layer makes good
_EXPONENT = 0.25  # of the mean of a LayerNorm's variances


def residual_axes(read: torch.Tensor, size: int) -> torch.Tensor:
    """
    The operator `F = B Vᵀ (size, width)`: `V` are the main axes of the stream within the vectors of mean zero, `B` is
    an orthonormal basis of those of the student. Its rows and columns sum to zero, so `LN(F x)` is `F LN(x)` but for a
    scalar.

    Args:
        read: Second moments of the LayerNorms' outputs, `(norms, width, width)`, the final LayerNorm's last.
        size: Of the student.
    """
    width = read.shape[-1]
    if size == width:
        return _centering(read).float()
    moment = stream_moment(read)
    moment = moment - moment.trace() / width  # else the vector of ones is no more last than axes of no variance
    axes = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, : size - 1]
    spanning = torch.eye(size, dtype=read.dtype, device=read.device).roll(1, dims=1)
    spanning[:, 0] = 1
    basis = torch.linalg.qr(spanning).Q[:, 1:]  # orthonormal, and orthogonal to the vector of ones
    return (basis @ axes.T).float()


def stream_moment(read: torch.Tensor) -> torch.Tensor:
    """
    The second moment `(width, width)` of a tower's stream within the vectors of mean zero: the mean over its
    LayerNorms, the final LayerNorm weighing more. Each is divided by a mean of its variances along its own axes, the
    fourth power of the mean of their fourth roots. By their sum, a few channels with huge activations, as large models
    have, would leave hardly any weight to the others, and the axes would be those of the layers without such channels.

    Args:
        read: As in `residual_axes`.
    """
    centered = _centering(read) @ read @ _centering(read)
    variances = torch.linalg.eigvalsh(centered).clamp(min=0)
    size = (variances**_EXPONENT).mean(dim=1) ** (1 / _EXPONENT)
    share = centered / size[:, None, None]
    return share[:-1].sum(dim=0) + _FINAL_WEIGHT * share[-1]


def _centering(read: torch.Tensor) -> torch.Tensor:
    width = read.shape[-1]
    return torch.eye(width, dtype=read.dtype, device=read.device) - 1 / width

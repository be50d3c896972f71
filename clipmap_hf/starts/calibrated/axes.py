"""The principal axes of a tower's residual stream, laid so that LayerNorm commutes with the map onto them."""

import torch


__all__ = ["residual_axes", "stream_moment"]

_FINAL_WEIGHT = 4.0  # of the final LayerNorm among all: what it loses, no later layer makes good


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
    axes = torch.linalg.eigh(stream_moment(read)).eigenvectors.flip(1)[:, : size - 1]
    spanning = torch.eye(size, dtype=read.dtype, device=read.device).roll(1, dims=1)
    spanning[:, 0] = 1
    basis = torch.linalg.qr(spanning).Q[:, 1:]  # orthonormal, and orthogonal to the vector of ones
    return (basis @ axes.T).float()


def stream_moment(read: torch.Tensor) -> torch.Tensor:
    """
    The second moment `(width, width)` of a tower's stream within the vectors of mean zero: the mean over its
    LayerNorms, up to a factor, the final LayerNorm weighing more.

    Args:
        read: As in `residual_axes`.
    """
    share = read / read.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    total = share[:-1].sum(dim=0) + _FINAL_WEIGHT * share[-1]
    return _centering(read) @ total @ _centering(read)


def _centering(read: torch.Tensor) -> torch.Tensor:
    width = read.shape[-1]
    return torch.eye(width, dtype=read.dtype, device=read.device) - 1 / width

"""Attention heads made narrower: the combinations of a head's channels that say most."""

import torch
from torch import nn


__all__ = ["by_head", "narrow_scores", "narrow_values", "value_axes"]

_FLOOR = 1e-7  # of the largest eigenvalue: along directions that vary less, nothing is seen as varying


def narrow_scores(query: torch.Tensor, key: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The combinations `A` and `B` of the channels of queries and keys whose scores `(A q)ᵀ(B k)` are nearest to those of
    all channels, over all pairs of tokens: the first singular vectors of `Q½ K½`. A narrower head divides its scores
    by the root of its own width; `A` and `B` make up for that.

    Args:
        query: Second moments of the queries, `(heads, channels, channels)`, in fp64.
        key: Of the keys.
        width: How many combinations; if there are as many as channels, the channels stay as they are.

    Returns:
        `A` and `B`, `(heads, width, channels)`.
    """
    channels = query.shape[-1]
    if width == channels:
        return torch.eye(channels).to(query).expand_as(query), torch.eye(channels).to(key).expand_as(key)
    (query_root, query_inverse), (key_root, key_inverse) = _roots(query), _roots(key)
    left, singular, right = torch.linalg.svd(query_root @ key_root)
    scale = (singular[:, :width, None] * (width / channels) ** 0.5).sqrt()
    return scale * (left[..., :width].mT @ query_inverse), scale * (right[:, :width] @ key_inverse)


def narrow_values(given: torch.Tensor, written: torch.Tensor, width: int) -> torch.Tensor:
    """
    The combinations of the channels of values from which what the heads write can be told best: the first right
    singular vectors of `W C½`. They vary as much as the channels do on average.

    Args:
        given: Covariances of what the heads give, `(heads, channels, channels)`, in fp64.
        written: What `out_proj` makes of it, `(heads, hidden_size, channels)`.
        width: How many combinations; if there are as many as channels, the channels stay as they are.

    Returns:
        `(heads, width, channels)`.
    """
    channels = given.shape[-1]
    if width == channels:
        return torch.eye(channels).to(given).expand_as(given)
    root, inverse = _roots(given)
    axes = torch.linalg.svd(written @ root, full_matrices=False).Vh[:, :width] @ inverse
    return axes * given.diagonal(dim1=1, dim2=2).mean(dim=1).sqrt()[:, None, None]


def value_axes(attention: nn.Module, given: torch.Tensor, residual: torch.Tensor, width: int) -> torch.Tensor:
    """
    The combinations of `narrow_values` for all heads of a layer, of whose writing a student sees the main axes.

    Args:
        attention: The teacher's.
        given: Covariance of what `out_proj` reads, `(hidden_size, hidden_size)`, in fp64.
        residual: The operator of the student's stream.
        width: Of the student's heads.
    """
    written = residual.double() @ attention.out_proj.weight.double()
    blocks = by_head(given, attention.num_heads).unflatten(-1, (attention.num_heads, -1))  # (heads, d, heads, d)
    own = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return narrow_values(own, by_head(written.T, attention.num_heads).mT, width)


def by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Splits the rows by head, `(heads, channels, …)`."""
    return tensor.unflatten(0, (heads, -1))


def _roots(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The square roots of symmetric matrices, and their pseudo-inverses."""
    values, vectors = torch.linalg.eigh(moments)
    seen = values > _FLOOR * values[:, -1:]
    roots, inverses = values.where(seen, 0).sqrt(), values.where(seen, torch.inf).rsqrt()
    return (vectors * roots[:, None]) @ vectors.mT, (vectors * inverses[:, None]) @ vectors.mT

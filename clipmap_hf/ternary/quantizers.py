"""Quantizes float weights to trits (-1, 0 and 1) and levels, with gradients that pass straight through."""

from collections.abc import Callable

import torch


__all__ = [
    "GRANULARITIES",
    "QUANTIZERS",
    "absmean",
    "absmean2",
    "dequantized",
    "grouped",
    "learned_ternary",
    "straight_through",
    "ternarized",
    "twn",
]

GRANULARITIES = ("tensor", "row", "block")  # the weights that share a level
_TWN_THRESHOLD = 0.7  # as a share of the mean magnitude, Li et al. 2016

Groups = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def absmean2(magnitudes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes thresholds and levels as TernaryCLIP does: magnitudes above the mean become twice the mean. 57 % of
    Gaussian weights become zero.

    Args:
        magnitudes: Magnitudes of weights, `(rows, groups, size)`.

    Returns:
        The threshold and the level of each group, both `(rows, groups, 1)`.
    """
    mean = magnitudes.mean(dim=-1, keepdim=True)
    return mean, 2 * mean


def absmean(magnitudes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes thresholds and levels as BitNet b1.58 does: magnitudes above half the mean become the mean. Arguments as
    in `absmean2`.
    """
    mean = magnitudes.mean(dim=-1, keepdim=True)
    return mean / 2, mean


def twn(magnitudes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes thresholds and levels as ternary weight networks do: magnitudes above 0.7 of the mean become the mean of
    these magnitudes. This nearly minimizes the squared error. Arguments as in `absmean2`.
    """
    threshold = _TWN_THRESHOLD * magnitudes.mean(dim=-1, keepdim=True)
    above = magnitudes > threshold
    level = (magnitudes * above).sum(dim=-1, keepdim=True) / above.sum(dim=-1, keepdim=True).clamp(min=1)
    return threshold, level


# `learned` starts with the levels of `twn` and trains them.
QUANTIZERS: dict[str, Groups] = {"absmean": absmean, "absmean2": absmean2, "learned": twn, "twn": twn}


def grouped(weight: torch.Tensor, granularity: str, block_size: int) -> torch.Tensor:
    """
    Reshapes a weight `(rows, …)` to `(rows, groups, size)`, where the weights of a group share a level. With the
    granularity `tensor`, the whole weight is one row.

    Raises:
        ValueError: If a row does not consist of whole blocks.
    """
    if granularity == "tensor":
        return weight.reshape(1, 1, -1)
    rows = weight.flatten(1)
    if granularity == "row":
        return rows[:, None]
    if rows.shape[1] % block_size:
        raise ValueError(
            f"block_size={block_size} does not divide rows of {rows.shape[1]}; take a divisor, or granularity='row'."
        )
    return rows.unflatten(1, (-1, block_size))


def ternarized(
    weight: torch.Tensor, quantizer: str, granularity: str, block_size: int, level: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Quantizes a weight to trits and levels, in the dtypes in which they are stored.

    Args:
        weight: The weight, `(rows, …)`.
        quantizer: A key of `QUANTIZERS`.
        granularity: One of `GRANULARITIES`.
        block_size: Number of weights in a block.
        level: Learned levels `(rows, groups)`. They replace those that the quantizer computes.

    Returns:
        Trits, int8, in the shape of `weight`, and levels `(rows, groups)`, fp16. If a level is too small for fp16 and
        becomes zero, its trits become zero too.
    """
    groups = grouped(weight, granularity, block_size)
    if level is None:
        threshold, found = QUANTIZERS[quantizer](groups.abs())
        trits = groups.sign() * (groups.abs() > threshold)
    else:
        found = level[..., None]
        trits = (groups / found).clamp(-1, 1).round()
    levels = found.half()
    return (trits * (levels != 0)).to(torch.int8).view_as(weight), levels.squeeze(-1)


def dequantized(trits: torch.Tensor, level: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Computes a weight from its trits `(rows, …)` and levels `(rows, groups)` or `(1, 1)`."""
    return (trits.reshape(*level.shape, -1).to(dtype) * level[..., None].to(dtype)).view_as(trits)


def straight_through(weight: torch.Tensor, quantizer: str, granularity: str, block_size: int) -> torch.Tensor:
    """
    Computes the ternary weight exactly. Its gradient passes to `weight` unchanged. Arguments as in `ternarized`.
    """
    with torch.no_grad():
        value = dequantized(*ternarized(weight, quantizer, granularity, block_size), weight.dtype)
    return _redirect_gradient(value, weight)


def learned_ternary(weight: torch.Tensor, level: torch.Tensor, granularity: str, block_size: int) -> torch.Tensor:
    """
    Computes the ternary weight for learned levels, with the gradients of learned step sizes (LSQ, Esser et al. 2020).
    A weight beyond its level gets no gradient. A level gets the gradient of the rounding error, divided by the square
    root of its group's size.

    Args:
        weight: The weight, `(rows, …)`.
        level: The learned levels, `(rows, groups)`.
        granularity: One of `GRANULARITIES`.
        block_size: Number of weights in a block.
    """
    groups = grouped(weight, granularity, block_size)
    level = level[..., None]  # (rows, groups, 1)
    level = _redirect_gradient(level.detach(), level / groups.shape[-1] ** 0.5)
    share = (groups / level).clamp(-1, 1)
    stored = _redirect_gradient(level.detach().half().to(level.dtype), level)
    return (_redirect_gradient(share.detach().round(), share) * stored).view_as(weight)


def _redirect_gradient(value: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Returns `value`, whose gradient goes to `source`."""
    return value + (source - source.detach())  # adds exactly zero

"""From float weights to -1, 0 and 1 times a level: thresholds, levels, and gradients that pass straight through."""

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

GRANULARITIES = ("tensor", "row", "block")  # what has a level of its own
_TWN_THRESHOLD = 0.7  # of the mean magnitude, Li et al. 2016

Groups = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def absmean2(magnitudes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    TernaryCLIP's: what exceeds the mean magnitude becomes twice the mean; 57 % of Gaussian weights become zero.

    Args:
        magnitudes: Of weights, `(rows, groups, size)`.

    Returns:
        The threshold and the level of each group, both `(rows, groups, 1)`.
    """
    mean = magnitudes.mean(dim=-1, keepdim=True)
    return mean, 2 * mean


def absmean(magnitudes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """BitNet b1.58's: what exceeds half the mean magnitude becomes the mean. Arguments as in `absmean2`."""
    mean = magnitudes.mean(dim=-1, keepdim=True)
    return mean / 2, mean


def twn(magnitudes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Ternary weight networks': what exceeds 0.7 of the mean magnitude becomes the mean of what does, which is nearly the
    least squared error. Arguments as in `absmean2`.
    """
    threshold = _TWN_THRESHOLD * magnitudes.mean(dim=-1, keepdim=True)
    above = magnitudes > threshold
    level = (magnitudes * above).sum(dim=-1, keepdim=True) / above.sum(dim=-1, keepdim=True).clamp(min=1)
    return threshold, level


# `learned` starts as `twn`, and trains the levels.
QUANTIZERS: dict[str, Groups] = {"absmean": absmean, "absmean2": absmean2, "learned": twn, "twn": twn}


def grouped(weight: torch.Tensor, granularity: str, block_size: int) -> torch.Tensor:
    """
    A weight `(rows, …)` as `(rows, groups, size)`, where each group has a level of its own; a whole tensor is one row.

    Raises:
        ValueError: If blocks do not divide rows.
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
    The trits of a weight, and their levels as they are stored.

    Args:
        weight: `(rows, …)`.
        quantizer: A key of `QUANTIZERS`.
        granularity: One of `GRANULARITIES`.
        block_size: Weights in a block.
        level: Levels `(rows, groups)` that were learned, instead of those that the quantizer finds.

    Returns:
        Trits as int8 in the shape of `weight`, and levels `(rows, groups)` in fp16; where a level is too small for
        that, and so zero, its trits are too.
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
    """The weight that trits `(rows, …)` and levels `(rows, groups)`, or `(1, 1)`, stand for."""
    return (trits.reshape(*level.shape, -1).to(dtype) * level[..., None].to(dtype)).view_as(trits)


def straight_through(weight: torch.Tensor, quantizer: str, granularity: str, block_size: int) -> torch.Tensor:
    """The ternary weight, exactly, whose gradient is taken for that of `weight`; arguments as in `ternarized`."""
    with torch.no_grad():
        value = dequantized(*ternarized(weight, quantizer, granularity, block_size), weight.dtype)
    return _with_gradient_of(value, weight)


def learned_ternary(weight: torch.Tensor, level: torch.Tensor, granularity: str, block_size: int) -> torch.Tensor:
    """
    The ternary weight of learned levels, with the gradients of learned step sizes (LSQ, Esser et al. 2020): none for
    weights beyond the level, and for levels that of the rounding error, divided by the root of a group's size.

    Args:
        weight: `(rows, …)`.
        level: `(rows, groups)`.
        granularity: One of `GRANULARITIES`.
        block_size: Weights in a block.
    """
    groups = grouped(weight, granularity, block_size)
    level = level[..., None]  # (rows, groups, 1)
    level = _with_gradient_of(level.detach(), level / groups.shape[-1] ** 0.5)
    share = (groups / level).clamp(-1, 1)
    stored = _with_gradient_of(level.detach().half().to(level.dtype), level)
    return (_with_gradient_of(share.detach().round(), share) * stored).view_as(weight)


def _with_gradient_of(value: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return value + (source - source.detach())  # what is added is exactly zero

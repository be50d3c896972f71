"""He et al.'s uniform initialization (the paper's Table 5)."""

import math

import torch


__all__ = ["kaiming"]


def kaiming(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """
    Uniform entries of variance `2 / big`.

    Args:
        shape: `(small, big)` or `(layers, small, big)`.
        generator: Draws the entries.
    """
    bound = math.sqrt(6 / shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)

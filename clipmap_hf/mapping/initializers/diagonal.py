"""Diagonal inheritance (CLIP-Map Eq. 9): each operator keeps the first entries of its space."""

import torch


__all__ = ["diagonal"]


def diagonal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """
    Ones on the diagonal, zeros elsewhere; with one-hot depth this is TinyCLIP's manual inheritance.

    Args:
        shape: `(small, big)` or `(layers, small, big)`.
        generator: Not used.
    """
    return torch.eye(*shape[-2:]).expand(shape).clone()

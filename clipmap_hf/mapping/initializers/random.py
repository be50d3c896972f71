"""Standard normal entries (the paper's Table 5)."""

import torch


__all__ = ["random"]


def random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """
    Entries from N(0, 1).

    Args:
        shape: `(small, big)` or `(layers, small, big)`.
        generator: Draws the entries.
    """
    return torch.randn(shape, generator=generator)

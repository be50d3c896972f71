"""What linear layers compute of a stream, as one matrix: the bias stands beside the weight."""

from collections.abc import Sequence

import torch
from torch import nn


__all__ = ["reading", "set_linear"]


def reading(lifts: tuple[torch.Tensor, torch.Tensor], sources: Sequence[nn.Linear]) -> torch.Tensor:
    """
    What the sources compute, read through lifts, side by side: weight and beside it the bias, `(outputs, inputs + 1)`,
    in fp64.
    """
    readings = []
    for source, weight, bias in zip(sources, *(lift.double().chunk(len(sources)) for lift in lifts), strict=True):
        own = source.weight.double()
        readings.append(torch.cat([own @ weight, (source.bias + own @ bias)[:, None]], dim=1))
    return torch.cat(readings)


def set_linear(linear: nn.Linear, reading: torch.Tensor) -> None:
    """Sets weight and bias to those of a reading, `(outputs, inputs + 1)`."""
    linear.weight.copy_(reading[:, :-1])
    linear.bias.copy_(reading[:, -1])

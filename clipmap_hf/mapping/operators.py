"""Small linear operators along the axes of a tensor and over depth."""

import itertools
from collections.abc import Mapping

import torch
from torch import nn


__all__ = ["Operator", "mix_depth", "project", "project_axes"]


class Operator(nn.Module):
    """
    A trained operator, stored as an initial value plus a delta that starts at zero, so that weight decay pulls towards
    the initial value.

    Args:
        initial: The initial value, `(small, big)` or `(layers, small, big)`.
        decay_to_zero: Store everything in the delta instead, so that weight decay pulls to zero.
    """

    def __init__(self, initial: torch.Tensor, decay_to_zero: bool = False):
        super().__init__()
        self.decay_to_zero = decay_to_zero
        self.register_buffer("initial", torch.zeros_like(initial))
        self.delta = nn.Parameter(torch.zeros_like(initial))
        self.start(initial)

    @torch.no_grad()
    def start(self, initial: torch.Tensor) -> None:
        """Sets the value to `initial`, and where weight decay pulls it."""
        of_decay, other = (self.delta, self.initial) if self.decay_to_zero else (self.initial, self.delta)
        of_decay.copy_(initial)
        other.zero_()

    def forward(self) -> torch.Tensor:
        """The operator's current value."""
        return self.initial + self.delta


def project(tensor: torch.Tensor, operator: torch.Tensor, axis: int) -> torch.Tensor:
    """
    Applies an operator along one axis (Eq. 4, one side of it).

    Args:
        tensor: Any shape with `big` entries along `axis`; the first axis is the layer if the operator has one.
        operator: `(small, big)`, or `(layers, small, big)` to apply another operator in each layer.
        axis: Counted from the end (negative).
    """
    if operator.ndim == 2:
        return (tensor.movedim(axis, -1) @ operator.T).movedim(-1, axis)
    columns = tensor.movedim(axis, 1)  # (layers, big, ...)
    # From the left: then the gradient of the operator, which may be the largest tensor of all, is contiguous.
    result = operator @ columns.flatten(2) if tensor.ndim > 2 else operator @ columns[..., None]
    return result.reshape(*operator.shape[:2], *columns.shape[2:]).movedim(1, axis)


def project_axes(tensor: torch.Tensor, operators: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """
    Applies operators along several axes, in the order that needs the fewest multiplications.

    Args:
        tensor: The tensor.
        operators: `{axis: operator}`, axes counted from the end, as in `project`.
    """

    def cost(order: tuple[int, ...]) -> float:
        size, total = float(tensor.numel()), 0.0
        for axis in order:
            small, big = operators[axis].shape[-2:]
            total += size * small
            size *= small / big
        return total

    for axis in min(itertools.permutations(operators), key=cost):
        tensor = project(tensor, operators[axis], axis)
    return tensor


def mix_depth(tensor: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """
    Mixes layers linearly (Eq. 2).

    Args:
        tensor: Stacked over the teacher's layers, `(teacher_layers, ...)`.
        depth: `(student_layers, teacher_layers)`.
    """
    return torch.tensordot(depth, tensor, dims=1)  # (student_layers, ...)

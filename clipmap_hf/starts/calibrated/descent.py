"""Gradient descent on parts of a student, over batches of streams; it never makes their error larger."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from clipmap_hf.distributed import process_count, sum_over_processes


__all__ = ["Items", "descend", "share_lost", "watched_layers"]

_LEARNING_RATE = 1e-3
_FULL_RATE_STEPS = 50  # fewer have a lower rate: Adam's first step is as long as the rate, however near the goal
_STEP_TOKENS = 2048  # about as many are in a step
_WATCHED = 4  # layers at most, for a stream of each is kept


class Items(Protocol):
    """A batch of items, each of so many tokens."""

    tokens: int

    def __len__(self) -> int: ...


Error = Callable[[Any, torch.Tensor], torch.Tensor]


@torch.enable_grad()
def descend(module: nn.Module, batches: Sequence[Items], steps: int, error: Error) -> None:
    """
    Trains a module by Adam, at a rate that falls linearly. Each step is on some items of a batch, drawn by a seed. If
    the error over all batches is not smaller afterwards, the module gets the weights back that it had.

    Args:
        module: Trained in place; afterwards its parameters need no gradient.
        batches: At least one in each process.
        steps: How many.
        error: From a batch and the items of it to what is to become small.
    """
    parameters = list(module.requires_grad_(True).parameters())
    before, error_before = [parameter.detach().clone() for parameter in parameters], _whole_error(batches, error)
    optimizer = torch.optim.Adam(parameters, lr=_LEARNING_RATE * min(1.0, steps / _FULL_RATE_STEPS))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        streams = batches[int(torch.randint(len(batches), (), generator=generator))]
        count = _STEP_TOKENS // streams.tokens + 1
        items = torch.randperm(len(streams), generator=generator)[:count]
        gradients = torch.autograd.grad(error(streams, items), parameters)
        sum_over_processes(gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient / process_count()
        optimizer.step()
        schedule.step()
    module.requires_grad_(False).zero_grad()
    if not _whole_error(batches, error) < error_before:  # or it is NaN
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


def watched_layers(count: int) -> list[int]:
    """The layers, of so many, behind which descent compares streams: four at most, spread evenly; the last is one."""
    watched = min(count, _WATCHED)
    return [count * (index + 1) // watched - 1 for index in range(watched)]


def share_lost(stream: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    The squared error of a stream as a share of the variance of its target, over all tokens.

    Args:
        stream: `(items, tokens, width)`.
        target: `(items, tokens, width)`.
        weights: How much each token counts, `(items, tokens)`.
    """
    weights = weights[..., None] / weights.sum()
    mean = (weights * target).sum(dim=(0, 1))
    return (weights * (stream - target).square()).sum() / (weights * (target - mean).square()).sum()


@torch.no_grad()
def _whole_error(batches: Sequence[Items], error: Error) -> float:
    """The sum of the errors of all batches, of all processes."""
    total = sum(error(streams, torch.arange(len(streams))).double() for streams in batches).reshape(1)
    sum_over_processes([total])
    return float(total)

"""Starts that need no data: every width operator is filled by its shape and a seed."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from transformers import PreTrainedModel

from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.mapping.plan import MappingPlan
from clipmap_hf.starts.selection.scores import selection


__all__ = ["diagonal", "first_of_heads", "kaiming", "random", "start_by", "xavier"]

Fill = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


def start_by(fill: Fill) -> Callable[[PreTrainedModel, MappingPlan, Iterable], WeightMapper]:
    """The start that fills every operator by `fill`; it does not look at batches."""
    return partial(_start_by, fill)


def _start_by(fill: Fill, teacher: PreTrainedModel, plan: MappingPlan, batches: Iterable) -> WeightMapper:
    generator = torch.Generator().manual_seed(plan.config.seed)
    operators, widths = {}, plan.head_widths()
    for name, shape in plan.operator_shapes().items():
        operators[name] = fill(shape, generator)
        if fill is diagonal and name in widths:
            operators[name] = first_of_heads(shape, *widths[name])
    return WeightMapper(plan, plan.teacher_tensors(teacher), operators, plan.layers_by_rule())


def diagonal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """
    Diagonal inheritance (CLIP-Map Eq. 9): ones on the diagonal, zeros elsewhere, so that each operator keeps the first
    entries of its space. With one-hot depth this is TinyCLIP's manual inheritance.

    Args:
        shape: `(small, big)` or `(layers, small, big)`.
        generator: Not used.
    """
    return torch.eye(*shape[-2:]).expand(shape).clone()


def first_of_heads(shape: tuple[int, ...], small: int, big: int) -> torch.Tensor:
    """
    Diagonal inheritance of heads that become narrower: the first channels of each of the first heads.

    Args:
        shape: `(layers, small, big)`.
        small: Channels of a head of the student.
        big: Channels of a head of the teacher.
    """
    entries = torch.arange(shape[-2])
    return selection(entries // small * big + entries % small, shape[-1]).expand(shape).clone()


def random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """
    Entries from N(0, 1) (the paper's Table 5).

    Args:
        shape: `(small, big)` or `(layers, small, big)`.
        generator: Draws the entries.
    """
    return torch.randn(shape, generator=generator)


def kaiming(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """
    He et al.'s uniform initialization (the paper's Table 5): entries of variance `2 / big`.

    Args:
        shape: `(small, big)` or `(layers, small, big)`.
        generator: Draws the entries.
    """
    bound = math.sqrt(6 / shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def xavier(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """
    Glorot and Bengio's uniform initialization (the paper's Table 5): entries of variance `2 / (small + big)`.

    Args:
        shape: `(small, big)` or `(layers, small, big)`.
        generator: Draws the entries.
    """
    bound = math.sqrt(6 / (shape[-2] + shape[-1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)

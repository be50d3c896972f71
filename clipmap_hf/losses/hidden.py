"""The hidden loss: the streams behind the student's layers lie where the teacher's do (MoPE-CLIP's L_hidn)."""

import math
from collections.abc import Sequence

import torch

from clipmap_hf.models.features import ClipFeatures


__all__ = ["hidden_errors", "hidden_loss"]


def hidden_loss(student: ClipFeatures, *teachers: ClipFeatures) -> torch.Tensor:
    """
    Mean over the batch of the student's `hidden_errors`, which were computed where hidden states are.

    Args:
        student: Features of `batch` pairs, with `hidden_errors`.
        teachers: Not used.

    Raises:
        ValueError: If the student's features have no `hidden_errors`.
    """
    if student.hidden_errors is None:
        raise ValueError("The hidden loss needs features with hidden_errors, which a DistillationStage computes.")
    return student.hidden_errors.mean()


def hidden_errors(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], counts: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Mean squared errors of one tower's streams, summed over the student's layers. Layer `i` of `n` is compared with
    the teacher's layer `i / n` of the way down, so the last with the last.

    Args:
        student: The stream that each layer leaves, `(items, tokens, hidden_size)`.
        teacher: The same of the teacher, with as many tokens, as wide as the student's; no gradient flows into it.
        counts: Which tokens are no padding, `(items, tokens)`; by default all.

    Returns:
        The errors `(items,)`, fp32.
    """
    layers = [math.ceil((index + 1) * len(teacher) / len(student)) - 1 for index in range(len(student))]
    errors = sum(
        (own.float() - teacher[layer].detach().float()).square().mean(dim=-1)
        for own, layer in zip(student, layers, strict=True)
    )  # (items, tokens)
    if counts is None:
        return errors.mean(dim=1)
    return (errors * counts).sum(dim=1) / counts.sum(dim=1)

"""The hidden loss: the student's layers learn the hidden states of the teacher's layers (MoPE-CLIP's L_hidn)."""

import math
from collections.abc import Sequence

import torch

from clipmap_hf.models.features import ClipFeatures


__all__ = ["hidden_errors", "hidden_loss"]


def hidden_loss(student: ClipFeatures, *teachers: ClipFeatures) -> torch.Tensor:
    """
    Computes the mean of the student's `hidden_errors` over the batch. The errors themselves come from the training
    stage, since features hold no hidden states.

    Args:
        student: Features of `batch` pairs, with `hidden_errors`.
        teachers: Not used; all losses share this signature.

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
    Computes the mean squared errors of a tower's hidden states, summed over the student's layers. Layer `i` of the
    student's `n` layers is compared with the teacher's layer at the same relative depth `i / n`. So the last layer is
    compared with the last.

    Args:
        student: The hidden states after each of the student's layers, `(items, tokens, hidden_size)`.
        teacher: The hidden states after each of the teacher's layers, of the same shape. No gradient flows into them.
        counts: 1 for tokens that count, and 0 for padding, `(items, tokens)`. By default, all tokens count.

    Returns:
        The error of each item, `(items,)`, fp32.
    """
    layers = [math.ceil((index + 1) * len(teacher) / len(student)) - 1 for index in range(len(student))]
    errors = sum(
        (states.float() - teacher[layer].detach().float()).square().mean(dim=-1)
        for states, layer in zip(student, layers, strict=True)
    )  # (items, tokens)
    if counts is None:
        return errors.mean(dim=1)
    return (errors * counts).sum(dim=1) / counts.sum(dim=1)

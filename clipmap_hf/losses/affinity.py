"""The soft-label loss: the student learns its teachers' image–text similarities (CLIP-Map Eq. 11, TinyCLIP)."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from clipmap_hf.models.features import ClipFeatures


__all__ = ["affinity_loss"]


def affinity_loss(student: ClipFeatures, *teachers: ClipFeatures) -> torch.Tensor:
    """
    Computes the cross-entropy between the teachers' softmaxed similarities, which are the targets, and the student's.
    The result is the mean of both directions, images among texts and texts among images. Eq. 11 writes their sum;
    `contrastive_loss` says why the mean is used.

    The embedding widths of the models may differ. The targets of several teachers are averaged after the softmax
    (MobileCLIP).

    Args:
        student: Features of `batch` pairs.
        teachers: Each teacher's features of the same pairs. No gradient flows into them.

    Raises:
        ValueError: If there is no teacher.
    """
    if not teachers:
        raise ValueError("The affinity loss needs the features of at least one teacher.")
    logits = student.logits_per_image()  # (batch, batch)
    texts_of_images, images_of_texts = softmaxed(teachers)
    return (F.cross_entropy(logits, texts_of_images) + F.cross_entropy(logits.T, images_of_texts)) / 2


def softmaxed(teachers: Sequence[ClipFeatures]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns the targets of the student: the mean over the teachers of their softmaxed similarities.

    Args:
        teachers: Each teacher's features of `batch` pairs.

    Returns:
        The similarity of each image to all texts, and of each text to all images. Both are `(batch, batch)`, and each
        row sums to 1.
    """
    logits = [teacher.logits_per_image().detach() for teacher in teachers]
    directions = (logits, [matrix.T for matrix in logits])
    return tuple(sum(matrix.softmax(dim=-1) for matrix in matrices) / len(matrices) for matrices in directions)

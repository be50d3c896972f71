"""The relational loss: the divergence of the student's similarities from its teachers' (CLIP-KD's CRD)."""

import torch

from clipmap_hf.losses.affinity import affinity_loss, softmaxed
from clipmap_hf.models.features import ClipFeatures


__all__ = ["relational_loss"]


def relational_loss(student: ClipFeatures, *teachers: ClipFeatures) -> torch.Tensor:
    """
    Computes the Kullback–Leibler divergence of the student's softmaxed similarities from the teachers'. It is the mean
    of image-to-text and text-to-image.

    This is the affinity loss minus the entropy of its targets. Both losses have the same gradient, but this loss is
    zero for a student with the teachers' similarities.

    Args:
        student: Features of `batch` pairs.
        teachers: Each teacher's features of the same pairs. No gradient flows into them.

    Raises:
        ValueError: If there is no teacher.
    """
    cross_entropy = affinity_loss(student, *teachers)
    entropies = [-torch.special.xlogy(rows, rows).sum(dim=-1).mean() for rows in softmaxed(teachers)]
    return cross_entropy - sum(entropies) / len(entropies)

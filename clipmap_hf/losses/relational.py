"""The relational loss: how far the student's similarities are from the teachers', as a divergence (CLIP-KD's CRD)."""

import torch

from clipmap_hf.losses.affinity import affinity_loss, softmaxed
from clipmap_hf.models.features import ClipFeatures


__all__ = ["relational_loss"]


def relational_loss(student: ClipFeatures, *teachers: ClipFeatures) -> torch.Tensor:
    """
    Kullback–Leibler divergence of the student's softmaxed similarities from the teachers', mean of both directions:
    the affinity loss less the entropy of its targets. So it has that loss's gradient, and is zero for a student that
    does what the teachers do.

    Args:
        student: Features of `batch` pairs.
        teachers: Features of the same pairs, of each teacher; no gradient flows into them.

    Raises:
        ValueError: If there is no teacher.
    """
    cross_entropy = affinity_loss(student, *teachers)
    entropies = [-torch.special.xlogy(rows, rows).sum(dim=-1).mean() for rows in softmaxed(teachers)]
    return cross_entropy - sum(entropies) / len(entropies)

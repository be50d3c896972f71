"""The soft-label loss: the student's similarities follow the teachers', both ways (CLIP-Map Eq. 11, TinyCLIP)."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from clipmap_hf.models.features import ClipFeatures


__all__ = ["affinity_loss"]


def affinity_loss(student: ClipFeatures, *teachers: ClipFeatures) -> torch.Tensor:
    """
    Mean of the two cross-entropies between the softmaxed similarities of the teacher (targets) and the student. Eq. 11
    writes their sum, see `contrastive_loss`. The embedding widths of the models may differ. The targets of several
    teachers are averaged after the softmax (MobileCLIP).

    Args:
        student: Features of `batch` pairs.
        teachers: Features of the same pairs, of each teacher; no gradient flows into them.

    Raises:
        ValueError: If there is no teacher.
    """
    if not teachers:
        raise ValueError("The affinity loss needs the features of at least one teacher.")
    logits, targets = student.logits_per_image(), softmaxed(teachers)
    return sum(F.cross_entropy(*both) for both in zip((logits, logits.T), targets, strict=True)) / 2


def softmaxed(teachers: Sequence[ClipFeatures]) -> tuple[torch.Tensor, torch.Tensor]:
    """What images are to find among texts, and texts among images: rows of `(batch, batch)` that sum to one."""
    logits = [one.logits_per_image().detach() for one in teachers]
    return tuple(sum(one.softmax(dim=-1) for one in way) / len(way) for way in (logits, [one.T for one in logits]))

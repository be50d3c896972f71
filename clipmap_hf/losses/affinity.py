"""The soft-label loss: the student's similarities follow the teachers', both ways (CLIP-Map Eq. 11, TinyCLIP)."""

import torch
from torch.nn import functional as F

from clipmap_hf.features import ClipFeatures


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
    logits, targets = student.logits_per_image(), [one.logits_per_image().detach() for one in teachers]
    image_to_text = F.cross_entropy(logits, _mean_softmax(targets))  # (batch, batch)
    text_to_image = F.cross_entropy(logits.T, _mean_softmax([one.T for one in targets]))
    return (image_to_text + text_to_image) / 2


def _mean_softmax(logits: list[torch.Tensor]) -> torch.Tensor:
    return sum(one.softmax(dim=-1) for one in logits) / len(logits)

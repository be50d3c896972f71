"""The soft-label loss: the student's similarities follow the teacher's, both ways (CLIP-Map Eq. 11, TinyCLIP)."""

import torch
from torch.nn import functional as F

from clipmap_hf.features import ClipFeatures


__all__ = ["affinity_loss"]


def affinity_loss(student: ClipFeatures, teacher: ClipFeatures) -> torch.Tensor:
    """
    Mean of the two cross-entropies between the softmaxed similarities of teacher (targets) and student. Eq. 11 writes
    their sum, see `contrastive_loss`. The embedding widths of the two models may differ.

    Args:
        student: Features of `batch` pairs.
        teacher: Features of the same pairs; no gradient flows into them.
    """
    logits, targets = student.logits_per_image(), teacher.logits_per_image().detach()  # (batch, batch)
    image_to_text = F.cross_entropy(logits, targets.softmax(dim=-1))
    text_to_image = F.cross_entropy(logits.T, targets.T.softmax(dim=-1))
    return (image_to_text + text_to_image) / 2

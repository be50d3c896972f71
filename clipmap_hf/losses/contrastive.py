"""The hard-label loss: InfoNCE over the batch, both ways (CLIP-Map Eq. 12)."""

import torch
from torch.nn import functional as F

from clipmap_hf.models.features import ClipFeatures


__all__ = ["contrastive_loss"]


def contrastive_loss(student: ClipFeatures, *teachers: ClipFeatures) -> torch.Tensor:
    """
    Mean of the image-to-text and the text-to-image cross-entropy against the matching pair. Eq. 12 writes their sum;
    the mean is what CLIP and TinyCLIP train, and AdamW does not see the factor (gradient clipping does).

    Args:
        student: Features of `batch` pairs, image `i` belonging to text `i`.
        teachers: Not used; all losses share this signature.
    """
    logits = student.logits_per_image()  # (batch, batch)
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

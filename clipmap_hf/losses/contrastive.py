"""The hard-label loss: InfoNCE over the batch, in both directions (CLIP-Map Eq. 12)."""

import torch
from torch.nn import functional as F

from clipmap_hf.models.features import ClipFeatures


__all__ = ["contrastive_loss"]


def contrastive_loss(student: ClipFeatures, *teachers: ClipFeatures) -> torch.Tensor:
    """
    Computes the cross-entropy against the matching pair, as the mean of image-to-text and text-to-image. Eq. 12 writes
    their sum, but CLIP and TinyCLIP train the mean. The factor does not change AdamW's steps; it only changes gradient
    clipping.

    Args:
        student: Features of `batch` pairs. Image `i` belongs to text `i`.
        teachers: Not used; all losses share this signature.
    """
    logits = student.logits_per_image()  # (batch, batch)
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

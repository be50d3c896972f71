"""The pairwise sigmoid loss: each image and text of the batch, whether they are a pair (SigLIP)."""

import torch
from torch.nn import functional as F

from clipmap_hf.models.features import ClipFeatures


__all__ = ["sigmoid_loss"]


def sigmoid_loss(student: ClipFeatures, *teachers: ClipFeatures) -> torch.Tensor:
    """
    Binary cross-entropy of the logits, a pair being right and every other combination wrong, summed over the texts and
    averaged over the images. As most are wrong, the logits need a bias, which is learned with the weights.

    Args:
        student: Features of `batch` pairs, image `i` belonging to text `i`, with the model's `logit_bias`.
        teachers: Not used; all losses share this signature.
    """
    logits = student.logits_per_image()  # (batch, batch)
    is_pair = torch.eye(len(logits), device=logits.device)
    return F.binary_cross_entropy_with_logits(logits, is_pair, reduction="sum") / len(logits)

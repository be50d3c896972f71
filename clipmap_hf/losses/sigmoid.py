"""The pairwise sigmoid loss: classifies each combination of an image and a text as a pair or not (SigLIP)."""

import torch
from torch.nn import functional as F

from clipmap_hf.models.features import ClipFeatures


__all__ = ["sigmoid_loss"]


def sigmoid_loss(student: ClipFeatures, *teachers: ClipFeatures) -> torch.Tensor:
    """
    Computes the binary cross-entropy of the logits. The target is 1 for a pair and 0 for every other combination. The
    loss is summed over the texts and averaged over the images. As most combinations are no pairs, the logits need a
    bias, which is learned with the weights.

    Args:
        student: Features of `batch` pairs, with the model's `logit_bias`. Image `i` belongs to text `i`.
        teachers: Not used; all losses share this signature.
    """
    logits = student.logits_per_image()  # (batch, batch)
    is_pair = torch.eye(len(logits), device=logits.device)
    return F.binary_cross_entropy_with_logits(logits, is_pair, reduction="sum") / len(logits)

"""The interactive loss: the student's embeddings pick the right pair among the teacher's (CLIP-KD's ICL)."""

import torch
from torch.nn import functional as F

from clipmap_hf.losses.feature import check_widths
from clipmap_hf.models.features import ClipFeatures


__all__ = ["interactive_loss"]


def interactive_loss(student: ClipFeatures, *teachers: ClipFeatures) -> torch.Tensor:
    """
    Mean of two cross-entropies against the matching pair: of the student's images among the teacher's texts, and of
    the student's texts among the teacher's images, at the student's logit scale. Of several teachers, the mean.

    Args:
        student: Features of `batch` pairs, image `i` belonging to text `i`.
        teachers: Features of the same pairs, as wide as the student's; no gradient flows into them.

    Raises:
        ValueError: If there is no teacher, or one of another width.
    """
    check_widths("interactive", student, teachers)
    losses = [
        _among(student.image_embeds, one.text_embeds, student.logit_scale)
        + _among(student.text_embeds, one.image_embeds, student.logit_scale)
        for one in teachers
    ]
    return sum(losses) / (2 * len(losses))


def _among(anchors: torch.Tensor, keys: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    logits = ClipFeatures(anchors, keys.detach(), logit_scale).logits_per_image()  # (batch, batch)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

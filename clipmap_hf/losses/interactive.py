"""The interactive loss: the student's embeddings learn to find their pairs among the teacher's (CLIP-KD's ICL)."""

import torch
from torch.nn import functional as F

from clipmap_hf.losses.feature import check_widths
from clipmap_hf.models.features import ClipFeatures


__all__ = ["interactive_loss"]


def interactive_loss(student: ClipFeatures, *teachers: ClipFeatures) -> torch.Tensor:
    """
    Computes two cross-entropies against the matching pair: the student's images search the teacher's texts, and the
    student's texts search the teacher's images. Both use the student's logit scale. The result is the mean of both,
    and with several teachers also the mean over them.

    Args:
        student: Features of `batch` pairs. Image `i` belongs to text `i`.
        teachers: Each teacher's features of the same pairs, as wide as the student's. No gradient flows into them.

    Raises:
        ValueError: If there is no teacher, or a teacher's embeddings have another width.
    """
    check_widths("interactive", student, teachers)
    losses = [
        _cross_entropy(student.image_embeds, teacher.text_embeds, student.logit_scale)
        + _cross_entropy(student.text_embeds, teacher.image_embeds, student.logit_scale)
        for teacher in teachers
    ]
    return sum(losses) / (2 * len(losses))


def _cross_entropy(anchors: torch.Tensor, keys: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropy of finding key `i` for anchor `i` among all keys."""
    logits = ClipFeatures(anchors, keys.detach(), logit_scale).logits_per_image()  # (batch, batch)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

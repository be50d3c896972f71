"""The feature loss: the student's embeddings lie where the teacher's do (CLIP-KD's FD)."""

import torch
from torch.nn import functional as F

from clipmap_hf.models.features import ClipFeatures


__all__ = ["feature_loss"]


def feature_loss(student: ClipFeatures, *teachers: ClipFeatures) -> torch.Tensor:
    """
    Mean squared error of the normalized image embeddings, plus that of the text embeddings, over the batch and the
    joint dimension; so small that CLIP-KD weighs it by 2000. Of several teachers, the mean.

    Args:
        student: Features of `batch` pairs.
        teachers: Features of the same pairs, as wide as the student's; no gradient flows into them.

    Raises:
        ValueError: If there is no teacher, or one of another width.
    """
    check_widths("feature", student, teachers)
    errors = [
        F.mse_loss(student.image_embeds, one.image_embeds.detach())
        + F.mse_loss(student.text_embeds, one.text_embeds.detach())
        for one in teachers
    ]
    return sum(errors) / len(errors)


def check_widths(name: str, student: ClipFeatures, teachers: tuple[ClipFeatures, ...]) -> None:
    """Raises a `ValueError` for a loss that compares embeddings themselves, if it cannot."""
    if not teachers:
        raise ValueError(f"The {name} loss needs the features of at least one teacher.")
    widths = [student.image_embeds.shape[1], *(one.image_embeds.shape[1] for one in teachers)]
    if len(set(widths)) > 1:
        raise ValueError(
            f"The {name} loss compares embeddings, so the student's width {widths[0]} must be the teachers', but "
            f"theirs are {widths[1:]}."
        )

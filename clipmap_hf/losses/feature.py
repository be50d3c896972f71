"""The feature loss: the student learns its teachers' embeddings (CLIP-KD's FD)."""

import torch
from torch.nn import functional as F

from clipmap_hf.models.features import ClipFeatures


__all__ = ["feature_loss"]


def feature_loss(student: ClipFeatures, *teachers: ClipFeatures) -> torch.Tensor:
    """
    Computes the mean squared error of the student's normalized image embeddings plus that of its text embeddings. Both
    are means over the batch and the joint dimension. With several teachers, the result is the mean over them. Its
    values are so small that CLIP-KD gives this loss the weight 2000.

    Args:
        student: Features of `batch` pairs.
        teachers: Each teacher's features of the same pairs, as wide as the student's. No gradient flows into them.

    Raises:
        ValueError: If there is no teacher, or a teacher's embeddings have another width.
    """
    check_widths("feature", student, teachers)
    errors = [
        F.mse_loss(student.image_embeds, teacher.image_embeds.detach())
        + F.mse_loss(student.text_embeds, teacher.text_embeds.detach())
        for teacher in teachers
    ]
    return sum(errors) / len(errors)


def check_widths(name: str, student: ClipFeatures, teachers: tuple[ClipFeatures, ...]) -> None:
    """
    Checks that a loss can compare a student's embeddings with its teachers'.

    Args:
        name: Name of the loss, for the error message.
        student: The student's features.
        teachers: Each teacher's features.

    Raises:
        ValueError: If there is no teacher, or a teacher's embeddings have another width.
    """
    if not teachers:
        raise ValueError(f"The {name} loss needs the features of at least one teacher.")
    widths = [features.image_embeds.shape[1] for features in (student, *teachers)]
    if len(set(widths)) > 1:
        raise ValueError(
            f"The {name} loss compares embeddings, so all must have the same width, but the student's width is "
            f"{widths[0]} and the teachers' are {widths[1:]}."
        )

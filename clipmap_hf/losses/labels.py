"""The label loss: the student learns its teachers' distribution over a fixed list of texts."""

import torch
from torch.nn import functional as F

from clipmap_hf.models.features import ClipFeatures


__all__ = ["labels_loss"]


def labels_loss(student: ClipFeatures, *teachers: ClipFeatures) -> torch.Tensor:
    """
    Computes the Kullback–Leibler divergence of the student's softmax over the texts from the teachers', as the mean
    over the images. Unlike the relational loss, it has one direction only: images choose among texts.

    The texts are those of a fixed list, so there may be more of them than images, or fewer. The targets of several
    teachers are averaged after the softmax. The result is zero for a student with the teachers' similarities.

    Args:
        student: The student's image embeddings, and the text embeddings that they are compared with: the first
            teacher's.
        teachers: Each teacher's embeddings of the same images and texts. No gradient flows into them.

    Raises:
        ValueError: If there is no teacher.
    """
    if not teachers:
        raise ValueError("The labels loss needs the features of at least one teacher.")
    targets = sum(teacher.logits_per_image().detach().softmax(dim=-1) for teacher in teachers) / len(teachers)
    return F.kl_div(student.logits_per_image().log_softmax(dim=-1), targets, reduction="batchmean")

"""11-point average precision, as PASCAL VOC 2007 scores images that show several classes."""

import torch


__all__ = ["average_precision", "mean_average_precision"]


def average_precision(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """
    Computes the mean, over the recalls 0, 0.1, … 1, of the best precision at this recall or at a higher recall. Ties
    (and NaN) count against the model: among images with equal scores, the wrong images come first.

    Args:
        scores: A score per image `(images,)`. Only their order matters.
        positive: Whether each image shows the class, `(images,)`.

    Raises:
        ValueError: If no image shows the class, or the shapes differ.
    """
    positive = positive.bool()
    if scores.ndim != 1 or scores.shape != positive.shape or not positive.any():
        raise ValueError(
            f"Expected scores (images,) and, for each image, whether it is positive, with at least one positive; "
            f"got shapes {tuple(scores.shape)} and {tuple(positive.shape)} with {int(positive.sum())} positives."
        )
    worst = torch.where(positive, -torch.inf, torch.inf)
    scores = torch.where(scores.isnan(), worst, scores)
    wrong_first = positive.long().argsort(stable=True)
    order = wrong_first[scores[wrong_first].argsort(descending=True, stable=True)]
    hits = positive[order].cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1, device=hits.device)
    # Recall is compared as integers: hits / positives >= tenth / 10.
    reached = [10 * hits >= tenth * hits[-1] for tenth in range(11)]
    return sum(precision[there].max().item() for there in reached) / len(reached)


def mean_average_precision(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """
    Computes the mean of `average_precision` over the classes that occur.

    Args:
        scores: Scores `(images, classes)`.
        labels: 1 where an image shows a class, otherwise 0, `(images, classes)`.

    Raises:
        ValueError: If no image shows any class, or the shapes differ.
    """
    if scores.ndim != 2 or scores.shape != labels.shape or not labels.any():
        raise ValueError(
            f"Expected scores and labels (images, classes) with a positive label; "
            f"got shapes {tuple(scores.shape)} and {tuple(labels.shape)} with {int(labels.sum())} positives."
        )
    occurring = labels.any(dim=0).nonzero().flatten().tolist()
    return sum(average_precision(scores[:, index], labels[:, index]) for index in occurring) / len(occurring)

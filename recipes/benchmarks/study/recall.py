"""Recall both ways: image to text, and text to image."""

from collections.abc import Mapping, Sequence

from study.tables import spread


WAYS, KS = ("image_to_text", "text_to_image"), (1, 5, 10)


def mean_recall(recall: Mapping[str, float], k: int) -> float:
    """Averages recall@k over both ways."""
    return sum(recall[f"{way}_recall@{k}"] for way in WAYS) / len(WAYS)


def recall_columns(recalls: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Writes the recall of all seeds in percent, image to text / text to image, in a column for each k."""
    return {
        f"R@{k}": " / ".join(spread([100 * recall[f"{way}_recall@{k}"] for recall in recalls]) for way in WAYS)
        for k in KS
    }

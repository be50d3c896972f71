"""11-point average precision against values computed by hand."""

import pytest
import torch

from clipmap_hf.evaluation.average_precision import average_precision, mean_average_precision


def ap(scores: list[float], positive: list[int]) -> float:
    return average_precision(torch.tensor(scores), torch.tensor(positive))


def test_the_best_precision_at_each_recall_or_above_is_averaged():
    # Ranked: right, wrong, right, wrong. Precision 1 up to recall 0.5, six points; 2/3 for the other five.
    assert ap([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0]) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    # Ranked: wrong, right, right. The precision at recall 1, 2/3, is better than that at 0.5 and counts there too.
    assert ap([0.9, 0.8, 0.7], [0, 1, 1]) == pytest.approx(2 / 3)
    # One right image in third place: 1/3 at every recall.
    assert ap([0.1, 0.2, 0.3], [1, 0, 0]) == pytest.approx(1 / 3)


def test_a_recall_of_exactly_a_tenth_counts_for_it():
    # Ten right images; the first alone in front, then ninety wrong: precision 1 at recalls 0 and 0.1 only.
    scores = torch.arange(100, 0, -1).float()
    positive = torch.zeros(100)
    positive[0] = 1
    positive[91:] = 1
    assert average_precision(scores, positive) == pytest.approx((2 * 1 + 9 * 10 / 100) / 11)


def test_a_perfect_ranking_has_one_and_the_order_of_images_does_not_matter():
    assert ap([0.3, 0.9, 0.1, 0.8], [0, 1, 0, 1]) == 1.0
    assert ap([0.1, 0.3, 0.8, 0.9], [0, 0, 1, 1]) == 1.0


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("positive", [[1, 0, 0, 0], [0, 0, 0, 1]])
def test_ties_count_against_the_model(value, positive):
    assert ap([value] * 4, positive) == pytest.approx(1 / 4)


def test_the_mean_is_over_classes_that_occur():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.2, 0.5], [0.7, 0.3, 0.5]])
    labels = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert mean_average_precision(scores, labels) == pytest.approx((1 + 1 / 3) / 2)


def test_what_cannot_be_scored_is_an_error():
    with pytest.raises(ValueError, match="with 0 positives"):
        ap([0.1, 0.2], [0, 0])
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        ap([0.1, 0.2], [1, 0, 0])
    with pytest.raises(ValueError, match="with 0 positives"):
        mean_average_precision(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(2, 4\)"):
        mean_average_precision(torch.zeros(2, 3), torch.ones(2, 4))

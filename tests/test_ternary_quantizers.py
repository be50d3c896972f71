import pytest
import torch

from clipmap_hf.ternary.quantizers import (
    GRANULARITIES,
    QUANTIZERS,
    absmean,
    absmean2,
    dequantized,
    grouped,
    learned_ternary,
    straight_through,
    ternarized,
    twn,
)


ROW = torch.tensor([[0.1, -0.2, 0.3, -1.4, 0.5, 0.0]])  # mean magnitude 5/12
each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)
each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("quantizer", "threshold", "level"),
    [(absmean2, 5 / 12, 10 / 12), (absmean, 5 / 24, 5 / 12), (twn, 0.7 * 5 / 12, (0.3 + 1.4 + 0.5) / 3)],
)
def test_thresholds_and_levels_are_those_of_the_papers(quantizer, threshold, level):
    found = quantizer(ROW.abs()[:, None])
    torch.testing.assert_close(torch.stack(found).flatten(), torch.tensor([threshold, level]), rtol=1e-6, atol=0)


def test_weights_beyond_the_threshold_become_the_level_with_their_sign():
    trits, level = ternarized(ROW, "absmean2", "row", 1)
    assert trits.tolist() == [[0, 0, 0, -1, 1, 0]]
    torch.testing.assert_close(dequantized(trits, level), trits * level.float(), rtol=0, atol=0)


@pytest.mark.parametrize(("quantizer", "zeros"), [("absmean2", 0.575), ("absmean", 0.31), ("twn", 0.424)])
def test_as_many_gaussian_weights_become_zero_as_the_formulas_say(quantizer, zeros):
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    trits, _ = ternarized(weight, quantizer, "row", 1)
    torch.testing.assert_close((trits == 0).float().mean().item(), zeros, rtol=0, atol=0.005)


@pytest.mark.parametrize(("granularity", "levels"), [("tensor", (1, 1)), ("row", (6, 1)), ("block", (6, 3))])
def test_tensors_rows_or_blocks_have_a_level_of_their_own(weight, granularity, levels):
    trits, level = ternarized(weight, "absmean", granularity, 8)
    assert level.shape == levels and level.dtype == torch.float16 and trits.shape == weight.shape
    means = grouped(weight, granularity, 8).abs().mean(-1)
    torch.testing.assert_close(level.float(), means, rtol=1e-3, atol=0)


def test_convolutions_have_rows_too():
    trits, level = ternarized(torch.randn(4, 3, 2, 2), "twn", "row", 1)
    assert trits.shape == (4, 3, 2, 2) and level.shape == (4, 1)
    assert dequantized(trits, level).shape == (4, 3, 2, 2)


def test_blocks_that_do_not_divide_a_row_are_refused(weight):
    with pytest.raises(ValueError, match="block_size=7 does not divide rows of 24"):
        ternarized(weight, "twn", "block", 7)


@each_quantizer
def test_rows_of_zeros_stay_zero(quantizer):
    trits, level = ternarized(torch.zeros(2, 5), quantizer, "row", 1)
    assert not trits.any() and level.isfinite().all()


@each_granularity
@each_quantizer
def test_training_sees_exactly_what_is_stored(weight, quantizer, granularity):
    stored = dequantized(*ternarized(weight, quantizer, granularity, 8))
    seen = straight_through(weight.requires_grad_(), quantizer, granularity, 8)
    torch.testing.assert_close(seen.detach(), stored, rtol=0, atol=0)


@each_quantizer
def test_gradients_pass_straight_through(weight, quantizer):
    weight.requires_grad_()
    slope = torch.randn(6, 24)
    (straight_through(weight, quantizer, "row", 1) * slope).sum().backward()
    torch.testing.assert_close(weight.grad, slope, rtol=0, atol=0)


@each_granularity
def test_learned_levels_are_seen_as_they_are_stored(weight, granularity):
    level = ternarized(weight, "learned", granularity, 8)[1].float() * 1.1
    stored = dequantized(*ternarized(weight, "learned", granularity, 8, level))
    seen = learned_ternary(weight, level, granularity, 8)
    torch.testing.assert_close(seen, stored, rtol=0, atol=0)


def test_learned_levels_have_the_gradient_of_the_rounding_error():
    weight = torch.tensor([[0.2, 0.8, 3.0]], requires_grad=True)
    level = torch.tensor([[1.0]], requires_grad=True)
    learned_ternary(weight, level, "row", 1).sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[1.0, 1.0, 0.0]]))
    error = (0 - 0.2) + (1 - 0.8) + 1
    torch.testing.assert_close(level.grad, torch.tensor([[error / 3**0.5]]))

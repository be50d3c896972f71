"""Layers solved from sums over tokens are those of least squares."""

import pytest
import torch

from clipmap_hf.starts.calibrated.moments import Moments


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 8, generator=generator) + torch.arange(8.0)
    return inputs, torch.randn(500, 3, generator=generator)


def summed(inputs, targets, weights=None, batches: int = 4) -> Moments:
    moments = Moments(inputs.shape[1], targets.shape[1])
    weights = torch.ones(len(inputs)) if weights is None else weights
    for batch in zip(*(one.chunk(batches) for one in (inputs, targets, weights)), strict=True):
        moments.add(*batch)
    return moments


def test_a_linear_layer_is_found_again(tokens):
    inputs, _ = tokens
    weight, bias = torch.randn(3, 8), torch.randn(3)
    found = summed(inputs, inputs @ weight.T + bias).solve(0.0)
    torch.testing.assert_close(found[0], weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], bias, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_error_is_the_least(tokens, ridge):
    inputs, targets = tokens
    weight, bias = summed(inputs, targets).solve(ridge)
    centered, variance = inputs - inputs.mean(dim=0), inputs.var(dim=0, correction=0).mean()
    padded = torch.cat([centered, (ridge * variance * len(inputs)).sqrt() * torch.eye(8)])
    wanted = torch.cat([targets - targets.mean(dim=0), torch.zeros(8, 3)])
    expected = torch.linalg.lstsq(padded.double(), wanted.double()).solution.T.float()
    torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(bias, targets.mean(dim=0) - expected @ inputs.mean(dim=0), atol=1e-4, rtol=1e-4)


def test_batches_do_not_matter(tokens):
    for one, two in zip(summed(*tokens, batches=1).solve(1e-3), summed(*tokens, batches=7).solve(1e-3), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_a_token_of_weight_two_counts_as_two(tokens):
    inputs, targets = tokens
    doubled = summed(torch.cat([inputs, inputs[:100]]), torch.cat([targets, targets[:100]]))
    weights = torch.ones(500)
    weights[:100] = 2
    weighted = summed(inputs, targets, weights)
    for one, two in zip(doubled.solve(1e-3), weighted.solve(1e-3), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_the_covariance_is_that_of_the_inputs(tokens):
    inputs, _ = tokens
    moments = Moments(8)
    moments.add(inputs)
    torch.testing.assert_close(moments.covariance.float(), inputs.T.cov(correction=0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("diagonal", [False, True])
def test_mean_and_variance_are_those_of_the_inputs(tokens, diagonal):
    inputs, _ = tokens
    moments = Moments(8, diagonal=diagonal)
    for batch in inputs.split(120):
        moments.add(batch)
    assert moments.input_input.shape == ((8,) if diagonal else (8, 8)) and moments.mean.dtype == torch.float64
    torch.testing.assert_close(moments.mean, inputs.double().mean(dim=0), atol=1e-12, rtol=0)
    torch.testing.assert_close(moments.variance, inputs.double().var(dim=0, correction=0), atol=1e-10, rtol=0)


@pytest.mark.parametrize("diagonal", [False, True])
def test_weights_count_in_mean_and_variance(tokens, diagonal):
    inputs, _ = tokens
    weights = torch.ones(500)
    weights[:100] = 3
    repeated = torch.cat([inputs, inputs[:100], inputs[:100]]).double()
    moments = Moments(8, diagonal=diagonal)
    moments.add(inputs, weights=weights)
    assert moments.weight == 700
    torch.testing.assert_close(moments.mean, repeated.mean(dim=0), atol=1e-12, rtol=0)
    torch.testing.assert_close(moments.variance, repeated.var(dim=0, correction=0), atol=1e-10, rtol=0)


def test_the_second_moment_keeps_the_mean(tokens):
    inputs, _ = tokens
    moments = Moments(8)
    moments.add(inputs)
    torch.testing.assert_close(moments.second_moment, (inputs.T.double() @ inputs.double()) / 500, atol=1e-9, rtol=0)
    expected = moments.covariance + torch.outer(moments.mean, moments.mean)
    torch.testing.assert_close(moments.second_moment, expected, atol=1e-9, rtol=0)


def test_nothing_to_solve_from_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        Moments(2, 1).solve(1e-3)
    moments = Moments(2, 1)
    moments.add(torch.ones(4, 2), torch.ones(4, 1))
    with pytest.raises(ValueError, match="same for all tokens"):
        moments.solve(1e-3)

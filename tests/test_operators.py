import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipmap_hf.mapping.operators import Operator, mix_depth, project, project_axes


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "axis", "equation"),
    [
        ((6,), -1, "a,sa->s"),
        ((6, 5), -1, "ab,sb->as"),
        ((6, 5), -2, "ab,sa->sb"),
        ((6, 3, 2, 2), -4, "abcd,sa->sbcd"),
        ((6, 3, 2, 4), -1, "abcd,sd->abcs"),
    ],
    ids=["vector", "matrix in", "matrix out", "convolution out", "convolution last"],
)
def test_a_shared_operator_is_applied_along_its_axis(shape, axis, equation):
    tensor, operator = draw(*shape), draw(4, shape[axis], seed=1)
    result = project(tensor, operator, axis)
    torch.testing.assert_close(result, torch.einsum(equation, tensor, operator), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("shape", "axis", "equation"),
    [((3, 6), -1, "la,sa->ls"), ((3, 6, 5), -1, "lab,sb->las"), ((3, 6, 5), -2, "lab,sa->lsb")],
    ids=["vectors", "matrices in", "matrices out"],
)
def test_a_shared_operator_is_applied_to_every_layer(shape, axis, equation):
    tensor, operator = draw(*shape), draw(4, shape[axis], seed=1)
    result = project(tensor, operator, axis)
    torch.testing.assert_close(result, torch.einsum(equation, tensor, operator), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("shape", "axis", "equation"),
    [
        ((3, 6), -1, "la,lsa->ls"),
        ((3, 6, 5), -1, "lab,lsb->las"),
        ((3, 6, 5), -2, "lab,lsa->lsb"),
        ((3, 6, 2, 2, 5), -4, "labcd,lsa->lsbcd"),
    ],
    ids=["vectors", "matrices in", "matrices out", "convolutions out"],
)
def test_a_layered_operator_is_applied_to_its_own_layer(shape, axis, equation):
    tensor, operator = draw(*shape), draw(3, 4, shape[axis], seed=1)
    result = project(tensor, operator, axis)
    torch.testing.assert_close(result, torch.einsum(equation, tensor, operator), atol=1e-12, rtol=0)


@pytest.mark.parametrize("axis", [-1, -2])
def test_the_gradient_of_a_layered_operator_is_contiguous(axis):
    """The largest tensors of a mapping: AdamW and its all-reduce would copy one that is not."""
    tensor, operator = draw(3, 6, 5), draw(3, 4, (3, 6, 5)[axis], seed=1).requires_grad_()
    project(tensor, operator, axis).sum().backward()
    assert operator.grad.is_contiguous()
    equation = {-1: "lab,lsb->las", -2: "lab,lsa->lsb"}[axis]
    (expected,) = torch.autograd.grad(torch.einsum(equation, tensor, operator).sum(), operator)
    torch.testing.assert_close(operator.grad, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("layered", [False, True], ids=["shared", "one layered"])
def test_axes_may_be_given_in_any_order(layered):
    tensor = draw(3, 6, 5)
    operators = {-1: draw(2, 5, seed=1), -2: draw(3, 4, 6, seed=2) if layered else draw(4, 6, seed=2)}
    expected = torch.einsum("lab,sb,lta->lts", tensor, operators[-1], operators[-2].expand(3, 4, 6))
    for order in itertools.permutations(operators):
        result = project_axes(tensor, {axis: operators[axis] for axis in order})
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)


def test_no_operator_leaves_a_tensor_as_it_is():
    tensor = draw(6, 5)
    assert project_axes(tensor, {}) is tensor


@pytest.mark.parametrize("order", [(-1, -2), (-2, -1)], ids=str)
@pytest.mark.parametrize(
    ("out", "into", "multiplications"),
    [
        ((8, 64), (4, 16), 4 * 16 * 64 + 8 * 64 * 4),  # the input side first
        ((4, 64), (12, 16), 4 * 64 * 16 + 12 * 16 * 4),  # the output side first
    ],
    ids=["in first", "out first"],
)
def test_the_cheaper_order_is_taken(out, into, multiplications, order):
    operators = {-1: draw(*into), -2: draw(*out)}
    with FlopCounterMode(display=False) as counter:
        project_axes(draw(out[1], into[1]), {axis: operators[axis] for axis in order})
    assert counter.get_total_flops() == 2 * multiplications


def test_depth_mixes_whole_layers():
    tensor, depth = draw(4, 3, 5), draw(2, 4, seed=1)
    expected = torch.einsum("ml,lab->mab", depth, tensor)
    torch.testing.assert_close(mix_depth(tensor, depth), expected, atol=1e-12, rtol=0)


def test_depth_mixes_vectors():
    tensor, depth = draw(4, 5), draw(2, 4, seed=1)
    torch.testing.assert_close(mix_depth(tensor, depth), depth @ tensor, atol=1e-12, rtol=0)


@pytest.mark.parametrize("decay_to_zero", [False, True])
def test_an_operator_starts_at_its_initial_value(decay_to_zero):
    initial = draw(3, 4, 6)
    operator = Operator(initial, decay_to_zero)
    torch.testing.assert_close(operator(), initial, atol=0, rtol=0)
    assert not initial.requires_grad and operator().requires_grad


def test_an_operator_is_its_initial_value_plus_a_delta():
    initial, change = draw(4, 6), draw(4, 6, seed=1)
    operator = Operator(initial)
    torch.testing.assert_close(operator.delta.detach(), torch.zeros_like(initial), atol=0, rtol=0)
    operator.delta.data += change
    torch.testing.assert_close(operator().detach(), initial + change, atol=0, rtol=0)
    torch.testing.assert_close(operator.initial, initial, atol=0, rtol=0)


def test_decay_to_zero_keeps_everything_in_the_delta():
    initial = draw(4, 6)
    operator = Operator(initial, decay_to_zero=True)
    torch.testing.assert_close(operator.delta.detach(), initial, atol=0, rtol=0)
    torch.testing.assert_close(operator.initial, torch.zeros_like(initial), atol=0, rtol=0)


@pytest.mark.parametrize("decay_to_zero", [False, True])
def test_an_operator_does_not_share_memory_with_what_it_starts_from(decay_to_zero):
    initial = draw(4, 6)
    operator, before = Operator(initial, decay_to_zero), initial.clone()
    initial.zero_()
    torch.testing.assert_close(operator().detach(), before, atol=0, rtol=0)


def test_the_initial_value_is_saved_but_not_trained():
    operator = Operator(draw(4, 6))
    assert [name for name, _ in operator.named_parameters()] == ["delta"]
    assert set(operator.state_dict()) == {"initial", "delta"}
    other = Operator(torch.zeros(4, 6, dtype=torch.float64))
    other.load_state_dict(operator.state_dict())
    torch.testing.assert_close(other(), operator(), atol=0, rtol=0)

import math

import pytest
import torch

from clipmap_hf.mapping.operators import project
from clipmap_hf.starts.free import diagonal, kaiming, random, xavier


SHAPES = [(8, 12), (3, 8, 12), (8, 8)]
FILLS = {"diagonal": diagonal, "kaiming": kaiming, "random": random, "xavier": xavier}
VARIANCES = {  # of the entries of a (small, big) operator
    "kaiming": lambda small, big: 2 / big,
    "random": lambda small, big: 1.0,
    "xavier": lambda small, big: 2 / (small + big),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", FILLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_operator_has_the_shape_asked_for(name, shape):
    operator = FILLS[name](shape, seeded())
    assert operator.shape == shape and operator.dtype == torch.float32
    operator[..., 0, 0] = 5.0  # layers must not share memory
    assert operator.is_contiguous()


@pytest.mark.parametrize("name", FILLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_seed_decides_everything(name, shape):
    torch.manual_seed(1)
    first = FILLS[name](shape, seeded())
    torch.manual_seed(2)
    torch.testing.assert_close(FILLS[name](shape, seeded()), first, atol=0, rtol=0)
    assert name == "diagonal" or not torch.equal(FILLS[name](shape, seeded(1)), first)


@pytest.mark.parametrize("name", sorted(set(FILLS) - {"diagonal"}))
@pytest.mark.parametrize("shape", [(128, 384), (4, 64, 192)], ids=str)
def test_random_entries_have_their_variance_and_no_mean(name, shape):
    operator = FILLS[name](shape, seeded()).double()
    variance = VARIANCES[name](*shape[-2:])
    torch.testing.assert_close(operator.var().item(), variance, rtol=0.02, atol=0)
    assert abs(operator.mean()) < 4 * math.sqrt(variance / operator.numel())


@pytest.mark.parametrize("name", ["kaiming", "xavier"])
def test_uniform_entries_are_bounded(name):
    operator = FILLS[name]((128, 384), seeded())
    bound = math.sqrt(3 * VARIANCES[name](128, 384))
    assert 0.99 * bound < operator.abs().max() <= bound


@pytest.mark.parametrize("name", sorted(set(FILLS) - {"diagonal"}))
def test_layers_are_drawn_independently(name):
    first, second = FILLS[name]((2, 8, 12), seeded())
    assert not torch.equal(first, second)


def test_diagonal_selects_the_first_entries():
    tensor = torch.randn(3, 12, 5, generator=seeded())
    torch.testing.assert_close(project(tensor, diagonal((8, 12), seeded()), -2), tensor[:, :8], atol=0, rtol=0)
    torch.testing.assert_close(project(tensor, diagonal((3, 8, 12), seeded()), -2), tensor[:, :8], atol=0, rtol=0)


def test_diagonal_of_the_same_size_is_the_identity():
    torch.testing.assert_close(diagonal((8, 8), seeded()), torch.eye(8), atol=0, rtol=0)

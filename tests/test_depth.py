import itertools

import pytest
import torch

from clipmap_hf.mapping.depth import DEPTH_RULES, interval_front, most_changing, one_hot_depth, spread
from clipmap_hf.mapping.operators import mix_depth


ALL_DEPTHS = [(big, small) for big, small in itertools.product(range(1, 13), repeat=2) if small <= big]


@pytest.mark.parametrize(
    ("student_layers", "layers"),
    [
        (12, list(range(12))),
        (10, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (6, [0, 2, 4, 6, 8, 10]),
        (5, [0, 2, 4, 6, 8]),
        (4, [0, 3, 6, 9]),
        (3, [0, 4, 8]),
        (2, [0, 6]),
        (1, [0]),
    ],
    ids=str,
)
def test_interval_front_is_tinyclips_rule(student_layers, layers):
    assert interval_front(12, student_layers) == layers


@pytest.mark.parametrize(
    ("teacher_layers", "student_layers", "layers"),
    [(12, 4, [0, 4, 7, 11]), (12, 2, [0, 11]), (12, 1, [11]), (12, 12, list(range(12))), (4, 3, [0, 2, 3])],
    ids=str,
)
def test_spread_is_evenly_spaced(teacher_layers, student_layers, layers):
    assert spread(teacher_layers, student_layers) == layers


@pytest.mark.parametrize("name", DEPTH_RULES)
def test_layers_are_of_the_teacher_and_strictly_increasing(name):
    for teacher_layers, student_layers in ALL_DEPTHS:
        layers = DEPTH_RULES[name](teacher_layers, student_layers)
        assert len(layers) == student_layers
        assert layers[0] >= 0 and layers[-1] < teacher_layers
        assert all(a < b for a, b in itertools.pairwise(layers)), (teacher_layers, student_layers)


def test_spread_has_the_last_layer_and_the_first_if_there_is_room():
    for teacher_layers, student_layers in ALL_DEPTHS:
        layers = spread(teacher_layers, student_layers)
        assert layers[-1] == teacher_layers - 1
        assert student_layers == 1 or layers[0] == 0


def test_one_hot_depth_copies_the_listed_layers():
    depth = one_hot_depth([0, 2, 3], 4)
    expected = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(depth, expected, atol=0, rtol=0)
    tensor = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mix_depth(tensor, depth), tensor[[0, 2, 3]], atol=0, rtol=0)


def test_the_layers_that_turn_the_stream_most_are_kept_in_their_order():
    changed = torch.tensor([0.3, 0.1, 0.5, 0.2, 0.4])
    assert most_changing(changed, 1) == [2]
    assert most_changing(changed, 3) == [0, 2, 4]
    assert most_changing(changed, 5) == [0, 1, 2, 3, 4]

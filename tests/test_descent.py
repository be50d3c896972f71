"""Gradient steps on a part of a student never make its error larger, however few or many they are."""

import dataclasses
from functools import partial

import pytest
import torch
from calibrated_starts import NARROW, TOWERS, frugal, losses, nearness, random_pairs, split, started
from torch import nn

from clipmap_hf.models.towers import Tower
from clipmap_hf.starts.calibrated import refit
from clipmap_hf.starts.calibrated.descent import descend, share_lost, watched_layers
from clipmap_hf.starts.calibrated.streams import Streams


STEPS = (1, 3, 20, 60, 200)


def streams_of(seed: int) -> Streams:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, 5, 8, generator=generator)
    return Streams(torch.ones(64, 5), torch.zeros(64, dtype=torch.long), inputs, inputs, inputs)


@pytest.fixture
def batches() -> list[Streams]:
    return [streams_of(seed) for seed in range(3)]


def error_of(module: nn.Module, goal: nn.Module):
    return lambda streams, items: (module(streams.first[items]) - goal(streams.first[items])).square().mean()


@torch.no_grad()
def whole_error(module: nn.Module, goal: nn.Module, batches: list[Streams]) -> float:
    return sum(float((module(one.first) - goal(one.first)).square().mean()) for one in batches)


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_a_solution_stays_as_it_is(batches, steps):
    """To the last bit: Adam would leave it at its first step."""
    torch.manual_seed(0)
    module, goal = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)
    module.load_state_dict(goal.state_dict())
    module.weight.data[0, 0] += 1e-6  # or its gradient would be zero
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    descend(module, batches, steps, error_of(module, goal))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_more_steps_leave_a_smaller_error(batches):
    torch.manual_seed(0)
    start, goal = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)
    errors = [whole_error(start, goal, batches)]
    for steps in STEPS:
        module = nn.Linear(8, 8)
        module.load_state_dict(start.state_dict())
        descend(module, batches, steps, error_of(module, goal))
        errors.append(whole_error(module, goal, batches))
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False)), errors


def test_an_error_that_is_no_number_leaves_the_weights(batches):
    module = nn.Linear(8, 8)
    before = module.weight.detach().clone()
    descend(module, batches, 2, lambda streams, items: module(streams.first[items]).mean() * torch.nan)
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_few_steps_do_not_ruin_a_student_that_solving_makes_exact(shared_teacher, steps):
    teacher = frugal(shared_teacher)
    batches = split(random_pairs(shared_teacher.config, 64), 24)
    others = random_pairs(shared_teacher.config, 32, seed=1)
    solved, descended = (
        nearness(started(teacher, dataclasses.replace(NARROW, refit_steps=count), batches), teacher, others)
        for count in (0, steps)
    )
    for tower in TOWERS:
        assert solved[tower] > 0.99 and descended[tower] > solved[tower] - 1e-3, (solved, descended)


@pytest.mark.parametrize(
    ("layers", "expected"), [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (6, [0, 2, 3, 5]), (12, [2, 5, 8, 11])]
)
def test_the_streams_of_four_layers_at_most_are_watched_and_the_last_is_one(layers, expected):
    assert watched_layers(layers) == expected


def test_what_a_stream_loses_is_a_share_of_its_target_s_variance():
    """Of a constant nothing but the mean is right; padding does not count."""
    target = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[1.0, 1, 1, 1, 0]]).expand(6, 5)
    counted = target[:, :4].flatten(0, 1)
    constant = counted.mean(dim=0).expand_as(target).clone()
    constant[:, 4] = 1e6
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(share_lost(constant, target, weights), torch.tensor(1.0))
    close(share_lost(target, target, weights), torch.tensor(0.0))
    close(share_lost((target + constant) / 2, target, weights), torch.tensor(0.25))


def test_watched_streams_come_nearer_than_those_that_are_not_watched(shared_teacher, monkeypatch):
    batches, config = split(random_pairs(shared_teacher.config, 64), 16), dataclasses.replace(NARROW, refit_steps=100)
    pairs = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    watching = started(shared_teacher, config, batches)
    monkeypatch.setattr(refit, "watched_layers", lambda count: [])
    blind = started(shared_teacher, config, batches)
    for tower in TOWERS:
        layers = list(range(1, len(Tower(shared_teacher, tower).layers) + 1))
        nearer, farther = (sum(losses(mapper, shared_teacher, tower, pairs, layers)) for mapper in (watching, blind))
        assert nearer < 0.95 * farther, (tower, nearer, farther)

"""For how many steps AdamW goes, how fast at which, and what it decays."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from calibrated_starts import random_pairs, split, started
from transformers import CLIPModel

from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.starts import start_mapper
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.optimization import (
    adamw,
    learning_rate_at,
    parameter_groups,
    ramp_length,
    step_count,
    steps_or_share,
    warn_of_warmup,
)
from clipmap_hf.training.stages.contrastive import ContrastiveStage
from clipmap_hf.training.stages.mapping import MappingStage


SMALL = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2), text=TowerConfig(hidden_size=16, num_hidden_layers=1)
)


# What decays


def names_by_decay(module: torch.nn.Module) -> dict[float, set[str]]:
    """The trainable parameters by their decay, of which 0.3 is asked; each is in one group."""
    groups = parameter_groups(module, weight_decay=0.3)
    names, found = {id(p): name for name, p in module.named_parameters()}, {0.0: set(), 0.3: set()}
    for group in groups:
        found[group["weight_decay"]] |= {names[id(p)] for p in group["params"]}
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and all(group["params"] for group in groups)
    assert set(grouped) == {id(p) for p in module.parameters() if p.requires_grad}
    return found


def test_parameter_groups_decay_matrices_only(tiny_config):
    model = CLIPModel(tiny_config())
    found = names_by_decay(ContrastiveStage(model, learn_logit_scale=True))
    assert found[0.3] | found[0.0] == {f"trained.{name}" for name, _ in model.named_parameters()}
    for name in found[0.3]:
        assert name.endswith("weight") and "norm" not in name and "position" not in name
    for name in found[0.0]:
        assert name.endswith(("bias", "class_embedding", "logit_scale")) or "norm" in name or "position" in name


def test_scalars_have_a_group_of_their_own(tiny_config):
    """FSDP shards everything else, and fused AdamW does not mix the two."""
    stage = ContrastiveStage(CLIPModel(tiny_config()), learn_logit_scale=True)
    groups = [group["params"] for group in parameter_groups(stage, 0.3)]
    assert [one for one in groups if any(p.ndim == 0 for p in one)] == [[stage.trained.logit_scale]]
    assert len(groups) == 3


def test_parameter_groups_of_a_mapping_leave_depth_alone(tiny_teacher):
    stage = MappingStage(start_mapper(tiny_teacher, SMALL))
    deltas = {f"trained.operators.{name}.delta" for name in stage.trained.operators}
    depth = {f"trained.operators.{tower}_depth.delta" for tower in ("vision", "text")}
    assert names_by_decay(stage) == {0.3: deltas - depth, 0.0: depth}


def test_parameter_groups_of_a_calibrated_mapping_leave_corrections_of_vectors_alone(tiny_teacher):
    """Stacked over layers, they have two dimensions, as matrices have."""
    config = dataclasses.replace(SMALL, initializer="calibrated", refit=False)
    mapper = started(tiny_teacher, config, split(random_pairs(tiny_teacher.config, 16), 8))
    found = names_by_decay(MappingStage(mapper))
    corrections = {f"trained.corrections.{name}.delta": name for name in mapper.corrections}
    spared = {key for key, name in corrections.items() if "norm" in name or "bias" in name or "position" in name}
    spared |= {key for key, name in corrections.items() if name.endswith("class_embedding")}
    assert found[0.0] & corrections.keys() == spared
    matrices = {name for key, name in corrections.items() if key not in spared}
    assert len(matrices) == 2 * 6 + 3 and all(name.endswith("-weight") for name in matrices)  # patches, projections
    operators = {f"trained.operators.{name}.delta" for name in mapper.operators}
    assert found[0.3] - corrections.keys() == {name for name in operators if "_depth" not in name}


def test_parameter_groups_leave_out_what_is_frozen(tiny_config):
    stage = ContrastiveStage(CLIPModel(tiny_config()))
    stage.trained.vision_model.requires_grad_(False)
    found = names_by_decay(stage)
    assert not [name for names in found.values() for name in names if "vision_model" in name or "scale" in name]


def test_adamw_has_the_numbers_of_the_stage():
    arguments = StageArguments(
        learning_rate=0.5, weight_decay=0.3, adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-3, batch_size=1
    )
    optimizer = adamw(torch.nn.Linear(3, 2), arguments)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.3]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.7, 0.8), 1e-3)


def test_a_step_of_adamw_is_the_one_of_the_paper_it_is_from():
    module, (beta1, beta2, epsilon, rate, decay) = torch.nn.Linear(2, 1, bias=False), (0.9, 0.98, 1e-6, 0.1, 0.2)
    module.weight.data = torch.tensor([[1.0, -2.0]])
    optimizer = adamw(module, StageArguments(learning_rate=rate, weight_decay=decay))
    expected, mean, square = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for step, gradient in enumerate(([0.5, 0.1], [-0.2, 0.3]), 1):
        module.weight.grad = torch.tensor([gradient])
        optimizer.step()
        for i, g in enumerate(gradient):
            mean[i] = beta1 * mean[i] + (1 - beta1) * g
            square[i] = beta2 * square[i] + (1 - beta2) * g * g
            change = mean[i] / (1 - beta1**step) / (math.sqrt(square[i] / (1 - beta2**step)) + epsilon)
            expected[i] -= rate * (decay * expected[i] + change)
    torch.testing.assert_close(module.weight.detach(), torch.tensor([expected]), atol=1e-6, rtol=0)


# How fast


@pytest.mark.parametrize("warmup", [3, 0.5], ids=["steps", "share"])
def test_the_rate_warms_up_from_zero_and_follows_half_a_cosine(warmup):
    rates = [learning_rate_at(step, 6, 0.01, warmup) for step in range(7)]
    assert rates == pytest.approx([0, 0.01 / 3, 0.02 / 3, 0.01, 0.0075, 0.0025, 0], abs=1e-12)


def test_without_a_warmup_the_first_rate_is_the_peak():
    assert [learning_rate_at(step, 2, 0.01, 0) for step in range(3)] == pytest.approx([0.01, 0.005, 0], abs=1e-12)


def rates(steps: int, warmup: float) -> list[float]:
    return [learning_rate_at(step, steps, 1.0, warmup) for step in range(steps)]


@pytest.mark.parametrize("warmup", [39, 39.5, 40, 2000])
def test_a_warmup_that_does_not_fit_is_a_tenth_of_the_run(warmup):
    """Of 39 steps, 2,000 would only rise to a fiftieth of the peak and never fall."""
    assert rates(39, warmup) == rates(39, 0.1)
    assert max(rates(39, warmup)) == rates(39, warmup)[4] == 1.0


def test_a_warmup_that_fits_is_taken_as_it_is():
    assert rates(39, 38) == [step / 38 for step in range(38)] + [1.0]
    assert rates(39, 37.2) == rates(39, 38)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 39])
@pytest.mark.parametrize("warmup", [0, 0.1, 0.5, 0.99, 1, 2, 5, 2000])
def test_every_run_reaches_the_peak_and_a_single_step_is_taken_at_it(steps, warmup):
    assert max(rates(steps, warmup)) == 1.0


@pytest.mark.parametrize("warmup", [1, 2.5, 2000])
def test_a_warmup_that_does_not_fit_is_said_with_both_numbers(warmup, caplog):
    warn_of_warmup(StageArguments(warmup_steps=warmup), steps=1)
    (record,) = caplog.records
    assert f"warmup_steps={warmup} is not less than the run's steps, 1;" in record.getMessage()


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0.1, 1), (0.99, 1), (38, 39), (2000, 0)])
def test_of_a_warmup_that_fits_nothing_is_said(warmup, steps, caplog):
    warn_of_warmup(StageArguments(warmup_steps=warmup), steps)
    assert not caplog.records


def test_a_share_of_the_steps_is_rounded_up():
    assert learning_rate_at(1, 15, 1.0, 0.1) == 0.5  # two steps of 15
    assert learning_rate_at(1, 15, 1.0, 1) == 1.0  # from 1 on, it is a number of steps


# How long


def pairs(count: int) -> PairDataset:
    return PairDataset(range(count))


@pytest.mark.parametrize(
    ("count", "batch_size", "epochs", "steps"),
    [(24, 8, 1, 3), (24, 7, 2, 6), (24, 4, 0.5, 3), (24, 24, 100, 100), (24, 8, 0, 0)],
)
def test_epochs_are_passes_over_full_batches(count, batch_size, epochs, steps):
    assert step_count(StageArguments(num_train_epochs=epochs, batch_size=batch_size), pairs(count)) == steps


def test_steps_win_over_epochs():
    assert step_count(StageArguments(max_steps=5, num_train_epochs=100, batch_size=8), pairs(24)) == 5
    assert step_count(StageArguments(max_steps=0, num_train_epochs=100, batch_size=8), pairs(24)) == 0
    assert step_count(StageArguments(max_steps=0, batch_size=25), pairs(24)) == 0  # which asks for no batch


def test_a_stream_takes_its_steps_and_has_no_epochs():
    stream = PairStream(SimpleNamespace(num_shards=1))
    assert step_count(StageArguments(max_steps=5), stream) == 5
    with pytest.raises(ValueError, match="A stream has no length, so epochs cannot be counted; set max_steps"):
        step_count(StageArguments(), stream)


@pytest.mark.parametrize("steps", [-1, 3])
def test_a_batch_larger_than_the_data_is_an_error(steps):
    with pytest.raises(ValueError, match="batch_size=25 is larger than the 24 training pairs; lower it"):
        step_count(StageArguments(max_steps=steps, batch_size=25), pairs(24))


def test_less_than_one_step_of_epochs_is_an_error():
    with pytest.raises(ValueError, match=r"num_train_epochs=0\.1 of 24 pairs is less than one step"):
        step_count(StageArguments(num_train_epochs=0.1, batch_size=8), pairs(24))


@pytest.mark.parametrize(("number", "steps"), [(0.25, 50.0), (1, 1), (30, 30), (0, 0)])
def test_numbers_below_one_are_shares_of_all_steps(number, steps):
    assert steps_or_share(number, 200) == steps


@pytest.mark.parametrize(("ramp", "length"), [(0.5, 5), (0, 0), (10, 10), (0.99, 10), (2.4, 2)])
def test_a_ramp_is_a_whole_number_of_steps(ramp, length):
    assert ramp_length(ramp, 10) == length


def test_a_ramp_that_ends_after_the_run_is_refused():
    with pytest.raises(ValueError, match="ramp_steps=11 are more than the 10 of the training; a share is below 1"):
        ramp_length(11, 10)

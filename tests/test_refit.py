"""A refitted student is nearer to its teacher, whatever the pairs are kept in or cut into."""

import copy
import dataclasses

import pytest
import torch
from calibrated_starts import (
    NARROW,
    TOWERS,
    embeddings,
    folded,
    losses,
    nearness,
    plain,
    random_pairs,
    split,
    started,
    streams,
)
from torch.nn import functional as F
from transformers.utils import logging

from clipmap_hf.config import ClipMapConfig, TowerConfig


SMALL = dataclasses.replace(NARROW, vision=TowerConfig(32, None, 2), text=TowerConfig(32, None, 2))
SEGMENTS = {"vision": [2, 4], "text": [1, 3]}  # where those of SMALL end
VARIANTS = {
    "cut in depth": dataclasses.replace(SMALL, vision=TowerConfig(None, None, 2), text=TowerConfig(None, None, 2)),
    "a smaller embedding": dataclasses.replace(SMALL, projection_dim=16),
    "an odd ffn": dataclasses.replace(SMALL, vision=TowerConfig(48, 100, 3), text=TowerConfig(32, 33, 1)),
    "similarity": dataclasses.replace(SMALL, depth="similarity"),
}


@pytest.fixture(scope="module")
def batches(shared_teacher) -> list[dict]:
    return split(random_pairs(shared_teacher.config, 64), 24)


@pytest.fixture(scope="module")
def others(shared_teacher) -> dict:
    """Pairs that were not calibrated with."""
    return random_pairs(shared_teacher.config, 32, seed=1)


@pytest.fixture(scope="module")
def refitted(shared_teacher, batches):
    return started(shared_teacher, SMALL, batches)


def assert_same(given, expected) -> None:
    """Bit for bit."""
    given, expected = given.export().state_dict(), expected.export().state_dict()
    for name, tensor in expected.items():
        assert torch.equal(given[name], tensor), name


def similarities(model, pairs) -> torch.Tensor:
    """Of all images and texts among each other, which a smaller embedding has too."""
    both = torch.cat(list(embeddings(model, pairs).values()))
    return both @ both.T


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_refitted_student_is_nearer_to_the_teacher(shared_teacher, batches, others, variant):
    config, near = VARIANTS[variant], []
    for refit in (False, True):
        mapper = started(shared_teacher, dataclasses.replace(config, refit=refit), batches)
        if config.projection_dim is None:
            near.append(nearness(mapper, shared_teacher, others))
        else:
            difference = similarities(mapper, others) - similarities(shared_teacher, others)
            near.append(dict.fromkeys(TOWERS, 1 - difference.square().mean().item()))
    for tower in TOWERS:
        assert near[1][tower] > near[0][tower], near
    assert sum(near[1].values()) > sum(near[0].values()) + 0.005, near


def test_a_student_layer_does_what_its_segment_does(shared_teacher, batches, others):
    """Here the first layer of each segment is idle, so that a student of half the depth can do all of it."""
    teacher = plain(shared_teacher)
    for index in (0, 2):
        layer = teacher.vision_model.encoder.layers[index]
        for writer in (layer.self_attn.out_proj, layer.mlp.fc2):
            writer.weight.data.zero_()
    config = ClipMapConfig(vision=TowerConfig(num_hidden_layers=2), initializer="calibrated", refit_steps=0)
    lost = []
    for refit in (False, True):
        mapper = started(teacher, dataclasses.replace(config, refit=refit), batches)
        lost.append(losses(mapper, teacher, "vision", others, [2, 4])[1:])
    assert min(lost[0]) > 0.3 and max(lost[1]) < 0.03, lost


def test_the_first_segment_begins_with_the_first_layer(shared_teacher, batches, others):
    """Whichever layer the depth operator keeps: here it is the last, and the first does all the work."""
    teacher = plain(shared_teacher)
    for layer in teacher.vision_model.encoder.layers[1:]:
        for writer in (layer.self_attn.out_proj, layer.mlp.fc2):
            writer.weight.data.zero_()
    config = dataclasses.replace(NARROW, vision=TowerConfig(num_hidden_layers=1), depth="spread")
    mapper = started(teacher, config, batches)
    assert mapper.operators["vision_depth"]().argmax() == 3
    assert losses(mapper, teacher, "vision", others, [4])[1] < 0.03


def test_heads_are_taken_from_all_layers_of_a_segment(shared_teacher, batches):
    """The first layer's, of a student of the same width, checked against least squares on the plain model."""
    teacher = plain(shared_teacher)
    chosen = {0: [1], 1: [0, 2, 3]}  # layer of the first segment -> heads that are made strong
    for index, heads in chosen.items():
        written = teacher.vision_model.encoder.layers[index].self_attn.out_proj.weight.data
        written.unflatten(1, (4, 16))[:, heads] *= 5
    config = ClipMapConfig(vision=TowerConfig(num_hidden_layers=2), initializer="calibrated", refit_steps=0)
    student = started(teacher, config, batches).export().vision_model.encoder.layers[0]
    folds = folded(teacher)
    into = torch.cat([torch.stack(streams(folds, "vision", batch)[:2]) for batch in batches], dim=1)
    weights = torch.ones(into.shape[1:3], dtype=torch.float64)
    weights[:, 0] = 16
    weights = weights.flatten() / weights.sum()
    first, second = F.layer_norm(into, (64,)).flatten(1, 2).double()  # what the two layers of the segment read
    means = [weights @ one for one in (first, second)]
    inputs = (first - means[0]) * weights.sqrt()[:, None]
    ridge = (1e-3 * inputs.square().sum() / 64).sqrt() * torch.eye(64, dtype=torch.float64)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight, bias = (getattr(student.self_attn, name).get_parameter(one).double() for one in ("weight", "bias"))
        expected = []
        for index, heads in chosen.items():
            targets = ((first, second)[index] - means[index]) * weights.sqrt()[:, None]
            padded = torch.cat([targets, torch.zeros(64, 64, dtype=torch.float64)])
            lift = torch.linalg.lstsq(torch.cat([inputs, ridge]), padded).solution.T
            source = getattr(folds.vision_model.encoder.layers[index].self_attn, name)
            rows = source.weight.double().unflatten(0, (4, 16))[heads].flatten(0, 1)
            offset = source.bias.double().unflatten(0, (4, 16))[heads].flatten()
            expected.append((rows @ lift, offset + rows @ (means[index] - lift @ means[0])))
        for given, wanted in zip((weight, bias), (torch.cat(one) for one in zip(*expected, strict=True)), strict=True):
            assert (given - wanted).norm() < 1e-3 * wanted.norm(), name


def test_gradient_steps_make_each_layers_error_smaller(shared_teacher, batches, layer_by_layer):
    layer_by_layer()
    config = dataclasses.replace(SMALL, initializer="calibrated_whole")  # which makes steps on each layer
    pairs = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    before, after = (
        started(shared_teacher, dataclasses.replace(config, refit_steps=steps), batches) for steps in (0, 60)
    )
    for tower in TOWERS:
        errors = [losses(mapper, shared_teacher, tower, pairs, SEGMENTS[tower]) for mapper in (before, after)]
        assert errors[0][0] == errors[1][0]  # what the embeddings miss is none of the layers'
        for solved, descended in zip(*(one[1:] for one in errors), strict=True):
            assert descended < 0.99 * solved


def test_gradient_steps_of_a_whole_tower_make_its_embeddings_error_smaller(shared_teacher, batches, layer_by_layer):
    config, errors = dataclasses.replace(SMALL, refit_steps=200), []
    pairs = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    wanted = embeddings(shared_teacher, pairs)
    after = started(shared_teacher, config, batches)
    layer_by_layer()
    for mapper in (after, started(shared_teacher, config, batches)):
        given = embeddings(mapper.export(), pairs)
        errors.append([float((given[name] - wanted[name]).square().sum(dim=-1).mean()) for name in wanted])
    for descended, layer_by_layer in zip(*errors, strict=True):
        assert descended < 0.9 * layer_by_layer


def test_embeddings_are_refitted_to_length_one(shared_teacher, batches, refitted):
    """So that all pairs count alike; the teacher's are longer."""
    for model, shortest, longest in ((refitted.export(), 0.7, 1.05), (shared_teacher, 2.0, 20.0)):
        with torch.no_grad():
            images = model.get_image_features(pixel_values=batches[0]["pixel_values"]).pooler_output
            texts = model.get_text_features(input_ids=batches[0]["input_ids"]).pooler_output
        for embeds in (images, texts):
            assert shortest < embeds.norm(dim=1).mean() < longest


# What it does not depend on


@pytest.fixture(scope="module")
def descended(shared_teacher, batches):
    """Refitted by gradient steps too."""
    return started(shared_teacher, dataclasses.replace(SMALL, refit_steps=3), batches)


def test_a_start_can_be_repeated(shared_teacher, batches, descended):
    torch.manual_seed(7)
    assert_same(started(shared_teacher, dataclasses.replace(SMALL, refit_steps=3), batches), descended)


def test_streams_in_files_give_the_same_bits(shared_teacher, batches, streams_in_files, descended):
    files = streams_in_files()
    assert_same(started(shared_teacher, dataclasses.replace(SMALL, refit_steps=3), batches), descended)
    assert len(files) > 2 * 2 * len(batches)


def test_streams_that_fit_are_kept_in_memory(shared_teacher, batches, no_files):
    started(shared_teacher, SMALL, batches)


def assert_near(given, expected, tolerance: float) -> None:
    given, expected = given.export().state_dict(), expected.export().state_dict()
    for name, tensor in expected.items():
        if not name.endswith("k_proj.bias"):  # adds the same to all scores of a query, however large it is
            assert (given[name] - tensor).norm() <= tolerance * tensor.norm(), name


def test_more_padding_gives_the_same_student(shared_teacher, batches, refitted):
    end = shared_teacher.config.text_config.eos_token_id
    longest = max(int((batch["input_ids"] != end).sum(dim=1).max()) for batch in batches) + 1
    assert longest < batches[0]["input_ids"].shape[1]
    shorter = [batch | {"input_ids": batch["input_ids"][:, :longest]} for batch in batches]
    assert_near(started(shared_teacher, SMALL, shorter), refitted, 1e-4)


def test_how_pairs_are_cut_into_batches_does_not_matter(shared_teacher, batches, refitted):
    whole = [{name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}]
    assert_near(started(shared_teacher, SMALL, whole), refitted, 1e-4)


def test_other_pairs_give_another_student(shared_teacher, others, refitted):
    """Or the comparisons above would show nothing."""
    other = started(shared_teacher, SMALL, split(others, 32)).export().state_dict()
    same = refitted.export().state_dict()
    far = [name for name, tensor in same.items() if (other[name] - tensor).norm() > 1e-2 * tensor.norm()]
    assert len(far) > len(same) / 3


def test_the_given_teacher_stays_as_it_is(shared_teacher, batches):
    teacher = copy.deepcopy(shared_teacher).train()
    started(teacher, dataclasses.replace(SMALL, refit_steps=2), batches)
    assert teacher.training and all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for name, tensor in shared_teacher.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], tensor), name


def test_a_refit_shows_a_line_for_each_layer(shared_teacher, batches, capsys):
    logging.enable_progress_bar()
    try:
        started(shared_teacher, SMALL, batches)
    finally:
        logging.disable_progress_bar()
    printed = capsys.readouterr().err
    assert "Calibrated start: 100%" in printed
    lines = [line for line in printed.splitlines() if "stands for" in line]
    assert len(lines) == sum(map(len, SEGMENTS.values()))
    assert "vision layer 1 of 2 stands for the teacher's layers 1 to 2: solved after" in printed


def test_a_refit_is_silent_where_progress_bars_are_disabled(shared_teacher, batches, capsys):
    started(shared_teacher, SMALL, batches)
    assert "stands for" not in capsys.readouterr().err

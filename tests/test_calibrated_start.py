"""What a start from activations takes, and what of it the config decides."""

import copy
import dataclasses

import pytest
import torch
from calibrated_starts import NARROW, TOWERS, nearness, random_pairs, split, started
from conftest import randomize
from torch.utils.data import DataLoader
from transformers import CLIPModel

from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.starts import start_mapper
from clipmap_hf.starts.calibrated.statistics import calibrate


SMALL = dataclasses.replace(NARROW, vision=TowerConfig(32, None, 2), text=TowerConfig(32, None, 2))
each_initializer = pytest.mark.parametrize("initializer", ["calibrated", "importance"])


@pytest.fixture(scope="module")
def batches(shared_teacher) -> list[dict]:
    return split(random_pairs(shared_teacher.config, 24), 12)


def assert_same(given: WeightMapper, expected: WeightMapper) -> None:
    given, expected = given.export().state_dict(), expected.export().state_dict()
    for name, tensor in expected.items():
        assert torch.equal(given[name], tensor), name


# What it starts from


@each_initializer
@pytest.mark.parametrize("variant", ["default", "kinds", "tied", "smaller embedding"])
def test_every_calibrated_start_sets_every_tensor(shared_teacher, batches, initializer, variant):
    changes = {"kinds": {"depth_per": "kind"}, "tied": {"tie_ffn": True}, "smaller embedding": {"projection_dim": 16}}
    config = dataclasses.replace(SMALL, initializer=initializer, **changes.get(variant, {}))
    mapper = started(shared_teacher, config, batches)
    assert all(tensor.isfinite().all() for tensor in mapper.state_dict().values())
    for name, parameter in mapper.named_parameters():
        assert not parameter.any() or name == "logit_scale", name  # deltas begin at zero
    near = nearness(mapper, shared_teacher, batches[0]) if variant != "smaller embedding" else {"vision": 1.0}
    assert all(value > 0.2 for value in near.values())


@each_initializer
def test_an_iterator_is_refused_for_it_would_be_empty_the_second_time(shared_teacher, batches, initializer):
    config = dataclasses.replace(SMALL, initializer=initializer)
    for once in (iter(batches), (batch for batch in batches)):
        with pytest.raises(TypeError, match="several times; give a list or a DataLoader"):
            start_mapper(shared_teacher, config, once)


@each_initializer
def test_no_pairs_or_no_images_are_errors(shared_teacher, batches, initializer):
    config = dataclasses.replace(SMALL, initializer=initializer)
    with pytest.raises(ValueError, match="no pairs to calibrate with"):
        start_mapper(shared_teacher, config, [])
    texts = [{"input_ids": batch["input_ids"]} for batch in batches]
    with pytest.raises(ValueError, match="needs pixel_values"):
        start_mapper(shared_teacher, config, texts)


def test_a_loader_starts_as_a_list_does(shared_teacher, batches):
    pairs = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    rows = [{name: tensor[index] for name, tensor in pairs.items()} for index in range(24)]
    assert_same(started(shared_teacher, SMALL, DataLoader(rows, 12)), started(shared_teacher, SMALL, batches))


def test_texts_are_made_up_where_there_are_none(shared_teacher, batches):
    images = [{"pixel_values": batch["pixel_values"]} for batch in batches]
    config = dataclasses.replace(SMALL, refit=False)
    mapper, again, told = (started(shared_teacher, config, one) for one in (images, images, batches))
    assert_same(again, mapper)
    for name, operator in told.operators.items():
        same = torch.equal(operator(), mapper.operators[name]())
        assert same if name.startswith("vision") else not same or name != "text_residual", name
    assert nearness(mapper, shared_teacher, batches[0])["text"] > 0.5


def test_a_teacher_in_training_mode_is_measured_in_eval_mode(model_with_dropout, batches):
    assert model_with_dropout.training
    expected = started(copy.deepcopy(model_with_dropout).eval(), SMALL, batches)
    assert_same(started(model_with_dropout, SMALL, batches), expected)


def test_a_teacher_in_half_precision_is_measured_in_single(tiny_teacher, batches):
    halved = tiny_teacher.to(torch.bfloat16)
    expected = started(copy.deepcopy(halved).float(), SMALL, batches)
    assert_same(started(halved, SMALL, batches), expected)
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}


# Depth


@pytest.fixture(scope="module")
def uneven_teacher(tiny_config) -> CLIPModel:
    """In which the vision tower's layers 1 and 3 change the stream far more than 0 and 2, the text tower's 1 most."""
    model = randomize(CLIPModel(tiny_config())).eval()
    for tower, idle in (("vision", (0, 2)), ("text", (0, 2))):
        for index in idle:
            layer = getattr(model, f"{tower}_model").encoder.layers[index]
            for writer in (layer.self_attn.out_proj, layer.mlp.fc2):
                writer.weight.data *= 0.01
                writer.bias.data.zero_()
    return model


@each_initializer
@pytest.mark.parametrize(
    ("depth", "vision", "text"),
    [("similarity", [1, 3], [1]), ("interval_front", [0, 2], [0]), ("spread", [0, 3], [2])],
)
def test_depth_keeps_the_layers_of_its_rule(uneven_teacher, batches, initializer, depth, vision, text):
    sizes = {"vision": TowerConfig(32, None, 2), "text": TowerConfig(32, None, 1)}
    config = dataclasses.replace(NARROW, initializer=initializer, depth=depth, refit=False, **sizes)
    mapper = started(uneven_teacher, config, batches)
    for tower, layers in (("vision", vision), ("text", text)):
        operator = mapper.operators[f"{tower}_depth"]()
        assert operator.argmax(dim=1).tolist() == layers and operator.sum() == len(layers)


def test_depth_by_similarity_is_that_of_every_kind(uneven_teacher, batches):
    config = dataclasses.replace(SMALL, depth="similarity", depth_per="kind", refit=False)
    mapper = started(uneven_teacher, config, batches)
    kinds = [operator() for name, operator in mapper.operators.items() if name.startswith("vision_depth_")]
    assert len(kinds) == 8 and all(operator.argmax(dim=1).tolist() == [1, 3] for operator in kinds)


def test_as_deep_as_the_teacher_every_layer_is_kept(uneven_teacher, batches):
    mapper = started(uneven_teacher, dataclasses.replace(NARROW, depth="similarity", refit=False), batches)
    for tower, layers in (("vision", 4), ("text", 3)):
        assert torch.equal(mapper.operators[f"{tower}_depth"](), torch.eye(layers))


def test_similarity_needs_a_calibrated_start(shared_teacher):
    with pytest.raises(ValueError, match=r"depth='similarity' is no rule of initializer='diagonal'"):
        start_mapper(shared_teacher, dataclasses.replace(SMALL, initializer="diagonal", depth="similarity"))
    with pytest.raises(ValueError, match=r"allowed are \['interval_front', 'similarity', 'spread'\]"):
        start_mapper(shared_teacher, dataclasses.replace(SMALL, depth="score"), [])


def test_how_far_layers_turn_the_stream_is_measured(uneven_teacher, batches):
    statistics = calibrate(uneven_teacher, batches)
    assert statistics["vision"].changed.argsort(descending=True)[:2].sort().values.tolist() == [1, 3]
    assert (statistics["vision"].changed[[0, 2]] < 1e-3).all() and statistics["text"].changed.argmax() == 1


def test_a_start_of_other_towers_does_not_matter(shared_teacher, batches):
    """Each tower starts from itself alone."""
    narrow = started(shared_teacher, SMALL, batches)
    other = started(shared_teacher, dataclasses.replace(SMALL, text=TowerConfig(16, None, 1)), batches)
    given = other.export().state_dict()
    for name, tensor in narrow.export().state_dict().items():
        if name.startswith("vision"):
            assert torch.equal(given[name], tensor), name


@pytest.mark.parametrize("initializer", ["calibrated", "importance"])
def test_towers_that_are_cut_are_started(shared_teacher, batches, initializer):
    mapper = started(shared_teacher, dataclasses.replace(SMALL, initializer=initializer), batches)
    assert {name.split("_")[0] for name in mapper.operators} == set(TOWERS)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("initializer", ["calibrated", "importance"])
def test_the_other_tower_is_kept_bit_for_bit(shared_teacher, batches, initializer, tower):
    size = {tower: TowerConfig(32, num_hidden_layers=2)}
    mapper = started(shared_teacher, ClipMapConfig(**size, initializer=initializer), batches)
    assert {name.split("_")[0] for name in mapper.operators} == {tower}
    teacher, student = shared_teacher.state_dict(), mapper.export().state_dict()
    kept = [name for name in teacher if mapper.plan.family.match(name).tower != tower]
    assert not set(kept) & {name.replace("-", ".") for name in mapper.corrections}
    for name in kept:
        assert torch.equal(student[name], teacher[name]), name


@pytest.mark.parametrize("refit", [False, True])
def test_neurons_are_guessed_from_the_kept_ones_unless_they_are_solved_anyway(shared_teacher, batches, refit):
    mapper = started(shared_teacher, dataclasses.replace(SMALL, refit=refit), batches)
    for tower in TOWERS:
        writes, reads = (mapper.operators[f"{tower}_{space}"]() for space in ("ffn", "ffn_in"))
        assert torch.equal(reads, writes) == refit

"""Selection of a ResNet's channels by scores."""

import copy
import dataclasses

import pytest
import torch

from clipmap_hf.config import ClipMapConfig, ResNetTowerConfig
from clipmap_hf.families import family_for
from clipmap_hf.starts import make_plan, start_mapper
from clipmap_hf.starts.selection.criteria import magnitude


NARROW = ClipMapConfig(vision=ResNetTowerConfig(width=2), norm_statistics="inherited")
CRITERIA = ("magnitude", "manual", "random_selection", "taylor")


def start(teacher, initializer: str, batch, **changes):
    config = dataclasses.replace(NARROW, initializer=initializer, **changes)
    return start_mapper(teacher, config, [batch] if initializer == "taylor" else None)


@pytest.fixture
def half_dead(deep_clip_resnet):
    """A ResNet of which half of the channels of each space, and half of the heads, neither write nor read anything."""
    model, generator = copy.deepcopy(deep_clip_resnet), torch.Generator().manual_seed(0)
    plan, family, dead = make_plan(model, NARROW), family_for(model.config), {}
    for name, tensor in model.state_dict().items():
        spec = family.match(name)
        if spec.tower != "vision" or spec.rule.statistic:
            continue
        for axis, space in enumerate(spec.rule.axes):
            if space in (None, "embed"):
                continue
            width = 32 if space.startswith("pool") else 1  # the heads of query, key and value are the same
            key, parts = "heads" if width > 1 else plan.operator_name(space, "vision"), tensor.shape[axis] // width
            if key not in dead:
                dead[key] = torch.randperm(parts, generator=generator)[: parts // 2]
            tensor.unflatten(axis, (-1, width)).index_fill_(axis, dead[key], 0)
    return model


@pytest.mark.parametrize("initializer", ["magnitude", "taylor"])
def test_channels_that_do_nothing_are_left_out(half_dead, tiny_batch, initializer):
    student = start(half_dead, initializer, tiny_batch).export()
    assert student.config.vision_config.width == 2
    with torch.no_grad():
        found, expected = (one.get_image_features(tiny_batch["pixel_values"]) for one in (student, half_dead))
        other = start(half_dead, "manual", tiny_batch).export().get_image_features(tiny_batch["pixel_values"])
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(other.pooler_output, expected.pooler_output, atol=1e-2)


def test_a_score_is_the_sum_over_what_writes_and_reads_a_channel(deep_clip_resnet):
    scores, tensors = magnitude(deep_clip_resnet, [], seed=0).vision.spaces, deep_clip_resnet.state_dict()
    squares = {name.removeprefix("vision_model."): one.double().square() for name, one in tensors.items()}

    def norm(name: str) -> torch.Tensor:
        return squares[f"{name}.weight"] + squares[f"{name}.bias"]

    inner = squares["layer2.2.conv1.weight"].sum(dim=(1, 2, 3)) + norm("layer2.2.bn1")
    inner = inner + squares["layer2.2.conv2.weight"].sum(dim=(0, 2, 3))
    torch.testing.assert_close(scores["inner2a"][1], inner)
    blocks = ("layer1.0", "layer1.1")
    stream = sum(squares[f"{block}.conv3.weight"].sum(dim=(1, 2, 3)) + norm(f"{block}.bn3") for block in blocks)
    stream = stream + squares["layer1.0.downsample.0.weight"].sum(dim=(1, 2, 3)) + norm("layer1.0.downsample.1")
    for reader in ("layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"):
        stream = stream + squares[f"{reader}.weight"].sum(dim=(0, 2, 3))
    torch.testing.assert_close(scores["stream1"], stream)


@pytest.mark.parametrize("initializer", CRITERIA)
def test_a_selection_keeps_whole_heads_and_entries_of_the_teachers(deep_clip_resnet, tiny_batch, initializer):
    mapper = start(deep_clip_resnet, initializer, tiny_batch)
    operators = {name: one() for name, one in mapper.operators.items() if name.startswith("vision")}
    assert all((one.sum(dim=-1) == 1).all() and set(one.unique().tolist()) <= {0, 1} for one in operators.values())
    query = operators["vision_pool_query"]
    assert all(torch.equal(query, operators[f"vision_pool_{name}"]) for name in ("key", "value"))
    kept = query.argmax(dim=1).view(-1, 32)
    assert (kept % 32 == torch.arange(32)).all()
    indices = operators["vision_inner4b"].argmax(dim=-1)
    for index, block in enumerate(mapper.export().vision_model.layer4[1:]):
        old = deep_clip_resnet.vision_model.layer4[index + 1].bn2
        torch.testing.assert_close(block.bn2.running_var, old.running_var[indices[index]], atol=0, rtol=0)


def test_a_manual_selection_is_the_diagonal(deep_clip_resnet, tiny_batch):
    found, expected = (start(deep_clip_resnet, name, tiny_batch).export() for name in ("manual", "diagonal"))
    torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()), atol=0, rtol=0)


def test_blocks_are_kept_by_their_scores(deep_clip_resnet, tiny_batch):
    model = copy.deepcopy(deep_clip_resnet)
    with torch.no_grad():
        for name in ("conv1", "conv2", "conv3"):
            getattr(model.vision_model.layer4[2], name).weight /= 100
    vision = ResNetTowerConfig(layers=[2, 3, 2, 3])
    student = start(model, "magnitude", tiny_batch, vision=vision, depth="score").export()
    for block, old in enumerate((0, 1, 3)):
        found, expected = student.vision_model.layer4[block], model.vision_model.layer4[old]
        for name in ("conv2", "bn2"):  # their channels are all kept, in order
            torch.testing.assert_close(getattr(found, name).weight, getattr(expected, name).weight, atol=0, rtol=0)


def test_statistics_of_a_selection_are_measured_where_there_are_pairs(deep_clip_resnet, tiny_batch):
    measured = start(deep_clip_resnet, "taylor", tiny_batch, norm_statistics="measured").export().state_dict()
    for name, tensor in start(deep_clip_resnet, "taylor", tiny_batch).export().state_dict().items():
        is_statistic = name.endswith(("running_mean", "running_var", "tracked"))
        assert torch.equal(tensor, measured[name]) != is_statistic

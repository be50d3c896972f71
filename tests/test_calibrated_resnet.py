"""The calibrated start of a CLIP with a ResNet: channels are chosen by what is read, and convolutions solved."""

import copy
import dataclasses

import pytest
import torch
from calibrated_starts import random_pairs, split
from torch import nn
from torch.nn import functional as F

from clipmap_hf import DistillationArguments, compress
from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig, ResNetTowerConfig, TowerConfig
from clipmap_hf.models.batch_norms import batch_norms
from clipmap_hf.models.loading import load_model
from clipmap_hf.starts import start_mapper
from clipmap_hf.starts.calibrated.resnet import convolutions
from clipmap_hf.starts.calibrated.resnet.blocks import block_segments, block_sources
from clipmap_hf.starts.calibrated.resnet.channels import calibrate_channels
from clipmap_hf.starts.calibrated.resnet.convolutions import solve_units
from clipmap_hf.starts.calibrated.resnet.norms import take_statistics
from clipmap_hf.starts.calibrated.resnet.refit import refit_resnet
from clipmap_hf.training.stages.mapping import MappingStage


CALIBRATED = ClipMapConfig(vision=ResNetTowerConfig(width=2), initializer="calibrated", refit_steps=0)


@pytest.fixture(scope="module")
def batches(clip_resnet):
    return split(random_pairs(clip_resnet.config, 128), 32)


@pytest.fixture(scope="module")
def held(clip_resnet):
    return random_pairs(clip_resnet.config, 64, seed=1)


@pytest.fixture(scope="module")
def half(clip_resnet, batches):
    """A mapper of half the width, that has started."""
    return start_mapper(clip_resnet, CALIBRATED, batches).eval()


@torch.no_grad()
def images_lost(student, teacher, pairs) -> float:
    """The squared error of normalized embeddings."""
    found, expected = (
        F.normalize(one.get_image_features(pairs["pixel_values"]).pooler_output, dim=-1) for one in (student, teacher)
    )
    return float((found - expected).square().sum(dim=-1).mean())


def test_a_refit_of_the_same_size_is_the_teacher(deep_clip_resnet, batches, held):
    student = copy.deepcopy(deep_clip_resnet)
    operators = calibrate_channels(student, batches).operators(student.config, student.config)
    layers = {f"vision_layers_{stage}": range(count) for stage, count in enumerate((1, 2, 1, 3))}
    refit_resnet(student, deep_clip_resnet, operators, layers, batches)
    found, expected = (one.get_image_features(held["pixel_values"]) for one in (student, deep_clip_resnet))
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"refit": False}, {"refit_steps": 100}])
def test_half_of_the_width_is_nearer_to_the_teacher_than_a_selection_with_measured_norms(
    clip_resnet, batches, held, changes
):
    selected = start_mapper(clip_resnet, dataclasses.replace(CALIBRATED, initializer="magnitude"), batches).export()
    student = start_mapper(clip_resnet, dataclasses.replace(CALIBRATED, **changes), batches).export()
    assert images_lost(student, clip_resnet, held) < 0.6 * images_lost(selected, clip_resnet, held)


def test_a_refit_is_nearer_than_lifts(clip_resnet, half, batches, held):
    lifted = start_mapper(clip_resnet, dataclasses.replace(CALIBRATED, refit=False), batches).export()
    assert images_lost(half.export(), clip_resnet, held) < images_lost(lifted, clip_resnet, held)


def test_fewer_blocks_stand_for_those_that_are_dropped(deep_clip_resnet, batches, held):
    vision = ResNetTowerConfig(layers=[1, 2, 2, 2])
    lost = {}
    for name in ("magnitude", "calibrated"):
        for depth in ("interval_front", "spread", "score" if name == "magnitude" else "similarity"):
            config = dataclasses.replace(CALIBRATED, vision=vision, initializer=name, depth=depth)
            lost[name, depth] = images_lost(
                start_mapper(deep_clip_resnet, config, batches).export(), deep_clip_resnet, held
            )
    best = min(error for (name, _), error in lost.items() if name == "magnitude")
    assert all(error < best for (name, _), error in lost.items() if name == "calibrated"), lost


def test_segments_go_from_one_kept_block_to_the_next():
    assert block_sources([0, 2]) == [0, 1, 3] and block_segments([0, 2], 5) == [range(1), range(1, 3), range(3, 5)]
    assert block_sources([2]) == [0, 3] and block_segments([2], 3) == [range(1), range(1, 3)]
    assert block_sources([]) == [0] and block_segments([], 4) == [range(4)]


def test_channels_that_nobody_needs_are_left_out(clip_resnet, batches):
    """Of twins, one says all that both say; a loud channel that nobody reads says nothing."""
    model, small = copy.deepcopy(clip_resnet), copy.deepcopy(clip_resnet.config)
    small.vision_config.width = 2
    block = model.vision_model.layer2[1]
    with torch.no_grad():
        block.conv1.weight[1] = block.conv1.weight[0]
        for tensor in (block.bn1.weight, block.bn1.bias, block.bn1.running_mean, block.bn1.running_var):
            tensor[1] = tensor[0]
        block.bn1.weight[7] = 100
        block.conv2.weight[:, 7] = 0
    kept = calibrate_channels(model, batches).operators(model.config, small)["vision_inner2a"][0].argmax(dim=1)
    assert len({0, 1} & {*kept.tolist()}) <= 1 and 7 not in kept


def test_convolutions_are_solved_for_their_sum_and_images_are_sampled(monkeypatch):
    """What two add up is found again, by as many rows as their inputs ask for, however large the images are."""
    torch.manual_seed(0)
    rows, add = [], convolutions.Moments.add
    monkeypatch.setattr(convolutions.Moments, "add", lambda self, x, *rest: (rows.append(len(x)), add(self, x, *rest)))
    made, goal = (
        [(nn.Conv2d(3, 5, size, padding=size // 2, bias=False), nn.BatchNorm2d(5)) for size in (1, 3)] for _ in "ab"
    )
    for _, norm in (*made, *goal):
        norm.running_mean, norm.running_var = torch.randn(5), 1 + torch.rand(5)
    for module in (one for unit in (*made, *goal) for one in unit):
        module.eval().requires_grad_(False)
    images = [torch.randn(2, 16, 3, 64, 64).unbind() for _ in range(4)]

    def total(units, pair):
        return sum(norm(conv(one)) for (conv, norm), one in zip(units, pair, strict=True))

    solve_units(made, ((pair, total(goal, pair)) for pair in images), images=64)
    torch.testing.assert_close(total(made, images[0]), total(goal, images[0]), atol=2e-2, rtol=0)
    assert sum(rows) <= 16 * (3 + 27) + 64 < 64 * 64 * 64


def test_norms_take_the_statistics_of_what_they_read_and_compute_what_they_did(clip_resnet, held):
    model, again = copy.deepcopy(clip_resnet), copy.deepcopy(clip_resnet)
    take_statistics(model, [held])
    expected = clip_resnet.get_image_features(held["pixel_values"]).pooler_output
    torch.testing.assert_close(model.get_image_features(held["pixel_values"]).pooler_output, expected)
    read = model.vision_model.conv1(held["pixel_values"]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.vision_model.bn1.running_mean, read.mean(dim=1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.vision_model.bn1.running_var, read.var(dim=1, correction=0), atol=1e-5, rtol=1e-4)
    trained = [one.train().get_image_features(held["pixel_values"]).pooler_output for one in (model, again)]
    torch.testing.assert_close(trained[0], expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(trained[1], expected, atol=1e-2)


def test_a_student_normalizes_by_its_own_statistics(half, batches):
    """A batch of all pairs, in training, gives what evaluation gives."""
    student, pixels = half.export(), torch.cat([batch["pixel_values"] for batch in batches])
    with torch.no_grad():
        expected = student.get_image_features(pixels).pooler_output
        found = student.train().get_image_features(pixels).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-2)


def test_the_mapper_is_the_student_and_is_trained_from_there(half, tiny_batch):
    mapper = copy.deepcopy(half)
    stage = MappingStage(mapper)
    with torch.no_grad():
        found, expected = (one.eval()(**tiny_batch).image_embeds for one in (mapper, half.export()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    optimizer = torch.optim.AdamW([one for one in stage.train().parameters() if one.requires_grad], lr=1e-3)
    losses = []
    for _ in range(10):
        losses.append(stage([tiny_batch])["loss"])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert len(batch_norms(stage.export())) == len(batch_norms(half.export())) > 0


def test_a_compressor_starts_saves_and_goes_on(clip_resnet_folder, pairs_parquet, tmp_path):
    size = {"vision": ResNetTowerConfig(width=2), "text": TowerConfig(hidden_size=32)}
    config = ClipMapConfig(**size, projection_dim=16, refit_steps=2)
    given = {"initializer": "calibrated", "calibration_data": str(pairs_parquet)}
    compressor = ClipMapCompressor.from_pretrained(clip_resnet_folder, config, **given)
    compressor.save_pretrained(tmp_path)
    again = ClipMapCompressor.from_pretrained(tmp_path)
    torch.testing.assert_close(
        dict(again.export().state_dict()), dict(compressor.export().state_dict()), atol=0, rtol=0
    )


def test_a_recipe_starts_from_it(clip_resnet_folder, pairs_parquet, tmp_path, fresh_accelerator):
    given = (str(clip_resnet_folder), dataclasses.replace(CALIBRATED, refit_steps=1))
    arguments = DistillationArguments(str(tmp_path / "out"), max_steps=1, batch_size=8)
    compress(*given, arguments, str(pairs_parquet), calibration_pairs=16)
    assert load_model(str(tmp_path / "out")).config.vision_config.width == 2


def test_a_vision_tower_that_is_kept_stays_the_teachers(clip_resnet, batches):
    config = dataclasses.replace(CALIBRATED, vision=ResNetTowerConfig(), text=TowerConfig(hidden_size=32))
    student = start_mapper(clip_resnet, config, batches).export()
    expected = dict(clip_resnet.vision_model.state_dict())
    torch.testing.assert_close(dict(student.vision_model.state_dict()), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_statistics": "inherited"}, "'inherited' does not fit the refit.*refit=False"),
        ({"initializer": "calibrated_whole"}, r"'calibrated_whole' goes through .*\['calibrated', 'taylor'\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(clip_resnet, batches, changes, message):
    with pytest.raises(ValueError, match=message):
        start_mapper(clip_resnet, dataclasses.replace(CALIBRATED, **changes), batches)


def test_no_images_and_images_that_are_not_finite_are_refused(clip_resnet, batches):
    with pytest.raises(ValueError, match="no pairs to calibrate with"):
        start_mapper(clip_resnet, CALIBRATED, [])
    spoiled = [batches[0] | {"pixel_values": batches[0]["pixel_values"] * torch.nan}]
    with pytest.raises(ValueError, match="vision tower .* not finite"):
        start_mapper(clip_resnet, CALIBRATED, spoiled)

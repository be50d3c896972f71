"""Statistics of BatchNorms: measured on images, after any start of a student with a ResNet."""

import copy
import dataclasses

import pytest
import torch

from clipmap_hf import reestimate_batch_norms
from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig, ResNetTowerConfig, TowerConfig
from clipmap_hf.data.arguments import CalibrationArguments, DataArguments
from clipmap_hf.data.calibration_pairs import sampled_pairs
from clipmap_hf.models import batch_norms
from clipmap_hf.models.loading import load_model, load_processor
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.start import start_student
from clipmap_hf.starts import start_mapper
from clipmap_hf.training.run_arguments import RunArguments


NARROW = ClipMapConfig(vision=ResNetTowerConfig(width=2), initializer="diagonal")
UNNAMED = dataclasses.replace(NARROW, initializer=None)
INHERITED = dataclasses.replace(NARROW, norm_statistics="inherited")


def images(*counts: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(count, 3, 32, 32, generator=generator)} for count in counts]


def tensors_of(model, statistics: bool) -> dict[str, torch.Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: one.clone() for name, one in model.state_dict().items() if name.endswith(names) == statistics}


@pytest.fixture
def model(clip_resnet):
    """A ResNet of a test's own."""
    return copy.deepcopy(clip_resnet)


def test_equal_batches_give_torchs_own_cumulative_average(model):
    expected = copy.deepcopy(model)
    norms = batch_norms.batch_norms(expected)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in images(6, 6, 6):
            expected.get_image_features(**batch)
    weights = tensors_of(model, statistics=False)
    reestimate_batch_norms(model, images(6, 6, 6))
    torch.testing.assert_close(tensors_of(model, True), tensors_of(expected, True), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tensors_of(model, False), weights, atol=0, rtol=0)
    assert not any(module.training for module in model.modules())
    assert {norm.momentum for norm in batch_norms.batch_norms(model)} == {0.1}


def test_all_images_count_the_same(model):
    batches = images(6, 2)
    reestimate_batch_norms(model, batches)
    norm = model.vision_model.bn1
    with torch.no_grad():
        read = [model.vision_model.conv1(batch["pixel_values"]).transpose(0, 1).flatten(1) for batch in batches]
    mean, variance = (
        (6 * getattr(read[0], name)(dim=1) + 2 * getattr(read[1], name)(dim=1)) / 8 for name in ("mean", "var")
    )
    torch.testing.assert_close(norm.running_mean, mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(norm.running_var, variance, atol=1e-6, rtol=1e-5)
    assert norm.num_batches_tracked == 2


def test_a_single_image_has_no_variance_and_is_left_out(model):
    other = copy.deepcopy(model)
    reestimate_batch_norms(model, images(4, 1))
    reestimate_batch_norms(other, images(4))
    torch.testing.assert_close(tensors_of(model, True), tensors_of(other, True), atol=0, rtol=0)


def test_without_batches_statistics_stay(model):
    before = tensors_of(model, True)
    with pytest.raises(ValueError, match="batches of at least two images, and there are none"):
        reestimate_batch_norms(model, images(1, 1))
    torch.testing.assert_close(tensors_of(model, True), before, atol=0, rtol=0)


def test_a_model_without_batch_norms_is_an_error(tiny_teacher):
    with pytest.raises(ValueError, match="CLIPModel has no BatchNorms"):
        reestimate_batch_norms(tiny_teacher, images(4))


def test_processes_measure_together(model, monkeypatch):
    whole, other, batches = copy.deepcopy(model), copy.deepcopy(model), images(6, 4, 2)
    reestimate_batch_norms(whole, batches)
    reestimate_batch_norms(other, batches[2:])
    theirs = [buffer for norm in batch_norms.batch_norms(other) for buffer in norm.buffers()]

    def add_theirs(tensors: list[torch.Tensor]) -> None:
        """What a process with the last two images would send: their number, then its part of all twelve."""
        found = [torch.tensor(2.0)] if len(tensors) == 1 else theirs
        for mine, sent in zip(tensors, found, strict=True):
            mine += sent * 2 / 12 if mine.ndim else sent

    monkeypatch.setattr(batch_norms, "sum_over_processes", add_theirs)
    reestimate_batch_norms(model, batches[:2])
    torch.testing.assert_close(tensors_of(model, True), tensors_of(whole, True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("initializer", ["diagonal", "kaiming", "random", "xavier"])
def test_a_start_with_pairs_measures_them(clip_resnet, tiny_batch, initializer):
    config = dataclasses.replace(NARROW, initializer=initializer)
    expected = start_mapper(clip_resnet, config).export()
    inherited = tensors_of(expected, True)
    mapper = start_mapper(clip_resnet, config, [tiny_batch])
    reestimate_batch_norms(expected, [tiny_batch])
    for found in (mapper.export(), copy.deepcopy(mapper).export()):
        torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()), atol=0, rtol=0)
    name = "vision_model.layer4.0.bn3.running_var"
    assert not torch.allclose(inherited[name], tensors_of(expected, True)[name])


def test_inherited_statistics_read_no_pairs(clip_resnet, tiny_batch):
    with pytest.raises(ValueError, match="'diagonal' does not start from data; leave calibration_data out"):
        start_mapper(clip_resnet, INHERITED, [tiny_batch])
    with pytest.raises(ValueError, match="norm_statistics='kept' is unknown; allowed are"):
        ClipMapConfig(norm_statistics="kept")


def test_statistics_of_a_tower_that_is_kept_are_kept(clip_resnet, tiny_batch):
    config = ClipMapConfig(text=TowerConfig(hidden_size=32), initializer="diagonal")
    student = start_mapper(clip_resnet, config, [tiny_batch]).export()
    torch.testing.assert_close(tensors_of(student, True), tensors_of(clip_resnet, True), atol=0, rtol=0)


def test_a_map_holds_the_statistics(clip_resnet_folder, pairs_parquet, tmp_path):
    given = {"calibration_data": str(pairs_parquet), "calibration_pairs": 16}
    compressor = ClipMapCompressor.from_pretrained(clip_resnet_folder, UNNAMED, **given)
    assert compressor.map_config == NARROW
    compressor.save_pretrained(tmp_path)
    expected = ClipMapCompressor.from_pretrained(clip_resnet_folder, NARROW).export()
    reestimate_batch_norms(expected, sampled_pairs(str(pairs_parquet), load_processor(str(clip_resnet_folder)), 16))
    for found in (ClipMapCompressor.from_pretrained(tmp_path).export(), load_model(str(tmp_path))):
        torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()), atol=0, rtol=0)


@pytest.mark.parametrize("config", [UNNAMED, INHERITED], ids=["measured", "inherited"])
def test_a_run_measures_on_its_training_pairs(clip_resnet_folder, pairs_parquet, tmp_path, config, no_start):
    source, calibration = ModelId(str(clip_resnet_folder)), CalibrationArguments(calibration_pairs=16)
    context = RunContext(RunArguments(output_dir=str(tmp_path)), DataArguments(train_data=str(pairs_parquet)))
    student = start_student(source, config, context, calibration)
    expected = ClipMapCompressor.from_pretrained(clip_resnet_folder, NARROW).export()
    if config is UNNAMED:
        reestimate_batch_norms(expected, context.calibration_batches(context.teacher(source), calibration))
        no_start()  # what is kept is used when the run goes on
    for found in (student, start_student(source, config, context, calibration)):
        torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()), atol=0, rtol=0)

"""The mapping stage of a CLIP with a ResNet: BatchNorms have statistics of the mapped network, not of the teacher."""

import copy
import dataclasses

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import TrainerCallback

from clipmap_hf import DistillationArguments, MappingArguments, MappingStageArguments, MappingTrainer, compress
from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig, ResNetTowerConfig, TowerConfig
from clipmap_hf.models.loading import load_model
from clipmap_hf.starts import start_mapper
from clipmap_hf.training.stages.base import encode_chunk
from clipmap_hf.training.stages.mapping import MappingStage


NARROW = ClipMapConfig(
    vision=ResNetTowerConfig(width=2), text=TowerConfig(hidden_size=32, num_hidden_layers=2), initializer="diagonal"
)
STARTS = ("diagonal", "kaiming", "random", "xavier")


def started(teacher, initializer: str = "diagonal"):
    return start_mapper(teacher, dataclasses.replace(NARROW, initializer=initializer))


def stepped(stage: MappingStage, batch, steps: int = 3) -> None:
    """Trains a stage on a batch."""
    stage.train()
    optimizer = torch.optim.AdamW([one for one in stage.parameters() if one.requires_grad], lr=1e-2)
    for _ in range(steps):
        stage([batch])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("initializer", STARTS)
def test_a_pass_in_training_is_that_of_the_exported_student(clip_resnet, tiny_batch, initializer):
    stage = MappingStage(started(clip_resnet, initializer)).train()
    student = stage.export().train()
    features = stage._student_features([tiny_batch])
    images, texts, _ = encode_chunk(student, {}, tiny_batch)
    torch.testing.assert_close((features.image_embeds, features.text_embeds), (images, texts), atol=1e-5, rtol=0)
    torch.testing.assert_close(dict(stage.export().state_dict()), dict(student.state_dict()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("initializer", STARTS)
def test_operators_learn_with_statistics_of_the_mapped_network(clip_resnet, tiny_batch, initializer):
    mapper = started(clip_resnet, initializer)
    before, statistics = values(mapper), values(mapper.statistics)
    teacher = values(clip_resnet)
    stage = MappingStage(mapper)
    stepped(stage, tiny_batch)
    changed = [name for name, value in values(mapper).items() if not torch.equal(before[name], value)]
    trained = [name for name in changed if name.endswith("delta")]
    assert {name.split(".")[1] for name in trained} == mapper.operators.keys()
    assert not any(torch.equal(one, statistics[name]) for name, one in values(mapper.statistics).items())
    torch.testing.assert_close(values(clip_resnet), teacher, atol=0, rtol=0)
    with torch.no_grad():
        found, expected = (one.eval()(**tiny_batch).image_embeds for one in (mapper, stage.export()))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_statistics_follow_what_the_mapped_network_computes(clip_resnet, tiny_batch):
    """After many passes, the stem's running mean is that of the mapped convolution, whatever it was before."""
    stage = MappingStage(started(clip_resnet)).train()
    for _ in range(200):  # each leaves 0.9 of what was there
        stage._student_features([tiny_batch])
    tower = stage.export().vision_model
    with torch.no_grad():
        read = tower.conv1(tiny_batch["pixel_values"]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(tower.bn1.running_mean, read.mean(dim=1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tower.bn1.running_var, read.var(dim=1), atol=1e-5, rtol=1e-4)


def test_a_vision_tower_that_is_kept_stays_the_teachers(clip_resnet, tiny_batch):
    """Its weights and statistics, bit for bit, though the text tower is trained beside it."""
    mapper = start_mapper(clip_resnet, dataclasses.replace(NARROW, vision=ResNetTowerConfig()))
    stage = MappingStage(mapper)
    stepped(stage, tiny_batch)
    expected = dict(clip_resnet.vision_model.state_dict())
    torch.testing.assert_close(dict(stage.export().vision_model.state_dict()), expected, atol=0, rtol=0)
    assert not stage.statistics() and not mapper.statistics.tensors()


def test_a_student_of_the_same_size_is_the_teacher(clip_resnet, tiny_batch):
    mapper = start_mapper(clip_resnet, ClipMapConfig(vision=ResNetTowerConfig(width=4)), [tiny_batch])
    torch.testing.assert_close(dict(mapper.export().state_dict()), dict(clip_resnet.state_dict()), atol=0, rtol=0)
    with pytest.raises(ValueError, match="as large as its teacher, so there is nothing to map"):
        MappingStage(mapper)


def test_chunks_and_processes_are_refused(clip_resnet, tiny_batch, as_process):
    stage = MappingStage(started(clip_resnet)).train()
    with pytest.raises(ValueError, match="BatchNorms is trained on whole batches in one process.*micro_batch_size"):
        stage([tiny_batch, tiny_batch])
    assert stage.eval()([tiny_batch, tiny_batch])["loss"].isfinite()
    as_process(0, 2)
    with pytest.raises(ValueError, match="in one process"):
        stage.train()([tiny_batch])


@pytest.mark.parametrize("spoiled", ["images", "gradient"])
def test_a_step_that_is_skipped_leaves_no_statistics(
    clip_resnet_folder, pairs_parquet, tmp_path, monkeypatch, fresh_accelerator, spoiled
):
    compressor = ClipMapCompressor.from_pretrained(clip_resnet_folder, NARROW)
    states, forward, backward = [], MappingStage.forward, Accelerator.backward

    def spoiled_forward(self, chunks):
        if len(states) == 1 and spoiled == "images":
            chunks = [chunk | {"pixel_values": chunk["pixel_values"] * torch.nan} for chunk in chunks]
        return forward(self, chunks)

    def spoiled_backward(self, loss, **kwargs):
        backward(self, loss * torch.nan if len(states) == 1 and spoiled == "gradient" else loss, **kwargs)

    monkeypatch.setattr(MappingStage, "forward", spoiled_forward)
    monkeypatch.setattr(Accelerator, "backward", spoiled_backward)
    monkeypatch.setattr(MappingStage, "after_step", lambda self: states.append(values(self.trained.statistics)))
    arguments = MappingArguments(str(tmp_path / "out"), max_steps=3, batch_size=8)
    result = MappingTrainer(compressor, arguments, str(pairs_parquet)).train()
    assert result.skipped == 1
    torch.testing.assert_close(states[0], states[1], atol=0, rtol=0)
    assert not torch.equal(states[1]["vision_model-bn1-running_mean"], states[2]["vision_model-bn1-running_mean"])
    assert all(one.isfinite().all() for one in load_model(str(tmp_path / "out")).state_dict().values())


class Stop(TrainerCallback):
    """Ends a run in its third step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_resnet_is_mapped_then_distilled_and_a_run_taken_up_again_has_the_same_bits(
    clip_resnet_folder, pairs_parquet, tmp_path, fresh_accelerator
):
    def run(name: str, *callbacks) -> None:
        args = DistillationArguments(str(tmp_path / name), max_steps=2, batch_size=8, save_steps=2)
        mapping = MappingStageArguments(max_steps=4, batch_size=8, learning_rate=1e-3)
        given = {"mapping": mapping, "callbacks": callbacks, "calibration_pairs": 16}
        compress(str(clip_resnet_folder), NARROW, args, str(pairs_parquet), str(pairs_parquet), **given)

    with pytest.raises(KeyboardInterrupt):
        run("stopped", Stop)
    assert (tmp_path / "stopped" / "mapped" / "checkpoints" / "step-00000002").exists()
    run("stopped")
    run("straight")
    for name in ("model.safetensors", "mapped/model.safetensors", "mapped/map/clipmap.safetensors"):
        found, expected = (load_file(tmp_path / run / name) for run in ("stopped", "straight"))
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert load_model(str(tmp_path / "straight")).vision_model.bn1.num_batches_tracked > 4


def test_a_map_goes_on_with_its_statistics(clip_resnet_folder, tiny_batch, tmp_path):
    compressor = ClipMapCompressor.from_pretrained(clip_resnet_folder, NARROW)
    stepped(MappingStage(compressor.mapper), tiny_batch)
    compressor.save_pretrained(tmp_path)
    again = ClipMapCompressor.from_pretrained(tmp_path)
    torch.testing.assert_close(values(again.mapper), values(compressor.mapper), atol=0, rtol=0)
    assert copy.deepcopy(again).mapper.statistics.tensors().keys() <= again.export().state_dict().keys()

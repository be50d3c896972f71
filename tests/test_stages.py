import copy
import math

import pytest
import torch
from torch import nn
from transformers import CLIPModel

from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.features import ClipFeatures
from clipmap_hf.losses import affinity_loss, contrastive_loss
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.training.stages import ContrastiveStage, DistillationStage, MappingStage, Stage


SMALL = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2), text=TowerConfig(hidden_size=16, num_hidden_layers=1)
)


@pytest.fixture
def student(tiny_teacher) -> CLIPModel:
    return WeightMapper(tiny_teacher, SMALL).export().train()


@pytest.fixture
def build(tiny_teacher, student):
    """A factory of stages by name: `build("mapping", logit_scale=50.0, learn_logit_scale=False)`."""

    def stage(name: str, logit_scale: float = 50.0, learn_logit_scale: bool = False, **kwargs) -> Stage:
        if name == "contrastive":
            return ContrastiveStage(student, logit_scale, learn_logit_scale)
        if name == "mapping":
            return MappingStage(WeightMapper(tiny_teacher, SMALL), logit_scale, learn_logit_scale)
        return DistillationStage(student, tiny_teacher, logit_scale, learn_logit_scale, **kwargs)

    return stage


STAGES = ("contrastive", "mapping", "distillation")


def features(model: nn.Module, batch: dict, scale: float = 50.0) -> ClipFeatures:
    return ClipFeatures.from_output(model(**batch), torch.tensor(math.log(scale)))


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_returns_a_loss_and_its_parts(build, tiny_batch, name):
    output = build(name)({**tiny_batch, "bad_rows": 0})
    parts = {"contrastive": set(), "mapping": set(), "distillation": {"affinity", "contrastive"}}[name]
    assert set(output) == {"loss", "logit_scale"} | parts
    assert all(value.ndim == 0 and value.isfinite() for value in output.values())
    assert output["loss"].requires_grad


@pytest.mark.parametrize("name", ["contrastive", "mapping"])
def test_the_loss_is_contrastive_on_the_current_student(build, tiny_batch, name):
    stage = build(name)
    expected = contrastive_loss(features(stage.student(), tiny_batch))
    torch.testing.assert_close(stage(tiny_batch)["loss"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_distillation_weighs_affinity_against_the_contrastive_loss(build, student, tiny_teacher, tiny_batch, weight):
    output = build("distillation", distillation_weight=weight)(tiny_batch)
    mine, theirs = features(student, tiny_batch), features(tiny_teacher, tiny_batch)
    affinity, contrastive = affinity_loss(mine, theirs), contrastive_loss(mine)
    torch.testing.assert_close(output["affinity"], affinity, atol=1e-5, rtol=0)
    torch.testing.assert_close(output["contrastive"], contrastive, atol=1e-5, rtol=0)
    expected = (1 - weight) * contrastive + weight * affinity
    torch.testing.assert_close(output["loss"], expected, atol=1e-5, rtol=0)


def test_distillation_is_affinity_alone_by_default(build, tiny_batch):
    output = build("distillation")(tiny_batch)
    torch.testing.assert_close(output["loss"], output["affinity"], atol=0, rtol=0)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_distillation_weight_out_of_range_is_an_error(build, weight):
    with pytest.raises(ValueError, match=f"distillation_weight={weight} must lie between 0 and 1"):
        build("distillation", distillation_weight=weight)


@pytest.mark.parametrize("name", STAGES)
def test_the_logit_scale_is_fixed_unless_asked(build, tiny_batch, name):
    stage = build(name)
    output = stage(tiny_batch)
    output["loss"].backward()
    torch.testing.assert_close(output["logit_scale"].item(), 50.0, atol=1e-4, rtol=0)
    assert not stage.trained.logit_scale.requires_grad and stage.trained.logit_scale.grad is None


@pytest.mark.parametrize("name", STAGES)
def test_a_learned_logit_scale_starts_as_given_and_is_trained(build, tiny_batch, name):
    stage = build(name, logit_scale=20.0, learn_logit_scale=True)
    output = stage(tiny_batch)
    output["loss"].backward()
    torch.testing.assert_close(output["logit_scale"].item(), 20.0, atol=1e-4, rtol=0)
    assert stage.trained.logit_scale.grad.abs() > 0


@pytest.mark.parametrize("name", STAGES)
def test_a_learned_logit_scale_is_clamped_at_100(build, name):
    stage = build(name, learn_logit_scale=True)
    stage.trained.logit_scale.data.fill_(math.log(130))
    stage.after_step()
    torch.testing.assert_close(stage.trained.logit_scale.exp().item(), 100.0, atol=1e-3, rtol=0)
    stage.trained.logit_scale.data.fill_(math.log(70))
    stage.after_step()
    torch.testing.assert_close(stage.trained.logit_scale.exp().item(), 70.0, atol=1e-3, rtol=0)


def test_the_teachers_logits_have_the_same_scale_whatever_its_own(build, student, tiny_teacher, tiny_batch):
    tiny_teacher.logit_scale.data.fill_(math.log(3))
    stage = build("distillation", logit_scale=20.0, learn_logit_scale=True)
    expected = affinity_loss(features(student, tiny_batch, 20.0), features(tiny_teacher, tiny_batch, 20.0))
    torch.testing.assert_close(stage(tiny_batch)["loss"], expected, atol=1e-5, rtol=0)
    stage.trained.logit_scale.data.fill_(math.log(30))  # a learned scale moves the student's logits only
    expected = affinity_loss(features(student, tiny_batch, 30.0), features(tiny_teacher, tiny_batch, 20.0))
    torch.testing.assert_close(stage(tiny_batch)["loss"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", STAGES)
def test_an_exported_student_carries_the_scale_it_was_trained_with(build, name):
    torch.testing.assert_close(build(name).student().logit_scale.item(), math.log(50), atol=1e-6, rtol=0)


def test_the_teacher_of_a_distillation_is_frozen_and_stays_in_eval_mode(build, tiny_teacher, tiny_batch):
    tiny_teacher.train().requires_grad_(True)
    before = copy.deepcopy(tiny_teacher.state_dict())
    stage = build("distillation").train()
    stage(tiny_batch)["loss"].backward()
    assert stage.training and not tiny_teacher.training
    assert all(not p.requires_grad and p.grad is None for p in tiny_teacher.parameters())
    for name, tensor in before.items():
        torch.testing.assert_close(tiny_teacher.state_dict()[name], tensor, atol=0, rtol=0)


def test_the_teacher_of_a_distillation_is_neither_parameter_nor_saved(build, student, tiny_teacher):
    stage = build("distillation")
    assert {id(p) for p in stage.parameters()} == {id(p) for p in student.parameters()}
    assert set(stage.state_dict()) == {f"trained.{name}" for name in student.state_dict()}
    assert tiny_teacher not in set(stage.modules())


def test_the_teacher_of_a_distillation_moves_with_the_stage(build, tiny_teacher):
    build("distillation").to(torch.float64)
    assert {p.dtype for p in tiny_teacher.parameters()} == {torch.float64}


def test_all_student_weights_get_gradients_in_distillation(build, student, tiny_batch):
    build("distillation")(tiny_batch)["loss"].backward()
    without = {name for name, p in student.named_parameters() if p.grad is None}
    assert without == {"logit_scale"}


def test_the_student_of_a_mapping_is_a_plain_clip_model(build, tiny_batch):
    stage = build("mapping")
    student = stage.student()
    assert type(student) is CLIPModel and not student.training
    assert student is not stage.student()  # a copy: evaluating or saving it does not touch the operators
    with torch.no_grad():
        torch.testing.assert_close(
            student(**tiny_batch).image_embeds, stage.trained(**tiny_batch).image_embeds, atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("name", ["contrastive", "distillation"])
def test_the_student_of_the_other_stages_is_what_is_trained(build, student, name):
    assert build(name).student() is student


def test_a_teacher_that_reads_other_inputs_is_refused(tiny_teacher):
    other = copy.deepcopy(tiny_teacher)
    other.config.vision_config.image_size = 64
    with pytest.raises(ValueError, match="vision_config.image_size is 32 in the student and 64 in the teacher"):
        DistillationStage(tiny_teacher, other, 50.0, False)

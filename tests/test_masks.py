"""Masks do what a model without the masked parts does, and are learned under their budget."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from calibrated_starts import TOWERS
from torch import nn
from torch.func import functional_call

from clipmap_hf.config import ClipMapConfig, TowerConfig, student_config
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.families import CLIP
from clipmap_hf.mapping.plan import MappingPlan
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.masking import MaskingTrainer
from clipmap_hf.starts import start_mapper
from clipmap_hf.starts.selection.masks import MaskedLayerNorm, Masks, expected, sampled, settled
from clipmap_hf.starts.selection.start import mapper_from_scores
from clipmap_hf.training.arguments import MaskingStageArguments
from clipmap_hf.training.optimization import parameter_groups
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.sharding import prepare_stage
from clipmap_hf.training.stages.masking import MaskingStage


NARROW = ClipMapConfig(TowerConfig(32), TowerConfig(32), initializer="manual")


@pytest.fixture
def masks(shared_teacher) -> Masks:
    """Half of the channels and heads, and a third of the neurons, have lower logits."""
    masks, generator = Masks(shared_teacher.config, CLIP), torch.Generator().manual_seed(0)
    for logits in masks.parameters():
        logits.data = torch.randn(logits.shape, generator=generator)
    return masks


def masking(teacher, ramp_steps: int, student: ClipMapConfig = NARROW) -> MaskingStage:
    """The stage of a copy; a stage freezes its teachers, and others use this one."""
    return MaskingStage(
        copy.deepcopy(teacher),
        teachers=[copy.deepcopy(teacher)],
        logit_scale=50.0,
        learn_logit_scale=False,
        student=student,
        ramp_steps=ramp_steps,
    )


def test_draws_are_zero_as_often_as_expected():
    logits = torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([sampled(logits, generator) for _ in range(20000)])
    assert draws.min() == 0 and draws.max() == 1
    torch.testing.assert_close((draws > 0).float().mean(dim=0), expected(logits), atol=0.02, rtol=0)


def test_draws_have_a_gradient_where_they_are_not_cut_off():
    logits = torch.zeros(1000, requires_grad=True)
    draws = sampled(logits, torch.Generator().manual_seed(0))
    draws.sum().backward()
    inside = (draws > 0) & (draws < 1)
    assert 100 < inside.sum() < 900
    assert (logits.grad[inside] > 0).all() and (logits.grad[~inside] == 0).all()


def test_settled_masks_leave_out_as_many_as_expected():
    logits = torch.tensor([[4.0, -4.0, 4.0, -3.0], [4.0, 4.0, 4.0, 4.0]])
    assert settled(logits).tolist() == [[1, 0, 1, 0], [1, 1, 1, 1]]


def test_a_masked_layer_norm_is_that_of_the_kept_channels():
    generator = torch.Generator().manual_seed(0)
    norm, kept = nn.LayerNorm(8), torch.tensor([0, 2, 3, 7])
    stream = torch.randn(2, 3, 8, generator=generator)
    masked = MaskedLayerNorm.of(norm)
    masked.load_state_dict({"weight": torch.arange(8.0), "bias": torch.ones(8), "mask": torch.zeros(8)})
    masked.mask[kept] = torch.tensor([1.0, 0.3, 1.0, 0.9])
    small = nn.LayerNorm(4)
    small.load_state_dict({"weight": torch.arange(8.0)[kept], "bias": torch.ones(4)})
    out = masked(stream)
    torch.testing.assert_close(out[..., kept], small(stream[..., kept]), atol=1e-5, rtol=1e-5)
    assert (out[..., [1, 4, 5, 6]] == 0).all()


@torch.no_grad()
def test_a_masked_model_is_the_model_of_the_kept_parts(shared_teacher, tiny_batch, masks):
    """With masks of 0 and 1, as many in each layer as a student of half the width has."""
    scores = masks.scores()
    plan = MappingPlan.make(shared_teacher, NARROW)
    mapper = mapper_from_scores(plan, plan.teacher_tensors(shared_teacher), scores)
    small = mapper.export()
    on = {}
    for tower in TOWERS:
        config = getattr(small.config, f"{tower}_config")
        sizes = {"channels": 32, "heads": config.num_attention_heads, "neurons": config.intermediate_size}
        for part, size in sizes.items():
            logits = getattr(masks, f"{tower}_{part}")
            smallest = logits.sort(dim=-1, descending=True).values[..., size - 1 : size]
            on[f"{tower}_{part}"] = (logits >= smallest).float()
    stage = masking(shared_teacher, 1)
    weights = masks.masked(dict(shared_teacher.named_parameters()), on)
    output = functional_call(stage.skeleton.eval(), weights, kwargs=tiny_batch)
    expected_output = small(**tiny_batch)
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(output[name], expected_output[name], atol=1e-5, rtol=1e-4)


def test_the_share_of_masks_that_are_all_but_settled_is_that_of_the_student(shared_teacher):
    masks, student = Masks(shared_teacher.config, CLIP), student_config(shared_teacher.config, NARROW)
    whole = masks.share().item()
    assert 0.98 < whole <= 1
    for tower in TOWERS:
        config = getattr(student, f"{tower}_config")
        for part, size in (
            ("channels", 32),
            ("heads", config.num_attention_heads),
            ("neurons", config.intermediate_size),
        ):
            logits = getattr(masks, f"{tower}_{part}")
            logits.data[..., size:] = -1000.0
    assert masks.share().item() == pytest.approx(masks.share_of(student), rel=0.02)
    blocks = [
        sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)
        for model in (start_mapper(shared_teacher, NARROW).export(), shared_teacher)
    ]
    assert masks.share_of(student) == pytest.approx(blocks[0] / blocks[1])


def test_a_tower_that_is_not_cut_has_no_masks(shared_teacher, tiny_batch):
    stage = masking(shared_teacher, 40, ClipMapConfig(TowerConfig(32), initializer="manual")).train()
    assert {name.split("_")[0] for name, _ in stage.masks.named_parameters()} == {"vision"}
    assert stage.target > 0.3 and stage.masks.share() > 0.98
    texts, whole = (
        stage._encode(*model, tiny_batch)[1] for model in (stage._student_model([tiny_batch]), (shared_teacher, {}))
    )
    torch.testing.assert_close(texts, whole, atol=1e-6, rtol=0)
    student, teacher = stage.student().state_dict(), shared_teacher.state_dict()
    for name in (name for name in teacher if name.startswith("text")):
        assert torch.equal(student[name], teacher[name]), name


def test_masks_refuse_a_student_as_large_as_its_source(shared_teacher):
    with pytest.raises(ValueError, match="as large as its source"):
        masking(shared_teacher, 40, ClipMapConfig())


def test_masks_reach_their_budget_and_the_student_its_shape(shared_teacher, tiny_batch):
    stage = masking(shared_teacher, 40).train()
    optimizer = torch.optim.AdamW(parameter_groups(stage, 0.2), lr=1e-4)
    for group in optimizer.param_groups:
        group["lr"] = group.get("fixed_rate", 0.0) * 10  # in fewer steps
    shares, multipliers = [], []
    for _ in range(200):
        optimizer.zero_grad()
        output = stage([tiny_batch])
        output["loss"].backward()
        optimizer.step()
        stage.after_step()
        shares.append(output["share"].item())
        multipliers.append(stage.multipliers.tolist())
    assert shares[0] > 0.98 and shares[-1] == pytest.approx(stage.target, abs=0.05)
    assert shares[10] > stage.target + 0.1  # not before it is due
    assert multipliers[-1][0] > 10 and multipliers[-1][1] > 10
    student = stage.student()
    assert student.config.vision_config.hidden_size == 32 and not student.training
    for logits in stage.masks.parameters():
        assert logits.abs().max() <= math.log(100) and logits.std() > 0


def test_a_draw_is_the_same_when_a_run_goes_on(shared_teacher, tiny_batch):
    stages = [masking(shared_teacher, 4) for _ in range(2)]
    for stage in stages:
        for logits in stage.masks.parameters():
            logits.data.fill_(0.5)
        stage.train()
    stages[0].after_step()
    torch.rand(1)
    assert stages[0]([tiny_batch])["affinity"] != stages[1]([tiny_batch])["affinity"]
    stages[1].load_state_dict(stages[0].state_dict())
    torch.rand(1)
    torch.testing.assert_close(stages[0]([tiny_batch]), stages[1]([tiny_batch]), atol=0, rtol=0)


def test_masks_and_multipliers_have_a_rate_of_their_own(shared_teacher):
    stage = masking(shared_teacher, 4)
    groups = [group for group in parameter_groups(stage, 0.2) if "fixed_rate" in group]
    assert [group["fixed_rate"] for group in groups] == [0.02]
    assert [group["weight_decay"] for group in groups] == [0.0]
    fixed = {id(p) for p in groups[0]["params"]}
    assert fixed == {id(p) for p in (*stage.masks.parameters(), stage.multipliers)}
    others = [p for group in parameter_groups(stage, 0.2) if "fixed_rate" not in group for p in group["params"]]
    assert not fixed & {id(p) for p in others} and len(others) == len(list(stage.trained.parameters())) - 1


def test_fsdp_is_refused(shared_teacher, fresh_accelerator):
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match="which FSDP would put back"):
        prepare_stage(masking(shared_teacher, 2), accelerator, MaskingStageArguments(), 8)


def test_a_ramp_longer_than_the_training_is_refused(tiny_teacher, tiny_processor, pairs_parquet, tmp_path):
    """Its budget would never be the student's."""
    teacher = Teacher(tiny_teacher, tiny_processor, "me/teacher")
    context = RunContext(RunArguments(str(tmp_path)), DataArguments(str(pairs_parquet)))
    arguments = MaskingStageArguments(max_steps=4, ramp_steps=5, batch_size=1)
    with pytest.raises(ValueError, match="ramp_steps=5 are more than the 4"):
        MaskingTrainer(teacher, [teacher], NARROW, arguments, context).train()

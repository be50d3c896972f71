import copy
import dataclasses
import math
from collections import Counter

import pytest
import torch
from conftest import randomize
from torch import nn
from transformers import CLIPModel

from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.collate import PairCollator, normalized_pixels
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.losses import LOSSES, PAIR_LOSSES, affinity_loss, contrastive_loss
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.mapping.operators import Operator
from clipmap_hf.models.features import ClipFeatures
from clipmap_hf.models.fingerprints import model_fingerprint
from clipmap_hf.starts import start_mapper
from clipmap_hf.teacher_cache.build import build_teacher_cache, finish_teacher_cache
from clipmap_hf.teacher_cache.lookup import TeacherCache
from clipmap_hf.teacher_cache.manifest import cache_manifest
from clipmap_hf.training.arguments import DistillationStageArguments
from clipmap_hf.training.stages.base import Stage
from clipmap_hf.training.stages.contrastive import ContrastiveStage
from clipmap_hf.training.stages.distillation import DistillationStage
from clipmap_hf.training.stages.mapping import MappingStage


SMALL = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2), text=TowerConfig(hidden_size=16, num_hidden_layers=1)
)
DROPOUT = {"attention_dropout": 0.5}
MIXED = {"affinity": 0.6, "contrastive": 0.4}
HIDDEN = {"hidden": 1.0, "affinity": 1.0}
STAGES = ("contrastive", "mapping", "distillation")


@pytest.fixture
def student(tiny_teacher) -> CLIPModel:
    return start_mapper(tiny_teacher, SMALL).export().train()


@pytest.fixture
def build(tiny_teacher, student):
    """A factory of stages by name: `build("mapping")`."""

    def stage(name: str, logit_scale: float = 50.0, learn_logit_scale: bool = False, **kwargs) -> Stage:
        if name == "contrastive":
            return ContrastiveStage(student, logit_scale=logit_scale, learn_logit_scale=learn_logit_scale)
        if name == "mapping":
            mapper = start_mapper(tiny_teacher, SMALL)
            teachers = [tiny_teacher] if kwargs else []
            return MappingStage(
                mapper, logit_scale=logit_scale, learn_logit_scale=learn_logit_scale, teachers=teachers, **kwargs
            )
        return DistillationStage(
            student, teachers=[tiny_teacher], logit_scale=logit_scale, learn_logit_scale=learn_logit_scale, **kwargs
        )

    return stage


@pytest.fixture(scope="module")
def other_teacher(tiny_config) -> CLIPModel:
    """Another teacher than `tiny_teacher`, with a joint embedding of another width."""
    return randomize(CLIPModel(tiny_config(projection_dim=16)), seed=1).eval()


@pytest.fixture(scope="module")
def batch(tiny_pairs, tiny_processor) -> dict[str, torch.Tensor]:
    """All 24 pairs."""
    captions, images = ([row[name] for row in tiny_pairs] for name in ("caption", "image"))
    return dict(tiny_processor(text=captions, images=images, padding=True, return_tensors="pt"))


def chunked(batch: dict, size: int) -> list[dict]:
    """The batch in chunks of `size` pairs."""
    return [
        {name: value[start : start + size] for name, value in batch.items()}
        for start in range(0, len(batch["input_ids"]), size)
    ]


def features(model: nn.Module, batch: dict, scale: float = 50.0) -> ClipFeatures:
    return ClipFeatures.from_output(model(**batch), torch.tensor(math.log(scale)))


def step(stage: Stage, chunks: list[dict], seed: int = 0) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """What a stage returns for `chunks`, and the gradient of every parameter that has one."""
    stage.zero_grad()
    torch.manual_seed(seed)
    output = stage(chunks)
    output["loss"].backward()
    # A key's bias adds the same to all scores of a query, so its gradient is rounding noise.
    named = [(name, p) for name, p in stage.named_parameters() if not name.endswith("k_proj.bias")]
    return {k: v.item() for k, v in output.items()}, {k: p.grad.clone() for k, p in named if p.grad is not None}


def assert_same_step(actual: tuple, expected: tuple, tolerance: float = 1e-5) -> None:
    """Losses and every gradient within `tolerance` of the largest entry."""
    assert actual[0] == pytest.approx(expected[0], rel=tolerance)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        size = gradient.abs().max().item()
        assert size > 0, name
        torch.testing.assert_close(
            actual[1][name], gradient, atol=tolerance * size, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


# Losses


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_returns_a_loss_and_its_parts(build, tiny_batch, name):
    output = build(name)([tiny_batch])
    parts = {"contrastive": set(), "mapping": {"contrastive"}, "distillation": {"affinity"}}[name]
    assert set(output) == {"loss", "logit_scale"} | parts
    assert all(value.ndim == 0 and value.isfinite() for value in output.values())
    assert output["loss"].requires_grad


@pytest.mark.parametrize("name", ["contrastive", "mapping"])
def test_the_loss_is_contrastive_on_the_current_student(build, tiny_batch, name):
    stage = build(name)
    expected = contrastive_loss(features(stage.student(), tiny_batch))
    torch.testing.assert_close(stage([tiny_batch])["loss"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "weight"), [("distillation", 0.0), ("distillation", 0.3), ("distillation", 1.0), ("mapping", 0.3)]
)
def test_affinity_is_weighed_against_the_contrastive_loss(build, tiny_teacher, tiny_batch, name, weight):
    stage = build(name, losses={"affinity": weight, "contrastive": 1 - weight})
    output = stage([tiny_batch])
    mine, theirs = features(stage.student(), tiny_batch), features(tiny_teacher, tiny_batch)
    affinity, contrastive = affinity_loss(mine, theirs), contrastive_loss(mine)
    torch.testing.assert_close(output["affinity"], affinity, atol=1e-5, rtol=0)
    torch.testing.assert_close(output["contrastive"], contrastive, atol=1e-5, rtol=0)
    expected = (1 - weight) * contrastive + weight * affinity
    torch.testing.assert_close(output["loss"], expected, atol=1e-5, rtol=0)


def test_distillation_is_affinity_alone_by_default(build, tiny_batch):
    output = build("distillation")([tiny_batch])
    torch.testing.assert_close(output["loss"], output["affinity"], atol=0, rtol=0)


def test_a_distilling_mapping_trains_the_operators_alone(build, tiny_teacher, tiny_batch):
    stage = build("mapping", losses={"affinity": 1.0}).train()
    before = {name: tensor.clone() for name, tensor in tiny_teacher.state_dict().items()}
    stage([tiny_batch])["loss"].backward()
    assert all(parameter.grad.any() for parameter in stage.trained.operators.parameters())
    assert all(parameter.grad is None for parameter in tiny_teacher.parameters())
    for name, tensor in tiny_teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_every_loss_can_be_trained_on_at_once(build, tiny_batch):
    softmaxed = [name for name in LOSSES if name != "sigmoid"]  # that one is for SigLIP
    losses = {name: 1 + index for index, name in enumerate(softmaxed)}
    output = build("distillation", losses=losses)([tiny_batch])
    expected = sum(weight * output[name] for name, weight in losses.items())
    torch.testing.assert_close(output["loss"], expected, atol=1e-5, rtol=0)


def test_embeddings_of_other_widths_are_compared_through_a_trained_map(student, tiny_teacher, other_teacher, batch):
    """Which is no part of the student, and the same in every process."""
    torch.manual_seed(0)
    numbers = torch.get_rng_state()
    stage = DistillationStage(
        student,
        teachers=[tiny_teacher, other_teacher],
        logit_scale=50.0,
        learn_logit_scale=False,
        losses={"feature": 1.0},
    ).train()
    assert torch.equal(torch.get_rng_state(), numbers)
    maps = dict(stage.projectors.named_parameters())
    assert {name: tuple(one.shape) for name, one in maps.items()} == {
        "1.image.weight": (16, 32),
        "1.text.weight": (16, 32),
    }
    optimizer = torch.optim.Adam(stage.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(stage([batch])["loss"])
        losses[-1].backward()
        optimizer.step()
    assert all(one.grad.any() for one in maps.values())
    assert losses[-1] < 0.7 * losses[0]
    assert stage.student() is student and type(student) is CLIPModel


def test_embeddings_from_a_cache_are_compared_like_their_teachers(student, tiny_teacher, other_teacher, batch):
    teachers, losses = [tiny_teacher, other_teacher], {"feature": 1.0, "interactive": 1.0}
    live = step(
        DistillationStage(student.eval(), teachers=teachers, losses=losses),
        [batch],
    )
    embeds = [features(teacher, batch) for teacher in teachers]
    brought = batch | {"teacher_embeds": [(one.image_embeds, one.text_embeds) for one in embeds]}
    cached = DistillationStage(student.eval(), losses=losses, teacher_dims=(32, 16))
    torch.testing.assert_close(step(cached, [brought]), live, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - set(PAIR_LOSSES)))
def test_a_loss_that_no_teacher_is_there_for_is_an_error(student, tiny_batch, name):
    losses = {"contrastive": 1.0, name: 1.0}
    with pytest.raises(ValueError, match="needs the (features of at least one teacher|teacher itself)"):
        DistillationStage(student, losses=losses)([tiny_batch])


# The hidden loss


def streams(model: CLIPModel, batch) -> dict[str, torch.Tensor]:
    """What the last layer of each tower leaves, by hooks."""
    found = {}
    for name in ("vision", "text"):
        last = getattr(model, f"{name}_model").encoder.layers[-1]
        last.register_forward_hook(lambda _, __, output, name=name: found.update({name: output}), always_call=True)
    features(model, batch)
    return found


def test_the_hidden_loss_compares_what_layers_leave(student, tiny_teacher, batch):
    one_layer = ClipMapConfig(TowerConfig(num_hidden_layers=1), TowerConfig(num_hidden_layers=1))
    student = start_mapper(tiny_teacher, one_layer).export()
    output = DistillationStage(student, teachers=[tiny_teacher], losses=HIDDEN).eval()([batch])
    own, theirs = (streams(model, batch) for model in (student, tiny_teacher))
    counts = batch["attention_mask"]
    text = ((own["text"] - theirs["text"]).square().mean(dim=-1) * counts).sum(dim=1) / counts.sum(dim=1)
    expected = (own["vision"] - theirs["vision"]).square().mean() + text.mean()
    torch.testing.assert_close(output["hidden"], expected, atol=1e-5, rtol=1e-5)
    assert output["hidden"] > 0.01


def test_a_copy_of_the_teacher_has_no_hidden_errors(tiny_teacher, batch):
    stage = DistillationStage(copy.deepcopy(tiny_teacher), teachers=[tiny_teacher], losses=HIDDEN).eval()
    assert not list(stage.stream_projectors.parameters())
    assert stage([batch])["hidden"] < 1e-10


def test_streams_of_other_widths_are_compared_through_a_trained_map(student, tiny_teacher, batch):
    stage = DistillationStage(student, teachers=[tiny_teacher], losses=HIDDEN).train()
    maps = {name: tuple(one.shape) for name, one in stage.stream_projectors.named_parameters()}
    assert maps == {"vision.weight": (64, 32), "text.weight": (48, 16)}
    _, gradients = step(stage, [batch])
    assert all(gradients[f"stream_projectors.{name}"].any() for name in maps)


def test_a_mapping_has_no_hidden_loss(build):
    with pytest.raises(ValueError, match="knows no hidden loss"):
        build("mapping", losses=HIDDEN)


def test_the_hidden_loss_needs_teachers_of_the_same_patches(student, tiny_config):
    other = CLIPModel(tiny_config(vision={"patch_size": 16}))
    DistillationStage(student, teachers=[other])
    with pytest.raises(ValueError, match="vision_config.patch_size is 8 in the student and 16 in the teacher"):
        DistillationStage(student, teachers=[other], losses=HIDDEN)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"affinities": 1.0}, "unknown names .'affinities'.; allowed are .'affinity', 'contrastive'"),
        ({"affinity": -0.1, "contrastive": 1.0}, "weights of at least 0"),
        ({"affinity": math.nan}, "weights of at least 0"),
        ({"affinity": math.inf}, "weights of at least 0"),
        ({"affinity": 0.0}, "and some weight above 0"),
        ({"affinity": 0.0, "hidden": 1.0}, "would not train the projections"),
        ({}, "and some weight above 0"),
    ],
)
def test_losses_that_make_no_sum_are_an_error(build, losses, message):
    for make in (lambda: build("distillation", losses=losses), lambda: DistillationStageArguments(losses=losses)):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("name", STAGES)
def test_bytes_that_the_collator_ships_are_what_the_processor_makes(build, tiny_processor, tiny_batch, name):
    pixels = torch.randint(256, tiny_batch["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(getattr(tiny_processor.image_processor, f"image_{one}")) for one in ("mean", "std"))
    packed = tiny_batch | {"pixel_values": pixels.byte(), "image_mean": mean, "image_std": std}
    plain = tiny_batch | {"pixel_values": (pixels / 255 - mean[:, None, None]) / std[:, None, None]}
    stage, halves = build(name), slice(0, 4)
    expected = step(stage, [plain])
    assert_same_step(step(stage, [packed]), expected, 1e-6)
    chunks = [
        {k: v if k.startswith("image_") else v[part] for k, v in packed.items()} for part in (halves, slice(4, 8))
    ]
    assert_same_step(step(stage, chunks), expected)
    assert packed["pixel_values"].dtype == torch.uint8 and torch.equal(packed["pixel_values"], pixels.byte())


# The logit scale


@pytest.mark.parametrize("name", STAGES)
def test_the_logit_scale_is_fixed_unless_asked(build, tiny_batch, name):
    stage = build(name)
    output = stage([tiny_batch])
    output["loss"].backward()
    torch.testing.assert_close(output["logit_scale"].item(), 50.0, atol=1e-4, rtol=0)
    assert not stage.trained.logit_scale.requires_grad and stage.trained.logit_scale.grad is None


@pytest.mark.parametrize("name", STAGES)
def test_a_learned_logit_scale_starts_as_given_and_is_trained(build, tiny_batch, name):
    stage = build(name, logit_scale=20.0, learn_logit_scale=True)
    output = stage([tiny_batch])
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
    torch.testing.assert_close(stage([tiny_batch])["loss"], expected, atol=1e-5, rtol=0)
    stage.trained.logit_scale.data.fill_(math.log(30))  # a learned scale moves the student's logits only
    expected = affinity_loss(features(student, tiny_batch, 30.0), features(tiny_teacher, tiny_batch, 20.0))
    torch.testing.assert_close(stage([tiny_batch])["loss"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", STAGES)
def test_a_fixed_scale_is_the_stage_s_and_not_the_model_s(build, batch, name, tiny_teacher):
    stage = build(name)
    logged = stage([batch])["logit_scale"].item()
    torch.testing.assert_close(logged, 50.0, atol=1e-4, rtol=0)
    # From scratch, there is no teacher whose scale a model could keep.
    expected = math.log(50) if name == "contrastive" else tiny_teacher.logit_scale.item()
    torch.testing.assert_close(stage.student().logit_scale.item(), expected, atol=1e-6, rtol=0)


# Gradient caching: what several chunks compute


@pytest.mark.parametrize("learn_logit_scale", [False, True], ids=["fixed scale", "learned scale"])
@pytest.mark.parametrize("name", STAGES)
def test_chunks_have_the_loss_and_gradient_of_the_whole_batch(build, batch, name, learn_logit_scale):
    options = {"losses": MIXED | {"hidden": 0.1}} if name == "distillation" else {}
    stage = build(name, learn_logit_scale=learn_logit_scale, **options).train()
    whole = step(stage, [batch])
    trained = {k for k, p in stage.named_parameters() if p.requires_grad and not k.endswith("k_proj.bias")}
    assert whole[1].keys() == trained
    for size in (6, 12):
        assert_same_step(step(stage, chunked(batch, size)), whole)


@pytest.mark.parametrize("name", STAGES)
def test_chunks_may_differ_in_size_and_length(build, batch, name):
    stage = build(name).train()
    small, large = ({k: v[part] for k, v in batch.items()} for part in (slice(0, 3), slice(3, 24)))
    length = int(small["attention_mask"].sum(dim=1).max())
    assert length < batch["input_ids"].shape[1]  # each chunk is padded to its own longest caption
    small |= {k: small[k][:, :length] for k in ("input_ids", "attention_mask")}
    assert_same_step(step(stage, [small, large]), step(stage, [batch]))


@pytest.fixture
def build_with_dropout(tiny_config):
    """`build` for students that drop half of their attention."""

    def stage(name: str) -> Stage:
        teacher = randomize(CLIPModel(tiny_config(vision=DROPOUT, text=DROPOUT)))
        mapper = start_mapper(teacher, SMALL)
        if name == "mapping":
            return MappingStage(mapper, learn_logit_scale=True).train()
        if name == "contrastive":
            return ContrastiveStage(mapper.export(), learn_logit_scale=True).train()
        return DistillationStage(mapper.export(), teachers=[teacher], learn_logit_scale=True, losses=MIXED).train()

    return stage


@pytest.mark.parametrize("name", STAGES)
def test_dropout_is_the_same_when_a_chunk_is_computed_again(build_with_dropout, batch, name, no_recomputation):
    stage, chunks = build_with_dropout(name), chunked(batch, 6)
    actual, other_numbers = step(stage, chunks), step(stage, chunks, seed=1)
    no_recomputation()
    assert_same_step(actual, step(stage, chunks))  # with the graphs of all chunks kept
    assert abs(other_numbers[0]["loss"] - actual[0]["loss"]) > 1e-4


@pytest.mark.parametrize("name", STAGES)
def test_chunks_leave_the_random_numbers_where_one_forward_pass_leaves_them(build_with_dropout, batch, name):
    stage, states = build_with_dropout(name), []
    for backward in (False, True):
        torch.manual_seed(0)
        loss = stage(chunked(batch, 6))["loss"]
        if backward:
            loss.backward()
        states.append(torch.rand(4))
    assert torch.equal(*states)


# Gradient caching: what several chunks cost


def student_model(stage: Stage) -> nn.Module:
    """What runs when the student encodes a chunk."""
    return stage.trained.skeleton if isinstance(stage, MappingStage) else stage.trained


@pytest.mark.parametrize(("size", "calls"), [(24, 1), (12, 4), (6, 8)])
@pytest.mark.parametrize("name", STAGES)
def test_a_single_chunk_is_computed_once_and_several_twice(build, batch, name, size, calls):
    stage, seen = build(name).train(), []
    student_model(stage).register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    step(stage, chunked(batch, size))
    assert len(seen) == calls


@pytest.mark.parametrize("name", STAGES)
def test_only_one_chunk_keeps_its_activations_at_a_time(build, batch, name):
    """What backward may read, counted when the last chunk has passed, and as it is in the course of backward."""
    stage, alive, peaks = build(name).train(), Counter(), []
    peak = 0

    class Held:
        def __init__(self, tensor: torch.Tensor):
            nonlocal peak
            self.tensor, self.size = tensor, tensor.numel()
            alive["entries"] += self.size
            peak = max(peak, alive["entries"])

        def __del__(self):
            alive["entries"] -= self.size

    for size in (24, 12, 6, 3):
        alive.clear()
        peak = 0
        # The hooks of checkpoint lie above these, so these see what is kept outside of it.
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            step(stage, chunked(batch, size))
        peaks.append(peak)
    kept, *chunks = peaks
    assert all(peak < 0.75 * kept for peak in chunks), peaks


def test_the_weights_are_mapped_once_for_all_chunks(build, batch, monkeypatch):
    stage, calls = build("mapping").train(), Counter()
    materialize, forward = WeightMapper.materialize, Operator.forward

    def counted_materialize(self, token_ids=None):
        calls["materialize"] += 1
        return materialize(self, token_ids)

    def counted_forward(self):
        value = forward(self)
        calls["forward"] += 1
        value.grad_fn.register_hook(lambda *_: calls.update(["backward"]))
        return value

    monkeypatch.setattr(WeightMapper, "materialize", counted_materialize)
    monkeypatch.setattr(Operator, "forward", counted_forward)
    for size in (24, 6):
        calls.clear()
        step(stage, chunked(batch, size))
        operators = len(stage.trained.operators)
        assert calls == {"materialize": 1, "forward": operators, "backward": operators}


def test_a_mapping_maps_the_tokens_of_all_chunks(build, batch, monkeypatch):
    stage, asked, materialize = build("mapping"), [], WeightMapper.materialize

    def recorded(self, token_ids=None):
        asked.append(token_ids)
        return materialize(self, token_ids)

    monkeypatch.setattr(WeightMapper, "materialize", recorded)
    stage.train()(chunked(batch, 6))
    assert set(asked[0].tolist()) == set(batch["input_ids"].flatten().tolist())
    stage.eval()(chunked(batch, 6))
    assert asked[1] is None


@pytest.mark.parametrize("name", STAGES)
def test_under_autocast_chunks_have_the_gradient_of_the_whole_batch(build, batch, name):
    stage = build(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        whole = stage([batch])["loss"]
        chunks = stage(chunked(batch, 6))["loss"]
    torch.testing.assert_close(chunks, whole, atol=1e-2, rtol=0)
    gradients = []
    for loss in (whole, chunks):
        stage.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in stage.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


# Teachers


def test_the_teacher_of_a_distillation_is_frozen_and_stays_in_eval_mode(build, tiny_teacher, tiny_batch):
    tiny_teacher.train().requires_grad_(True)
    before = copy.deepcopy(tiny_teacher.state_dict())
    stage = build("distillation").train()
    stage([tiny_batch])["loss"].backward()
    assert stage.training and not tiny_teacher.training
    assert all(not p.requires_grad and p.grad is None for p in tiny_teacher.parameters())
    for name, tensor in before.items():
        torch.testing.assert_close(tiny_teacher.state_dict()[name], tensor, atol=0, rtol=0)


def test_the_teachers_of_a_distillation_are_neither_parameters_nor_saved(student, tiny_teacher, other_teacher):
    stage = DistillationStage(student, teachers=[tiny_teacher, other_teacher])
    assert {id(p) for p in stage.parameters()} == {id(p) for p in student.parameters()}
    assert set(stage.state_dict()) == {f"trained.{name}" for name in student.state_dict()}
    assert not {tiny_teacher, other_teacher} & set(stage.modules())


def test_the_teachers_of_a_distillation_move_with_the_stage(student, tiny_teacher):
    teachers = [tiny_teacher, copy.deepcopy(tiny_teacher)]
    DistillationStage(student, teachers=teachers).to(torch.float64)
    assert {p.dtype for teacher in teachers for p in teacher.parameters()} == {torch.float64}


def test_a_teacher_runs_once_per_chunk(build, tiny_teacher, batch):
    calls = []
    tiny_teacher.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    step(build("distillation"), chunked(batch, 6))
    assert calls == [False] * 4


def test_all_student_weights_get_gradients_in_distillation(build, student, tiny_batch):
    build("distillation")([tiny_batch])["loss"].backward()
    without = {name for name, p in student.named_parameters() if p.grad is None}
    assert without == {"logit_scale"}


@pytest.mark.parametrize("size", [24, 6])
def test_several_teachers_teach_the_mean_of_their_affinities(student, tiny_teacher, other_teacher, batch, size):
    stage = DistillationStage(student.eval(), teachers=[tiny_teacher, other_teacher])
    output = stage(chunked(batch, size))
    mine = features(student, batch)
    logits = [features(one, batch).logits_per_image() for one in (tiny_teacher, other_teacher)]
    expected = 0.0
    for scores, theirs in ((mine.logits_per_image(), logits), (mine.logits_per_image().T, [one.T for one in logits])):
        targets = (theirs[0].softmax(dim=1) + theirs[1].softmax(dim=1)) / 2
        expected = expected - (targets * scores.log_softmax(dim=1)).sum(dim=1).mean() / 2
    torch.testing.assert_close(output["loss"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("tower", "name", "value"),
    [("vision", "image_size", 64), ("text", "vocab_size", 7), ("text", "max_position_embeddings", 9)],
)
@pytest.mark.parametrize("place", [0, 1], ids=["first", "second"])
def test_a_teacher_that_reads_other_inputs_is_refused(tiny_teacher, tower, name, value, place):
    teachers = [tiny_teacher, tiny_teacher]
    teachers[place] = other = copy.deepcopy(tiny_teacher)
    mine = getattr(getattr(other.config, f"{tower}_config"), name)
    setattr(getattr(other.config, f"{tower}_config"), name, value)
    with pytest.raises(ValueError, match=f"{tower}_config.{name} is {mine} in the student and {value} in the teacher"):
        DistillationStage(tiny_teacher, teachers=teachers)


# Cached teachers


@torch.no_grad()
def with_embeds(chunk: dict, teachers: list[nn.Module]) -> dict:
    """A chunk with what a cache would hold of it."""
    embeds = [features(teacher, chunk) for teacher in teachers]
    return chunk | {"teacher_embeds": [(one.image_embeds.half(), one.text_embeds.half()) for one in embeds]}


@pytest.mark.parametrize("size", [24, 6])
def test_cached_embeddings_teach_like_their_teachers(student, tiny_teacher, other_teacher, batch, size):
    teachers, student = [tiny_teacher, other_teacher], student.eval()
    live = step(
        DistillationStage(student, teachers=teachers, losses=MIXED),
        chunked(batch, size),
    )
    chunks = [with_embeds(chunk, teachers) for chunk in chunked(batch, size)]
    cached = step(DistillationStage(student, losses=MIXED), chunks)
    assert cached[0] == pytest.approx(live[0], abs=1e-3)
    assert_same_step(cached, live, tolerance=1e-2)
    # The order counts: each teacher's images belong to its own texts.
    alone = step(
        DistillationStage(student, teachers=[other_teacher], losses=MIXED),
        chunked(batch, size),
    )
    assert abs(alone[0]["affinity"] - live[0]["affinity"]) > 1e-2


def test_a_teacher_is_not_asked_for_what_a_chunk_brings(build, tiny_teacher, batch):
    calls = []
    tiny_teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    chunks = [with_embeds(chunk, [tiny_teacher]) for chunk in chunked(batch, 12)]
    calls.clear()
    build("distillation")(chunks)
    assert not calls


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_built_cache_teaches_like_live_teachers(
    student, tiny_teacher, other_teacher, tiny_processor, pairs_parquet, tmp_path, workers
):
    teachers, rows = [tiny_teacher, other_teacher], load_pairs(str(pairs_parquet))
    collator = PairCollator(
        tiny_processor.tokenizer, tiny_processor.image_processor, augmentation=Augmentation(scale=(0.5, 1.0)), views=2
    )
    manifest = cache_manifest([{"weights": model_fingerprint(one)} for one in teachers], collator, 2, {"rows": "tiny"})
    build_teacher_cache(tmp_path, teachers, rows, collator, manifest, batch_size=8, num_workers=workers)
    finish_teacher_cache(tmp_path)
    cached = dataclasses.replace(collator, teacher_cache=TeacherCache.open(tmp_path))
    live, from_cache = (DistillationStage(student.eval(), teachers=one) for one in (teachers, []))
    losses = []
    for epoch in range(3):
        chosen = [[{**rows[i], "epoch": epoch} for i in part] for part in (range(0, 24, 3), range(1, 24, 3))]
        live_chunks, cached_chunks = ([collate(part) for part in chosen] for collate in (collator, cached))
        assert normalized_pixels(cached_chunks[0]).shape == (8, 3, 32, 32)
        losses.append(live(live_chunks)["loss"].item())
        assert from_cache(cached_chunks)["loss"].item() == pytest.approx(losses[-1], abs=1e-3)
    assert losses[0] == losses[2] != losses[1]  # two views, in turn


# What is evaluated and saved


def test_a_student_as_large_as_its_teacher_is_not_mapped(tiny_teacher):
    with pytest.raises(ValueError, match="as large as its teacher.*Say what is to be smaller"):
        MappingStage(start_mapper(tiny_teacher, ClipMapConfig()))


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

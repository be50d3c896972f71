import copy
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import CLIPModel

from clipmap_hf.config import ClipMapConfig
from clipmap_hf.costs.cost import CostReport, model_cost, with_bytes_of
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.models.features import ClipFeatures
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.pipeline import ternarization
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.distillation import DistillationTrainer
from clipmap_hf.pipeline.masking import MaskingTrainer
from clipmap_hf.pipeline.ternarization import TernaryTrainer
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.ternary.config import TernaryConfig
from clipmap_hf.ternary.layers import TernaryModule
from clipmap_hf.ternary.model import pack_model, set_backend
from clipmap_hf.training.arguments import DistillationStageArguments, MaskingStageArguments
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.sharding import prepare_stage
from clipmap_hf.training.stages.distillation import DistillationStage
from clipmap_hf.training.stages.ternary import TernaryStage
from clipmap_hf.training.ternary_arguments import TernaryStageArguments


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
FEATURE = {"feature": 2000.0}
NAME = "vision_model.encoder.layers.1.mlp.fc1"


@pytest.fixture
def build(shared_teacher):
    """A factory of stages: `build(quantizer="learned", ramp_steps=4)`."""

    def stage(ramp_steps: int = 0, frozen: str = "", **options) -> TernaryStage:
        student = copy.deepcopy(shared_teacher)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(not (frozen and name.startswith(frozen)))
        teachers = [copy.deepcopy(shared_teacher)]
        return TernaryStage(
            student,
            teachers=teachers,
            logit_scale=50.0,
            learn_logit_scale=False,
            losses=FEATURE,
            config=TernaryConfig(**options),
            ramp_steps=ramp_steps,
        )

    return stage


def halves(batch: dict) -> list[dict]:
    return [{name: value[start : start + 4] for name, value in batch.items()} for start in (0, 4)]


def step(stage: TernaryStage, batch: dict, rate: float = 1e-2) -> None:
    stage([batch])["loss"].backward()
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad.sign()
                parameter.grad = None
    stage.after_step()


@pytest.mark.parametrize("quantizer", ["twn", "learned"])
def test_the_loss_is_that_of_the_model_that_is_packed(build, tiny_batch, quantizer):
    stage = build(quantizer=quantizer)
    step(stage, tiny_batch)
    with torch.no_grad():
        loss = stage([tiny_batch])["loss"]
        for model in (stage.student(), stage.export()):
            if model.config.__dict__.get("quantization_config"):
                set_backend(model, "float")
            teachers = stage._teachers
            same = DistillationStage(model, teachers=teachers, losses=FEATURE)([tiny_batch])["loss"]
            torch.testing.assert_close(same, loss, rtol=0, atol=0)


def test_latent_weights_and_the_float_rest_are_trained(build, tiny_batch):
    stage = build()
    before = copy.deepcopy(stage.trained.state_dict())
    step(stage, tiny_batch)
    after = stage.trained.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    unseen = {name for name in still if "k_proj.bias" in name}  # keys' biases change nothing
    assert still - unseen <= {"logit_scale"}


def test_learned_levels_are_trained_and_stay_above_zero(build, tiny_batch):
    stage = build(quantizer="learned")
    before = [level.clone() for level in stage.levels]
    step(stage, tiny_batch, rate=10.0)
    assert all(not torch.equal(*both) for both in zip(before, stage.levels, strict=True))
    assert all((level > 0).all() for level in stage.levels)


def test_chunks_have_the_gradient_of_the_whole_batch(build, tiny_batch):
    whole, chunked = build(), build()
    whole([tiny_batch])["loss"].backward()
    chunked(halves(tiny_batch))["loss"].backward()
    for ours, theirs in zip(whole.parameters(), chunked.parameters(), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_weights_go_from_float_to_ternary_in_the_ramp(build, tiny_batch):
    stage, latent = build(ramp_steps=4), None
    latent = stage.trained.get_submodule(NAME).weight.detach().clone()
    ternary = stage.student().get_submodule(NAME).weight.detach()
    for share in (0.25, 0.5, 0.75, 1.0, 1.0):
        seen = stage._student_model([tiny_batch])[1][f"{NAME}.weight"].detach()
        torch.testing.assert_close(seen, latent.lerp(ternary, share), rtol=0, atol=1e-6)
        stage.after_step()


def test_rows_of_zeros_learn_levels_too(build, tiny_batch):
    stage = build(quantizer="learned")
    stage.trained.text_model.embeddings.token_embedding.weight.data[tiny_batch["input_ids"][0, 1]] = 0
    config = TernaryConfig(quantizer="learned")
    stage = TernaryStage(
        stage.trained,
        teachers=stage._teachers,
        logit_scale=50.0,
        learn_logit_scale=False,
        losses=FEATURE,
        config=config,
    )
    stage([tiny_batch])["loss"].backward()
    assert all(one.grad.isfinite().all() for one in stage.parameters() if one.grad is not None)


def test_nothing_but_frozen_parts_is_an_error(build):
    with pytest.raises(ValueError, match="are frozen"):
        build(frozen="text_model", parts=["token_embedding"])


def test_fsdp_is_refused(build):
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match="which FSDP would put back"):
        prepare_stage(build(), accelerator, TernaryStageArguments(), 8)


def test_packed_students_are_refused(tiny_teacher, tiny_processor):
    packed, context = (
        pack_model(tiny_teacher, TernaryConfig()),
        RunContext(RunArguments("unused"), DataArguments("unused")),
    )
    teacher = Teacher(tiny_teacher, tiny_processor, "me/teacher")
    for train, numbers in (
        (TernaryTrainer, TernaryStageArguments()),
        (DistillationTrainer, DistillationStageArguments()),
    ):
        with pytest.raises(ValueError, match="Training works with float weights.*dequantize"):
            train(packed, teacher, numbers, context=context)


def test_packed_models_are_not_masked(tiny_teacher, tiny_processor):
    source = Teacher(pack_model(tiny_teacher, TernaryConfig()), tiny_processor, "me/packed")
    with pytest.raises(ValueError, match="Masking works with float weights"):
        MaskingTrainer(
            source, [], ClipMapConfig(), MaskingStageArguments(), RunContext(RunArguments("a"), DataArguments("b"))
        )


def test_a_ramp_longer_than_the_training_is_refused(tiny_teacher, tiny_processor, pairs_parquet):
    arguments = TernaryStageArguments(max_steps=4, ramp_steps=5, batch_size=1)
    context = RunContext(RunArguments("unused"), DataArguments(str(pairs_parquet)))
    with pytest.raises(ValueError, match="ramp_steps=5 are more than the 4"):
        teacher = Teacher(tiny_teacher, tiny_processor, "me/teacher")
        TernaryTrainer(tiny_teacher, teacher, arguments, context=context).train()


def test_a_frozen_tower_stays_float(build):
    packed = build(frozen="text_model").export()
    assert not any(isinstance(module, TernaryModule) for module in packed.text_model.modules())
    assert isinstance(packed.get_submodule(NAME), TernaryModule)


def test_a_stage_goes_on_from_its_state_dict(build, tiny_batch):
    stage, other = build(quantizer="learned", ramp_steps=4), build(quantizer="learned", ramp_steps=4)
    step(stage, tiny_batch)
    other.load_state_dict(stage.state_dict())
    torch.testing.assert_close(other([tiny_batch])["loss"], stage([tiny_batch])["loss"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"parts": ["heads"]}, "parts="), ({"block_size": 0}, "block_size=0"), ({"ramp_steps": -1}, "ramp_steps=-1")],
)
def test_arguments_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        TernaryStageArguments(**options)


def test_arguments_are_the_words_of_the_config():
    assert TernaryStageArguments(quantizer="absmean2", parts=["layers"]).config() == TernaryConfig(
        quantizer="absmean2", parts=["layers"]
    )


@pytest.fixture
def run(shared_teacher, tiny_processor, pairs_parquet, tmp_path):
    """A function that ternarizes the tiny teacher: `run(max_steps=2)` returns the folder."""

    def start(folder: str = "out", cache: TeacherCacheArguments | None = None, **options):
        teacher = Teacher(copy.deepcopy(shared_teacher), tiny_processor, "me/teacher")
        arguments = TernaryStageArguments(batch_size=8, learning_rate=1e-3, losses=FEATURE, **options)
        data = DataArguments(str(pairs_parquet), eval_data=str(pairs_parquet), crop_scale=[0.3, 1.0])
        output = RunArguments(str(tmp_path / folder), save_steps=1, logging_steps=1)
        student = copy.deepcopy(shared_teacher)
        context = RunContext(output, data, "a: 1\n", cache or TeacherCacheArguments())
        TernaryTrainer(student, teacher, arguments, context=context).train()
        return tmp_path / folder

    return start


def test_a_run_writes_a_packed_folder_with_a_card(run, tiny_batch):
    folder = run(max_steps=2, parts=["layers"])
    model = CLIPModel.from_pretrained(folder)
    assert isinstance(model.get_submodule(NAME), TernaryModule)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["parts"] == ["layers"]
    card = (folder / "README.md").read_text()
    assert "ternary" in card and "import clipmap_hf" in card and "base_model_relation: quantized" in card
    costs = model_cost(CLIPModel.from_pretrained(folder).config), with_bytes_of(model_cost(model.config), model)
    assert str(CostReport(teacher=costs[0], student=costs[1])) in card
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert "eval_mean_recall" in lines[-1]
    assert torch.isfinite(torch.cat(ClipFeatures.embeds(model(**tiny_batch)))).all()


def test_half_the_bytes_for_the_float_rest(run):
    folder = run(max_steps=1, float_dtype="float16")
    dtypes = {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}
    assert dtypes == {torch.float16, torch.uint8}


def test_rounding_without_training_is_said_aloud(run, monkeypatch):
    warnings = []
    monkeypatch.setattr(ternarization.logger, "warning", warnings.append)
    folder = run(max_steps=0)
    assert len(warnings) == 1 and "without training" in warnings[0]
    assert isinstance(CLIPModel.from_pretrained(folder).get_submodule(NAME), TernaryModule)


def test_a_run_that_is_repeated_writes_the_same(run):
    whole = load_file(run("whole", max_steps=3) / "model.safetensors")
    again = load_file(run("again", max_steps=3) / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_teacher_cache_holds_the_views_that_are_trained_on(run, tmp_path):
    folders = {
        "live": run("live", max_steps=6),
        "cached": run("cached", TeacherCacheArguments(str(tmp_path / "cache"), 2), max_steps=6),
    }
    losses = {}
    for name, folder in folders.items():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines if "loss" in line]
    assert losses["live"]
    torch.testing.assert_close(losses["cached"], losses["live"], rtol=0.02, atol=0)  # embeddings are kept in fp16


class Halved(DistillationStage):
    def export(self):
        return copy.deepcopy(self.trained).half()


class HalvingTrainer(DistillationTrainer):
    make_stage = Halved


def test_distillation_writes_what_is_exported(shared_teacher, tiny_processor, pairs_parquet, tmp_path):
    teacher = Teacher(copy.deepcopy(shared_teacher), tiny_processor, "me/teacher")
    context = RunContext(RunArguments(str(tmp_path)), DataArguments(str(pairs_parquet)))
    arguments = DistillationStageArguments(max_steps=1, batch_size=8)
    HalvingTrainer(copy.deepcopy(shared_teacher), teacher, arguments, context=context).train()
    assert CLIPModel.from_pretrained(tmp_path).dtype == torch.float16

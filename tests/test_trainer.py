import copy
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import CLIPModel

from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.pairs import PairDataset, load_pairs
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.training.arguments import RunArguments, StageArguments
from clipmap_hf.training.stages import ContrastiveStage, DistillationStage, MappingStage, Stage
from clipmap_hf.training.trainer import Trainer, parameter_groups


SMALL = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2), text=TowerConfig(hidden_size=16, num_hidden_layers=1)
)
STAGES = ("contrastive", "mapping", "distillation")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps the first precision it was told for the life of the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def pairs(pairs_parquet) -> PairDataset:
    return PairDataset(load_pairs(str(pairs_parquet)))


@pytest.fixture
def collator(tiny_processor) -> PairCollator:
    return PairCollator(
        tiny_processor.tokenizer, tiny_processor.image_processor, augmentation=Augmentation(scale=(0.5, 1.0))
    )


@pytest.fixture
def stage_of(tiny_teacher):
    """A factory of fresh stages by name."""

    def build(name: str) -> Stage:
        teacher = copy.deepcopy(tiny_teacher)
        mapper = WeightMapper(teacher, SMALL)
        if name == "mapping":
            return MappingStage(mapper, 50.0, learn_logit_scale=False)
        if name == "contrastive":
            return ContrastiveStage(mapper.export(), 50.0, learn_logit_scale=False)
        return DistillationStage(mapper.export(), teacher, 50.0, learn_logit_scale=False)

    return build


@pytest.fixture
def trainer_of(stage_of, pairs, collator, tmp_path):
    """A factory: `trainer_of(stage, …)` with any value of `StageArguments`, `RunArguments` or `Trainer`."""

    def build(stage: Stage | str = "contrastive", **values) -> Trainer:
        stage = stage_of(stage) if isinstance(stage, str) else stage
        numbers = {"steps": 3, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0, "weight_decay": 0.2}
        options = {"output_dir": str(tmp_path / "out"), "log_every": 1, "seed": 0}
        rest = {"pairs": pairs}
        for name, value in values.items():
            target = next(
                (to for to, cls in ((numbers, StageArguments), (options, RunArguments)) if name in _fields(cls)), rest
            )
            target[name] = value
        return Trainer(stage, StageArguments(**numbers), RunArguments(**options), collator=collator, **rest)

    return build


def _fields(cls: type) -> set[str]:
    return set(cls.__dataclass_fields__)


def log_of(trainer: Trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()]


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all tensors, buffers that are not saved included."""
    return {name: tensor.detach().clone() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, tensor in state(module).items() if not torch.equal(tensor, before[name])}


# What is trained


@pytest.mark.parametrize("name", STAGES)
def test_every_trainable_parameter_changes_and_nothing_else(trainer_of, name):
    trainer = trainer_of(name)
    trainable = {name for name, p in trainer.stage.named_parameters() if p.requires_grad}
    before = state(trainer.stage)
    trainer.train()
    # A key's bias adds the same to all scores of a query, so its gradient is rounding noise, if it is any.
    no_effect = {name for name in trainable if name.endswith("k_proj.bias")}
    assert changed(before, trainer.stage) - no_effect == trainable - no_effect
    assert trainable


def test_the_teacher_of_a_distillation_does_not_change(trainer_of, tiny_teacher):
    stage = DistillationStage(WeightMapper(tiny_teacher, SMALL).export(), tiny_teacher, 50.0, False)
    before = state(tiny_teacher)
    trainer_of(stage).train()
    assert not changed(before, tiny_teacher)
    assert not tiny_teacher.training


@pytest.mark.parametrize("name", STAGES)
def test_the_loss_falls(trainer_of, name):
    trainer = trainer_of(name, steps=30, batch_size=24, learning_rate=1e-3)
    trainer.train()
    losses = [line["loss"] for line in log_of(trainer)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_learned_logit_scale_is_clamped_after_every_step(trainer_of, stage_of):
    stage = ContrastiveStage(stage_of("contrastive").trained, 120.0, learn_logit_scale=True)
    trainer = trainer_of(stage, steps=4, learning_rate=1e-4)
    trainer.train()
    scales = torch.tensor([line["logit_scale"] for line in log_of(trainer)])
    torch.testing.assert_close(scales[0].item(), 120.0, atol=1e-3, rtol=0)
    assert (scales[1:] <= 100.001).all() and (scales[1:] > 99).all()


def test_parameter_groups_decay_matrices_only(stage_of):
    model = CLIPModel(stage_of("contrastive").trained.config)
    decayed, rest = parameter_groups(ContrastiveStage(model, 50.0, learn_logit_scale=True), weight_decay=0.3)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in (decayed, rest)]
    assert groups[0] | groups[1] == set(names.values()) and not groups[0] & groups[1]
    for name in groups[0]:
        assert name.endswith("weight") and "norm" not in name and "position" not in name
    for name in groups[1]:
        assert name.endswith(("bias", "class_embedding", "logit_scale")) or "norm" in name or "position" in name


def test_parameter_groups_of_a_mapping_leave_depth_alone(stage_of):
    stage = stage_of("mapping")
    decayed, rest = parameter_groups(stage, weight_decay=0.3)
    operators = stage.trained.operators
    depth = {id(operators[f"{tower}_depth"].delta) for tower in ("vision", "text")}
    assert {id(p) for p in rest["params"]} == depth
    assert {id(p) for p in decayed["params"]} == {id(o.delta) for o in operators.values()} - depth


def test_parameter_groups_leave_out_what_is_frozen(stage_of):
    stage = stage_of("contrastive")
    stage.trained.vision_model.requires_grad_(False)
    grouped = {id(p) for group in parameter_groups(stage, 0.1) for p in group["params"]}
    assert grouped == {id(p) for p in stage.parameters() if p.requires_grad}


# How long, how fast


def test_steps_win_over_epochs(trainer_of):
    assert trainer_of(steps=5, epochs=100).train().steps == 5


def test_epochs_are_whole_passes_over_full_batches(trainer_of):
    result = trainer_of(steps=None, epochs=2, batch_size=7).train()  # 24 pairs: three batches, the rest is dropped
    assert (result.steps, result.pairs, result.bad_rows) == (6, 42, 0)


def test_parts_of_an_epoch_are_allowed(trainer_of):
    assert trainer_of(steps=None, epochs=0.5, batch_size=4).train().steps == 3


def test_no_steps_train_nothing_and_still_save(trainer_of):
    saved = []
    trainer = trainer_of(steps=0, save=lambda folder, metrics: saved.append(folder))
    before = state(trainer.stage)
    assert trainer.train().steps == 0
    assert saved == [trainer.output_dir] and not changed(before, trainer.stage)


@pytest.fixture
def keys_of(trainer_of, monkeypatch):
    """A function that trains two epochs of three steps and returns the keys of the rows of each, in order."""

    def run(**values) -> list[list[tuple[int, int]]]:
        keys, collate = [], PairCollator.__call__

        def record(self, rows):
            keys.extend(row["key"] for row in rows)
            return collate(self, rows)

        monkeypatch.setattr(PairCollator, "__call__", record)
        trainer_of(steps=6, **values).train()
        monkeypatch.undo()
        return [keys[:24], keys[24:]]

    return run


def test_each_epoch_has_its_own_order_and_augmentations(keys_of):
    epochs = keys_of()
    for epoch, seen in enumerate(epochs):
        assert sorted(seen) == [(epoch, index) for index in range(24)]
    orders = [[index for _, index in seen] for seen in epochs]
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


@pytest.mark.parametrize("warmup", [3, 0.5], ids=["steps", "share"])
def test_the_rate_warms_up_and_follows_a_cosine(trainer_of, warmup):
    trainer = trainer_of(steps=6, warmup_steps=warmup, learning_rate=0.01)
    trainer.train()
    rates = torch.tensor([line["learning_rate"] for line in log_of(trainer)])  # the one each step was taken with
    expected = 0.01 * torch.tensor([0, 1 / 3, 2 / 3, 1, 0.75, 0.25])
    torch.testing.assert_close(rates, expected, atol=1e-6, rtol=0)


def test_a_warmup_longer_than_the_run_is_cut_to_it(trainer_of):
    trainer = trainer_of(steps=3, warmup_steps=2000, learning_rate=0.01)
    trainer.train()
    rates = torch.tensor([line["learning_rate"] for line in log_of(trainer)])
    torch.testing.assert_close(rates, 0.01 * torch.tensor([0, 1 / 3, 2 / 3]), atol=1e-6, rtol=0)


def test_gradients_are_clipped_at_their_global_norm(trainer_of):
    trainer = trainer_of(steps=1, max_grad_norm=1e-3)
    norms = []
    trainer.stage.after_step = lambda: None
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        trainer.train()
    assert log_of(trainer)[0]["grad_norm"] > 1e-2  # logged as it was before
    torch.testing.assert_close(norms, [1e-3], atol=1e-6, rtol=0)


def test_a_batch_larger_than_the_data_is_an_error(trainer_of):
    with pytest.raises(ValueError, match="batch_size=25 is larger than the 24 training pairs; lower it"):
        trainer_of(batch_size=25)


# What is written


def test_metrics_have_a_line_for_every_log_every_steps_and_the_last(trainer_of):
    trainer = trainer_of("distillation", steps=7, log_every=3, name="retraining")
    result = trainer.train()
    lines = log_of(trainer)
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert [line["pairs"] for line in lines] == [24, 48, 56]
    for line in lines:
        assert line["stage"] == "retraining" and line["bad_rows"] == 0
        assert {"loss", "affinity", "contrastive", "learning_rate", "grad_norm", "seconds"} <= line.keys()
    seconds = [line["seconds"] for line in lines]
    assert 0 < seconds[0] < seconds[1] < seconds[2] <= result.seconds + 1e-3
    assert (result.steps, result.pairs, result.metrics) == (7, 56, {})


def fake_evaluation(recalls: list[float]):
    """An evaluation that returns the given recalls in turn, and the models it was called with."""
    models = []

    def evaluate(model) -> dict[str, float]:
        models.append(model)
        return {"mean_recall": recalls[len(models) - 1]}

    return evaluate, models


def test_best_and_last_are_kept(trainer_of):
    evaluate, models = fake_evaluation([0.1, 0.3, 0.2])
    saved = []
    trainer = trainer_of(
        "mapping",
        steps=5,
        eval_every=2,
        log_every=10,
        evaluate=evaluate,
        save=lambda folder, metrics: saved.append((folder, metrics["mean_recall"])),
    )
    result = trainer.train()
    last, best = trainer.output_dir, trainer.output_dir / "best"
    assert saved == [(last, 0.1), (best, 0.1), (last, 0.3), (best, 0.3), (last, 0.2)]
    assert result.metrics == {"mean_recall": 0.2}
    evaluated = [(line["step"], line["eval_mean_recall"]) for line in log_of(trainer) if "eval_mean_recall" in line]
    assert evaluated == [(2, 0.1), (4, 0.3), (5, 0.2)]
    assert all(type(model) is CLIPModel for model in models)


def test_without_eval_every_only_the_end_is_evaluated_and_saved(trainer_of):
    evaluate, _ = fake_evaluation([0.4])
    saved = []
    trainer = trainer_of(evaluate=evaluate, save=lambda folder, metrics: saved.append(folder))
    assert trainer.train().metrics == {"mean_recall": 0.4}
    assert saved == [trainer.output_dir]


def test_evaluation_does_not_change_what_is_trained(trainer_of, collator, pairs):
    batch = collator([pairs[i] for i in range(8)])
    weights = []
    for every in (None, 1):
        trainer = trainer_of(
            "contrastive", eval_every=every, evaluate=lambda model: evaluate_retrieval(model, [batch], ks=(1,))
        )
        trainer.train()
        assert trainer.stage.trained.training
        weights.append(state(trainer.stage))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=0, rtol=0)


def test_time_for_evaluation_is_not_counted_as_training(trainer_of, monkeypatch):
    clock = iter(range(10_000))

    def evaluate(model) -> dict[str, float]:
        for _ in range(1000):
            next(clock)
        return {"mean_recall": 0.0}

    monkeypatch.setattr("clipmap_hf.training.trainer.time.perf_counter", lambda: next(clock))
    result = trainer_of(steps=3, eval_every=1, evaluate=evaluate).train()
    assert result.seconds < 100


# Seeds and precision


@pytest.mark.parametrize("name", STAGES)
def test_a_seed_decides_every_bit(trainer_of, name):
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))  # what happened before must not matter
        trainer = trainer_of(name, seed=seed)
        trainer.collator.seed = seed
        trainer.train()
        runs.append(state(trainer.stage))
    for parameter, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][parameter], tensor, atol=0, rtol=0)
    assert any(not torch.equal(runs[2][parameter], tensor) for parameter, tensor in runs[0].items())


def test_a_seed_decides_the_order_of_the_pairs(keys_of):
    first = keys_of(seed=0)
    assert keys_of(seed=0) == first
    assert keys_of(seed=1) != first


def test_a_seed_decides_dropout(trainer_of):
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))
        trainer = trainer_of(seed=seed, steps=1, batch_size=24)
        for module in trainer.stage.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.5
        trainer.train()
        runs.append(log_of(trainer)[-1]["loss"])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("name", STAGES)
def test_bf16_trains_fp32_weights(trainer_of, name):
    trainer = trainer_of(name, mixed_precision="bf16")
    before = state(trainer.stage)
    trainer.train()
    assert changed(before, trainer.stage)
    assert {p.dtype for p in trainer.stage.parameters()} == {torch.float32}
    losses = [line["loss"] for line in log_of(trainer)]
    assert all(0 < loss < 100 for loss in losses)


# Bad rows


def spoiled(pairs: PairDataset, bad: int) -> PairDataset:
    """The pairs with the captions of the first `bad` rows emptied."""
    captions = [("" if index < bad else caption) for index, caption in enumerate(pairs.pairs["caption"])]
    return PairDataset(pairs.pairs.remove_columns("caption").add_column("caption", captions))


def test_bad_rows_are_left_out_and_counted(trainer_of, pairs):
    trainer = trainer_of(pairs=spoiled(pairs, 2), batch_size=24, steps=2)
    result = trainer.train()
    assert (result.pairs, result.bad_rows) == (44, 4)
    assert [(line["pairs"], line["bad_rows"]) for line in log_of(trainer)] == [(22, 2), (44, 4)]


def test_too_many_bad_rows_stop_the_run_with_their_number(trainer_of, pairs):
    trainer = trainer_of(pairs=spoiled(pairs, 5), batch_size=24, steps=2, max_bad_fraction=0.004)
    with pytest.raises(ValueError, match=r"5 of 24 rows could not be used, more than max_bad_fraction=0\.004"):
        trainer.train()


def test_one_bad_row_in_the_first_batch_is_no_verdict(trainer_of, pairs):
    trainer = trainer_of(pairs=spoiled(pairs, 1), batch_size=24, steps=1, max_bad_fraction=0.01)  # 1 of 24 is 4 %
    assert trainer.train().bad_rows == 1


def test_a_loss_that_is_not_finite_stops_the_run(trainer_of, stage_of):
    stage = stage_of("contrastive")
    stage.trained.visual_projection.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="The loss is nan at step 1"):
        trainer_of(stage).train()


def test_a_run_that_starts_again_starts_its_log_again(trainer_of):
    for _ in range(2):
        trainer = trainer_of(steps=2)
        trainer.train()
    assert [line["step"] for line in log_of(trainer)] == [1, 2]


def test_less_than_one_step_of_epochs_is_an_error(trainer_of):
    with pytest.raises(ValueError, match="epochs=0.1 of 24 pairs is less than one step"):
        trainer_of(steps=None, epochs=0.1)

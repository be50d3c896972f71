import contextlib
import copy
import dataclasses
import itertools
import json
import logging
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import randomize
from safetensors.torch import load_file
from transformers import CLIPModel

from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.starts import start_mapper
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.preemption import EXIT_PREEMPTED, Preempted
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.stages.base import Stage
from clipmap_hf.training.stages.contrastive import ContrastiveStage
from clipmap_hf.training.stages.distillation import DistillationStage
from clipmap_hf.training.stages.mapping import MappingStage
from clipmap_hf.training.time_limit import TimeLimit
from clipmap_hf.training.trainer import Trainer


SMALL = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2), text=TowerConfig(hidden_size=16, num_hidden_layers=1)
)
STAGES = ("contrastive", "mapping", "distillation")
DROPOUT = {"attention_dropout": 0.5}

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def pairs(pairs_parquet) -> PairDataset:
    return PairDataset(load_pairs(str(pairs_parquet)))


@pytest.fixture
def stream(pairs_tars) -> PairStream:
    return PairStream(load_pairs(pairs_tars, image_column="png", caption_columns=["txt"], streaming=True), 5)


@pytest.fixture
def collator(tiny_processor) -> PairCollator:
    return PairCollator(
        tiny_processor.tokenizer, tiny_processor.image_processor, augmentation=Augmentation(scale=(0.5, 1.0))
    )


@pytest.fixture(scope="module")
def prototypes(shared_teacher, tiny_config) -> dict[tuple[str, bool], Stage]:
    """The stages by name, without and with dropout; copy them before training them."""
    stages = {}
    for dropout in (False, True):
        config = tiny_config(vision=DROPOUT, text=DROPOUT)
        teacher = randomize(CLIPModel(config)) if dropout else copy.deepcopy(shared_teacher)
        student = start_mapper(teacher, SMALL).export()
        stages["contrastive", dropout] = ContrastiveStage(student)
        stages["mapping", dropout] = MappingStage(start_mapper(teacher, SMALL))
        stages["distillation", dropout] = DistillationStage(copy.deepcopy(student), teachers=[teacher])
    return stages


@pytest.fixture
def stage_of(prototypes):
    """A factory of fresh stages by name; with `dropout`, the student drops half of its attention."""
    return lambda name, dropout=False: copy.deepcopy(prototypes[name, dropout])


@pytest.fixture
def trainer_of(stage_of, pairs, collator, tmp_path):
    """
    A factory: `trainer_of(stage, …)` with any value of `StageArguments`, `RunArguments` or `Trainer`. Runs start anew
    unless told otherwise.
    """

    def build(stage: Stage | str = "contrastive", **values) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)  # each run is one of a process of its own
        stage = stage_of(stage) if isinstance(stage, str) else stage
        numbers = {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0, "weight_decay": 0.2}
        options = {"output_dir": str(tmp_path / "out"), "logging_steps": 1, "seed": 0, "resume": "never"}
        rest = {"pairs": pairs, "collator": collator}
        for name, value in values.items():
            target = next(
                (to for to, cls in ((numbers, StageArguments), (options, RunArguments)) if name in _fields(cls)), rest
            )
            target[name] = value
        return Trainer(stage=stage, arguments=StageArguments(**numbers), run=RunArguments(**options), **rest)

    return build


def _fields(cls: type) -> set[str]:
    return set(cls.__dataclass_fields__)


def log_of(trainer: Trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()]


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all tensors, buffers that are not saved included."""
    return {
        name: tensor.detach().clone().cpu() for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, tensor in state(module).items() if not torch.equal(tensor, before[name])}


def checkpoints_of(trainer: Trainer) -> list[Path]:
    return sorted((trainer.output_dir / "checkpoints").iterdir())


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


def test_the_teachers_of_a_distillation_do_not_change(trainer_of, tiny_teacher):
    teachers = [tiny_teacher, copy.deepcopy(tiny_teacher)]
    stage = DistillationStage(start_mapper(tiny_teacher, SMALL).export(), teachers=teachers)
    before = state(tiny_teacher)
    trainer_of(stage).train()
    assert not any(changed(before, teacher) or teacher.training for teacher in teachers)


@pytest.mark.parametrize("name", STAGES)
def test_the_loss_falls(trainer_of, name):
    trainer = trainer_of(name, max_steps=30, batch_size=24, learning_rate=1e-3)
    trainer.train()
    losses = [line["loss"] for line in log_of(trainer)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("name", STAGES)
def test_micro_batches_train_like_whole_batches(trainer_of, name):
    losses = []
    for micro_batch_size in (None, 4):
        trainer = trainer_of(name, batch_size=24, micro_batch_size=micro_batch_size)
        result = trainer.train()
        losses.append([line["loss"] for line in log_of(trainer)])
        assert result.pairs == 72
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_learned_logit_scale_is_clamped_after_every_step(trainer_of, stage_of):
    stage = ContrastiveStage(stage_of("contrastive").trained, logit_scale=120.0, learn_logit_scale=True)
    trainer = trainer_of(stage, max_steps=4, learning_rate=1e-4)
    trainer.train()
    scales = torch.tensor([line["logit_scale"] for line in log_of(trainer)])
    torch.testing.assert_close(scales[0].item(), 120.0, atol=1e-3, rtol=0)
    assert (scales[1:] <= 100.001).all() and (scales[1:] > 99).all()


# How long, how fast


def test_steps_win_over_epochs(trainer_of):
    assert trainer_of(max_steps=5, num_train_epochs=100).train().steps == 5


def test_epochs_are_whole_passes_over_full_batches(trainer_of):
    result = trainer_of(
        max_steps=-1, num_train_epochs=2, batch_size=7
    ).train()  # 24 pairs: three batches, the rest is dropped
    assert (result.steps, result.pairs, result.bad_rows) == (6, 42, {})


def test_parts_of_an_epoch_are_allowed(trainer_of):
    assert trainer_of(max_steps=-1, num_train_epochs=0.5, batch_size=4).train().steps == 3


def test_no_steps_train_nothing_and_still_save(trainer_of):
    saved = []
    trainer = trainer_of(max_steps=0, save=lambda folder, metrics: saved.append(folder))
    before = state(trainer.stage)
    assert trainer.train().steps == 0
    assert saved == [trainer.output_dir] and not changed(before, trainer.stage)


@pytest.fixture
def keys_of(trainer_of, monkeypatch):
    """A function that trains two epochs of three steps and returns epoch and caption of each row, in order."""

    def run(**values) -> list[list[tuple[int, str]]]:
        keys, collate = [], PairCollator.__call__

        def record(self, rows):
            keys.extend((row["epoch"], row["caption"]) for row in rows)
            return collate(self, rows)

        monkeypatch.setattr(PairCollator, "__call__", record)
        trainer_of(max_steps=6, **values).train()
        monkeypatch.undo()
        return [keys[:24], keys[24:]]

    return run


def test_each_epoch_has_its_own_order_and_augmentations(keys_of, tiny_pairs):
    epochs = keys_of()
    for epoch, seen in enumerate(epochs):
        assert sorted(seen) == sorted((epoch, row["caption"]) for row in tiny_pairs)
    orders = [[caption for _, caption in seen] for seen in epochs]
    assert orders[0] != orders[1] and orders[0] != [row["caption"] for row in tiny_pairs]


@pytest.mark.parametrize("warmup", [3, 0.5], ids=["steps", "share"])
def test_the_rate_warms_up_and_follows_a_cosine(trainer_of, warmup, monkeypatch):
    taken, step = [], torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        taken.append({group["lr"] for group in self.param_groups})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    trainer = trainer_of(max_steps=6, warmup_steps=warmup, learning_rate=0.01)
    trainer.train()
    expected = [0, 0.01 / 3, 0.02 / 3, 0.01, 0.0075, 0.0025]
    assert [rate for (rate,) in taken] == pytest.approx(expected, abs=1e-9)
    assert [line["learning_rate"] for line in log_of(trainer)] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("warmup", [0.1, 1, 2000], ids=["share", "one step", "thousands"])
def test_a_run_of_one_step_trains(trainer_of, warmup):
    trainer = trainer_of(max_steps=1, warmup_steps=warmup)
    before = state(trainer.stage.trained)
    trainer.train()
    assert changed(before, trainer.stage.trained)


def test_a_run_says_that_its_warmup_does_not_fit(trainer_of, caplog):
    trainer_of(max_steps=3, warmup_steps=2000).train()
    assert [record.getMessage() for record in caplog.records if "warmup_steps=2000" in record.getMessage()] == [
        "warmup_steps=2000 is not less than the run's steps, 3; the share 0.1 of them is taken instead. Give fewer, "
        "or a share below 1."
    ]


def test_gradients_are_clipped_at_their_global_norm(trainer_of, monkeypatch):
    norms, original = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    trainer = trainer_of(max_steps=1, max_grad_norm=1e-3)
    trainer.train()
    assert log_of(trainer)[0]["grad_norm"] > 1e-2  # logged as it was before
    torch.testing.assert_close(norms, [1e-3], atol=1e-6, rtol=0)


def test_a_batch_larger_than_the_data_is_an_error(trainer_of):
    with pytest.raises(ValueError, match="batch_size=25 is larger than the 24 training pairs; lower it"):
        trainer_of(batch_size=25)


def test_a_micro_batch_that_does_not_divide_the_batch_is_an_error(trainer_of):
    with pytest.raises(ValueError, match="micro_batch_size=3 must divide the 8 pairs"):
        trainer_of(micro_batch_size=3).train()


def test_a_stream_trains_for_its_steps(trainer_of, stream, collator):
    collator = dataclasses.replace(collator, caption_columns=["txt"])
    trainer = trainer_of(pairs=stream, collator=collator, max_steps=5, micro_batch_size=4)
    assert trainer.train().pairs == 40
    with pytest.raises(ValueError, match="set max_steps"):
        trainer_of(pairs=stream, collator=collator, max_steps=-1)


# What is written


def test_metrics_have_a_line_for_every_log_every_steps_and_the_last(trainer_of):
    trainer = trainer_of("distillation", max_steps=7, logging_steps=3, name="retraining")
    result = trainer.train()
    lines = log_of(trainer)
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert [line["pairs"] for line in lines] == [24, 48, 56]
    for line in lines:
        assert line["stage"] == "retraining" and (line["bad_rows"], line["skipped"]) == ({}, 0)
        assert {"loss", "affinity", "learning_rate", "grad_norm", "seconds"} <= line.keys()
    seconds = [line["seconds"] for line in lines]
    assert 0 < seconds[0] < seconds[1] < seconds[2] <= result.seconds + 1e-3
    assert (result.steps, result.pairs, result.skipped, result.metrics) == (7, 56, 0, {})


def fake_evaluation(recalls: list[float]):
    """An evaluation that returns the given recalls in turn, and the models it was called with."""
    models = []

    def evaluate(model, watched=iter) -> dict[str, float]:
        models.append(model)
        return {"mean_recall": recalls[len(models) - 1]}

    return evaluate, models


def test_best_and_last_are_kept(trainer_of):
    evaluate, models = fake_evaluation([0.1, 0.3, 0.2])
    saved = []
    trainer = trainer_of(
        "mapping",
        max_steps=5,
        eval_steps=2,
        logging_steps=10,
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
    batch = collator([pairs[0, i] for i in range(8)])
    pixels = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = batch | {"pixel_values": pixels, "image_of_text": torch.arange(8)}
    weights = []
    for every in (None, 1):
        trainer = trainer_of(
            "contrastive",
            eval_steps=every,
            evaluate=lambda model, watched: evaluate_retrieval(model, watched([batch]), ks=(1,)),
        )
        trainer.train()
        assert trainer.stage.trained.training
        weights.append(state(trainer.stage))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=0, rtol=0)


def test_time_for_evaluation_and_checkpoints_is_not_counted_as_training(trainer_of, monkeypatch):
    clock = iter(range(100_000))

    def wait(*_args, **_kwargs) -> dict[str, float]:
        for _ in range(1000):
            next(clock)
        return {"mean_recall": 0.0}

    save_state = Accelerator.save_state
    monkeypatch.setattr(Accelerator, "save_state", lambda self, folder: (wait(), save_state(self, folder)))
    monkeypatch.setattr("clipmap_hf.training.trainer.time.perf_counter", lambda: next(clock))
    result = trainer_of(max_steps=3, eval_steps=1, save_steps=1, evaluate=wait).train()
    assert result.seconds < 100


# Seeds and precision


@pytest.mark.parametrize("name", STAGES)
def test_a_seed_decides_every_bit(trainer_of, collator, name):
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))  # what happened before must not matter
        trainer = trainer_of(name, seed=seed, collator=dataclasses.replace(collator, seed=seed))
        trainer.train()
        runs.append(state(trainer.stage))
    for parameter, tensor in runs[0].items():
        torch.testing.assert_close(runs[1][parameter], tensor, atol=0, rtol=0)
    assert any(not torch.equal(runs[2][parameter], tensor) for parameter, tensor in runs[0].items())


def test_a_seed_decides_the_order_of_the_pairs(keys_of):
    first = keys_of(seed=0)
    assert keys_of(seed=0) == first
    assert keys_of(seed=1) != first


def test_a_seed_decides_dropout(trainer_of, stage_of):
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))
        trainer = trainer_of(stage_of("contrastive", dropout=True), seed=seed, max_steps=1, batch_size=24)
        trainer.train()
        runs.append(log_of(trainer)[-1]["loss"])
    assert runs[0] == runs[1] != runs[2]


def test_the_dropout_of_a_step_depends_on_nothing_before_it(trainer_of, stage_of):
    runs, seeds = [], []
    for draws in (0, 5):
        evaluate = lambda _model, _watched, draws=draws: {"sum": torch.rand(draws).sum().item()}  # noqa: E731
        trainer = trainer_of(stage_of("contrastive", dropout=True), eval_steps=1, evaluate=evaluate)
        trainer.run.metric_for_best_model = "sum"
        trainer.stage.after_step = lambda: seeds.append(torch.initial_seed())
        trainer.train()
        runs.append([line["loss"] for line in log_of(trainer) if "loss" in line])
    assert runs[0] == runs[1] and seeds[:3] == seeds[3:] and len(set(seeds)) == 3


def test_compiling_is_asked_of_torch_for_the_student_alone(trainer_of, monkeypatch):
    compiled, calls = [], []

    def fake_compile(function):
        compiled.append(function)
        return lambda *args: (calls.append(args[0]), function(*args))[1]

    monkeypatch.setattr(torch, "compile", fake_compile)
    losses = []
    for compile_ in (False, True):
        trainer = trainer_of("distillation", max_steps=2, torch_compile=compile_)
        trainer.train()
        losses.append([line["loss"] for line in log_of(trainer)])
        assert len(compiled) == compile_
    assert losses[0] == losses[1] and calls == [trainer.stage.trained] * 2


@pytest.mark.parametrize("name", STAGES)
def test_bf16_trains_fp32_weights(trainer_of, name):
    trainer = trainer_of(name, mixed_precision="bf16", micro_batch_size=4)
    before = state(trainer.stage)
    trainer.train()
    assert changed(before, trainer.stage)
    assert {p.dtype for p in trainer.stage.parameters()} == {torch.float32}
    losses = [line["loss"] for line in log_of(trainer)]
    assert all(0 < loss < 100 for loss in losses)


# Bad rows


def spoiled(pairs: PairDataset, captions: int, images: int = 0) -> PairDataset:
    """The pairs with the captions of the first rows emptied, and the images of the last."""
    rows = [pairs.pairs[index] for index in range(len(pairs))]
    for row in rows[:captions]:
        row["caption"] = ""
    for row in rows[len(rows) - images :]:
        row["image"] = {"bytes": b"no image", "path": None}
    return PairDataset(rows)


def test_bad_rows_are_left_out_and_counted_by_reason(trainer_of, pairs):
    trainer = trainer_of(pairs=spoiled(pairs, 2, 1), batch_size=24, micro_batch_size=6, max_steps=2)
    result = trainer.train()
    assert (result.pairs, result.bad_rows) == (42, {"no caption": 4, "undecodable image": 2})
    counted = [(line["pairs"], line["bad_rows"]) for line in log_of(trainer)]
    assert counted == [
        (21, {"no caption": 2, "undecodable image": 1}),
        (42, {"no caption": 4, "undecodable image": 2}),
    ]


def test_too_many_bad_rows_stop_the_run_with_their_number_and_reasons(trainer_of, pairs):
    trainer = trainer_of(pairs=spoiled(pairs, 3, 2), batch_size=24, max_steps=2, max_bad_fraction=0.004)
    with pytest.raises(ValueError, match=r"5 of 24 rows could not be used, more than max_bad_fraction=0\.004") as info:
        trainer.train()
    assert "'no caption': 3" in str(info.value) and "'undecodable image': 2" in str(info.value)


def test_one_bad_row_in_the_first_batch_is_no_verdict(trainer_of, pairs):
    trainer = trainer_of(pairs=spoiled(pairs, 1), batch_size=24, max_steps=1, max_bad_fraction=0.01)  # 1 of 24 is 4 %
    assert trainer.train().bad_rows == {"no caption": 1}


def test_a_chunk_without_good_rows_is_left_out(trainer_of, pairs):
    trainer = trainer_of(pairs=spoiled(pairs, 8), batch_size=24, micro_batch_size=1, max_steps=1, max_bad_fraction=1.0)
    assert trainer.train().pairs == 16


def test_a_run_without_a_good_row_is_an_error_and_writes_nothing(trainer_of, pairs):
    saved = []
    trainer = trainer_of(
        pairs=spoiled(pairs, 24), max_bad_fraction=1.0, max_steps=2, save=lambda folder, metrics: saved.append(folder)
    )
    with pytest.raises(FloatingPointError, match=r"None of the 2 steps .*0 pairs.*\{'no caption': 16\}"):
        trainer.train()
    assert not saved


def test_steps_without_good_rows_are_skipped_and_counted(trainer_of, pairs):
    trainer = trainer_of(pairs=spoiled(pairs, 20), batch_size=2, max_bad_fraction=1.0, max_steps=12, max_skipped=12)
    result = trainer.train()
    assert 0 < result.skipped < 12 and result.pairs == 4 and result.bad_rows == {"no caption": 20}


def test_too_many_steps_without_good_rows_end_the_run_and_say_why(trainer_of, pairs):
    trainer = trainer_of(pairs=spoiled(pairs, 24), max_bad_fraction=1.0, max_skipped=1)
    with pytest.raises(
        FloatingPointError, match=r"or no usable rows \(\{'no caption': 16\}\): more than max_skipped=1"
    ):
        trainer.train()


# Steps without a finite gradient


@pytest.fixture
def spoil_gradient(monkeypatch):
    """A function: the backward pass of these steps (from 1 on) leaves a NaN, or an infinite loss."""

    def spoil(steps: set[int], loss: bool = False) -> None:
        count, backward = [0], Accelerator.backward

        def spoiled_backward(self, value, **kwargs):
            count[0] += 1
            if count[0] in steps and loss:
                value.data.fill_(torch.inf)
            backward(self, value, **kwargs)
            if count[0] in steps and not loss:
                next(p for one in self._models for p in one.parameters() if p.grad is not None).grad[0] = torch.nan

        monkeypatch.setattr(Accelerator, "backward", spoiled_backward)

    return spoil


@pytest.mark.parametrize("loss", [False, True], ids=["gradient", "loss"])
@pytest.mark.parametrize("name", STAGES)
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(trainer_of, spoil_gradient, caplog, name, loss):
    spoil_gradient({2, 4}, loss)
    trainer, states, seen = trainer_of(name, max_steps=5), [], []
    trainer.stage.after_step = lambda: (states.append(state(trainer.stage)), seen.append(len(states)))
    result = trainer.train()
    moved = [
        any(not torch.equal(before[name], after[name]) for name in before)
        for before, after in zip(states, states[1:], strict=False)
    ]
    assert moved == [False, True, False, True]  # steps 2 to 5
    assert (result.steps, result.pairs, result.skipped) == (5, 40, 2)
    assert [line["skipped"] for line in log_of(trainer)] == [0, 1, 1, 2, 2]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["Step 2 skipped", "Step 4 skipped"]
    assert all(tensor.isfinite().all() for tensor in state(trainer.stage).values())


def test_a_skipped_step_leaves_the_optimizer_as_it_was(trainer_of, spoil_gradient, monkeypatch):
    """The run without the skipped step: same pairs and rates otherwise, so same weights."""
    weights = []
    for skip in ("gradient", "step"):
        with pytest.MonkeyPatch.context() as patch:
            if skip == "gradient":
                spoil_gradient({2})
            else:
                monkeypatch.undo()
                count, step = [0], torch.optim.AdamW.step

                def all_but_the_second(self, *args, count=count, step=step, **kwargs):
                    count[0] += 1
                    return None if count[0] == 2 else step(self, *args, **kwargs)

                patch.setattr(torch.optim.AdamW, "step", all_but_the_second)
            trainer = trainer_of(max_steps=4)
            trainer.train()
            weights.append(state(trainer.stage))
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_more_skipped_steps_in_a_row_than_allowed_stop_the_run(trainer_of, spoil_gradient):
    spoil_gradient({1, 2, 4, 5, 6})
    with pytest.raises(FloatingPointError, match="3 steps in a row up to 6 had no .* more than max_skipped=2"):
        trainer_of(max_steps=8, max_skipped=2).train()


def test_as_many_skipped_steps_in_a_row_as_allowed_do_not_stop_the_run(trainer_of, spoil_gradient):
    spoil_gradient({1, 2, 4, 5, 7, 8})
    assert trainer_of(max_steps=8, max_skipped=2).train().skipped == 6


def test_a_model_that_is_not_finite_stops_the_run(trainer_of, stage_of):
    stage = stage_of("contrastive")
    stage.trained.visual_projection.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="1 steps in a row up to 1 had no finite loss and gradient"):
        trainer_of(stage, max_skipped=0).train()


def test_a_run_whose_steps_were_all_skipped_is_an_error_and_writes_nothing(trainer_of, spoil_gradient):
    spoil_gradient({1, 2, 3})
    saved = []
    with pytest.raises(FloatingPointError, match=r"None of the 3 steps"):
        trainer_of(max_steps=3, save=lambda folder, metrics: saved.append(folder)).train()
    assert not saved


@pytest.mark.parametrize("name", STAGES)
def test_a_student_that_is_not_finite_is_neither_evaluated_nor_written(trainer_of, stage_of, name):
    """As after a step that was finite, but too large."""
    stage, seen = stage_of(name), []
    stage.after_step = lambda: next(stage.parameters()).data.fill_(torch.inf)
    trainer = trainer_of(
        stage,
        max_steps=1,
        evaluate=lambda model, watched: seen.append(model) or {},
        save=lambda folder, metrics: seen.append(folder),
    )
    with pytest.raises(FloatingPointError, match=r"student.*step 1.*not finite"):
        trainer.train()
    assert not seen


def test_skipped_steps_before_an_interruption_count(trainer_of, spoil_gradient):
    spoil_gradient({1, 2})
    with pytest.raises(FloatingPointError):
        trainer_of(max_steps=8, max_skipped=1, save_steps=1).train()
    spoil_gradient({1})  # the step after the checkpoint
    with pytest.raises(FloatingPointError, match="2 steps in a row up to 2"):
        trainer_of(max_steps=8, max_skipped=1, save_steps=1, resume="auto").train()


# Checkpoints


def test_a_run_that_starts_anew_starts_its_log_again(trainer_of):
    for _ in range(2):
        trainer = trainer_of(max_steps=2)
        before = state(trainer.stage)
        trainer.train()
        assert changed(before, trainer.stage)
    assert [line["step"] for line in log_of(trainer)] == [1, 2]


def test_a_finished_run_started_again_does_nothing(trainer_of, monkeypatch):
    batches, saved = [], []
    evaluate, _ = fake_evaluation([0.3, 0.2, 0.2])
    options = {"max_steps": 4, "eval_steps": 2, "save": lambda folder, metrics: saved.append((folder, metrics))}
    first = trainer_of(resume="auto", evaluate=evaluate, **options)
    result, log = first.train(), first.log.file.read_bytes()
    monkeypatch.setattr(ContrastiveStage, "forward", lambda *_: batches.append(1))
    del saved[:]
    again = trainer_of(resume="auto", evaluate=evaluate, **options)
    assert again.train() == result
    assert not batches and saved == [(first.output_dir, {"mean_recall": 0.2})]
    assert again.log.file.read_bytes() == log
    assert not changed(state(first.stage), again.stage)


def test_the_last_two_checkpoints_are_kept(trainer_of):
    trainer = trainer_of(max_steps=7, save_steps=2)
    trainer.train()
    assert [path.name for path in checkpoints_of(trainer)] == ["step-00000006", "step-00000007"]


@pytest.mark.parametrize(("every", "names"), [(2, ["step-00000002", "step-00000003"]), (500, ["step-00000003"])])
def test_checkpoints_are_written_when_they_are_due_and_at_the_end(trainer_of, every, names):
    trainer = trainer_of(max_steps=3, save_steps=every)
    trainer.train()
    assert [path.name for path in checkpoints_of(trainer)] == names


@pytest.mark.parametrize("name", STAGES)
def test_a_checkpoint_holds_what_is_trained_and_neither_teacher(trainer_of, name):
    trainer = trainer_of(name)
    trainer.train()
    (folder,) = checkpoints_of(trainer)
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == trainer.stage.state_dict().keys()
    assert not [name for name in tensors if "teacher" in name or "skeleton" in name]
    trained = 4 * sum(p.numel() for p in trainer.stage.parameters() if p.requires_grad)
    saved = 4 * sum(tensor.numel() for tensor in trainer.stage.state_dict().values())
    sizes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert saved + 2 * trained < sizes < saved + 2 * trained + 200_000  # AdamW's two moments
    assert json.loads((folder / "progress.json").read_text())["progress"]["step"] == 3


class Interrupted(Exception):
    pass


@contextlib.contextmanager
def failing(owner, name: str, call: int, after: bool = False):
    """Lets the `call`-th call of `owner.name` raise, before it does anything or after."""
    original, count = getattr(owner, name), [0]

    def fail(*args, **kwargs):
        count[0] += 1
        if count[0] == call and not after:
            raise Interrupted
        result = original(*args, **kwargs)
        if count[0] == call:
            raise Interrupted
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield


@pytest.fixture
def source(pairs, stream, collator):
    """A function: what a trainer needs to read tars, or a table."""

    def options(streaming: bool) -> dict:
        if streaming:
            return {"pairs": stream, "collator": dataclasses.replace(collator, caption_columns=["txt"])}
        return {"pairs": pairs, "collator": collator}

    return options


KINDS = [
    pytest.param(name, streaming, workers, marks=[pytest.mark.slow] if workers or streaming else [])
    for name in STAGES
    for streaming in (False, True)
    for workers in (0, 2)
]


@pytest.mark.parametrize(("name", "streaming", "num_workers"), KINDS)
def test_a_run_that_is_interrupted_in_every_step_ends_with_the_same_bits(
    trainer_of, stage_of, source, name, streaming, num_workers, tmp_path
):
    options = source(streaming) | {
        "dataloader_num_workers": num_workers,
        "max_steps": 5,
        "micro_batch_size": 4,
        "warmup_steps": 2,
    }
    whole = trainer_of(stage_of(name, dropout=True), output_dir=str(tmp_path / "whole"), **options)
    expected = whole.train()
    options |= {"resume": "auto", "save_steps": 1}
    for _ in range(5):
        trainer = trainer_of(stage_of(name, dropout=True), **options)
        # The weights of its second step are new already, and lost; the last one has no second step.
        with failing(type(trainer.stage), "after_step", 2), contextlib.suppress(Interrupted):
            trainer.train()
    assert [path.name for path in checkpoints_of(trainer)][-1] == "step-00000005"
    final = trainer_of(stage_of(name, dropout=True), **options)
    result = final.train()
    assert not changed(state(whole.stage), final.stage)
    assert dataclasses.replace(result, seconds=0) == dataclasses.replace(expected, seconds=0)
    lines = [[line | {"seconds": 0} for line in log_of(one)] for one in (whole, final)]
    assert lines[0] == lines[1] and len(lines[0]) == 5


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_an_interruption_at_any_step_between_checkpoints_changes_nothing(trainer_of, stage_of, tmp_path, step):
    options = {"max_steps": 6, "save_steps": 2, "micro_batch_size": 4}
    whole = trainer_of(stage_of("contrastive", dropout=True), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    options["resume"] = "auto"
    trainer = trainer_of(stage_of("contrastive", dropout=True), **options)
    with failing(torch.optim.AdamW, "step", step), pytest.raises(Interrupted):
        trainer.train()
    again = trainer_of(stage_of("contrastive", dropout=True), **options)
    before = state(again.stage)
    again.train()
    assert not changed(state(whole.stage), again.stage) and changed(before, again.stage)
    lines = [[line | {"seconds": 0} for line in log_of(one)] for one in (whole, again)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("after", [False, True], ids=["before its state", "after its state"])
def test_an_interruption_while_a_checkpoint_is_written_leaves_the_one_before(trainer_of, tmp_path, after):
    options = {"max_steps": 5, "save_steps": 2}
    whole = trainer_of(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    trainer = trainer_of(resume="auto", **options)
    with failing(Accelerator, "save_state", 2, after), pytest.raises(Interrupted):
        trainer.train()
    assert [path.name for path in checkpoints_of(trainer)] == ["step-00000002"]
    again = trainer_of(resume="auto", **options)
    again.train()
    assert not changed(state(whole.stage), again.stage)


def test_what_a_killed_process_left_half_written_is_no_checkpoint(trainer_of, tmp_path):
    trainer = trainer_of(max_steps=3, save_steps=2)
    trainer.train()
    folder = trainer.output_dir / "checkpoints" / ".step-00000009.tmp"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    assert trainer_of(max_steps=3, save_steps=2, resume="auto").train().steps == 3


def test_an_evaluation_that_was_due_is_made_up_for(trainer_of, tmp_path):
    options = {"max_steps": 5, "eval_steps": 2, "save_steps": 2, "logging_steps": 10}
    recalls, saved = {2: 0.9, 4: 0.5, 5: 0.6}, []
    trainers = []

    def evaluate(model, watched=iter) -> dict[str, float]:
        return {"mean_recall": recalls[trainers[-1].progress.step]}

    def make(folder: str, resume: str) -> Trainer:
        del saved[:]
        save = lambda to, metrics: saved.append((to.name, metrics["mean_recall"]))  # noqa: E731
        trainers.append(
            trainer_of(output_dir=str(tmp_path / folder), resume=resume, evaluate=evaluate, save=save, **options)
        )
        return trainers[-1]

    whole = make("whole", "never")
    whole.train()
    assert saved == [("whole", 0.9), ("best", 0.9), ("whole", 0.5), ("whole", 0.6)]
    interrupted = make("out", "auto")
    interrupted.evaluate = lambda *_: (_ for _ in ()).throw(Interrupted)
    with pytest.raises(Interrupted):
        interrupted.train()
    assert not log_of(interrupted) and not saved
    again = make("out", "auto")
    again.train()
    assert saved == [("out", 0.9), ("best", 0.9), ("out", 0.5), ("out", 0.6)]
    assert [line | {"seconds": 0} for line in log_of(again)] == [line | {"seconds": 0} for line in log_of(whole)]


def test_the_best_of_before_an_interruption_stays_the_best(trainer_of):
    options = {"max_steps": 6, "eval_steps": 2, "save_steps": 1, "resume": "auto"}
    first, _ = fake_evaluation([0.9])
    with failing(torch.optim.AdamW, "step", 4), pytest.raises(Interrupted):  # a checkpoint knows of the 0.9
        trainer_of(evaluate=first, save=lambda *_: None, **options).train()
    second, _ = fake_evaluation([0.5, 0.6])
    saved = []
    trainer_of(evaluate=second, save=lambda folder, _: saved.append(folder.name), **options).train()
    assert saved == ["out", "out"]


def test_bad_rows_of_before_an_interruption_count(trainer_of, pairs):
    options = {"pairs": spoiled(pairs, 2, 1), "batch_size": 24, "max_steps": 3, "save_steps": 1, "resume": "auto"}
    with failing(torch.optim.AdamW, "step", 3), pytest.raises(Interrupted):
        trainer_of(**options).train()
    result = trainer_of(**options).train()
    assert (result.pairs, result.bad_rows) == (63, {"no caption": 6, "undecodable image": 3})


CHANGES = {
    "learning_rate": ({"learning_rate": 0.1}, "learning_rate was 0.001, is 0.1"),
    "batch_size": ({"batch_size": 6}, "batch_size was 8, is 6"),
    "seed": ({"seed": 1}, "seed was 0, is 1"),
    "precision": ({"mixed_precision": "bf16"}, 'mixed_precision was "no", is "bf16"'),
    "torch_compile": ({"torch_compile": True}, "torch_compile was false, is true"),
    "name": ({"name": "other"}, 'stage was "train", is "other"'),
    "config": ({"config": {"crop": (0.5, 1)}}, r"crop was nothing, is \[0.5, 1\]"),
    "both": ({"seed": 1, "max_grad_norm": 1.0}, "max_grad_norm was 5.0, is 1.0; seed was 0, is 1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_configuration_is_refused_and_what_changed_is_named(trainer_of, change, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # which takes minutes
    values, words = CHANGES[change]
    trainer_of().train()
    with pytest.raises(ValueError, match=f"belongs to a run with another configuration: {words}. Take that again"):
        trainer_of(resume="auto", **values).train()
    trainer_of(resume="never", **values).train()  # as the message says
    trainer_of(resume="auto", **values).train()


def test_a_run_can_be_made_longer_and_follows_the_longer_schedule(trainer_of, caplog):
    trainer_of(max_steps=4).train()
    longer = trainer_of(max_steps=6, resume="auto")
    result = longer.train()
    assert (result.steps, result.pairs) == (6, 48)
    assert "is gone on with: max_steps was 4, is 6. The result is bit for bit that of neither run." in caplog.text
    whole = trainer_of(max_steps=6, resume="never")
    rates = [line["learning_rate"] for line in log_of(longer)]
    whole.train()
    assert rates[4:] == [line["learning_rate"] for line in log_of(whole)][4:] and len(rates) == 6


def test_a_run_that_was_cut_off_sees_the_batches_of_the_longer_one(trainer_of, collator):
    def seen(**values) -> list[torch.Tensor]:
        batches = []
        stage = trainer_of(**values)
        step = stage._step
        stage._step = lambda *given: batches.append(given[2][0]["input_ids"]) or step(*given)
        stage.train()
        return batches

    first, rest, whole = seen(max_steps=2), seen(max_steps=5, resume="auto"), seen(max_steps=5)
    torch.testing.assert_close([*first, *rest], whole, atol=0, rtol=0)


def test_a_run_does_not_become_shorter_than_it_is(trainer_of):
    trainer_of(max_steps=4).train()
    with pytest.raises(ValueError, match="out holds 4 steps; ask for no fewer, or set resume=never"):
        trainer_of(max_steps=3, resume="auto").train()


def test_data_with_other_rows_is_refused(trainer_of, pairs):
    trainer_of().train()
    with pytest.raises(ValueError, match="rows was 24, is 23"):
        trainer_of(resume="auto", pairs=PairDataset(pairs.pairs.select(range(23)))).train()


def test_a_stream_is_refused_to_other_workers_and_shards(trainer_of, source, pairs_tar):
    options = source(True) | {"max_steps": 2}
    trainer_of(**options).train()
    assert trainer_of(resume="auto", **options | {"max_steps": 3}).train().steps == 3  # but it may be longer
    options["max_steps"] = 3
    with pytest.raises(ValueError, match="num_workers was 0, is 2"):
        trainer_of(resume="auto", dataloader_num_workers=2, **options).train()
    options["pairs"] = PairStream(
        load_pairs(str(pairs_tar), image_column="png", caption_columns=["txt"], streaming=True), 5
    )
    with pytest.raises(ValueError, match="shards was 4, is 1"):
        trainer_of(resume="auto", **options).train()


@pytest.mark.parametrize(
    "values",
    [
        {"dataloader_num_workers": 1},
        {"logging_steps": 2},
        {"eval_steps": 1},
        {"save_steps": 1},
        {"max_skipped": 0},
        {"max_bad_fraction": 0.5},
    ],
    ids=lambda values: next(iter(values)),
)
def test_what_does_not_decide_the_result_may_change(trainer_of, values, tmp_path):
    options = {"max_steps": 4, "save_steps": 2}
    whole = trainer_of(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    with failing(torch.optim.AdamW, "step", 4), pytest.raises(Interrupted):
        trainer_of(**options).train()
    again = trainer_of(**options | {"resume": "auto"} | values)
    again.train()
    assert not changed(state(whole.stage), again.stage)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("damage", [cut, Path.unlink], ids=["cut off", "gone"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "progress.json"])
def test_a_damaged_checkpoint_makes_the_one_before_be_used(trainer_of, caplog, name, damage):
    options = {"max_steps": 5, "save_steps": 2}
    whole = trainer_of(**options)
    whole.train()
    last = checkpoints_of(whole)[-1]
    damage(last / name)
    again = trainer_of(resume="auto", **options)
    taken = []
    again.stage.after_step = lambda: taken.append(1)
    again.train()
    assert len(taken) == 1  # the fifth step alone
    assert not changed(state(whole.stage), again.stage)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert messages == [f"Checkpoint {last} is damaged; the one before it is used."]


def test_when_every_checkpoint_is_damaged_the_run_does_not_start_unasked(trainer_of):
    options = {"max_steps": 3, "save_steps": 2}
    whole = trainer_of(**options)
    whole.train()
    for folder in checkpoints_of(whole):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="All checkpoints in .* are damaged: .*step-00000003.*step-00000002.*never"):
        trainer_of(resume="auto", **options).train()
    again = trainer_of(resume="never", **options)
    assert again.train().steps == 3 and not changed(state(whole.stage), again.stage)


def test_the_checkpoint_just_written_outlives_damaged_ones_of_later_steps(trainer_of):
    whole = trainer_of(max_steps=6, save_steps=2)
    whole.train()
    for folder in checkpoints_of(whole)[1:]:
        (folder / "model.safetensors").write_bytes(b"")
    interrupted = trainer_of(max_steps=6, save_steps=1, resume="auto")
    interrupted.stage.after_step = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted):
        interrupted.train()
    assert [folder.name for folder in checkpoints_of(interrupted)] == ["step-00000004", "step-00000005"]


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint_before(trainer_of, monkeypatch):
    trainer = trainer_of(max_steps=4, save_steps=2)

    def full(self, folder):
        (Path(folder) / "model.safetensors").write_bytes(b"some")
        raise OSError(28, "No space left on device")

    count, save_state = [0], Accelerator.save_state
    monkeypatch.setattr(
        Accelerator,
        "save_state",
        lambda self, folder: (count.append(0), (save_state if len(count) == 2 else full)(self, folder)),
    )
    with pytest.raises(OSError, match="checkpoints could not be written.*No space left on device.* make room"):
        trainer.train()
    assert [path.name for path in checkpoints_of(trainer)] == ["step-00000002"]


# SIGTERM


@pytest.fixture
def in_main_thread():
    """A signal would end the tests where its handler cannot be set."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("needs the main thread")


@pytest.mark.parametrize("name", STAGES)
def test_sigterm_finishes_the_step_and_leaves_a_checkpoint(trainer_of, in_main_thread, name, tmp_path, caplog):
    whole = trainer_of(name, max_steps=4, output_dir=str(tmp_path / "whole"))
    whole.train()
    trainer, previous = trainer_of(name, max_steps=4), signal.getsignal(signal.SIGTERM)
    after_step, steps = trainer.stage.after_step, []

    def terminated() -> None:
        after_step()
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.stage.after_step = terminated
    with pytest.raises(Preempted) as info:
        trainer.train()
    assert info.value.code == EXIT_PREEMPTED == 75 and isinstance(info.value, SystemExit)
    assert len(steps) == 2 and [path.name for path in checkpoints_of(trainer)] == ["step-00000002"]
    assert "Stopped by SIGTERM at step 2; resume=auto goes on from there." in caplog.text
    assert signal.getsignal(signal.SIGTERM) is previous
    again = trainer_of(name, max_steps=4, resume="auto")
    again.train()
    assert not changed(state(whole.stage), again.stage) and len(log_of(again)) == 4


def test_sigterm_in_the_last_step_stops_the_run_and_the_next_one_saves(trainer_of, in_main_thread):
    saved = []
    trainer = trainer_of(max_steps=2, save=lambda folder, _: saved.append(folder.name))
    steps = []
    trainer.stage.after_step = lambda: (steps.append(1), len(steps) == 2 and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted):  # or a stage that follows would run on until it is killed
        trainer.train()
    assert not saved
    trainer_of(max_steps=2, save=lambda folder, _: saved.append(folder.name), resume="auto").train()
    assert saved == ["out"]


def test_sigterm_in_the_last_evaluation_stops_the_run_when_all_is_saved(trainer_of, in_main_thread):
    def evaluate(_, watched=iter) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"mean_recall": 0.5}

    saved = []
    with pytest.raises(Preempted):
        trainer_of(evaluate=evaluate, save=lambda folder, metrics: saved.append(metrics)).train()
    assert saved == [{"mean_recall": 0.5}]
    assert trainer_of(resume="auto").train().steps == 3


# A limit of time


@pytest.fixture
def ticking(monkeypatch):
    """A clock that shows one second more whenever a run looks at it."""
    ticks = itertools.count(1)
    monkeypatch.setattr(TimeLimit, "used", property(lambda limit: limit._used + next(ticks)))


def test_a_run_ends_when_its_time_is_up_as_if_its_steps_were_over(trainer_of, ticking):
    saved = []
    trainer = trainer_of(
        max_steps=1000, max_time="10s", save_steps=1000, save=lambda folder, metrics: saved.append(folder)
    )
    result = trainer.train()
    assert 1 < result.steps < 12 and saved == [trainer.output_dir]
    rates = [line["learning_rate"] for line in log_of(trainer)]
    assert rates[0] > 0.9e-3 and rates[-1] < 0.1e-3 and rates == sorted(rates, reverse=True)
    assert [int(path.name.split("-")[1]) for path in checkpoints_of(trainer)] == [result.steps]


def test_a_run_whose_time_is_up_is_not_gone_on_with_unless_it_is_given_more(trainer_of, ticking):
    steps = trainer_of(max_steps=1000, max_time="10s").train().steps
    assert trainer_of(max_steps=1000, max_time="10s", resume="auto").train().steps == steps
    assert steps < trainer_of(max_steps=1000, max_time="60s", resume="auto").train().steps < 1000


def test_time_that_is_enough_changes_nothing(trainer_of):
    plain, limited = trainer_of(), trainer_of(max_time="10h")
    plain.train(), limited.train()
    for name, tensor in state(plain.stage).items():
        torch.testing.assert_close(state(limited.stage)[name], tensor, atol=1e-6, rtol=1e-4)  # rates a hair lower


@pytest.mark.parametrize(
    ("tracker", "words"), [("tensorbord", "did you mean 'tensorboard'"), ("swanlab", "pip install swanlab")]
)
def test_a_tracker_that_cannot_be_used_is_an_error_before_training(trainer_of, tracker, words):
    with pytest.raises(ValueError, match=words):
        trainer_of(report_to=tracker)

"""A stage runs on the data of a context, with a seed of its own."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.sources import stage_seed
from clipmap_hf.pipeline import trainer as pipeline_trainer
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.pretraining import PretrainingTrainer
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.result import TrainResult
from clipmap_hf.training.run_arguments import RunArguments


@pytest.fixture
def data(pairs_parquet) -> DataArguments:
    path = str(pairs_parquet)
    return DataArguments(train_data=path, eval_data=path, keyword_column=["keywords"], caption_sampling="random")


# A stage on data


def test_seeds_differ_by_stage_and_by_seed_and_stay_the_same():
    names = ("mapping", "distillation", "scratch", "pretrain")
    assert len({stage_seed(name, seed) for name in names for seed in range(50)}) == 200
    assert stage_seed("mapping", 0) == 3030265208  # changed, results that were published could not be repeated


def test_each_stage_has_a_seed_of_its_own(data, tiny_processor, shared_teacher, monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, run, collator, **rest):
            seen.append((run.seed, collator.seed))

            self.events = SimpleNamespace(state=None)

        def train(self):
            return TrainResult(0, 0, 0.0, {}, 0, {})

    monkeypatch.setattr(pipeline_trainer, "Trainer", Recorder)
    for name, seed in (("mapping", 0), ("distillation", 0), ("mapping", 1), ("mapping", 0)):
        context = RunContext(RunArguments("out", seed=seed), data)
        PretrainingTrainer(
            shared_teacher, StageArguments(), processing_class=tiny_processor, name=name, context=context
        ).train()
    assert seen[0] == seen[3] and len(set(seen)) == 3 and all(run == collate for run, collate in seen)


@pytest.fixture
def run_on(data, tiny_processor, shared_teacher, tmp_path, fresh_accelerator, monkeypatch):
    """A function that runs a stage with changed `DataArguments` or others, and returns stage and result."""

    def run(name: str = "pretrain", **values):
        options = {"max_steps": 3, "batch_size": 8, "output_dir": str(tmp_path / "out"), "logging_steps": 1}
        options |= {"train_data": data.train_data, "learning_rate": 1e-3, **values}
        arguments, *run = [
            cls(**{f.name: options.pop(f.name) for f in dataclasses.fields(cls) if f.name in options})
            for cls in (StageArguments, RunArguments, DataArguments)
        ]
        context = RunContext(*run)
        trainer = PretrainingTrainer(
            copy.deepcopy(shared_teacher), arguments, processing_class=tiny_processor, name=name, context=context
        )
        monkeypatch.setattr(trainer, "_config", lambda: options)
        return trainer.stage, trainer.train()

    return run


def weights(stage) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in stage.parameters()])


DATA_CHANGES = {
    "crop scale": ({"crop_scale": [0.5, 1.0]}, r"crop_scale was \[0\.9, 1\.0\], is \[0\.5, 1\.0\]"),
    "flip": ({"flip": 0.5}, "flip was 0.0, is 0.5"),
    "captions": (
        {"keyword_column": ["keywords"], "caption_sampling": "first"},
        r'keyword_column was \[\], is \["keywords"\]',
    ),
    "learning rate": ({"learning_rate": 0.1}, "learning_rate was 0.001, is 0.1"),
    "seed": ({"seed": 1}, r"seed was \d+, is \d+"),
    "several": ({"flip": 0.5, "rotation": 2.0}, "flip was 0.0, is 0.5; rotation was 0.0, is 2.0"),
    "config": ({"student": {"width": 1}}, "student.width was nothing, is 1"),
}


@pytest.mark.parametrize("change", DATA_CHANGES)
def test_a_run_is_not_gone_on_with_on_other_data(run_on, change):
    values, words = DATA_CHANGES[change]
    run_on()
    with pytest.raises(ValueError, match=f"belongs to a run with another configuration: {words}. Take that again"):
        run_on(**values)


def test_what_is_measured_and_tolerated_may_change(run_on, data, tmp_path):
    first, _ = run_on()
    again, result = run_on(
        eval_data=data.eval_data, eval_steps=2, max_bad_fraction=0.5, dataloader_num_workers=1, logging_steps=3
    )
    assert result.steps == 3 and torch.equal(weights(again), weights(first))
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3]  # the last is the evaluation's


def test_a_stage_trains_on_a_stream(run_on, pairs_tars):
    streaming = {"train_data": pairs_tars, "streaming": True, "image_column": "png", "caption_column": ["txt"]}
    streaming |= {"resume": "never", "max_steps": 5, "micro_batch_size": 4}
    (first, result), (again, _) = (run_on(**streaming) for _ in range(2))
    assert (result.steps, result.pairs, result.bad_rows) == (5, 40, {})
    assert torch.equal(weights(first), weights(again))
    other, _ = run_on(**streaming, shuffle_buffer=2)
    assert not torch.equal(weights(first), weights(other))
    with pytest.raises(ValueError, match="A stream has no length"):
        run_on(**streaming | {"num_train_epochs": 1, "max_steps": -1})


def test_one_seed_gives_each_stage_its_own_order_and_crops(run_on):
    stages = [run_on(name, resume="never")[0] for name in ("pretrain", "scratch", "pretrain")]
    assert torch.equal(weights(stages[0]), weights(stages[2]))
    assert not torch.equal(weights(stages[0]), weights(stages[1]))

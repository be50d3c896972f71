"""Callbacks of transformers in our loop, as they are in transformers."""

import copy
import importlib
import json
import types

import pytest
from accelerate.state import AcceleratorState
from conftest import randomize
from transformers import CLIPModel, EarlyStoppingCallback, ProgressCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback

from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.loader import BatchPlan, PairDataset
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.distributed import join_processes
from clipmap_hf.training.arguments import DistillationStageArguments, StageArguments
from clipmap_hf.training.callbacks import callback_arguments, callback_handler, check_trackers
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.stages.contrastive import ContrastiveStage
from clipmap_hf.training.trainer import Trainer


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def train(tiny_config, tiny_processor, pairs_parquet, tmp_path):
    """A function that trains a tiny model: `train(callbacks=[…], recalls=[…], steps=6)` returns the loop."""
    model = randomize(CLIPModel(tiny_config()))

    def run(callbacks=(), recalls=(), steps: int = 6, folder: str = "out", **values) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = RunArguments(str(tmp_path / folder), **{"logging_steps": 1, **values})
        recalls = iter(recalls)
        augmentation = Augmentation(scale=(0.5, 1.0))
        loop = Trainer(
            stage=ContrastiveStage(copy.deepcopy(model)),
            arguments=StageArguments(max_steps=steps, batch_size=8, learning_rate=1e-3, warmup_steps=0),
            run=arguments,
            pairs=PairDataset(load_pairs(str(pairs_parquet))),
            collator=PairCollator(tiny_processor.tokenizer, tiny_processor.image_processor, augmentation=augmentation),
            evaluate=lambda model, watched: {"mean_recall": next(recalls), "batches": len([*watched([1, 2])])},
            handler=callback_handler(arguments, callbacks),
        )
        loop.result = loop.train()
        return loop

    return run


class Recorder(TrainerCallback):
    """Notes all events, and what it may read."""

    def __init__(self):
        self.events, self.args, self.logs, self.metrics, self.epochs, self.model = [], None, [], [], [], None

    def __getattribute__(self, name):
        if name.startswith("on_"):

            def note(args, state, control, model=None, **kwargs):
                self.events.append(name)
                self.args, self.model = args, model
                self.epochs.append(state.epoch)
                if name == "on_log":
                    self.logs.append(kwargs["logs"])
                if name == "on_evaluate":
                    self.metrics.append(kwargs["metrics"])

            return note
        return super().__getattribute__(name)


def test_events_come_in_transformers_order(train):
    recorder = Recorder()
    train([recorder], recalls=[0.5], steps=3)
    step = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
    assert recorder.events == [
        *("on_init_end", "on_train_begin", "on_epoch_begin"),
        *(*step, "on_log"),
        *(*step, "on_log"),
        *(*step, "on_epoch_end", "on_log", "on_save"),
        *("on_prediction_step", "on_prediction_step", "on_log", "on_evaluate", "on_train_end"),
    ]


def test_a_callback_reads_arguments_state_logs_and_model(train, tmp_path):
    recorder = Recorder()
    loop = train([recorder], recalls=[0.2, 0.5, 0.4], steps=6, eval_strategy="epoch", run_name="mine")
    assert isinstance(recorder.args, TrainingArguments)
    args = recorder.args
    assert (args.output_dir, args.run_name, args.max_steps) == (str(tmp_path / "out"), "mine", 6)
    assert (args.per_device_train_batch_size, args.eval_strategy, args.greater_is_better) == (8, "epoch", True)
    assert args.world_size == 1 and json.loads(args.to_json_string())["batch_size"] == 8
    assert isinstance(recorder.model, CLIPModel) and recorder.model is loop.stage.trained
    assert {"loss", "grad_norm", "learning_rate", "epoch"} <= recorder.logs[0].keys()
    assert [metrics["eval_mean_recall"] for metrics in recorder.metrics] == [0.2, 0.5]
    state = loop.events.state
    assert (state.global_step, state.epoch, state.max_steps, state.num_train_epochs) == (6, 2.0, 6, 2)
    assert (state.best_metric, state.best_global_step) == (0.5, 6)
    assert [line["step"] for line in state.log_history if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_the_arguments_of_a_callback_have_those_that_transformers_lacks():
    losses = {"affinity": 1.0, "mine": lambda student, teacher: 0}
    stage, run = DistillationStageArguments(losses=losses), RunArguments("out", bf16=True, torch_compile=True)
    args = callback_arguments(stage, run, BatchPlan(256, 64), join_processes().device)
    assert args.bf16 and args.torch_compile and args.gradient_accumulation_steps == 4
    assert args.to_dict()["losses"]["affinity"] == 1.0 and "lambda" in args.to_dict()["losses"]["mine"]


# Callbacks as they are


def test_early_stopping_ends_a_run_with_its_last_checkpoint(train, tmp_path):
    callback = EarlyStoppingCallback(2)
    loop = train([callback], recalls=[0.5, 0.4, 0.3], steps=9, eval_strategy="steps", eval_steps=1)
    assert loop.result.steps == 3 and loop.events.state.best_global_step == 1
    assert [path.name for path in sorted((tmp_path / "out" / "checkpoints").iterdir())] == ["step-00000003"]
    again = train([EarlyStoppingCallback(2)], recalls=[0.3], steps=9, eval_strategy="steps", eval_steps=1)
    assert again.result.steps == 3  # which is finished
    longer = train([EarlyStoppingCallback(2)], recalls=[0.2] * 9, steps=12, eval_strategy="steps", eval_steps=1)
    assert longer.result.steps == 4  # its patience was over, and was not forgotten


def test_the_patience_of_early_stopping_survives_an_interruption(train):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "steps": 9}
    with pytest.raises(KeyboardInterrupt):
        train([EarlyStoppingCallback(4), Interrupt()], recalls=[0.5, 0.4, 0.3], **options)
    loop = train([EarlyStoppingCallback(4)], recalls=[0.3, 0.2, 0.1], **options)
    assert loop.result.steps == 5  # 0.4, 0.3, made up for; 0.2, 0.1


def test_an_evaluation_that_is_made_up_for_may_stop_the_run(train):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "steps": 9}

    def interrupted():
        yield 0.5
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train([EarlyStoppingCallback(1)], recalls=interrupted(), **options)
    assert train([EarlyStoppingCallback(1)], recalls=[0.4], **options).result.steps == 4


def test_a_callback_may_ask_for_logs_evaluations_and_checkpoints(train, tmp_path):
    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                control.should_log = control.should_evaluate = control.should_save = True
            control.should_training_stop = state.global_step == 4
            return control

    loop = train([Ask], recalls=[0.5, 0.6], logging_steps=100)
    assert loop.result.steps == 4
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "loss" in line) for line in lines] == [(2, True), (2, False), (4, True), (4, False)]
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004"]


def test_an_epoch_cannot_be_cut_short(train):
    class Cut(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    with pytest.raises(ValueError, match="set should_training_stop"):
        train([Cut])


def test_the_state_of_a_callback_of_ones_own_is_kept(train):
    class Count(TrainerCallback, ExportableState):
        def __init__(self):
            self.steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

        def state(self) -> dict:
            return {"args": {}, "attributes": {"steps": self.steps}}

    first, second = Count(), Count()
    train([first], recalls=[0.1], steps=3)
    train([second], recalls=[0.1], steps=5)
    assert (first.steps, second.steps) == (3, 5)


def test_a_bar_shows_progress_or_a_line_does(train, capsys):
    train(recalls=[0.25], steps=2, folder="bar")
    bar = capsys.readouterr()
    assert "2/2" in bar.err and "eval_mean_recall" in bar.out
    train(recalls=[0.25], steps=2, disable_tqdm=True, folder="lines")
    lines = capsys.readouterr()
    assert "2/2" not in lines.err and "eval_mean_recall" in lines.out
    kinds = [type(callback) for callback in callback_handler(RunArguments("out")).callbacks]
    assert ProgressCallback in kinds and PrinterCallback not in kinds


def test_a_notebook_has_its_own_progress(train, monkeypatch, capsys):
    pytest.importorskip("IPython")
    monkeypatch.setattr("clipmap_hf.training.callbacks.is_in_notebook", lambda: True)
    shown = []

    def display(value, **_):
        shown.append(value.data)
        return types.SimpleNamespace(update=lambda value: shown.append(value.data))

    notebook = importlib.import_module("transformers.utils.notebook")
    monkeypatch.setattr(notebook.disp, "display", display)
    train(recalls=[0.25, 0.5], steps=6, eval_strategy="epoch")
    assert "Mean Recall" in shown[-1] and "0.500000" in shown[-1] and "[6/6" in shown[-1]


def test_tensorboard_gets_the_logs(train, tmp_path):
    pytest.importorskip("tensorboard")
    train(recalls=[0.25], steps=2, report_to="tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert {"train/loss", "train/learning_rate", "eval/mean_recall"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


def test_trackio_gets_the_logs(train, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    logged, started = [], []
    monkeypatch.setattr(trackio, "init", lambda **options: started.append(options))
    monkeypatch.setattr(trackio, "log", lambda values, **_: logged.append(values))
    monkeypatch.setattr(trackio, "finish", lambda: None)
    monkeypatch.setattr(trackio, "config", _Config())
    train(recalls=[0.25], steps=2, report_to=["trackio"], run_name="mine")
    assert started[0]["name"] == "mine"
    assert [values["train/global_step"] for values in logged] == [1, 2, 2]
    assert logged[-1]["eval/mean_recall"] == 0.25


class _Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)


# What is refused before training


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorbord", "report_to='tensorbord' is no tracker; did you mean 'tensorboard'?"),
        ("xyz", "report_to='xyz' is no tracker; allowed are"),
        ("neptune", "report_to='neptune' needs a package that is not installed; install it: pip install neptune"),
    ],
)
def test_trackers_are_checked_before_anything_is_trained(name, words):
    with pytest.raises(ValueError, match=words):
        check_trackers([name])
    with pytest.raises(ValueError, match=words):
        callback_handler(RunArguments("out", report_to=name))


def test_no_tracker_is_asked_for_by_default():
    assert RunArguments("out", report_to="none").report_to == ["none"]
    assert RunArguments("out", report_to=None).report_to == []
    assert len(callback_handler(RunArguments("out", report_to="none")).callbacks) == 2

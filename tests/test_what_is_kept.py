"""What a run leaves, what it keeps while it lasts, and how often it makes what is costly."""

import dataclasses
import json

import pytest
import torch
from transformers import CLIPModel

from clipmap_hf import ClipMapConfig, TowerConfig
from clipmap_hf.data.arguments import CalibrationArguments, DataArguments
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.models import teacher as teacher_module
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.pipeline import context as context_module
from clipmap_hf.pipeline.compression import CompressionArguments, compress_in_run, compress_in_steps
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.mapping import map_model
from clipmap_hf.training.arguments import DistillationStageArguments, MappingStageArguments, MaskingStageArguments
from clipmap_hf.training.run_arguments import RunArguments


pytestmark = pytest.mark.usefixtures("fresh_accelerator")

SMALL = ClipMapConfig(TowerConfig(32, num_hidden_layers=2), TowerConfig(16, num_hidden_layers=1), refit=False)
DIAGONAL = dataclasses.replace(SMALL, initializer="diagonal")
NUMBERS = {"max_steps": 2, "batch_size": 8}
PROCESSOR_FILES = {"tokenizer.json", "tokenizer_config.json", "processor_config.json"}
STUDENT_FILES = PROCESSOR_FILES | {"config.json", "model.safetensors"}
LEFT = STUDENT_FILES | {"README.md", "arguments.yaml", "checkpoints", "made_from.json", "metrics.jsonl"}


@pytest.fixture
def run(teacher_folder, pairs_parquet, tmp_path):
    """A function that compresses the tiny teacher: `run(student, mapping={…}, masking={…}, distillation={…})`."""

    def start(student: ClipMapConfig | None = SMALL, source=teacher_folder, **stages):
        context = RunContext(RunArguments(str(tmp_path / "out")), DataArguments(str(pairs_parquet)), "steps: 2\n")
        classes = {
            "masking": MaskingStageArguments,
            "mapping": MappingStageArguments,
            "distillation": DistillationStageArguments,
        }
        arguments = {name: classes[name](**NUMBERS | values) for name, values in stages.items()}
        arguments.setdefault("distillation", DistillationStageArguments(**NUMBERS))
        calibration = CalibrationArguments(calibration_pairs=8)
        source = ModelId(str(source))
        return compress_in_run(
            source, [source], student, context, CompressionArguments(calibration=calibration, **arguments)
        )

    return start


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_finished_run_leaves_the_student_its_card_and_logs(run, out):
    run()
    assert names(out) == LEFT
    CLIPModel.from_pretrained(out)


def test_a_mapped_student_stays_with_its_map_and_without_checkpoints(run, out):
    run(mapping={})
    assert names(out) == LEFT | {"mapped"}
    assert names(out / "mapped") == STUDENT_FILES | {"README.md", "arguments.yaml", "map", "metrics.jsonl"}


def test_a_selected_student_stays_without_checkpoints(run, out):
    run(masking={})
    assert names(out) == LEFT | {"masked"} and "checkpoints" not in names(out / "masked")


@pytest.mark.parametrize("stages", [{}, {"mapping": {}}, {"distillation": {"max_steps": 0}}], ids=str)
def test_the_same_command_finds_a_finished_run_and_computes_nothing_anew(run, out, stages, no_start):
    first = run(**stages)
    before = (out / "model.safetensors").read_bytes()
    no_start()
    again = run(**stages)
    assert (out / "model.safetensors").read_bytes() == before and again.steps == first.steps


def test_while_a_run_lasts_its_start_is_kept_without_a_map_that_nobody_needs(run, out, monkeypatch, no_start):
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert names(out / "start") == STUDENT_FILES | {"README.md", "origin.json"}
    no_start()
    run()
    assert names(out) == LEFT


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("student", "stages", "words"),
    [
        (dataclasses.replace(DIAGONAL, depth="spread"), {}, 'origin.student.depth was "interval_front", is "spread"'),
        (DIAGONAL, {"mapping": {}}, "origin.mapping.*was nothing"),
    ],
)
def test_a_run_is_not_gone_on_with_for_a_student_that_starts_otherwise(run, student, stages, words):
    run(DIAGONAL)
    with pytest.raises(ValueError, match=words):
        run(student, **stages)


def test_a_finished_mapping_leaves_no_start(teacher_folder, pairs_parquet, out, no_start):
    def map_it():
        context = RunContext(RunArguments(str(out)), DataArguments(str(pairs_parquet)))
        calibration, mapping = CalibrationArguments(calibration_pairs=8), MappingStageArguments(**NUMBERS)
        return map_model(ModelId(str(teacher_folder)), SMALL, context, calibration=calibration, mapping=mapping)

    map_it()
    assert names(out) == (LEFT - {"arguments.yaml"}) | {"map"}
    before = (out / "map" / "clipmap.safetensors").read_bytes()
    no_start()
    assert map_it().steps == 2
    assert (out / "map" / "clipmap.safetensors").read_bytes() == before


# How often


@pytest.fixture
def counts(monkeypatch):
    """How often models were loaded, training pairs opened, and images decoded for calibration."""
    found = {"models": 0, "pairs": 0, "images": 0}
    load_model, training_pairs, call = (
        teacher_module.load_model,
        context_module.training_pairs,
        PairCollator.__call__,
    )

    def counted(name, function, weigh=lambda *_: 1):
        def count(*args, **kwargs):
            found[name] += weigh(*args)
            return function(*args, **kwargs)

        return count

    monkeypatch.setattr(teacher_module, "load_model", counted("models", load_model))
    monkeypatch.setattr(context_module, "training_pairs", counted("pairs", training_pairs))
    is_calibration = lambda collator, rows: len(rows) if collator.augmentation is None else 0  # noqa: E731
    monkeypatch.setattr(PairCollator, "__call__", counted("images", call, is_calibration))
    return found


@pytest.mark.parametrize("budget", [None, {"params": "100k"}], ids=["sizes", "budget"])
def test_teacher_pairs_and_calibration_images_are_read_once(run, counts, budget):
    student = SMALL if budget is None else ClipMapConfig(budget=budget, refit_steps=0)
    run(student, mapping={"losses": {"affinity": 1.0}})
    assert counts == {"models": 1, "pairs": 1, "images": 8}


def test_all_steps_share_teacher_and_pairs(teacher_folder, pairs_parquet, out, counts):
    source = ModelId(str(teacher_folder))
    context = RunContext(RunArguments(str(out)), DataArguments(str(pairs_parquet)))
    arguments = CompressionArguments(distillation=DistillationStageArguments(**NUMBERS))
    students = [dataclasses.replace(DIAGONAL, vision=TowerConfig(48), text=TowerConfig(32)), DIAGONAL]
    compress_in_steps(source, [source], students, context, arguments)
    assert counts == {"models": 2, "pairs": 1, "images": 0}  # the second model is the first step's student
    assert json.loads((out / "made_from.json").read_text())["teacher"] == ["1", None]

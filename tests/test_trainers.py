"""Training from Python: the trainers, and `compress` for all of it."""

import copy
import json
import random
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from test_recipe_configs import load_recipe
from transformers import CLIPModel, EarlyStoppingCallback, TrainerCallback

from clipmap_hf import (
    ClipMapCompressor,
    ClipMapConfig,
    DistillationArguments,
    DistillationTrainer,
    MappingArguments,
    MappingStageArguments,
    MappingTrainer,
    MaskingStageArguments,
    PretrainingArguments,
    PretrainingTrainer,
    TernaryArguments,
    TernaryTrainer,
    TowerConfig,
    compress,
    evaluate_retrieval,
)
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.masking import MaskingTrainer
from clipmap_hf.training.run_arguments import RunArguments


SMALL = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2),
    text=TowerConfig(hidden_size=16, num_hidden_layers=1),
    initializer="diagonal",
)
NUMBERS = {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0}

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def teacher(shared_teacher, tiny_processor) -> Teacher:
    return Teacher(copy.deepcopy(shared_teacher), tiny_processor, "me/teacher")


@pytest.fixture
def pairs(pairs_parquet) -> datasets.Dataset:
    return datasets.load_dataset("parquet", data_files=str(pairs_parquet), split="train")


@pytest.fixture
def student(teacher) -> CLIPModel:
    return ClipMapCompressor.from_teacher(teacher, SMALL).export()


@pytest.fixture
def distiller(student, teacher, pairs, tmp_path):
    """A function that makes a trainer of the student: `distiller(eval_strategy="epoch", callbacks=[…])`."""

    def make(**values) -> DistillationTrainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        options = {
            name: values.pop(name)
            for name in ("callbacks", "transform", "eval_dataset", "train_dataset", "processing_class")
            if name in values
        }
        args = DistillationArguments(**{"output_dir": str(tmp_path / "out"), **NUMBERS, **values})
        return DistillationTrainer(
            student=copy.deepcopy(student), teacher=teacher, args=args, **{"train_dataset": pairs, **options}
        )

    return make


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def run_recipe(monkeypatch, name: str, *argv) -> None:
    """Runs a recipe in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
    load_recipe(name).main()


# What a trainer does


def test_a_student_is_trained_evaluated_and_saved(distiller, pairs, tmp_path):
    trainer = distiller(eval_dataset=pairs.select(range(10)))
    result = trainer.train()
    assert (result.steps, result.pairs) == (3, 24) and 0 <= result.metrics["mean_recall"] <= 1
    assert set(result.teacher_metrics) == set(result.metrics) and trainer.state.global_step == 3
    assert trainer.evaluate() == {f"eval_{name}": value for name, value in result.metrics.items()}
    others = trainer.evaluate(pairs.select(range(10, 20)), metric_key_prefix="test")
    assert (
        others["test_mean_recall"]
        == evaluate_retrieval(trainer.model, pairs.select(range(10, 20)), processor=trainer.processing_class)[
            "mean_recall"
        ]
    )
    trainer.save_model(tmp_path / "copy")
    assert all(
        torch.equal(weights(tmp_path / "copy")[name], value) for name, value in weights(tmp_path / "out").items()
    )
    assert CLIPModel.from_pretrained(tmp_path / "out").config.vision_config.hidden_size == 32
    assert "evaluation pairs" in (tmp_path / "out" / "README.md").read_text()


class RemovesTheTeacher(TrainerCallback):
    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_begin(self, *_args, **_kwargs):
        shutil.rmtree(self.folder)


@pytest.mark.parametrize("name", ["distillation", "masking", "ternary", "mapping"])
def test_what_is_trained_is_saved_though_the_teachers_folder_is_gone(
    student, teacher_folder, pairs, tmp_path, name, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(teacher_folder, tmp_path / "models" / "gone")
    teacher = Teacher.load("models/gone")  # which, without the folder, might be a name on the Hub
    arguments = NUMBERS | {"output_dir": "out"}
    callbacks = [RemovesTheTeacher(folder)]
    if name == "masking":
        context = RunContext(RunArguments("out"), DataArguments(pairs), callbacks=callbacks)
        trainer = MaskingTrainer(teacher, [teacher], SMALL, MaskingStageArguments(**NUMBERS), context)
    elif name == "mapping":
        compressor = ClipMapCompressor.from_teacher(teacher, SMALL)
        trainer = MappingTrainer(compressor, MappingArguments(**arguments), pairs, callbacks=callbacks)
    else:
        kind, args = {
            "distillation": (DistillationTrainer, DistillationArguments),
            "ternary": (TernaryTrainer, TernaryArguments),
        }[name]
        trainer = kind(student, teacher, args(**arguments), pairs, callbacks=callbacks)
    assert trainer.train().steps == 3 and not folder.exists()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "unknown" and card.data.base_model is None and "of `gone`" in card.text


def test_evaluation_needs_pairs(distiller):
    with pytest.raises(ValueError, match="give an eval_dataset here or to the trainer"):
        distiller().evaluate()


def test_training_starts_anew_if_it_is_told_to(distiller, tmp_path):
    distiller().train()
    assert distiller().train().steps == 3 and len(log_of(tmp_path / "out")) == 1
    trainer = distiller(learning_rate=2e-3)
    with pytest.raises(ValueError, match="learning_rate was 0.001, is 0.002"):
        trainer.train()
    assert distiller(learning_rate=2e-3).train(resume_from_checkpoint=False).steps == 3


@pytest.mark.parametrize("form", ["dataset", "stream", "path", "list"])
def test_pairs_have_many_forms(distiller, pairs, pairs_parquet, tiny_pairs, form):
    given = {
        "dataset": pairs,
        "stream": pairs.to_iterable_dataset(num_shards=2),
        "path": pairs_parquet,
        "list": [(row["image"], row["caption"]) for row in tiny_pairs],
    }[form]
    assert distiller(train_dataset=given, streaming=form == "stream").train().pairs == 24


def test_columns_have_names(distiller, pairs):
    renamed = pairs.rename_columns({"image": "picture", "caption": "text"})
    names = {"image_column": "picture", "caption_column": ["text"]}
    assert distiller(train_dataset=renamed, eval_dataset=renamed, **names).train().pairs == 24
    with pytest.raises(ValueError, match="has no column 'picture'|lacks|picture"):
        distiller(image_column="picture").train()


def test_a_data_set_that_changed_is_another_run(distiller, pairs):
    distiller().train()
    with pytest.raises(ValueError, match="train_data was"):
        distiller(train_dataset=pairs.select([*range(23), 0])).train()


def test_other_teachers_and_students_by_path(teacher_folder, student, pairs, tmp_path):
    student.save_pretrained(tmp_path / "student")
    args = DistillationArguments(str(tmp_path / "out"), **NUMBERS)
    trainer = DistillationTrainer(tmp_path / "student", [str(teacher_folder), teacher_folder], args, pairs)
    assert trainer.train().steps == 3 and len(trainer.teachers) == 2


def test_a_model_as_the_teacher_has_a_name(shared_teacher, student, pairs, tiny_processor, tmp_path):
    args = DistillationArguments(str(tmp_path / "out"), **NUMBERS)
    with pytest.raises(ValueError, match="no name_or_path"):
        DistillationTrainer(student, copy.deepcopy(shared_teacher), args, pairs, processing_class=tiny_processor)


# By other names


def test_the_batch_of_transformers_is_a_batch_in_chunks(distiller, tmp_path):
    distiller(output_dir=str(tmp_path / "a"), batch_size=8, micro_batch_size=4).train()
    held = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "batch_size": 256}
    distiller(output_dir=str(tmp_path / "b"), **held).train()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_gradient_checkpointing_gives_the_same_gradient(distiller, tmp_path):
    for name in (False, True):
        distiller(output_dir=str(tmp_path / str(name)), gradient_checkpointing=name).train()
    torch.testing.assert_close(weights(tmp_path / "True"), weights(tmp_path / "False"), atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_is_refused_where_weights_are_mapped(teacher, pairs, tmp_path):
    compressor = ClipMapCompressor.from_teacher(teacher, SMALL)
    args = MappingArguments(str(tmp_path), gradient_checkpointing=True, **NUMBERS)
    with pytest.raises(ValueError, match="take micro_batch_size"):
        MappingTrainer(compressor, args, pairs).train()


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_evaluations_and_checkpoints_after_epochs_or_steps(distiller, pairs, tmp_path, strategy):
    distiller(
        num_train_epochs=2,
        max_steps=-1,
        eval_strategy=strategy,
        eval_steps=2 if strategy == "steps" else None,
        save_strategy=strategy,
        save_steps=2,
        save_total_limit=3,
        eval_dataset=pairs,
    ).train()
    expected = [3, 6] if strategy == "epoch" else [2, 4, 6]
    assert [line["step"] for line in log_of(tmp_path / "out") if "eval_mean_recall" in line] == expected
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").glob("step-*"))
    assert kept == [f"step-{step:08d}" for step in expected]


def test_the_run_ends_with_the_best_model(distiller, pairs, tmp_path, monkeypatch):
    trainer = distiller(
        max_steps=4, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, eval_dataset=pairs
    )
    recalls, seen = iter([0.0, 0.1, 0.5, 0.3, 0.2]), []

    def measured(model, watched=iter):
        seen.append(copy.deepcopy(model.state_dict()))
        return {"mean_recall": next(recalls)}

    trainer.__dict__["_evaluate"] = None
    _ = trainer.stage
    trainer.__dict__["_evaluate"] = measured
    result = trainer.train()
    assert result.metrics == {"mean_recall": 0.5} and trainer.state.best_global_step == 2
    written = CLIPModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(written[name], value.cpu()) for name, value in seen[2].items())
    assert not all(torch.equal(written[name], value.cpu()) for name, value in seen[4].items())
    assert all(torch.equal(trainer.model.state_dict()[name].cpu(), value) for name, value in written.items())


def test_a_metric_that_is_not_measured_is_an_error(distiller, pairs):
    with pytest.raises(ValueError, match="metric_for_best_model='accuracy' was not measured; there are"):
        distiller(eval_strategy="epoch", metric_for_best_model="accuracy", eval_dataset=pairs).train()


def test_an_index_of_the_teacher_is_measured_too(distiller, pairs, teacher):
    trainer = distiller(
        eval_dataset=pairs, teacher_index=True, eval_strategy="epoch", metric_for_best_model="index_mean_recall"
    )
    result = trainer.train()
    expected = evaluate_retrieval(
        trainer.model, pairs, processor=teacher.processor, index_model=teacher.model.to(trainer.model.device)
    )
    assert {f"index_{name}": value for name, value in expected.items()}.items() <= result.metrics.items()
    assert trainer.state.best_metric == result.metrics["index_mean_recall"]
    assert result.teacher_metrics["index_mean_recall"] == result.teacher_metrics["mean_recall"]


def test_what_does_not_decide_the_result_may_change(distiller, tmp_path):
    distiller().train()
    changed = {"logging_steps": 1, "save_total_limit": 5, "disable_tqdm": True, "run_name": "other"}
    (tmp_path / "out").rename(tmp_path / "moved")
    assert distiller(output_dir=str(tmp_path / "moved"), **changed).train().steps == 3


def test_the_best_metrics_are_those_of_the_best_weights(distiller, pairs):
    def run(recalls: list[float], **values):
        trainer = distiller(eval_steps=2, load_best_model_at_end=True, eval_dataset=pairs, **values)
        trainer.__dict__["_evaluate"] = None
        _ = trainer.stage
        found = iter(recalls)
        trainer.__dict__["_evaluate"] = lambda model, watched=iter: {"mean_recall": next(found)}
        return trainer.train()

    assert run([0.1, 0.3, 0.9], max_steps=3).metrics == {"mean_recall": 0.9}
    assert run([0.1, 0.2, 0.1], max_steps=5).metrics == {"mean_recall": 0.9}


def test_the_best_of_a_run_that_kept_none_is_one_of_the_rest(distiller, pairs):
    distiller(eval_steps=2, eval_dataset=pairs).train()
    result = distiller(eval_steps=2, eval_dataset=pairs, load_best_model_at_end=True).train()
    assert 0 <= result.metrics["mean_recall"] <= 1


def test_what_cannot_be_done_is_refused_before_training(distiller, teacher, pairs, tmp_path):
    with pytest.raises(TypeError, match="resume_from_checkpoint='checkpoint-2' must be true or false"):
        distiller().train(resume_from_checkpoint="checkpoint-2")
    with pytest.raises(ValueError, match="load_best_model_at_end needs evaluation pairs"):
        distiller(eval_strategy="epoch", load_best_model_at_end=True).train()
    args = PretrainingArguments(str(tmp_path), push_to_hub=True, **NUMBERS)
    with pytest.raises(ValueError, match="leave push_to_hub out"):
        PretrainingTrainer(teacher.model, args, pairs, processing_class=teacher.processor)


def test_a_column_may_be_named_alone_and_a_stream_is_known_as_one(distiller, pairs):
    stream = pairs.to_iterable_dataset(num_shards=2)
    assert distiller(train_dataset=stream, caption_column="caption").train().pairs == 24


# Losses and transforms of one's own


def test_a_loss_of_ones_own_is_trained_and_logged(distiller, tmp_path):
    def squared(student, *teachers):
        return (student.image_embeds - teachers[0].image_embeds).square().mean()

    distiller(losses={"squared": squared}, logging_steps=1).train()
    values = [line["squared"] for line in log_of(tmp_path / "out")]
    assert values == [line["loss"] for line in log_of(tmp_path / "out")] and values[-1] < values[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "losses: squared" in card and "squared: test_trainers." in card


def test_losses_of_ones_own_are_checked(distiller):
    with pytest.raises(ValueError, match="must return a tensor with a single number"):
        distiller(losses={"rows": lambda student, teacher: student.image_embeds}).train()
    with pytest.raises(ValueError, match="'affinity'.* are ours"):
        distiller(losses={"affinity": lambda student, teacher: 0.0})
    with pytest.raises(ValueError, match=r"unknown names \['mine'\].*or a function"):
        distiller(losses={"mine": 1.0})


class Noise:
    """A random transform that reads all generators, as torchvision's do."""

    def __init__(self, as_tensor: bool):
        self.as_tensor = as_tensor

    def __call__(self, image: Image.Image):
        image = image.resize((32, 32))
        if self.as_tensor:
            return torch.rand(3, 32, 32)
        return Image.effect_noise((32, 32), 10).convert("RGB") if torch.rand(()) > 2 else image


@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_transform_of_ones_own_takes_the_place_of_the_augmentation(distiller, tmp_path, as_tensor):
    for name in ("a", "b"):
        distiller(output_dir=str(tmp_path / name), transform=Noise(as_tensor)).train()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    distiller(output_dir=str(tmp_path / "c")).train()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != (tmp_path / "c" / "model.safetensors").read_bytes()


def test_a_transform_of_the_wrong_kind_is_refused(distiller, tmp_path):
    with pytest.raises(TypeError, match="must return an image or a tensor, got a int"):
        distiller(transform=lambda image: 3).train()
    with pytest.raises(ValueError, match=r"images of the shape \(3, 32, 32\), got \(3, 5, 5\)"):
        distiller(transform=lambda image: image.resize((5, 5))).train(resume_from_checkpoint=False)
    with pytest.raises(ValueError, match="A transform of your own and a teacher_cache do not go together"):
        distiller(transform=lambda image: image, teacher_cache=str(tmp_path / "cache"))


def test_a_transform_that_fails_leaves_the_generators_as_they_were(distiller):
    def fail(image):
        raise RuntimeError("broken")

    before = random.getstate()
    with pytest.raises(RuntimeError, match="broken"):
        distiller(transform=fail).train()
    assert random.getstate() == before


# The other stages


def test_operators_are_trained_and_the_map_is_written(teacher, pairs, tmp_path):
    compressor = ClipMapCompressor.from_teacher(teacher, SMALL)
    trainer = MappingTrainer(compressor, MappingArguments(str(tmp_path), **NUMBERS), pairs, pairs)
    result = trainer.train()
    assert result.steps == 3 and (tmp_path / "map" / "clipmap.safetensors").exists()
    assert (
        isinstance(result.model, CLIPModel) and trainer.evaluate()["eval_mean_recall"] == result.metrics["mean_recall"]
    )


def test_weights_become_ternary(student, teacher, pairs, tmp_path):
    args = TernaryArguments(str(tmp_path), losses={"feature": 1.0}, **NUMBERS)
    TernaryTrainer(student, teacher, args, pairs).train()
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"]


def test_a_model_is_trained_from_scratch(tiny_config, tiny_processor, pairs, tmp_path):
    torch.manual_seed(0)
    args = PretrainingArguments(str(tmp_path), **NUMBERS)
    PretrainingTrainer(CLIPModel(tiny_config()), args, pairs, processing_class=tiny_processor).train()
    CLIPModel.from_pretrained(tmp_path)


def test_the_end_of_training_is_pushed(distiller, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        "clipmap_hf.pipeline.trainer.push_folder", lambda *args, **options: pushed.append((args, options))
    )
    distiller(push_to_hub=True, hub_model_id="me/small", hub_private_repo=True, hub_revision="dev").train()
    (((folder, name), options),) = pushed
    assert (
        (folder, name) == (str(tmp_path / "out"), "me/small") and options["private"] and options["revision"] == "dev"
    )


# The same bytes


def test_a_recipe_and_a_trainer_write_the_same_bytes(
    teacher_folder, pairs, pairs_parquet, student, tiny_processor, tmp_path, monkeypatch
):
    student.save_pretrained(tmp_path / "student")
    tiny_processor.save_pretrained(tmp_path / "student")
    numbers = {"max_steps": 4, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0.25}
    options = [word for name, value in numbers.items() for word in (f"--distillation_{name}", value)]
    paths = {"--student_model": "student", "--output_dir": "recipe"}
    paths = [word for name, folder in paths.items() for word in (name, tmp_path / folder)]
    run_recipe(monkeypatch, "distill", *paths, "--teacher", teacher_folder, "--train_data", pairs_parquet, *options)
    AcceleratorState._reset_state(reset_partial_state=True)
    args = DistillationArguments(str(tmp_path / "python"), **numbers)
    DistillationTrainer(tmp_path / "student", teacher_folder, args, pairs).train()
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("python", "recipe"))
    assert ours == theirs


def test_compress_and_its_recipe_write_the_same_bytes(teacher_folder, pairs, pairs_parquet, tmp_path, monkeypatch):
    sizes = ("--vision_hidden_size", 32, "--vision_num_hidden_layers", 2, "--text_hidden_size", 16)
    sizes += ("--text_num_hidden_layers", 1, "--refit", False)
    numbers = (
        "--distillation_steps",
        2,
        "--distillation_batch_size",
        8,
        "--mapping_steps",
        2,
        "--mapping_batch_size",
        8,
    )
    paths = ("--teacher", teacher_folder, "--train_data", pairs_parquet, "--output_dir", tmp_path / "recipe")
    run_recipe(monkeypatch, "compress", *paths, *sizes, *numbers, "--calibration_pairs", 8)
    AcceleratorState._reset_state(reset_partial_state=True)
    result = compress(
        teacher_folder,
        ClipMapConfig(TowerConfig(32, num_hidden_layers=2), TowerConfig(16, num_hidden_layers=1), refit=False),
        DistillationArguments(str(tmp_path / "python"), max_steps=2, batch_size=8),
        pairs,
        calibration_pairs=8,
        mapping=MappingStageArguments(max_steps=2, batch_size=8),
    )
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("python", "recipe"))
    assert ours == theirs and result.steps == 2
    assert all(
        torch.equal(result.model.state_dict()[name].cpu(), value)
        for name, value in weights(tmp_path / "python").items()
    )


def test_compress_selects_by_masks(teacher_folder, pairs, tmp_path):
    args = DistillationArguments(str(tmp_path), max_steps=1, batch_size=8)
    student = ClipMapConfig(TowerConfig(32, num_hidden_layers=2), TowerConfig(16, num_hidden_layers=1))
    masking = MaskingStageArguments(max_steps=2, batch_size=8)
    assert compress(teacher_folder, student, args, pairs, masking=masking).steps == 1
    assert (tmp_path / "masked" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="Masks select by themselves"):
        compress(teacher_folder, SMALL, args, pairs, masking=masking)


def test_callbacks_reach_all_stages_of_compress(teacher_folder, pairs, tmp_path):
    class Steps(TrainerCallback):
        seen: list[tuple[str, int]] = []

        def on_step_end(self, args, state, control, **kwargs):
            self.seen.append((Path(args.output_dir).name, state.global_step))

    args = DistillationArguments(str(tmp_path / "out"), max_steps=1, batch_size=8)
    mapping = MappingStageArguments(max_steps=2, batch_size=8)
    compress(teacher_folder, SMALL, args, pairs, mapping=mapping, callbacks=[Steps])
    assert Steps.seen == [("mapped", 1), ("mapped", 2), ("out", 1)]


def test_what_a_user_types_first(shared_teacher, teacher_folder, pairs, tmp_path):
    compressor = ClipMapCompressor.from_pretrained(teacher_folder, student=SMALL)
    trainer = DistillationTrainer(
        student=compressor.export(),
        teacher=teacher_folder,
        processing_class=compressor.processor,
        args=DistillationArguments(
            output_dir=str(tmp_path),
            num_train_epochs=3,
            per_device_train_batch_size=8,
            eval_strategy="epoch",
            load_best_model_at_end=True,
        ),
        train_dataset=pairs,
        eval_dataset=pairs,
        callbacks=[EarlyStoppingCallback(3)],
    )
    trainer.train()
    assert trainer.evaluate()["eval_mean_recall"] == trainer.state.best_metric

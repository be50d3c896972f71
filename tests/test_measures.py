"""What a run measures: agreement with the teacher where nothing is paired, beside recall where pairs are."""

import copy
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, Image
from huggingface_hub import ModelCard
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor, EarlyStoppingCallback

from clipmap_hf import (
    ClipMapCompressor,
    ClipMapConfig,
    DistillationArguments,
    DistillationTrainer,
    MappingArguments,
    MappingStageArguments,
    MappingTrainer,
    MaskingStageArguments,
    TernaryArguments,
    TernaryTrainer,
    TowerConfig,
    compress,
    evaluate_retrieval,
)
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.sources import evaluation_rows
from clipmap_hf.pipeline import measures


SMALL = ClipMapConfig(
    vision=TowerConfig(hidden_size=32, num_hidden_layers=2),
    text=TowerConfig(hidden_size=16, num_hidden_layers=1),
    initializer="diagonal",
)
TEXTS = [f"{color} {shape}" for color in ("red", "green", "blue", "pink") for shape in "abcdefghij"]
NUMBERS = {"max_steps": 2, "batch_size": 8, "losses": {"feature": 2000}, "learning_rate": 1e-3, "warmup_steps": 0}
START_STAYS = "No state of the training was better on held-out data than its start"

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def distiller(teacher_folder, images, tmp_path):
    """A function that makes a trainer of a student on images and texts that are not paired."""
    student = ClipMapCompressor.from_pretrained(str(teacher_folder), student=SMALL).export()

    def make(callbacks=(), eval_dataset=None, train_dataset=images, texts=TEXTS, **values) -> DistillationTrainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        args = DistillationArguments(str(tmp_path / "out"), **NUMBERS | values)
        given = {"callbacks": callbacks, "text_dataset": texts}
        return DistillationTrainer(
            copy.deepcopy(student), str(teacher_folder), args, train_dataset, eval_dataset, **given
        )

    return make


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def evaluated_in(folder, metric: str) -> dict[int, float]:
    """A metric by the steps at which it was measured."""
    name = f"eval_{metric}"
    return {line["step"]: line[name] for line in log_of(folder) if name in line}


@torch.no_grad()
def embedded(model: CLIPModel, processor: CLIPProcessor, images: list, texts: list[str]) -> tuple[torch.Tensor, ...]:
    """What plain transformers give."""
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    output = model.eval().cpu()(**inputs)
    return output.image_embeds, output.text_embeds


def decisions(student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...]) -> float:
    chosen = [(images @ texts.T).argmax(dim=1) for images, texts in (student, teacher)]
    return (chosen[0] == chosen[1]).float().mean().item()


# Nothing is paired


def test_agreement_is_measured_on_what_is_held_out(distiller, teacher_folder, tiny_processor, images, tmp_path):
    trainer = distiller(validation_fraction=0.3, eval_steps=1)
    result = trainer.train()
    data = trainer.context.data
    rows, texts = evaluation_rows(data), data.parted_texts.evaluated
    pictures = list(rows.cast_column("image", Image())["image"])
    models = (CLIPModel.from_pretrained(tmp_path / "out"), CLIPModel.from_pretrained(teacher_folder))
    student, teacher = (embedded(model, tiny_processor, pictures, texts) for model in models)
    assert 2 <= len(texts) < len(TEXTS) and result.metrics["decisions"] == pytest.approx(decisions(student, teacher))
    cosine = F.cosine_similarity(student[1], teacher[1]).mean().item()
    assert result.metrics["text_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert trainer.state.best_metric == result.metrics["mean_agreement"]
    assert result.teacher_metrics.keys() == result.metrics.keys() and result.teacher_metrics["decisions"] == 1
    assert list(evaluated_in(tmp_path / "out", "mean_agreement")) == [0, 1, 2]
    assert (tmp_path / "out" / "best" / "model.safetensors").exists()


def test_a_folder_of_other_images_is_measured_with_all_texts(distiller, images):
    trainer = distiller(eval_dataset=images)
    found = trainer.train().metrics
    assert trainer._evaluate.texts == trainer.context.data.parted_texts.evaluated
    assert sorted(trainer._evaluate.texts) == sorted(TEXTS)
    again = trainer.evaluate(images)
    assert again == {f"eval_{name}": pytest.approx(value) for name, value in found.items()}


def test_the_teacher_is_asked_once(distiller, images, monkeypatch):
    trainer = distiller(eval_dataset=images)
    teacher, asked = trainer.teachers[0].model, []
    encode = type(teacher).get_text_features
    monkeypatch.setattr(
        type(teacher), "get_text_features", lambda model, **ids: (asked.append(model), encode(model, **ids))[1]
    )
    found = [trainer.evaluate() for _ in range(3)]
    assert [model is teacher for model in asked] == [True, False, False, False] and found[0] == found[2]


def test_a_metric_that_is_named_decides(distiller, images):
    trainer = distiller(eval_dataset=images, eval_steps=1, metric_for_best_model="image_cosine")
    metrics = trainer.train().metrics
    assert trainer.state.best_metric == metrics["image_cosine"]
    with pytest.raises(ValueError, match="metric_for_best_model='mean_recall' was not measured; there are"):
        distiller(eval_dataset=images, metric_for_best_model="mean_recall", resume="never").train()


def test_a_run_stops_early_by_agreement(distiller, images):
    trainer = distiller(
        [EarlyStoppingCallback(2)], eval_dataset=images, eval_steps=1, learning_rate=10.0, max_steps=20
    )
    assert trainer.train().steps < 20


@pytest.mark.parametrize("texts", [["a dog"], TEXTS])
def test_too_little_to_compare_is_refused_before_training(distiller, images, tiny_pairs, texts):
    few = [(row["image"], "") for row in list(tiny_pairs)[:1]]
    few = Dataset.from_dict({"image": [image for image, _ in few]})
    with pytest.raises(ValueError, match="Agreement with the teacher needs at least two images and two texts"):
        distiller(eval_dataset=images if len(texts) == 1 else few, texts=texts).train()


def test_a_mapping_stage_is_measured_by_agreement(teacher_folder, images, tmp_path):
    compressor = ClipMapCompressor.from_pretrained(str(teacher_folder), student=SMALL)
    args = MappingArguments(str(tmp_path / "out"), **NUMBERS, validation_fraction=0.3)
    result = MappingTrainer(compressor, args, images, text_dataset=TEXTS).train()
    assert 0 <= result.metrics["mean_agreement"] <= 1


def test_a_ternary_model_is_measured_by_agreement(teacher_folder, images, tmp_path):
    student = CLIPModel.from_pretrained(teacher_folder)
    args = TernaryArguments(str(tmp_path / "out"), **NUMBERS, validation_fraction=0.3, eval_steps=1)
    trainer = TernaryTrainer(student, str(teacher_folder), args, images, text_dataset=TEXTS)
    assert trainer.train().metrics["mean_agreement"] == trainer.state.best_metric


@pytest.mark.parametrize("stage", ["masking", "mapping"])
def test_all_stages_of_a_compression_are_measured(stage, teacher_folder, images, tmp_path):
    numbers = NUMBERS | {"losses": {"affinity": 1.0}}
    stages = {"masking": MaskingStageArguments, "mapping": MappingStageArguments}
    student = SMALL if stage == "mapping" else ClipMapConfig(vision=SMALL.vision, text=SMALL.text)
    args = DistillationArguments(str(tmp_path / "out"), **NUMBERS, validation_fraction=0.3)
    given = {"text_dataset": TEXTS, stage: stages[stage](**numbers)}
    compress(str(teacher_folder), student, args, images, **given)
    for folder in ("masked" if stage == "masking" else "mapped", "."):
        assert list(evaluated_in(tmp_path / "out" / folder, "mean_agreement")) == [0, 2]


# Pairs


def test_agreement_stands_beside_recall(distiller, pairs_parquet, teacher_folder, tiny_processor, tmp_path):
    trainer = distiller(eval_dataset=str(pairs_parquet), train_dataset=str(pairs_parquet), texts=())
    result = trainer.train()
    student = CLIPModel.from_pretrained(tmp_path / "out")
    recall = evaluate_retrieval(student, str(pairs_parquet), processor=tiny_processor)
    assert {name: result.metrics[name] for name in recall} == pytest.approx(recall)
    assert result.teacher_metrics.keys() == result.metrics.keys() and result.teacher_metrics["decisions"] == 1
    rows = list(Dataset.from_parquet(str(pairs_parquet)))
    captions = list(dict.fromkeys(row["caption"] for row in rows))
    models = (student, CLIPModel.from_pretrained(teacher_folder))
    both = [embedded(model, tiny_processor, [row["image"] for row in rows], captions) for model in models]
    assert result.metrics["decisions"] == pytest.approx(decisions(*both))


def test_captions_and_images_that_repeat_are_compared_once(distiller, tiny_pairs, tiny_processor):
    rows = [{"image": row["image"], "caption": row["caption"]} for row in tiny_pairs]
    once, twice = Dataset.from_list(rows), Dataset.from_list([*rows, *rows])
    found = [distiller().evaluate(pairs) for pairs in (once, twice)]
    for name in ("decisions", "image_neighbors", "text_neighbors", "image_cosine"):
        assert found[0][f"eval_{name}"] == pytest.approx(found[1][f"eval_{name}"], abs=1e-6), name


def test_agreement_beside_recall_is_that_of_some(distiller, pairs_parquet, monkeypatch):
    monkeypatch.setattr(measures, "_MOST", 5)
    sizes = []
    monkeypatch.setattr(measures, "agreement", lambda *both: sizes.extend(len(x) for one in both for x in one) or {})
    distiller().evaluate(str(pairs_parquet))
    assert sizes == [5] * 4


def test_one_pair_has_recall_alone(distiller, tiny_pairs):
    row = tiny_pairs[0]
    found = distiller().evaluate(Dataset.from_list([{"image": row["image"], "caption": row["caption"]}]))
    assert found["eval_mean_recall"] == 1 and "eval_decisions" not in found


# The start


def weights_of(folder) -> dict[str, torch.Tensor]:
    return CLIPModel.from_pretrained(folder).state_dict()


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(tensor.cpu(), other[name].cpu(), rtol=0, atol=0)


@pytest.mark.parametrize("every", [None, 1])
def test_a_ruined_student_is_not_written(distiller, tmp_path, caplog, every):
    def trainer() -> DistillationTrainer:
        values = {"validation_fraction": 0.3, "learning_rate": 10.0, "max_steps": 4, "save_steps": 2}
        return distiller(**values, eval_steps=every, metric_for_best_model="text_neighbors")

    first = trainer()
    start = copy.deepcopy(first.student.state_dict())
    result = first.train()
    assert_equal(start, weights_of(tmp_path / "out"))
    evaluated = evaluated_in(tmp_path / "out", "text_neighbors")
    assert result.metrics["text_neighbors"] == evaluated[0] == max(evaluated.values()) and len(evaluated) > 1
    assert START_STAYS in caplog.text and START_STAYS in (tmp_path / "out" / "README.md").read_text()
    again = trainer()
    assert again.train().metrics == result.metrics
    assert_equal(start, weights_of(tmp_path / "out"))
    assert START_STAYS in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "best").exists() == bool(every)


def test_an_interrupted_run_still_knows_its_start(distiller, tmp_path, monkeypatch):
    values = {"validation_fraction": 0.3, "learning_rate": 10.0, "max_steps": 6, "save_steps": 2}
    values["metric_for_best_model"] = "text_neighbors"  # ruin shows in it on any machine
    start = copy.deepcopy(distiller(**values).student.state_dict())
    step, calls = torch.optim.AdamW.step, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", failing)
        with pytest.raises(KeyboardInterrupt):
            distiller(**values).train()
    assert distiller(**values).train().steps == 6
    assert_equal(start, weights_of(tmp_path / "out"))


def test_a_student_that_is_better_than_its_start_is_written(distiller, tmp_path):
    trainer = distiller(validation_fraction=0.3, metric_for_best_model="image_cosine", max_steps=6, eval_steps=2)
    start = copy.deepcopy(trainer.student.state_dict())
    result = trainer.train()
    evaluated = list(evaluated_in(tmp_path / "out", "image_cosine").values())
    assert len(evaluated) == 4 and result.metrics["image_cosine"] == max(evaluated) > evaluated[0]
    written = weights_of(tmp_path / "out")
    assert not all(torch.equal(start[name], tensor) for name, tensor in written.items())
    assert START_STAYS not in (tmp_path / "out" / "README.md").read_text()


def test_the_start_is_a_candidate_by_recall_where_the_best_is_asked_for(distiller, pairs_parquet, tmp_path):
    pairs = str(pairs_parquet)
    values = {"eval_dataset": pairs, "train_dataset": pairs, "texts": (), "learning_rate": 10.0, "eval_steps": 1}
    trainer = distiller(**values, load_best_model_at_end=True)
    start = copy.deepcopy(trainer.student.state_dict())
    trainer.train()
    evaluated = evaluated_in(tmp_path / "out", "mean_recall")
    assert sorted(evaluated) == [0, 1, 2] and trainer.state.best_metric == max(evaluated.values())
    if evaluated[0] == max(evaluated.values()):
        assert_equal(start, weights_of(tmp_path / "out"))
    distiller(**values, resume="never").train()
    assert list(evaluated_in(tmp_path / "out", "mean_recall")) == [1, 2]
    assert not torch.equal(weights_of(tmp_path / "out")["text_projection.weight"], start["text_projection.weight"])


def test_a_ruined_map_is_not_written(teacher_folder, images, tmp_path):
    compressor = ClipMapCompressor.from_pretrained(str(teacher_folder), student=SMALL)
    start = copy.deepcopy(compressor.export().state_dict())
    values = NUMBERS | {"learning_rate": 10.0, "validation_fraction": 0.3, "metric_for_best_model": "text_neighbors"}
    args = MappingArguments(str(tmp_path / "out"), **values)
    MappingTrainer(compressor, args, images, text_dataset=TEXTS).train()
    assert_equal(start, weights_of(tmp_path / "out"))
    assert_equal(ClipMapCompressor.from_pretrained(str(tmp_path / "out")).export().state_dict(), start)
    assert START_STAYS in (tmp_path / "out" / "README.md").read_text()


def test_a_start_that_was_never_measured_cannot_be_returned_to_which_is_logged(distiller, images, caplog):
    distiller(max_steps=1).train()
    values = {"eval_dataset": images, "learning_rate": 1e-3}
    assert distiller(max_steps=2, **values).train().metrics and "The start was not evaluated when" in caplog.text
    caplog.clear()
    distiller(max_steps=3, **values).train()
    assert "The start was not evaluated when" not in caplog.text


def test_a_run_that_measures_nothing_does_as_before(distiller, tmp_path):
    result = distiller(learning_rate=10.0).train()
    assert result.metrics == {} and all("eval" not in name for line in log_of(tmp_path / "out") for name in line)
    assert START_STAYS not in (tmp_path / "out" / "README.md").read_text()


def test_a_run_without_steps_has_no_start_to_fall_back_on(distiller, tmp_path, caplog):
    distiller(validation_fraction=0.3, max_steps=0).train()
    assert [line["step"] for line in log_of(tmp_path / "out")] == [0]
    assert START_STAYS not in caplog.text + (tmp_path / "out" / "README.md").read_text()


# Cards


def test_a_card_says_what_the_student_agrees_on(distiller, tmp_path):
    result = distiller(validation_fraction=0.3).train()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    row = "images and texts (0.3 of each, held out): same decision as the teacher among the texts"
    assert f"| {row}" in card.text and "| teacher" not in card.text.split("## Results")[1].split("## ")[0]
    found = {one.metric_type: one for one in card.data.eval_results}
    assert found.keys() == result.metrics.keys()
    assert found["decisions"].metric_value == pytest.approx(result.metrics["decisions"], abs=1e-4)
    assert found["decisions"].metric_name == "same decision as the teacher among the texts"
    assert found["decisions"].task_type == "image-feature-extraction"


def test_a_card_with_recall_shows_recall_alone(distiller, pairs_parquet, tmp_path):
    result = distiller(eval_dataset=str(pairs_parquet), train_dataset=str(pairs_parquet), texts=()).train()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "mean_agreement" in result.metrics and "agreement" not in card.text.split("## Recipe")[0]
    shown = {one.metric_type for one in card.data.eval_results}
    assert shown == {name for name in result.metrics if "recall" in name} and len(shown) == 7


def test_too_few_texts_are_held_out_by_none_which_is_logged_and_in_the_card(distiller, tmp_path, caplog):
    distiller(validation_fraction=0.3, texts=["a dog", "a cat"]).train()
    assert "No texts are held out" in caplog.text
    assert "images (0.3 of it, held out) and the texts of training" in (tmp_path / "out" / "README.md").read_text()


def test_data_arguments_tell_what_is_measured():
    data = DataArguments("pairs", validation_fraction=0.1)
    assert data.parted_texts is None and data.texts is None

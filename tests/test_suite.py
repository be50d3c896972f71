"""Several sets in one go: what is written, what is not computed again, and what is refused."""

import json
import random

import pytest
import torch
from set_folders import COLORS, ColorModel, rows_for, write_parquet_set, write_set

from clipmap_hf.data.images import BadRowError
from clipmap_hf.evaluation.sets import EvalSet
from clipmap_hf.evaluation.suite import evaluate_sets, summary_table
from clipmap_hf.models.loading import load_processor


SETS = {
    "classes": EvalSet("someone/classes", "CC0"),
    "labels": EvalSet("someone/labels", metrics=("map_11_point",), task="multilabel"),
    "captions": EvalSet(
        "someone/captions", metrics=("image_to_text_recall@1", "text_to_image_recall@1"), task="retrieval"
    ),
}


@pytest.fixture
def sets_dir(tmp_path):
    for eval_set in SETS.values():
        write_set(tmp_path / "sets" / eval_set.folder, rows_for(eval_set.task), eval_set.task)
    return tmp_path / "sets"


@pytest.fixture
def model(tiny_processor, tiny_config):
    return ColorModel(tiny_processor, tiny_config())


@pytest.fixture
def evaluate(model, tiny_processor, sets_dir, tmp_path):
    """A function that evaluates the model on `SETS`, or some of them, into `results`."""

    def run(*names: str, **options) -> dict:
        sets = {name: SETS[name] for name in names or SETS}
        known = {"model_id": "colors", "sets_dir": sets_dir, "batch_size": 5}
        return evaluate_sets(model, tiny_processor, sets, tmp_path / "results", **known | options)

    return run


def test_a_perfect_model_is_perfect_by_every_metric(evaluate):
    for result in evaluate().values():
        expected = {name: 1.0 for name in result["metrics"] if name != "mean_recall"}
        assert {name: result["metrics"][name] for name in expected} == expected


def test_of_two_classes_of_one_name_the_first_is_taken(evaluate, sets_dir):
    """As argmax does; two pairs of ImageNet's classes have one name."""
    path = next((sets_dir / SETS["classes"].folder).rglob("classnames.txt"))
    names = path.read_text().splitlines()
    path.write_text("\n".join([names[0], names[0], *names[2:]]) + "\n")
    metrics = evaluate("classes")["classes"]["metrics"]
    labels = [row["cls"] for row in rows_for(SETS["classes"].task)]
    torch.testing.assert_close(metrics["accuracy@1"], 1 - labels.count(b"1") / len(labels))


def test_a_model_with_shuffled_labels_scores_by_chance(model, tiny_processor, tmp_path):
    sets = {"classes": SETS["classes"], "labels": SETS["labels"]}
    for name, column in (("classes", "cls"), ("labels", "npy")):
        rows = rows_for(SETS[name].task, 600)
        labels = [row[column] for row in rows]
        random.Random(0).shuffle(labels)
        rows = [row | {column: label} for row, label in zip(rows, labels, strict=True)]
        write_set(tmp_path / name, rows, SETS[name].task)
    results = evaluate_sets(
        model, tiny_processor, sets, tmp_path / "results", model_id="colors", sets_dir=tmp_path, num_workers=1
    )
    assert results["classes"]["metrics"]["accuracy@1"] == pytest.approx(1 / 6, abs=0.05)
    assert results["classes"]["metrics"]["mean_per_class_recall"] == pytest.approx(1 / 6, abs=0.05)
    # A third or less of the images shows a class; 11 points count the best precision, not the mean.
    assert 0.25 < results["labels"]["metrics"]["map_11_point"] < 0.45


def test_parquet_has_the_scores_of_tars(evaluate, tmp_path):
    for eval_set in SETS.values():
        write_parquet_set(tmp_path / "parquet" / eval_set.folder, rows_for(eval_set.task), eval_set.task)
    tars = evaluate()
    (tmp_path / "results").rename(tmp_path / "of tars")
    parquet = evaluate(sets_dir=tmp_path / "parquet")
    assert {name: one["metrics"] for name, one in tars.items()} == {
        name: one["metrics"] for name, one in parquet.items()
    }


def test_a_result_says_what_it_was_made_of(evaluate, tmp_path):
    returned = evaluate(revision="v1")
    result = json.loads((tmp_path / "results" / "classes.json").read_text())
    assert result == returned["classes"]
    assert result["model"] == {"id": "colors", "revision": "v1", "commit": None}
    assert result["settings"]["image_backend"] == "pil" and len(result["settings"]["weights"]) == 64
    assert {"python", "clipmap_hf", "torch", "transformers", "PIL"} <= result["versions"].keys()
    assert (result["images"], result["classes"], result["processes"], result["seed"]) == (24, 6, 1, None)
    assert result["license"] == "CC0" and result["commit"] is None
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert summary == {name: one["metrics"] for name, one in returned.items()}


def test_the_table_has_what_the_literature_reports(evaluate, tmp_path):
    results = evaluate()
    lines = summary_table(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    recalls = "image_to_text_recall@1 / text_to_image_recall@1"
    assert cells == [
        ["classes", "24", "6", "accuracy@1", "100.0"],
        ["labels", "24", "6", "map_11_point", "100.0"],
        ["captions", "6", "", recalls, "100.0 / 100.0"],
    ]
    assert (tmp_path / "results" / "summary.md").read_text() == "\n".join(lines) + "\n"


# What is there already


def test_a_finished_set_is_not_computed_again(evaluate, model, tmp_path, monkeypatch):
    first = evaluate("classes", "captions")
    written = (tmp_path / "results" / "classes.json").stat().st_mtime_ns
    monkeypatch.setattr(model, "get_image_features", None)  # none may ask it
    assert evaluate("classes", "captions") == first
    assert (tmp_path / "results" / "classes.json").stat().st_mtime_ns == written
    monkeypatch.undo()
    assert evaluate().keys() == SETS.keys()


def test_a_set_that_could_not_be_read_is_done_when_it_is_mended(evaluate, sets_dir, tmp_path):
    rows = rows_for("multilabel")
    rows[7] |= {"webp": b"no image"}
    write_set(sets_dir / "labels", rows, "multilabel")
    with pytest.raises(BadRowError, match="undecodable image"):
        evaluate()
    assert {path.name for path in (tmp_path / "results").glob("*.json")} == {"classes.json"}
    write_set(sets_dir / "labels", rows_for("multilabel"), "multilabel")
    assert evaluate()["labels"]["metrics"] == {"map_11_point": 1.0}


def test_captions_of_an_image_that_cannot_be_decoded_are_an_error(evaluate, sets_dir):
    rows = rows_for("retrieval")
    rows[2] |= {"webp": b"no image"}
    write_set(sets_dir / "captions", rows, "retrieval")
    with pytest.raises(ValueError, match="1 evaluation pairs cannot be read"):
        evaluate("captions")


def test_a_result_of_other_weights_is_refused(evaluate, model):
    evaluate("classes")
    model.palette.data += 0.01
    with pytest.raises(ValueError, match=r"classes.json' holds a result of other settings: weights was .*, is "):
        evaluate("classes")


def test_a_result_of_another_backend_is_refused(evaluate, model):
    model.add_module("packed", torch.nn.Identity())
    model.packed.backend = "int8"
    evaluate("classes")
    model.packed.backend = "float"
    with pytest.raises(ValueError, match=r"other settings: backends was ..int8.., is ..float.."):
        evaluate("classes")


def test_a_result_of_another_config_is_refused(evaluate, model):
    evaluate("classes")
    model.config.vision_config.hidden_act = "gelu"
    with pytest.raises(ValueError, match=r'config.vision_config.hidden_act was "quick_gelu", is "gelu". Name another'):
        evaluate("classes")


def test_a_result_of_other_preprocessing_is_refused(evaluate, model, teacher_folder, sets_dir, tmp_path):
    evaluate("classes")
    processor = load_processor(str(teacher_folder))
    processor.image_processor.resample = 0
    options = {"model_id": "colors", "sets_dir": sets_dir}
    with pytest.raises(ValueError, match="other settings: image_processor.resample was 3, is 0"):
        evaluate_sets(model, processor, {"classes": SETS["classes"]}, tmp_path / "results", **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 12}, "files.0.tar was"),
        ({"names": "red\ngreen\nblue\nblack\norange\npink\n"}, "names was"),
        ({"templates": "an {c}\n"}, "templates was"),
    ],
)
def test_a_result_of_other_data_is_refused(evaluate, sets_dir, change, message):
    evaluate("classes")
    if "rows" in change:
        write_set(sets_dir / "classes", rows_for("classification", change["rows"]), "classification")
    if "names" in change:
        (sets_dir / "classes" / "classnames.txt").write_text(change["names"])
    if "templates" in change:
        (sets_dir / "classes" / "zeroshot_classification_templates.txt").write_text(change["templates"])
    with pytest.raises(ValueError, match=f"other settings: {message}"):
        evaluate("classes")


def test_prompts_are_encoded_once_for_a_model_and_its_classes(evaluate, model, tmp_path):
    evaluate("classes")
    assert model.texts == 2 * len(COLORS)
    assert len(list((tmp_path / "results" / "classifiers").iterdir())) == 1
    evaluate("labels")  # the same names and templates
    (tmp_path / "results" / "classes.json").unlink()
    evaluate("classes")
    assert model.texts == 2 * len(COLORS)
    (tmp_path / "results" / "classes.json").unlink()
    model.palette.data += 0.01
    evaluate("classes")
    assert model.texts == 4 * len(COLORS)


def test_a_label_beyond_the_names_is_an_error(evaluate, sets_dir):
    (sets_dir / "classes" / "classnames.txt").write_text("red\ngreen\nblue\n")
    with pytest.raises(ValueError, match=r"Labels \[3, 4, 5\] are outside 0 … 2"):
        evaluate("classes")


def test_a_real_model_is_scored_alike_in_batches_of_any_size(tiny_teacher, tiny_processor, sets_dir, tmp_path):
    options = {"model_id": "tiny", "sets_dir": sets_dir}
    scores = [
        evaluate_sets(tiny_teacher, tiny_processor, SETS, tmp_path / str(size), batch_size=size, **options)
        for size in (4, 100)
    ]
    for name in SETS:
        one, two = (torch.tensor(list(score[name]["metrics"].values())) for score in scores)
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)

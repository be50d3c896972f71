"""Sets as they lie on disk: what is read of them, and what is refused."""

import io

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
from set_folders import COLORS, npy, picture, rows_for, write_parquet_set, write_set, write_tar

from clipmap_hf.data.collate import decoded
from clipmap_hf.data.images import BadRowError
from clipmap_hf.evaluation.set_files import SetRows, find_set
from clipmap_hf.evaluation.sets import EvalSet


TASKS = ("classification", "multilabel", "retrieval")
ONE = EvalSet("someone/one")


def rows_of(eval_set: EvalSet, sets_dir) -> list[dict]:
    rows = SetRows(eval_set, find_set(eval_set, sets_dir))
    return [rows[index] for index in range(len(rows))]


@pytest.mark.parametrize("task", TASKS)
def test_tars_and_parquet_of_a_set_have_the_same_rows(task, tmp_path):
    rows = rows_for(task, 13)
    write_set(tmp_path / "tars" / "one", rows, task, shards=3)
    write_parquet_set(tmp_path / "parquet" / "one", rows, task)
    eval_set = EvalSet("someone/one", task=task)
    tars, parquet = (rows_of(eval_set, tmp_path / form) for form in ("tars", "parquet"))
    assert tars == parquet and len(tars) == len(rows)
    assert [row["image"]["bytes"] for row in tars] == [row["webp"] for row in rows]
    labels = {"classification": 2, "multilabel": [0, 0, 1, 0, 0, 0], "retrieval": ["a blue", "blue it is", "all blue"]}
    assert tars[2]["label"] == labels[task]


def test_names_and_templates_are_those_of_the_set(tmp_path):
    write_set(tmp_path / "one", rows_for("classification"), "classification")
    files = find_set(ONE, tmp_path)
    assert files.names == COLORS and files.templates == ("a {}.", "the {}") and files.commit is None


def test_the_kinds_of_images_may_differ_from_row_to_row_and_other_files_are_left_alone(tmp_path):
    kinds = ("jpg", "png", "webp", "jpeg")
    rows = [{kind: picture([0], kind), "cls": b"0", "json": b"{}"} for kind in kinds]
    write_set(tmp_path / "one", rows, "classification", shards=1)
    assert [decoded(row)[1].size for row in rows_of(ONE, tmp_path)] == [(32, 32)] * 4


def test_a_set_of_the_hub_is_read_from_its_cache_and_tells_its_commit(tmp_path, monkeypatch):
    commit = "0123456789" * 4
    repository = tmp_path / "datasets--someone--one"
    write_set(repository / "snapshots" / commit, rows_for("classification"), "classification")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    files = find_set(ONE)
    assert files.commit == commit and len(SetRows(ONE, files)) == 24


def test_another_split_is_another_folder(tmp_path):
    write_set(tmp_path / "one", rows_for("classification", 7), "classification", split="val")
    assert len(rows_of(EvalSet("someone/one", split="val"), tmp_path)) == 7
    with pytest.raises(ValueError, match=r"one/test' must hold nshards.txt"):
        find_set(ONE, tmp_path)


# What is refused


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "one", rows_for("classification"), "classification")


def test_a_missing_shard_is_an_error(folder, tmp_path):
    (folder / "test" / "1.tar").unlink()
    with pytest.raises(ValueError, match=r"Missing are \['1.tar'\]; download the whole set"):
        find_set(ONE, tmp_path)


def test_a_folder_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"one/test' must hold .* Missing are all"):
        find_set(ONE, tmp_path)


@pytest.mark.parametrize("name", ["classnames.txt", "zeroshot_classification_templates.txt"])
def test_a_missing_list_is_an_error(folder, tmp_path, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"no file '.*{name}'"):
        find_set(ONE, tmp_path)


def test_a_blank_class_name_is_an_error_for_it_would_shift_the_labels(folder, tmp_path):
    (folder / "classnames.txt").write_text("red\ngreen\n\nblue\n")
    with pytest.raises(ValueError, match="blank line, number 3"):
        find_set(ONE, tmp_path)


def test_a_set_of_another_kind_is_an_error(folder, tmp_path):
    (folder / "dataset_type.txt").write_text("retrieval\n")
    with pytest.raises(ValueError, match="holds a set for 'retrieval' .* not for 'classification'"):
        find_set(ONE, tmp_path)


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.9, "to the last row", "without the end"])
def test_a_tar_that_is_cut_anywhere_is_an_error(folder, tmp_path, kept):
    path = folder / "test" / "1.tar"
    content = path.read_bytes()
    used = len(content.rstrip(b"\0"))
    length = {"to the last row": used - 1, "without the end": -(-used // 512) * 512}.get(kept)
    path.write_bytes(content[: int(kept * used) if length is None else length])
    with pytest.raises(ValueError, match=r"1.tar' cannot be read to its end"):
        SetRows(ONE, find_set(ONE, tmp_path))


@pytest.mark.parametrize(
    "row",
    [
        {"webp": picture([0])},
        {"cls": b"0"},
        {"webp": picture([0]), "npy": npy([1])},
        {"webp": picture([0]), "png": picture([0], "png"), "cls": b"0"},
        {"webp": picture([0]), "cls": b"0", "CLS": b"1"},
    ],
    ids=lambda row: "+".join(row),
)
def test_a_row_without_one_image_and_one_label_is_an_error_that_names_it(folder, tmp_path, row):
    write_tar(folder / "test" / "1.tar", [*rows_for("classification", 2), row], start=12)
    with pytest.raises(BadRowError, match=r"not one image and one label: .*1.tar::s0000014 has"):
        SetRows(ONE, find_set(ONE, tmp_path))


@pytest.mark.parametrize(
    ("task", "label", "message"),
    [
        ("classification", b"cat", "invalid literal"),
        ("classification", b"", "invalid literal"),
        ("multilabel", npy([0.5, 1]), "0 or 1 for every class"),
        ("multilabel", npy([[0, 1]]), "0 or 1 for every class"),
        ("multilabel", b"no array", "allow_pickle="),
        ("retrieval", b" \n\n", "no caption"),
        ("retrieval", b"\xff\xfe\xff", "decode"),
    ],
)
def test_a_label_that_makes_no_sense_is_an_error(tmp_path, task, label, message):
    eval_set = EvalSet("someone/one", task=task)
    write_set(tmp_path / "one", [{"webp": picture([0]), eval_set.label_column: label}], task, shards=1)
    with pytest.raises(BadRowError, match=f"no label: row 0: .*{message}"):
        rows_of(eval_set, tmp_path)


def test_a_null_in_parquet_is_an_error(tmp_path):
    write_parquet_set(tmp_path / "whole" / "one", rows_for("classification"), "classification")
    path = tmp_path / "whole" / "one" / "test" / "0000.parquet"
    table = datasets.load_dataset("parquet", data_files=str(path), split="train").cast_column(
        "webp", datasets.Image(decode=False)
    )
    rows = [row | {"cls": None} if index == 3 else row for index, row in enumerate(table)]
    datasets.Dataset.from_list(rows, features=table.features).to_parquet(path)
    with pytest.raises(BadRowError, match="no label: row 3"):
        rows_of(ONE, tmp_path / "whole")


def test_parquet_with_other_columns_is_an_error(tmp_path):
    rows = [{"webp": row["webp"], "txt": row["cls"]} for row in rows_for("classification")]
    write_parquet_set(tmp_path / "one", rows, "classification")
    with pytest.raises(ValueError, match=r"has the columns \['webp', 'txt'\]; it needs 'cls' and one of"):
        rows_of(ONE, tmp_path)


def test_nothing_is_unpickled(tmp_path):
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    eval_set = EvalSet("someone/one", task="multilabel")
    write_set(tmp_path / "one", [{"webp": picture([0]), "npy": file.getvalue()}], "multilabel", shards=1)
    with pytest.raises(BadRowError, match="allow_pickle=False"):
        rows_of(eval_set, tmp_path)

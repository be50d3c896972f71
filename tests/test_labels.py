"""Students for a fixed list of texts: the list, the stage, the folder that is written, and what reads it."""

import pytest

from clipmap_hf.data.labels import load_labels
from clipmap_hf.data.texts import load_texts
from clipmap_hf.evaluation.zero_shot import DEFAULT_TEMPLATES


@pytest.fixture
def names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("red circle\n\n  blue bar \nred circle\n")
    return path


# The list


def test_lines_are_queries_as_they_are_each_once(names):
    labels = load_labels(str(names))
    assert labels.names == ["red circle", "blue bar"] and labels.templates == ("{}",)
    assert labels.texts.distinct == labels.names


def test_class_names_stand_in_clips_prompts(names):
    labels = load_labels(f"labels:{names}")
    assert labels.names == ["red circle", "blue bar"] and labels.templates == DEFAULT_TEMPLATES
    assert labels.texts.digest == load_texts([f"labels:{names}"]).digest


def test_a_column_or_a_list_gives_its_different_texts(pairs_parquet, tiny_pairs):
    assert load_labels(f"{pairs_parquet}:caption").names == [row["caption"] for row in tiny_pairs]
    assert load_labels(["a dog", "a cat", "a dog"]).names == ["a dog", "a cat"]


@pytest.mark.parametrize("given", ["words", "captions", "labels:names.json", "a dog"])
def test_what_names_no_list_is_refused_with_what_does(given):
    with pytest.raises(ValueError, match=f"labels='{given}' names no list of texts. Give a text file"):
        load_labels(given)


def test_one_label_is_too_few(tmp_path):
    (tmp_path / "one.txt").write_text("a dog\na dog\n")
    for given in (str(tmp_path / "one.txt"), ["a dog"]):
        with pytest.raises(ValueError, match=r"The labels are \['a dog'\]; .* at least two different"):
            load_labels(given)
    with pytest.raises(ValueError, match=r"The labels are \[\]"):
        load_labels([])

"""Labeled images as batches for zero-shot classification."""

import io

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value

from clipmap_hf.data.images import BadRowError
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.evaluation.labeled import class_names, labeled_batches


@pytest.fixture
def labeled(tiny_pairs):
    """A function that makes a data set of 10 undecoded images with the given labels."""

    def make(labels: list, feature=None) -> Dataset:
        files = []
        for row in tiny_pairs[: len(labels)]:
            buffer = io.BytesIO()
            row["image"].save(buffer, "PNG")
            files.append({"bytes": buffer.getvalue(), "path": None})
        features = Features({"image": Image(decode=False), "label": feature or Value("string")})
        return Dataset.from_dict({"image": files, "label": labels}, features=features)

    return make


def test_strings_are_classes_in_sorted_order(labeled):
    assert class_names(labeled(["pie", "bar", "pie", "circle"]), "label") == ["bar", "circle", "pie"]


def test_class_labels_have_their_own_names_and_order(labeled):
    dataset = labeled([1, 0, 1], ClassLabel(names=["pie", "bar", "unused"]))
    assert class_names(dataset, "label") == ["pie", "bar", "unused"]


def test_numbers_without_names_are_an_error(labeled):
    with pytest.raises(ValueError, match="Column 'label' holds int64. Class numbers say nothing to a text tower"):
        class_names(labeled([1, 0], Value("int64")), "label")


@pytest.mark.parametrize("strings", [True, False])
def test_batches_have_pixels_and_labels_in_order(labeled, tiny_pairs, tiny_processor, strings):
    names, numbers = ["pie", "bar", "circle"], [2, 0, 1, 1, 0]
    labels = [names[number] for number in numbers]
    dataset = labeled(labels) if strings else labeled(numbers, ClassLabel(names=names))
    batches = list(labeled_batches(dataset, tiny_processor.image_processor, "label", names, batch_size=2))
    assert [batch["labels"].tolist() for batch in batches] == [[2, 0], [1, 1], [0]]
    expected = tiny_processor.image_processor([row["image"] for row in tiny_pairs[:5]], return_tensors="pt")
    torch.testing.assert_close(torch.cat([batch["pixel_values"] for batch in batches]), expected["pixel_values"])


def test_an_image_that_cannot_be_decoded_is_an_error(labeled, tiny_processor):
    rows = labeled(["a", "b", "a"]).to_list()
    rows[1]["image"] = {"bytes": b"no image", "path": None}
    dataset = Dataset.from_list(rows, features=labeled(["a"]).features)
    with pytest.raises(BadRowError, match="undecodable image"):
        list(labeled_batches(dataset, tiny_processor.image_processor, "label", ["a", "b"]))


def test_an_image_without_a_label_is_an_error_that_names_its_row(labeled, tiny_processor):
    dataset = labeled(["a", "b", "a", None])
    assert class_names(dataset, "label") == ["a", "b"]
    with pytest.raises(BadRowError, match="no label: row 3"):
        list(labeled_batches(dataset, tiny_processor.image_processor, "label", ["a", "b"], batch_size=2))


def test_pairs_as_they_are_loaded_can_be_classified(pairs_parquet, tiny_processor):
    dataset = load_pairs(str(pairs_parquet))
    names = class_names(dataset, "caption")
    (batch,) = labeled_batches(dataset, tiny_processor.image_processor, "caption", names)
    assert len(names) == 24 and sorted(batch["labels"].tolist()) == list(range(24))


@pytest.mark.parametrize(
    ("labels", "feature"),
    [(["3", "0 "], Value("string")), (["0.0", "1.0"], Value("string")), (["-1", "0"], Value("large_string"))],
    ids=["cls", "floats", "negative"],
)
def test_class_numbers_are_no_class_names(labeled, labels, feature):
    with pytest.raises(
        ValueError, match=r"holds class numbers such as '(0|0\.0|-1)'\. .* Name the classes .* `classnames`"
    ):
        class_names(labeled(labels, feature), "label")


@pytest.mark.parametrize(
    ("labels", "kind"),
    [([1, 0], "int64"), ([1.0, 0.0], "float64"), (["1", "0\n"], "string"), (["pie\n", "bar"], "string")],
    ids=str,
)
def test_named_classes_may_be_numbered_in_any_form(labeled, labels, kind, tiny_processor):
    (batch,) = labeled_batches(labeled(labels, Value(kind)), tiny_processor.image_processor, "label", ["bar", "pie"])
    assert batch["labels"].tolist() == [1, 0]


def test_digits_that_a_class_label_names_are_class_names(labeled):
    assert class_names(labeled([0, 1], ClassLabel(names=["0", "1"])), "label") == ["0", "1"]


def test_a_blank_label_is_none(labeled, tiny_processor):
    rows = labeled(["cat", " "])
    assert class_names(rows, "label") == ["cat"]
    with pytest.raises(BadRowError, match="no label: row 1"):
        list(labeled_batches(rows, tiny_processor.image_processor, "label", ["cat"]))


@pytest.mark.parametrize("label", [2, -1, "2", "cake"])
def test_a_label_that_no_class_has_is_an_error(labeled, label, tiny_processor):
    rows = labeled([label], Value("string" if isinstance(label, str) else "int64"))
    with pytest.raises(ValueError, match=f"label {label!r} is neither among the 2 class names, .* from 0 to 1"):
        list(labeled_batches(rows, tiny_processor.image_processor, "label", ["bar", "pie"]))

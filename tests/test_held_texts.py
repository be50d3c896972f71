"""Texts of which a share is held out: trained on by none, and measured by all."""

import pytest
from datasets import Dataset, Image

from clipmap_hf.data import held_texts
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.columns import MissingColumnError
from clipmap_hf.data.held_texts import parted_texts
from clipmap_hf.data.sources import evaluation_batches, evaluation_rows, training_pairs
from clipmap_hf.data.texts import Texts


MANY = [f"text {index}" for index in range(400)]


def texts(**sources: list[str]) -> Texts:
    return Texts(sources, dict.fromkeys(sources, 1.0))


def test_a_text_is_trained_on_or_measured():
    parted = parted_texts(texts(one=MANY[:250], two=MANY[200:]), 0.1)
    trained, evaluated = parted.trained, parted.evaluated
    assert parted.held_out and set(trained.distinct) | set(evaluated) == set(MANY)
    assert not set(trained.distinct) & set(evaluated) and 20 < len(evaluated) < 60
    assert trained.weights == {"one": 1.0, "two": 1.0}


def test_a_text_stays_on_its_side_when_others_are_added():
    few, many = (parted_texts(texts(given=given), 0.1).evaluated for given in (MANY[:200], MANY))
    assert few == [text for text in many if text in MANY[:200]]
    assert parted_texts(texts(given=MANY[::-1]), 0.1).evaluated == many


@pytest.mark.parametrize(
    "given", [texts(given=["a dog", "a cat"]), texts(many=MANY, one=[sorted(MANY, key=held_texts.content_key)[0]])]
)
def test_texts_too_few_to_be_parted_are_all_trained_on_and_measured(given):
    parted = parted_texts(given, 0.1)
    assert parted.trained is given and sorted(parted.evaluated) == sorted(given.distinct) and not parted.held_out


def test_texts_that_nobody_measures_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(held_texts, "content_key", lambda text: pytest.fail("millions of texts take long"))
    given = texts(given=MANY)
    assert DataArguments("photos", train_texts=given).texts is given


def test_not_all_of_many_texts_are_measured(monkeypatch):
    whole = parted_texts(texts(given=MANY), 0.0).evaluated
    monkeypatch.setattr(held_texts, "MOST_EVALUATED", 30)
    assert parted_texts(texts(given=MANY), 0.0).evaluated == whole[:30]


def test_held_out_images_and_texts_are_not_trained_on(tiny_pairs):
    images = Dataset.from_list([{"image": row["image"]} for row in tiny_pairs])
    given = {"train_texts": texts(given=MANY), "validation_fraction": 0.3}
    data, whole = DataArguments(images, **given), DataArguments(images, **given | {"validation_fraction": 0.0})
    assert set(data.texts.distinct) == set(MANY) - set(data.parted_texts.evaluated) != set(MANY)
    assert set(whole.texts.distinct) == set(MANY)
    sides = [{row["image"]["bytes"] for row in rows} for rows in (training_pairs(data).pairs, evaluation_rows(data))]
    assert all(sides) and not sides[0] & sides[1] and len(sides[0] | sides[1]) == len(images)


@pytest.mark.parametrize("captions", [False, True])
def test_of_pairs_and_images_what_is_held_out_is_measured(captions, tiny_pairs):
    rows = [{"image": row["image"], "caption": row["caption"]} for row in tiny_pairs]
    pairs, images = Dataset.from_list(rows[:12]), Dataset.from_list([{"image": row["image"]} for row in rows[12:]])
    given = texts(given=MANY, captions=[]) if captions else texts(given=MANY)
    data = DataArguments(pairs, train_images=images, train_texts=given, validation_fraction=0.4)
    trained = {row["image"]["bytes"] for row in training_pairs(data).pairs}
    evaluated = {row["image"]["bytes"] for row in evaluation_rows(data)}
    of_pairs = {row["bytes"] for row in pairs.cast_column("image", Image(decode=False))["image"]}
    assert evaluated and not trained & evaluated
    assert evaluated <= of_pairs if captions else len(trained | evaluated) == len(rows)


def test_images_alone_are_batches_without_texts(tiny_pairs, tiny_processor, tmp_path):
    for index, row in enumerate(tiny_pairs):
        row["image"].save(tmp_path / f"{index:02d}.png")
    data = DataArguments("unused", eval_data=str(tmp_path), train_texts=texts(given=MANY))
    (batch,) = evaluation_batches(data, tiny_processor)
    assert batch.keys() == {"pixel_values", "bad_rows"} and len(batch["pixel_values"]) == len(tiny_pairs)
    for other in ({}, {"train_texts": ["captions"]}):  # there is nothing to measure agreement on
        with pytest.raises(MissingColumnError, match="has no column"):
            evaluation_rows(DataArguments("unused", eval_data=str(tmp_path), **other))


def test_captions_that_are_there_are_read_and_those_in_another_column_are_named(pairs_parquet):
    data = DataArguments("unused", eval_data=str(pairs_parquet), train_texts=texts(given=MANY))
    assert "caption" in evaluation_rows(data).column_names
    data = DataArguments("unused", eval_data=str(pairs_parquet), caption_column="text", train_texts=data.train_texts)
    with pytest.raises(MissingColumnError, match=r"has no column \['text'\]; it has"):
        evaluation_rows(data)


def test_pairs_that_are_held_out_keep_all_texts(pairs_parquet, tmp_path):
    (tmp_path / "queries.txt").write_text("\n".join(MANY))
    names = [str(tmp_path / "queries.txt"), "captions"]
    data = DataArguments(str(pairs_parquet), train_texts=names, validation_fraction=0.3)
    assert set(data.texts.distinct) == set(MANY) and "caption" in evaluation_rows(data).column_names

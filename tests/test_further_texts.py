"""Texts beside those of calibration pairs: what training draws, each once, without looking at an image."""

import datasets
import pytest
from datasets import Dataset

from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.further_texts import further_texts
from clipmap_hf.data.texts import Texts


@pytest.fixture
def rows() -> Dataset:
    """Images that cannot be decoded."""
    texts = [f"picture {index}" for index in range(10)]
    images = [{"bytes": b"", "path": None}] * 10
    rows = Dataset.from_dict({"image": images, "caption": texts, "keywords": [["one", text] for text in texts]})
    return rows.cast_column("image", datasets.Image(decode=False))


def collator(processor, **options) -> PairCollator:
    return PairCollator(processor.tokenizer, processor.image_processor, **options)


def test_captions_are_drawn_once_each(rows, tiny_processor):
    found = further_texts(rows, collator(tiny_processor), 6, seed=0)
    assert len(set(found)) == len(found) == 6 and set(found) <= set(rows["caption"])
    assert found == further_texts(rows, collator(tiny_processor), 6, seed=0)
    assert found != further_texts(rows, collator(tiny_processor), 6, seed=1)


def test_of_few_texts_there_are_fewer(rows, tiny_processor):
    assert set(further_texts(rows, collator(tiny_processor), 1000, seed=0)) == set(rows["caption"])


def test_keywords_are_joined_as_in_training(rows, tiny_processor):
    drawing = collator(tiny_processor, keyword_columns=["keywords"], caption_sampling="random")
    found = set(further_texts(rows, drawing, 1000, seed=0))
    assert {"picture 3", "one", "one, picture 3", "picture 3, one"} <= found


def test_texts_that_belong_to_no_image_are_drawn_by_their_weights(rows, tiny_processor):
    texts = Texts({"a": [f"a {i}" for i in range(400)], "b": [f"b {i}" for i in range(400)]}, {"a": 3.0, "b": 1.0})
    for source in (rows, rows.select_columns(["image"])):
        found = further_texts(source, collator(tiny_processor, texts=texts), 200, seed=0)
        assert 120 < sum(text.startswith("a") for text in found) < 180 and len(found) == 200


def test_blank_captions_are_passed_over(rows, tiny_processor):
    blank = rows.map(lambda row, index: {"caption": "" if index else "the only one"}, with_indices=True)
    assert further_texts(blank, collator(tiny_processor), 5, seed=0) == ["the only one"]


def test_where_training_has_no_texts_or_reads_a_stream_there_are_none(rows, tiny_processor):
    assert further_texts(rows, collator(tiny_processor, caption_columns=()), 5, seed=0) == []
    assert further_texts(rows.to_iterable_dataset(), collator(tiny_processor), 5, seed=0) == []

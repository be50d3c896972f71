"""Calibration pairs: as many as asked for, preprocessed as in evaluation, the same at every iteration."""

import copy

import datasets
import pytest
import torch
from datasets import Dataset, IterableDataset

import clipmap_hf.data.calibration_pairs
from clipmap_hf.data.calibration_pairs import CROPS, CalibrationPairs
from clipmap_hf.data.columns import ERROR_COLUMN
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.data.texts import Texts


@pytest.fixture
def rows(pairs_parquet) -> Dataset:
    return load_pairs(str(pairs_parquet))


@pytest.fixture
def stream(pairs_tars) -> IterableDataset:
    stream = load_pairs(pairs_tars, image_column="png", caption_columns=["txt"], streaming=True)
    return stream.rename_column("txt", "caption")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(clipmap_hf.data.calibration_pairs, "_BATCH_SIZE", 8)


def joined(pairs: CalibrationPairs) -> dict[str, list]:
    """Texts without padding, and pixels."""
    batches = list(pairs)
    end = pairs.collator.tokenizer.eos_token_id
    texts = [ids[: ids.index(end)] for batch in batches for ids in batch["input_ids"].tolist()]
    return {"texts": texts, "pixels": torch.cat([batch["pixel_values"] for batch in batches])}


def captions(pairs: CalibrationPairs) -> list[str]:
    decode = pairs.collator.tokenizer.batch_decode
    return [text for batch in pairs for text in decode(batch["input_ids"], skip_special_tokens=True)]


def test_pairs_are_preprocessed_as_in_evaluation(rows, tiny_pairs, tiny_processor):
    pairs = CalibrationPairs(rows, tiny_processor, 24)
    assert [len(batch["pixel_values"]) for batch in pairs] == [8, 8, 8]
    given, by_caption = joined(pairs), {row["caption"]: row for row in tiny_pairs}
    texts = captions(pairs)
    assert sorted(texts) == sorted(by_caption) and texts != list(by_caption)
    expected = tiny_processor(
        images=[by_caption[text]["image"] for text in texts], text=texts, padding=True, return_tensors="pt"
    )
    torch.testing.assert_close(given["pixels"], expected["pixel_values"], atol=0, rtol=0)


def test_pairs_are_the_same_at_every_iteration(rows, tiny_processor):
    pairs = CalibrationPairs(rows, tiny_processor, 10)
    assert iter(pairs) is not pairs
    first, second = list(pairs), list(pairs)
    assert [len(batch["pixel_values"]) for batch in first] == [8, 2]
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_as_many_are_drawn_as_asked_for_by_the_seed(rows, tiny_processor):
    drawn = [captions(CalibrationPairs(rows, tiny_processor, 6, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] and set(drawn[0]) != set(drawn[2])
    assert len(drawn[0]) == len(set(drawn[0])) == 6
    assert len(captions(CalibrationPairs(rows, tiny_processor, 1000))) == 24


def test_too_few_rows_give_several_views(rows, tiny_processor):
    pairs = CalibrationPairs(rows, tiny_processor, 60, augmentation=CROPS)
    assert [len(batch["pixel_values"]) for batch in pairs] == [8, 8, 8, 8, 8, 8, 8, 4]
    pixels = joined(pairs)["pixels"]
    torch.testing.assert_close(pixels[:24], joined(CalibrationPairs(rows, tiny_processor, 24))["pixels"])
    assert captions(pairs)[24:48] == captions(pairs)[:24] and captions(pairs)[48:] == captions(pairs)[:12]
    crops = (pixels[24:48] - pixels[:24]).abs().flatten(1).amax(dim=1)
    assert (crops > 0).float().mean() > 0.8 and pixels.dtype == torch.float32
    torch.testing.assert_close(joined(pairs)["pixels"], pixels, rtol=0, atol=0)


def test_there_are_at_most_eight_views(rows, tiny_processor):
    assert len(captions(CalibrationPairs(rows, tiny_processor, 1000, augmentation=CROPS))) == 8 * 24


def test_enough_rows_give_a_view_each(rows, tiny_processor):
    one, other = (joined(CalibrationPairs(rows, tiny_processor, 20, augmentation=crops)) for crops in (CROPS, None))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_images_alone_have_views_too(rows, tiny_processor):
    images = rows.remove_columns("caption")
    batches = list(CalibrationPairs(images, tiny_processor, 30, caption_column=None, augmentation=CROPS))
    assert sum(len(batch["pixel_values"]) for batch in batches) == 30 and "input_ids" not in batches[-1]


def test_each_view_draws_a_text_of_its_own(rows, tiny_processor):
    texts = Texts({"given": [f"text {number}" for number in range(100)]}, {"given": 1.0})
    drawn = captions(CalibrationPairs(rows, tiny_processor, 96, texts=texts, augmentation=CROPS))
    assert len(set(drawn)) > 40


def test_all_views_name_the_image_of_each_text(rows, tiny_processor):
    batches = list(CalibrationPairs(rows, tiny_processor, 60, augmentation=CROPS))
    assert all(batch["image_of_text"].tolist() == list(range(len(batch["pixel_values"]))) for batch in batches)


def test_a_processor_that_has_no_crops_is_asked_for_none(rows, tiny_processor):
    processor = copy.deepcopy(tiny_processor)
    processor.image_processor.do_resize = False
    assert len(captions(CalibrationPairs(rows, processor, 20, augmentation=CROPS))) == 20
    with pytest.raises(ValueError, match="Set do_resize=True"):
        CalibrationPairs(rows, processor, 60, augmentation=CROPS)


def test_of_a_stream_the_first_are_taken(stream, tiny_pairs, tiny_processor):
    pairs = CalibrationPairs(stream, tiny_processor, 10, seed=5)
    assert captions(pairs) == captions(pairs) == [row["caption"] for row in tiny_pairs[:10]]
    assert len(captions(CalibrationPairs(stream, tiny_processor, 1000))) == 24


def test_without_captions_there_are_images_alone(rows, stream, tiny_processor):
    for given in (rows.remove_columns("caption"), stream.remove_columns("caption")):
        batches = list(CalibrationPairs(given, tiny_processor, 10, caption_column=None))
        assert [set(batch) for batch in batches] == [{"pixel_values"}] * 2
        assert [len(batch["pixel_values"]) for batch in batches] == [8, 2]


def test_other_columns_are_not_read_and_decoded_images_are_taken(tiny_pairs, tiny_processor):
    columns = {name: [row[name] for row in tiny_pairs] for name in tiny_pairs[0]}
    decoded = Dataset.from_dict(columns).cast_column("image", datasets.Image())
    pairs = CalibrationPairs(decoded, tiny_processor, 24)
    assert pairs.rows.column_names == ["image", "caption"] and set(pairs.rows[0]["image"]) == {"bytes", "path"}
    assert sorted(captions(pairs)) == sorted(columns["caption"])


def test_data_without_images_is_an_error_that_names_its_columns(rows, tiny_processor):
    with pytest.raises(ValueError, match=r"The calibration data has no column \['image'\]; it has \['caption'\]"):
        CalibrationPairs(rows.remove_columns("image"), tiny_processor, 10)


def test_a_stream_of_unknown_columns_is_an_error(tiny_processor):
    unknown = IterableDataset.from_generator(lambda: iter([{"image": None}]))
    with pytest.raises(ValueError, match="columns of The calibration data are unknown"):
        CalibrationPairs(unknown, tiny_processor, 10)


@pytest.fixture
def broken(rows) -> Dataset:
    """Every fifth row has no image."""
    return rows.map(lambda row, index: row | {"image": None} if index % 5 == 0 else row, with_indices=True)


def test_bad_rows_are_left_out(broken, tiny_pairs, tiny_processor):
    pairs = CalibrationPairs(broken, tiny_processor, 24)
    good = [row["caption"] for index, row in enumerate(tiny_pairs) if index % 5]
    assert sorted(captions(pairs)) == sorted(good) == sorted(captions(pairs))  # counted anew at every iteration


def test_too_many_bad_rows_are_an_error(broken, tiny_processor):
    with pytest.raises(
        ValueError,
        match=r"Of the first (8|16|24) rows, 5 \(5 no image\) cannot be used, more than max_bad_fraction=0.004",
    ):
        list(CalibrationPairs(broken, tiny_processor, 24, max_bad_fraction=0.004))
    assert len(captions(CalibrationPairs(broken, tiny_processor, 24, max_bad_fraction=0.005))) == 19


def test_a_bad_row_is_counted_once_however_many_views_there_are(broken, tiny_processor):
    pairs = CalibrationPairs(broken, tiny_processor, 192, max_bad_fraction=0.005, augmentation=CROPS)
    assert len(captions(pairs)) == 8 * 19
    with pytest.raises(ValueError, match=r"5 \(5 no image\) cannot be used"):
        list(CalibrationPairs(broken, tiny_processor, 192, max_bad_fraction=0.004, augmentation=CROPS))


def test_rows_that_the_reader_could_not_read_are_left_out(pairs_tar, tiny_processor, tmp_path):
    cut = tmp_path / "cut.tar"
    cut.write_bytes(pairs_tar.read_bytes()[: pairs_tar.stat().st_size // 2])
    rows = load_pairs(str(cut), image_column="png", caption_columns=["txt"]).rename_column("txt", "caption")
    (reason,) = {one for one in rows[ERROR_COLUMN] if one is not None}
    assert 0 < len(captions(CalibrationPairs(rows, tiny_processor, 24))) < 24
    with pytest.raises(ValueError, match=rf"1 \(1 {reason}\) cannot be used"):
        list(CalibrationPairs(rows, tiny_processor, 24, max_bad_fraction=0.0))


def test_a_batch_of_bad_rows_alone_is_none(rows, tiny_processor):
    bad = rows.map(lambda row: row | {"image": None})
    assert list(CalibrationPairs(bad, tiny_processor, 24, max_bad_fraction=1.0)) == []


def test_processes_share_the_pairs(rows, tiny_processor, as_process):
    whole = captions(CalibrationPairs(rows, tiny_processor, 17))
    shares = []
    for index in range(3):
        as_process(index, 3)
        shares.append(captions(CalibrationPairs(rows, tiny_processor, 17)))
    assert sum(shares, []) == whole and [len(share) for share in shares] == [6, 6, 5]


def test_fewer_pairs_than_processes_are_an_error(rows, stream, tiny_processor, as_process):
    as_process(0, 25)
    for given, count in ((rows, 100), (rows, 4), (stream, 4)):
        with pytest.raises(ValueError, match=rf"has {min(count, 24)} pairs, fewer than the 25 processes"):
            CalibrationPairs(given, tiny_processor, count)


def test_more_texts_stand_behind_those_of_the_pairs(rows, tiny_processor):
    more = [f"{word} drawing" for word in ("a", "small", "large", "big blue")]
    plain, longer = (
        CalibrationPairs(rows, tiny_processor, 24),
        CalibrationPairs(rows, tiny_processor, 24, more_texts=more),
    )
    tokenized = {tuple(ids) for ids in texts_of([tiny_processor.tokenizer(text)["input_ids"] for text in more])}
    for own, batch in zip(plain, longer, strict=True):
        torch.testing.assert_close(batch["pixel_values"], own["pixel_values"], atol=0, rtol=0)
        count = len(own["input_ids"])
        assert texts_of(batch["input_ids"].tolist())[:count] == texts_of(own["input_ids"].tolist())
        assert len(batch["attention_mask"]) == len(batch["input_ids"]) > count
        tokenized -= {tuple(ids) for ids in texts_of(batch["input_ids"].tolist())[count:]}
    assert not tokenized
    assert joined(longer)["texts"] == joined(longer)["texts"]


def test_of_more_texts_each_process_has_its_own(rows, tiny_processor, as_process):
    more, found = [f"{index} red circle" for index in range(8)], []
    for process in (0, 1):
        as_process(process, 2)
        found.append(CalibrationPairs(rows, tiny_processor, 24, more_texts=more).more_texts)
    assert sorted(found[0] + found[1]) == more and len(found[0]) == 4


def texts_of(rows_of_ids: list[list[int]]) -> list[list[int]]:
    """Ids up to the first end; ends fill the rest."""
    end = max(max(ids) for ids in rows_of_ids)
    return [ids[: ids.index(end)] for ids in rows_of_ids]

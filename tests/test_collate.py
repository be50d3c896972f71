import io
import logging
import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.captions import caption_text, filled_texts
from clipmap_hf.data.collate import PairCollator, normalized_pixels
from clipmap_hf.data.columns import ERROR_COLUMN
from clipmap_hf.data.images import BadRowError, decode_image
from clipmap_hf.data.keys import content_key


def encoded(image: Image.Image, extension: str = "PNG", **options) -> dict:
    """`image` as an undecoded cell of `datasets`."""
    buffer = io.BytesIO()
    image.save(buffer, extension, **options)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def rows(tiny_pairs) -> list[dict]:
    """Six rows of epoch 0, as a loader gives them."""
    return [row | {"image": encoded(row["image"]), "epoch": 0} for row in tiny_pairs[:6]]


@pytest.fixture
def collator(tiny_processor) -> PairCollator:
    return PairCollator(tiny_processor.tokenizer, tiny_processor.image_processor)


@pytest.fixture
def training_collator(tiny_processor) -> PairCollator:
    return PairCollator(
        tiny_processor.tokenizer,
        tiny_processor.image_processor,
        ("caption",),
        ("keywords",),
        "random",
        Augmentation(scale=(0.5, 1.0), flip=0.5, color_jitter=0.2),
    )


def in_epoch(rows: list[dict], epoch: int) -> list[dict]:
    return [row | {"epoch": epoch} for row in rows]


def texts(collator: PairCollator, batch: dict) -> list[str]:
    return collator.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)


# Captions


@pytest.mark.parametrize(
    ("caption", "kind"), [(7, "int"), (float("nan"), "float"), ([1.5, None, 2], "float and int"), ({"a": 1}, "dict")]
)
def test_a_caption_of_another_type_is_a_bad_row_that_names_it(caption, kind):
    with pytest.raises(BadRowError, match=f"^caption of type {kind}: "):
        caption_text(caption, random.Random(0))


@pytest.mark.parametrize("caption", ["", "  \n", None, [], ["", None]], ids=repr)
def test_no_text_is_a_bad_row(caption):
    with pytest.raises(BadRowError, match="no caption"):
        caption_text(caption, random.Random(0))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" + "1" * 5000 + "]", "[1, 2", "[]"], ids=["deep", "long", "cut", "empty"]
)
def test_a_caption_that_looks_like_json_is_read_or_a_bad_row(text):
    try:
        assert caption_text(text, random.Random(0)) == text
    except BadRowError:
        assert text == "[]"


def test_keywords_are_joined_in_order_without_randomness():
    assert caption_text(["cat", "", None, "pet"]) == "cat, pet"


def test_keywords_are_drawn_in_random_order_and_number():
    words = ["cat", "pet", "animal"]
    drawn = [caption_text(words, random.Random(seed)).split(", ") for seed in range(60)]
    assert {len(one) for one in drawn} == {1, 2, 3}
    assert all(set(one) <= set(words) and len(set(one)) == len(one) for one in drawn)
    assert {one[0] for one in drawn} == set(words)


# Batches


def test_evaluation_batch_is_what_the_processor_gives(collator, rows, tiny_pairs, tiny_processor):
    batch = collator(rows)
    expected = tiny_processor(
        text=[row["caption"] for row in tiny_pairs[:6]],
        images=[row["image"] for row in tiny_pairs[:6]],
        padding=True,
        return_tensors="pt",
    )
    assert batch.pop("bad_rows") == {}
    assert batch.pop("image_of_text").tolist() == list(range(6))
    assert len(set(batch.pop("image_key").tolist())) == 6
    assert len(set(batch.pop("text_key").tolist())) == len({row["caption"] for row in rows})
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}
    for name, value in batch.items():
        torch.testing.assert_close(value, expected[name], atol=0, rtol=0)


def test_without_caption_columns_there_are_just_the_pixels(collator, rows, tiny_processor):
    alone = PairCollator(tiny_processor.tokenizer, tiny_processor.image_processor, [])
    images = [{"image": row["image"]} for row in rows]
    batch = alone(images)
    assert batch.keys() == {"pixel_values", "bad_rows"} and batch["bad_rows"] == {}
    torch.testing.assert_close(batch["pixel_values"], collator(rows)["pixel_values"], atol=0, rtol=0)
    images[1] = {"image": None}
    batch = alone(images)
    assert batch["bad_rows"] == {"no image": 1} and len(batch["pixel_values"]) == 5
    assert alone([{"image": None}]) == {"bad_rows": {"no image": 1}}


def test_training_pixels_are_normalized_as_in_evaluation(collator, rows, tiny_processor):
    red = [{"image": encoded(Image.new("RGB", (40, 32), "red")), "caption": "red", "epoch": 0}]
    augmented = PairCollator(tiny_processor.tokenizer, tiny_processor.image_processor, augmentation=Augmentation())
    pixels = normalized_pixels(augmented(red))
    assert pixels.shape == (1, 3, 32, 32) and pixels.is_contiguous()
    torch.testing.assert_close(pixels, collator(red)["pixel_values"], atol=1e-5, rtol=0)


def test_training_ships_bytes_that_are_normalized_by_the_formula(training_collator, rows):
    batch = training_collator(rows)
    pixels = batch["pixel_values"]
    assert pixels.dtype == torch.uint8 and pixels.shape == (6, 3, 32, 32)
    before = pixels.clone()
    processor = training_collator.image_processor
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
    assert torch.equal(normalized_pixels(batch), (pixels / 255 - mean) / std)
    assert torch.equal(pixels, before)


def test_training_pixels_are_those_of_the_augmentation(tiny_processor, rows):
    augmentation = Augmentation(scale=(1.0, 1.0), ratio=(1.25, 1.25))  # the whole of an image of 40 by 32
    collator = PairCollator(tiny_processor.tokenizer, tiny_processor.image_processor, augmentation=augmentation)
    for row, pixels in zip(rows, collator(rows)["pixel_values"], strict=True):
        resized = decode_image(row["image"]["bytes"]).resize((32, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(resized))


def test_evaluation_pixels_are_normalized_already(collator, rows):
    batch = collator(rows)
    assert normalized_pixels(batch) is batch["pixel_values"] and "image_mean" not in batch


def test_captions_longer_than_the_context_are_truncated(collator, rows):
    rows[0]["caption"] = "a very long caption that goes on and on"
    batch = collator(rows)
    assert batch["input_ids"].shape == (6, 16)
    assert batch["input_ids"][0, -1] == collator.tokenizer.eos_token_id


PNG = encoded(Image.effect_noise((64, 64), 50))["bytes"]
BAD_ROWS = {
    "truncated": ({"image": {"bytes": PNG[: len(PNG) // 2], "path": None}}, "undecodable image"),
    "not an image": ({"image": {"bytes": b"<html>404 Not Found</html>", "path": None}}, "undecodable image"),
    "zero bytes": ({"image": {"bytes": b"", "path": None}}, "empty image"),
    "missing file": ({"image": {"bytes": None, "path": "/no/such/file.png"}}, "unreadable image"),
    "neither bytes nor path": ({"image": {"bytes": None, "path": None}}, "no image"),
    "null": ({"image": None}, "no image"),
    "empty caption": ({"caption": ""}, "no caption"),
    "blank caption": ({"caption": " \n"}, "no caption"),
    "null caption": ({"caption": None}, "no caption"),
    "number": ({"caption": 7}, "caption of type int"),
    "list of blanks": ({"caption": ["", None, " "]}, "no caption"),
    "empty list": ({"caption": []}, "no caption"),
    "reader": ({"image": None, "caption": None, ERROR_COLUMN: "truncated shard"}, "truncated shard"),
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_left_out_and_counted_by_reason(collator, training_collator, rows, name, training, caplog):
    collator = training_collator if training else collator
    training_collator.caption_sampling = "first"  # of several columns, the others may have a caption
    changes, reason = BAD_ROWS[name]
    rows = [row | {ERROR_COLUMN: None} for row in rows]
    rows[2] |= changes
    with caplog.at_level(logging.WARNING):
        batch = collator(rows)
    assert batch.pop("bad_rows") == {reason: 1} and reason in caplog.text
    good = collator(rows[:2] + rows[3:])
    assert good.pop("bad_rows") == {} and batch.keys() == good.keys() and len(batch["pixel_values"]) == 5
    for key, value in batch.items():
        torch.testing.assert_close(value, good[key], atol=0, rtol=0)


def test_a_decompression_bomb_is_left_out(collator, rows, monkeypatch):
    rows[1]["image"] = encoded(Image.new("RGB", (128, 64)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 128 * 64 // 2 - 1)  # at the double, a warning becomes an error
    assert collator(rows)["bad_rows"] == {"decompression bomb": 1}


def test_several_reasons_are_counted_one_by_one(collator, rows):
    for row, changes in zip(rows, ({"caption": None}, {"image": None}, {"caption": ""}), strict=False):
        row |= changes
    batch = collator(rows)
    assert batch["bad_rows"] == {"no caption": 2, "no image": 1} and len(batch["input_ids"]) == 3


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_batch_of_bad_rows_only_is_nothing_but_their_number(collator, training_collator, rows, training):
    rows = [row | {"image": None} for row in rows]
    assert (training_collator if training else collator)(rows) == {"bad_rows": {"no image": 6}}


# What an example depends on


def test_an_example_depends_on_its_content_only(training_collator, rows, tmp_path):
    path = tmp_path / "copy.png"
    path.write_bytes(rows[4]["image"]["bytes"])
    whole, alone = (
        training_collator(rows),
        training_collator([rows[4] | {"image": {"bytes": None, "path": str(path)}}]),
    )
    reverse = training_collator(rows[::-1])
    assert torch.equal(whole["pixel_values"][4:5], alone["pixel_values"])
    assert torch.equal(whole["pixel_values"], reverse["pixel_values"].flip(0))
    assert texts(training_collator, whole)[4] == texts(training_collator, alone)[0]
    assert texts(training_collator, whole) == texts(training_collator, reverse)[::-1]


def test_images_of_other_content_are_augmented_otherwise(training_collator, rows):
    image = decode_image(rows[0]["image"]["bytes"])
    twin = rows[0] | {"image": encoded(image, compress_level=0)}  # the same pixels in another file
    assert decode_image(twin["image"]["bytes"]).tobytes() == image.tobytes()
    first, second = training_collator([rows[0], twin])["pixel_values"]
    assert not torch.equal(first, second)


def test_views_repeat(training_collator, rows):
    def batch(epoch: int) -> tuple[list, list[str]]:
        batch = training_collator(in_epoch(rows, epoch))
        return batch["pixel_values"].tolist(), texts(training_collator, batch)

    endless = [batch(epoch) for epoch in range(4)]
    assert len({str(one) for one in endless}) == 4
    training_collator.views = 2
    assert [batch(epoch) for epoch in range(5)] == [endless[0], endless[1]] * 2 + [endless[0]]


def test_a_content_key_is_of_the_content(rows):
    keys = [content_key(row["image"]["bytes"]) for row in rows]
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**64 for key in keys)
    assert content_key("naïve") == content_key("naïve".encode()) != content_key("naive")
    assert content_key("a red circle") == 3868813310041309068  # caches rely on it


def test_the_next_epoch_augments_anew(training_collator, rows):
    first = training_collator(rows)
    second = training_collator(in_epoch(rows, 1))
    same = [torch.equal(a, b) for a, b in zip(first["pixel_values"], second["pixel_values"], strict=True)]
    assert not any(same)
    assert texts(training_collator, first) != texts(training_collator, second)


def test_another_seed_augments_anew(training_collator, rows):
    first = training_collator(rows)["pixel_values"]
    training_collator.seed = 1
    assert not torch.equal(first, training_collator(rows)["pixel_values"])


def test_first_caption_sampling_reads_the_first_column(training_collator, rows):
    training_collator.caption_sampling = "first"
    assert texts(training_collator, training_collator(rows)) == [row["caption"] for row in rows]


def test_random_caption_sampling_draws_from_all_columns(training_collator, rows):
    batches = [training_collator(in_epoch(rows[:1], epoch)) for epoch in range(40)]
    drawn = {text for batch in batches for text in texts(training_collator, batch)}
    assert rows[0]["caption"] in drawn and "drawing" in drawn and "circle" in drawn


@pytest.mark.parametrize("keywords", [[], None], ids=repr)
def test_random_caption_sampling_skips_empty_columns(training_collator, rows, keywords):
    rows = [rows[0] | {"keywords": keywords, "epoch": epoch} for epoch in range(10)]
    batch = training_collator(rows)
    assert batch["bad_rows"] == {} and set(texts(training_collator, batch)) == {rows[0]["caption"]}


def several_captions(row) -> dict:
    return row | {"caption": ["a red one", " ", None, "a second"]}


def test_all_captions_of_an_image_are_evaluated(collator, rows):
    batch = collator([several_captions(rows[0]), rows[1]])
    assert texts(collator, batch) == ["a red one", "a second", rows[1]["caption"]]
    assert batch["image_of_text"].tolist() == [0, 0, 1] and len(batch["pixel_values"]) == 2


@pytest.mark.parametrize("sampling", ["first", "random"])
def test_training_draws_one_whole_caption_of_several(training_collator, rows, sampling):
    training_collator.caption_sampling, training_collator.keyword_columns = sampling, ()
    batches = [training_collator([several_captions(rows[0]) | {"epoch": epoch}]) for epoch in range(20)]
    assert {text for batch in batches for text in texts(training_collator, batch)} == {"a red one", "a second"}


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"size": {"height": 48, "width": 48}, "do_center_crop": False}, 48),
        ({"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}, 56),
    ],
    ids=["resized", "center crop"],
)
def test_training_and_evaluation_images_have_the_same_size(tiny_tokenizer, rows, options, size):
    processor = CLIPImageProcessorPil(**options)
    for augmentation in (None, Augmentation()):
        collator = PairCollator(tiny_tokenizer, processor, augmentation=augmentation)
        assert collator(rows)["pixel_values"].shape == (6, 3, size, size)


@pytest.mark.parametrize(
    ("caption", "texts"),
    [("a", ["a"]), (" ", []), (None, []), (["a", None, "", "b"], ["a", "b"]), ([], []), (3, [])],
    ids=repr,
)
def test_filled_texts_are_the_strings_that_are_not_blank(caption, texts):
    assert filled_texts(caption) == texts


@pytest.mark.parametrize("caption", ['["a cat", "a dog"]', ["a cat", "a dog"]], ids=["JSON", "list"])
def test_a_list_of_captions_in_a_string_is_a_list_in_training_too(tiny_processor, tiny_pairs, caption):
    png = io.BytesIO()
    tiny_pairs[0]["image"].save(png, "PNG")
    image = {"bytes": png.getvalue(), "path": None}
    rows = [{"image": image, "caption": caption, "epoch": epoch} for epoch in range(20)]
    collator = PairCollator(
        tiny_processor.tokenizer, tiny_processor.image_processor, augmentation=Augmentation(scale=(0.5, 1.0))
    )
    found = {tuple(ids) for ids in collator(rows)["input_ids"].tolist()}
    assert found == {tuple(ids) for ids in tiny_processor.tokenizer(["a cat", "a dog"])["input_ids"]}


@pytest.mark.parametrize("caption", ["[sic]", "[1, 2]", '[{"a": 1}]', "["])
def test_a_text_in_brackets_is_a_text(caption):
    assert filled_texts(caption) == [caption]

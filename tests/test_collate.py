import io
import logging
import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.collate import BadRowError, PairCollator, caption_text, decode_image, filled_texts


def encoded(image: Image.Image, extension: str = "PNG", **options) -> dict:
    """`image` as an undecoded cell of `datasets`."""
    buffer = io.BytesIO()
    image.save(buffer, extension, **options)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def rows(tiny_pairs) -> list[dict]:
    """Six rows as a `PairDataset` gives them."""
    return [row | {"image": encoded(row["image"]), "key": (0, index)} for index, row in enumerate(tiny_pairs[:6])]


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


def texts(collator: PairCollator, batch: dict) -> list[str]:
    return collator.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)


# Decoding


def color_at(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def test_transparency_becomes_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (255, 0, 0, 255))
    image.putpixel((2, 2), (0, 0, 0, 128))
    decoded = decode_image(encoded(image))
    assert color_at(decoded) == (255, 255, 255)
    assert color_at(decoded, 1, 1) == (255, 0, 0)
    assert color_at(decoded, 2, 2) == (127, 127, 127)


def test_palettes_are_converted_with_and_without_transparency():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 1), 0)
    assert color_at(decode_image(encoded(image))) == (200, 100, 50)
    decoded = decode_image(encoded(image, transparency=1))
    assert color_at(decoded) == (255, 255, 255) and color_at(decoded, 1, 1) == (10, 20, 30)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_gray_images_are_converted(mode):
    assert color_at(decode_image(encoded(Image.new(mode, (4, 4), 255)))) == (255, 255, 255)


def test_gray_with_alpha_is_converted():
    assert color_at(decode_image(encoded(Image.new("LA", (4, 4), (90, 255))))) == (90, 90, 90)


def test_cmyk_is_converted():
    decoded = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(np.subtract(color_at(decoded), (255, 0, 0))).max() < 8  # JPEG is not exact


@pytest.mark.parametrize("extension", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_brightness(extension):
    values = np.array([[0, 0x4000], [0x8000, 0xFFFF]], dtype=np.uint16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(values), extension)))
    assert decoded[..., 0].tolist() == [[0, 0x40], [0x80, 0xFF]]


def test_a_path_is_opened(tmp_path):
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "blue.png")
    assert color_at(decode_image({"bytes": None, "path": str(tmp_path / "blue.png")})) == (0, 0, 255)


WHOLE = encoded(Image.effect_noise((64, 64), 50), "PNG")["bytes"]
JPEG = encoded(Image.effect_noise((64, 64), 50), "JPEG")["bytes"]
LARGE = encoded(Image.effect_noise((512, 512), 50), "PNG")["bytes"]
BAD_IMAGES = {
    "broken chunk": {"bytes": b"IDAT".join(LARGE.split(b"IDAT")[:2]) + bytes(4) + LARGE[-1000:], "path": None},
    "truncated png": {"bytes": WHOLE[: len(WHOLE) // 2], "path": None},
    "truncated jpeg": {"bytes": JPEG[: len(JPEG) // 2], "path": None},
    "header only": {"bytes": WHOLE[:30], "path": None},
    "zero bytes": {"bytes": b"", "path": None},
    "not an image": {"bytes": b"<html>404 Not Found</html>", "path": None},
    "missing file": {"bytes": None, "path": "/no/such/file.png"},
    "neither bytes nor path": {"bytes": None, "path": None},
    "null": None,
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_a_bad_row(name):
    with pytest.raises(BadRowError, match="undecodable image"):
        decode_image(BAD_IMAGES[name])


# Captions


@pytest.mark.parametrize("caption", ["", "  \n", None, [], ["", None], 7], ids=repr)
def test_no_text_is_a_bad_row(caption):
    with pytest.raises(BadRowError, match="no caption"):
        caption_text(caption, random.Random(0))


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
    assert batch.pop("bad_rows") == 0
    assert batch.pop("image_of_text").tolist() == list(range(6))
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}
    for name, value in batch.items():
        torch.testing.assert_close(value, expected[name], atol=0, rtol=0)


def test_training_pixels_are_normalized_as_in_evaluation(collator, rows, tiny_processor):
    red = [{"image": encoded(Image.new("RGB", (40, 32), "red")), "caption": "red", "key": (0, 0)}]
    augmented = PairCollator(tiny_processor.tokenizer, tiny_processor.image_processor, augmentation=Augmentation())
    batch = augmented(red)
    assert batch["pixel_values"].shape == (1, 3, 32, 32) and batch["pixel_values"].is_contiguous()
    torch.testing.assert_close(batch["pixel_values"], collator(red)["pixel_values"], atol=1e-5, rtol=0)


def test_captions_longer_than_the_context_are_truncated(collator, rows):
    rows[0]["caption"] = "a very long caption that goes on and on"
    batch = collator(rows)
    assert batch["input_ids"].shape == (6, 16)
    assert batch["input_ids"][0, -1] == collator.tokenizer.eos_token_id


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_rows_with_bad_images_are_left_out_and_counted(collator, rows, name, caplog):
    rows[2]["image"] = BAD_IMAGES[name]
    with caplog.at_level(logging.WARNING):
        batch = collator(rows)
    assert batch["bad_rows"] == 1 and len(batch["pixel_values"]) == len(batch["input_ids"]) == 5
    assert "undecodable image" in caplog.text
    good = collator(rows[:2] + rows[3:])
    torch.testing.assert_close(batch["pixel_values"], good["pixel_values"], atol=0, rtol=0)
    assert texts(collator, batch) == texts(collator, good)


@pytest.mark.parametrize("caption", ["", " ", None], ids=repr)
def test_rows_without_caption_are_left_out_and_counted(collator, rows, caption):
    rows[1]["caption"] = caption
    batch = collator(rows)
    assert batch["bad_rows"] == 1 and len(batch["pixel_values"]) == len(batch["input_ids"]) == 5


def test_a_batch_of_bad_rows_only_is_an_error(collator, rows):
    for row in rows:
        row["caption"] = None
    with pytest.raises(BadRowError, match="None of the 6 rows of this batch can be used; the last: no caption"):
        collator(rows)


def test_an_example_depends_on_its_key_only(training_collator, rows):
    whole, alone = training_collator(rows), training_collator(rows[4:5])
    torch.testing.assert_close(whole["pixel_values"][4:5], alone["pixel_values"], atol=0, rtol=0)
    assert texts(training_collator, whole)[4] == texts(training_collator, alone)[0]


def test_the_next_epoch_augments_anew(training_collator, rows):
    first = training_collator(rows)
    second = training_collator([row | {"key": (1, index)} for index, row in enumerate(rows)])
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
    batches = [training_collator([rows[0] | {"key": (epoch, 0)}]) for epoch in range(40)]
    drawn = {text for batch in batches for text in texts(training_collator, batch)}
    assert rows[0]["caption"] in drawn and "drawing" in drawn and "circle" in drawn


@pytest.mark.parametrize("keywords", [[], None], ids=repr)
def test_random_caption_sampling_skips_empty_columns(training_collator, rows, keywords):
    rows = [rows[0] | {"keywords": keywords, "key": (epoch, 0)} for epoch in range(10)]
    batch = training_collator(rows)
    assert batch["bad_rows"] == 0 and set(texts(training_collator, batch)) == {rows[0]["caption"]}


def several_captions(row) -> dict:
    return row | {"caption": ["a red one", " ", None, "a second"]}


def test_all_captions_of_an_image_are_evaluated(collator, rows):
    batch = collator([several_captions(rows[0]), rows[1]])
    assert texts(collator, batch) == ["a red one", "a second", rows[1]["caption"]]
    assert batch["image_of_text"].tolist() == [0, 0, 1] and len(batch["pixel_values"]) == 2


@pytest.mark.parametrize("sampling", ["first", "random"])
def test_training_draws_one_whole_caption_of_several(training_collator, rows, sampling):
    training_collator.caption_sampling, training_collator.keyword_columns = sampling, ()
    batches = [training_collator([several_captions(rows[0]) | {"key": (epoch, 0)}]) for epoch in range(20)]
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

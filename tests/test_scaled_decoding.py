import io
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from clipmap_hf.data.augment import Augmentation, SeededTransform, random_resized_crop
from clipmap_hf.data.calibration_pairs import CROPS
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.images import decode_image
from clipmap_hf.data.mixing import Mixing
from clipmap_hf.teacher_cache.view_batches import ViewCollator


WIDE = (512, 384)  # width and height; the tiny models look at 32 pixels, so a quarter of it will do


def photo(size: tuple[int, int] = WIDE) -> Image.Image:
    coarse = Image.effect_noise((16, 12), 90).resize(size, Image.Resampling.BICUBIC)
    return Image.merge("RGB", [coarse, coarse.transpose(Image.Transpose.ROTATE_180), Image.effect_noise(size, 10)])


def encoded(image: Image.Image, extension: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, extension, **options)
    return buffer.getvalue()


def row_of(content: bytes) -> dict:
    return {"image": {"bytes": content, "path": None}, "caption": "a photo", "epoch": 0}


@pytest.fixture
def collator(tiny_processor) -> PairCollator:
    augmentation = Augmentation(scale=(0.5, 1.0))
    return PairCollator(tiny_processor.tokenizer, tiny_processor.image_processor, augmentation=augmentation)


class Crops:
    """Looks like an image to `random_resized_crop`, and keeps the boxes."""

    def __init__(self, size: tuple[int, int]):
        self.size, self.boxes = size, []

    def resize(self, size, resample, box):
        self.boxes.append(box)


@pytest.mark.parametrize("image_size", [(4000, 3000), (3000, 4000), (2000, 1500), (900, 400), (400, 5000), (200, 200)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.3, 1.0), (0.05, 0.1)])
def test_no_crop_of_a_scaled_image_is_smaller_than_one_and_a_half_times_its_result(image_size, scale):
    augmentation = Augmentation(scale=scale)
    factor = augmentation.reduction(image_size, (224, 160))
    crops = Crops(tuple(side // factor for side in image_size))
    for seed in range(300):
        random_resized_crop(crops, (224, 160), scale, augmentation.ratio, random.Random(seed))
    width, height = (min(box[right] - box[right - 2] for box in crops.boxes) for right in (2, 3))
    assert factor == 1 or (width >= 1.49 * 160 and height >= 1.49 * 224)
    assert augmentation.reduction(tuple(2 * side for side in image_size), (448, 320)) == factor


def test_large_images_are_scaled_as_far_as_their_smallest_crops_allow():
    augmentation = Augmentation(scale=(0.9, 1.0))
    sizes = [(500, 375), (1000, 750), (2000, 1500), (4000, 3000), (10000, 7500)]
    assert [augmentation.reduction(size, (224, 224)) for size in sizes] == [1, 2, 4, 8, 8]
    assert [Augmentation(scale=(0.3, 1.0)).reduction(size, (224, 224)) for size in sizes] == [1, 1, 2, 4, 8]
    assert Augmentation(scaled=False).reduction((10000, 7500), (224, 224)) == 1 and not CROPS.scaled


def test_a_scaled_jpeg_is_nearly_the_image_that_is_decoded_in_full(collator):
    content = encoded(photo(), quality=90)
    image = collator.decoded(row_of(content))[1]
    assert image.size == (128, 96) and image.mode == "RGB"
    scaled, full = (collator.view(row_of(content), content, one, 0).image for one in (image, decode_image(content)))
    difference = np.abs(np.asarray(scaled, dtype=float) - np.asarray(full, dtype=float))
    assert 0 < difference.mean() < 1.0  # of 255


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_scaled_jpeg_of_another_mode_becomes_rgb(collator, mode):
    drawn = photo().convert(mode)
    image = collator.decoded(row_of(encoded(drawn, quality=95)))[1]
    assert image.size == (128, 96) and image.mode == "RGB"
    reference = drawn.convert("RGB").resize((8, 6), Image.Resampling.BOX)
    difference = np.asarray(image.resize((8, 6), Image.Resampling.BOX), dtype=float) - np.asarray(reference)
    assert np.abs(difference).mean() < 2.0  # of 255


def test_a_scaled_jpeg_is_turned_upright(collator):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image = collator.decoded(row_of(encoded(photo(), exif=exif)))[1]
    assert image.size == (96, 128)


def test_other_formats_evaluation_and_transforms_get_all_pixels(collator, tiny_processor):
    jpeg = row_of(encoded(photo()))
    assert collator.decoded(row_of(encoded(photo(), "PNG")))[1].size == WIDE
    evaluation = PairCollator(tiny_processor.tokenizer, tiny_processor.image_processor)
    assert evaluation.decoded(jpeg)[1].tobytes() == decode_image(jpeg["image"]["bytes"]).tobytes()
    sizes, transform = [], lambda image: sizes.append(image.size) or image.resize((32, 32))
    own = PairCollator(
        tiny_processor.tokenizer, tiny_processor.image_processor, augmentation=SeededTransform(transform)
    )
    own([jpeg])
    assert sizes == [WIDE]


def test_a_teacher_cache_and_partners_of_a_mix_see_what_training_sees(collator):
    rows = [row_of(encoded(photo())) for _ in range(3)]
    views = ViewCollator(collator, 1)(rows)["pixel_values"]
    torch.testing.assert_close(views, collator(rows)["pixel_values"], rtol=0, atol=0)
    seen = []
    mixing = Mixing(1.0, Dataset.from_list([{"image": row["image"]} for row in rows]))
    mixing.image(
        Image.new("RGB", (32, 32)),
        lambda row: seen.append(collator.decoded(row)[1]) or photo((32, 32)),
        random.Random(0),
    )
    assert [image.size for image in seen] == [(128, 96)]

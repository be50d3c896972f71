import random

import numpy as np
import pytest
from PIL import Image, ImageOps

from clipmap_hf.data.augment import Augmentation, random_resized_crop


@pytest.fixture
def image() -> Image.Image:
    """100 × 80 pixels whose red is the column, green the row and blue constant: a crop tells where it comes from."""
    columns, rows = np.meshgrid(np.arange(100), np.arange(80))
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 200)], axis=-1).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


WHOLE = {"scale": (1.0, 1.0), "ratio": (1.25, 1.25)}  # all of `image`


def test_the_whole_image_is_just_resized_bicubically():
    image = Image.effect_noise((100, 80), 80).convert("RGB")
    result = random_resized_crop(image, (20, 20), rng=random.Random(0), **WHOLE)
    expected = image.resize((20, 20), Image.Resampling.BICUBIC)
    assert np.abs(pixels(result) - pixels(expected)).max() <= 1


@pytest.mark.parametrize("scale", [0.1, 0.5, 0.9])
def test_the_crop_covers_the_asked_share_of_the_area(image, scale):
    for seed in range(5):
        result = pixels(random_resized_crop(image, (50, 50), (scale, scale), (1.0, 1.0), random.Random(seed)))
        width, height = np.ptp(result[..., 0]) * 50 / 49, np.ptp(result[..., 1]) * 50 / 49
        side = (8000 * scale) ** 0.5
        assert width == pytest.approx(side, abs=3)
        assert height == pytest.approx(min(side, 80), abs=3)


def test_the_crop_falls_anywhere(image):
    crops = [
        pixels(random_resized_crop(image, (10, 10), (0.1, 0.1), (1.0, 1.0), random.Random(seed)))
        for seed in range(100)
    ]
    left, top = np.array([crop[0, 0, 0] for crop in crops]), np.array([crop[0, 0, 1] for crop in crops])
    side = 800**0.5
    assert left.min() < 7 and left.max() > 100 - side - 7
    assert top.min() < 7 and top.max() > 80 - side - 7
    assert abs(np.corrcoef(left, top)[0, 1]) < 0.3


def test_the_aspect_ratio_is_width_over_height(image):
    result = pixels(random_resized_crop(image, (50, 50), (0.25, 0.25), (2.0, 2.0), random.Random(0)))
    assert np.ptp(result[..., 0]) / np.ptp(result[..., 1]) == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)], ids=str)
def test_extreme_images_are_cropped_too(size):
    for seed in range(20):
        result = Augmentation(scale=(0.01, 1.0))(Image.new("RGB", size, "red"), (8, 8), random.Random(seed))
        assert result.size == (8, 8) and (pixels(result) == [255, 0, 0]).all()


FULL = Augmentation(scale=(0.5, 1.0), flip=0.5, rotation=20, color_jitter=0.4, grayscale=0.2)


def test_equal_random_states_give_equal_pixels_and_others_do_not(image):
    before = pixels(image)
    for seed in range(20):
        results = [pixels(FULL(image, (16, 16), random.Random(state))) for state in (seed, seed, seed + 1)]
        assert (results[0] == results[1]).all() and (results[0] != results[2]).any()
    assert (pixels(image) == before).all()


def test_the_default_only_crops(image):
    result = Augmentation()(image, (32, 32), random.Random(3))
    expected = random_resized_crop(image, (32, 32), (0.9, 1.0), (3 / 4, 4 / 3), random.Random(3))
    assert (pixels(result) == pixels(expected)).all()


def test_flip_mirrors_with_its_probability(image):
    plain = random_resized_crop(image, (32, 32), rng=random.Random(0), **WHOLE)
    mirrored = Augmentation(**WHOLE, flip=1.0)(image, (32, 32), random.Random(0))
    assert (pixels(mirrored) == pixels(ImageOps.mirror(plain))).all()
    results = [pixels(Augmentation(**WHOLE, flip=0.5)(image, (8, 8), random.Random(seed))) for seed in range(200)]
    flipped = sum(result[0, 0, 0] > result[0, -1, 0] for result in results)
    assert 70 <= flipped <= 130


def test_rotation_fills_the_corners_with_white():
    black = Image.new("RGB", (64, 64))
    results = [
        pixels(Augmentation(rotation=45, scale=(1, 1))(black, (64, 64), random.Random(seed))) for seed in range(10)
    ]
    corners = np.stack([result[[0, 0, -1, -1], [0, -1, 0, -1]].mean() for result in results])
    assert corners.max() > 250  # some angle is large
    assert all((result[32, 32] == 0).all() for result in results)


def test_color_jitter_changes_colors_within_bounds():
    gray = Image.new("RGB", (16, 16), (100, 100, 100))
    values = [pixels(Augmentation(color_jitter=0.2)(gray, (8, 8), random.Random(seed)))[0, 0, 0] for seed in range(50)]
    assert min(values) >= 79 and max(values) <= 121  # brightness alone moves a uniform gray
    assert max(values) - min(values) > 20


def test_grayscale_drops_all_color(image):
    result = pixels(Augmentation(grayscale=1.0)(image, (16, 16), random.Random(0)))
    assert result.shape == (16, 16, 3)
    assert (result[..., 0] == result[..., 1]).all() and (result[..., 1] == result[..., 2]).all()

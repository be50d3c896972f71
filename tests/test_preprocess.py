import io
import tracemalloc

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from clipmap_hf.data.calibration_pairs import CalibrationPairs
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.preprocess import preprocessed
from clipmap_hf.evaluation.labeled import labeled_batches


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def processor(resample: int = 3, crop: int = 32, **changes) -> CLIPImageProcessorPil:
    """One that leaves bytes, so that pixels can be compared exactly."""
    steps = {"do_rescale": False, "do_normalize": False} | changes
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop, resample=resample, **steps)


def plain(image_processor, image: Image.Image) -> torch.Tensor:
    return image_processor([image], return_tensors="pt")["pixel_values"]


USUAL = [(64, 48), (31, 45), (300, 100), (7, 125), (1, 17), (1, 1)]


@pytest.mark.parametrize("size", USUAL, ids=str)
def test_images_of_usual_shapes_are_left_to_the_processor(size, monkeypatch):
    monkeypatch.setattr(Image.Image, "crop", lambda *_: pytest.fail("it was cropped"))
    for image_processor in (CLIPImageProcessorPil(), SiglipImageProcessorPil()):
        pixels = preprocessed(image_processor, [noise(*size)])
        torch.testing.assert_close(pixels, plain(image_processor, noise(*size)), atol=0, rtol=0)


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("size", [(1, 18), (1, 201), (200, 1), (4, 1001), (8, 299), (2, 90)], ids=str)
@pytest.mark.parametrize("crop", [32, 27, 40])
def test_of_a_thin_image_the_pixels_are_those_of_the_processor(size, resample, crop):
    image_processor = processor(resample, crop)
    pixels = preprocessed(image_processor, [noise(*size)])
    torch.testing.assert_close(pixels, plain(image_processor, noise(*size)), atol=0, rtol=0)


@pytest.mark.parametrize("size", [(7, 313), (700, 12), (3, 400)], ids=str)
def test_where_the_processor_rounds_the_long_side_pixels_are_nearly_the_same(size):
    pixels, expected = (
        one.int() for one in (preprocessed(processor(), [noise(*size)]), plain(processor(), noise(*size)))
    )
    assert 32 * max(size) % min(size)
    torch.testing.assert_close(pixels, expected, atol=2, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"height": 32, "width": 32}},
        {"size": {"shortest_edge": 32, "longest_edge": 64}},
        {"do_resize": False},
        {"do_center_crop": False},
    ],
    ids=str,
)
def test_a_processor_that_reads_the_ends_of_an_image_gets_all_of_it(changes):
    image_processor = CLIPImageProcessorPil(**{"size": {"shortest_edge": 32}, "crop_size": 32} | changes)
    pixels = preprocessed(image_processor, [noise(4, 200)])
    torch.testing.assert_close(pixels, plain(image_processor, noise(4, 200)), atol=0, rtol=0)


def peak(call) -> int:
    """The most bytes that a call holds of what numpy allocates."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1)], ids=str)
def test_a_thin_image_takes_little_memory_whoever_reads_it(size, tiny_processor):
    buffer, images = io.BytesIO(), CLIPImageProcessorPil()
    noise(*size).save(buffer, "PNG")
    row = {"image": {"bytes": buffer.getvalue(), "path": None}, "caption": "a line", "label": 0}
    rows = datasets.Dataset.from_list([row])
    tiny_processor = type(tiny_processor)(image_processor=images, tokenizer=tiny_processor.tokenizer)
    readers = (
        lambda: PairCollator(tiny_processor.tokenizer, images)([row]),
        lambda: list(labeled_batches(rows, images, "label", ["line"])),
        lambda: list(CalibrationPairs(rows.cast_column("image", datasets.Image()), tiny_processor, 1)),
    )
    assert max(map(peak, readers)) < 50e6

import copy
import io
import itertools
import random

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from clipmap_hf.data.augment import Augmentation, SeededTransform
from clipmap_hf.data.collate import PairCollator, normalized_pixels
from clipmap_hf.data.images import decode_image


WHOLE = Augmentation(scale=(1.0, 1.0), ratio=(1.25, 1.25))  # the whole of an image of 40 by 32
SQUARE = {"size": {"height": 32, "width": 32}, "do_center_crop": False}


@pytest.fixture
def row() -> dict:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (40, 32), random.Random(0).randbytes(40 * 32 * 3)).save(buffer, "PNG")
    return {"image": {"bytes": buffer.getvalue(), "path": None}, "caption": "noise", "epoch": 0}


@pytest.fixture
def trained(tiny_tokenizer, row):
    """A function from an image processor, and an augmentation, to a training batch of one image."""

    def batch(image_processor, augmentation=WHOLE) -> dict[str, torch.Tensor]:
        return PairCollator(tiny_tokenizer, image_processor, augmentation=augmentation)([row])

    return batch


def processed(image_processor, row: dict) -> torch.Tensor:
    image = decode_image(row["image"]["bytes"])
    return image_processor([image], return_tensors="pt")["pixel_values"].float()


def combinations(**options) -> list[dict]:
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


@pytest.mark.parametrize(
    "changes",
    combinations(
        do_rescale=[True, False],
        rescale_factor=[1 / 255, 0.003921569, 1 / 127.5, 2],
        do_normalize=[True, False],
        mean_and_std=[([0.48, 0.45, 0.4], [0.26, 0.25, 0.27]), (0.5, 0.25), ([0, 0, 0], [1, 1, 1])],
    ),
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_bytes_become_what_the_processor_makes_of_them(trained, row, changes):
    image_mean, image_std = changes.pop("mean_and_std")
    image_processor = CLIPImageProcessorPil(**SQUARE, image_mean=image_mean, image_std=image_std, **changes)
    batch = trained(image_processor)
    assert batch["pixel_values"].dtype == torch.uint8
    torch.testing.assert_close(normalized_pixels(batch), processed(image_processor, row), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("resample", [*Image.Resampling][:6], ids=lambda one: one.name)
@pytest.mark.parametrize("size", [(32, 32), (64, 32), (20, 48)], ids=str)
def test_a_crop_is_resized_as_the_processor_resizes(trained, row, resample, size):
    height, width = size
    image_processor = SiglipImageProcessorPil(size={"height": height, "width": width}, resample=resample)
    pixels = normalized_pixels(trained(image_processor))
    assert pixels.shape == (1, 3, height, width)
    torch.testing.assert_close(pixels, processed(image_processor, row), atol=2e-6, rtol=1e-6)


def test_mean_and_std_that_are_not_used_may_be_missing(trained, row):
    image_processor = CLIPImageProcessorPil(**SQUARE, do_normalize=False)
    image_processor.image_mean = image_processor.image_std = None
    pixels = normalized_pixels(trained(image_processor))
    torch.testing.assert_close(pixels, processed(image_processor, row), atol=2e-6, rtol=1e-6)


REFUSED = {
    "do_resize": ({"do_resize": False}, "do_resize=True"),
    "padding": ({**SQUARE, "do_pad": True, "pad_size": 40}, "do_pad=False"),
    "no center crop": ({"size": {"shortest_edge": 32}, "do_center_crop": False}, "no fixed size"),
    "longest edge": ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "no fixed size"),
    "larger crop": ({"size": {"shortest_edge": 32}, "crop_size": 40}, "pads"),
    "larger crop of a fixed size": ({"size": {"height": 32, "width": 48}, "crop_size": 40}, "pads"),
    "oblong crop": ({"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 32}}, "height and width"),
    "another step": ({**SQUARE, "do_convert_rgb": False}, "do_flip_channel_order=False"),
    "nothing left": ({**SQUARE, "rescale_factor": 0.0}, "other than 0"),
    "no filter": ({**SQUARE, "resample": 17}, "resample=17"),
    "means of four channels": ({**SQUARE, "image_mean": [0.5] * 4}, "three channels"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("augmentation", [Augmentation(), SeededTransform(lambda image: image)], ids=["ours", "own"])
def test_a_processor_that_training_cannot_follow_is_refused(tiny_tokenizer, name, augmentation):
    changes, words = REFUSED[name]
    image_processor = CLIPImageProcessorPil(**changes)
    image_processor.do_flip_channel_order = name == "another step"
    with pytest.raises(ValueError, match=words):
        PairCollator(tiny_tokenizer, image_processor, augmentation=augmentation)
    PairCollator(tiny_tokenizer, image_processor)  # evaluation is the processor's own business


def test_images_of_a_callers_transform_have_the_processors_height_and_width(trained, row):
    image_processor = CLIPImageProcessorPil(size={"height": 64, "width": 32}, do_center_crop=False, do_rescale=False)
    pixels = normalized_pixels(trained(image_processor, SeededTransform(lambda image: image.resize((32, 64), 3))))
    torch.testing.assert_close(pixels, processed(image_processor, row), atol=2e-6, rtol=1e-6)
    with pytest.raises(ValueError, match=r"shape \(3, 64, 32\), got \(3, 32, 64\)"):
        trained(image_processor, SeededTransform(lambda image: image.resize((64, 32))))


def test_tensors_of_a_callers_transform_are_not_touched(trained):
    values = torch.rand(3, 32, 32)
    for do_normalize in (True, False):
        image_processor = CLIPImageProcessorPil(**SQUARE, do_normalize=do_normalize)
        pixels = normalized_pixels(trained(image_processor, SeededTransform(lambda image: values)))
        torch.testing.assert_close(pixels[0], values, atol=0, rtol=0)


def test_bytes_of_a_callers_transform_are_refused(trained):
    """They would reach the model as they are, not normalized."""
    transform = SeededTransform(lambda image: torch.zeros(3, 32, 32, dtype=torch.uint8))
    with pytest.raises(TypeError, match="tensor of floats, .*got one of torch.uint8"):
        trained(CLIPImageProcessorPil(**SQUARE), transform)


def test_the_first_loss_of_a_teacher_that_normalizes_in_its_weights_is_that_of_the_teacher(tiny_teacher, trained):
    """The first layer is linear, so it can subtract the mean and divide by the standard deviation."""
    usual = CLIPImageProcessorPil(**SQUARE)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (usual.image_mean, usual.image_std))
    folded = copy.deepcopy(tiny_teacher)
    embeddings = folded.vision_model.embeddings
    with torch.no_grad():
        embeddings.patch_embedding.weight /= std
        embeddings.position_embedding.weight[1:] -= (embeddings.patch_embedding.weight * mean).sum((1, 2, 3))

    @torch.no_grad()
    def first_loss(model, image_processor) -> torch.Tensor:
        batch = trained(image_processor, Augmentation())
        pixels, ids = normalized_pixels(batch), batch["input_ids"]
        pixels, ids = torch.cat([pixels, pixels.flip(-1)]), torch.cat([ids, ids.flip(-1)])
        return model(input_ids=ids, pixel_values=pixels, return_loss=True).loss

    expected = first_loss(tiny_teacher, usual)
    found = first_loss(folded, CLIPImageProcessorPil(**SQUARE, do_normalize=False))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

"""What training does in place of an image processor, whose resizing and cropping an augmentation takes over."""

from typing import Any, NamedTuple

from PIL import Image

from clipmap_hf.models.image_settings import image_settings


__all__ = ["USUAL_DIVISOR", "TrainingPixels", "training_pixels"]

_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
USUAL_DIVISOR = 255.0  # of bytes, which makes them numbers from 0 to 1


class TrainingPixels(NamedTuple):
    """
    How training images are resized and normalized.

    Attributes:
        size: Height and width in pixels.
        resample: Filter that resizes a crop.
        divisor: Bytes are divided by it.
        mean: It is subtracted from the three channels then.
        std: They are divided by it last.
    """

    size: tuple[int, int]
    resample: Image.Resampling
    divisor: float
    mean: list[float]
    std: list[float]


def training_pixels(image_processor: Any) -> TrainingPixels:
    """
    Reads from an image processor how training images are resized and normalized, so that they become what the
    processor makes of them. Where the processor resizes and then crops the center, training resizes its random crop to
    the size of the center.

    Args:
        image_processor: The model's image processor.

    Raises:
        ValueError: If the processor takes a step that training does not, leaves images of different sizes, or adds
            borders to them.
    """
    settings = image_settings(image_processor)
    _check_steps(settings)
    mean, std = settings.get("image_mean", [0.0] * 3), settings.get("image_std", [1.0] * 3)
    _refuse(len(mean) != 3 or len(std) != 3, f"image_mean={mean} and image_std={std}", "Set values of three channels.")
    factor, resample = settings.get("rescale_factor", 1.0), settings["resample"]
    _refuse(not factor, f"rescale_factor={factor}", "Set a number other than 0.")
    filters = {one.value: one.name for one in Image.Resampling}
    _refuse(resample not in filters, f"resample={resample}", f"Set one of {filters}.")
    return TrainingPixels(_size(settings), Image.Resampling(resample), 1 / factor, mean, std)


def _check_steps(settings: dict[str, Any]) -> None:
    _refuse(
        "do_resize" not in settings,
        "do_resize=False",
        "Set do_resize=True, since random crops are resized; images that have the size already do not change by it.",
    )
    steps = [name for name in settings if name.startswith("do_")]
    others = [step for step in steps if step not in _STEPS]
    _refuse(
        bool(others),
        " and ".join(f"{step}=True" for step in others),
        f"Set {' and '.join(f'{step}=False' for step in others)}.",
    )


def _size(settings: dict[str, Any]) -> tuple[int, int]:
    """Height and width of all that the processor makes."""
    size, crop = settings["size"], settings.get("crop_size")
    given, square = f"size={size} and crop_size={crop}", list(size) == ["shortest_edge"]
    _refuse(
        sorted(size) != ["height", "width"] and not (square and crop),
        f"{given}, which gives images of no fixed size",
        "Set size to height and width, or to shortest_edge with do_center_crop=True.",
    )
    height, width = (size["shortest_edge"],) * 2 if square else (size["height"], size["width"])
    if crop is None:
        return height, width
    _refuse(
        square and crop["height"] != crop["width"],
        f"{given}, which does not resize images to that shape",
        "Set size to height and width.",
    )
    _refuse(
        crop["height"] > height or crop["width"] > width,
        f"{given}, which pads images with black borders",
        "Set a crop_size that is not larger than size.",
    )
    return crop["height"], crop["width"]


def _refuse(wrong: bool, given: str, remedy: str) -> None:
    if wrong:
        raise ValueError(f"Training cannot do what an image processor does that has {given}. {remedy}")

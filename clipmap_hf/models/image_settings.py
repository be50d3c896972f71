"""The settings of an image processor that change the pixels of an RGB image."""

from collections.abc import Collection
from typing import Any


__all__ = ["image_settings"]

_SETTINGS = {
    "do_resize": ("size", "resample"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
    "do_pad": ("pad_size",),
}
_WITHOUT_EFFECT = {"do_convert_rgb"}  # on an image that is RGB


def image_settings(image_processor: Any) -> dict[str, Any]:
    """
    Returns the steps that an image processor takes, as `{"do_resize": True, …}`, and the settings of these steps. What
    it leaves out has no entry, so two processors with equal entries make equal pixels.

    Args:
        image_processor: An image processor of `transformers`.
    """
    names = {*_SETTINGS, *vars(image_processor)} - _WITHOUT_EFFECT
    steps = sorted(name for name in names if name.startswith("do_") and getattr(image_processor, name, None))
    settings = {name: getattr(image_processor, name) for step in steps for name in _SETTINGS.get(step, ())}
    return dict.fromkeys(steps, True) | {name: _plain(name, value) for name, value in settings.items()}


def _plain(name: str, value: Any) -> Any:
    """A value in the one form that all spellings of it have."""
    if name in ("size", "crop_size", "pad_size"):
        return None if value is None else dict(value)
    if name in ("image_mean", "image_std"):
        return list(value) if isinstance(value, Collection) else [value] * 3
    return value

"""Holds out a share of pairs for validation, so that equal images are never on both sides."""

from typing import Any

from datasets import Dataset

from clipmap_hf.data.images import BadRowError, image_bytes
from clipmap_hf.data.keys import is_held_out


__all__ = ["validation_part"]


def validation_part(pairs: Dataset, fraction: float, *, held_out: bool) -> Dataset:
    """
    Takes the pairs that are held out, or all others. The content of an image decides by itself on which side it is,
    so both sides stay the same in any order, process and run.

    Args:
        pairs: The result of `load_pairs`.
        fraction: Share of the images to hold out.
        held_out: Whether to take the pairs that are held out.
    """
    if not fraction:
        return pairs
    return pairs.filter(_is_on_side, input_columns=["image"], fn_kwargs={"fraction": fraction, "held_out": held_out})


def _is_on_side(image: Any, fraction: float, held_out: bool) -> bool:
    try:
        return is_held_out(image_bytes(image), fraction) == held_out
    except BadRowError:
        return not held_out  # training counts it

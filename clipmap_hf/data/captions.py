"""The texts of a caption: strings, lists of keywords, and lists that a string holds as JSON."""

import json
import random
from typing import Any

from clipmap_hf.data.images import BadRowError


__all__ = ["caption_text", "draw_text", "filled_texts"]


def filled_texts(caption: Any) -> list[str]:
    """
    Returns the texts of a caption: a string, a list of strings, or such a list as JSON in a string (the captions of
    Flickr30k lie on the Hub so). Blank texts are left out.
    """
    texts = _listed(caption)
    return [text for text in (texts if isinstance(texts, list) else [texts]) if isinstance(text, str) and text.strip()]


def _listed(caption: Any) -> Any:
    """The list that a string holds as JSON, if it holds one of strings; else the caption as it is."""
    if not isinstance(caption, str) or not caption.lstrip().startswith("["):
        return caption
    try:
        found = json.loads(caption)
    except (ValueError, RecursionError):  # no JSON, or of numbers or depths that Python does not read
        return caption
    return found if all(isinstance(text, str) for text in found) else caption


def caption_text(caption: str | list[str] | None, rng: random.Random | None = None) -> str:
    """
    Returns a caption as a single string.

    Args:
        caption: A string, or a list of strings (keywords), which are joined by commas.
        rng: If it is given, a random number of the keywords is joined, in random order. By default, all are joined.

    Raises:
        BadRowError: If all texts are blank.
    """
    words = filled_texts(caption)
    if not words:
        raise BadRowError(_without_text(caption), repr(caption))
    if isinstance(_listed(caption), str):
        return caption
    if rng is not None:
        words = rng.sample(words, k=rng.randint(1, len(words)))
    return ", ".join(words)


def _without_text(caption: Any) -> str:
    """Says why a caption has no text: it is missing or blank, or it is of another type."""
    values = caption if isinstance(caption, list) else [caption]
    kinds = {type(value).__name__ for value in values if value is not None and not isinstance(value, str)}
    return f"caption of type {' and '.join(sorted(kinds))}" if kinds else "no caption"


def draw_text(caption: Any, rng: random.Random) -> Any:
    """Draws one of the texts of a caption. A caption without any is returned as it is: `caption_text` says why."""
    texts = filled_texts(caption)
    return rng.choice(texts) if texts else caption

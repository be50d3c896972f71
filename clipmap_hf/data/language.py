"""Tells whether a tokenizer knows the language of texts, or spells it byte by byte."""

import unicodedata
from collections.abc import Sequence
from typing import Any

from clipmap_hf.data.prompts import DEFAULT_TEMPLATES


__all__ = ["spelling_warning"]

_ENGLISH = [template.replace("{}", "dog") for template in DEFAULT_TEMPLATES]
_TIMES_ENGLISH = 3  # as many tokens a letter are far above English; other European languages take up to twice as many
_UNKNOWN = 0.1  # share of unknown tokens


def spelling_warning(tokenizer: Any, texts: Sequence[str]) -> str | None:
    """
    Returns a warning if a tokenizer hardly knows the language of texts, whose model then knows little of it either.
    It does if it takes more than one token a character, or a letter three times as many as in English, or if a tenth
    of the tokens are unknown.

    Args:
        tokenizer: The model's tokenizer.
        texts: Some texts.
    """
    characters = [character for text in texts for character in text if not character.isspace()]
    if not characters:
        return None
    ids = _token_ids(tokenizer, texts)
    rate, unknown = len(ids) / len(characters), ids.count(tokenizer.unk_token_id) / max(1, len(ids))
    english = len(_token_ids(tokenizer, _ENGLISH)) / sum(len("".join(text.split())) for text in _ENGLISH)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in characters)
    # A character of Chinese or Japanese is as much as a short word, so a token for each is what a tokenizer knows.
    most = 1.0 if wide > len(characters) / 2 else min(1.0, _TIMES_ENGLISH * english)
    if rate <= most and unknown <= _UNKNOWN:
        return None
    return (
        f"The tokenizer hardly knows the language of the texts, such as {texts[0][:40]!r}: it takes {rate:.2f} tokens "
        f"a character, {english:.2f} in English, and {unknown:.0%} of them are unknown. So the teacher has little to "
        "teach about them. Take a teacher of their language, or texts in a language that it knows."
    )


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [token for ids in encoded for token in ids]

"""Short texts made of English nouns and adjectives, for those who have no texts of their own."""

import random
import re
from importlib.resources import files

from clipmap_hf.files.extras import require


__all__ = ["word_texts"]

# How a text is made, and how often: about as long as the captions of drawings, products and photographs.
_PATTERNS = {
    "{noun}": 4,
    "{adjective} {noun}": 3,
    "a photo of a {noun}": 1,
    "a {adjective} {noun} and a {noun}": 1,
    "a {noun} with a {adjective} {noun}": 1,
}


def word_texts(number: int, seed: int = 0) -> list[str]:
    """
    Makes different short texts of the word list of the package `wonderwords` (MIT license), without its profane words.

    Args:
        number: How many texts. The first ones of a larger number are the same.
        seed: Seed of the draw.

    Raises:
        ImportError: If the extra `words` is not installed.
    """
    require("words", "wonderwords")
    profane = set(_listed("profanitylist.txt"))
    words = {
        kind: [word for word in _listed(f"{kind}list.txt") if word not in profane] for kind in ("noun", "adjective")
    }
    rng, texts = random.Random(f"words-{seed}"), {}
    while len(texts) < number:
        (pattern,) = rng.choices(list(_PATTERNS), list(_PATTERNS.values()))
        text = " ".join(rng.choice(words[part[1:-1]]) if part[0] == "{" else part for part in pattern.split())
        texts.setdefault(re.sub(r"\ba (?=[aeiou])", "an ", text))
    return list(texts)


def _listed(name: str) -> list[str]:
    lines = (files("wonderwords") / "assets" / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]

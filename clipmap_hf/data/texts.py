"""Texts that images are trained beside without belonging to them: from files, class names or a word list."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow.parquet as pq

from clipmap_hf.data.prompts import DEFAULT_TEMPLATES
from clipmap_hf.data.words import word_texts


__all__ = ["CAPTIONS", "Texts", "load_texts"]

CAPTIONS = "captions"
_WORDS, _LABELS = "words", "labels:"
_WORD_TEXTS = 20_000


@dataclass(frozen=True)
class Texts:
    """
    Sources of texts, each with a weight. A text is drawn from one of them, in proportion to the weights.

    Args:
        sources: The texts of each source, by its name. `captions` stands for the caption of the image's own row, and
            has none.
        weights: The weight of each source, by its name.

    Raises:
        ValueError: If a weight is not above 0, or a source other than `captions` has no texts.
    """

    sources: Mapping[str, Sequence[str]]
    weights: Mapping[str, float]

    def __post_init__(self):
        for name, texts in self.sources.items():
            if not 0 < self.weights[name] < float("inf"):
                raise ValueError(f"The texts {name!r} have the weight {self.weights[name]}; it must be above 0.")
            if not texts and name != CAPTIONS:
                raise ValueError(f"There are no texts in {name!r}.")

    @property
    def pairs(self) -> bool:
        """Whether each text belongs to its image."""
        return set(self.sources) == {CAPTIONS}

    @property
    def has_captions(self) -> bool:
        """Whether the captions of the rows are among the sources."""
        return CAPTIONS in self.sources

    @property
    def distinct(self) -> list[str]:
        """The different texts of all sources, in their order; the captions of rows are not among them."""
        return list(dict.fromkeys(text for texts in self.sources.values() for text in texts))

    @cached_property
    def digest(self) -> str:
        """Tells these texts and weights from others."""
        content = [[name, self.weights[name], list(texts)] for name, texts in self.sources.items()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def draw(self, rng: random.Random) -> str | None:
        """Draws a text; `None` stands for the caption of the image's own row."""
        (name,) = rng.choices(list(self.sources), [self.weights[name] for name in self.sources])
        return None if name == CAPTIONS else rng.choice(self.sources[name])


def load_texts(names: Sequence[str], given: Sequence[str] = ()) -> Texts | None:
    """
    Loads texts.

    Args:
        names: Where they come from: a text file (`queries.txt`, a text a line), class names with CLIP's prompts
            (`labels:names.txt`, a name a line), a column of a parquet file (`pairs.parquet:title`), `words` (made of a
            word list), or `captions` (of the images' own rows). `name=2` draws twice as often as `name`.
        given: Texts that a program holds already.

    Returns:
        The texts, or `None` if nothing is named or given.

    Raises:
        ValueError: If a source is none of these, is named twice, or has no texts.
        TypeError: If a single string is given.
        OSError: If a file cannot be read.
        ImportError: If `words` is named, and the extra of this name is not installed.
    """
    if isinstance(given, str):
        raise TypeError(f"The texts are the one string {given[:40]!r}; give a list of texts, or name a file.")
    sources, weights = ({"given": list(given)}, {"given": 1.0}) if given else ({}, {})
    for word in names:
        name, weight = _weighted(word)
        if name in sources:
            raise ValueError(f"The texts {name!r} are named twice; give them a weight instead: '{name}=2'.")
        sources[name], weights[name] = _texts_of(name), weight
    return Texts(sources, weights) if sources else None


def _weighted(word: str) -> tuple[str, float]:
    name, equals, weight = word.rpartition("=")
    try:
        return (name, float(weight)) if equals else (word, 1.0)
    except ValueError:
        return word, 1.0  # an equals sign in a file's name


def _texts_of(name: str) -> list[str]:
    if name == CAPTIONS:
        return []
    if name == _WORDS:
        return word_texts(_WORD_TEXTS)
    if name.startswith(_LABELS):
        labels = _lines(name.removeprefix(_LABELS))
        return [template.replace("{}", label) for label in labels for template in DEFAULT_TEMPLATES]
    path, _, column = name.rpartition(":")
    if path.endswith(".parquet"):
        return _column(path, column)
    if name.endswith(".txt"):
        return _lines(name)
    raise ValueError(
        f"train_texts={name!r} names no texts. Allowed are a file of texts ('queries.txt'), of class names "
        f"('{_LABELS}names.txt'), a column ('pairs.parquet:caption'), {_WORDS!r}, and {CAPTIONS!r}."
    )


def _lines(path: str) -> list[str]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _column(path: str, column: str) -> list[str]:
    found = pq.read_schema(path).names
    if column not in found:
        raise ValueError(f"{path!r} has no column {column!r}; it has {found}.")
    texts = pq.read_table(path, columns=[column]).column(0).to_pylist()
    flat = (text for entry in texts for text in (entry if isinstance(entry, list) else [entry]))
    return list(dict.fromkeys(text for text in flat if isinstance(text, str) and text.strip()))

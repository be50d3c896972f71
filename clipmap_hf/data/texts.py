"""Texts that images are trained beside without belonging to them: sources with weights, from which texts are drawn."""

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from clipmap_hf.data.text_sources import CAPTIONS, WORDS, read_texts


__all__ = ["FEW_TEXTS", "Texts", "load_texts", "with_words"]

logger = logging.getLogger(__name__)

FEW_TEXTS = 1  # Images whose captions are not read get `words` beside fewer different texts than these.
_GIVEN = "given"


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

    @property
    def names(self) -> list[str]:
        """What `load_texts` makes these texts of, beside those that a program held already."""
        weights = {name: str(weight).removesuffix(".0") for name, weight in self.weights.items()}
        shown = {name: f"={weight}" if weight != "1" else "" for name, weight in weights.items()}
        return [f"{name}{shown[name]}" for name in self.sources if name != _GIVEN]

    @cached_property
    def digest(self) -> str:
        """Tells these texts and weights from others."""
        content = [[name, self.weights[name], list(texts)] for name, texts in self.sources.items()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def draw(self, rng: random.Random, captions: bool = True) -> str | None:
        """Draws a text; `None` stands for the caption of the image's own row, which `captions=False` leaves out."""
        names = [name for name in self.sources if captions or name != CAPTIONS]
        if not names:
            return None
        (name,) = rng.choices(names, [self.weights[name] for name in names])
        return None if name == CAPTIONS else rng.choice(self.sources[name])


def load_texts(names: Sequence[str], given: Sequence[str] = ()) -> Texts | None:
    """
    Loads texts.

    Args:
        names: Where they come from: what `read_texts` takes, or `captions` (of the images' own rows). `name=2` draws
            twice as often as `name`.
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
    sources, weights = ({_GIVEN: list(given)}, {_GIVEN: 1.0}) if given else ({}, {})
    for word in names:
        name, weight = _weighted(word)
        if name in sources:
            raise ValueError(f"The texts {name!r} are named twice; give them a weight instead: '{name}=2'.")
        sources[name], weights[name] = [] if name == CAPTIONS else read_texts(name), weight
    return Texts(sources, weights) if sources else None


def with_words(texts: Texts) -> Texts:
    """
    Adds `words` to texts of which fewer than `FEW_TEXTS` are different; captions of rows do not count. So images
    without captions are enough to train on.

    Raises:
        ImportError: If there are no texts at all, and the extra `words` is not installed.
    """
    if WORDS in texts.sources or _has_different(texts, FEW_TEXTS):
        return texts
    number = len(texts.distinct)
    try:
        words = read_texts(WORDS)
    except ImportError as error:
        if not number:
            raise ImportError(f"Images without captions need texts. Name some in train_texts, or: {error}") from error
        logger.warning("There are only %d different texts, and `words` cannot be added to them: %s", number, error)
        return texts
    logger.info("There are %d different texts beside captions; %d of `words` are added.", number, len(words))
    return Texts({**texts.sources, WORDS: words}, {**texts.weights, WORDS: 1.0})


def _has_different(texts: Texts, number: int) -> bool:
    """Whether at least so many texts are different; of millions, not all are looked at."""
    found: set[str] = set()
    for text in chain.from_iterable(texts.sources.values()):
        if len(found) >= number:
            break
        found.add(text)
    return len(found) >= number


def _weighted(word: str) -> tuple[str, float]:
    name, equals, weight = word.rpartition("=")
    try:
        return (name, float(weight)) if equals else (word, 1.0)
    except ValueError:
        return word, 1.0  # an equals sign in a file's name

"""A fixed list of texts that a student is made for: queries as they are, or class names in CLIP's prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from clipmap_hf.data.prompts import DEFAULT_TEMPLATES
from clipmap_hf.data.text_sources import CLASS_NAMES
from clipmap_hf.data.texts import Texts, load_texts


__all__ = ["LabelArguments", "Labels", "load_labels"]


@dataclass
class LabelArguments:
    """A fixed list of texts."""

    labels: str | None = field(
        default=None,
        metadata={
            "help": "All texts that will be asked: queries.txt (a text a line), labels:names.txt (class names), or "
            "pairs.parquet:caption. Only a vision tower is then trained, and written with the teacher's embeddings "
            "of the list; images need no captions."
        },
    )

    @property
    def loaded(self) -> "Labels | None":
        """The list, read; `None` if there is none."""
        return None if self.labels is None else load_labels(self.labels)


@dataclass(frozen=True)
class Labels:
    """
    A fixed list of texts.

    Args:
        names: The different labels, in their order.
        templates: Prompts with `{}` in place of a label, whose embeddings are averaged; `{}` alone takes it as it is.
        texts: All texts that the list stands for.
    """

    names: Sequence[str]
    templates: Sequence[str]
    texts: Texts


def load_labels(given: str | Sequence[str]) -> Labels:
    """
    Loads a list of labels.

    Args:
        given: Where they come from: a text file (`queries.txt`, a text a line), class names with CLIP's prompts
            (`labels:names.txt`, a name a line), or a column of a parquet file (`pairs.parquet:caption`). Or the labels
            themselves, in a list.

    Raises:
        ValueError: If `given` is none of these, or there are fewer than two different labels.
        OSError: If a file cannot be read.
    """
    if not isinstance(given, str):
        names = list(dict.fromkeys(given))
        return Labels(_enough(names), ("{}",), load_texts([], names))
    source = given.removeprefix(CLASS_NAMES)
    if not source.endswith(".txt") and ".parquet:" not in source:
        raise ValueError(
            f"labels={given!r} names no list of texts. Give a text file ('queries.txt', a text a line), class names "
            f"('{CLASS_NAMES}names.txt') or a column ('pairs.parquet:caption')."
        )
    listed = load_texts([source])
    if source == given:
        return Labels(_enough(listed.distinct), ("{}",), listed)
    return Labels(_enough(listed.distinct), DEFAULT_TEMPLATES, load_texts([given]))


def _enough(names: Sequence[str]) -> Sequence[str]:
    if len(names) < 2:
        raise ValueError(f"The labels are {list(names)}; an image is told apart by at least two different ones.")
    return names

"""Parts texts into those that are trained on and those on which a student's agreement with its teacher is measured."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from clipmap_hf.data.keys import content_key, is_held_out
from clipmap_hf.data.texts import Texts


__all__ = ["MOST_EVALUATED", "PartedTexts", "parted_texts"]

MOST_EVALUATED = 2000  # each evaluation encodes them all


@dataclass(frozen=True)
class PartedTexts:
    """
    Texts for training and for evaluation.

    Args:
        trained: What is trained on.
        held_out: What is not; empty if nothing is held out.
    """

    trained: Texts
    held_out: Collection[str] = ()

    @cached_property
    def evaluated(self) -> Sequence[str]:
        """
        What agreement is measured on: what is held out, or else what is trained on. There are at most `MOST_EVALUATED`
        texts; their content decides which.
        """
        return sorted(self.held_out or self.trained.distinct, key=content_key)[:MOST_EVALUATED]


def parted_texts(texts: Texts, fraction: float) -> PartedTexts:
    """
    Holds out a share of the texts. The content of a text decides by itself on which side it is, so it stays there when
    other texts are added. If fewer than two texts were held out, or a source were left without any, none is.

    Args:
        texts: What is given.
        fraction: Share of the different texts to hold out.
    """
    if not fraction:
        return PartedTexts(texts)
    held_out = {text for text in texts.distinct if is_held_out(text, fraction)}
    trained = {name: [text for text in own if text not in held_out] for name, own in texts.sources.items()}
    is_emptied = any(texts.sources[name] and not own for name, own in trained.items())
    if len(held_out) < 2 or is_emptied:
        return PartedTexts(texts)
    return PartedTexts(Texts(trained, texts.weights), held_out)

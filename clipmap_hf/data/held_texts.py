"""Parts texts into those that are trained on and those on which a student's agreement with its teacher is measured."""

from typing import NamedTuple

from clipmap_hf.data.keys import content_key, is_held_out
from clipmap_hf.data.texts import Texts


__all__ = ["MOST_EVALUATED", "PartedTexts", "parted_texts"]

MOST_EVALUATED = 2000  # each evaluation encodes them all


class PartedTexts(NamedTuple):
    """
    Texts for training and for evaluation.

    Args:
        trained: What is trained on.
        evaluated: What agreement is measured on.
        held_out: Whether none of the latter is trained on.
    """

    trained: Texts
    evaluated: list[str]
    held_out: bool


def parted_texts(texts: Texts, fraction: float) -> PartedTexts:
    """
    Holds out a share of the texts. The content of a text decides by itself on which side it is, so it stays there when
    other texts are added. If fewer than two texts were held out, or a source were left without any, all texts are
    trained on and evaluated. At most `MOST_EVALUATED` texts are evaluated; their content decides which.

    Args:
        texts: What is given.
        fraction: Share of the different texts to hold out.
    """
    ordered = sorted(texts.distinct, key=content_key)
    held_out = {text for text in ordered if is_held_out(text, fraction)}
    trained = {name: [text for text in own if text not in held_out] for name, own in texts.sources.items()}
    is_emptied = any(texts.sources[name] and not own for name, own in trained.items())
    if len(held_out) < 2 or is_emptied:
        return PartedTexts(texts, ordered[:MOST_EVALUATED], False)
    evaluated = [text for text in ordered if text in held_out]
    return PartedTexts(Texts(trained, texts.weights), evaluated[:MOST_EVALUATED], True)

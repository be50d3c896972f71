"""Texts to calibrate on beside those of pairs: what training draws, of rows whose images are not looked at."""

import random
from dataclasses import replace

from datasets import Dataset, IterableDataset

from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.images import BadRowError


__all__ = ["further_texts"]

_TRIES = 4  # times as many draws as texts: of few texts, many are drawn again


def further_texts(rows: Dataset | IterableDataset, collator: PairCollator, count: int, seed: int) -> list[str]:
    """
    Draws different texts as training does, without decoding an image. A text tower is calibrated on more texts than
    there are images: they cost little, and it is their number that it lacks.

    Args:
        rows: Of a stream, whose texts come with their images, none are drawn.
        collator: That of training. The rows may lack some of its columns.
        count: How many, at most; of few texts, there may be fewer.
        seed: Of the draw.

    Returns:
        The texts; none if training draws none.
    """
    if not isinstance(rows, Dataset):
        return []
    captions, keywords = (
        [name for name in columns if name in rows.column_names]
        for columns in (collator.caption_columns, collator.keyword_columns)
    )
    if not (captions or collator.texts):
        return []
    collator = replace(collator, caption_columns=captions, keyword_columns=keywords)
    texts, rng, found = rows.select_columns([*captions, *keywords]), random.Random(seed), {}
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        row = texts[rng.randrange(len(rows))] if texts.column_names else {}  # images alone have none
        try:
            found[collator.text(row, rng)] = None
        except BadRowError:
            continue  # training leaves such a row out, and counts it
    return list(found)

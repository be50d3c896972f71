"""Loads image–text pairs, or images alone, for evaluation: all in order, with all captions."""

from typing import Any

from torch.utils.data import DataLoader

from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.loader import start_worker
from clipmap_hf.data.pairs import PairSource, load_pairs
from clipmap_hf.distributed import process_count, process_index


__all__ = ["evaluation_pairs"]


def evaluation_pairs(
    source: PairSource,
    processor: Any,
    *,
    split: str = "train",
    image_column: str = "image",
    caption_column: str | None = "caption",
    batch_size: int = 256,
    num_workers: int = 0,
) -> DataLoader:
    """
    Loads batches of preprocessed pairs. Several processes share the pairs.

    Args:
        source: What `load_pairs` reads.
        processor: Tokenizer and image processor of the model.
        split: Split of the data set. Plain files have only `train`.
        image_column: Column of the images.
        caption_column: Column of the captions: strings, or lists of strings. `None` loads images alone.
        batch_size: Images per batch.
        num_workers: Worker processes that decode images.

    Raises:
        ValueError: If there are fewer pairs than processes.
    """
    captions = [] if caption_column is None else [caption_column]
    pairs = load_pairs(source, split=split, image_column=image_column, caption_columns=captions)
    collator = PairCollator(processor.tokenizer, processor.image_processor, captions)
    if len(pairs) < process_count():
        name = repr(source) if isinstance(source, str) else "The evaluation data"
        raise ValueError(f"{name} has {len(pairs)} pairs, fewer than the {process_count()} processes.")
    pairs = pairs.shard(process_count(), process_index(), contiguous=True)
    return DataLoader(pairs, batch_size, collate_fn=collator, num_workers=num_workers, worker_init_fn=start_worker)

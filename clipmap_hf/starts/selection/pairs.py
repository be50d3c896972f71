"""What criteria read of batches of pairs: images, texts, and whose text each is."""

from collections.abc import Iterable, Iterator, Mapping

import torch

from clipmap_hf.data.held_batches import HeldBatches


__all__ = ["first_texts", "pair_batches"]

Batch = Mapping[str, torch.Tensor]


def pair_batches(batches: Iterable[Batch]) -> Iterator[dict[str, torch.Tensor]]:
    """
    Yields batches with all that is known of their pairs. An image may have several texts, but has at least one.

    Args:
        batches: Batches of `pixel_values` and `input_ids`. Without `attention_mask`, all tokens count. Without
            `image_of_text`, text `i` belongs to image `i`.

    Yields:
        `pixel_values`, `input_ids`, `attention_mask` if it is given, and `image_of_text`, `(texts,)`.

    Raises:
        TypeError: If `batches` is an iterator.
        ValueError: If there are no images or no texts, or `image_of_text` does not fit them.
    """
    for batch in batches if isinstance(batches, HeldBatches) else HeldBatches(batches):
        missing = [name for name in ("pixel_values", "input_ids") if name not in batch]
        if missing:
            raise ValueError(
                f"A batch of pairs to score parts by needs images and captions; {missing} is missing, there is "
                f"{sorted(batch)}. Give data with both; for images alone, take the initializer 'calibrated' or "
                "'importance'."
            )
        images, texts = len(batch["pixel_values"]), len(batch["input_ids"])
        owners = batch["image_of_text"] if "image_of_text" in batch else torch.arange(texts)
        if len(owners) != texts or set(owners.tolist()) != set(range(images)):
            raise ValueError(
                f"image_of_text must name one of {images} images for each of {texts} texts, and leave out no image. "
                "Without it, there must be as many texts as images."
            )
        given = ("pixel_values", "input_ids", "attention_mask")
        yield {name: batch[name] for name in given if name in batch} | {"image_of_text": owners}


def first_texts(image_of_text: torch.Tensor) -> torch.Tensor:
    """Returns the index of the first text of each image, `(images,)`. Every image must have a text."""
    counts = image_of_text.bincount()
    return image_of_text.argsort(stable=True)[counts.cumsum(0) - counts]

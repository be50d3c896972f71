"""What calibration reads of batches; where there are no texts, it makes them up."""

from collections.abc import Iterable, Mapping

import torch
from transformers import PretrainedConfig

from clipmap_hf.data.held_batches import HeldBatches
from clipmap_hf.distributed import process_count, process_index
from clipmap_hf.models.towers import ends_at_largest_id


__all__ = ["CalibrationBatches", "calibration_batch"]


class CalibrationBatches:
    """
    Batches as calibration reads them, from the start at every iteration; what is behind them is read once.

    Args:
        batches: Of `pixel_values` and, if there are captions, `input_ids`.
        config: The teacher's.

    Raises:
        TypeError: If `batches` is an iterator.
    """

    def __init__(self, batches: Iterable[Mapping[str, torch.Tensor]], config: PretrainedConfig):
        self.batches = batches if isinstance(batches, HeldBatches) else HeldBatches(batches)
        self.config = config

    def __iter__(self):
        return (calibration_batch(batch, self.config, index) for index, batch in enumerate(self.batches))


def calibration_batch(
    batch: Mapping[str, torch.Tensor], config: PretrainedConfig, index: int
) -> dict[str, torch.Tensor]:
    """
    What calibration reads of a batch: `pixel_values` and `input_ids`. Where there are no texts, as many as images are
    made up of random tokens, the same for the same `index` of the batch.

    Args:
        batch: With `pixel_values` and, if there are captions, `input_ids`.
        config: The teacher's.
        index: Of the batch, in its process.

    Raises:
        ValueError: If there are no images.
    """
    if "pixel_values" not in batch:
        raise ValueError(
            f"A calibration batch needs pixel_values, and input_ids if there are captions; got {set(batch)}."
        )
    texts = (
        batch["input_ids"]
        if "input_ids" in batch
        else _random_texts(config.text_config, len(batch["pixel_values"]), index)
    )
    return {"pixel_values": batch["pixel_values"], "input_ids": texts}


def _random_texts(config: PretrainedConfig, count: int, index: int) -> torch.Tensor:
    """Token ids `(count, max_position_embeddings)` of random texts of random lengths."""
    generator = torch.Generator().manual_seed(index * process_count() + process_index())
    longest, end = config.max_position_embeddings, config.eos_token_id
    end = config.vocab_size - 1 if ends_at_largest_id(config) else end
    ids = torch.randint(config.vocab_size, (count, longest), generator=generator)
    ids[ids == end] = 0
    ids[:, 0] = config.bos_token_id
    lengths = torch.randint(1, longest - 1, (count, 1), generator=generator)
    return ids.where(torch.arange(longest) <= lengths, end)

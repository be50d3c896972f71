"""Counts what of a run cannot be used, rows and steps, and stops it when that is too much."""

import logging
import math
from collections import Counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, send_to_device

from clipmap_hf.distributed import gather
from clipmap_hf.training.checkpoints import Progress
from clipmap_hf.training.sharding import can_step


__all__ = ["count_skipped", "usable_chunks"]

logger = logging.getLogger(__name__)


def usable_chunks(
    chunks: list[dict[str, Any]], progress: Progress, accelerator: Accelerator, max_bad_fraction: float
) -> list[dict[str, torch.Tensor]]:
    """
    Counts the rows of all processes in `progress`.

    Args:
        chunks: What the collator made of this process's share of a step.
        progress: Counts pairs and bad rows.
        accelerator: Knows the device.
        max_bad_fraction: Share of bad rows above which the run stops.

    Returns:
        This process's chunks on its device, or none if any process has too few.

    Raises:
        ValueError: If too many rows are bad.
    """
    bad = sum((Counter(chunk.pop("bad_rows")) for chunk in chunks), Counter())
    chunks = [chunk for chunk in chunks if chunk]
    good = sum(len(chunk["input_ids"]) for chunk in chunks)
    counts = gather(torch.tensor([[good, bad.total(), len(chunks)]], device=accelerator.device))  # (processes, 3)
    good_rows, bad_rows, _ = counts.sum(dim=0).tolist()
    progress.pairs += good_rows
    if bad_rows:
        progress.bad_rows = dict(sum(gather_object([bad]), Counter(progress.bad_rows)))
    total = sum(progress.bad_rows.values())
    if total > max_bad_fraction * max(total + progress.pairs, 1000):  # a single bad row early is no verdict
        raise ValueError(
            f"{total} of {total + progress.pairs} rows could not be used, more than max_bad_fraction="
            f"{max_bad_fraction}: {progress.bad_rows}; the log names them. Mend the data, or raise the limit."
        )
    if not can_step(counts[:, 2], accelerator):
        return []
    return send_to_device(chunks, accelerator.device, non_blocking=True)


def count_skipped(values: dict[str, float], progress: Progress, accelerator: Accelerator, max_skipped: int) -> None:
    """
    Counts a step in `progress`, if it was skipped.

    Args:
        values: The step's `loss` and `grad_norm`.
        progress: Counts skipped steps.
        accelerator: Knows the backend.
        max_skipped: How many may be skipped in a row.

    Raises:
        FloatingPointError: If more were.
    """
    finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
    progress.skipped += not finite
    progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
    if not finite:
        logger.warning("Step %d skipped: %s; rows left out so far: %s.", progress.step, values, progress.bad_rows)
    skips = accelerator.distributed_type != DistributedType.DEEPSPEED  # which takes every step by itself
    allowed = max_skipped if skips else 0
    if progress.skipped_in_a_row > allowed:
        raise FloatingPointError(
            f"{progress.skipped_in_a_row} steps in a row up to {progress.step} had no finite loss and gradient, "
            f"or no usable rows ({progress.bad_rows}): more than max_skipped={allowed}. The last checkpoint is "
            "from before. Start anew in another output_dir with a lower learning rate, in fp32, or other data."
        )

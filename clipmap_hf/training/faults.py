"""Counts what of a run cannot be used, rows and steps, and stops it when that is too much."""

import logging
from collections import Counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, send_to_device

from clipmap_hf.distributed import gather
from clipmap_hf.models.finite import not_finite
from clipmap_hf.training.checkpoints import Progress
from clipmap_hf.training.sharding import can_step


__all__ = ["check_student", "check_trained", "count_skipped", "usable_chunks"]

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


def count_skipped(
    finite: bool, values: dict[str, float], progress: Progress, accelerator: Accelerator, max_skipped: int
) -> None:
    """
    Counts a step in `progress`, if it was skipped.

    Args:
        finite: Whether the step's loss and gradient were; else it was skipped.
        values: What the step logs.
        progress: Counts skipped steps.
        accelerator: Knows the backend.
        max_skipped: How many may be skipped in a row.

    Raises:
        FloatingPointError: If more were.
    """
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


def check_trained(progress: Progress) -> None:
    """
    Checks that a run has trained, if it was to.

    Args:
        progress: The run's, at its end.

    Raises:
        FloatingPointError: If there were steps, and all of them were skipped.
    """
    if progress.step and progress.skipped == progress.step:
        raise FloatingPointError(
            f"None of the {progress.step} steps changed the student: all were skipped, with {progress.pairs} pairs "
            f"read and rows left out by reason: {progress.bad_rows}. The log says why. Mend the data, lower the "
            "learning rate or train in fp32, and start anew with resume=never."
        )


def check_student(student: torch.nn.Module, step: int) -> None:
    """
    Checks that a student can be evaluated and written.

    Args:
        student: The model as it stands.
        step: Steps that the run has taken.

    Raises:
        FloatingPointError: If a weight is NaN or infinite. The message names it.
    """
    if found := not_finite(student.state_dict()):
        raise FloatingPointError(
            f"The student has weights at step {step} that are {found} It is not written. What was written before "
            "stays. Start anew in another output_dir with a lower learning rate, or in fp32."
        )

"""What several processes exchange: rows of embeddings with their gradient, and means of gradients."""

import atexit
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch.autograd import Function


__all__ = [
    "average_gradients",
    "broadcast",
    "calibration_device",
    "gather",
    "join_processes",
    "process_count",
    "process_index",
    "sum_over_processes",
]


def join_processes() -> PartialState:
    """
    Joins the processes that a launcher started, if that is not done yet; to be called before they do anything. A
    process leaves the group that it joined here when it ends without an error.

    Raises:
        ValueError: If there are several processes, but nothing they could talk by: each would train for itself, and
            they would overwrite each other's files.
    """
    has_group = _has_group()
    # Long, because a process may wait for others to make a teacher cache. Launchers end all if one fails.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(hours=12))
    if _has_group() and not has_group:
        atexit.register(_leave)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise ValueError(
            f"{started} processes were started, but Accelerate sees {state.num_processes}. On a machine without GPUs, "
            "set ACCELERATE_USE_CPU=true."
        )
    return state


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _leave() -> None:
    # Torch's destructors may come too late, and abort a process whose work is done. NCCL may wait here for all others,
    # of which one that fails may not come: it goes at once, and its launcher ends the rest.
    is_failing = hasattr(sys, "last_type")  # set by an exception that nobody caught
    if _has_group() and not is_failing:
        dist.destroy_process_group()


def calibration_device() -> torch.device:
    """Where this process sums up activations: its device, or the CPU if that has no fp64."""
    device = join_processes().device
    return torch.device("cpu") if device.type == "mps" else device


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _has_group() else 1


def process_index() -> int:
    """The index of this process among them."""
    return dist.get_rank() if process_count() > 1 else 0


def gather(rows: torch.Tensor) -> torch.Tensor:
    """
    The rows of all processes, in the order of their ranks; their numbers may differ.

    The gradient of a process's own rows is multiplied by the number of processes: each of them computes the whole
    loss, so its own slice of the gradient is complete, and the mean over processes that follows would divide it.

    Args:
        rows: `(rows, ...)`, of equal trailing shape in all processes.
    """
    return rows if process_count() == 1 else _Gather.apply(rows)


def average_gradients(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The tensors as they are; on the way back, their gradients are averaged over all processes."""
    return tuple(tensors) if process_count() == 1 else _AverageGradients.apply(*tensors)


def sum_over_processes(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces each tensor by the sum of those of all processes."""
    if process_count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def broadcast(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Replaces each tensor by that of the first process; they travel by way of `device`, which the backend knows."""
    if process_count() > 1:
        for tensor in tensors:
            sent = tensor.to(device)
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)


class _Gather(Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(process_count())]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        counts = [int(count) for count in counts]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        ctx.first = sum(counts[: process_index()])
        ctx.count = len(rows)
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient[ctx.first : ctx.first + ctx.count] * process_count()


class _AverageGradients(Function):
    @staticmethod
    def forward(ctx, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gradients = [gradient.contiguous() / process_count() for gradient in gradients]
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()
        return tuple(gradients)

"""AdamW: its number of steps, its learning rate at each step, and the parameters that it decays."""

import logging
import math
import re
from typing import Any

import torch

from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.distributed import process_count
from clipmap_hf.training.arguments import StageArguments


__all__ = [
    "adamw",
    "learning_rate_at",
    "parameter_groups",
    "ramp_length",
    "step_count",
    "steps_or_share",
    "warn_of_warmup",
]

logger = logging.getLogger(__name__)

_SHARE = 0.1  # of the steps, in which the rate of a run warms up whose warm-up does not fit


def parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """
    AdamW's groups of the trainable parameters: matrices decay; vectors (those stacked over layers too), scalars,
    position embeddings and depth matrices (whose one-hot start is no neighborhood of zero) do not. Parameters that
    the module's `fixed_rates` name have that rate, which no schedule changes, as the group's `fixed_rate`.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    fixed = {
        name: rate
        for name, _ in trainable
        for start, rate in getattr(module, "fixed_rates", {}).items()
        if name.startswith(start)
    }

    def decays(name: str, parameter: torch.nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not re.search("norm|bias|position_embedding|_depth", name)

    scheduled = [(name, p) for name, p in trainable if name not in fixed]
    groups = [
        {"params": [p for name, p in scheduled if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in scheduled if p.numel() > 1 and not decays(name, p)], "weight_decay": 0.0},
        # FSDP leaves scalars as they are.
        {"params": [p for _, p in scheduled if p.numel() == 1], "weight_decay": 0.0},
    ]
    groups += [
        {"params": [p for name, p in trainable if fixed.get(name) == rate], "weight_decay": 0.0, "fixed_rate": rate}
        for rate in sorted(set(fixed.values()))
    ]
    return [group for group in groups if group["params"]]


def adamw(module: torch.nn.Module, arguments: StageArguments) -> torch.optim.AdamW:
    """Makes the optimizer of a module's trainable parameters."""
    return torch.optim.AdamW(
        parameter_groups(module, arguments.weight_decay),
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        fused=True,  # of the 138 M operators of a small student, eight times as fast on a CPU
    )


def learning_rate_at(step: float, steps: int, peak: float, warmup: float) -> float:
    """
    The rate of a step: linear warm-up from 0, then half a cosine to 0. Every run has a step at the peak, so that a
    single step is taken at it.

    Args:
        step: Which, counted from 0; between two steps, if time runs faster than they do.
        steps: How many there are.
        peak: The highest rate.
        warmup: Steps of warm-up, or a share of all if below 1. Steps that do not fit are a tenth of all.
    """
    warmup = math.ceil(steps_or_share(warmup if _fits(warmup, steps) else _SHARE, steps))
    warmup = min(warmup, steps - 1)
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def warn_of_warmup(arguments: StageArguments, steps: int) -> None:
    """Logs a warning if the warm-up that `arguments` ask for does not fit a run of `steps`."""
    if steps and not _fits(arguments.warmup_steps, steps):
        logger.warning(
            "warmup_steps=%g is not less than the run's steps, %d; the share %g of them is taken instead. Give fewer, "
            "or a share below 1.",
            arguments.warmup_steps,
            steps,
            _SHARE,
        )


def steps_or_share(number: float, steps: int) -> float:
    """Reads a number as steps, or below 1 as a share of `steps`; it is not rounded."""
    return number if number >= 1 else number * steps


def ramp_length(ramp: float, steps: int) -> int:
    """
    The steps of a ramp.

    Args:
        ramp: The steps, or a share of all if below 1.
        steps: How many the run has.

    Raises:
        ValueError: If the ramp would end after the run.
    """
    length = round(steps_or_share(ramp, steps))
    if length > steps:
        raise ValueError(f"ramp_steps={length} are more than the {steps} of the training; a share is below 1.")
    return length


def step_count(arguments: StageArguments, pairs: PairDataset | PairStream) -> int:
    """
    The optimizer steps that `arguments` ask for.

    Raises:
        ValueError: If the pairs do not fill a batch, or have no length to count epochs of.
    """
    if arguments.max_steps >= 0 and (isinstance(pairs, PairStream) or not arguments.max_steps):
        return arguments.max_steps
    if isinstance(pairs, PairStream):
        if not arguments.num_train_epochs:
            return 0
        raise ValueError("A stream has no length, so epochs cannot be counted; set max_steps (--steps).")
    batch_size, _ = arguments.batch_sizes(process_count())
    steps_per_epoch = len(pairs) // batch_size
    if arguments.trains and steps_per_epoch == 0:
        raise ValueError(f"batch_size={batch_size} is larger than the {len(pairs)} training pairs; lower it.")
    if arguments.max_steps >= 0:
        return arguments.max_steps
    steps = round(arguments.num_train_epochs * steps_per_epoch)
    if arguments.num_train_epochs > 0 and steps == 0:
        raise ValueError(
            f"num_train_epochs={arguments.num_train_epochs} of {len(pairs)} pairs is less than one step; set "
            "max_steps (--steps) instead."
        )
    return steps


def _fits(warmup: float, steps: int) -> bool:
    """Whether a warm-up leaves a step at the peak; a share always does."""
    return warmup < 1 or math.ceil(warmup) < steps

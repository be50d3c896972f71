"""How long towers take: medians of repeated passes, those of several models by turns so that their ratios hold."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.benchmark import Timer
from transformers import PretrainedConfig


__all__ = ["Spread", "milliseconds", "milliseconds_by_turns", "random_inputs", "speedups", "spread"]

Name = TypeVar("Name")


@torch.no_grad()
def milliseconds(run: Callable[[], Any], seconds: float) -> float:
    """
    Median milliseconds of a call, of as many as `seconds` take, with as many threads as the process has. What a GPU
    was given is waited for.
    """
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median * 1000


def milliseconds_by_turns(
    runs: Mapping[Name, Callable[[], Any]], rounds: int, seconds: float = 0.2
) -> dict[Name, list[float]]:
    """
    `milliseconds` of each call in each round. All are called in every round, one after the other: what else the
    machine does meets all of them, and the ratios of a round are nearly free of it.

    Args:
        runs: What is called.
        rounds: Measurements of each.
        seconds: At least, that one measurement takes.
    """
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(milliseconds(run, seconds))
    return times


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    lower: float
    upper: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of the values of all rounds."""
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Spread(median, lower, upper)


def speedups(first: Sequence[float], other: Sequence[float]) -> list[float]:
    """How many times as fast the other was, in each round."""
    return [one / time for one, time in zip(first, other, strict=True)]


def random_inputs(config: PretrainedConfig, batch_size: int) -> dict[str, torch.Tensor]:
    """
    Noise and random texts of full length for a model of this config: `pixel_values` `(batch, channels, size, size)`,
    `input_ids` and `attention_mask` `(batch, length)`.
    """
    image, text = config.vision_config, config.text_config
    input_ids = torch.randint(text.vocab_size, (batch_size, text.max_position_embeddings))
    return {
        "pixel_values": torch.randn(batch_size, image.num_channels, image.image_size, image.image_size),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
    }

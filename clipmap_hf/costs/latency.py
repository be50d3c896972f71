"""Measures how long towers take: medians of repeated passes, and several models in turns to compare them."""

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
    Measures the median time of a call in milliseconds, with all threads of the process. Waits for the GPU to finish.

    Args:
        run: The function to call.
        seconds: Calls are repeated for at least this time.
    """
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median * 1000


def milliseconds_by_turns(
    runs: Mapping[Name, Callable[[], Any]], rounds: int, seconds: float = 0.2
) -> dict[Name, list[float]]:
    """
    Measures several calls in turns. Every round measures all calls, one after the other. If the machine is busy with
    something else, this affects all calls alike, and the ratios of a round hardly change.

    Args:
        runs: The functions to call, by name.
        rounds: Number of rounds.
        seconds: Each measurement takes at least this time.

    Returns:
        The `milliseconds` of each call in each round, by name.
    """
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(milliseconds(run, seconds))
    return times


class Spread(NamedTuple):
    """Median, lower quartile and upper quartile."""

    median: float
    lower: float
    upper: float


def spread(values: Sequence[float]) -> Spread:
    """Returns the median and the quartiles of some values."""
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Spread(median, lower, upper)


def speedups(first: Sequence[float], other: Sequence[float]) -> list[float]:
    """Returns, for each round, how many times as fast `other` was as `first`."""
    return [first_time / other_time for first_time, other_time in zip(first, other, strict=True)]


def random_inputs(config: PretrainedConfig, batch_size: int) -> dict[str, torch.Tensor]:
    """
    Makes random images and random texts of full length for a model of this config.

    Returns:
        `pixel_values` `(batch, channels, size, size)`, and `input_ids` and `attention_mask` `(batch, length)`.
    """
    image, text = config.vision_config, config.text_config
    input_ids = torch.randint(text.vocab_size, (batch_size, text.max_position_embeddings))
    return {
        "pixel_values": torch.randn(batch_size, image.num_channels, image.image_size, image.image_size),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
    }

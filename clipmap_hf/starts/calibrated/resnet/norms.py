"""BatchNorms that take the statistics of what they read, while the network computes what it did."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from clipmap_hf.distributed import sum_over_processes
from clipmap_hf.models.batch_norms import batch_norms


__all__ = ["take_statistics"]


@torch.no_grad()
def take_statistics(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """
    Gives a model's BatchNorms the mean and variance of what they read, and changes their weights and biases so that in
    evaluation they compute what they did. In training, where they normalize by their batch, they are then no others.

    Args:
        model: In eval mode; changed in place.
        batches: Of `pixel_values`. Of several processes, each has its own.
    """
    norms = batch_norms(model)
    sums = [torch.zeros(3, norm.num_features, dtype=torch.float64, device=model.device) for norm in norms]
    with ExitStack() as hooks:
        for norm, total in zip(norms, sums, strict=True):
            hooks.enter_context(norm.register_forward_pre_hook(partial(_add, total)))
        for batch in batches:
            model.get_image_features(batch["pixel_values"].to(model.device))
    sum_over_processes(sums)
    for norm, (count, total, squares) in zip(norms, sums, strict=True):
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias += scale * (mean - norm.running_mean)
        norm.weight.copy_(scale * (variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


def _add(total: torch.Tensor, norm: nn.Module, inputs: tuple[torch.Tensor]) -> None:
    channels = inputs[0].movedim(1, 0).flatten(1)
    total += torch.stack(
        [torch.full_like(channels[:, 0], channels.shape[1]), channels.sum(1), channels.square().sum(1)]
    )

"""BatchNorms, which see a whole batch and change in training without a gradient; how to measure their statistics."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from clipmap_hf.distributed import sum_over_processes


__all__ = ["batch_norms", "has_batch_norms", "put_back", "reestimate_batch_norms", "statistics_of"]


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Returns the BatchNorms of a model."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def has_batch_norms(model: nn.Module) -> bool:
    """Tells whether a model has a BatchNorm."""
    return bool(batch_norms(model))


def statistics_of(norms: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Returns what some BatchNorms have measured."""
    return [buffer for norm in norms for buffer in norm.buffers()]


@torch.no_grad()
def put_back(statistics: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """
    Undoes a change of statistics.

    Args:
        statistics: Changed in place.
        values: What they were.
    """
    for statistic, value in zip(statistics, values, strict=True):
        statistic.copy_(value)


@torch.no_grad()
def reestimate_batch_norms(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """
    Measures the statistics of a model's BatchNorms anew, in place, on images ("precise BN", Wu and Johnson 2021).
    After channels were removed, the statistics are no longer those of what the norms read. No weight changes.

    The model runs as in evaluation, but for its BatchNorms, which normalize by the batch they see. Mean and variance
    become the averages over all batches and processes, weighted by images.

    Args:
        model: A model with BatchNorms, such as a `CLIPResNetModel`, on the device to compute on.
        batches: Of `pixel_values` `(images, channels, height, width)`, such as calibration pairs; other entries are
            not read. A batch of one image has no variance and is left out. Of several processes, each has its own.

    Raises:
        ValueError: If the model has no BatchNorms, or there is no batch of at least two images. The statistics then
            stay as they were.
    """
    norms = batch_norms(model)
    if not norms:
        raise ValueError(
            f"A {type(model).__name__} has no BatchNorms, so there are no statistics to measure; only models with a "
            "ResNet have them."
        )
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    before = [statistic.clone() for statistic in statistics_of(norms)]
    images = torch.zeros((), device=model.device)
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        for batch in batches:
            pixels = batch["pixel_values"]
            if len(pixels) > 1:
                images += len(pixels)
                for norm in norms:
                    norm.momentum = len(pixels) / float(images)  # so that all images count the same
                model.get_image_features(pixel_values=pixels.to(model.device))
        _join_processes(norms, images, before)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _join_processes(norms: list[nn.Module], images: torch.Tensor, before: list[torch.Tensor]) -> None:
    """Averages the statistics of all processes by their images; without any, puts back what was before."""
    own, buffers = images.clone(), statistics_of(norms)
    sum_over_processes([images])
    if not images:
        put_back(buffers, before)
        raise ValueError("BatchNorms are measured on batches of at least two images, and there are none.")
    measured = [buffer for buffer in buffers if buffer.is_floating_point()]
    for buffer in measured:
        buffer *= own / images
    sum_over_processes(buffers)  # the numbers of batches among them

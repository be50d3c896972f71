"""How much of a teacher's towers is kept at each width and depth, from one pass over calibration pairs."""

import copy
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from clipmap_hf.distributed import broadcast
from clipmap_hf.models.towers import Tower
from clipmap_hf.starts.calibrated.axes import stream_moment
from clipmap_hf.starts.calibrated.batches import CalibrationBatches
from clipmap_hf.starts.calibrated.statistics import TowerStatistics, calibrate
from clipmap_hf.starts.selection.scores import head_channels


__all__ = ["kept_energy", "kept_of_tower"]

_RIDGE = 1e-6


@torch.no_grad()
def kept_energy(teacher: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """
    What each tower keeps, between 0 and 1, with `h` heads (and the width that goes with them) and `L` layers:

        kept(h, L) = E(h) exp(− Σₗ cₗ (1 − aₗ(h))),

    `E` being the share of the stream's energy along its main axes, as many as the width less one (`residual_axes`);
    `cₗ` how far layer `l` turns the stream (`TowerStatistics.changed`); `aₗ` the share of what its attention adds
    that its `h` strongest heads, and the least-squares guess of the others from them, make up. Of the layers, the `L`
    with the largest `cₗ` are kept; for the others, `aₗ` is 0.

    Args:
        teacher: The model; the activations are computed where it lies.
        batches: Of `pixel_values` and `input_ids`. Of several processes, each has its own.

    Returns:
        A table `(heads, layers)` for `vision` and for `text`: `[h - 1, L - 1]` is `kept(h, L)`.

    Raises:
        TypeError: If `batches` is an iterator.
        ValueError: If there are no pairs, or no images.
    """
    model = copy.deepcopy(teacher).float().eval()
    statistics = calibrate(model, CalibrationBatches(batches, model.config))
    kept = {name: kept_of_tower(of_tower, Tower(model, name)).cpu() for name, of_tower in statistics.items()}
    broadcast(kept.values(), model.device)  # all processes must choose the same
    return kept


def kept_of_tower(statistics: TowerStatistics, tower: Tower) -> torch.Tensor:
    """`kept_energy` of one tower from its statistics, `(heads, layers)`."""
    heads = tower.config.num_attention_heads
    head_width = tower.config.hidden_size // heads
    along = torch.linalg.eigvalsh(stream_moment(statistics.read)).flip(0).clamp(min=0)
    shares = (along.cumsum(0) / along.sum())[torch.arange(1, heads + 1) * head_width - 2]  # one axis less: mean zero
    attention = torch.stack(
        [
            _explained(layer.self_attn.out_proj.weight, moments.covariance, energy, head_width)
            for layer, moments, energy in zip(tower.layers, statistics.attended, statistics.head_energy, strict=True)
        ]
    )  # (layers, heads)
    changed = statistics.changed.clamp(min=0)
    order = changed.argsort(descending=True)
    regained = (changed[:, None] * attention)[order].cumsum(0)  # (layers, heads)
    return shares[:, None] * torch.exp(regained - changed.sum()).T


def _explained(written: torch.Tensor, covariance: torch.Tensor, energy: torch.Tensor, head_width: int) -> torch.Tensor:
    """
    The share of what attention adds that its strongest heads, one, two, …, determine, `(heads,)`: with `C = K Kᵀ` the
    covariance of all heads, strongest first, that of the first is the part of `W K` in their columns.
    """
    channels = head_channels(energy.argsort(descending=True), head_width).flatten()
    ordered = covariance[channels][:, channels]
    ridge = _RIDGE * ordered.diagonal().mean() * torch.eye(len(ordered), dtype=ordered.dtype, device=ordered.device)
    added = (written.double()[:, channels] @ torch.linalg.cholesky(ordered + ridge)).square().sum(0).cumsum(0)
    return (added / added[-1])[head_width - 1 :: head_width]

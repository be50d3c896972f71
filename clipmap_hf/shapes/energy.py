"""Computes how much of a teacher's towers is kept at each width and depth, in one pass over calibration pairs."""

import copy
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from clipmap_hf.distributed import broadcast
from clipmap_hf.families import BOTH_TOWERS, family_for
from clipmap_hf.models.towers import Tower
from clipmap_hf.starts.calibrated.axes import stream_moment
from clipmap_hf.starts.calibrated.batches import CalibrationBatches
from clipmap_hf.starts.calibrated.statistics import TowerStatistics, calibrate
from clipmap_hf.starts.selection.scores import head_channels


__all__ = ["kept_energy", "tower_kept_energy"]

_RIDGE = 1e-6


@torch.no_grad()
def kept_energy(teacher: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """
    Computes how much each tower keeps, between 0 and 1, with `h` heads (and the width of `h` heads) and `L` layers:

        kept(h, L) = E(h) exp(− Σₗ cₗ (1 − aₗ(h))),

    where

    - `E(h)` is the share of the residual stream's energy along its main axes. The number of these axes is the width
      minus 1 (`residual_axes`).
    - `cₗ` says how far layer `l` turns the stream (`TowerStatistics.changed`). The `L` layers with the largest `cₗ`
      are kept.
    - `aₗ(h)` is the share of a kept layer's attention output that its `h` strongest heads explain: their own output,
      and the output of the other heads as far as a least-squares fit predicts it from theirs. For a dropped layer,
      `aₗ` is 0.

    Args:
        teacher: The model. Activations are computed on its device.
        batches: Batches of `pixel_values` and `input_ids`. Every process passes its own batches.

    Returns:
        A table `(heads, layers)` for `vision` and for `text`. Its entry `[h - 1, L - 1]` is `kept(h, L)`.

    Raises:
        TypeError: If `batches` is an iterator.
        ValueError: If there are no pairs, or no images; if the teacher's layers cannot be run one by one.
    """
    if not family_for(teacher.config).layerwise >= BOTH_TOWERS:
        raise ValueError(
            "What a student keeps is measured layer by layer, which is not written for models of type "
            f"{teacher.config.model_type!r}. Give the student's widths and depths instead of a budget. Or choose the "
            "shape without calibration data: by an initializer that reads none, such as 'diagonal', or by "
            "choose_shape(teacher.config, config)."
        )
    model = copy.deepcopy(teacher).float().eval()
    tower_statistics = calibrate(model, CalibrationBatches(batches, model.config))
    kept = {
        name: tower_kept_energy(statistics, Tower(model, name)).cpu() for name, statistics in tower_statistics.items()
    }
    broadcast(kept.values(), model.device)  # so that all processes choose the same shape
    return kept


def tower_kept_energy(statistics: TowerStatistics, tower: Tower) -> torch.Tensor:
    """Computes the table of `kept_energy` for one tower from its statistics, `(heads, layers)`."""
    heads = tower.config.num_attention_heads
    head_width = tower.config.hidden_size // heads
    energies = torch.linalg.eigvalsh(stream_moment(statistics.read)).flip(0).clamp(min=0)  # along the main axes
    axes = torch.arange(1, heads + 1) * head_width - 1  # the width minus 1, since the stream has mean zero
    shares = (energies.cumsum(0) / energies.sum())[axes - 1]
    attention = torch.stack(
        [
            _explained_shares(layer.self_attn.out_proj.weight, moments.covariance, energy, head_width)
            for layer, moments, energy in zip(tower.layers, statistics.attended, statistics.head_energy, strict=True)
        ]
    )  # (layers, heads)
    changed = statistics.changed.clamp(min=0)
    order = changed.argsort(descending=True)
    regained = (changed[:, None] * attention)[order].cumsum(0)  # (layers, heads)
    return shares[:, None] * torch.exp(regained - changed.sum()).T


def _explained_shares(
    written: torch.Tensor, covariance: torch.Tensor, energy: torch.Tensor, head_width: int
) -> torch.Tensor:
    """
    Computes the shares of the attention output that the strongest 1, 2, … heads explain, `(heads,)`. Let `W` be the
    output projection, and `C = K Kᵀ` the Cholesky decomposition of the covariance of all heads, strongest head first.
    Then the first heads explain the energy in their columns of `W K`.
    """
    channels = head_channels(energy.argsort(descending=True), head_width).flatten()
    ordered = covariance[channels][:, channels]
    ridge = _RIDGE * ordered.diagonal().mean() * torch.eye(len(ordered), dtype=ordered.dtype, device=ordered.device)
    added = (written.double()[:, channels] @ torch.linalg.cholesky(ordered + ridge)).square().sum(0).cumsum(0)
    return (added / added[-1])[head_width - 1 :: head_width]

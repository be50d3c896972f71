"""Selection by importance: the channels, heads and neurons with the most energy, LayerNorms as they are."""

import copy
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from clipmap_hf.models.towers import Tower
from clipmap_hf.starts.calibrated.batches import CalibrationBatches
from clipmap_hf.starts.calibrated.statistics import calibrate
from clipmap_hf.starts.selection.scores import Scores, TowerScores


__all__ = ["importance"]


@torch.no_grad()
def importance(teacher: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]], seed: int) -> Scores:
    """
    Scores by energy. A residual channel's is the sum over the tower's LayerNorms of the mean square that leaves them
    in it; that of a head, of a channel within it or of a neuron is the mean square of what it adds to the stream; a
    layer's is how far it turns the stream.

    Args:
        teacher: The model, on the device to compute on.
        batches: Of `pixel_values` and, if there are captions, `input_ids`.
        seed: Not used.

    Raises:
        TypeError: If `batches` is an iterator.
        ValueError: If there are no pairs, or no images.
    """
    model = copy.deepcopy(teacher).float().eval()
    statistics, scores = calibrate(model, CalibrationBatches(batches, model.config)), {}
    for name, found in statistics.items():
        tower = Tower(model, name)
        norms = [norm for layer in tower.layers for norm in (layer.layer_norm1, layer.layer_norm2)]
        scales = torch.stack([norm.weight.double() for norm in (*norms, tower.final_norm)])
        channels = (scales.square() * found.read.diagonal(dim1=1, dim2=2)).sum(dim=0)
        written = [layer.self_attn.out_proj.weight.double().square().sum(dim=0) for layer in tower.layers]
        given = [moments.variance for moments in found.attended]
        inner = torch.stack(given) * torch.stack(written)
        scores[name] = TowerScores(channels, found.head_energy, found.neuron_energy, found.changed, inner=inner)
    return Scores(**scores, embed=sum(found.embeds.diagonal() for found in statistics.values()))

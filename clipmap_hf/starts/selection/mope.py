"""Module-wise pruning error (MoPE-CLIP): how much worse retrieval is without a head, some neurons, or a layer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from clipmap_hf.distributed import gather, process_index
from clipmap_hf.evaluation.retrieval import recall_at_k
from clipmap_hf.models.towers import Tower
from clipmap_hf.starts.selection.criteria import taylor
from clipmap_hf.starts.selection.pairs import pair_batches
from clipmap_hf.starts.selection.scores import Scores, TowerScores


__all__ = ["GROUPS", "PruningErrors", "mope", "mope_errors", "neuron_groups", "pruning_errors"]

Batch = Mapping[str, torch.Tensor]
GROUPS = 8  # of the neurons of a layer, which are left out together


@dataclass
class PruningErrors:
    """
    What the mean of recall@1, 5 and 10 in both directions loses without a module of a tower.

    Args:
        heads: `(layers, heads)`.
        groups: Of neurons, the most important first, `(layers, groups)`.
        layers: `(layers,)`.
    """

    heads: torch.Tensor
    groups: torch.Tensor
    layers: torch.Tensor


def mope(teacher: PreTrainedModel, batches: Iterable[Batch], seed: int) -> Scores:
    """
    Scores of MoPE-CLIP: heads, groups of neurons and layers by their pruning error. Neurons are sorted by `taylor`
    before they are cut into groups, and keep that order within; it decides between modules of equal error, too. The
    paper leaves the residual stream as wide as it is; its channels, and the joint embedding's, have `taylor` scores.

    Args:
        teacher: The model, on the device to compute on.
        batches: As for `taylor`, gone through several times.
        seed: Not used.
    """
    errors, estimates = mope_errors(teacher, list(pair_batches(batches)))
    return Scores(*(_scores(errors[name], getattr(estimates, name)) for name in errors), embed=estimates.embed)


def mope_errors(teacher: PreTrainedModel, batches: Sequence[Batch]) -> tuple[dict[str, PruningErrors], Scores]:
    """
    The errors of `vision` and of `text`, their neurons grouped by `taylor`; and what that estimates.

    Args:
        teacher: The model, on the device to compute on.
        batches: As for `taylor`.

    Raises:
        ValueError: If the model's family is none that `Tower` goes through.
    """
    for name in ("vision", "text"):
        Tower(teacher, name)  # refuses what it cannot take apart before anything is computed
    estimates = taylor(teacher, batches, seed=0)
    neurons = {name: getattr(estimates, name).neurons for name in ("vision", "text")}
    return pruning_errors(teacher, batches, neurons), estimates


def _scores(errors: PruningErrors, estimates: TowerScores) -> TowerScores:
    of_group = errors.groups.gather(1, neuron_groups(estimates.neurons, errors.groups.shape[1]))  # (layers, neurons)
    return TowerScores(
        estimates.channels,
        errors.heads + _below_a_step(estimates.heads),
        of_group + _below_a_step(estimates.neurons),
        errors.layers + _below_a_step(estimates.layers),
    )


def _below_a_step(estimates: torch.Tensor) -> torch.Tensor:
    """Estimates made smaller than any two recalls can differ."""
    return 1e-9 * estimates / estimates.max().clamp(min=1e-30)


@torch.no_grad()
def pruning_errors(
    teacher: PreTrainedModel, batches: Iterable[Batch], neurons: Mapping[str, torch.Tensor]
) -> dict[str, PruningErrors]:
    """
    Leaves out one module after another, by a mask. The other tower's embeddings are computed once, and of the module's
    own tower only what comes behind its layer is computed anew.

    Args:
        teacher: The model.
        batches: As `pair_batches` takes them. All texts of an image count. Of several processes, each has its own.
        neurons: Importance of the neurons of each tower, `(layers, intermediate_size)`, by which they are grouped.

    Returns:
        The errors of `vision` and of `text`.
    """
    batches = [{name: tensor.to(teacher.device) for name, tensor in batch.items()} for batch in pair_batches(batches)]
    owners = _joined_owners(batches)
    towers = {name: _PrunedTower(Tower(teacher.eval(), name), batches) for name in neurons}
    embeds = {name: tower.embeds(tower.streams, 0) for name, tower in towers.items()}
    whole, found = _recall(embeds, owners), {}
    for name, tower in towers.items():
        groups = neuron_groups(neurons[name], GROUPS)
        rows = [
            [whole - _recall({**embeds, name: without}, owners) for without in tower.without_each(groups[index])]
            for index in range(len(groups))
        ]
        heads = tower.tower.config.num_attention_heads
        # (layers, heads + groups + 1), on the device of the estimates that are added to it
        errors = torch.tensor(rows, dtype=torch.float64, device=groups.device)
        found[name] = PruningErrors(errors[:, :heads], errors[:, heads:-1], errors[:, -1])
    return found


class _PrunedTower:
    """Goes through a tower's layers once, and embeds all pairs without each module of the current layer in turn."""

    def __init__(self, tower: Tower, batches: list[Batch]):
        self.tower, self.batches = tower, batches
        self.streams, self.index = [tower.embed(batch) for batch in batches], 0

    def without_each(self, groups: torch.Tensor) -> Iterator[torch.Tensor]:
        """Embeddings without each head, each group of neurons, and the layer; then the next layer is the current."""
        tower, layer, behind = self.tower, self.tower.layers[self.index], self.index + 1
        out_proj, fc2, heads = layer.self_attn.out_proj, layer.mlp.fc2, tower.config.num_attention_heads
        attended = [tower.attended(layer, stream) for stream in self.streams]
        head_of = torch.arange(heads, device=tower.device).repeat_interleave(layer.self_attn.head_dim)
        for head in range(heads):
            kept = (head_of != head).float()
            middles = (x + out_proj(heads_out * kept) for x, heads_out in zip(self.streams, attended, strict=True))
            yield self.embeds((tower.behind(layer, middle) for middle in middles), behind)
        middles = [x + out_proj(heads_out) for x, heads_out in zip(self.streams, attended, strict=True)]
        activated = [tower.activated(layer, middle) for middle in middles]
        for group in range(GROUPS):
            kept = (groups != group).float()
            yield self.embeds((x + fc2(neurons * kept) for x, neurons in zip(middles, activated, strict=True)), behind)
        yield self.embeds(self.streams, behind)
        self.streams = [x + fc2(neurons) for x, neurons in zip(middles, activated, strict=True)]
        self.index += 1

    def embeds(self, streams: Iterable[torch.Tensor], index: int) -> torch.Tensor:
        """Normalized embeddings of all pairs, from the streams that layer `index` reads."""
        embeds = []
        for batch, stream in zip(self.batches, streams, strict=True):
            for layer in self.tower.layers[index:]:
                stream = self.tower.through(layer, stream)
            embeds.append(F.normalize(self.tower.embeds(stream, self.tower.ends(batch)), dim=-1))
        return gather(torch.cat(embeds))


def _joined_owners(batches: Sequence[Batch]) -> torch.Tensor:
    """The image of each text of all batches and processes, `(texts,)`."""
    counts = torch.tensor([len(batch["pixel_values"]) for batch in batches])
    firsts = (counts.cumsum(0) - counts).tolist()
    owners = torch.cat([batch["image_of_text"] + first for batch, first in zip(batches, firsts, strict=True)])
    images = gather(counts.sum().reshape(1).to(owners.device))  # (processes,)
    return gather(owners + images[: process_index()].sum())


def _recall(embeds: Mapping[str, torch.Tensor], owners: torch.Tensor) -> float:
    recalls = recall_at_k(embeds["vision"], embeds["text"], owners)
    return sum(recalls.values()) / len(recalls)


def neuron_groups(importance: torch.Tensor, count: int) -> torch.Tensor:
    """The group of each neuron, the most important in group 0, `(layers, neurons)`."""
    ranks = importance.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ranks * count // importance.shape[1]

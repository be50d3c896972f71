"""Statistics of a teacher's activations over calibration pairs; their size does not depend on the number of pairs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from clipmap_hf.distributed import sum_over_processes
from clipmap_hf.models.towers import Tower, pooled
from clipmap_hf.starts.calibrated.moments import Moments


__all__ = ["POOLED_WEIGHT", "TowerStatistics", "calibrate", "normalized", "token_weights"]

POOLED_WEIGHT = 16.0  # of the token that becomes the embedding, to the 1 of all others


@dataclass
class TowerStatistics:
    """
    What calibration measures in a tower with `layers` layers of width `hidden_size`.

    Args:
        read: Second moments of what LayerNorms give before scale and shift, `(2 layers + 1, hidden_size,
            hidden_size)`: the first and second of each layer, then the final one, of the pooled token only.
        means: Their means, `(2 layers + 1, hidden_size)`.
        embedded: That of the embeddings before `pre_layrnorm`, `(hidden_size, hidden_size)`; not used for text.
        embeds: That of the normalized embeddings, `(projection_dim, projection_dim)`.
        attended: Moments of what each layer's `out_proj` reads.
        activated: Moments of what each layer's `fc2` reads.
        changed: How far each layer turns the stream: 1 minus the mean cosine of its input and output, `(layers,)`.
        head_energy: Mean square of what each head adds to the stream, `(layers, heads)`.
        neuron_energy: Mean square of what each neuron adds, `(layers, intermediate_size)`.
    """

    read: torch.Tensor
    means: torch.Tensor
    embedded: torch.Tensor
    embeds: torch.Tensor
    attended: list[Moments]
    activated: list[Moments]
    changed: torch.Tensor
    head_energy: torch.Tensor
    neuron_energy: torch.Tensor


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    towers: Iterable[str] = ("vision", "text"),
    *,
    neuron_covariance: bool = False,
) -> dict[str, TowerStatistics]:
    """
    Measures the towers of a model. The sums are fp64, and those of several processes, each with batches of its own,
    are added up.

    Args:
        model: The teacher.
        batches: As `calibration_batch` gives them.
        towers: Which ones.
        neuron_covariance: Whether `activated` has covariances, which take time and `layers x intermediate_size²`
            numbers, or just variances.

    Returns:
        The statistics by tower.

    Raises:
        ValueError: If there are no batches, or an embedding is not finite.
    """
    sums = {name: _TowerSums(Tower(model, name), neuron_covariance) for name in towers}
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        for tower in sums.values():
            tower.add(batch)
    return {name: tower.statistics() for name, tower in sums.items()}


def normalized(stream: torch.Tensor, epsilon: float) -> torch.Tensor:
    """What a LayerNorm gives before scale and shift."""
    return F.layer_norm(stream, stream.shape[-1:], eps=epsilon)


def token_weights(tower: Tower, batch: Mapping[str, torch.Tensor], stream: torch.Tensor) -> torch.Tensor:
    """How much each token counts, `(items, tokens)`: 1, `POOLED_WEIGHT` if it is pooled, 0 if it is padding."""
    weights = tower.counts(batch, stream).float()
    weights[torch.arange(len(stream), device=stream.device), tower.ends(batch)] = POOLED_WEIGHT
    return weights


class _TowerSums:
    """The running sums of a tower."""

    def __init__(self, tower: Tower, neuron_covariance: bool):
        self.tower, config, layers = tower, tower.config, range(len(tower.layers))
        width, device = config.hidden_size, tower.device
        self.read = [Moments(width, device=device) for _ in range(2 * len(layers) + 1)]
        self.embedded = Moments(width, device=device)
        self.embeds = Moments(tower.projection.out_features, device=device)
        self.attended = [Moments(width, device=device) for _ in layers]
        self.activated = [
            Moments(config.intermediate_size, diagonal=not neuron_covariance, device=device) for _ in layers
        ]
        self.cosines = torch.zeros(len(layers), dtype=torch.float64, device=device)

    def add(self, batch: Mapping[str, torch.Tensor]) -> None:
        tower, epsilon = self.tower, self.tower.config.layer_norm_eps
        if tower.name == "vision":
            self.embedded.add(tower.model.embeddings(batch["pixel_values"]).flatten(0, 1))
        stream = tower.embed(batch)
        weights = token_weights(tower, batch, stream)
        counted = weights > 0
        weights = weights[counted]
        for index, layer in enumerate(tower.layers):
            attended = tower.attended(layer, stream)
            middle = stream + layer.self_attn.out_proj(attended)
            activated = tower.activated(layer, middle)
            behind = middle + layer.mlp.fc2(activated)
            self.read[2 * index].add(normalized(stream[counted], epsilon), weights=weights)
            self.read[2 * index + 1].add(normalized(middle[counted], epsilon), weights=weights)
            self.attended[index].add(attended[counted], weights=weights)
            self.activated[index].add(activated[counted], weights=weights)
            self.cosines[index] += weights.double() @ F.cosine_similarity(stream[counted], behind[counted]).double()
            stream = behind
        self.read[-1].add(normalized(pooled(stream, tower.ends(batch)), epsilon))
        self.embeds.add(F.normalize(tower.embeds(stream, tower.ends(batch)), dim=-1))

    def statistics(self) -> TowerStatistics:
        for moments in (*self.read, self.embedded, self.embeds, *self.attended, *self.activated):
            moments.sum_over_processes()
        sum_over_processes([self.cosines])
        if not self.read[-1].weight > 0:
            raise ValueError("There are no pairs to calibrate with.")
        if not self.embeds.input_input.isfinite().all():
            raise ValueError(
                f"What the teacher's {self.tower.name} tower computes on the calibration pairs is not finite. Look "
                "for NaN and infinity in their pixel_values, and compute in fp32."
            )
        layers, heads = self.tower.layers, self.tower.config.num_attention_heads
        head_energy = [
            _head_energy(layer.self_attn.out_proj.weight, moments.covariance, heads)
            for layer, moments in zip(layers, self.attended, strict=True)
        ]
        neuron_energy = [
            moments.variance * layer.mlp.fc2.weight.double().square().sum(dim=0)
            for layer, moments in zip(layers, self.activated, strict=True)
        ]
        return TowerStatistics(
            read=torch.stack([moments.second_moment for moments in self.read]),
            means=torch.stack([moments.mean for moments in self.read]),
            embedded=self.embedded.second_moment,
            embeds=self.embeds.second_moment,
            attended=self.attended,
            activated=self.activated,
            changed=1 - self.cosines / self.read[0].weight,
            head_energy=torch.stack(head_energy),
            neuron_energy=torch.stack(neuron_energy),
        )


def _head_energy(written: torch.Tensor, covariance: torch.Tensor, heads: int) -> torch.Tensor:
    """Mean square of what each head adds to the stream through `out_proj`, its mean not counted, `(heads,)`."""
    written = written.double().unflatten(1, (heads, -1))  # (hidden_size, heads, head width)
    covariance = covariance.unflatten(1, (heads, -1)).unflatten(0, (heads, -1))
    return torch.einsum("dhi,hihj,dhj->h", written, covariance, written)

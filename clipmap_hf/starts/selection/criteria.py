"""Scores of a teacher's parts by its weights, or by their gradients."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from torch.func import functional_call
from transformers import PreTrainedModel

from clipmap_hf.config import embedding_width
from clipmap_hf.distributed import sum_over_processes
from clipmap_hf.families import family_for
from clipmap_hf.losses import contrastive_loss
from clipmap_hf.models.features import ClipFeatures
from clipmap_hf.starts.selection.channels import channel_scores, channel_scores_like
from clipmap_hf.starts.selection.pairs import first_texts, pair_batches
from clipmap_hf.starts.selection.scores import Scores, TowerScores


__all__ = ["magnitude", "manual", "part_sums", "random_selection", "taylor"]

Batch = Mapping[str, torch.Tensor]


def manual(teacher: PreTrainedModel, batches: Iterable[Batch], seed: int) -> Scores:
    """TinyCLIP's manual inheritance: the first channels, heads and neurons; of layers, too, the first count most."""
    return _scores_like(teacher, lambda size: -torch.arange(size, dtype=torch.float32))


def random_selection(teacher: PreTrainedModel, batches: Iterable[Batch], seed: int) -> Scores:
    """A draw, the least that any other criterion should beat."""
    generator = torch.Generator().manual_seed(seed)
    return _scores_like(teacher, lambda size: torch.rand(size, generator=generator))


@torch.no_grad()
def magnitude(teacher: PreTrainedModel, batches: Iterable[Batch], seed: int) -> Scores:
    """The sum of squares of all weights that write or read a part."""
    return part_sums(teacher, {name: tensor.double().square() for name, tensor in teacher.state_dict().items()})


@torch.no_grad()
def taylor(teacher: PreTrainedModel, batches: Iterable[Batch], seed: int) -> Scores:
    """
    First-order estimate of what the contrastive loss gains without a part: the absolute sum of weight times gradient
    over all that writes the part, plus that over all that reads it (MoPE-CLIP, after DynaBERT).

    Args:
        teacher: The model, on the device to compute on.
        batches: As `pair_batches` takes them; the gradient is that of the sum of their losses. Of several texts of an
            image, the first is its pair. Of several processes, each has its own.
        seed: Not used.

    Raises:
        TypeError: If `batches` is an iterator.
        ValueError: If there are no pairs, or they give no gradient or none that is finite; as in `pair_batches`.
    """
    model = teacher.eval()
    # Detached, because the parameters of a teacher may not ask for gradients.
    weights = {name: parameter.detach().requires_grad_() for name, parameter in model.named_parameters()}
    gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    pairs = torch.zeros((), device=model.device)
    for batch in pair_batches(batches):
        first = first_texts(batch.pop("image_of_text"))
        inputs = {name: tensor if name == "pixel_values" else tensor[first] for name, tensor in batch.items()}
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        pairs += len(first)
        with torch.enable_grad():
            output = functional_call(model, weights, args=(), kwargs=inputs)
            loss = contrastive_loss(ClipFeatures.from_output(output, weights["logit_scale"]))
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, gradient in zip(gradients, found, strict=True):
            gradients[name] += 0 if gradient is None else gradient
    sum_over_processes([pairs, *gradients.values()])
    _check_gradients(int(pairs), gradients)
    return part_sums(teacher, {name: tensor.double() * gradients[name] for name, tensor in model.named_parameters()})


def _check_gradients(pairs: int, gradients: Mapping[str, torch.Tensor]) -> None:
    """Raises a `ValueError` if gradients do not say which parts count."""
    if not pairs:
        raise ValueError("There are no pairs to score parts by.")
    if not all(gradient.isfinite().all() for gradient in gradients.values()):
        raise ValueError(
            f"The gradient of the loss of {pairs} pairs is not finite. Look for NaN and infinity in their "
            "pixel_values, and compute in fp32."
        )
    if not any(gradient.any() for gradient in gradients.values()):
        raise ValueError(
            f"The contrastive loss of {pairs} pairs has no gradient, so all parts would count the same. A batch needs "
            "at least two pairs, which are compared with each other."
        )


def part_sums(teacher: PreTrainedModel, values: Mapping[str, torch.Tensor]) -> Scores:
    """
    For each part the absolute sum of values over all that writes it, plus that over all that reads it; a layer has
    what its heads and neurons have.

    Args:
        teacher: The model.
        values: Of its tensors, by their names and of their shapes.

    """
    sums = defaultdict(float)
    family = family_for(teacher.config)
    for name, spec in family.specs(teacher.state_dict(), teacher.config).items():
        if spec.rule.statistic:  # no weight
            continue
        value = values[name].unflatten(0, (spec.rule.stacked, -1)).sum(dim=0) if spec.tower else None
        for axis, space in enumerate(spec.rule.axes):
            if space is not None:
                others = [other for other in range(len(spec.rule.axes)) if other != axis]
                sums[spec.tower, spec.layer, space] += value.sum(dim=others) if others else value
    embed = sum(total.abs() for (_, _, space), total in sums.items() if space in ("embed", "embed.in"))
    vision = _tower_sums(teacher, "vision", sums) if family.transformers else channel_scores(teacher, sums)
    return Scores(vision, _tower_sums(teacher, "text", sums), embed=embed)


def _tower_sums(teacher: PreTrainedModel, tower: str, sums: Mapping[tuple, torch.Tensor]) -> TowerScores:
    config = getattr(teacher.config, f"{tower}_config")
    width = config.hidden_size // config.num_attention_heads

    def in_layer(layer: int | None, *spaces: str) -> list[torch.Tensor]:
        return [
            total
            for (where, index, space), total in sums.items()
            if (where, index) == (tower, layer) and space in spaces
        ]

    def by_head(found: list[torch.Tensor]) -> torch.Tensor:
        return sum(total.unflatten(0, (-1, width)).sum(dim=1).abs() for total in found)

    def by_channel(found: list[torch.Tensor]) -> torch.Tensor:
        return sum(total.abs() for total in found)

    layers, spaces = range(config.num_hidden_layers), ("query", "key", "value", "value.in")
    heads = torch.stack([by_head(in_layer(index, *spaces)) for index in layers])
    inner = torch.stack([by_channel(in_layer(index, *spaces)) for index in layers])
    neurons = torch.stack([sum(total.abs() for total in in_layer(index, "ffn", "ffn.in")) for index in layers])
    stream = ("residual", "residual.in", "patch")
    channels = sum(total.abs() for (where, _, space), total in sums.items() if where == tower and space in stream)
    scores = TowerScores(channels, heads, neurons, heads.sum(dim=1) + neurons.sum(dim=1), inner=inner)
    if pool := in_layer(None, "pool", "pool.in"):
        scores.pool_heads, scores.pool_inner = by_head(pool), by_channel(pool)
        scores.pool_neurons = sum(total.abs() for total in in_layer(None, "pool_ffn", "pool_ffn.in"))
    return scores


def _scores_like(teacher: PreTrainedModel, scores_of: Callable[[int], torch.Tensor]) -> Scores:
    towers, has_transformers = [], family_for(teacher.config).transformers
    for name in ("vision", "text") if has_transformers else ("text",):
        config = getattr(teacher.config, f"{name}_config")
        layers = range(config.num_hidden_layers)
        heads, neurons = (
            torch.stack([scores_of(size) for _ in layers])
            for size in (config.num_attention_heads, config.intermediate_size)
        )
        scores = TowerScores(scores_of(config.hidden_size), heads, neurons, scores_of(len(layers)))
        if name == "vision" and "pool" in family_for(teacher.config).spaces:
            scores.pool_heads = scores_of(config.num_attention_heads)
            scores.pool_neurons = scores_of(config.intermediate_size)
        towers.append(scores)
    vision = [] if has_transformers else [channel_scores_like(teacher, scores_of)]
    found = Scores(*vision, *towers, embed=scores_of(embedding_width(teacher.config)))
    for scores in towers:
        scores.inner = torch.stack([scores_of(len(scores.channels)) for _ in scores.layers])
        scores.pool_inner = scores_of(len(scores.channels))
    return found

"""Lifts of a ResNet whose layers are not solved: what they read of lost channels is guessed from those kept."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from clipmap_hf.families import family_for
from clipmap_hf.mapping.operators import project
from clipmap_hf.starts.calibrated.operators import lift
from clipmap_hf.starts.calibrated.resnet.blocks import block_sources
from clipmap_hf.starts.calibrated.resnet.channels import ChannelStatistics, LayerSpace, layer_space
from clipmap_hf.starts.calibrated.resnet.convolutions import units


__all__ = ["lift_channels"]


@torch.no_grad()
def lift_channels(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    statistics: ChannelStatistics,
    operators: Mapping[str, torch.Tensor],
    layers: Mapping[str, Sequence[int]],
) -> None:
    """
    Lets a mapped student's vision tower read all of the teacher's channels through a lift: the least-squares guess of
    all from those that are kept. What convolutions then lack in mean and variance, their BatchNorms are measured for.

    Args:
        student: Mapped by `operators`; changed in place.
        teacher: The teacher.
        statistics: Of the teacher.
        operators: One-hot, as `ChannelStatistics.operators` gives them.
        layers: The teacher's blocks that the student's stand for, by stack, without the first of each stage.
    """
    family, sources = family_for(teacher.config), units(teacher.vision_model)
    lifts = {}
    for where, moments in statistics.read.items():
        kept = _kept(operators, where)
        rows = moments.covariance[kept]
        lifts[where] = lift(rows, rows[:, kept])
    for name, (conv, _) in units(student.vision_model).items():
        source = _source(name, layers)
        if where := layer_space(family, source, 1):
            written = _kept(operators, layer_space(family, source, 0))
            conv.weight.copy_(project(sources[source][0].weight[written], lifts[where], -3))
    pool, big = student.vision_model.attnpool, teacher.vision_model.attnpool
    heads, embed = _kept(operators, ("pool_value", None)), operators.get("embed")
    for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
        own, linear = getattr(pool, name), getattr(big, name)
        where = ("pool_value" if name == "c_proj" else "stream4", None)
        mean, kept = statistics.read[where].mean.float(), _kept(operators, where)
        weight, lost = linear.weight, mean - lifts[where].T @ mean[kept]
        bias = linear.bias + weight @ lost
        if name != "c_proj":
            weight, bias = weight[heads], bias[heads]
        elif embed is not None:
            weight, bias = embed @ weight, embed @ bias
        own.weight.copy_(weight @ lifts[where].T)
        own.bias.copy_(bias)


def _source(name: str, layers: Mapping[str, Sequence[int]]) -> str:
    """The teacher's convolution that one of the student's comes from."""
    stage, _, rest = name.partition(".")
    if not rest:
        return name  # of the stem
    block, _, conv = rest.partition(".")
    begins = layers.get(f"vision_layers_{int(stage.removeprefix('layer')) - 1}", ())
    return f"{stage}.{block_sources(begins)[int(block)]}.{conv}"


def _kept(operators: Mapping[str, torch.Tensor], where: LayerSpace) -> torch.Tensor:
    """The channels of a space that are kept."""
    space, layer = where
    kept = operators[f"vision_{space}"].argmax(dim=-1)
    return kept if layer is None else kept[layer - 1]

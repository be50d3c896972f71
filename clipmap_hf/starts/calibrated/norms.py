"""Sets LayerNorms and biases of a mapped student, so that its streams have the scale and mean of the teacher's."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from clipmap_hf.models.towers import Tower
from clipmap_hf.starts.calibrated.statistics import TowerStatistics


__all__ = ["set_gains_and_shifts", "set_pre_layrnorm"]


@torch.no_grad()
def set_gains_and_shifts(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    statistics: Mapping[str, TowerStatistics],
    operators: Mapping[str, torch.Tensor],
    layers: Mapping[str, list[int]],
) -> None:
    """
    Sets the LayerNorms that a mapped student's layers read through, whose inputs have lost length with their axes, and
    the biases that make up for the means of heads and neurons it has lost; and the constant part of its embeddings.

    Args:
        student: Mapped by `operators`; changed in place.
        teacher: The folded teacher.
        statistics: Of it, by tower.
        operators: As `calibrated_operators` gives them.
        layers: The teacher's layers that the student's stand for, by tower.
    """
    for name, found in statistics.items():
        big, small, residual = Tower(teacher, name), Tower(student, name), operators[f"{name}_residual"]
        gains = [_gain(residual, moment) for moment in found.read]
        for index, layer in zip(layers[name], small.layers, strict=True):
            source = big.layers[index]
            layer.layer_norm1.weight.fill_(gains[2 * index])
            layer.layer_norm2.weight.fill_(gains[2 * index + 1])
            for space, own, writer, moments in (
                ("value", layer.self_attn.out_proj, source.self_attn.out_proj, found.attended[index]),
                ("ffn", layer.mlp.fc2, source.mlp.fc2, found.activated[index]),
            ):
                kept, lift = (operators[f"{name}_{side}"][index] for side in (space, f"{space}_in"))
                lost = moments.mean.float() - lift.T @ (kept @ moments.mean.float())
                own.bias += residual @ (writer.weight @ lost)
        small.final_norm.weight.fill_(gains[-1])
        constant = big.projection(big.final_norm.bias)
        small.add_constant(operators["embed"] @ constant if "embed" in operators else constant)


@torch.no_grad()
def set_pre_layrnorm(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    statistics: TowerStatistics,
    operators: Mapping[str, torch.Tensor],
) -> None:
    """
    Lets a mapped student's `pre_layrnorm` write the teacher's stream, mapped.

    Args:
        student: Mapped by `operators`; changed in place.
        teacher: The folded teacher.
        statistics: Of its vision tower.
        operators: As `calibrated_operators` gives them.
    """
    norm, embedding = student.vision_model.pre_layrnorm, operators["vision_patch"].double()
    written = torch.einsum("sb,bc,sc->", embedding, statistics.embedded, embedding)
    centered = statistics.embedded.trace() - statistics.embedded.mean(dim=0).sum()
    norm.weight.fill_(float((embedding.shape[1] / embedding.shape[0] * written / centered).sqrt()))
    norm.bias.copy_(operators["vision_residual"] @ teacher.vision_model.pre_layrnorm.bias)


def _gain(residual: torch.Tensor, moment: torch.Tensor) -> float:
    """Divides the length of a mapped LayerNorm output by the length of the mapped stream's own."""
    residual = residual.double()
    return float((torch.einsum("sb,bc,sc->", residual, moment, residual) / len(residual)).sqrt())

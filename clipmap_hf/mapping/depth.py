"""Rules that choose the teacher layers from which a student's layers start."""

import torch


__all__ = ["DEPTH_RULES", "interval_front", "most_changing", "one_hot_depth", "spread"]


def interval_front(teacher_layers: int, student_layers: int) -> list[int]:
    """Takes every (teacher // student)-th layer from the front: TinyCLIP's rule, which the paper starts from."""
    step = teacher_layers // student_layers
    return list(range(0, student_layers * step, step))


def spread(teacher_layers: int, student_layers: int) -> list[int]:
    """Takes evenly spaced layers, first and last included; a single layer is the last."""
    if student_layers == 1:
        return [teacher_layers - 1]
    return [round(i * (teacher_layers - 1) / (student_layers - 1)) for i in range(student_layers)]


def most_changing(changed: torch.Tensor, student_layers: int) -> list[int]:
    """Takes the layers that turn the stream most, by `TowerStatistics.changed`: the rule `similarity`."""
    return changed.topk(student_layers).indices.sort().values.tolist()


DEPTH_RULES = {"interval_front": interval_front, "spread": spread}


def one_hot_depth(layers: list[int], teacher_layers: int) -> torch.Tensor:
    """Makes the depth operator `(len(layers), teacher_layers)` that copies the listed layers."""
    return torch.nn.functional.one_hot(torch.tensor(layers), teacher_layers).float()

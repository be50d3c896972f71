"""From scores of a teacher's parts to the mapper that keeps the highest."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from transformers import PreTrainedModel

from clipmap_hf.distributed import broadcast
from clipmap_hf.mapping.depth import DEPTH_RULES
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.mapping.plan import MappingPlan
from clipmap_hf.starts.selection.channels import ChannelScores, keep_channels
from clipmap_hf.starts.selection.scores import Scores, keep, strongest


__all__ = ["mapper_from_scores", "select_by"]

Batches = Iterable[Mapping[str, torch.Tensor]]
Criterion = Callable[[PreTrainedModel, Batches, int], Scores]


def select_by(criterion: Criterion) -> Callable[[PreTrainedModel, MappingPlan, Batches], WeightMapper]:
    """The start that keeps what a criterion, from the teacher, batches and a seed, scores highest."""
    return partial(_select_by, criterion)


@torch.no_grad()
def _select_by(criterion: Criterion, teacher: PreTrainedModel, plan: MappingPlan, batches: Batches) -> WeightMapper:
    scores = criterion(teacher, batches, plan.config.seed)
    mapper = mapper_from_scores(plan, plan.teacher_tensors(teacher), scores)
    broadcast(mapper.state_dict().values(), teacher.device)
    return mapper


def mapper_from_scores(plan: MappingPlan, tensors: Mapping[str, torch.Tensor], scores: Scores) -> WeightMapper:
    """
    The mapper that keeps what has the highest scores. Layers are kept by their scores too, unless the plan's depth
    rule is a key of `DEPTH_RULES`.

    Args:
        plan: A plan that does not fold.
        tensors: The teacher's, as `plan.teacher_tensors` gives them.
        scores: Of the teacher's parts.
    """
    if plan.config.depth in DEPTH_RULES:
        layers = plan.layers_by_rule()
    else:
        of_stacks = _layer_scores(plan, scores)
        layers = {name: strongest(of_stacks[name], small).tolist() for name, (_, small) in plan.stacks().items()}
    operators = keep(scores, plan.teacher, plan.student)
    if "vision" in plan.cut and isinstance(scores.vision, ChannelScores):
        operators |= keep_channels(scores.vision, plan.family, plan.teacher, plan.student)
    return WeightMapper(plan, tensors, operators, layers)


def _layer_scores(plan: MappingPlan, scores: Scores) -> dict[str, torch.Tensor]:
    """The scores of layers `(layers,)` by their stack."""
    spaces = {}
    for spec in plan.mapped_kinds:
        if spec.layer is not None:
            spaces.setdefault((plan.stack(spec), spec.tower), set()).update(
                plan.family.layer_spaces & {*spec.rule.axes}
            )
    found = {}
    for (stack, tower), own in spaces.items():
        parts = getattr(scores, tower)
        found[stack] = parts.of_layers(sorted(own)) if isinstance(parts, ChannelScores) else parts.layers
    return found

"""The calibrated start: statistics, operators, a mapped student, and its layers refitted; of a ResNet, too."""

import copy
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from clipmap_hf.distributed import broadcast
from clipmap_hf.mapping.depth import DEPTH_RULES, most_changing
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.mapping.plan import MappingPlan
from clipmap_hf.starts.calibrated.batches import CalibrationBatches
from clipmap_hf.starts.calibrated.norms import set_gains_and_shifts, set_pre_layrnorm
from clipmap_hf.starts.calibrated.operators import calibrated_operators, embedding_axes
from clipmap_hf.starts.calibrated.refit import refit
from clipmap_hf.starts.calibrated.resnet.channels import calibrate_channels
from clipmap_hf.starts.calibrated.resnet.lifts import lift_channels
from clipmap_hf.starts.calibrated.resnet.refit import refit_resnet
from clipmap_hf.starts.calibrated.statistics import calibrate
from clipmap_hf.starts.calibrated.streams import segments


__all__ = ["calibrated"]


@torch.no_grad()
def calibrated(
    teacher: PreTrainedModel,
    plan: MappingPlan,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    classic: bool = False,
) -> WeightMapper:
    """
    A mapper whose operators, and corrections of its student's weights, come from the teacher's activations.

    Args:
        teacher: The model to compress; the activations are computed where it lies.
        plan: A plan that folds.
        batches: Of `pixel_values` and, if there are captions, `input_ids`. Of several processes, each has its own.
        classic: As the start was first made (`refit`).

    Raises:
        TypeError: If `batches` is an iterator.
        ValueError: If there are no pairs, or no images; if a layer has more heads than it can take.
    """
    config, pairs = plan.config, CalibrationBatches(batches, teacher.config)
    tensors, model = plan.teacher_tensors(teacher), copy.deepcopy(teacher).float().eval()
    model.load_state_dict(tensors)
    transformers = [name for name in plan.cut if name in plan.family.layerwise]
    layers = plan.layers_by_rule() if config.depth in DEPTH_RULES else None
    if layers is not None:
        _check_heads(plan, transformers, layers)
    statistics = calibrate(model, pairs, transformers, neuron_covariance=not config.refit)
    operators = calibrated_operators(statistics, model, plan.student)
    changed = {name: found.changed for name, found in statistics.items()}
    channels = calibrate_channels(model, pairs) if len(transformers) < len(plan.cut) else None
    if channels is not None:
        operators |= channels.operators(model.config, plan.student)
        changed |= channels.changed
        if "embed" in operators:
            moments = [channels.embeds, statistics["text"].embeds]  # both towers are cut where it is smaller
            operators["embed"] = embedding_axes(moments, plan.student.projection_dim)
    if layers is None:
        layers = {name: most_changing(changed[name], small) for name, (_, small) in plan.stacks().items()}
        _check_heads(plan, transformers, layers)
    mapper = WeightMapper(plan, tensors, operators, layers)
    student = mapper.export()
    if "vision" in statistics:
        set_pre_layrnorm(student, model, statistics["vision"], operators)
    if config.refit:
        refit(student, model, statistics, operators, layers, pairs, config.refit_steps, classic=classic)
        if channels is not None:
            refit_resnet(student, model, operators, layers, pairs, config.refit_steps)
    else:
        set_gains_and_shifts(student, model, statistics, operators, layers)
        if channels is not None:
            lift_channels(student, model, channels, operators, layers)
    mapper.correct(student.state_dict())
    broadcast(mapper.state_dict().values(), model.device)  # machines of different kinds may not agree to the last bit
    return mapper


def _check_heads(plan: MappingPlan, towers: Iterable[str], layers: Mapping[str, list[int]]) -> None:
    """Checks that the layers that one of the student's stands for have as many heads together as that needs."""
    for name in towers:
        big, small = (getattr(config, f"{name}_config") for config in (plan.teacher, plan.student))
        shortest = min(map(len, segments(layers[name], big.num_hidden_layers))) if plan.config.refit else 1
        if small.num_attention_heads > shortest * big.num_attention_heads:
            raise ValueError(
                f"{name}.num_attention_heads={small.num_attention_heads} is more than a layer of the student's has to "
                f"take them from: {shortest} of the teacher's layers with {big.num_attention_heads} heads each. Ask "
                "for fewer heads or layers."
            )

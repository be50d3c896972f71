"""The calibrated start: statistics, operators, a mapped student, and its layers refitted."""

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
from clipmap_hf.starts.calibrated.operators import calibrated_operators
from clipmap_hf.starts.calibrated.refit import refit
from clipmap_hf.starts.calibrated.statistics import calibrate


__all__ = ["calibrated"]


@torch.no_grad()
def calibrated(
    teacher: PreTrainedModel, plan: MappingPlan, batches: Iterable[Mapping[str, torch.Tensor]]
) -> WeightMapper:
    """
    A mapper whose operators, and corrections of its student's weights, come from the teacher's activations.

    Args:
        teacher: The model to compress; the activations are computed where it lies.
        plan: A plan that folds.
        batches: Of `pixel_values` and, if there are captions, `input_ids`. Of several processes, each has its own.

    Raises:
        TypeError: If `batches` is an iterator.
        ValueError: If there are no pairs, or no images.
    """
    config, pairs = plan.config, CalibrationBatches(batches, teacher.config)
    tensors, model = plan.teacher_tensors(teacher), copy.deepcopy(teacher).float().eval()
    model.load_state_dict(tensors)
    statistics = calibrate(model, pairs, plan.cut, neuron_covariance=not config.refit)
    operators = calibrated_operators(statistics, model, plan.student)
    if config.depth in DEPTH_RULES:
        layers = plan.layers_by_rule()
    else:
        layers = {name: most_changing(found.changed, plan.depths(name)[1]) for name, found in statistics.items()}
    mapper = WeightMapper(plan, tensors, operators, layers)
    student = mapper.export()
    if "vision" in statistics:
        set_pre_layrnorm(student, model, statistics["vision"], operators)
    if config.refit:
        refit(student, model, statistics, operators, layers, pairs, config.refit_steps)
    else:
        set_gains_and_shifts(student, model, statistics, operators, layers)
    mapper.correct(student.state_dict())
    broadcast(mapper.state_dict().values(), model.device)  # machines of different kinds may not agree to the last bit
    return mapper

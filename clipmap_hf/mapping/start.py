"""Starts a mapper from its teacher's activations."""

import copy
from collections.abc import Iterable, Mapping

import torch
from transformers import PretrainedConfig, PreTrainedModel

from clipmap_hf.distributed import broadcast
from clipmap_hf.mapping.calibration import calibrate, calibration_batch
from clipmap_hf.mapping.depth import DEPTH_RULES, most_changing, one_hot_depth
from clipmap_hf.mapping.fold import fold
from clipmap_hf.mapping.initializers import CALIBRATED_INITIALIZERS
from clipmap_hf.mapping.initializers.calibrated import gains_and_shifts, set_pre_layrnorm
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.mapping.refit import refit


__all__ = ["CalibrationBatches", "start_from_activations"]


@torch.no_grad()
def start_from_activations(
    mapper: WeightMapper, teacher: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]
) -> None:
    """
    Sets the initial operators of a mapper, and the corrections of its student's weights, as its config says.

    Args:
        mapper: With an initializer of `CALIBRATED_INITIALIZERS`.
        teacher: Its teacher; the activations are computed where it lies.
        batches: Of `pixel_values` and `input_ids`, gone through several times. Of several processes, each has its own.

    Raises:
        TypeError: If `batches` is an iterator.
        ValueError: If there are no pairs, or no images.
    """
    config = mapper.config
    model = copy.deepcopy(teacher).float().eval()
    if mapper.folds:
        model.load_state_dict(fold(model.state_dict(), mapper.family))
    pairs = CalibrationBatches(batches, model.config)
    statistics = calibrate(model, pairs, mapper.cut, neuron_covariance=mapper.folds and not config.refit)
    operators = CALIBRATED_INITIALIZERS[config.initializer](statistics, model, mapper.student_config)
    layers = {}
    for name, of_tower in statistics.items():
        big, small = (
            getattr(one, f"{name}_config").num_hidden_layers for one in (model.config, mapper.student_config)
        )
        by_rule = config.depth in DEPTH_RULES
        layers[name] = DEPTH_RULES[config.depth](big, small) if by_rule else most_changing(of_tower.changed, small)
    depths = {name: one_hot_depth(chosen, len(statistics[name].changed)) for name, chosen in layers.items()}
    mapper.start(operators, depths)
    if mapper.folds:
        student = mapper.export().to(model.device)
        if "vision" in statistics:
            set_pre_layrnorm(student, model, statistics["vision"], operators)
        if config.refit:
            refit(student, model, statistics, operators, layers, pairs, config.refit_steps)
        else:
            gains_and_shifts(student, model, statistics, operators, layers)
        mapper.correct(student.to(mapper.logit_scale.device).state_dict())
    broadcast(mapper.state_dict().values(), model.device)  # machines of different kinds may not agree to the last bit


class CalibrationBatches:
    """
    Batches as calibration reads them, from the start at every iteration.

    Args:
        batches: Of `pixel_values` and, if there are captions, `input_ids`.
        config: The teacher's.

    Raises:
        TypeError: If `batches` is an iterator.
    """

    def __init__(self, batches: Iterable[Mapping[str, torch.Tensor]], config: PretrainedConfig):
        if iter(batches) is batches:
            raise TypeError("Calibration goes through its batches several times; give a list or a DataLoader.")
        self.batches, self.config = batches, config

    def __iter__(self):
        return (calibration_batch(batch, self.config, index) for index, batch in enumerate(self.batches))

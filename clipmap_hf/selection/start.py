"""Starts a mapper from a selection of its teacher's parts."""

from collections.abc import Iterable, Mapping

import torch
from transformers import PretrainedConfig, PreTrainedModel

from clipmap_hf.distributed import broadcast
from clipmap_hf.mapping.depth import DEPTH_RULES, one_hot_depth
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.mapping.scores import Scores, keep, strongest
from clipmap_hf.selection import CRITERIA


__all__ = ["start_from_scores", "start_from_selection"]


@torch.no_grad()
def start_from_selection(
    mapper: WeightMapper, teacher: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]] = ()
) -> None:
    """
    Sets the operators of a mapper to keep what its config's criterion gives the highest scores.

    Args:
        mapper: With an initializer of `CRITERIA`.
        teacher: Its teacher; computed with where it lies.
        batches: Of `pixel_values`, `input_ids` and `attention_mask`, for the criteria that look at pairs.

    Raises:
        ValueError: If the criterion looks at pairs, and there are none or they have no captions.
    """
    scores = CRITERIA[mapper.config.initializer](teacher, batches, mapper.config.seed)
    start_from_scores(mapper, teacher.config, scores)
    broadcast(mapper.state_dict().values(), teacher.device)


def start_from_scores(mapper: WeightMapper, teacher: PretrainedConfig, scores: Scores) -> None:
    """
    Sets the operators of a mapper to keep what has the highest scores.

    Args:
        mapper: Any; its config's depth rule may be `score`.
        teacher: Its teacher's config.
        scores: Of the teacher's parts.
    """
    depths = {}
    for name in mapper.cut:
        big, small = (getattr(one, f"{name}_config").num_hidden_layers for one in (teacher, mapper.student_config))
        if mapper.config.depth == "score":
            layers = strongest(getattr(scores, name).layers, small).tolist()
        else:
            layers = DEPTH_RULES[mapper.config.depth](big, small)
        depths[name] = one_hot_depth(layers, big)
    mapper.start(keep(scores, teacher, mapper.student_config), depths)

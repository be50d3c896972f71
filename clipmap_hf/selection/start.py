"""Starts a mapper from a selection of its teacher's parts."""

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from clipmap_hf.distributed import broadcast
from clipmap_hf.mapping.depth import DEPTH_RULES, one_hot_depth
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.mapping.scores import keep, strongest
from clipmap_hf.selection import CRITERIA


__all__ = ["start_from_selection"]


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
    config = mapper.config
    scores, depths = CRITERIA[config.initializer](teacher, batches, config.seed), {}
    for name in ("vision", "text"):
        big, small = (
            getattr(one, f"{name}_config").num_hidden_layers for one in (teacher.config, mapper.student_config)
        )
        by_score = config.depth == "score"
        layers = (
            strongest(getattr(scores, name).layers, small).tolist()
            if by_score
            else DEPTH_RULES[config.depth](big, small)
        )
        depths[name] = one_hot_depth(layers, big)
    mapper.start(keep(scores, teacher.config, mapper.student_config), depths)
    broadcast(mapper.state_dict().values(), teacher.device)

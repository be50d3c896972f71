"""Ternary weights: `TernaryTrainer` trains weights of -1, 0 and 1, and writes the packed model with a card."""

from typing import Any

import torch
from transformers.utils import logging

from clipmap_hf.pipeline.distillation import DistillationTrainer
from clipmap_hf.training.optimization import ramp_length, step_count
from clipmap_hf.training.stages.ternary import TernaryStage
from clipmap_hf.training.ternary_arguments import TernaryStageArguments


__all__ = ["TernaryTrainer"]

logger = logging.get_logger(__name__)


class TernaryTrainer(DistillationTrainer):
    """
    Trains ternary weights of a model against its float teachers, and writes it, packed, to `output_dir`. With no
    steps, weights are rounded as they are, which leaves little of most models. The student is trained in place: a copy
    of the teacher, or a smaller model. All else is as in `DistillationTrainer`, with `TernaryArguments`.

    Raises:
        ValueError: If the ramp is longer than the training, or as in `DistillationTrainer`.
    """

    make_stage, numbers = TernaryStage, TernaryStageArguments

    def _stage_options(self) -> dict[str, Any]:
        steps = step_count(self.args, self.context.pairs)
        ramp_steps = ramp_length(self.args.ramp_steps, steps)
        if not steps:
            logger.warning(
                "Weights are made ternary without training; that leaves little of most models, so give steps."
            )
        float_dtype = getattr(torch, self.args.float_dtype)
        return {"config": self.args.config(), "ramp_steps": ramp_steps, "float_dtype": float_dtype}

    def _card(self) -> dict[str, Any]:
        method = "Its weights are -1, 0 or 1 times a level, trained as such to give the teacher's embeddings."
        return {"method": method, "packed": True}

"""The stage that trains the operators of a `WeightMapper`."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from clipmap_hf.distributed import average_gradients, gather
from clipmap_hf.mapping.mapper import WeightMapper
from clipmap_hf.training.stages.base import CONTRASTIVE, Batch
from clipmap_hf.training.stages.distillation import DistillationStage


__all__ = ["MappingStage"]


class MappingStage(DistillationStage):
    """
    Trains the operators of a `WeightMapper`, the teacher frozen, on the contrastive loss (paper A.3, Eq. 12) or, as in
    Fig. 4, on others too. The weights are mapped once for all chunks of a step, and what processes exchange are
    gradients of the student's size. BatchNorms keep statistics of the mapped network (`WeightMapper.statistics`).

    Args:
        trained: The mapper.
        teachers: As in `DistillationStage`; not needed for the contrastive loss alone.
        losses: As in `DistillationStage`.
        logit_scale: As in `Stage`.
        learn_logit_scale: As in `Stage`.
        teacher_dims: As in `DistillationStage`.

    Raises:
        ValueError: If the student is as large as its teacher, so that nothing is mapped, for the hidden loss, whose
            projections are trained with a student, or as in `DistillationStage`.
    """

    trained: WeightMapper
    averages_gradients = True

    def __init__(
        self,
        trained: WeightMapper,
        *,
        teachers: Sequence[nn.Module] = (),
        losses: Mapping[str, float | Callable] = CONTRASTIVE,
        logit_scale: float = 50.0,
        learn_logit_scale: bool = False,
        teacher_dims: Sequence[int] = (),
    ):
        if not trained.plan.cut:
            raise ValueError(
                "The student is as large as its teacher, so there is nothing to map. Say what is to be smaller: a "
                "preset, or sizes such as vision_hidden_size."
            )
        if "hidden" in losses:
            raise ValueError("The mapping stage knows no hidden loss; leave it out, or use it in distillation.")
        super().__init__(
            trained,
            teachers=teachers,
            losses=losses,
            logit_scale=logit_scale,
            learn_logit_scale=learn_logit_scale,
            teacher_dims=teacher_dims,
        )

    def student(self) -> nn.Module:
        return self.trained.export()

    def statistics(self) -> list[torch.Tensor]:
        return list(self.trained.statistics.buffers())

    def _student_model(self, chunks: Sequence[Batch]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        # Those of all processes: the gradient that comes back is the mean of theirs, for the rows that any looks up.
        token_ids = gather(torch.cat([chunk["input_ids"].flatten() for chunk in chunks])) if self.training else None
        weights = self.trained.materialize(token_ids)
        trained = [name for name, weight in weights.items() if weight.requires_grad]
        weights |= zip(trained, average_gradients([weights[name] for name in trained]), strict=True)
        return self.trained.skeleton, weights

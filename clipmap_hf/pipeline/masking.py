"""The masking stage (TinyCLIP's automatic inheritance): `MaskingTrainer` learns masks, and writes what they select."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipmap_hf.config import ClipMapConfig
from clipmap_hf.costs.cost import CostReport
from clipmap_hf.hub.card import render_card
from clipmap_hf.hub.folder import write_card, write_student_folder
from clipmap_hf.models.loading import check_float
from clipmap_hf.models.teacher import Teacher, check_same_preprocessing
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.distillation import freeze_tower
from clipmap_hf.pipeline.trainer import StageTrainer
from clipmap_hf.training.arguments import MaskingStageArguments
from clipmap_hf.training.optimization import ramp_length, step_count
from clipmap_hf.training.stages.masking import MaskingStage


__all__ = ["MaskingTrainer"]


class MaskingTrainer(StageTrainer):
    """
    Learns masks of a copy of a model and writes the student that they select, to be distilled, to the output folder.

    Args:
        source: What to select from; mostly the first teacher.
        teachers: Frozen; the targets of several are averaged.
        student: The shape to select.
        args: The stage's numbers.
        context: The run.

    Raises:
        ValueError: If a teacher preprocesses images or texts in another way than the source, or the source's weights
            are packed; when it trains, if the ramp is longer than the training.
    """

    name, numbers = "masking", MaskingStageArguments

    def __init__(
        self,
        source: Teacher,
        teachers: Sequence[Teacher],
        student: ClipMapConfig,
        args: MaskingStageArguments,
        context: RunContext,
    ):
        check_float(source.model, "Masking")
        check_same_preprocessing(source.processor, teachers)
        super().__init__(args, context, source.processor)
        self.source, self.teachers, self.student = source, teachers, student

    def _make_stage(self) -> MaskingStage:
        arguments = self.args
        ramp = ramp_length(arguments.ramp_steps, step_count(arguments, self.context.pairs))
        return MaskingStage(
            freeze_tower(copy.deepcopy(self.source.model), arguments.freeze),
            student=self.student,
            ramp_steps=max(1, ramp),
            teachers=[teacher.model for teacher in self.teachers],
            losses=arguments.losses,
            logit_scale=arguments.logit_scale,
            learn_logit_scale=arguments.learn_logit_scale,
        )

    def _save(self, folder: Path, metrics: dict[str, float]) -> None:
        model, results, source = self.model, self._results(metrics), self.source.source
        write_student_folder(folder, model, self.processing_class)
        card = render_card(
            source.id,
            str(CostReport.of(self.source.model.config, model.config)),
            model_class=type(model).__name__,
            method="Its weights were selected from the teacher's by learned masks (TinyCLIP), and trained with them.",
            revision=source.revision,
            results=results,
            recipe=self.context.recipe,
        )
        write_card(folder, card, results)

    def _config(self) -> dict[str, Any]:
        return {
            "source": [self.source.id, self.source.revision],
            "teachers": [[teacher.id, teacher.revision] for teacher in self.teachers],
            "student": self.student.to_dict(),
        }

    @property
    def _first_teacher(self) -> Teacher:
        return self.teachers[0]

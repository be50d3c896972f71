"""Trains students of one size, which are made from a teacher in five ways and see equally many pairs."""

import copy
import dataclasses
import time
from collections.abc import Mapping

from accelerate.utils import set_seed
from transformers import CLIPModel, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig
from clipmap_hf.data.arguments import CalibrationArguments
from clipmap_hf.demo.report import Contestant
from clipmap_hf.models.loading import load_model
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.distillation import DistillationTrainer
from clipmap_hf.pipeline.mapping import MappingTrainer
from clipmap_hf.pipeline.pretraining import PretrainingTrainer
from clipmap_hf.pipeline.start import remove_start, start_compressor
from clipmap_hf.pipeline.ternarization import TernaryTrainer
from clipmap_hf.training.arguments import DistillationStageArguments, StageArguments
from clipmap_hf.training.result import TrainResult
from clipmap_hf.training.ternary_arguments import TernaryStageArguments


__all__ = ["Contest"]


class Contest:
    """
    Trains the students of the demo.

    Args:
        teacher: The teacher.
        student: Size of the students.
        calibration: Calibration pairs of the calibrated start.
        context: Context of the run. Its output folder gets a folder for each student.
    """

    def __init__(
        self, teacher: Teacher, student: ClipMapConfig, calibration: CalibrationArguments, context: RunContext
    ):
        self.teacher, self.student, self.calibration, self.context = teacher, student, calibration, context
        # Without evaluation, since the report evaluates all models at the end.
        self.training_only = dataclasses.replace(context, data=dataclasses.replace(context.data, eval_data=None))

    def contestants(self, stages: Mapping[str, StageArguments]) -> dict[str, Contestant]:
        """
        Trains all students.

        Args:
            stages: Arguments of the stages: `mapping` and `distillation` for CLIP-Map; `calibrated`, `ternary`,
                `manual` and `scratch` for the other students. The number of steps of the latter is set so that every
                student sees as many pairs as CLIP-Map in its two stages, including calibration pairs.

        Returns:
            The teacher and its students, by name.
        """
        compressor = self._start("diagonal")
        inherited = compressor.export()
        mapped = MappingTrainer(compressor, stages["mapping"], context=self.training_only.inside("mapped")).train()
        clip_map = self._distill(compressor.export(), stages["distillation"], "clip-map", mapped)
        began = time.perf_counter()
        started = self._start("calibrated").export()
        started = Contestant(started, self.calibration.calibration_pairs, time.perf_counter() - began)

        def with_equal_pairs(name: str, seen: int = 0) -> StageArguments:
            """Sets the steps of a stage whose student has seen `seen` pairs before."""
            return dataclasses.replace(stages[name], max_steps=(clip_map.pairs - seen) // stages[name].batch_size)

        student, arguments = copy.deepcopy(started.model), with_equal_pairs("calibrated", started.pairs)
        contestants = {
            "teacher": Contestant(self.teacher.model),
            "calibrated + distillation": self._distill(student, arguments, "student", started, self.context),
            "the same, ternary": self._ternarize(started, with_equal_pairs("ternary", started.pairs)),
            "calibrated, not trained": started,
            "CLIP-Map of the paper": clip_map,
            "manual inheritance + distillation": self._distill(inherited, with_equal_pairs("manual"), "manual"),
            "from scratch": self._train_from_scratch(student.config, with_equal_pairs("scratch")),
        }
        remove_start(self.context)
        return contestants

    def _start(self, initializer: str) -> ClipMapCompressor:
        student = dataclasses.replace(self.student, initializer=initializer)
        return start_compressor(self.teacher.source, student, self.context, self.calibration)

    def _distill(
        self,
        model: PreTrainedModel,
        arguments: DistillationStageArguments,
        name: str,
        after: Contestant | TrainResult | None = None,
        context: RunContext | None = None,
    ) -> Contestant:
        student_context = (context or self.training_only).inside(name)
        result = DistillationTrainer(model, self.teacher, arguments, context=student_context).train()
        before = (after.pairs, after.seconds) if after else (0, 0.0)
        return Contestant(model, before[0] + result.pairs, before[1] + result.seconds)

    def _ternarize(self, start: Contestant, arguments: TernaryStageArguments) -> Contestant:
        student_context, model = self.context.inside("ternary"), copy.deepcopy(start.model)
        result = TernaryTrainer(model, self.teacher, arguments, context=student_context).train()
        size = (student_context.output_dir / SAFE_WEIGHTS_NAME).stat().st_size
        packed = load_model(str(student_context.output_dir))
        return Contestant(packed, start.pairs + result.pairs, start.seconds + result.seconds, bytes=size)

    def _train_from_scratch(self, config: PretrainedConfig, arguments: StageArguments) -> Contestant:
        set_seed(self.context.run.seed)
        model, options = CLIPModel(config), {"processing_class": self.teacher.processor, "name": "scratch"}
        result = PretrainingTrainer(model, arguments, context=self.training_only.inside("scratch"), **options).train()
        return Contestant(model, result.pairs, result.seconds)

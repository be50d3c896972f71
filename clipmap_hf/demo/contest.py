"""Students of one size, made of a teacher in five ways on equally many pairs."""

import copy
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

from accelerate.utils import set_seed
from transformers import CLIPModel, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig
from clipmap_hf.demo.report import Contestant
from clipmap_hf.models import load_model
from clipmap_hf.runs import run_distillation, run_mapping
from clipmap_hf.starts import start_compressor
from clipmap_hf.teachers import Teacher
from clipmap_hf.ternarization import run_ternarization
from clipmap_hf.ternary.arguments import TernaryArguments
from clipmap_hf.training.arguments import (
    CalibrationArguments,
    DataArguments,
    DistillationArguments,
    RunArguments,
    StageArguments,
)
from clipmap_hf.training.setup import run_stage, training_pairs
from clipmap_hf.training.stages import ContrastiveStage
from clipmap_hf.training.trainer import TrainResult


__all__ = ["Contest"]


class Contest:
    """
    The students and what they have in common.

    Args:
        teacher: The teacher.
        student: The size to make of it.
        calibration: The pairs that the calibrated student starts from.
        run: Its output folder has a folder for each student.
        data: Training and evaluation pairs.
        recipe: The resolved arguments as YAML, for the cards.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: ClipMapConfig,
        calibration: CalibrationArguments,
        run: RunArguments,
        data: DataArguments,
        recipe: str,
    ):
        self.teacher, self.student, self.calibration, self.run, self.data = teacher, student, calibration, run, data
        self.training_only = dataclasses.replace(data, eval_data=None)  # a report evaluates all models at the end
        self.pairs, self.recipe = training_pairs(data), recipe

    def contestants(self, stages: Mapping[str, StageArguments]) -> dict[str, Contestant]:
        """
        The teacher and its students by name.

        Args:
            stages: Those of CLIP-Map, `mapping` and `distillation`; and `calibrated`, `ternary`, `manual` and
                `scratch`, which go on for as many pairs as the two together, those of calibration among them.
        """
        compressor = self._start("diagonal")
        inherited = compressor.export()
        into, common = self._into("mapped"), {"recipe": self.recipe, "pairs": self.pairs}
        mapped = run_mapping(compressor, stages["mapping"], into, self.training_only, **common)
        clip_map = self._distill(compressor.export(), stages["distillation"], "clip-map", mapped)
        began = time.perf_counter()
        started = self._start("calibrated").export()
        started = Contestant(started, self.calibration.calibration_pairs, time.perf_counter() - began)

        def for_as_many(name: str, before: int = 0) -> StageArguments:
            return dataclasses.replace(stages[name], steps=(clip_map.pairs - before) // stages[name].batch_size)

        student, arguments = copy.deepcopy(started.model), for_as_many("calibrated", started.pairs)
        return {
            "teacher": Contestant(self.teacher.model),
            "calibrated + distillation": self._distill(student, arguments, "student", started, self.data),
            "the same, ternary": self._ternarize(started, for_as_many("ternary", started.pairs)),
            "calibrated, not trained": started,
            "CLIP-Map of the paper": clip_map,
            "manual inheritance + distillation": self._distill(inherited, for_as_many("manual"), "manual"),
            "from scratch": self._train_anew(student.config, for_as_many("scratch")),
        }

    def _start(self, initializer: str) -> ClipMapCompressor:
        student = dataclasses.replace(self.student, initializer=initializer)
        return start_compressor(self.teacher.id, None, student, self.calibration, self.run, self.data)

    def _into(self, name: str) -> RunArguments:
        return dataclasses.replace(self.run, output_dir=str(Path(self.run.output_dir) / name))

    def _distill(
        self,
        model: PreTrainedModel,
        arguments: DistillationArguments,
        name: str,
        after: Contestant | TrainResult | None = None,
        data: DataArguments | None = None,
    ) -> Contestant:
        result = run_distillation(
            model,
            [self.teacher],
            self.teacher.processor,
            arguments,
            self._into(name),
            data or self.training_only,
            recipe=self.recipe,
            pairs=self.pairs,
        )
        before = (after.pairs, after.seconds) if after else (0, 0.0)
        return Contestant(model, before[0] + result.pairs, before[1] + result.seconds)

    def _ternarize(self, start: Contestant, arguments: TernaryArguments) -> Contestant:
        into, common = self._into("ternary"), {"recipe": self.recipe, "pairs": self.pairs}
        model, processor = copy.deepcopy(start.model), self.teacher.processor
        result = run_ternarization(model, [self.teacher], processor, arguments, into, self.data, **common)
        size = (Path(into.output_dir) / SAFE_WEIGHTS_NAME).stat().st_size
        return Contestant(
            load_model(into.output_dir), start.pairs + result.pairs, start.seconds + result.seconds, bytes=size
        )

    def _train_anew(self, config: PretrainedConfig, arguments: StageArguments) -> Contestant:
        set_seed(self.run.seed)
        stage = ContrastiveStage(CLIPModel(config), arguments.logit_scale, arguments.learn_logit_scale)
        common = {"name": "scratch", "pairs": self.pairs}
        result = run_stage(
            stage, arguments, self._into("scratch"), self.training_only, self.teacher.processor, **common
        )
        return Contestant(stage.trained, result.pairs, result.seconds)

"""Trains students of one size, which are made from a teacher by several methods and see equally many pairs."""

import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping
from functools import cached_property

from accelerate.utils import set_seed
from transformers import CLIPModel, PreTrainedModel, ProgressCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig
from clipmap_hf.data.arguments import CalibrationArguments
from clipmap_hf.demo.arguments import METHODS, ContestArguments
from clipmap_hf.demo.progress import TransientProgress, transient_line
from clipmap_hf.demo.report import Contestant, learning_curve
from clipmap_hf.files.atomic import read_json, write_json
from clipmap_hf.models.loading import load_model
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.distillation import DistillationTrainer
from clipmap_hf.pipeline.mapping import MappingTrainer
from clipmap_hf.pipeline.pretraining import PretrainingTrainer
from clipmap_hf.pipeline.start import start_compressor
from clipmap_hf.pipeline.ternarization import TernaryTrainer
from clipmap_hf.pipeline.trainer import StageTrainer
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.training.arguments import StageArguments


__all__ = ["Contest"]


class Contest:
    """
    Trains the students of the demo.

    Args:
        teacher: The teacher.
        student: Size of the students.
        calibration: Calibration pairs of the calibrated start.
        arguments: Which students, and on how many pairs.
        stages: Arguments of the stages: `mapping` and `distillation` for CLIP-Map; `calibrated`, `ternary`, `manual`
            and `scratch` for the other students. The number of steps, but for `mapping`, is set so that every student
            sees equally many pairs.
        context: Context of the run. Its output folder gets a folder for each student, and `start` for the calibrated
            start, so that the same command goes on after an interruption.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: ClipMapConfig,
        calibration: CalibrationArguments,
        arguments: ContestArguments,
        stages: Mapping[str, StageArguments],
        context: RunContext,
    ):
        self.teacher, self.student, self.calibration = teacher, student, calibration
        self.arguments, self.stages = arguments, stages
        if arguments.views is not None:
            cache = TeacherCacheArguments(str(context.output_dir / "teacher_cache"), arguments.views)
            context = dataclasses.replace(context, cache=cache)
        self.context = context

    def contestants(self) -> Iterator[tuple[str, Contestant]]:
        """Yields the teacher and its students by name, each as soon as it is ready."""
        yield "teacher", Contestant(self.teacher.model)
        for method in self.arguments.methods:
            yield from zip(METHODS[method], getattr(self, f"_{method}")(), strict=True)

    def _calibrated(self) -> Iterator[Contestant]:
        yield self._started
        trainer = self._distillation("calibrated", "student", copy.deepcopy(self._started.model), self._started.pairs)
        yield self._trained(trainer, self._started, after=METHODS["calibrated"][0])

    def _ternary(self) -> Iterator[Contestant]:
        started = self._started
        trainer = TernaryTrainer(
            copy.deepcopy(started.model),
            self.teacher,
            self._with_equal_pairs("ternary", started.pairs),
            context=self.context.inside("ternary"),
        )
        trained = self._trained(trainer, started)
        folder = trainer.context.output_dir
        yield dataclasses.replace(
            trained, model=load_model(str(folder)), bytes=(folder / SAFE_WEIGHTS_NAME).stat().st_size
        )

    def _clip_map(self) -> Iterator[Contestant]:
        compressor = self._start("diagonal")
        trainer = MappingTrainer(compressor, self.stages["mapping"], context=self.context.inside("mapped"))
        mapped = self._trained(trainer)
        yield self._trained(self._distillation("distillation", "clip-map", compressor.export(), mapped.pairs), mapped)

    def _manual(self) -> Iterator[Contestant]:
        yield self._trained(self._distillation("manual", "manual", self._inherited()))

    def _scratch(self) -> Iterator[Contestant]:
        config = self._inherited().config
        set_seed(self.context.run.seed)
        options = {"processing_class": self.teacher.processor, "context": self.context.inside("scratch")}
        arguments = self._with_equal_pairs("scratch")
        yield self._trained(PretrainingTrainer(CLIPModel(config), arguments, name="scratch", **options))

    def _start(self, initializer: str) -> ClipMapCompressor:
        student = dataclasses.replace(self.student, initializer=initializer)
        return start_compressor(self.teacher.source, student, self.context, self.calibration)

    def _inherited(self) -> PreTrainedModel:
        return self._start("diagonal").export()

    @cached_property
    def _started(self) -> Contestant:
        began, pairs = time.perf_counter(), self.calibration.calibration_pairs
        with transient_line(f"calibrated start on {pairs:,} pairs"):
            model = self._start("calibrated").export()
        # A start that is taken up again takes no time; what it took is kept beside it.
        kept, origin = (self.context.output_dir / "start" / name for name in ("seconds.json", "origin.json"))
        if not kept.is_file() or kept.stat().st_mtime_ns < origin.stat().st_mtime_ns:
            write_json(kept, time.perf_counter() - began)
        return Contestant(model, pairs, read_json(kept))

    def _distillation(self, stage: str, folder: str, model: PreTrainedModel, seen: int = 0) -> DistillationTrainer:
        arguments = self._with_equal_pairs(stage, seen)
        return DistillationTrainer(model, self.teacher, arguments, context=self.context.inside(folder))

    def _with_equal_pairs(self, stage: str, seen: int = 0) -> StageArguments:
        """Sets the steps of a stage whose student has seen `seen` pairs before."""
        arguments = self.stages[stage]
        steps = (self.arguments.pairs - seen) // arguments.batch_size
        if steps < 1:
            raise ValueError(
                f"Of pairs={self.arguments.pairs}, {seen} were seen before {stage!r}, which leaves no batch of "
                f"{arguments.batch_size}; give more pairs, or a smaller batch."
            )
        return dataclasses.replace(arguments, max_steps=steps)

    def _trained(
        self, trainer: StageTrainer, before: Contestant | None = None, after: str | None = None
    ) -> Contestant:
        """Trains a student that is, before that, `before`, whose name on the page is `after`."""
        folder = trainer.context.output_dir
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TransientProgress(folder.name))
        result = trainer.train()
        pairs, seconds = (before.pairs, before.seconds) if before else (0, 0.0)
        curve = [*(before.curve if before else ()), *learning_curve(folder, pairs)]
        return Contestant(result.model, pairs + result.pairs, seconds + result.seconds, curve=curve, after=after)

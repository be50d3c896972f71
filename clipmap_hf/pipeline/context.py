"""What the stages of a run share: where and how they run, their data, and what was loaded of both, once."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, IterableDataset

from clipmap_hf.data.arguments import CalibrationArguments, DataArguments
from clipmap_hf.data.calibration_pairs import CalibrationPairs
from clipmap_hf.data.held_batches import HeldBatches
from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.data.sources import training_pairs
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.training.arguments import RunArguments


__all__ = ["RunContext"]


@dataclass
class _Loaded:
    """What contexts of the same run have loaded."""

    pairs: PairDataset | PairStream | None = None
    teachers: dict[ModelId, Teacher] = field(default_factory=dict)
    calibration: dict[tuple, HeldBatches] = field(default_factory=dict)


@dataclass(frozen=True)
class RunContext:
    """
    A run.

    Args:
        run: Where and how to run.
        data: Training and evaluation pairs.
        recipe: The resolved arguments as YAML, for cards and `arguments.yaml`.
        loaded: Left to the class.
    """

    run: RunArguments
    data: DataArguments
    recipe: str | None = None
    loaded: _Loaded = field(default_factory=_Loaded, repr=False)

    @property
    def output_dir(self) -> Path:
        """The folder of the result."""
        return Path(self.run.output_dir)

    @property
    def pairs(self) -> PairDataset | PairStream:
        """The training pairs, opened when they are first asked for."""
        if self.loaded.pairs is None:
            self.loaded.pairs = training_pairs(self.data)
        return self.loaded.pairs

    def inside(self, folder: str, seed: int | None = None) -> "RunContext":
        """The same run in a folder inside its own, perhaps with another seed; what is loaded is shared."""
        run = dataclasses.replace(
            self.run, output_dir=str(self.output_dir / folder), seed=self.run.seed if seed is None else seed
        )
        return dataclasses.replace(self, run=run)

    def teacher(self, source: ModelId) -> Teacher:
        """The model of this id and revision, loaded when it is first asked for."""
        wanted = ModelId(os.path.abspath(source.id) if os.path.isdir(source.id) else source.id, source.revision)
        if wanted not in self.loaded.teachers:
            teacher = Teacher.load(*source, backend=self.data.image_backend)
            self.loaded.teachers |= {wanted: teacher, teacher.source: teacher}
        return self.loaded.teachers[wanted]

    def teachers(self, sources: Sequence[ModelId]) -> list[Teacher]:
        """The models of these ids and revisions."""
        return [self.teacher(ModelId(*source)) for source in sources]

    def calibration_batches(self, teacher: Teacher, calibration: CalibrationArguments) -> HeldBatches:
        """
        Batches of the pairs that a run calibrates on, or scores by: some of `calibration_data`, or else of the
        training pairs. The run's seed draws them; they are decoded once.

        Args:
            teacher: The model that reads them.
            calibration: How many, and where they come from.
        """
        key = (teacher.source, self.run.seed, *dataclasses.astuple(calibration))
        if key not in self.loaded.calibration:
            pairs = CalibrationPairs(
                self._calibration_rows(calibration),
                teacher.processor,
                calibration.calibration_pairs,
                self.data.max_bad_fraction,
                self.run.seed,
                caption_column=self.data.caption_column[0],
            )
            self.loaded.calibration[key] = HeldBatches(pairs)
        return self.loaded.calibration[key]

    def release_calibration(self) -> None:
        """Frees the memory of calibration batches; a run reads them before it trains."""
        self.loaded.calibration.clear()

    def _calibration_rows(self, calibration: CalibrationArguments) -> Dataset | IterableDataset:
        """Rows with the column `image` and that of the captions."""
        data = self.data
        if calibration.calibration_data in (None, data.train_data):
            return self.pairs.pairs
        return load_pairs(
            calibration.calibration_data,
            split=data.train_split,
            image_column=data.image_column,
            caption_columns=[data.caption_column[0]],
            streaming=data.streaming,
        )

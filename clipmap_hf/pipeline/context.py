"""What the stages of a run share: where and how they run, their data, and what was loaded of both, once."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainerCallback

from clipmap_hf.config.json_values import json_values
from clipmap_hf.data.arguments import CalibrationArguments, DataArguments, ReadingArguments
from clipmap_hf.data.calibration_pairs import CROPS, MORE_TEXTS, CalibrationPairs, calibration_rows
from clipmap_hf.data.further_texts import further_texts
from clipmap_hf.data.held_batches import HeldBatches
from clipmap_hf.data.labels import Labels, load_labels
from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.data.pairs import Datasets, PairSource, given_pairs, images_alone
from clipmap_hf.data.sources import described, training_collator, training_pairs
from clipmap_hf.data.texts import load_texts
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.pipeline.arguments import part
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.training.run_arguments import RunArguments


__all__ = ["GivenTeacher", "RunContext"]

GivenTeacher = Teacher | ModelId | str | os.PathLike | PreTrainedModel


@dataclass
class _Loaded:
    """What contexts of the same run have loaded."""

    pairs: PairDataset | PairStream | None = None
    teachers: dict[ModelId, Teacher] = field(default_factory=dict)
    calibration: dict[tuple, HeldBatches] = field(default_factory=dict)
    teacher_embeds: dict[ModelId, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunContext:
    """
    A run.

    Args:
        run: Where and how to run.
        data: Training and evaluation pairs.
        recipe: The resolved arguments as YAML, for cards and `arguments.yaml`.
        cache: Where to keep the teachers' embeddings, which are computed first if they are not there.
        origin: All that decides what training begins with, as JSON values; a checkpoint of another origin is refused.
        callbacks: Of transformers, for all stages.
        transform: Of training images, in place of the built-in augmentation (`SeededTransform`).
        labels: The fixed list of texts that the student is made for; images are then read without captions.
        loaded: Left to the class.
    """

    run: RunArguments
    data: DataArguments
    recipe: str | None = None
    cache: TeacherCacheArguments = field(default_factory=TeacherCacheArguments)
    origin: Mapping[str, Any] | None = None
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = ()
    transform: Callable[[Any], Any] | None = None
    labels: Labels | None = None
    loaded: _Loaded = field(default_factory=_Loaded, repr=False)

    def __post_init__(self):
        if self.transform is not None and self.cache.teacher_cache is not None:
            raise ValueError(
                "A transform of your own and a teacher_cache do not go together: the cache cannot tell whether the "
                "transform is the one whose views it holds. Leave one of them out."
            )
        if self.transform is not None and self.data.mix:
            raise ValueError("A transform of your own makes its own images; mix them there, and leave out mix.")
        if self.labels is not None:
            object.__setattr__(self, "data", self._labeled())

    @classmethod
    def of(
        cls,
        args: Any,
        train_dataset: PairSource,
        eval_dataset: PairSource | None = None,
        *,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        transform: Callable[[Any], Any] | None = None,
        text_dataset: Sequence[str] = (),
        labels: str | Sequence[str] | None = None,
    ) -> "RunContext":
        """
        Makes a run of what a trainer takes.

        Args:
            args: Arguments of a trainer.
            train_dataset: Training pairs, or images alone.
            eval_dataset: Evaluation pairs.
            callbacks: As in the class.
            transform: As in the class.
            text_dataset: Texts to train beside the images, with those of `train_texts`.
            labels: As `load_labels` takes them.

        Raises:
            TypeError: If pairs cannot be read, or the texts are one string.
        """
        train, evaluated = map(_opened, (train_dataset, eval_dataset))
        reading = json_values(part(args, ReadingArguments))
        reading["streaming"] |= isinstance(train, IterableDataset)
        if len(text_dataset):
            reading["train_texts"] = load_texts(reading["train_texts"], text_dataset)
        name = "train_images" if _has_images_alone(train, args.image_column) else "train_data"
        data = DataArguments(**{name: train}, eval_data=evaluated, **reading)
        has_cache, values = hasattr(args, "teacher_cache"), json_values(args.for_texts(data.paired))
        sources = {name: train, "eval_data": evaluated}
        named = {name: described(source) for name, source in sources.items() if source is not None}
        named |= {} if labels is None else {"labels": labels if isinstance(labels, str) else f"{len(labels)} texts"}
        return cls(
            part(args, RunArguments),
            data,
            yaml.safe_dump(named | values | data.shown_texts, sort_keys=False, allow_unicode=True),
            part(args, TeacherCacheArguments) if has_cache else TeacherCacheArguments(),
            callbacks=callbacks,
            transform=transform,
            labels=None if labels is None else load_labels(labels),
        )

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
        """
        The same run in a folder inside its own, perhaps with another seed; what is loaded is shared. What lies there
        is not pushed.
        """
        run = dataclasses.replace(
            self.run,
            output_dir=str(self.output_dir / folder),
            seed=self.run.seed if seed is None else seed,
            push_to_hub=self.run.push_to_hub and folder == ".",
        )
        return dataclasses.replace(self, run=run)

    def with_origin(self, origin: Mapping[str, Any]) -> "RunContext":
        """The same run, whose last stage begins with what `origin` decides."""
        return dataclasses.replace(self, origin=origin)

    def data_values(self) -> dict[str, Any]:
        """What says where the pairs come from and how they are read, as JSON values."""
        data = {f.name: getattr(self.data, f.name) for f in dataclasses.fields(self.data)}
        sources = ("train_data", "eval_data", "train_images")
        named = {name: described(source) for name in sources if (source := data[name]) is not None}
        own = {} if self.transform is None else {"transform": json_values(self.transform)}
        own["caption_sampling"] = self.data.sampling
        data.pop("train_texts")
        if data["train_images"] is None:
            data.pop("train_images")
        if self.data.texts is not None:
            own |= {"train_texts": list(self.data.texts.sources), "digest_of_texts": self.data.texts.digest}
        return json_values(data | named | own)

    def teacher(self, source: ModelId) -> Teacher:
        """The model of this id and revision, loaded when it is first asked for."""
        wanted = source.absolute()
        if wanted not in self.loaded.teachers:
            teacher = Teacher.load(*source, backend=self.data.image_backend)
            self.loaded.teachers |= {wanted: teacher, teacher.source: teacher}
        return self.loaded.teachers[wanted]

    def teachers(self, sources: Sequence[ModelId]) -> list[Teacher]:
        """The models of these ids and revisions."""
        return [self.teacher(ModelId(*source)) for source in sources]

    def given_teachers(self, given: GivenTeacher | Sequence[GivenTeacher]) -> list[Teacher]:
        """What is given as one teacher or as several, loaded if need be; they are then known by their ids."""
        several = isinstance(given, (list, tuple)) and not isinstance(given, ModelId)
        return [self._taken(source) for source in (given if several else [given])]

    def teacher_embeds(self, teacher: Teacher, embed: Callable[[], Any]) -> Any:
        """
        A teacher's embeddings of the evaluation data, computed when they are first asked for.

        Args:
            teacher: The teacher.
            embed: Computes them.
        """
        known = self.loaded.teacher_embeds
        if teacher.source not in known:
            known[teacher.source] = embed()
        return known[teacher.source]

    def _labeled(self) -> DataArguments:
        """The data, of which nothing but images is read: the texts are those of the labels."""
        if self.data.train_texts is self.labels.texts:
            return self.data
        if self.data.train_texts or self.data.validation_fraction:
            raise ValueError(
                "labels are the texts of the training, which reads no captions: leave out train_texts and "
                "text_dataset, and in place of a validation_fraction give eval_data."
            )
        return dataclasses.replace(self.data, train_texts=self.labels.texts)

    def _taken(self, source: GivenTeacher) -> Teacher:
        if isinstance(source, ModelId):
            return self.teacher(source)
        if isinstance(source, (str, os.PathLike)):
            return self.teacher(ModelId(os.fspath(source)))
        teacher = source if isinstance(source, Teacher) else Teacher.take(source, backend=self.data.image_backend)
        self.loaded.teachers[teacher.source] = teacher
        return teacher

    def calibration_batches(
        self, teacher: Teacher, calibration: CalibrationArguments, *, once: bool = False
    ) -> HeldBatches:
        """
        Batches of the pairs that a run calibrates on, or scores by: some of `calibration_data`, or else of the
        training pairs. The run's seed draws them; they are decoded once. Of too few pairs, there are several views.

        Args:
            teacher: The model that reads them.
            calibration: How many, and where they come from.
            once: Whether each pair is taken once, however few there are: where texts are compared with the images of
                other pairs, views of one pair would be each other's wrong answers.
        """
        data, source = self.data, calibration.calibration_data and described(calibration.calibration_data)
        key = (teacher.source, self.run.seed, source, calibration.calibration_pairs, once)
        if key not in self.loaded.calibration:
            rows = self._calibration_rows(calibration)
            caption = data.caption_column[0] if data.caption_column[0] in rows.column_names else None
            no_texts = caption is None and data.texts is not None and data.texts.pairs
            count = calibration.calibration_pairs
            pairs = CalibrationPairs(
                rows,
                teacher.processor,
                count,
                data.max_bad_fraction,
                self.run.seed,
                caption_column=caption,
                texts=None if no_texts else data.texts,
                augmentation=None if once else CROPS,
                more_texts=() if once or no_texts else self._further_texts(teacher, rows, count),
            )
            self.loaded.calibration[key] = HeldBatches(pairs)
        return self.loaded.calibration[key]

    def _further_texts(self, teacher: Teacher, rows: Dataset | IterableDataset, pairs: int) -> list[str]:
        """Texts as training draws them, beside those of so many calibration pairs."""
        collator = training_collator(self.data, teacher.processor, self.run.seed, partners=rows)
        return further_texts(rows, collator, MORE_TEXTS * pairs, self.run.seed)

    def release_calibration(self) -> None:
        """Frees the memory of calibration batches; a run reads them before it trains."""
        self.loaded.calibration.clear()

    def _calibration_rows(self, calibration: CalibrationArguments) -> Dataset | IterableDataset:
        """Rows with the column `image` and that of the captions, if there is anything but images."""
        data = self.data
        if calibration.calibration_data in (None, data.train_data):
            return self.pairs.pairs
        reads_captions = data.read_columns and calibration.calibration_data != data.train_images
        return calibration_rows(
            calibration.calibration_data,
            split=data.train_split,
            image_column=data.image_column,
            caption_column=data.caption_column[0] if reads_captions else None,
            streaming=data.streaming,
        )


def _opened(source: PairSource | None) -> str | os.PathLike | Datasets | None:
    return source if source is None or isinstance(source, (str, os.PathLike)) else given_pairs(source)


def _has_images_alone(source: str | os.PathLike | Datasets | None, image_column: str) -> bool:
    """Whether a data set that a program holds has no texts; of a path or an id it must be said."""
    columns = getattr(source, "column_names", None)
    return columns is not None and images_alone(columns, image_column)

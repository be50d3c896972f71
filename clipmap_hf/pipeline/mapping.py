"""The mapping stage: `MappingTrainer` trains a compressor's operators, and writes the student with its map."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from clipmap_hf.compressor import ClipMapCompressor
from clipmap_hf.config import ClipMapConfig
from clipmap_hf.data.arguments import CalibrationArguments
from clipmap_hf.data.pairs import PairSource
from clipmap_hf.distributed import join_processes
from clipmap_hf.losses import PAIR_LOSSES
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.pipeline.arguments import MappingArguments
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.record import made_by, mark_as_made
from clipmap_hf.pipeline.start import load_map, remove_start, start_compressor, start_origin
from clipmap_hf.pipeline.trainer import StageTrainer
from clipmap_hf.training.arguments import MappingStageArguments
from clipmap_hf.training.result import TrainResult
from clipmap_hf.training.stages.mapping import MappingStage


__all__ = ["MappingTrainer", "map_model"]


class MappingTrainer(StageTrainer):
    """
    Trains a compressor's operators and writes the mapped student, with its map, to `output_dir`.

    Args:
        compressor: Trained in place.
        args: The arguments; with `context`, the stage's numbers do.
        train_dataset: Pairs: a `datasets.Dataset` or `IterableDataset`, a list of `(image, text)`, a path or a Hub id;
            or images alone, in the same forms.
        eval_dataset: Pairs to measure retrieval on, in the same forms; or images alone, if training reads no captions.
        callbacks: Callbacks of transformers, as instances or classes.
        transform: Makes training images in place of the built-in augmentation, as `SeededTransform` takes it.
        text_dataset: Texts to train beside the images, which need not belong to them; `train_texts` names others.
        context: The run that this training is a part of; then data, callbacks and transform are the run's.

    Raises:
        TypeError: If pairs are given in another form.
    """

    name, numbers = "mapping", MappingStageArguments

    def __init__(
        self,
        compressor: ClipMapCompressor,
        args: MappingArguments | MappingStageArguments,
        train_dataset: PairSource | None = None,
        eval_dataset: PairSource | None = None,
        *,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        transform: Callable[[Any], Any] | None = None,
        text_dataset: Sequence[str] = (),
        context: RunContext | None = None,
    ):
        if context is None:
            context = RunContext.of(
                args, train_dataset, eval_dataset, callbacks=callbacks, transform=transform, text_dataset=text_dataset
            )
        super().__init__(args, context, compressor.processor)
        self.compressor = compressor
        self.source = ModelId(compressor.teacher_id, compressor.teacher_revision)

    @property
    def model(self) -> PreTrainedModel:
        """The student as it stands."""
        return self.compressor.export()

    def _make_stage(self) -> MappingStage:
        arguments = self.args
        return MappingStage(
            self.compressor.mapper,
            teachers=[self.context.teacher(self.source).model] if self._distills else [],
            losses=arguments.losses,
            logit_scale=arguments.logit_scale,
            learn_logit_scale=arguments.learn_logit_scale,
        )

    def _save(self, folder: Path, metrics: dict[str, float]) -> None:
        self.compressor.save_pretrained(folder, results=self._results(metrics), recipe=self.context.recipe)

    def _config(self) -> dict[str, Any]:
        config = self.compressor.map_config.to_dict()
        return {"teachers": [list(self.source)], "student": config, "origin": self.context.origin}

    @property
    def _first_teacher(self) -> Teacher | None:
        is_needed = self._distills or self.context.data.teacher_index
        return self.context.teacher(self.source) if is_needed else None

    @property
    def _distills(self) -> bool:
        return not set(self.args.losses) <= set(PAIR_LOSSES)


def map_model(
    source: ModelId,
    student: ClipMapConfig | None,
    context: RunContext,
    *,
    calibration: CalibrationArguments,
    mapping: MappingStageArguments,
) -> TrainResult:
    """
    Starts to compress a model, trains the operators, and writes the student with its map to the output folder. What
    the start leaves in `start/` is removed at the end.

    Args:
        source: The model; or, without `student`, a folder with a map to go on with.
        student: The size to make, and how its operators start.
        context: The run.
        calibration: The pairs to start from.
        mapping: The stage's numbers.
    """
    context = context.with_origin(start_origin(source, student, context, calibration))
    if made_by(context, mapping):
        compressor = load_map(ModelId(str(context.output_dir)), context)
    else:
        compressor = start_compressor(source, student, context, calibration)
    join_processes().print(compressor.cost())
    result = MappingTrainer(compressor, mapping, context=context).train()
    mark_as_made(context)
    remove_start(context)
    return result

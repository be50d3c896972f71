"""Distillation for a fixed list of texts: `LabelTrainer` trains a vision tower, and writes it with the list."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

from clipmap_hf.config import ClipMapConfig, TowerConfig, embedding_width
from clipmap_hf.costs.cost import Cost, model_cost, vision_cost
from clipmap_hf.data.labels import Labels
from clipmap_hf.data.pairs import PairSource
from clipmap_hf.distributed import join_processes
from clipmap_hf.evaluation.zero_shot import zero_shot_classifier
from clipmap_hf.hub.folder import write_label_folder
from clipmap_hf.losses import MATCHED_LOSSES, loss_weights
from clipmap_hf.models.label_model import load_label_model
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.models.vision_tower import check_vision_tower, with_vision
from clipmap_hf.pipeline.arguments import DistillationArguments
from clipmap_hf.pipeline.context import GivenTeacher, RunContext
from clipmap_hf.pipeline.distillation import DistillationTrainer
from clipmap_hf.training.arguments import DistillationStageArguments
from clipmap_hf.training.stages.labels import LabelStage
from clipmap_hf.training.stages.logits import MAX_LOGIT_SCALE


__all__ = ["LabelTrainer", "arguments_for_labels", "load_label_student", "student_for_labels"]

Arguments = TypeVar("Arguments", bound=DistillationStageArguments)


class LabelTrainer(DistillationTrainer):
    """
    Distills the vision tower of a student for a fixed list of texts, and writes it with the teacher's embeddings of
    them, as a `CLIPVisionModelWithProjection`, to `output_dir`. The student's text tower is not used: evaluations
    during training read captions by the teacher's.

    ```python
    trainer = LabelTrainer(student, teacher, DistillationArguments("out"), photos, labels=["a cat", "a dog"])
    trainer.train()
    ```

    Args:
        student: A `CLIPModel` whose joint embedding is as wide as the first teacher's, or its Hub id or folder.
        teacher: As in `DistillationTrainer`. Of several, the first one's text embeddings are written.
        args: The arguments. The default losses are `labels=1 feature=2000`, and the default logit scale, 50, stands
            for the first teacher's own.
        train_dataset: Images, as `DistillationTrainer` takes pairs; captions are not read.
        eval_dataset: Pairs to measure retrieval on.
        labels: The list, or a source of it, as `load_labels` takes it.
        processing_class: Tokenizer and image processor of the student; by default the first teacher's.
        callbacks: Callbacks of transformers, as instances or classes.
        transform: As in `DistillationTrainer`.
        context: The run that this training is a part of; then data, labels, callbacks and transform are the run's.

    Raises:
        TypeError: If images or a teacher are given in another form.
        ValueError: If there are no labels; if a loss needs pairs or streams; if the student's joint embedding is not
            as wide as the teacher's, or transformers has no vision tower of this type; or as in
            `DistillationTrainer`.
    """

    make_stage = LabelStage

    def __init__(
        self,
        student: PreTrainedModel | str | os.PathLike,
        teacher: GivenTeacher | Sequence[GivenTeacher],
        args: DistillationArguments | DistillationStageArguments,
        train_dataset: PairSource | None = None,
        eval_dataset: PairSource | None = None,
        *,
        labels: str | Sequence[str] | None = None,
        processing_class: ProcessorMixin | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        transform: Callable[[Any], Any] | None = None,
        context: RunContext | None = None,
    ):
        args = arguments_for_labels(args)
        if context is None:
            options = {"callbacks": callbacks, "transform": transform, "labels": labels}
            context = RunContext.of(args, train_dataset, eval_dataset, **options)
        if context.labels is None:
            raise ValueError("A LabelTrainer needs labels: a list of texts, or a source such as 'labels.txt'.")
        super().__init__(student, teacher, args, processing_class=processing_class, context=context)
        check_vision_tower(self.teachers[0].model.config)
        self.student = with_vision(self.teachers[0].model, self.student)
        if self.args.logit_scale == DistillationStageArguments.logit_scale:
            scale = self.teachers[0].model.logit_scale.exp().item()
            self.args = dataclasses.replace(self.args, logit_scale=min(scale, MAX_LOGIT_SCALE))  # CLIP's is 100.00001

    @property
    def labels(self) -> Labels:
        """The fixed list of texts."""
        return self.context.labels

    def _make_stage(self) -> LabelStage:
        self.label_embeds = [
            zero_shot_classifier(
                teacher.model.to(join_processes().device),
                teacher.processor.tokenizer,
                self.labels.names,
                self.labels.templates,
            )
            for teacher in self.teachers
        ]
        return super()._make_stage()

    def _stage_options(self) -> dict[str, Any]:
        return {"label_embeds": self.label_embeds}

    def _write(self, folder: Path, model: PreTrainedModel) -> None:
        scale = self.stage.student().logit_scale.exp()
        processor = self.processing_class.image_processor
        write_label_folder(folder, model, processor, self.labels.names, self.label_embeds[0], scale)

    def _card(self) -> dict[str, Any]:
        return {**super()._card(), "model_class": type(self.model).__name__, "labels": self.labels.names}

    @property
    def _note(self) -> None:
        return None  # of the text tower, nothing is written

    @cached_property
    def _costs(self) -> dict[str, Cost]:
        return {"teacher": model_cost(self.teachers[0].model.config), "student": vision_cost(self.student.config)}

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "labels": [self.labels.texts.digest, len(self.labels.templates)]}


def arguments_for_labels(args: Arguments) -> Arguments:
    """
    Returns the arguments of a distillation with what follows from labels: the text tower is frozen, and the default
    losses are `labels=1 feature=2000`.

    Raises:
        ValueError: If the vision tower is to be frozen, or a loss needs pairs or a teacher's streams.
    """
    if args.freeze == "vision":
        raise ValueError("freeze='vision', but a student for labels has nothing else to train; leave it out.")
    losses = args.for_texts(paired=False, listed=True).losses
    refused = sorted(name for name in loss_weights(losses) if name in (*MATCHED_LOSSES, "hidden"))
    if refused:
        raise ValueError(
            f"The losses {refused} need captions or a text tower, and a student for labels has neither. Take of "
            "['affinity', 'feature', 'labels', 'relational'], or a function of your own."
        )
    return dataclasses.replace(args, losses=losses, freeze="text")


def student_for_labels(teacher: Teacher, student: ClipMapConfig | None) -> ClipMapConfig | None:
    """
    Returns the config of a student for labels: its text tower is left as the teacher's, for nobody will need it.

    Args:
        teacher: What the student is made of.
        student: The config that is asked for; `None` for a map to go on with.

    Raises:
        ValueError: If transformers has no vision tower of this type, the size is a budget, or the joint embedding is
            not as wide as the teacher's.
    """
    check_vision_tower(teacher.model.config)
    if student is None:
        return None
    if student.budget is not None:
        raise ValueError(
            "A budget counts both towers, and a student for labels has only the vision tower. Give a preset, or sizes "
            "such as vision_hidden_size."
        )
    width = embedding_width(teacher.model.config)
    if student.projection_dim not in (None, width):
        raise ValueError(
            f"projection_dim={student.projection_dim}, but a student for labels compares its images with the texts of "
            f"its teacher, which have {width} dimensions. Leave it out."
        )
    return dataclasses.replace(student, text=TowerConfig())


def load_label_student(folder: str) -> PreTrainedModel:
    """Loads the vision tower that a `LabelTrainer` wrote."""
    return load_label_model(folder)[0].vision

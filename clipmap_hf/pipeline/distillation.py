"""Distillation: `DistillationTrainer` trains a student against its teachers, and writes it with a card."""

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

from clipmap_hf.config.heads import shown_heads
from clipmap_hf.costs.cost import Cost, CostReport, model_cost, with_bytes_of
from clipmap_hf.data.pairs import PairSource
from clipmap_hf.families import family_for
from clipmap_hf.hub.card import render_card, shown_name
from clipmap_hf.hub.folder import write_card, write_student_folder
from clipmap_hf.models.batch_norms import has_batch_norms
from clipmap_hf.models.fingerprints import config_values
from clipmap_hf.models.finite import check_finite
from clipmap_hf.models.loading import check_float, load_model
from clipmap_hf.models.teacher import Teacher, check_same_preprocessing
from clipmap_hf.pipeline.arguments import DistillationArguments, TernaryArguments
from clipmap_hf.pipeline.context import GivenTeacher, RunContext
from clipmap_hf.pipeline.trainer import StageTrainer
from clipmap_hf.teacher_cache.lookup import TeacherCache
from clipmap_hf.teacher_cache.make import make_teacher_cache
from clipmap_hf.training.arguments import DistillationStageArguments
from clipmap_hf.training.stages.distillation import DistillationStage


__all__ = ["DistillationTrainer", "freeze_tower"]


class DistillationTrainer(StageTrainer):
    """
    Distills a student and writes it, with a card that shows its results beside the first teacher's, to `output_dir`.

    ```python
    trainer = DistillationTrainer(student, "openai/clip-vit-base-patch16", DistillationArguments("out"), pairs)
    trainer.train()
    ```

    Args:
        student: A `CLIPModel`, trained in place; or its Hub id or folder.
        teacher: Hub id or folder of a `CLIPModel`, or the model itself; or several, whose targets are averaged. They
            are frozen.
        args: The arguments; with `context`, the stage's numbers do.
        train_dataset: Pairs: a `datasets.Dataset` or `IterableDataset`, a list of `(image, text)`, a path or a Hub id;
            or images alone, in the same forms.
        eval_dataset: Pairs to measure retrieval on, in the same forms; or images alone, if training reads no captions.
        processing_class: Tokenizer and image processor of the student; by default the first teacher's.
        callbacks: Callbacks of transformers, as instances or classes.
        transform: Makes training images in place of the built-in augmentation, as `SeededTransform` takes it.
        text_dataset: Texts to train beside the images, which need not belong to them; `train_texts` names others.
        context: The run that this training is a part of; then data, callbacks and transform are the run's.

    Raises:
        TypeError: If pairs or a teacher are given in another form.
        ValueError: If a teacher preprocesses images or texts in another way than the student, or the student's weights
            are packed.
    """

    name, numbers = "distillation", DistillationStageArguments
    make_stage: Callable[..., DistillationStage] = DistillationStage

    def __init__(
        self,
        student: PreTrainedModel | str | os.PathLike,
        teacher: GivenTeacher | Sequence[GivenTeacher],
        args: DistillationArguments | TernaryArguments | DistillationStageArguments,
        train_dataset: PairSource | None = None,
        eval_dataset: PairSource | None = None,
        *,
        processing_class: ProcessorMixin | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        transform: Callable[[Any], Any] | None = None,
        text_dataset: Sequence[str] = (),
        context: RunContext | None = None,
    ):
        if context is None:
            context = RunContext.of(
                args, train_dataset, eval_dataset, callbacks=callbacks, transform=transform, text_dataset=text_dataset
            )
        self.teachers = context.given_teachers(teacher)
        self.student = load_model(os.fspath(student)) if isinstance(student, (str, os.PathLike)) else student
        check_float(self.student, "Training")
        check_finite(self.student.state_dict(), "The student")
        super().__init__(args, context, processing_class or self.teachers[0].processor)
        check_same_preprocessing(self.processing_class, self.teachers)

    def _make_stage(self) -> DistillationStage:
        arguments, teachers, cache = self.args, self.teachers, self._teacher_cache
        if self._evaluate is not None:
            self.teacher_metrics = self._evaluate.of_teacher()
        if cache is not None:  # the stage moves those that it uses
            for teacher in teachers:
                teacher.model.cpu()
        return type(self).make_stage(
            freeze_tower(self.student, arguments.freeze),
            teachers=[teacher.model for teacher in teachers] if cache is None else [],
            losses=arguments.losses,
            logit_scale=arguments.logit_scale,
            learn_logit_scale=arguments.learn_logit_scale,
            teacher_dims=() if cache is None else cache.summary["dims"],
            **self._stage_options(),
        )

    def _stage_options(self) -> dict[str, Any]:
        """What else the stage is told."""
        return {}

    def _card(self) -> dict[str, Any]:
        """What else `render_card` is told: `method`, and of a ternary model that it is `packed`."""
        names = [f"`{shown_name(teacher.source.id)}`" for teacher in self.teachers[1:]]
        named = " and ".join(["the teacher", *names])  # a card has named the first already
        losses = ", ".join(self.args.losses)
        return {"method": f"Its weights were distilled from {named} (losses: {losses})."}

    def _save(self, folder: Path, metrics: dict[str, float]) -> None:
        teacher, results = self.teachers[0].source, self._results(metrics, self.teacher_metrics)
        written = self.model
        self._write(folder, written)
        costs = self._costs | {"student": with_bytes_of(self._costs["student"], written)}
        card = render_card(
            teacher.id,
            str(CostReport(costs, note=self._note or "")),
            **{"model_class": type(self.student).__name__, **self._card()},
            revision=teacher.revision,
            results=results,
            recipe=self.context.recipe,
        )
        write_card(folder, card, results)

    def _write(self, folder: Path, model: PreTrainedModel) -> None:
        """Writes what belongs to the student besides its card."""
        write_student_folder(folder, model, self.processing_class)

    @property
    def _note(self) -> str | None:
        """What the card says below the costs."""
        return shown_heads(self.teachers[0].model.config, self.student.config)

    @cached_property
    def _costs(self) -> dict[str, Cost]:  # counted once: every save shows them
        return {"teacher": model_cost(self.teachers[0].model.config), "student": model_cost(self.student.config)}

    def _config(self) -> dict[str, Any]:
        return {
            "teachers": [[teacher.id, teacher.revision] for teacher in self.teachers],
            "student": config_values(self.student.config),
            "origin": self.context.origin,
        }

    @cached_property
    def _teacher_cache(self) -> TeacherCache | None:
        context = self.context
        if context.cache.teacher_cache is None:
            return None
        if "hidden" in self.args.losses:
            raise ValueError("The hidden loss asks the teacher itself; leave out teacher_cache, or the loss.")
        numbers = {"seed": context.run.seed, "num_workers": context.run.dataloader_num_workers}
        return make_teacher_cache(
            self.teachers, self.processing_class, context.data, context.cache, pairs=context.pairs, **numbers
        )

    @property
    def _first_teacher(self) -> Teacher:
        return self.teachers[0]


def freeze_tower(model: PreTrainedModel, tower: str | None) -> PreTrainedModel:
    """
    Lets all weights of a model be trained, but those of a tower and its projection; `None` freezes neither.

    Raises:
        ValueError: If the tower has BatchNorms, which would go on to count.
    """
    family = family_for(model.config)
    if tower is not None and has_batch_norms(getattr(model, f"{tower}_model")):
        raise ValueError(
            f"freeze={tower!r}, but the {tower} tower of a {type(model).__name__} has BatchNorms, whose statistics "
            "change in training even if no weight does. Freeze the other tower, or none."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tower is None or family.match(name).tower != tower)
    return model

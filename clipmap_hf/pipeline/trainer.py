"""What the trainers of all stages have in common: they train, evaluate, save and push, as transformers' `Trainer`."""

import dataclasses
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, TrainerState
from transformers.utils import logging

from clipmap_hf.data.language import spelling_warning
from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.data.pairs import PairSource
from clipmap_hf.data.sources import described, some_texts, stage_seed, training_collator
from clipmap_hf.distributed import join_processes, process_count
from clipmap_hf.evaluation.agreement import AGREEMENT_METRICS
from clipmap_hf.hub.card import hub_dataset
from clipmap_hf.hub.push import push_folder
from clipmap_hf.hub.results import SetResults
from clipmap_hf.losses import check_texts
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.pipeline.arguments import part
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.measures import AgreementMeasure, Measure, measure_of
from clipmap_hf.teacher_cache.lookup import TeacherCache
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.best import START_STAYS
from clipmap_hf.training.callbacks import callback_handler
from clipmap_hf.training.result import TrainResult
from clipmap_hf.training.stages.base import CONTRASTIVE, Stage
from clipmap_hf.training.trainer import Trainer


__all__ = ["StageTrainer"]

logger = logging.get_logger(__name__)

# What may change between a run and its resumption.
_MAY_CHANGE = {"eval_data", "eval_split", "image_backend", "max_bad_fraction", "teacher_index"}


class StageTrainer:
    """
    Trains a stage on the pairs of a run. A subclass says what the stage is, and how its result is written.

    Args:
        args: The stage's numbers; in a public trainer, with those of its run and its data.
        context: The run.
        processing_class: Tokenizer and image processor of the student.
    """

    name: str  # of the stage, in logs; decides its seed together with the run's
    numbers: type[StageArguments] = StageArguments  # which of the arguments are the stage's

    def __init__(self, args: StageArguments, context: RunContext, processing_class: ProcessorMixin):
        self.args = args.for_texts(context.data.paired)
        self.context, self.processing_class = context, processing_class
        self.callback_handler = callback_handler(context.run, context.callbacks)
        self.callback_handler.processing_class = processing_class
        self.state = TrainerState()
        self.metrics: dict[str, float] = {}
        self.teacher_metrics: dict[str, float] | None = None
        self._loop: Trainer | None = None

    @cached_property
    def stage(self) -> Stage:
        """What is trained; made when it is first asked for."""
        return self._make_stage()

    @property
    def model(self) -> PreTrainedModel:
        """The student as it stands."""
        return self.stage.export()

    def train(self, resume_from_checkpoint: bool | None = None) -> TrainResult:
        """
        Takes the steps that are left, evaluates, and writes the result to `output_dir`.

        Args:
            resume_from_checkpoint: Whether to go on from the last checkpoint in `output_dir` or to start anew; by
                default, what `resume` says: `auto` goes on if there is one.

        Raises:
            Preempted: After SIGTERM, when the step is finished and a checkpoint written.
            FloatingPointError: If too many steps in a row, or all, had no finite gradient; if the student's weights
                are no longer finite.
            TypeError: If `resume_from_checkpoint` is neither true nor false.
            ValueError: If too many rows are bad, the best model is asked for without evaluation pairs, or the
                checkpoints are those of a run with another configuration.
        """
        if resume_from_checkpoint not in (None, True, False):
            raise TypeError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} must be true or false: a run goes on from the "
                "last checkpoint in its own output_dir."
            )
        context = self.context
        losses, data = getattr(self.args, "losses", CONTRASTIVE), context.data
        check_texts(losses, paired=data.paired, listed=context.labels is not None, mixed=bool(data.mix))
        if context.run.load_best_model_at_end and self._evaluate is None:
            raise ValueError("load_best_model_at_end needs evaluation pairs; give an eval_dataset (eval_data).")
        self._warn_of_language()
        stage = self.stage
        run = dataclasses.replace(context.run, seed=stage_seed(self.name, context.run.seed))
        if resume_from_checkpoint is not None:
            run.resume = "auto" if resume_from_checkpoint else "never"
        if isinstance(self._evaluate, AgreementMeasure):  # nothing is paired: what only memorizes is not written
            run.load_best_model_at_end = True
            run.metric_for_best_model = run.metric_for_best_model or "mean_agreement"
        collator = training_collator(
            context.data, self.processing_class, run.seed, context.transform, context.pairs.pairs
        )
        if (cache := self._teacher_cache) is not None:
            collator.teacher_cache, collator.views = cache, cache.views
        decisive = {name: value for name, value in context.data_values().items() if name not in _MAY_CHANGE}
        loop = Trainer(
            stage=stage,
            arguments=part(self.args, self.numbers),
            run=run,
            pairs=self._pairs(),
            collator=collator,
            evaluate=self._evaluate,
            save=self._save,
            max_bad_fraction=context.data.max_bad_fraction,
            name=self.name,
            config={**decisive, "views": collator.views, **self._config()},
            recipe=context.recipe,
            handler=self.callback_handler,
        )
        self._loop = loop
        result = loop.train()
        self.state, self.metrics = loop.events.state, result.metrics
        if run.push_to_hub:
            self.push_to_hub()
        return dataclasses.replace(result, teacher_metrics=self.teacher_metrics, model=self.model)

    def evaluate(self, eval_dataset: PairSource | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Measures the student as it stands: its retrieval or, without captions, its agreement with the teacher.

        Args:
            eval_dataset: Pairs, or images alone, as the constructor takes them; by default those of the constructor.
            metric_key_prefix: What the names of the metrics begin with.

        Raises:
            ValueError: If there are no evaluation pairs.
        """
        evaluate = self._evaluate
        if eval_dataset is not None:
            evaluate = measure_of(self.context, self.processing_class, self._first_teacher, eval_dataset)
        if evaluate is None:
            raise ValueError("There are no evaluation pairs; give an eval_dataset here or to the trainer.")
        metrics = evaluate(self.stage.student())
        return {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}

    def save_model(self, output_dir: str | os.PathLike | None = None) -> None:
        """
        Writes the student as it stands, with its card, from the main process.

        Args:
            output_dir: A folder; by default that of the run, where `train` has written it already.
        """
        if join_processes().is_main_process:
            self._save(Path(output_dir or self.context.output_dir), self.metrics)

    def push_to_hub(
        self,
        commit_message: str = "Upload compressed CLIP",
        *,
        token: str | bool | None = None,
        **options: Any,
    ) -> CommitInfo | None:
        """
        Pushes what lies in `output_dir` to `hub_model_id`, from the main process.

        Args:
            commit_message: Message of the commit.
            token: Access token, as in transformers; by default that of the stored login.
            options: Further arguments of `push_folder`: `include_map`, `create_pr`.

        Raises:
            ValueError: If there is no student in `output_dir`.
            OSError: If the Hub refuses or the connection is lost.
        """
        run, state = self.context.run, join_processes()
        state.wait_for_everyone()
        if not state.is_main_process:
            return None
        options |= {"private": run.hub_private_repo, "revision": run.hub_revision, "token": token}
        name = run.hub_model_id or Path(run.output_dir).resolve().name
        return push_folder(run.output_dir, name, commit_message=commit_message, **options)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Adds a callback of transformers, an instance or a class."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> TrainerCallback | None:
        """Removes a callback, or the first of a class, and returns it; `None` if there is none."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Removes a callback, or the first of a class."""
        self.callback_handler.remove_callback(callback)

    def _warn_of_language(self) -> None:
        texts = some_texts(self.context.data, self.context.pairs.pairs)
        warning = spelling_warning(self.processing_class.tokenizer, texts)
        if warning is not None and join_processes().is_main_process:
            logger.warning_once(warning)  # other stages of the run read the same texts

    def _pairs(self) -> PairDataset | PairStream:
        """The training pairs; where no text belongs to its image, fewer than a batch fill one in several views."""
        context, pairs = self.context, self.context.pairs
        if isinstance(pairs, PairDataset) and (context.data.mix or not context.data.paired):
            return pairs.filling(self.args.batch_sizes(process_count())[0])
        return pairs

    def _make_stage(self) -> Stage:
        raise NotImplementedError

    def _save(self, folder: Path, metrics: dict[str, float]) -> None:
        """Writes the student as it stands to a folder."""
        raise NotImplementedError

    def _config(self) -> dict[str, Any]:
        """What decides the result beside arguments and data, as JSON values."""
        raise NotImplementedError

    @property
    def _teacher_cache(self) -> TeacherCache | None:
        """Where the teachers' embeddings lie, if they are kept."""
        return None

    @property
    def _first_teacher(self) -> Teacher | None:
        """The first teacher, if the stage has one at hand."""
        return None

    @cached_property
    def _evaluate(self) -> Measure | None:
        """Measures a model on the evaluation data; `None` without any."""
        if self.context.data.evaluated[0] is None:
            return None
        return measure_of(self.context, self.processing_class, self._first_teacher)

    def _results(self, student: Mapping[str, float], teacher: Mapping[str, float] | None = None) -> list[SetResults]:
        """
        What an evaluation gave a student, and perhaps its teacher, for the card; empty if there was none. Agreement is
        not shown beside recall.
        """
        if not student:
            return []
        source, split = self.context.data.evaluated
        is_named = isinstance(source, (str, os.PathLike))
        dataset_id = hub_dataset(described(source)) if is_named else None
        name = dataset_id or (Path(source).name if is_named else "evaluation pairs")
        about = {
            "dataset_id": dataset_id,
            "split": split,
            "note": START_STAYS if self._loop is not None and self._loop.best.is_start else None,
        }
        fraction = self.context.data.validation_fraction
        share = f" ({fraction:g} of it, held out)" if fraction else ""
        if not isinstance(self._evaluate, AgreementMeasure):
            shown = {metric: value for metric, value in student.items() if metric not in AGREEMENT_METRICS}
            return [SetResults(name + share, shown, teacher, **about)]
        is_parted = self.context.data.parted_texts.held_out
        name += f" and texts ({fraction:g} of each, held out)" if is_parted else f"{share} and the texts of training"
        shown = {metric: student[metric] for metric in AGREEMENT_METRICS if metric in student}
        return [SetResults(name, shown, task="image-feature-extraction", **about)]

"""Training from scratch: `PretrainingTrainer` trains a model with random weights, and writes it with its processor."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

from clipmap_hf.data.pairs import PairSource
from clipmap_hf.files.atomic import atomic_files
from clipmap_hf.models.fingerprints import config_values
from clipmap_hf.pipeline.arguments import PretrainingArguments
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.pipeline.trainer import StageTrainer
from clipmap_hf.training.arguments import StageArguments
from clipmap_hf.training.stages.contrastive import ContrastiveStage


__all__ = ["PretrainingTrainer"]


class PretrainingTrainer(StageTrainer):
    """
    Trains a model on the contrastive loss and writes it, with its processor, to `output_dir`.

    Args:
        model: A `CLIPModel`, trained in place.
        args: The arguments; with `context`, the stage's numbers do.
        train_dataset: Pairs: a `datasets.Dataset` or `IterableDataset`, a list of `(image, text)`, a path or a Hub id.
        eval_dataset: Pairs to measure retrieval on, in the same forms.
        processing_class: Its tokenizer and image processor.
        callbacks: Callbacks of transformers, as instances or classes.
        transform: Makes training images in place of the built-in augmentation, as `SeededTransform` takes it.
        name: Names the stage in logs, and decides its seed together with the run's.
        context: The run that this training is a part of; then data, callbacks and transform are the run's.

    Raises:
        TypeError: If pairs are given in another form.
        ValueError: If not all texts belong to their images, or the model is to be pushed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: PretrainingArguments | StageArguments,
        train_dataset: PairSource | None = None,
        eval_dataset: PairSource | None = None,
        *,
        processing_class: ProcessorMixin,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        transform: Callable[[Any], Any] | None = None,
        name: str = "pretrain",
        context: RunContext | None = None,
    ):
        if context is None:
            context = RunContext.of(args, train_dataset, eval_dataset, callbacks=callbacks, transform=transform)
        if not context.data.paired:
            raise ValueError(
                "Pretraining has no teacher to learn from and needs pairs; give train_data, without train_images and "
                "train_texts."
            )
        if context.run.push_to_hub:
            raise ValueError("Pretraining writes no card, without which nothing is pushed; leave push_to_hub out.")
        super().__init__(args, context, processing_class)
        self.trained, self.name = model, name

    def _make_stage(self) -> ContrastiveStage:
        scale = {"logit_scale": self.args.logit_scale, "learn_logit_scale": self.args.learn_logit_scale}
        return ContrastiveStage(self.trained, **scale)

    def _save(self, folder: Path, metrics: dict[str, float]) -> None:
        with atomic_files(folder) as temporary:
            self.trained.save_pretrained(temporary)
            self.processing_class.save_pretrained(temporary)

    def _config(self) -> dict[str, Any]:
        return {"student": config_values(self.trained.config)}

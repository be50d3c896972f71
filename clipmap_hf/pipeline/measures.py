"""What a run measures of its student: recall where pairs are evaluated, agreement with the teacher where none are."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import ProcessorMixin
from transformers.utils import logging

from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.evaluation_pairs import evaluation_pairs
from clipmap_hf.data.pairs import PairSource
from clipmap_hf.data.sources import evaluation_rows
from clipmap_hf.distributed import gather, join_processes
from clipmap_hf.evaluation.agreement import Embeds, agreement, embed_unpaired
from clipmap_hf.evaluation.retrieval import embed_pairs, retrieval_metrics
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.pipeline.context import RunContext


__all__ = ["AgreementMeasure", "Measure", "RecallMeasure", "measure_of"]

logger = logging.get_logger(__name__)

_MOST = 2000  # images and texts whose agreement stands beside recall
Watch = Callable[[Iterable], Iterable]


class _TeacherPairs(NamedTuple):
    """A teacher's embeddings of pairs; and which of the images and of the texts are different ones, to be compared."""

    images: torch.Tensor
    texts: torch.Tensor
    image_of_text: torch.Tensor
    chosen: Embeds

    def agreement(self, images: torch.Tensor, texts: torch.Tensor) -> dict[str, float]:
        first, second = self.chosen
        if min(len(first), len(second)) < 2:  # nothing to compare with
            return {}
        return agreement((images[first], texts[second]), (self.images[first], self.texts[second]))


class RecallMeasure:
    """
    Measures recall on pairs and, beside it, agreement with a teacher, on at most 2,000 of the images and captions.

    Args:
        batches: The pairs.
        teacher: Returns what is known of the teacher; `None` if it is not at hand.
        index: Whether to search the teacher's embeddings too, for metrics that begin with `index_`.
    """

    def __init__(self, batches: Iterable, teacher: Callable[[], _TeacherPairs] | None, index: bool):
        self.batches, self.teacher, self.index = batches, teacher, index

    def __call__(self, model: nn.Module, watched: Watch = iter) -> dict[str, float]:
        embeds = embed_pairs(model, watched(self.batches))
        if self.teacher is None:
            return retrieval_metrics(*embeds)
        return self._recall(*embeds) | self.teacher().agreement(*embeds[:2])

    def of_teacher(self) -> dict[str, float]:
        """The teacher's own recall; it agrees with itself."""
        images, texts, image_of_text, _ = self.teacher()
        return self._recall(images, texts, image_of_text) | self.teacher().agreement(images, texts)

    def _recall(self, images: torch.Tensor, texts: torch.Tensor, image_of_text: torch.Tensor) -> dict[str, float]:
        recall = retrieval_metrics(images, texts, image_of_text)
        if not self.index:
            return recall
        found = retrieval_metrics(images, texts, image_of_text, index=self.teacher()[:2])
        return recall | {f"index_{name}": value for name, value in found.items()}


class AgreementMeasure:
    """
    Measures agreement with a teacher, on images and texts that are not paired.

    Args:
        batches: The images.
        texts: The texts.
        tokenizer: Makes tokens of them.
        teacher: Returns the teacher's embeddings.
    """

    def __init__(self, batches: Iterable, texts: Sequence[str], tokenizer: Any, teacher: Callable[[], Embeds]):
        self.batches, self.texts, self.tokenizer, self.teacher = batches, texts, tokenizer, teacher

    def __call__(self, model: nn.Module, watched: Watch = iter) -> dict[str, float]:
        (student,) = embed_unpaired([model], watched(self.batches), self.texts, self.tokenizer)
        return agreement(student, self.teacher())

    def of_teacher(self) -> dict[str, float]:
        """The teacher's agreement with itself."""
        return agreement(self.teacher(), self.teacher())


Measure = RecallMeasure | AgreementMeasure


def measure_of(
    context: RunContext, processor: ProcessorMixin, teacher: Teacher | None, source: PairSource | None = None
) -> Measure | None:
    """
    Decides what is measured: recall if the evaluation data has captions, agreement with the teacher if it has none.
    The teacher's embeddings are computed once.

    Args:
        context: The run, whose data names what is evaluated.
        processor: Tokenizer and image processor of student and teacher.
        teacher: The first teacher; `None` if the stage has none at hand.
        source: Evaluated in place of what the run names.

    Returns:
        A function of a model, and of one through which its batches go so that callbacks can follow; `None` if nothing
        is to be evaluated.

    Raises:
        ValueError: If agreement is to be measured on fewer than two images or texts, or there is no teacher to agree
            with or to search the index of.
    """
    data, run = context.data, context.run
    rows = evaluation_rows(data, source)
    if rows is None:
        return None
    has_captions = data.caption_column[0] in rows.column_names
    if teacher is None and (data.teacher_index or not has_captions):
        raise ValueError(
            "This stage has no teacher at hand whose index it could search, or with whom its student could agree. "
            "Leave out teacher_index, and evaluate on pairs with captions."
        )
    texts = [] if has_captions else _evaluated_texts(data, len(rows))
    batches = evaluation_pairs(
        rows,
        processor,
        caption_column=data.caption_column[0] if has_captions else None,
        batch_size=run.per_device_eval_batch_size,
        num_workers=run.dataloader_num_workers,
    )

    def embed() -> _TeacherPairs | Embeds:
        model = teacher.model.to(join_processes().device)
        if has_captions:
            return _teacher_pairs(model, batches)
        return embed_unpaired([model], batches, texts, processor.tokenizer)[0]

    known = cache(embed) if source is not None else lambda: context.teacher_embeds(teacher, embed)
    if has_captions:
        return RecallMeasure(batches, None if teacher is None else known, data.teacher_index)
    return AgreementMeasure(batches, texts, processor.tokenizer, known)


def _evaluated_texts(data: DataArguments, images: int) -> list[str]:
    parted = data.parted_texts
    if min(images, len(parted.evaluated)) < 2:
        raise ValueError(
            f"Agreement with the teacher needs at least two images and two texts; {images} images and "
            f"{len(parted.evaluated)} texts are evaluated. Give more, or hold out a larger validation_fraction."
        )
    if data.validation_fraction and not parted.held_out:
        logger.warning(
            "No texts are held out: there are too few. Agreement is measured on held-out images and all %d texts.",
            len(parted.evaluated),
        )
    return parted.evaluated


def _teacher_pairs(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> _TeacherPairs:
    keys = {"image_key": [], "text_key": []}

    def noted() -> Iterator[Mapping[str, torch.Tensor]]:
        for batch in batches:
            for name, found in keys.items():
                found.extend([batch[name]] if name in batch else [])  # a batch of bad rows alone has none
            yield batch

    embeds = embed_pairs(model, noted())
    images, texts = (gather(torch.cat(found).to(model.device)).tolist() for found in keys.values())
    images = list(dict.fromkeys(images))  # `embed_pairs` leaves out those that repeat
    return _TeacherPairs(*embeds, (_some(images), _some(texts)))


def _some(keys: Sequence[int]) -> torch.Tensor:
    """The first place of each different key, of those with the smallest."""
    places = {key: place for place, key in reversed(list(enumerate(keys)))}
    return torch.tensor([places[key] for key in sorted(places)[:_MOST]])

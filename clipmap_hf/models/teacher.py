"""A frozen model that students learn from, with its processor."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from clipmap_hf.models.loading import load_model, load_processor
from clipmap_hf.models.model_id import ModelId


__all__ = ["Teacher", "check_same_preprocessing"]


@dataclass
class Teacher:
    """
    A frozen model that a student learns from or is made of.

    Args:
        model: A `CLIPModel`.
        processor: Its tokenizer and image processor.
        id: Hub id or folder.
        revision: Its branch, tag or commit on the Hub.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    id: str
    revision: str | None = None

    @classmethod
    def load(
        cls,
        id: str,
        revision: str | None = None,
        backend: str = "pil",
        *,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> "Teacher":
        """
        Loads model and processor. The revision becomes the commit that was loaded: a branch may move.

        Args:
            id: Hub id or folder.
            revision: Branch, tag or commit on the Hub.
            backend: Of the image processor, `pil` or `torchvision`.
            dtype: The weights are cast to it.
            kwargs: Passed to every download (`token`, `cache_dir`, `local_files_only`, …).

        Raises:
            OSError: If a file is missing or the Hub cannot be reached.
            ValueError: If the weights do not fit the config.
        """
        model = load_model(id, revision=revision, dtype=dtype, **kwargs)
        processor = load_processor(id, revision=revision, backend=backend, **kwargs)
        return cls(model, processor, id, getattr(model.config, "_commit_hash", None) or revision)

    @property
    def source(self) -> ModelId:
        """Where it is found again, from whatever folder."""
        return ModelId(os.path.abspath(self.id) if os.path.isdir(self.id) else self.id, self.revision)


def check_same_preprocessing(processor: ProcessorMixin, teachers: Sequence[Teacher]) -> None:
    """
    Checks that a student's pixels and tokens mean the same to its teachers.

    Raises:
        ValueError: If a teacher preprocesses in another way than `processor`.
    """

    def what(processor: ProcessorMixin) -> dict[str, Any]:
        images, tokenizer = processor.image_processor, processor.tokenizer
        return {
            "image_mean": list(images.image_mean),
            "image_std": list(images.image_std),
            "size": dict(images.size),
            "vocabulary": tokenizer.get_vocab(),
            "model_max_length": tokenizer.model_max_length,
        }

    ours = what(processor)
    for teacher in teachers:
        theirs = what(teacher.processor)
        different = [name for name in ours if ours[name] != theirs[name]]
        if different:
            raise ValueError(
                f"The teacher {teacher.id!r} and the student preprocess in different ways ({', '.join(different)}), "
                "so they cannot learn from the same pixels and tokens. Take a teacher of the same processor."
            )

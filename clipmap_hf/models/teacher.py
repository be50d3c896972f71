"""A frozen model that students learn from, with its processor."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from clipmap_hf.models.finite import check_finite
from clipmap_hf.models.image_settings import image_settings
from clipmap_hf.models.loading import check_float, load_model, load_processor
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

    Attributes:
        source: Where it is found again, from whatever folder.

    Raises:
        ValueError: If a weight is NaN or infinite.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    id: str
    revision: str | None = None
    source: ModelId = field(init=False)

    def __post_init__(self):
        # Asked now: later, the folder may be gone.
        self.source = ModelId(self.id, self.revision).absolute()
        check_finite(self.model.state_dict(), f"The teacher {self.id!r}")

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
            ValueError: If the weights do not fit the config, or are not finite.
        """
        model = load_model(id, revision=revision, dtype=dtype, **kwargs)
        processor = load_processor(id, revision=revision, backend=backend, **kwargs)
        return cls(model, processor, id, getattr(model.config, "_commit_hash", None) or revision)

    @classmethod
    def take(
        cls,
        source: str | os.PathLike | PreTrainedModel,
        revision: str | None = None,
        processor: ProcessorMixin | None = None,
        **options: Any,
    ) -> "Teacher":
        """
        Takes what is given as a teacher.

        Args:
            source: Hub id or folder (see `load`), or a model (see `from_model`).
            revision: Branch, tag or commit of a Hub id.
            processor: Tokenizer and image processor of a model.
            options: Passed to `load` or `from_model`.

        Raises:
            TypeError: If `source` is none of these.
            ValueError: If `revision` or `processor` does not belong to such a source.
        """
        if isinstance(source, PreTrainedModel):
            if revision is not None:
                raise ValueError("A teacher that is given as a model has no revision to choose; leave it out.")
            return cls.from_model(source, processor, **options)
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(
                f"A teacher of the type {type(source).__name__} cannot be taken; give a Hub id, a folder or a "
                "CLIPModel (of a model with adapters, what `merge_and_unload` returns)."
            )
        if processor is not None:
            raise ValueError("The processor of a Hub id or folder lies there; leave processor out.")
        return cls.load(os.fspath(source), revision, **options)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        processor: ProcessorMixin | None = None,
        backend: str = "pil",
        *,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> "Teacher":
        """
        Takes a model that a program holds, and leaves it as it is: the teacher is a copy. It is known by the model's
        `name_or_path`, in cards and in maps, so its weights must be those that lie there.

        Args:
            model: A `CLIPModel`.
            processor: Its tokenizer and image processor; by default those that lie where the model came from.
            backend: Of the image processor that is loaded, `pil` or `torchvision`.
            dtype: The copied weights are cast to it.
            kwargs: Passed to downloads of the processor.

        Raises:
            ValueError: If the model has no `name_or_path`, or its weights are packed or not finite.
            OSError: If the processor is not there.
        """
        check_float(model, "A teacher")
        if not model.name_or_path:
            raise ValueError(
                "The model has no name_or_path, by which cards and maps name a teacher. Save it with its processor, "
                "and give the folder."
            )
        revision = getattr(model.config, "_commit_hash", None)
        if processor is None:
            processor = load_processor(model.name_or_path, revision=revision, backend=backend, **kwargs)
        return cls(copy.deepcopy(model).to(dtype).eval(), processor, model.name_or_path, revision)


def check_same_preprocessing(processor: ProcessorMixin, teachers: Sequence[Teacher]) -> None:
    """
    Checks that a student's pixels and tokens mean the same to its teachers.

    Raises:
        ValueError: If a teacher preprocesses in another way than `processor`.
    """

    def what(processor: ProcessorMixin) -> dict[str, Any]:
        tokenizer = processor.tokenizer
        return {
            **image_settings(processor.image_processor),
            "vocabulary": tokenizer.get_vocab(),
            "model_max_length": tokenizer.model_max_length,
        }

    ours = what(processor)
    for teacher in teachers:
        theirs = what(teacher.processor)
        different = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if different:
            raise ValueError(
                f"The teacher {teacher.id!r} and the student preprocess in different ways ({', '.join(different)}), "
                "so they cannot learn from the same pixels and tokens. Take a teacher of the same processor."
            )

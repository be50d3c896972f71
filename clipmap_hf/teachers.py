"""The frozen models that students learn from, and the cache of their embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPProcessor, PreTrainedModel

from clipmap_hf.atomic import read_json
from clipmap_hf.config import embedding_width
from clipmap_hf.data.build_cache import build_teacher_cache, finish_teacher_cache
from clipmap_hf.data.cache_files import MANIFEST, SUMMARY
from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.data.teacher_cache import TeacherCache, cache_manifest, model_fingerprint
from clipmap_hf.distributed import join_processes
from clipmap_hf.models import load_model, load_processor
from clipmap_hf.training.arguments import DataArguments, TeacherCacheArguments
from clipmap_hf.training.setup import source_files, stage_seed, training_collator, training_pairs


__all__ = ["Teacher", "check_same_preprocessing", "load_teachers", "make_teacher_cache"]


@dataclass
class Teacher:
    """
    A frozen model that a student learns from.

    Args:
        model: A `CLIPModel`.
        processor: Its tokenizer and image processor.
        id: Hub id or folder.
        revision: Its branch, tag or commit on the Hub.
    """

    model: PreTrainedModel
    processor: CLIPProcessor
    id: str
    revision: str | None = None

    @classmethod
    def load(cls, teacher_id: str, revision: str | None = None, backend: str = "pil") -> "Teacher":
        """Loads model and processor; `backend` is the image processor's."""
        processor = load_processor(teacher_id, revision=revision, backend=backend)
        return cls(load_model(teacher_id, revision=revision), processor, teacher_id, revision)


def load_teachers(ids: Sequence[tuple[str, str | None]], backend: str = "pil") -> list[Teacher]:
    """The teachers of these ids and revisions; `backend` is that of their image processors."""
    return [Teacher.load(*one, backend=backend) for one in ids]


def make_teacher_cache(
    teachers: Sequence[Teacher],
    processor: CLIPProcessor,
    data: DataArguments,
    cache: TeacherCacheArguments,
    *,
    seed: int = 0,
    num_workers: int = 0,
    pairs: PairDataset | PairStream | None = None,
) -> TeacherCache:
    """
    The cache in `cache.teacher_cache`, with the views that a distillation with the same `seed` goes through. What of
    it is not there yet is computed; all processes share the work.

    Args:
        teachers: Whose embeddings to keep.
        processor: Tokenizer and image processor.
        data: The training pairs and how they are augmented.
        cache: Where, and how many views.
        seed: Of the run.
        num_workers: Processes that decode and augment.
        pairs: The training pairs, if they are loaded already.

    Raises:
        ValueError: If what is there was made of something else, which is named, or a teacher preprocesses in another
            way than `processor`.
    """
    state = join_processes()
    check_same_preprocessing(processor, teachers)
    collator = training_collator(data, processor, stage_seed("distillation", seed))
    names = [
        {
            "id": Path(teacher.id).name if Path(teacher.id).is_dir() else teacher.id,
            "revision": teacher.revision,
            "weights": model_fingerprint(teacher.model),
            "projection_dim": embedding_width(teacher.model.config),
        }
        for teacher in teachers
    ]
    manifest = cache_manifest(names, collator, cache.views, source_files(data))
    folder = Path(cache.teacher_cache)
    complete = (folder / SUMMARY).is_file()
    if not complete or read_json(folder / MANIFEST)["world_size"] == state.num_processes:
        build_teacher_cache(
            folder,
            [teacher.model.to(state.device) for teacher in teachers],
            (training_pairs(data) if pairs is None else pairs).pairs,
            collator,
            manifest,
            num_workers=num_workers,
            rank=state.process_index,
            world_size=state.num_processes,
            max_bad_fraction=data.max_bad_fraction,
        )
        state.wait_for_everyone()
        if state.is_main_process:
            finish_teacher_cache(folder)
        state.wait_for_everyone()
    made = TeacherCache.open(folder)
    made.check(manifest)  # a complete one may have been made by another number of processes
    return made


def check_same_preprocessing(processor: CLIPProcessor, teachers: Sequence[Teacher]) -> None:
    """
    Checks that a student's pixels and tokens mean the same to its teachers.

    Raises:
        ValueError: If a teacher preprocesses in another way than `processor`.
    """

    def what(processor: CLIPProcessor) -> dict[str, Any]:
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

"""Builds the teacher cache that arguments ask for, or opens it if it is complete."""

from collections.abc import Sequence
from pathlib import Path

from transformers import CLIPProcessor

from clipmap_hf.config import embedding_width
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.data.sources import source_files, stage_seed, training_collator, training_pairs
from clipmap_hf.distributed import join_processes
from clipmap_hf.files.atomic import read_json
from clipmap_hf.models.fingerprints import model_fingerprint
from clipmap_hf.models.teacher import Teacher, check_same_preprocessing
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.teacher_cache.build import build_teacher_cache, finish_teacher_cache
from clipmap_hf.teacher_cache.files import MANIFEST, SUMMARY
from clipmap_hf.teacher_cache.lookup import TeacherCache
from clipmap_hf.teacher_cache.manifest import cache_manifest


__all__ = ["make_teacher_cache"]


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
    Builds the cache in `cache.teacher_cache`, with the views that a distillation with the same seed uses, and opens
    it. Only the missing embeddings are computed. All processes share the work.

    Args:
        teachers: The teachers whose embeddings are kept.
        processor: Tokenizer and image processor of the student.
        data: The training pairs, and how they are augmented.
        cache: Folder of the cache and number of views.
        seed: Seed of the run.
        num_workers: Worker processes that decode and augment.
        pairs: The training pairs, if they are loaded already.

    Raises:
        ValueError: If the folder holds a cache with other settings, which the message names, or if a teacher
            preprocesses in another way than `processor`.
    """
    state = join_processes()
    check_same_preprocessing(processor, teachers)
    rows = (training_pairs(data) if pairs is None else pairs).pairs
    collator = training_collator(data, processor, stage_seed("distillation", seed), partners=rows)
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
            rows,
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
    built = TeacherCache.open(folder)
    built.check(manifest)  # not checked yet if another number of processes has built the cache
    return built

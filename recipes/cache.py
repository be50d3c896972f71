r"""
Computes the teachers' embeddings of the training pairs once, so that training only reads them.

They are of several views of each image, and of each caption. An interrupted run goes on where it stopped, and several
processes share the work. recipes/distill.py with the same options then reads the result.

    python recipes/cache.py --teacher openai/clip-vit-base-patch16 --train_data 'shards/*.tar' --image_column jpg \
        --caption_column txt --teacher_cache cache --views 5
    python recipes/distill.py … --teacher_cache cache --views 5
"""

from dataclasses import dataclass, field

from clipmap_hf.cli.arguments import TeacherArguments
from clipmap_hf.cli.recipes import parse_recipe
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments


@dataclass
class CacheRunArguments:
    seed: int = field(default=0, metadata={"help": "The seed of the distillation that will use the cache."})
    dataloader_num_workers: int = field(
        default=0, metadata={"aliases": "--num_workers", "help": "Processes that decode and augment images."}
    )


def main() -> None:
    data, teacher, cache, run = parse_recipe(
        DataArguments,
        TeacherArguments,
        TeacherCacheArguments,
        CacheRunArguments,
        stages={},
        description=__doc__,
    )
    if cache.teacher_cache is None:
        raise ValueError("Say where the embeddings shall lie: --teacher_cache FOLDER.")
    from clipmap_hf.distributed import join_processes
    from clipmap_hf.models.teacher import Teacher
    from clipmap_hf.teacher_cache.make import make_teacher_cache

    processes = join_processes()
    teachers = [Teacher.load(*source, backend=data.image_backend) for source in teacher.teachers]
    made = make_teacher_cache(
        teachers, teachers[0].processor, data, cache, seed=run.seed, num_workers=run.dataloader_num_workers
    )
    processes.print(f"{cache.teacher_cache}: {made.views} views of each image")


if __name__ == "__main__":
    main()

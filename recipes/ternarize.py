r"""
Ternary weights: trains a copy of a model (the teacher, or a student of it) whose weights are -1, 0 and 1 times a
level, so that it gives the teacher's embeddings, and writes it packed, at 1.6 bits a weight.

    python recipes/ternarize.py --teacher openai/clip-vit-base-patch16 --train_data 'shards/*.tar' \
        --image_column jpg --caption_column txt --output_dir ternary
    python recipes/ternarize.py --student_model small --teacher openai/clip-vit-base-patch16 …

After `import clipmap_hf`, transformers loads the folder as any other. `--ternary_steps 0` rounds without training.
"""

from dataclasses import dataclass, field

from clipmap_hf.ternary.arguments import TernaryArguments
from clipmap_hf.training.arguments import (
    CalibrationArguments,
    DataArguments,
    DistillationArguments,
    MappingArguments,
    MaskingArguments,
    RunArguments,
    StudentArguments,
    TeacherArguments,
    TeacherCacheArguments,
)
from clipmap_hf.training.parsing import arguments_yaml, parse_arguments


@dataclass
class StudentModelArguments:
    student_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the CLIPModel to make ternary; by default the teacher."}
    )
    student_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub student."})


def main() -> None:
    data, teacher, cache, student, run, ternary = parse_arguments(
        DataArguments,
        TeacherArguments,
        TeacherCacheArguments,
        StudentModelArguments,
        RunArguments,
        stages={"ternary": TernaryArguments},
        others=(StudentArguments, CalibrationArguments),
        other_stages={"mapping": MappingArguments, "masking": MaskingArguments, "distillation": DistillationArguments},
        description=__doc__,
    )
    from clipmap_hf.distributed import join_processes
    from clipmap_hf.models import load_model, load_processor
    from clipmap_hf.teachers import load_teachers
    from clipmap_hf.ternarization import run_ternarization

    join_processes()
    source, revision = student.student_model, student.student_revision
    if source is None:
        source, revision = teacher.teachers[0]
    run_ternarization(
        load_model(source, revision=revision),
        load_teachers(teacher.teachers, data.image_backend),
        load_processor(source, revision=revision, backend=data.image_backend),
        ternary,
        run,
        data,
        cache=cache,
        recipe=arguments_yaml(data, teacher, cache, student, run, ternary=ternary),
    )


if __name__ == "__main__":
    main()

r"""
The retraining stage alone: distills any student `CLIPModel` (a mapped one, or another) from its teacher.

    python recipes/distill.py --student_model mapped --teacher openai/clip-vit-base-patch16 \
        --train_data pairs.parquet --output_dir distilled

With `--teacher_cache DIR`, the teachers' embeddings are computed first (or by recipes/cache.py), and then only read.
"""

from dataclasses import dataclass, field

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
    student_model: str = field(metadata={"help": "Hub id or folder of the CLIPModel to train."})
    student_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub student."})


def main() -> None:
    data, teacher, cache, student, run, distillation = parse_arguments(
        DataArguments,
        TeacherArguments,
        TeacherCacheArguments,
        StudentModelArguments,
        RunArguments,
        stages={"distillation": DistillationArguments},
        others=(
            StudentArguments,
            CalibrationArguments,
        ),
        other_stages={"mapping": MappingArguments, "masking": MaskingArguments},
        description=__doc__,
    )
    from clipmap_hf.distributed import join_processes
    from clipmap_hf.models import load_model, load_processor
    from clipmap_hf.runs import run_distillation
    from clipmap_hf.teachers import load_teachers

    join_processes()
    run_distillation(
        load_model(student.student_model, revision=student.student_revision),
        load_teachers(teacher.teachers, data.image_backend),
        load_processor(student.student_model, revision=student.student_revision, backend=data.image_backend),
        distillation,
        run,
        data,
        cache=cache,
        recipe=arguments_yaml(data, teacher, cache, student, run, distillation=distillation),
    )


if __name__ == "__main__":
    main()

r"""
The retraining stage alone: distills any student `CLIPModel` (a mapped one, or another) from its teacher.

    python recipes/distill.py --student_model mapped --teacher openai/clip-vit-base-patch16 \
        --train_data pairs.parquet --output_dir distilled
"""

from dataclasses import dataclass, field
from pathlib import Path

from clipmap_hf.training.arguments import (
    DataArguments,
    DistillationArguments,
    MappingArguments,
    RunArguments,
    StudentArguments,
    TeacherArguments,
    parse_arguments,
    save_arguments,
)


@dataclass
class StudentModelArguments:
    student_model: str = field(metadata={"help": "Hub id or folder of the CLIPModel to train."})
    student_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub student."})


def main() -> None:
    data, teacher, student, run, distillation = parse_arguments(
        DataArguments,
        TeacherArguments,
        StudentModelArguments,
        RunArguments,
        stages={"distillation": DistillationArguments},
        others=(StudentArguments,),
        other_stages={"mapping": MappingArguments},
        description=__doc__,
    )
    from clipmap_hf.models import load_model, load_processor
    from clipmap_hf.runs import run_distillation

    arguments_file = Path(run.output_dir) / "arguments.yaml"
    save_arguments(arguments_file, data, teacher, student, run, distillation=distillation)
    run_distillation(
        load_model(student.student_model, revision=student.student_revision),
        load_model(teacher.teacher, revision=teacher.teacher_revision),
        load_processor(student.student_model, revision=student.student_revision, backend=data.image_backend),
        distillation,
        run,
        data,
        teacher_id=teacher.teacher,
        recipe=arguments_file.read_text(),
    )


if __name__ == "__main__":
    main()

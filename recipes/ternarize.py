r"""
Trains a copy of a model whose weights are ternary, and writes it packed, at 1.6 bits a weight.

Ternary weights are -1, 0 and 1 times a level. The model is the teacher or a student of it, and the copy is trained to
give the teacher's embeddings.

    python recipes/ternarize.py --teacher openai/clip-vit-base-patch16 --train_data 'shards/*.tar' \
        --image_column jpg --caption_column txt --output_dir ternary
    python recipes/ternarize.py --student_model small --teacher openai/clip-vit-base-patch16 …

After `import clipmap_hf`, transformers loads the folder as any other. `--ternary_steps 0` rounds without training.
"""

from dataclasses import dataclass, field

from clipmap_hf.cli.arguments import TeacherArguments
from clipmap_hf.cli.parsing import arguments_yaml
from clipmap_hf.cli.recipes import parse_recipe
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.ternary_arguments import TernaryStageArguments


@dataclass
class StudentModelArguments:
    student_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the CLIPModel to make ternary; by default the teacher."}
    )
    student_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub student."})


def main() -> None:
    data, teacher, cache, student, run, ternary = parse_recipe(
        DataArguments,
        TeacherArguments,
        TeacherCacheArguments,
        StudentModelArguments,
        RunArguments,
        stages={"ternary": TernaryStageArguments},
        description=__doc__,
    )
    from copy import deepcopy

    from clipmap_hf.cli.summary import print_summary
    from clipmap_hf.distributed import join_processes
    from clipmap_hf.models.teacher import Teacher
    from clipmap_hf.pipeline.context import RunContext
    from clipmap_hf.pipeline.ternarization import TernaryTrainer

    join_processes()
    context = RunContext(run, data, arguments_yaml(data, teacher, cache, student, run, ternary=ternary), cache)
    teachers = context.teachers(teacher.teachers)
    if student.student_model is None:
        model, processor = deepcopy(teachers[0].model), teachers[0].processor
    else:
        source = Teacher.load(student.student_model, student.student_revision, data.image_backend)
        model, processor = source.model, source.processor
    trainer = TernaryTrainer(model, teachers, ternary, processing_class=processor, context=context)
    print_summary(run.output_dir, trainer.train())


if __name__ == "__main__":
    main()

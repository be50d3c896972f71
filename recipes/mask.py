r"""
Selects a student by learned masks, which is TinyCLIP's automatic inheritance.

A copy of the teacher is trained together with masks of its channels, heads and neurons until as little is left as the
student has. The student that they select is written. To distill it, use recipes/distill.py.

    python recipes/mask.py --teacher openai/clip-vit-base-patch16 --student small --train_data 'shards/*.tar' \
        --image_column jpg --caption_column txt --output_dir selected

What needs no training is an initializer of recipes/compress.py: magnitude, taylor, mope, manual, random_selection.
"""

from clipmap_hf.cli.arguments import StudentArguments, TeacherArguments
from clipmap_hf.cli.parsing import arguments_yaml
from clipmap_hf.cli.recipes import parse_recipe
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.training.arguments import MaskingStageArguments
from clipmap_hf.training.run_arguments import RunArguments


def main() -> None:
    data, teacher, student, run, masking = parse_recipe(
        DataArguments,
        TeacherArguments,
        StudentArguments,
        RunArguments,
        stages={"masking": MaskingStageArguments},
        description=__doc__,
    )
    from clipmap_hf.cli.student import map_config
    from clipmap_hf.cli.summary import print_summary
    from clipmap_hf.distributed import join_processes
    from clipmap_hf.pipeline.context import RunContext
    from clipmap_hf.pipeline.masking import MaskingTrainer
    from clipmap_hf.pipeline.start import choose_student

    join_processes()
    config = map_config(student, run.seed)
    if config is None:
        raise ValueError("Say what to select: --student, or sizes such as --vision_hidden_size.")
    context = RunContext(run, data, arguments_yaml(data, teacher, student, run, masking=masking))
    config = choose_student(teacher.teachers[0], config, context, calibration=None)  # masks ask for no such pairs
    teachers = context.teachers(teacher.teachers)
    print_summary(run.output_dir, MaskingTrainer(teachers[0], teachers, config, masking, context).train())


if __name__ == "__main__":
    main()

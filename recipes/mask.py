r"""
Selection by learned masks (TinyCLIP's automatic inheritance): trains a copy of the teacher together with masks of its
channels, heads and neurons until as little is left as the student has, and writes the student that they select. To
distill it, use recipes/distill.py.

    python recipes/mask.py --teacher openai/clip-vit-base-patch16 --student small --train_data 'shards/*.tar' \
        --image_column jpg --caption_column txt --output_dir selected

What needs no training is an initializer of recipes/compress.py: magnitude, taylor, mope, manual, random_selection.
"""

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


def main() -> None:
    data, teacher, student, run, masking = parse_arguments(
        DataArguments,
        TeacherArguments,
        StudentArguments,
        RunArguments,
        stages={"masking": MaskingArguments},
        others=(TeacherCacheArguments, CalibrationArguments),
        other_stages={"mapping": MappingArguments, "distillation": DistillationArguments},
        description=__doc__,
    )
    from clipmap_hf.distributed import join_processes
    from clipmap_hf.runs import run_masking
    from clipmap_hf.starts import choose_student
    from clipmap_hf.teachers import load_teachers
    from clipmap_hf.training.setup import map_config

    join_processes()
    config = map_config(student, run.seed)
    if config is None:
        raise ValueError("Say what to select: --student, or sizes such as --vision_hidden_size.")
    config = choose_student(*teacher.teachers[0], config, None, run, data)  # masks ask for no calibration pairs
    teachers = load_teachers(teacher.teachers, data.image_backend)
    run_masking(
        teachers[0],
        teachers,
        config,
        masking,
        run,
        data,
        recipe=arguments_yaml(data, teacher, student, run, masking=masking),
    )


if __name__ == "__main__":
    main()

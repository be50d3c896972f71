"""
The whole story on two CPU cores: makes a small student of the embedded teacher in five ways, all on the same number of
pairs, and evaluates them on an unseen style: calibrated start + distillation, the same with ternary weights, CLIP-Map
as in its paper, manual inheritance + distillation, and from scratch.

    python recipes/demo.py --config recipes/configs/demo.yaml --output_dir demo-output

Writes `student/` and `ternary/` (the first two), `results.json`, `results.md` and `index.html` to the output folder.
"""

import sys
from pathlib import Path

from clipmap_hf.demo import TEACHER, TEST_PAIRS, TRAIN_PAIRS
from clipmap_hf.ternary.arguments import TernaryArguments
from clipmap_hf.training.arguments import (
    CalibrationArguments,
    DataArguments,
    DistillationArguments,
    MappingArguments,
    RunArguments,
    StageArguments,
    StudentArguments,
    TeacherArguments,
)
from clipmap_hf.training.parsing import arguments_yaml, parse_arguments


STAGES = {
    "mapping": MappingArguments,
    "distillation": DistillationArguments,
    "calibrated": DistillationArguments,
    "ternary": TernaryArguments,
    "manual": DistillationArguments,
    "scratch": StageArguments,
}


def parse(argv: list[str]) -> tuple:
    embedded = ["--teacher", str(TEACHER), "--train_data", str(TRAIN_PAIRS), "--eval_data", str(TEST_PAIRS)]
    results = parse_arguments(
        DataArguments,
        TeacherArguments,
        StudentArguments,
        CalibrationArguments,
        RunArguments,
        stages=STAGES,
        description=__doc__,
        argv=embedded + argv,
    )
    others, stages = results[: -len(STAGES)], results[-len(STAGES) :]
    return *others, dict(zip(STAGES, stages, strict=True))


def main() -> None:
    data, teacher_arguments, student, calibration, run, stages = parse(sys.argv[1:])
    from transformers.utils import logging

    from clipmap_hf.demo.contest import Contest
    from clipmap_hf.demo.report import write_report
    from clipmap_hf.starts import choose_student
    from clipmap_hf.teachers import Teacher
    from clipmap_hf.training.setup import map_config

    logging.disable_progress_bar()
    recipe = arguments_yaml(data, teacher_arguments, student, calibration, run, **stages)
    teacher = Teacher.load(teacher_arguments.teacher[0])
    student = choose_student(teacher.id, None, map_config(student, run.seed), calibration, run, data)
    contest = Contest(teacher, student, calibration, run, data, recipe)
    print(write_report(Path(run.output_dir), contest.contestants(stages), data, teacher.processor))


if __name__ == "__main__":
    main()

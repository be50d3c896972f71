"""
The whole story on two CPU cores: makes a small student of the embedded teacher in five ways, all on the same number of
pairs, and evaluates them on an unseen style: calibrated start + distillation, the same with ternary weights, CLIP-Map
as in its paper, manual inheritance + distillation, and from scratch.

    python recipes/demo.py --config recipes/configs/demo.yaml --output_dir demo-output

Writes `student/` and `ternary/` (the first two), `results.json`, `results.md` and `index.html` to the output folder.
"""

import sys

from clipmap_hf.cli.arguments import StudentArguments, TeacherArguments
from clipmap_hf.cli.parsing import arguments_yaml, parse_arguments
from clipmap_hf.data.arguments import CalibrationArguments, DataArguments
from clipmap_hf.demo import TEACHER, TEST_PAIRS, TRAIN_PAIRS
from clipmap_hf.training.arguments import DistillationStageArguments, MappingStageArguments, StageArguments
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.ternary_arguments import TernaryStageArguments


STAGES = {
    "mapping": MappingStageArguments,
    "distillation": DistillationStageArguments,
    "calibrated": DistillationStageArguments,
    "ternary": TernaryStageArguments,
    "manual": DistillationStageArguments,
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

    from clipmap_hf.cli.student import map_config
    from clipmap_hf.demo.contest import Contest
    from clipmap_hf.demo.report import write_report
    from clipmap_hf.pipeline.context import RunContext
    from clipmap_hf.pipeline.start import choose_student

    logging.disable_progress_bar()
    recipe = arguments_yaml(data, teacher_arguments, student, calibration, run, **stages)
    context = RunContext(run, data, recipe)
    teacher = context.teacher(teacher_arguments.teachers[0])
    student = choose_student(teacher.source, map_config(student, run.seed), context, calibration)
    contest = Contest(teacher, student, calibration, context)
    print(write_report(context.output_dir, contest.contestants(stages), data, teacher.processor))


if __name__ == "__main__":
    main()

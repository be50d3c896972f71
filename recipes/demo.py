"""
Compresses the embedded teacher by several methods, and compares the results.

Every method makes a student of a tenth of the teacher's size, on the same number of pairs. The students are
evaluated on a drawing style that none has seen. The methods: `calibrated` start, then distillation; the same with
`ternary` weights; `clip_map` as in its paper; `manual` inheritance, then distillation; from `scratch`.

    python recipes/demo.py --config recipes/configs/demo.yaml      # in three minutes, without CLIP-Map
    python recipes/demo.py --config recipes/configs/demo_all.yaml  # all of them, on more pairs

Prints a row for each student as soon as it is ready. Writes a folder for each, `results.json`, `results.md` and the
page `index.html` to the output folder. After an interruption, the same command goes on.
"""

import os
import shutil
import sys
from pathlib import Path

from clipmap_hf.cli.arguments import StudentArguments, TeacherArguments
from clipmap_hf.cli.parsing import arguments_yaml, parse_arguments
from clipmap_hf.data.arguments import CalibrationArguments, DataArguments
from clipmap_hf.demo import TEACHER, TEST_PAIRS, TRAIN_PAIRS
from clipmap_hf.demo.arguments import METHODS, ContestArguments
from clipmap_hf.training.arguments import DistillationStageArguments, MappingStageArguments, StageArguments
from clipmap_hf.training.run_arguments import RunArguments
from clipmap_hf.training.ternary_arguments import TernaryStageArguments


# The line to type next.
NEXT = (
    "{command} compress --teacher openai/clip-vit-base-patch16 --student small --train_data your_pairs.parquet "
    "--validation_fraction 0.1 --distillation_losses feature=2000 --distillation_epochs 5 --output_dir small"
)

STAGES = {
    "mapping": MappingStageArguments,
    "distillation": DistillationStageArguments,
    "calibrated": DistillationStageArguments,
    "ternary": TernaryStageArguments,
    "manual": DistillationStageArguments,
    "scratch": StageArguments,
}


def parse() -> tuple:
    embedded = ["--teacher", str(TEACHER), "--train_data", str(TRAIN_PAIRS), "--eval_data", str(TEST_PAIRS)]
    sys.argv[1:1] = embedded  # what the command line says comes later, and wins
    results = parse_arguments(
        DataArguments,
        TeacherArguments,
        StudentArguments,
        CalibrationArguments,
        RunArguments,
        ContestArguments,
        stages=STAGES,
        description=__doc__,
    )
    others, stages = results[: -len(STAGES)], results[-len(STAGES) :]
    return *others, dict(zip(STAGES, stages, strict=True))


def main() -> None:
    # Read by torch. Models as small as these hardly gain from a second thread; where another process wants a core, two
    # threads that spin to wait for each other took ten times as long as one. A worker that decodes is better.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    data, teacher_arguments, student, calibration, run, contest, stages = parse()
    import datasets
    from transformers.utils import logging

    from clipmap_hf.cli.student import map_config
    from clipmap_hf.demo.contest import Contest
    from clipmap_hf.demo.report import Report
    from clipmap_hf.pipeline.context import RunContext
    from clipmap_hf.pipeline.start import choose_student

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    recipe = arguments_yaml(data, teacher_arguments, student, calibration, run, contest, **stages)
    context = RunContext(run, data, recipe)
    teacher = context.teacher(teacher_arguments.teachers[0])
    size = choose_student(teacher.source, map_config(student, run.seed), context, calibration)
    report = Report(context.output_dir, contest.names, data, teacher.processor)
    print(report.header, flush=True)
    for name, contestant in Contest(teacher, size, calibration, contest, stages, context).contestants():
        print(report.add(name, contestant), flush=True)
    page = report.write(["teacher", METHODS[contest.methods[0]][-1]])
    print(f"\nLook at what they find: {page.resolve()}")
    print(f"Now your own teacher and pairs:\n    {NEXT.format(command=command())}")


def command() -> str:
    """How the reader can start our command: by its name, or where it is not on the path, by its place."""
    if shutil.which("clipmap-hf"):
        return "clipmap-hf"
    return os.path.relpath(Path(sys.executable).with_name("clipmap-hf"))


if __name__ == "__main__":
    main()

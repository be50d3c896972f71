"""
The whole story on two CPU cores: makes a small student of the embedded teacher in four ways, all on the same number of
pairs, and evaluates them on an unseen style: calibrated start + distillation, CLIP-Map as in its paper, manual
inheritance + distillation, and from scratch.

    python recipes/demo.py --config recipes/configs/demo.yaml --output_dir demo-output

Writes `student/` (the first of them), `results.json`, `results.md` and `index.html` to the output folder.
"""

import copy
import dataclasses
import sys
import time
from pathlib import Path

from clipmap_hf.demo import TEACHER, TEST_PAIRS, TRAIN_PAIRS
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


def parse(argv: list[str]) -> tuple:
    embedded = ["--teacher", str(TEACHER), "--train_data", str(TRAIN_PAIRS), "--eval_data", str(TEST_PAIRS)]
    stages = {"mapping": MappingArguments, "distillation": DistillationArguments}
    others = {"calibrated": DistillationArguments, "manual": DistillationArguments, "scratch": StageArguments}
    return parse_arguments(
        DataArguments,
        TeacherArguments,
        StudentArguments,
        CalibrationArguments,
        RunArguments,
        stages=stages | others,
        description=__doc__,
        argv=embedded + argv,
    )


def main() -> None:
    data, teacher_arguments, student_arguments, calibration, run, *stages = parse(sys.argv[1:])
    mapping, distillation, calibrated, manual, scratch = stages
    from accelerate.utils import set_seed
    from transformers import CLIPModel
    from transformers.utils import logging

    from clipmap_hf.demo.report import Contestant, write_report
    from clipmap_hf.runs import run_distillation, run_mapping, start_compressor
    from clipmap_hf.teachers import Teacher
    from clipmap_hf.training.setup import map_config, run_stage, training_pairs
    from clipmap_hf.training.stages import ContrastiveStage

    logging.disable_progress_bar()
    output, teacher_id = Path(run.output_dir), teacher_arguments.teacher[0]
    sections = dict(zip(("mapping", "distillation", "calibrated", "manual", "scratch"), stages, strict=True))
    recipe = arguments_yaml(data, teacher_arguments, student_arguments, calibration, run, **sections)
    teacher, pairs = Teacher.load(teacher_id), training_pairs(data)
    config = map_config(student_arguments, run.seed)
    training_only = dataclasses.replace(data, eval_data=None)  # the report evaluates all models at the end

    def start(initializer: str):
        student = dataclasses.replace(config, initializer=initializer)
        return start_compressor(teacher_id, None, student, calibration, run, data)

    def into(name: str) -> RunArguments:
        return dataclasses.replace(run, output_dir=str(output / name))

    def for_pairs(arguments: StageArguments, pairs: int) -> StageArguments:
        return dataclasses.replace(arguments, steps=pairs // arguments.batch_size)

    def distill(model, arguments, name: str, data=training_only):
        return run_distillation(model, [teacher], processor, arguments, into(name), data, recipe=recipe, pairs=pairs)

    compressor = start("diagonal")
    processor, inherited = compressor.processor, compressor.export()
    mapped = run_mapping(compressor, mapping, into("mapped"), training_only, recipe=recipe, pairs=pairs)
    clip_map = compressor.export()
    distilled = distill(clip_map, distillation, "clip-map")
    seen = mapped.pairs + distilled.pairs  # every student sees as many, the calibrated one in calibration too
    began = time.perf_counter()
    started = start("calibrated").export()
    starting, student = time.perf_counter() - began, copy.deepcopy(started)
    best = distill(student, for_pairs(calibrated, seen - calibration.calibration_pairs), "student", data)
    manual_run = distill(inherited, for_pairs(manual, seen), "manual")
    set_seed(run.seed)
    fresh = CLIPModel(student.config)
    stage = ContrastiveStage(fresh, scratch.logit_scale, scratch.learn_logit_scale)
    scratch = for_pairs(scratch, seen)
    scratch_run = run_stage(stage, scratch, into("scratch"), training_only, processor, name="scratch", pairs=pairs)

    contestants = {
        "teacher": Contestant(teacher.model),
        "calibrated + distillation": Contestant(
            student, best.pairs + calibration.calibration_pairs, starting + best.seconds
        ),
        "calibrated, not trained": Contestant(started, calibration.calibration_pairs, starting),
        "CLIP-Map of the paper": Contestant(clip_map, seen, mapped.seconds + distilled.seconds),
        "manual inheritance + distillation": Contestant(inherited, manual_run.pairs, manual_run.seconds),
        "from scratch": Contestant(fresh, scratch_run.pairs, scratch_run.seconds),
    }
    print(write_report(output, contestants, data, processor))


if __name__ == "__main__":
    main()

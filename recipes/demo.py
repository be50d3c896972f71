"""
The whole story on two CPU cores: compresses the embedded teacher by CLIP-Map, and trains two students of the same size
on the same number of pairs, by manual inheritance + distillation and from scratch; evaluates all on an unseen style.

    python recipes/demo.py --config recipes/configs/demo.yaml --output_dir demo-output

Writes `student/` (the CLIP-Map student), `results.json`, `results.md` and `index.html` to the output folder.
"""

import dataclasses
import sys
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
    baselines = {"manual": DistillationArguments, "scratch": StageArguments}
    return parse_arguments(
        DataArguments,
        TeacherArguments,
        StudentArguments,
        CalibrationArguments,
        RunArguments,
        stages=stages | baselines,
        description=__doc__,
        argv=embedded + argv,
    )


def main() -> None:
    data, teacher_arguments, student_arguments, run, mapping, distillation, manual, scratch = parse(sys.argv[1:])
    from accelerate.utils import set_seed
    from transformers import CLIPModel
    from transformers.utils import logging

    from clipmap_hf.compressor import ClipMapCompressor
    from clipmap_hf.demo.report import Contestant, write_report
    from clipmap_hf.runs import run_distillation, run_mapping
    from clipmap_hf.teachers import Teacher
    from clipmap_hf.training.setup import map_config, run_stage, training_pairs
    from clipmap_hf.training.stages import ContrastiveStage

    logging.disable_progress_bar()
    output, teacher_id = Path(run.output_dir), teacher_arguments.teacher[0]
    sections = {"mapping": mapping, "distillation": distillation, "manual": manual, "scratch": scratch}
    recipe = arguments_yaml(data, teacher_arguments, student_arguments, run, **sections)
    teacher, pairs = Teacher.load(teacher_id), training_pairs(data)
    compressor = ClipMapCompressor.from_pretrained(teacher_id, map_config(student_arguments, run.seed))
    processor, inherited = compressor.processor, compressor.export()
    training_only = dataclasses.replace(data, eval_data=None)  # the report evaluates all models at the end

    def into(name: str) -> RunArguments:
        return dataclasses.replace(run, output_dir=str(output / name))

    mapped = run_mapping(compressor, mapping, into("mapped"), training_only, recipe=recipe, pairs=pairs)
    student = compressor.export()
    distilled = run_distillation(
        student, [teacher], processor, distillation, into("student"), data, recipe=recipe, pairs=pairs
    )
    pairs_seen = mapped.pairs + distilled.pairs  # every student sees as many
    manual, scratch = (dataclasses.replace(one, steps=pairs_seen // one.batch_size) for one in (manual, scratch))
    manual_run = run_distillation(inherited, [teacher], processor, manual, into("manual"), training_only, pairs=pairs)
    set_seed(run.seed)
    fresh = CLIPModel(student.config)
    stage = ContrastiveStage(fresh, scratch.logit_scale, scratch.learn_logit_scale)
    scratch_run = run_stage(stage, scratch, into("scratch"), training_only, processor, name="scratch", pairs=pairs)

    contestants = {
        "teacher": Contestant(teacher.model),
        "CLIP-Map": Contestant(student, pairs_seen, mapped.seconds + distilled.seconds),
        "manual inheritance + distillation": Contestant(inherited, manual_run.pairs, manual_run.seconds),
        "from scratch": Contestant(fresh, scratch_run.pairs, scratch_run.seconds),
    }
    print(write_report(output, contestants, data, processor))


if __name__ == "__main__":
    main()

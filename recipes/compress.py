r"""
All of it: make a smaller CLIP of a teacher, map it if asked, distill it, evaluate it, write it.

    python recipes/compress.py --teacher openai/clip-vit-base-patch16 --student small --train_data 'shards/*.tar' \
        --image_column jpg --caption_column txt --eval_data test.parquet --output_dir small
    accelerate launch recipes/compress.py --config recipes/configs/small.yaml --train_data … --output_dir small

Within a budget, `--student params=30M` (or macs=2G, bytes=100M, latency_ms=20 batch_size=8 device=cpu), the shape is
searched, explained, and kept in `choice.json`.

The student starts from the teacher's activations on `--calibration_pairs` of the training pairs, if `--initializer`
does not say otherwise; that start, a student too, is kept in `start/` inside the output folder. It is mapped only if
`--mapping_steps` or `--mapping_epochs` say so: in our trials that made such a start worse. The mapped student and its
map lie in `mapped/`. A student that starts by `diagonal` and is not mapped is TinyCLIP's manual inheritance.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from clipmap_hf.training.arguments import (
    CalibrationArguments,
    DataArguments,
    DistillationArguments,
    MappingArguments,
    RunArguments,
    StudentArguments,
    TeacherArguments,
    TeacherCacheArguments,
)
from clipmap_hf.training.parsing import arguments_yaml, parse_arguments


@dataclass
class OptionalMappingArguments(MappingArguments):
    epochs: float = field(default=0.0, metadata={"help": "Passes over the training data; by default none."})


def main() -> None:
    data, teacher, cache, student, calibration, run, mapping, distillation = parse_arguments(
        DataArguments,
        TeacherArguments,
        TeacherCacheArguments,
        StudentArguments,
        CalibrationArguments,
        RunArguments,
        stages={"mapping": OptionalMappingArguments, "distillation": DistillationArguments},
        description=__doc__,
    )
    from clipmap_hf.distributed import join_processes
    from clipmap_hf.runs import run_distillation, run_mapping
    from clipmap_hf.starts import start_compressor
    from clipmap_hf.teachers import Teacher
    from clipmap_hf.training.setup import map_config

    processes = join_processes()
    compressor = start_compressor(*teacher.teachers[0], map_config(student, run.seed), calibration, run, data)
    processes.print(compressor.cost())
    mapped = dataclasses.replace(run, output_dir=str(Path(run.output_dir) / "mapped"))
    recipe = arguments_yaml(
        data, teacher, cache, student, calibration, run, mapping=mapping, distillation=distillation
    )
    run_mapping(compressor, mapping, mapped, data, recipe=recipe)
    model, processor = compressor.export(), compressor.processor
    # The first is the map's, if one was gone on with.
    teachers = [(compressor.teacher_id, compressor.teacher_revision), *teacher.teachers[1:]]
    del compressor  # the operators are on disk, and larger than both models
    result = run_distillation(
        model,
        [Teacher.load(*one, backend=data.image_backend) for one in teachers],
        processor,
        distillation,
        run,
        data,
        cache=cache,
        recipe=recipe,
    )
    processes.print("\n".join(f"{name}: {value:.4f}" for name, value in result.metrics.items()))


if __name__ == "__main__":
    main()

r"""
The mapping stage alone: learns operators that map a teacher's weights into a smaller CLIP, and writes the student
with its map. They start from the teacher's activations on `--calibration_pairs` of the training pairs, unless
`--initializer` says otherwise. Without a size, goes on with the map in the folder that `--teacher` names.

    python recipes/map.py --teacher openai/clip-vit-base-patch16 --student small --train_data 'shards/*.tar' \
        --image_column jpg --caption_column txt --output_dir mapped
    accelerate launch recipes/map.py --config recipes/configs/small.yaml --train_data … --output_dir mapped
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
    data, teacher, student, calibration, run, mapping = parse_arguments(
        DataArguments,
        TeacherArguments,
        StudentArguments,
        CalibrationArguments,
        RunArguments,
        stages={"mapping": MappingArguments},
        others=(TeacherCacheArguments,),
        other_stages={"distillation": DistillationArguments, "masking": MaskingArguments},
        description=__doc__,
    )
    from clipmap_hf.distributed import join_processes
    from clipmap_hf.runs import run_mapping
    from clipmap_hf.starts import start_compressor
    from clipmap_hf.training.setup import map_config

    processes = join_processes()
    compressor = start_compressor(*teacher.teachers[0], map_config(student, run.seed), calibration, run, data)
    processes.print(compressor.cost())
    run_mapping(
        compressor,
        mapping,
        run,
        data,
        recipe=arguments_yaml(data, teacher, student, calibration, run, mapping=mapping),
    )


if __name__ == "__main__":
    main()

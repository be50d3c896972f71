r"""
Learns operators that map a teacher's weights into a smaller CLIP: the mapping stage alone.

The student is written with its map. Operators start from the teacher's activations on `--calibration_pairs` of the
training pairs, unless `--initializer` says otherwise. Without a size, mapping goes on with the map in the folder that
`--teacher` names.

    python recipes/map.py --teacher openai/clip-vit-base-patch16 --student small --train_data 'shards/*.tar' \
        --image_column jpg --caption_column txt --output_dir mapped
    accelerate launch recipes/map.py --config recipes/configs/small.yaml --train_data … --output_dir mapped
"""

from clipmap_hf.cli.arguments import StudentArguments, TeacherArguments
from clipmap_hf.cli.parsing import arguments_yaml
from clipmap_hf.cli.recipes import parse_recipe
from clipmap_hf.data.arguments import CalibrationArguments, DataArguments
from clipmap_hf.training.arguments import MappingStageArguments
from clipmap_hf.training.run_arguments import RunArguments


def main() -> None:
    data, teacher, student, calibration, run, mapping = parse_recipe(
        DataArguments,
        TeacherArguments,
        StudentArguments,
        CalibrationArguments,
        RunArguments,
        stages={"mapping": MappingStageArguments},
        description=__doc__,
    )
    from clipmap_hf.cli.student import map_config
    from clipmap_hf.cli.summary import print_summary
    from clipmap_hf.distributed import join_processes
    from clipmap_hf.pipeline.context import RunContext
    from clipmap_hf.pipeline.mapping import map_model

    join_processes()
    result = map_model(
        teacher.teachers[0],
        map_config(student, run.seed),
        RunContext(run, data, arguments_yaml(data, teacher, student, calibration, run, mapping=mapping)),
        calibration=calibration,
        mapping=mapping,
    )
    print_summary(run.output_dir, result)


if __name__ == "__main__":
    main()

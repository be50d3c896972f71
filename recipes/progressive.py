r"""
Compression in several steps, each from what the last one left: made smaller by any method, and distilled from the
original teacher throughout (TinyCLIP's multi-stage inheritance, 100 → 50 → 25 → 10 %).

    python recipes/progressive.py --teacher openai/clip-vit-base-patch16 --sizes base small tiny \
        --train_data 'shards/*.tar' --image_column jpg --caption_column txt --output_dir tiny

A size is a preset, or options like `vision_hidden_size=384,text_num_hidden_layers=6`; what it leaves out stays as
large as it is. In YAML, `sizes:` is a list of presets and mappings. All other options are those of
recipes/compress.py and hold for each step; `--masking_steps` selects by learned masks (TinyCLIP's automatic
inheritance). What steps leave lies in `1/`, `2/`, … inside the output folder, the last of it in the folder itself; a
run that was stopped goes on where it was. Each step draws pairs with a seed of its own, so a teacher cache has a
folder for each.
"""

from dataclasses import dataclass, field

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
from clipmap_hf.training.parsing import arguments_yaml, optional, parse_arguments


@dataclass
class SizesArguments:
    sizes: list[str] = field(metadata={"help": "The sizes to go through: presets, or option=value,option=value."})


def main() -> None:
    sizes, data, teacher, cache, student, calibration, run, masking, mapping, distillation = parse_arguments(
        SizesArguments,
        DataArguments,
        TeacherArguments,
        TeacherCacheArguments,
        StudentArguments,
        CalibrationArguments,
        RunArguments,
        stages={
            "masking": optional(MaskingArguments),
            "mapping": optional(MappingArguments),
            "distillation": DistillationArguments,
        },
        description=__doc__,
    )
    from clipmap_hf.compression import compress_in_steps
    from clipmap_hf.distributed import join_processes
    from clipmap_hf.training.setup import map_config, sized

    stages = {"masking": masking, "mapping": mapping, "distillation": distillation}
    result = compress_in_steps(
        teacher.teachers[0],
        teacher.teachers,
        [map_config(sized(student, size), run.seed) for size in sizes.sizes],
        run,
        data,
        calibration=calibration,
        cache=cache,
        recipe=arguments_yaml(sizes, data, teacher, cache, student, calibration, run, **stages),
        **stages,
    )
    join_processes().print("\n".join(f"{name}: {value:.4f}" for name, value in result.metrics.items()))


if __name__ == "__main__":
    main()

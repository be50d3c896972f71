r"""
Compresses a teacher in several steps, each of which makes a smaller student and distills it.

Each step begins with the last one's student, by any method. All are distilled from the original teacher (TinyCLIP's
multi-stage inheritance, 100 → 50 → 25 → 10 %).

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

from clipmap_hf.cli.parsing import arguments_yaml
from clipmap_hf.cli.recipes import COMPRESSION_STAGES, SHARED, parse_recipe


@dataclass
class SizesArguments:
    sizes: list[str] = field(metadata={"help": "The sizes to go through: presets, or option=value,option=value."})


def main() -> None:
    sizes, data, teacher, cache, student, calibration, run, masking, mapping, distillation = parse_recipe(
        SizesArguments,
        *SHARED,
        stages=COMPRESSION_STAGES,
        description=__doc__,
    )
    from clipmap_hf.cli.student import map_config, with_size
    from clipmap_hf.cli.summary import print_summary
    from clipmap_hf.pipeline.compression import CompressionArguments, compress_in_steps
    from clipmap_hf.pipeline.context import RunContext

    stages = {"masking": masking, "mapping": mapping, "distillation": distillation}
    result = compress_in_steps(
        teacher.teachers[0],
        teacher.teachers,
        [map_config(with_size(student, size), run.seed) for size in sizes.sizes],
        RunContext(run, data, arguments_yaml(sizes, data, teacher, cache, student, calibration, run, **stages), cache),
        CompressionArguments(calibration=calibration, **stages),
    )
    print_summary(run.output_dir, result)


if __name__ == "__main__":
    main()

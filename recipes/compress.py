r"""
Makes a smaller CLIP of a teacher, from beginning to end: start, distillation, evaluation.

    python recipes/compress.py --teacher openai/clip-vit-base-patch16 --student small --train_data 'shards/*.tar' \
        --image_column jpg --caption_column txt --eval_data test.parquet --output_dir small
    accelerate launch recipes/compress.py --config recipes/configs/small.yaml --train_data … --output_dir small

Within a budget, `--student params=30M` (or macs=2G, bytes=100M, latency_ms=20 batch_size=8 device=cpu), the shape is
searched, explained, and kept in `choice.json`.

The student starts from the teacher's activations on `--calibration_pairs` of the training pairs, if `--initializer`
does not say otherwise; that start is kept in `start/` inside the output folder until the run is finished. The student
is mapped only if `--mapping_steps` or `--mapping_epochs` say so: in our trials that made such a start worse. The
mapped student and its map lie in `mapped/`. A student that starts by `diagonal` and is not mapped is TinyCLIP's manual
inheritance; with `--masking_steps` or `--masking_epochs`, learned masks select it (the automatic one).

With `--labels queries.txt`, the student is a vision tower alone, for the texts of that list; images need no captions.
"""

from clipmap_hf.cli.parsing import arguments_yaml
from clipmap_hf.cli.recipes import COMPRESSION_STAGES, SHARED, parse_recipe
from clipmap_hf.data.labels import LabelArguments


def main() -> None:
    data, teacher, cache, student, calibration, run, labels, masking, mapping, distillation = parse_recipe(
        *SHARED,
        LabelArguments,
        stages=COMPRESSION_STAGES,
        description=__doc__,
    )
    from clipmap_hf.cli.student import map_config
    from clipmap_hf.cli.summary import print_summary
    from clipmap_hf.pipeline.compression import CompressionArguments, compress_in_run
    from clipmap_hf.pipeline.context import RunContext
    from clipmap_hf.pipeline.labels import arguments_for_labels

    distillation = distillation if labels.labels is None else arguments_for_labels(distillation)
    stages = {"masking": masking, "mapping": mapping, "distillation": distillation}
    recipe = arguments_yaml(data, teacher, cache, student, calibration, run, labels, **stages)
    result = compress_in_run(
        teacher.teachers[0],
        teacher.teachers,
        map_config(student, run.seed),
        RunContext(run, data, recipe, cache, labels=labels.loaded),
        CompressionArguments(calibration=calibration, **stages),
    )
    print_summary(run.output_dir, result)


if __name__ == "__main__":
    main()

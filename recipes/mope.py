r"""
Module-wise pruning errors (MoPE-CLIP): how much worse a model retrieves without each of its heads, each group of
neurons, and each layer. Writes them to `pruning_errors.json` and prints them as a heat map.

    python recipes/mope.py --teacher openai/clip-vit-base-patch16 --train_data pairs.parquet --output_dir errors

Recall is measured on `--calibration_pairs` of the pairs; every process takes its share of them. To make a student by
such errors, `--initializer mope` of recipes/compress.py measures them itself.
"""

from pathlib import Path

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
from clipmap_hf.training.parsing import parse_arguments


def main() -> None:
    data, teacher, calibration, run = parse_arguments(
        DataArguments,
        TeacherArguments,
        CalibrationArguments,
        RunArguments,
        others=(TeacherCacheArguments, StudentArguments),
        other_stages={
            "masking": MaskingArguments,
            "mapping": MappingArguments,
            "distillation": DistillationArguments,
        },
        description=__doc__,
    )
    from clipmap_hf.atomic import write_json
    from clipmap_hf.distributed import calibration_device, join_processes
    from clipmap_hf.models import load_model
    from clipmap_hf.selection.heat_map import errors_to_dict, heat_map
    from clipmap_hf.selection.mope import mope_errors
    from clipmap_hf.starts import calibration_pairs

    processes, (source, revision) = join_processes(), teacher.teachers[0]
    model = load_model(source, revision=revision).to(calibration_device())
    batches = list(calibration_pairs(source, revision, calibration, run, data))
    errors, _ = mope_errors(model, batches)
    if processes.is_main_process:
        folder = Path(run.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "pruning_errors.json", errors_to_dict(errors))
    processes.print(heat_map(errors))


if __name__ == "__main__":
    main()

r"""
Measures a model's module-wise pruning errors, as MoPE-CLIP defines them.

A pruning error says how much worse the model retrieves without one of its heads, groups of neurons, or layers. They
are written to `pruning_errors.json` and printed as a heat map.

    python recipes/mope.py --teacher openai/clip-vit-base-patch16 --train_data pairs.parquet --output_dir errors

Recall is measured on `--calibration_pairs` of the pairs; every process takes its share of them. To make a student by
such errors, `--initializer mope` of recipes/compress.py measures them itself.
"""

from pathlib import Path

from clipmap_hf.cli.arguments import TeacherArguments
from clipmap_hf.cli.recipes import parse_recipe
from clipmap_hf.data.arguments import CalibrationArguments, DataArguments
from clipmap_hf.training.run_arguments import RunArguments


def main() -> None:
    data, teacher, calibration, run = parse_recipe(
        DataArguments, TeacherArguments, CalibrationArguments, RunArguments, stages={}, description=__doc__
    )
    if not data.paired:
        raise ValueError("Pruning errors are of retrieval; give pairs, without train_images and train_texts.")
    from clipmap_hf.distributed import calibration_device, join_processes
    from clipmap_hf.files.atomic import write_json
    from clipmap_hf.pipeline.context import RunContext
    from clipmap_hf.starts.selection.heat_map import errors_to_dict, heat_map
    from clipmap_hf.starts.selection.mope import mope_errors

    processes, context = join_processes(), RunContext(run, data)
    scored = context.teacher(teacher.teachers[0])
    batches = list(context.calibration_batches(scored, calibration, once=True))
    errors, _ = mope_errors(scored.model.to(calibration_device()), batches)
    if processes.is_main_process:
        folder = Path(run.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "pruning_errors.json", errors_to_dict(errors))
    processes.print(heat_map(errors))


if __name__ == "__main__":
    main()

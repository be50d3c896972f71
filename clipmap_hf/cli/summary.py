"""What a recipe says when it is done: where the result is, how to load it, and how good it is."""

from pathlib import Path

from clipmap_hf.distributed import join_processes
from clipmap_hf.evaluation.agreement import AGREEMENT_METRICS
from clipmap_hf.files.atomic import read_json
from clipmap_hf.training.result import TrainResult


__all__ = ["print_summary"]


def print_summary(output_dir: str | Path, result: TrainResult) -> None:
    """
    Prints, in the main process, the end of a run.

    Args:
        output_dir: The folder of the result.
        result: What came out of the last stage.
    """
    state = join_processes()
    state.wait_for_everyone()  # until everything is written
    if state.is_main_process:
        state.print(_summary(Path(output_dir), result))


def _summary(folder: Path, result: TrainResult) -> str:
    config = read_json(folder / "config.json")
    needs_package = "quantization_config" in config
    lines = [
        f"The result is in {folder} ({result.steps:,} steps, {result.pairs:,} pairs, {result.seconds:.0f} s). "
        "Load it:",
        f"    from transformers import {config['architectures'][0]}",
        *(["    import clipmap_hf  # lets transformers load packed weights"] if needs_package else []),
        f"    model = {config['architectures'][0]}.from_pretrained({str(folder)!r})",
    ]
    teacher = {name: value for name, value in (result.teacher_metrics or {}).items() if name not in AGREEMENT_METRICS}
    for name, value in result.metrics.items():
        beside = f" (teacher {teacher[name]:.4f})" if name in teacher else ""
        lines.append(f"{name}: {value:.4f}{beside}")
    return "\n".join(lines)

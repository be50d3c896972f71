"""Formats a student's results on sets for its card: as a table, as model index, and as `.eval_results/*.yaml`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from clipmap_hf.evaluation.agreement import AGREEMENT_METRICS
from clipmap_hf.files.atomic import read_json
from clipmap_hf.files.tables import markdown_table


__all__ = ["EVAL_RESULTS_FOLDER", "SetResults", "benchmark_files", "model_index", "read_results", "results_table"]

EVAL_RESULTS_FOLDER = ".eval_results"
_SET_SETTINGS = ("set", "files", "names", "templates")  # must be equal for teacher and student


@dataclass(frozen=True)
class SetResults:
    """
    The results of a student on one set, and those of its teacher.

    Args:
        name: Name of the set, as the table shows it.
        student: The student's metrics by name, between 0 and 1. The set's main metric comes first.
        teacher: The teacher's metrics, measured in the same way; `None` if they were not measured.
        dataset_id: Id of the set on the Hub; `None` for a local set.
        revision: Commit of the set on the Hub.
        split: Split of the set that was evaluated.
        task: Task of the evaluation: `image-text-retrieval`, `zero-shot-image-classification`, or
            `image-feature-extraction` for agreement with the teacher.
        benchmark_task: Id of the task for which the Hub lists `dataset_id` as a benchmark; `None` if it does not.
        note: A sentence below the card's table.
    """

    name: str
    student: Mapping[str, float]
    teacher: Mapping[str, float] | None = None
    dataset_id: str | None = None
    revision: str | None = None
    split: str | None = None
    task: str = "image-text-retrieval"
    benchmark_task: str | None = None
    note: str | None = None

    def __post_init__(self):
        if self.benchmark_task is not None and self.dataset_id is None:
            raise ValueError(f"benchmark_task={self.benchmark_task!r} needs a set on the Hub; give its dataset_id.")


def results_table(results: Sequence[SetResults]) -> str:
    """
    Formats results as a Markdown table in percent. It has a row for each metric of each set, and columns for the
    teacher (if it was measured) and the student.
    """
    rows = [(result, metric) for result in results for metric in result.student]
    columns = [
        ["set: metric", *(f"{result.name}: {AGREEMENT_METRICS.get(metric, metric)}" for result, metric in rows)]
    ]
    if any(result.teacher is not None for result in results):
        columns.append(["teacher", *(_percent((result.teacher or {}).get(metric)) for result, metric in rows)])
    columns.append(["student", *(_percent(result.student[metric]) for result, metric in rows)])
    return markdown_table(columns)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def model_index(results: Sequence[SetResults]) -> list[EvalResult]:
    """Converts the student's metrics to the metadata of a card."""
    return [
        EvalResult(
            task_type=result.task,
            dataset_type=result.dataset_id or result.name,
            dataset_name=result.name,
            dataset_split=result.split,
            dataset_revision=result.revision,
            metric_type=metric,
            metric_name=AGREEMENT_METRICS.get(metric),
            metric_value=round(value, 4),
        )
        for result in results
        for metric, value in result.student.items()
    ]


def benchmark_files(results: Sequence[SetResults]) -> dict[str, str]:
    """
    Makes the contents of the files in `.eval_results/`, by the files' names. Each set that is a benchmark on the Hub
    gets a file with its first metric in percent. Other sets get no file.
    """
    files = {}
    for result in results:
        if result.benchmark_task is None:
            continue
        metric, value = next(iter(result.student.items()))
        entry = EvalResultEntry(
            result.dataset_id,
            result.benchmark_task,
            round(100 * value, 2),
            dataset_revision=result.revision,
            notes=f"{metric}, zero-shot",
        )
        name = re.sub(r"[^\w.-]+", "_", f"{result.dataset_id}-{result.benchmark_task}")
        files[f"{name}.yaml"] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def read_results(
    folder: str | Path, teacher: str | Path | None = None, *, weights: str | None = None
) -> list[SetResults]:
    """
    Reads a student's results, as `recipes/evaluate.py --sets` wrote them.

    Args:
        folder: Folder of the student's results, a JSON file for each set.
        teacher: Folder of the teacher's results. Sets that it lacks get no metrics of the teacher.
        weights: The student's `model_fingerprint`, with which the results must agree. By default, it is not checked.

    Raises:
        ValueError: If there are no results, if they were measured with other weights, or if the teacher's were
            measured on other images or prompts.
    """
    student_results = _read_folder(Path(folder))
    teacher_results = {} if teacher is None else _read_folder(Path(teacher))
    results = []
    for name, own in student_results.items():
        other, set_settings = teacher_results.get(name), own["settings"]["set"]
        if weights is not None and own["settings"]["weights"] != weights:
            raise ValueError(f"{name!r} in {folder} was measured with other weights than these; evaluate them again.")
        if other is not None and any(own["settings"][key] != other["settings"][key] for key in _SET_SETTINGS):
            raise ValueError(f"{name!r} was measured on other images or prompts in {folder} than in {teacher}.")
        results.append(
            SetResults(
                name,
                {metric: own["metrics"][metric] for metric in own["reported"]},
                None if other is None else {metric: other["metrics"][metric] for metric in own["reported"]},
                set_settings["hub_id"],
                own["commit"],
                set_settings["split"],
                "image-text-retrieval" if set_settings["task"] == "retrieval" else "zero-shot-image-classification",
            )
        )
    return results


def _read_folder(folder: Path) -> dict[str, dict[str, Any]]:
    found = {path.stem: read_json(path) for path in sorted(folder.glob("*.json")) if path.stem != "summary"}
    if not found:
        raise ValueError(
            f"{folder} holds no results of sets; give a folder that `recipes/evaluate.py --sets … --output` wrote."
        )
    return found

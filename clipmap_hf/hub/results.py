"""What a student reached on a set, in the forms of a card: a table, the model index and `.eval_results/*.yaml`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from clipmap_hf.files.atomic import read_json
from clipmap_hf.files.tables import markdown_table


__all__ = ["EVAL_RESULTS_FOLDER", "SetResults", "benchmark_files", "model_index", "read_results", "results_table"]

EVAL_RESULTS_FOLDER = ".eval_results"
_OF_SET = ("set", "files", "names", "templates")  # the settings that teacher and student must share


@dataclass(frozen=True)
class SetResults:
    """
    What a student reached on one set, beside its teacher.

    Args:
        name: The set's, as the table shows it.
        student: Metrics between 0 and 1 by name, the one that the set is known for first.
        teacher: The teacher's, measured in the same way; `None` if they were not.
        dataset_id: The set's id on the Hub, if it lies there.
        revision: Its commit there.
        split: Which part of it was read.
        task: What was measured: `image-text-retrieval` or `zero-shot-image-classification`.
        benchmark_task: The task id under which the Hub lists `dataset_id` as a benchmark, if it does.
    """

    name: str
    student: Mapping[str, float]
    teacher: Mapping[str, float] | None = None
    dataset_id: str | None = None
    revision: str | None = None
    split: str | None = None
    task: str = "image-text-retrieval"
    benchmark_task: str | None = None

    def __post_init__(self):
        if self.benchmark_task is not None and self.dataset_id is None:
            raise ValueError(
                f"benchmark_task={self.benchmark_task!r} is one of a set on the Hub; give its dataset_id."
            )


def results_table(results: Sequence[SetResults]) -> str:
    """A Markdown table in percent, a row for each metric of each set, the teacher beside the student."""
    rows = [(one, metric) for one in results for metric in one.student]
    columns = [["set: metric", *(f"{one.name}: {metric}" for one, metric in rows)]]
    if any(one.teacher is not None for one in results):
        columns.append(["teacher", *(_percent((one.teacher or {}).get(metric)) for one, metric in rows)])
    columns.append(["student", *(_percent(one.student[metric]) for one, metric in rows)])
    return markdown_table(columns)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def model_index(results: Sequence[SetResults]) -> list[EvalResult]:
    """The student's metrics as the metadata of a card holds them."""
    return [
        EvalResult(
            task_type=one.task,
            dataset_type=one.dataset_id or one.name,
            dataset_name=one.name,
            dataset_split=one.split,
            dataset_revision=one.revision,
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for one in results
        for metric, value in one.student.items()
    ]


def benchmark_files(results: Sequence[SetResults]) -> dict[str, str]:
    """
    The files of `.eval_results/` by name: one, with the first metric in percent, for each set that is a benchmark on
    the Hub. The others have no place there.
    """
    files = {}
    for one in results:
        if one.benchmark_task is None:
            continue
        metric, value = next(iter(one.student.items()))
        entry = EvalResultEntry(
            one.dataset_id,
            one.benchmark_task,
            round(100 * value, 2),
            dataset_revision=one.revision,
            notes=f"{metric}, zero-shot",
        )
        name = re.sub(r"[^\w.-]+", "_", f"{one.dataset_id}-{one.benchmark_task}")
        files[f"{name}.yaml"] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def read_results(
    folder: str | Path, teacher: str | Path | None = None, *, weights: str | None = None
) -> list[SetResults]:
    """
    What `recipes/evaluate.py --sets` wrote about a student.

    Args:
        folder: Holds a JSON file for each set.
        teacher: The same of the teacher; sets that it lacks are shown without.
        weights: The `model_fingerprint` of the student, if it is to be checked.

    Raises:
        ValueError: If there is no result, it is one of other weights, or the teacher's is of other images or prompts.
    """
    students = _by_set(Path(folder))
    teachers = {} if teacher is None else _by_set(Path(teacher))
    results = []
    for name, one in students.items():
        other, of_set = teachers.get(name), one["settings"]["set"]
        if weights is not None and one["settings"]["weights"] != weights:
            raise ValueError(f"{name!r} in {folder} was measured with other weights than these; evaluate them again.")
        if other is not None and any(one["settings"][key] != other["settings"][key] for key in _OF_SET):
            raise ValueError(f"{name!r} was measured on other images or prompts in {folder} than in {teacher}.")
        results.append(
            SetResults(
                name,
                {metric: one["metrics"][metric] for metric in one["reported"]},
                None if other is None else {metric: other["metrics"][metric] for metric in one["reported"]},
                of_set["hub_id"],
                one["commit"],
                of_set["split"],
                "image-text-retrieval" if of_set["task"] == "retrieval" else "zero-shot-image-classification",
            )
        )
    return results


def _by_set(folder: Path) -> dict[str, dict[str, Any]]:
    found = {path.stem: read_json(path) for path in sorted(folder.glob("*.json")) if path.stem != "summary"}
    if not found:
        raise ValueError(
            f"{folder} holds no results of sets; name what `recipes/evaluate.py --sets … --output` wrote."
        )
    return found

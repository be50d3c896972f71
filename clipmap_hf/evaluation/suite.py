"""Evaluates a model on many sets; each result is kept in a JSON file and is not computed again."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import PIL
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save
from torch.utils.data import DataLoader, Subset
from transformers import CLIPProcessor, PreTrainedModel

import clipmap_hf
from clipmap_hf.data.collate import PairCollator, decoded
from clipmap_hf.data.loader import start_worker
from clipmap_hf.data.preprocess import preprocessed
from clipmap_hf.distributed import join_processes, process_count, process_index
from clipmap_hf.evaluation.average_precision import mean_average_precision
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.evaluation.set_files import SetFiles, SetRows, find_set
from clipmap_hf.evaluation.sets import EvalSet
from clipmap_hf.evaluation.zero_shot import zero_shot_classifier, zero_shot_logits, zero_shot_metrics
from clipmap_hf.files.atomic import read_json, write_atomically, write_json
from clipmap_hf.files.differences import differences
from clipmap_hf.files.tables import markdown_table
from clipmap_hf.models.fingerprints import config_values, model_fingerprint, tokenizer_fingerprint


__all__ = ["evaluate_sets", "summary_table"]

# The settings that class embeddings depend on.
_CLASSIFIER_SETTINGS = ("weights", "config", "tokenizer", "model_max_length", "names", "templates")


def evaluate_sets(
    model: PreTrainedModel,
    processor: CLIPProcessor,
    sets: Mapping[str, EvalSet],
    output: str | Path,
    *,
    model_id: str,
    revision: str | None = None,
    sets_dir: str | Path | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
) -> dict[str, dict[str, Any]]:
    """
    Evaluates a model on several sets. The result of each set is written to `<name>.json`. The metrics of all sets are
    written to `summary.json` and, as a table, to `summary.md`. A set is not evaluated again if its file exists.
    Several processes share the images of a set. Nothing is drawn at random.

    Args:
        model: A `CLIPModel`. It runs in eval mode on its own device.
        processor: The model's tokenizer and image processor.
        sets: The sets by name: `EVAL_SETS`, some of its entries, or other sets of the same layout.
        output: Folder for the results and the class embeddings.
        model_id: Name of the model in the results: its Hub id or folder.
        revision: Branch, tag or commit of the model that was requested from the Hub.
        sets_dir: Folder of local sets. By default, sets come from the Hub.
        batch_size: Images, or prompts, to encode at a time.
        num_workers: Worker processes that decode images.

    Returns:
        The result of each set, by its name. `metrics` are between 0 and 1.

    Raises:
        ValueError: If a file of a set is missing or unreadable, or if an existing result was made with other settings,
            which the message names.
    """
    state, output, results = join_processes(), Path(output), {}
    model_settings = _model_settings(model, processor)
    for name, eval_set in sets.items():
        with state.main_process_first():  # so that only one process downloads
            files = find_set(eval_set, sets_dir)
        settings = model_settings | _set_settings(eval_set, files)
        path = output / f"{name}.json"
        if path.is_file():
            results[name] = _read_result(path, settings)
            continue
        metrics, images = _measure(model, processor, eval_set, files, output, settings, batch_size, num_workers)
        results[name] = {
            "metrics": metrics,
            "reported": list(eval_set.metrics),
            "images": images,
            "classes": len(files.names),
            "license": eval_set.license,
            "commit": files.commit,
            "model": {"id": model_id, "revision": revision, "commit": getattr(model.config, "_commit_hash", None)},
            "settings": settings,
            "versions": _versions(),
            "processes": process_count(),
            "seed": None,
        }
        if state.is_main_process:
            write_json(path, results[name])
    if state.is_main_process:
        write_json(output / "summary.json", {name: result["metrics"] for name, result in results.items()})
        write_atomically(output / "summary.md", (summary_table(results) + "\n").encode())
    return results


def summary_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Formats the results of `evaluate_sets` as a Markdown table, in percent."""
    columns = [["set"], ["images"], ["classes"], ["metric"], ["%"]]
    for name, result in results.items():
        reported = result["reported"]
        scores = " / ".join(f"{100 * result['metrics'][metric]:.1f}" for metric in reported)
        row = [name, f"{result['images']:,}", str(result["classes"] or ""), " / ".join(reported), scores]
        for column, cell in zip(columns, row, strict=True):
            column.append(cell)
    return markdown_table(columns)


def _model_settings(model: PreTrainedModel, processor: CLIPProcessor) -> dict[str, Any]:
    """Collects everything about a model and its preprocessing that affects a result, as plain JSON values."""
    settings = {
        "weights": model_fingerprint(model),
        "config": config_values(model.config),
        "tokenizer": tokenizer_fingerprint(processor.tokenizer),
        "model_max_length": processor.tokenizer.model_max_length,
        "image_backend": processor.image_processor.backend,
        "image_processor": processor.image_processor.to_dict(),
    }
    if backends := sorted({module.backend for module in model.modules() if hasattr(module, "backend")}):
        settings["backends"] = backends  # of packed weights: some are exact, others are faster
    return json.loads(json.dumps(settings))


def _set_settings(eval_set: EvalSet, files: SetFiles) -> dict[str, Any]:
    """Collects everything about a set that affects a result."""
    return {
        "set": {name: getattr(eval_set, name) for name in ("hub_id", "revision", "split", "task")},
        "files": {path.name: path.stat().st_size for path in files.shards},
        "names": _digest(files.names),
        "templates": _digest(files.templates),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_result(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a result, and raises a `ValueError` if it was made with other settings."""
    result = read_json(path)
    changed = differences(result["settings"], settings)
    if changed:
        words = "; ".join(f"{name} was {before}, is {now}" for name, (before, now) in list(changed.items())[:5])
        raise ValueError(
            f"'{path}' holds a result of other settings: {words}. Name another output folder, or remove the file."
        )
    return result


def _measure(
    model: PreTrainedModel,
    processor: CLIPProcessor,
    eval_set: EvalSet,
    files: SetFiles,
    output: Path,
    settings: Mapping[str, Any],
    batch_size: int,
    num_workers: int,
) -> tuple[dict[str, float], int]:
    """Measures a model on a set, and returns the metrics and the number of images of all processes."""
    rows = SetRows(eval_set, files)
    if len(rows) < process_count():
        raise ValueError(f"{eval_set.hub_id!r} has {len(rows)} rows, fewer than the {process_count()} processes.")
    bounds = [len(rows) * rank // process_count() for rank in (process_index(), process_index() + 1)]
    is_retrieval = eval_set.task == "retrieval"
    batches = DataLoader(
        Subset(rows, range(*bounds)),
        batch_size,
        collate_fn=PairCollator(processor.tokenizer, processor.image_processor, ("label",))
        if is_retrieval
        else _LabeledCollator(processor.image_processor),
        num_workers=num_workers,
        worker_init_fn=start_worker,
    )
    if is_retrieval:
        return evaluate_retrieval(model, batches), len(rows)
    classifier = _load_classifier(model, processor, files, output / "classifiers", settings, batch_size)
    logits, labels = zero_shot_logits(model, batches, classifier)
    for index, name in enumerate(files.names):
        if (first := files.names.index(name)) < index:  # two ImageNet classes share a name: the first wins a tie
            logits[:, index] = torch.nextafter(logits[:, first], torch.tensor(-torch.inf))
    if eval_set.task == "multilabel":
        return {"map_11_point": mean_average_precision(logits, labels)}, len(rows)
    return zero_shot_metrics(logits, labels), len(rows)


@dataclass
class _LabeledCollator:
    """Turns rows of `SetRows` into `pixel_values` and `labels`."""

    image_processor: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        images = [decoded(row)[1] for row in rows]
        pixels = preprocessed(self.image_processor, images)
        return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}


def _load_classifier(
    model: PreTrainedModel,
    processor: CLIPProcessor,
    files: SetFiles,
    folder: Path,
    settings: Mapping[str, Any],
    batch_size: int,
) -> torch.Tensor:
    """Returns the class embeddings from a file, whose name is a hash of their settings; makes it if it is missing."""
    path = folder / f"{_digest([settings[name] for name in _CLASSIFIER_SETTINGS])}.safetensors"
    if path.is_file():
        return load_file(path)["classifier"]
    classifier = zero_shot_classifier(model, processor.tokenizer, files.names, files.templates, batch_size)
    if process_index() == 0:
        write_atomically(path, save({"classifier": classifier}))
    return classifier


def _versions() -> dict[str, str]:
    modules = (clipmap_hf, transformers, tokenizers, torch, numpy, PIL)
    return {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules}

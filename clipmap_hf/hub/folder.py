"""The student folder: config, weights, tokenizer, processor and card; loadable without clipmap_hf."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import CLIPProcessor, PreTrainedModel

from clipmap_hf.export.onnx import ONNX_FOLDER
from clipmap_hf.files.atomic import atomic_files, write_atomically
from clipmap_hf.hub.card import add_to_card
from clipmap_hf.hub.results import EVAL_RESULTS_FOLDER, SetResults, benchmark_files


__all__ = ["MAP_CONFIG", "MAP_FOLDER", "add_results", "write_student_folder"]

MAP_FOLDER, MAP_CONFIG = "map", "clipmap_config.json"


def write_student_folder(
    folder: str | Path,
    student: PreTrainedModel,
    processor: CLIPProcessor,
    card: ModelCard,
    results: Sequence[SetResults] = (),
    keep_map: bool = False,
) -> None:
    """
    Writes all files of a student into `folder`, which is made if needed. What lies there of other weights, benchmark
    results, ONNX files and, unless `keep_map`, the map, is removed.

    Args:
        folder: Where to.
        student: The model.
        processor: Its tokenizer and image processor.
        card: What `render_card` gives.
        results: Those of the card; benchmarks among them get a file in `.eval_results/`.
        keep_map: Leave `map/` alone.
    """
    folder, benchmarks = Path(folder), benchmark_files(results)
    with atomic_files(folder) as temporary:
        student.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        card.save(temporary / "README.md")
        for name, content in benchmarks.items():
            (temporary / EVAL_RESULTS_FOLDER).mkdir(exist_ok=True)
            (temporary / EVAL_RESULTS_FOLDER / name).write_text(content, encoding="utf-8")
    for path in (folder / EVAL_RESULTS_FOLDER).glob("*.yaml"):
        if path.name not in benchmarks:
            path.unlink()
    if not keep_map and (folder / MAP_FOLDER / MAP_CONFIG).exists():
        shutil.rmtree(folder / MAP_FOLDER)
    if (folder / ONNX_FOLDER / "model.onnx").exists():
        shutil.rmtree(folder / ONNX_FOLDER)


def add_results(folder: str | Path, results: Sequence[SetResults]) -> None:
    """
    Puts what a student reached on sets, after it was made, into its folder: into the card and, of benchmarks on the
    Hub, into `.eval_results/`.

    Args:
        folder: A student's.
        results: What was measured, such as `read_results` gives.
    """
    folder = Path(folder)
    card = ModelCard.load(folder / "README.md")
    add_to_card(card, results)
    for name, content in benchmark_files(results).items():
        write_atomically(folder / EVAL_RESULTS_FOLDER / name, content.encode())
    write_atomically(folder / "README.md", str(card).encode())

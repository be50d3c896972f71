"""Writes a student's folder, which loads without clipmap_hf: config, weights, tokenizer, processor; then its card."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import BaseImageProcessor, CLIPProcessor, PreTrainedModel

from clipmap_hf.export.onnx import ONNX_FOLDER
from clipmap_hf.files.atomic import atomic_files, write_atomically
from clipmap_hf.hub.card import add_to_card
from clipmap_hf.hub.results import EVAL_RESULTS_FOLDER, SetResults, benchmark_files
from clipmap_hf.models.finite import check_finite
from clipmap_hf.models.label_model import LABELS_FILE, TEXT_EMBEDS_FILE


__all__ = ["MAP_CONFIG", "MAP_FOLDER", "add_results", "write_card", "write_label_folder", "write_student_folder"]

MAP_FOLDER = "map"
MAP_CONFIG = "clipmap_config.json"


def write_student_folder(
    folder: str | Path,
    student: PreTrainedModel,
    processor: CLIPProcessor,
    keep_map: bool = False,
) -> None:
    """
    Writes a student into a folder, without a card, so that no card can keep the weights from being written. Files
    there that belong to other weights are removed: card, benchmark results, ONNX files, a list of labels and, unless
    `keep_map` is set, the map.

    Args:
        folder: Folder to write to. It is created if needed.
        student: The model.
        processor: The model's tokenizer and image processor.
        keep_map: Whether to keep `map/`.

    Raises:
        ValueError: If a weight is NaN or infinite. Nothing is written then.
    """
    check_finite(student.state_dict(), f"The student for {str(folder)!r}")
    folder = Path(folder)
    with atomic_files(folder) as temporary:
        student.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    others = [folder / name for name in ("README.md", LABELS_FILE, TEXT_EMBEDS_FILE)]
    for path in [*others, *(folder / EVAL_RESULTS_FOLDER).glob("*.yaml")]:
        path.unlink(missing_ok=True)
    if not keep_map and (folder / MAP_FOLDER / MAP_CONFIG).exists():
        shutil.rmtree(folder / MAP_FOLDER)
    if (folder / ONNX_FOLDER / "model.onnx").exists():
        shutil.rmtree(folder / ONNX_FOLDER)


def write_label_folder(
    folder: str | Path,
    tower: PreTrainedModel,
    image_processor: BaseImageProcessor,
    labels: Sequence[str],
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
) -> None:
    """
    Writes a student for a fixed list of texts into a folder, as `write_student_folder` writes others: the vision tower
    and its image processor, the list in `labels.json`, and what images are compared with in `text_embeds.safetensors`.

    Args:
        folder: Folder to write to. It is created if needed.
        tower: The vision tower.
        image_processor: Its image processor.
        labels: The list.
        text_embeds: Normalized text embeddings of the list `(texts, dim)`.
        logit_scale: Reciprocal temperature of the similarities, a scalar.

    Raises:
        ValueError: If a weight is NaN or infinite. Nothing is written then.
    """
    write_student_folder(folder, tower, image_processor)
    with atomic_files(Path(folder)) as temporary:
        lines = json.dumps(list(labels), indent=0, ensure_ascii=False)  # for people to read
        (temporary / LABELS_FILE).write_text(lines + "\n", encoding="utf-8")
        tensors = {"text_embeds": text_embeds, "logit_scale": logit_scale}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, temporary / TEXT_EMBEDS_FILE)


def write_card(folder: str | Path, card: ModelCard, results: Sequence[SetResults] = ()) -> None:
    """
    Writes the card of the student in a folder.

    Args:
        folder: The student's folder.
        card: A card from `render_card`.
        results: The results that the card shows. Those on benchmarks get a file in `.eval_results/`.
    """
    with atomic_files(Path(folder)) as temporary:
        card.save(temporary / "README.md")
        for name, content in benchmark_files(results).items():
            (temporary / EVAL_RESULTS_FOLDER).mkdir(exist_ok=True)
            (temporary / EVAL_RESULTS_FOLDER / name).write_text(content, encoding="utf-8")


def add_results(folder: str | Path, results: Sequence[SetResults]) -> None:
    """
    Adds results on sets to a student's folder: to its card and, for benchmarks on the Hub, to `.eval_results/`.

    Args:
        folder: The student's folder.
        results: The student's results, such as those from `read_results`.
    """
    folder = Path(folder)
    card = ModelCard.load(folder / "README.md")
    add_to_card(card, results)
    for name, content in benchmark_files(results).items():
        write_atomically(folder / EVAL_RESULTS_FOLDER / name, content.encode())
    write_atomically(folder / "README.md", str(card).encode())

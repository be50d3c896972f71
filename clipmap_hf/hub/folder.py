"""The student folder: config, weights, tokenizer, processor and card; loadable without clipmap_hf."""

import shutil
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import CLIPProcessor, PreTrainedModel

from clipmap_hf.atomic import atomic_files


__all__ = ["MAP_CONFIG", "MAP_FOLDER", "ONNX_FOLDER", "write_student_folder"]

MAP_FOLDER, MAP_CONFIG = "map", "clipmap_config.json"
ONNX_FOLDER = "onnx"


def write_student_folder(
    folder: str | Path, student: PreTrainedModel, processor: CLIPProcessor, card: ModelCard, keep_map: bool = False
) -> None:
    """
    Writes all files of a student into `folder`, which is made if needed. What lies there of other weights is removed:
    ONNX files, and, unless `keep_map`, a map.
    """
    folder = Path(folder)
    with atomic_files(folder) as temporary:
        student.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        card.save(temporary / "README.md")
    if not keep_map and (folder / MAP_FOLDER / MAP_CONFIG).exists():
        shutil.rmtree(folder / MAP_FOLDER)
    if (folder / ONNX_FOLDER / "model.onnx").exists():
        shutil.rmtree(folder / ONNX_FOLDER)

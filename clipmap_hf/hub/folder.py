"""The student folder: config, weights, tokenizer, processor and card; loadable without clipmap_hf."""

from pathlib import Path

from huggingface_hub import ModelCard
from transformers import CLIPProcessor, PreTrainedModel


__all__ = ["write_student_folder"]


def write_student_folder(
    folder: str | Path, student: PreTrainedModel, processor: CLIPProcessor, card: ModelCard
) -> None:
    """Writes all files of a student into `folder`, which is made if needed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    student.save_pretrained(folder)
    processor.save_pretrained(folder)
    card.save(folder / "README.md")

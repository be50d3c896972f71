"""
Students for a fixed list of texts: the vision tower of a tenth of the embedded teacher, trained on some of the
embedded images with the list of all their captions, and tested on a style that no model was trained on.

    python recipes/benchmarks/labels.py --output_dir labels                # 500 images, 32,000 views seen
    python recipes/benchmarks/labels.py --output_dir labels --half         # the list is half of the captions

Prints in percent: recall, image to text / text to image, of all test pairs, of those whose captions are in the list,
and of the others, all read by the teacher's text tower; and for how many test images the student chooses the same text
of the list as its teacher. After an interruption, the same command goes on.
"""

import argparse
from pathlib import Path

import datasets
import torch
from transformers.utils import logging

from clipmap_hf import ClipMapConfig, DistillationArguments, TowerConfig, compress, evaluate_retrieval
from clipmap_hf.data.labels import load_labels
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.demo import TEACHER, TEST_PAIRS, TRAIN_PAIRS
from clipmap_hf.evaluation.agreement import evaluate_agreement
from clipmap_hf.files.tables import markdown_table
from clipmap_hf.models.label_model import LabelModel, load_label_model
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.models.vision_tower import with_vision


LOSSES = {
    "feature": {"feature": 2000},
    "labels": {"labels": 1},
    "labels and feature": {"labels": 1, "feature": 2000},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the students")
    parser.add_argument("--images", type=int, default=500, help="drawn by the seed from the embedded training images")
    parser.add_argument("--steps", type=int, default=250, help="of 128 views")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of training")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES, help="which")
    parser.add_argument("--half", action="store_true", help="leave every second caption out of the list")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_parquet(str(TRAIN_PAIRS)).shuffle(seed=arguments.seed).select(range(arguments.images))
    captions = sorted(load_labels(f"{TRAIN_PAIRS}:caption").names)
    labels = captions[::2] if arguments.half else captions
    teacher = Teacher.load(str(TEACHER))
    tests = split_by_list(labels)
    columns = [["model"], *([f"{name}: R@{k}"] for name in tests for k in (1, 5)), ["decisions"]]
    add(columns, "teacher", results(teacher, teacher.model, tests), None)
    for name in arguments.losses:
        folder = trained(arguments, rows, labels, name)
        model, processor = load_label_model(str(folder))
        whole = with_vision(teacher.model, model.vision)
        theirs = LabelModel(teacher.model, model.text_embeds, model.logit_scale.exp())
        images = load_pairs(str(TEST_PAIRS)).select_columns(["image"])
        agreed = evaluate_agreement(model, theirs, images, labels, processor=processor)["decisions"]
        add(columns, name, results(teacher, whole, tests), agreed)
    print(markdown_table(columns))


def split_by_list(labels: list[str]) -> dict[str, datasets.Dataset]:
    """The test pairs: all, those whose captions are in a list, and those whose captions are not."""
    pairs, known = load_pairs(str(TEST_PAIRS)), set(labels)
    parts = {
        "all": range(len(pairs)),
        "in the list": [index for index, caption in enumerate(pairs["caption"]) if caption in known],
        "outside": [index for index, caption in enumerate(pairs["caption"]) if caption not in known],
    }
    return {f"{name} ({len(rows)} pairs)": pairs.select(rows) for name, rows in parts.items()}


def trained(arguments: argparse.Namespace, rows: datasets.Dataset, labels: list[str], name: str) -> Path:
    """The folder of a student that is trained on some losses."""
    cell = f"{arguments.images}-{arguments.steps}-{arguments.seed}-{len(labels)}"
    args = DistillationArguments(
        str(arguments.output_dir / f"{cell}-{name.replace(' ', '-')}"),
        max_steps=arguments.steps,
        batch_size=128,
        learning_rate=2e-3,
        losses=LOSSES[name],
        crop_scale=[0.7, 1.0],
        seed=arguments.seed,
        disable_tqdm=True,
    )
    student = ClipMapConfig(vision=TowerConfig(hidden_size=64, num_hidden_layers=3), initializer="calibrated")
    compress(str(TEACHER), student, args, train_dataset=rows, labels=labels)
    return Path(args.output_dir)


def results(teacher: Teacher, model: torch.nn.Module, tests: dict[str, datasets.Dataset]) -> list[dict[str, float]]:
    return [evaluate_retrieval(model, pairs, processor=teacher.processor) for pairs in tests.values()]


def add(columns: list[list[str]], name: str, recalls: list[dict[str, float]], decisions: float | None) -> None:
    """Adds a row to a table."""
    cells = [
        " / ".join(f"{100 * recall[f'{way}_recall@{k}']:.1f}" for way in ("image_to_text", "text_to_image"))
        for recall in recalls
        for k in (1, 5)
    ]
    agreed = "" if decisions is None else f"{100 * decisions:.1f}"
    for column, cell in zip(columns, [name, *cells, agreed], strict=True):
        column.append(cell)


if __name__ == "__main__":
    main()

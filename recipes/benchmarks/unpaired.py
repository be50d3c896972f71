"""
Few images, and texts that need not belong to them: students of a tenth of the embedded teacher, trained by the feature
loss on some of the embedded images, and tested on a style that no model was trained on.

    python recipes/benchmarks/unpaired.py --output_dir unpaired                # 500 images, 32,000 views seen
    python recipes/benchmarks/unpaired.py --output_dir unpaired --steps 1000   # 128,000 views seen

Texts: the images' own captions; those and the word list; or all captions of the embedded data as a list, which belong
to no image then, as somebody has them who knows what will be asked. Prints recall in percent, image to text / text to
image. After an interruption, the same command goes on.
"""

import argparse
from pathlib import Path

import datasets
from transformers.utils import logging

from clipmap_hf import ClipMapConfig, DistillationArguments, TowerConfig, compress
from clipmap_hf.data.texts import load_texts
from clipmap_hf.demo import TEACHER, TEST_PAIRS, TRAIN_PAIRS
from clipmap_hf.files.tables import markdown_table


STARTS = ("manual", "calibrated")
TEXTS = {
    "own captions": {"train_texts": ["captions"]},
    "own captions and words": {"train_texts": ["captions", "words"]},
    "list of all captions": {"train_texts": [f"{TRAIN_PAIRS}:caption"]},
}
SHAPE = {"vision": TowerConfig(hidden_size=64, num_hidden_layers=3)}
SHAPE |= {"text": TowerConfig(hidden_size=64, num_hidden_layers=2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the students")
    parser.add_argument("--images", type=int, default=500, help="drawn by the seed from the embedded training images")
    parser.add_argument("--steps", type=int, default=250, help="of 128 views")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of training")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_parquet(str(TRAIN_PAIRS)).shuffle(seed=arguments.seed).select(range(arguments.images))
    columns = [["start"], ["texts"], ["different texts"], ["R@1"], ["R@5"]]
    for start in STARTS:
        for name in TEXTS:
            metrics = trained(arguments, rows, start, name)
            cells = [start, name, str(number_of_texts(rows, name)), *(both(metrics, k) for k in (1, 5))]
            for column, cell in zip(columns, cells, strict=True):
                column.append(cell)
    print(markdown_table(columns))


def trained(arguments: argparse.Namespace, rows: datasets.Dataset, start: str, name: str) -> dict[str, float]:
    """The recall of a student that starts and is trained in one of the ways."""
    cell = f"{arguments.images}-{arguments.steps}-{arguments.seed}-{start}-{name.replace(' ', '-')}"
    args = DistillationArguments(
        str(arguments.output_dir / cell),
        max_steps=arguments.steps,
        batch_size=128,
        learning_rate=2e-3,
        losses={"feature": 2000},
        crop_scale=[0.7, 1.0],
        seed=arguments.seed,
        disable_tqdm=True,
        **TEXTS[name],
    )
    student = ClipMapConfig(**SHAPE, initializer=start)
    return compress(str(TEACHER), student, args, train_dataset=rows, eval_dataset=str(TEST_PAIRS)).metrics


def number_of_texts(rows: datasets.Dataset, name: str) -> int:
    """How many different texts there are in all sources together."""
    texts = load_texts(TEXTS[name]["train_texts"])
    return len({*texts.distinct, *(rows["caption"] if texts.has_captions else ())})


def both(metrics: dict[str, float], k: int) -> str:
    return " / ".join(f"{100 * metrics[f'{way}_recall@{k}']:.1f}" for way in ("image_to_text", "text_to_image"))


if __name__ == "__main__":
    main()

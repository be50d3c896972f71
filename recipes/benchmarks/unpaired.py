"""
Few images, and texts that need not belong to them: students of the embedded teacher, trained by the feature loss on
some of the embedded images, and tested on a style that no model was trained on.

    python recipes/benchmarks/unpaired.py --output_dir unpaired                             # a table of 500 images
    python recipes/benchmarks/unpaired.py --output_dir unpaired --images 2000 --steps 2000  # of 256,000 views seen
    python recipes/benchmarks/unpaired.py --output_dir unpaired --size "25 %" --recipes few --texts list --seeds 0

Recipes: `manual` and `calibrated` are starts, trained with light crops; `few` is the calibrated start trained as
`recipes/configs/few.yaml` says; `few-…` is that without one of its parts. Texts: the images' own captions and
keywords; those and the word list; or all captions of the embedded data as a list, which belong to no image then, as
somebody has them who knows what will be asked.

Prints recall in percent, image to text / text to image; the share of the teacher's recall@5, the mean of both; and the
minutes of a student, its start included. After an interruption, the same command goes on.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import datasets
import yaml
from study.cells import cell_path, made_once
from study.recall import mean_recall, recall_columns
from study.tables import spread
from transformers.utils import logging

from clipmap_hf import ClipMapConfig, DistillationArguments, TowerConfig, compress
from clipmap_hf.cli.shipped import shipped_configs
from clipmap_hf.demo import TEACHER, TEST_PAIRS, TRAIN_PAIRS
from clipmap_hf.files.tables import markdown_table


SHAPES = {"10 %": ((64, 3), (64, 2)), "25 %": ((96, 6), (64, 4))}  # width and depth of the towers
TEXTS = {
    "own": {"keyword_column": ["keywords"]},
    "own and words": {"keyword_column": ["keywords"], "train_texts": ["captions", "words"]},
    "list": {"train_texts": [f"{TRAIN_PAIRS}:caption"]},
}
LIGHT = {"crop_scale": [0.7, 1.0], "losses": {"feature": 2000}, "learning_rate": 2e-3, "batch_size": 128}


def recipes() -> dict[str, tuple[str, dict[str, Any]]]:
    """The start, and the arguments of training, by name."""
    few = yaml.safe_load(shipped_configs()["few"].read_text(encoding="utf-8"))
    stage, start = few.pop("distillation"), few.pop("initializer")
    few.pop("calibration_pairs")  # the default
    whole = few | stage
    light = {name: whole[name] for name in whole if name not in ("flip", "rotation", "color_jitter", "grayscale")}
    return {
        "manual": ("manual", LIGHT),
        "calibrated": ("calibrated", LIGHT),
        "few": (start, whole),
        "few-unmixed": (start, whole | {"mix": 0.0}),
        "few-light": (start, light | {"crop_scale": LIGHT["crop_scale"]}),
        "few-slow": (start, whole | {"learning_rate": LIGHT["learning_rate"]}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the results")
    parser.add_argument("--images", type=int, default=500, help="drawn by the seed from the embedded training images")
    parser.add_argument("--steps", type=int, default=1000, help="of 128 views")
    parser.add_argument("--views", type=int, help="of each image that the teacher embeds once; by default each step's")
    parser.add_argument("--size", choices=SHAPES, default="10 %", help="of the teacher's parameters")
    parser.add_argument("--recipes", nargs="+", choices=recipes(), default=["manual", "calibrated", "few"])
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the draw and of training")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    rows = []
    for texts in arguments.texts:
        for recipe in arguments.recipes:
            cells = [measured(arguments, recipe, texts, seed) for seed in arguments.seeds]
            rows.append({"texts": texts, "recipe": recipe} | summary(cells))
    print(markdown_table([[name, *(row[name] for row in rows)] for name in rows[0]]))


def measured(arguments: argparse.Namespace, recipe: str, texts: str, seed: int) -> dict[str, Any]:
    """The recall of a student, its teacher's, and the seconds that it took; made once."""
    start, numbers = recipes()[recipe]
    settings = {"images": arguments.images, "steps": arguments.steps, "size": arguments.size, "seed": seed}
    settings |= {"start": start, "numbers": numbers, "texts": texts}
    settings |= {"views": arguments.views} if arguments.views else {}
    name = f"{recipe}-{arguments.images}-{arguments.steps}-{texts.replace(' ', '-')}-{seed}"
    path = cell_path(arguments.output_dir / "cells", name, settings)
    return made_once(path, lambda folder: trained(folder, settings), lambda cell: str(summary([cell])))


def trained(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Makes a student."""
    rows = datasets.Dataset.from_parquet(str(TRAIN_PAIRS)).shuffle(seed=settings["seed"])
    shape = zip(("vision", "text"), SHAPES[settings["size"]], strict=True)
    towers = {name: TowerConfig(hidden_size=width, num_hidden_layers=depth) for name, (width, depth) in shape}
    numbers = settings["numbers"] | {"max_steps": settings["steps"], "seed": settings["seed"]}
    if "views" in settings:
        numbers |= {"views": settings["views"], "teacher_cache": str(_cache_of(folder.parent.parent, settings))}
    began = time.perf_counter()
    result = compress(
        str(TEACHER),
        ClipMapConfig(**towers, initializer=settings["start"]),
        DistillationArguments(str(folder), disable_tqdm=True, **numbers, **TEXTS[settings["texts"]]),
        train_dataset=rows.select(range(settings["images"])),
        eval_dataset=str(TEST_PAIRS),
    )
    seconds = time.perf_counter() - began
    return {"student": result.metrics, "teacher": result.teacher_metrics, "seconds": seconds}


def _cache_of(folder: Path, settings: dict[str, Any]) -> Path:
    """Where students that look at the same views find the teacher's embeddings."""
    looks = {name: settings["numbers"].get(name) for name in ("crop_scale", "mix", "flip")}
    looks |= {name: settings[name] for name in ("images", "texts", "seed", "views")}
    return cell_path(folder / "caches", "views", looks).with_suffix("")


def summary(cells: list[dict[str, Any]]) -> dict[str, str]:
    """The columns of a row, from the cells of all seeds."""
    shares = [100 * mean_recall(cell["student"], 5) / mean_recall(cell["teacher"], 5) for cell in cells]
    columns = {
        name: value for name, value in recall_columns([cell["student"] for cell in cells]).items() if name != "R@10"
    }
    return columns | {"share": f"{spread(shares)} %", "minutes": spread([cell["seconds"] / 60 for cell in cells])}


if __name__ == "__main__":
    main()

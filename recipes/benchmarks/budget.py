"""
Does a search within a budget choose well? Students of the embedded teacher that cost the same, made from activations
and not trained: the shape that keeps most (`kept_energy`), that nearest to the literature's, and others that cost at
least 95 % of the budget, a quarter and half down the list by what is kept. Recall@5 is on a style that no model was
trained on, as a share of the teacher's, the mean of both directions.

    python recipes/benchmarks/budget.py
    python recipes/benchmarks/budget.py --towers

`--towers` makes students of which one tower is cut and the other is the teacher's instead.
"""

import argparse
import math
from collections.abc import Iterator

import datasets
from study.recall import mean_recall
from transformers.utils import logging

from clipmap_hf import ClipMapCompressor, ClipMapConfig
from clipmap_hf.config import student_config
from clipmap_hf.costs.cost import parameter_count
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.data.calibration_pairs import CalibrationPairs
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.data.sources import evaluation_batches
from clipmap_hf.demo import TEACHER, TEST_PAIRS, TRAIN_PAIRS
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.models.teacher import Teacher
from clipmap_hf.shapes import choose_shape, kept_energy
from clipmap_hf.shapes.grid import Shape, with_shape


TOWERS = {
    "vision": (
        (128, 6),
        (96, 6),
        (64, 6),
        (32, 6),
        (192, 4),
        (192, 3),
        (192, 2),
        (160, 5),
        (128, 4),
        (96, 4),
        (64, 3),
    ),
    "text": ((96, 4), (64, 4), (32, 4), (128, 3), (128, 2), (128, 1), (96, 2), (64, 2), (96, 1), (64, 1)),
}
ENOUGH = 0.95  # of the budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", default=["2M", "1M", "500k"], help="parameters")
    parser.add_argument("--towers", action="store_true", help="cut one tower at a time")
    parser.add_argument("--pairs", type=int, default=1024, help="to calibrate on")
    parser.add_argument("--refit_steps", type=int, default=0, help="of each layer and tower")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    teacher = Teacher.load(str(TEACHER))
    pairs = list(CalibrationPairs(load_pairs(str(TRAIN_PAIRS)), teacher.processor, arguments.pairs))
    test = list(evaluation_batches(DataArguments(str(TRAIN_PAIRS), eval_data=str(TEST_PAIRS)), teacher.processor))
    kept, whole = kept_energy(teacher.model, pairs), recall(teacher.model, test)
    options = {"initializer": "calibrated", "refit_steps": arguments.refit_steps}
    table = of_towers(teacher, kept) if arguments.towers else of_budgets(teacher, kept, arguments.budgets)
    print(
        "| of | shape | vision | text | parameters | kept | recall@5 |\n|---|---|---|---|---:|---:|---:|", flush=True
    )
    for of, name, shape, cost, left in table:
        config = with_shape(ClipMapConfig(**options), shape)
        student = ClipMapCompressor.from_pretrained(TEACHER, config, calibration_data=pairs)
        sizes = f"{shape.vision_width} × {shape.vision_depth} | {shape.text_width} × {shape.text_depth}"
        found = recall(student.export(), test) / whole
        print(f"| {of} | {name} | {sizes} | {cost:,.0f} | {left:.1%} | {found:.1%} |", flush=True)


def of_budgets(teacher: Teacher, kept: dict, budgets: list[str]) -> Iterator[tuple]:
    """Yields budget, what the shape is among those that it allows, the shape, its parameters and what it keeps."""
    for budget in budgets:
        config = ClipMapConfig(budget={"params": budget})
        ranked = choose_shape(teacher.model.config, config, kept, shown=10**6).candidates
        equal = [candidate for candidate in ranked if candidate.cost >= ENOUGH * config.budget.limit]
        near = choose_shape(teacher.model.config, config).candidates[0].shape
        for name, candidate in (
            ("keeps most", ranked[0]),
            ("nearest to the literature", next(candidate for candidate in ranked if candidate.shape == near)),
            ("a quarter down", equal[len(equal) // 4]),
            ("half down", equal[len(equal) // 2]),
        ):
            yield budget, name, candidate.shape, candidate.cost, math.exp(candidate.score)


def of_towers(teacher: Teacher, kept: dict) -> Iterator[tuple]:
    """Yields tower, nothing, the shape, its parameters and what the tower keeps."""
    whole = {name: getattr(teacher.model.config, f"{name}_config") for name in TOWERS}
    sizes = {name: (tower.hidden_size, tower.num_hidden_layers) for name, tower in whole.items()}
    for name, towers in TOWERS.items():
        head_width = whole[name].hidden_size // whole[name].num_attention_heads
        for width, depth in towers:
            cut = sizes | {name: (width, depth)}
            shape = Shape(*cut["vision"], *cut["text"])
            cost = parameter_count(student_config(teacher.model.config, with_shape(ClipMapConfig(), shape)))
            yield name, "", shape, cost, float(kept[name][width // head_width - 1, depth - 1])


def recall(model, batches: list) -> float:
    """Measures recall@5, the mean of both directions."""
    return mean_recall(evaluate_retrieval(model, batches, ks=(5,)), 5)


if __name__ == "__main__":
    main()

"""
Does a search within a budget choose well? Students of the embedded teacher that cost the same, made from activations and
not trained: the shape that keeps most (`kept_energy`), the one nearest to the literature's, and others that cost at
least 95 % of the budget, a quarter and half down the list by what is kept. Recall@5 is on a style that no model was
trained on, as a share of the teacher's, the mean of both directions.

    python recipes/benchmarks/budget.py

`--towers` makes students of which one tower is cut and the other the teacher's, beside what is kept of that tower.
"""

import argparse

import datasets
from transformers.utils import logging

from clipmap_hf import Budget, ClipMapCompressor, ClipMapConfig, TowerConfig
from clipmap_hf.data.calibration_pairs import CalibrationPairs
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.demo import TEACHER, TEST_PAIRS, TRAIN_PAIRS
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.shapes import choose_shape, kept_energy
from clipmap_hf.teachers import Teacher
from clipmap_hf.training.arguments import DataArguments
from clipmap_hf.training.setup import evaluation_batches


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
    parser.add_argument("--budgets", nargs="*", default=["2M", "1M", "500k"], help="parameters")
    parser.add_argument("--towers", action="store_true", help="students of which one tower is cut, too")
    parser.add_argument("--pairs", type=int, default=1024, help="to calibrate on")
    parser.add_argument("--refit_steps", type=int, default=0, help="of each layer and tower")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    teacher = Teacher.load(str(TEACHER))
    pairs = list(CalibrationPairs(load_pairs(str(TRAIN_PAIRS)), teacher.processor, arguments.pairs))
    test = list(evaluation_batches(DataArguments(str(TRAIN_PAIRS), eval_data=str(TEST_PAIRS)), teacher.processor))
    kept, whole = kept_energy(teacher.model, pairs), recall(teacher.model, test)

    def share(config: ClipMapConfig) -> float:
        config = ClipMapConfig(config.vision, config.text, initializer="calibrated", refit_steps=arguments.refit_steps)
        student = ClipMapCompressor.from_pretrained(TEACHER, config, calibration_data=pairs)
        return recall(student.export(), test) / whole

    if arguments.towers:
        print("| tower | width × depth | kept | recall@5 |\n|---|---|---:|---:|", flush=True)
        for name, sizes in TOWERS.items():
            for width, depth in sizes:
                size = getattr(teacher.model.config, f"{name}_config")
                left = kept[name][width * size.num_attention_heads // size.hidden_size - 1, depth - 1]
                found = share(ClipMapConfig(**{name: TowerConfig(width, num_hidden_layers=depth)}))
                print(f"| {name} | {width} × {depth} | {left:.1%} | {found:.1%} |", flush=True)
    print(
        "| budget | shape | vision | text | parameters | kept | recall@5 |\n|---|---|---|---|---:|---:|---:|",
        flush=True,
    )
    for budget in arguments.budgets:
        config = ClipMapConfig(budget=Budget(params=budget))
        ranked = choose_shape(teacher.model.config, config, kept, shown=10**6)
        equal = [one for one in ranked.candidates if one.cost >= ENOUGH * config.budget.limit]
        near = choose_shape(teacher.model.config, config).candidates[0].shape
        for name, candidate in (
            ("keeps most", ranked.candidates[0]),
            ("nearest to the literature", next(one for one in ranked.candidates if one.shape == near)),
            ("a quarter down", equal[len(equal) // 4]),
            ("half down", equal[len(equal) // 2]),
        ):
            sizes = candidate.shape
            vision, text = (
                TowerConfig(sizes[0], num_hidden_layers=sizes[1]),
                TowerConfig(sizes[2], num_hidden_layers=sizes[3]),
            )
            cells = [budget, name, f"{sizes[0]} × {sizes[1]}", f"{sizes[2]} × {sizes[3]}", f"{candidate.cost:,.0f}"]
            cells += [ranked.rule.shown(candidate.score), f"{share(ClipMapConfig(vision, text)):.1%}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def recall(model, batches: list) -> float:
    """Recall@5, the mean of both directions."""
    found = evaluate_retrieval(model, batches, ks=(5,))
    return (found["image_to_text_recall@5"] + found["text_to_image_recall@5"]) / 2


if __name__ == "__main__":
    main()

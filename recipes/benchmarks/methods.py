"""
All methods in one bench: students of the embedded teacher at about 50 %, 10 % and 1 % of its size, by selection,
learned masks, mapping, from scratch and from a calibrated start, on equally many training pairs (masks and mapping
count), tested on a style that no model was trained on.

    python recipes/benchmarks/methods.py --output_dir bench            # hours; goes on where it was stopped
    python recipes/benchmarks/methods.py --output_dir quick --quick    # a rough table in ten minutes

A cell, a student by a method with a seed, is made by `clipmap_hf.pipeline` and lies in `cells/`, not to be made
again. The learning rate of a method and size, which its stages share, is the best of four trials of one seed, by mean
recall on EmojiOne's drawings, which are held out of the training pairs then; it is kept in `tuned.json`. A trial is as
long as a cell, but for 50 %, where it is a third as long, as its steps take three times as long. Several processes may
work on one bench, on sizes of their own; `--report_only` puts them together. `--quick` is one size, one seed, a fifth
of the steps, no MoPE, and rates that were found before.

Writes `results.json`, `results.md` and PNGs. Recall is in percent, image to text / text to image, mean ± standard
deviation over seeds. `seconds`, the median of seeds, are those of training and of a start from data, evaluation left
out.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import datasets
from method_bench.cells import cell_file, finished
from method_bench.report import write_report
from study.rates import best_trial, keep_tuned, read_tuned
from transformers.utils import logging


# Width, depth and, where it is not four times the width, FFN width of the vision and of the text tower, and those of
# what a progressive compression goes through. Of the teacher's parameters in blocks, students have 50, 7, 1.1 percent.
# Learning rates to try, for methods whose loss is that of embeddings themselves and for the others: as many for each,
# and the share of the steps that a trial takes.
SIZES = {
    "50 %": {
        "towers": ((160, 5, 512), (128, 2)),
        "via": [((192, 6), (128, 3))],
        "trial": 0.32,
        "rates": {"feature": (5e-4, 1e-3, 2e-3, 4e-3), "others": (1.25e-4, 2.5e-4, 5e-4, 1e-3)},
    },
    "10 %": {
        "towers": ((64, 3), (64, 2)),
        "via": [((128, 5), (96, 3))],
        "trial": 1.0,
        "rates": {"feature": (1e-3, 2e-3, 4e-3, 8e-3), "others": (5e-4, 1e-3, 2e-3, 4e-3)},
    },
    "1 %": {
        "towers": ((32, 2), (32, 1)),
        "via": [((96, 4), (64, 2))],
        "trial": 1.0,
        "rates": {"feature": (2e-3, 4e-3, 8e-3, 1.6e-2), "others": (5e-4, 1e-3, 2e-3, 4e-3)},
    },
}
AFFINITY, FEATURE = {"affinity": 1.0}, {"feature": 2000.0}
CLIP_KD = {"contrastive": 1.0, "relational": 1.0, "feature": 2000.0, "interactive": 1.0}
MOPE = {"contrastive": 1.0, "affinity": 1.0, "feature": 500.0, "hidden": 0.5}  # halved sums, see configs/mope
BY_SCORE = {"depth": "score"}
LEARNED_SCALE = {"logit_scale": 14.3, "learn_logit_scale": True}
REFERENCE, PAPER = "TinyCLIP, manual", "CLIP-Map"
METHODS = {
    "from scratch": {"initializer": "scratch", "losses": {"contrastive": 1.0}, "scale": LEARNED_SCALE},
    "from scratch, CLIP-KD": {"initializer": "scratch", "losses": CLIP_KD, "scale": LEARNED_SCALE},
    "random selection": {"initializer": "random_selection", "losses": FEATURE},
    "magnitude": {"initializer": "magnitude", "changes": BY_SCORE, "losses": FEATURE},
    "Taylor": {"initializer": "taylor", "changes": BY_SCORE, "losses": FEATURE},
    "MoPE": {"initializer": "mope", "changes": BY_SCORE, "losses": FEATURE},
    "MoPE-CLIP": {"initializer": "mope", "changes": BY_SCORE, "losses": MOPE},
    REFERENCE: {"initializer": "manual", "losses": AFFINITY},
    "TinyCLIP, manual, feature loss": {"initializer": "manual", "losses": FEATURE},
    "TinyCLIP, automatic": {"initializer": None, "losses": AFFINITY, "stages": {"masking": 0.32}},
    "TinyCLIP, progressive": {"initializer": "manual", "losses": AFFINITY, "progressive": True},
    PAPER: {"initializer": "diagonal", "losses": AFFINITY, "stages": {"mapping": 0.32}},
    "calibrated": {"initializer": "calibrated", "losses": FEATURE},
}
# A mapping's own rate, as a share of that of distillation: what most of its trials ended with in initializers.py.
MAPPING_SHARE = 0.25
SLOW = ("MoPE", "MoPE-CLIP")  # a minute for the start alone
QUICK = {"sizes": ["10 %"], "seeds": [0], "steps": 50, "methods": [name for name in METHODS if name not in SLOW]}
# What the full bench found for that size; the others have 4e-3.
QUICK_RATES = {"from scratch": 2e-3, "calibrated": 2e-3, REFERENCE: 1e-3, PAPER: 1e-3}
QUICK_RATES |= {"TinyCLIP, automatic": 1e-3, "TinyCLIP, progressive": 1e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the bench")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of students")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="rows of the tables")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of all but tuning, which has seed 0")
    parser.add_argument("--steps", type=int, default=250, help="of a student, all its stages together")
    parser.add_argument("--batch_size", type=int, default=128, help="pairs per step")
    parser.add_argument("--quick", action="store_true", help="the rough table, whatever the options say")
    parser.add_argument(
        "--report_only", action="store_true", help="report the cells that are finished, make no others"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    results = defaultdict(list)
    for size in arguments.sizes:
        tunes = arguments.quick or not arguments.report_only
        known = METHODS if tunes else read_tuned(arguments.output_dir).get(size, {})
        rates = {name: best_rate(arguments, size, name) for name in arguments.methods if name in known}
        for seed in arguments.seeds:
            for name, rate in rates.items():
                cell = make_cell(arguments, size, name, rate, seed)
                if not arguments.report_only or cell_file(arguments.output_dir, cell).exists():
                    results[size, name].append(finished(arguments.output_dir, cell))
    print(write_report(arguments.output_dir, results, REFERENCE, PAPER))


def make_cell(arguments: argparse.Namespace, size: str, name: str, rate: float, seed: int, validation=False) -> dict:
    """Puts together all that decides a cell."""
    method, shape = METHODS[name], SIZES[size]
    return {
        "size": size,
        "towers": shape["towers"],
        "via": shape["via"] if method.get("progressive") else [],
        "name": name,
        "method": method,
        "rate": rate,
        "mapping_rate": rate * MAPPING_SHARE,
        "steps": round(arguments.steps * shape["trial"]) if validation else arguments.steps,
        "batch_size": arguments.batch_size,
        "seed": seed,
        "validation": validation,
    }


def best_rate(arguments: argparse.Namespace, size: str, name: str) -> float:
    """Reads the rate that is best in validation, which is found first if it is not in `tuned.json`."""
    if arguments.quick:
        return QUICK_RATES.get(name, 4e-3)
    tuned = read_tuned(arguments.output_dir).get(size, {})
    if name in tuned:
        return tuned[name]

    def recall(rate: float) -> float:
        cell = make_cell(arguments, size, name, rate, seed=0, validation=True)
        return finished(arguments.output_dir, cell)["recall"]["mean_recall"]

    rates = SIZES[size]["rates"]["feature" if "feature" in METHODS[name]["losses"] else "others"]
    best, _ = best_trial(rates, recall)
    keep_tuned(arguments.output_dir, size, name, best)
    return best


if __name__ == "__main__":
    main()

"""
How does a student's start tell after training? Students of the embedded teacher, by every initializer, on equally many
training pairs, evaluated untrained, after mapping and after distillation on a style that no model was trained on.

    python recipes/benchmarks/initializers.py --output_dir study --seeds 0 1 2

A study is made of runs, and a run is what its settings say. Each that is finished lies in `runs/`, named after its
settings, and is not made again, so a killed study goes on where it was; remove the file to make it anew. Runs with a
common beginning share it, and all runs of a seed share the teacher's embeddings. Once the part `tune` is done, several
processes may work on the other parts of one study, each on seeds of its own; `--report_only` then puts them together.

`tune` holds EmojiOne's drawings out of the training pairs and picks learning rates by recall@5 on them, for each size
and method, with mapping and (where it is needed) without, after equally many trials of one seed. The teacher knows
these drawings, which flatters all. What is not tuned has the demo's rates; the tables show them.

Writes `tuned.json`, `results.json`, `results.md` and, of the part `curves`, PNGs, of what the options name. Recall is
the mean of both directions. Pairs seen are those of training; what calibration reads is not among them.
"""

import argparse
from collections import defaultdict
from functools import partial
from pathlib import Path

import datasets
from initializer_study.report import write_report
from initializer_study.runs import TRAINED, finished, result_file
from study.rates import best_trial, keep_tuned, read_tuned
from transformers.utils import logging


METHODS = ("random", "kaiming", "xavier", "diagonal", "importance", "calibrated_whole", "calibrated")
# Width, depth and, where it is not four times the width, FFN width of the vision and of the text tower; and the heads,
# where they are not those of the rule. Of the teacher's parameters in blocks, "10 %" (the student of the demo) has 7 %
# and "1 %" has 1.1 %; the others have the share that is their name, and are only evaluated untrained.
SIZES = {"10 %": ((64, 3), (64, 2)), "1 %": ((32, 2), (32, 1))}
LARGER = {
    "57 %": ((162, 5, 632, 6), (96, 4)),
    "56 %, text by depth": ((162, 6, 472, 6), (128, 2)),
    "50 %, by depth": ((192, 3), (128, 2)),
    "50 %, vision by width": ((162, 5, 504, 6), (128, 2)),
    "25 %": ((96, 6), (64, 4)),
    "25 %, text by depth": ((96, 6), (128, 1)),
    "12.5 %": ((96, 3), (64, 2)),
    "12.5 %, text by depth": ((64, 6), (128, 1, 256)),
}
TEACHER_SIZE = {"100 %": ((192, 6), (128, 4))}  # of `diagonal`, the teacher itself

# What an ablation changes in the `ClipMapConfig` or of `calibration_pairs`, or an ingredient it is `without`. Where
# the refit sets it anew, there is no refit either.
ABLATIONS = {
    "calibrated": {},
    **{f"{pairs} calibration pairs": {"calibration_pairs": pairs} for pairs in (32, 128, 512, 4096)},
    "random texts instead of captions": {"without": "captions"},
    "layers by similarity": {"depth": "similarity"},
    "first heads and neurons": {"without": "energy"},
    "pooled token as any other": {"without": "weight of the pooled token"},
    "no gradient steps": {"refit_steps": 0},
    "800 gradient steps": {"refit_steps": 800},
    "gradient steps for embeddings alone": {"without": "streams in gradient steps"},
    "no refit": {"refit": False},
    **{
        f"no refit, no {ingredient}": {"refit": False, "without": ingredient}
        for ingredient in ("fold", "fold of pre_layrnorm", "gains", "lifts", "energy")
    },
}

BUDGET = 250  # steps that `mapping` below is a part of; of other --steps, it is as large a share
RATES = {"mapping_rate": 1e-3, "distillation_rate": 2e-3}  # the demo's
TRIALS = {"mapping_rate": (2.5e-4, 5e-4, 1e-3, 2e-3), "distillation_rate": (5e-4, 1e-3, 2e-3, 4e-3)}
MAPPED, DIRECT, FEATURE = {"mapping": 80}, {"mapping": 0}, {"mapping": 0, "losses": {"feature": 2000.0}}
TUNED = {method: {"mapped": MAPPED} for method in METHODS}  # ways to train, each with rates of its own
TUNED["importance"] = {"mapped": MAPPED, "direct": DIRECT}
TUNED |= {
    method: {"mapped": MAPPED, "direct": DIRECT, "feature": FEATURE}
    for method in ("diagonal", "calibrated_whole", "calibrated")
}
# How large the rates to try are beside those above: a good start is soon lost, unless the loss is its own.
TRIALS_OF = {(method, way): 0.25 for method in ("calibrated_whole", "calibrated") for way in ("mapped", "direct")}

# The rows of each part. A row without a method has that which is best in validation, and is mapped or not as there.
STARTS = {method: {"method": method} for method in METHODS}
ABLATED = {name: {"method": "calibrated", "changes": changes} for name, changes in ABLATIONS.items()}
PARTS = {
    "table": {method: {"method": method, "mapping": 80} for method in METHODS},
    "ablations": ABLATED,
    "untrained": {
        name: {**(STARTS | ABLATED)[name], "untrained": True}
        for name in (
            "diagonal",
            "importance",
            "no refit",
            "no gradient steps",
            "gradient steps for embeddings alone",
            "calibrated_whole",
            "calibrated",
            "800 gradient steps",
            "4096 calibration pairs",
        )
    },
    "splits": {
        f"{method}, {mapping} + {BUDGET - mapping}": {"method": method, "mapping": mapping}
        for method in ("diagonal", "calibrated")
        for mapping in (0, 40, 80, 160)
    },
    "trained": {name: {"method": "calibrated", "mapping": 80, "mapping_trains": name} for name in TRAINED},
    "mapping loss": {
        f"{method}, {share:.0%} distillation": {"method": method, "mapping": 80, "mapping_distillation": share}
        for method in ("diagonal", "calibrated")
        for share in (0.0, 0.5, 1.0)
    },
    "lambda": {f"λ = {weight}": {"distillation_weight": weight} for weight in (0.0, 0.25, 0.5, 0.75, 1.0)},
    "curves": {
        "manual inheritance": {"method": "diagonal"},  # with which the report compares the others
        "manual inheritance, mapped": {"method": "diagonal", "mapping": 80},
        "manual inheritance, feature loss": {"method": "diagonal", **FEATURE},
        "importance": {"method": "importance"},
        "calibrated_whole": {"method": "calibrated_whole"},
        "calibrated_whole, feature loss": {"method": "calibrated_whole", **FEATURE},
        "calibrated": {"method": "calibrated"},
        "calibrated, feature loss": {"method": "calibrated", **FEATURE},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the study")
    parser.add_argument("--parts", nargs="+", choices=["tune", *PARTS], default=["tune", *PARTS], help="what to do")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of every part; `tune` has seed 0")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="students that are trained")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="initializers")
    parser.add_argument("--steps", type=int, default=BUDGET, help="of a student, mapping and distillation together")
    parser.add_argument("--batch_size", type=int, default=128, help="pairs per step")
    parser.add_argument("--report_only", action="store_true", help="report the runs that are finished, make no others")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if "tune" in arguments.parts and not arguments.report_only:
        tune(arguments)
    parts = [part for part in PARTS if part in arguments.parts]
    teacher = make_settings(arguments, TEACHER_SIZE, "100 %", {"method": "diagonal", "untrained": True}, seed=0)
    results = defaultdict(list, {("teacher", "100 %", "teacher"): [finished(arguments.output_dir, teacher)]})
    plan = [run for seed in arguments.seeds for part in parts for run in planned(arguments, part, seed)]
    for part, name, settings in plan:
        if not arguments.report_only or result_file(arguments.output_dir, settings).exists():
            results[part, settings["size"], name].append(finished(arguments.output_dir, settings))
    print(write_report(arguments.output_dir, results))


def planned(arguments: argparse.Namespace, part: str, seed: int) -> list[tuple[str, str, dict]]:
    """Plans the runs of a part: its name, the row's name, and the settings."""
    tuned, runs = read_tuned(arguments.output_dir), []
    sizes = LARGER if part == "untrained" else {size: SIZES[size] for size in arguments.sizes}
    for size in sizes:
        for name, row in PARTS[part].items():
            row = row if "method" in row else {**best_in_validation(tuned, size), **row}
            if row["method"] in arguments.methods:
                way = "mapped" if row.get("mapping") else "feature" if "losses" in row else "direct"
                row = {**tuned.get(size, {}).get(row["method"], {}).get(way, RATES), **row}
                runs.append((part, name, make_settings(arguments, sizes, size, row, seed)))
    return runs


def make_settings(arguments: argparse.Namespace, sizes: dict, size: str, row: dict, seed: int) -> dict:
    """Puts together all that decides a run; a stage without steps is `None`."""
    mapping = round(row.get("mapping", 0) * arguments.steps / BUDGET)
    steps = {"mapping": mapping, "distillation": 0 if row.get("untrained") else arguments.steps - mapping}
    more = {
        "mapping": {"trains": row.get("mapping_trains"), "weight": row.get("mapping_distillation", 0.0)},
        "distillation": {"losses": row["losses"]}
        if "losses" in row
        else {"weight": row.get("distillation_weight", 1.0)},
    }
    return {
        "size": size,
        "towers": sizes[size],
        "method": row["method"],
        "changes": row.get("changes", {}),
        "seed": seed,
        "validation": row.get("validation", False),
        "batch_size": arguments.batch_size,
        "budget": arguments.steps,
        **{
            stage: {"steps": steps[stage], "rate": row[f"{stage}_rate"], **more[stage]} if steps[stage] else None
            for stage in steps
        },
    }


def tune(arguments: argparse.Namespace) -> None:
    """Finds the rates that are best in validation, and keeps them in `tuned.json`."""
    for size in arguments.sizes:
        for method in arguments.methods:
            ways = {way: best_rates(arguments, size, method, way) for way in TUNED[method]}
            keep_tuned(arguments.output_dir, size, method, ways)


def best_rates(arguments: argparse.Namespace, size: str, method: str, way: str) -> dict[str, float]:
    """Finds the best rates, of mapping first, with the recall that they lead to in validation."""
    best = {**RATES, **TUNED[method][way], "recall": -1.0}

    def recall(name: str, rate: float) -> float:
        row = {**best, name: rate, "method": method, "validation": True}
        result = finished(arguments.output_dir, make_settings(arguments, SIZES, size, row, seed=0))
        return result["distillation"]["recall@5"]

    for name, values in TRIALS.items():
        if best["mapping"] or name != "mapping_rate":
            rates = [value * TRIALS_OF.get((method, way), 1.0) for value in values]
            rate, found = best_trial(rates, partial(recall, name))
            if found > best["recall"]:
                best |= {name: rate, "recall": found}
    return best


def best_in_validation(tuned: dict, size: str) -> dict:
    """Picks the method that `tune` found best on the affinity loss, and its steps of mapping."""
    found = [
        {"method": method, **ways[way]}
        for method, ways in tuned.get(size, {}).items()
        for way in ("mapped", "direct")
        if way in ways
    ]
    if not found:
        raise ValueError(f"No method is known to be the best of {size!r}; run --parts tune before.")
    best = max(found, key=lambda trial: trial["recall"])
    return {"method": best["method"], "mapping": best["mapping"]}


if __name__ == "__main__":
    main()

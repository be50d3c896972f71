"""What the study of initializers plans, and what it reads from its curves."""

import argparse
import math

import pytest
from test_benchmarks import BENCHMARKS, forget_modules


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import initializers
    from initializer_study import ablations, report, runs
    from study import curves, tables

    yield argparse.Namespace(
        initializers=initializers, ablations=ablations, report=report, runs=runs, curves=curves, tables=tables
    )
    forget_modules("initializers", "initializer_study", "study")


@pytest.fixture
def arguments(study, tmp_path):
    sizes, methods = list(study.initializers.SIZES), list(study.initializers.METHODS)
    return argparse.Namespace(output_dir=tmp_path, sizes=sizes, methods=methods, steps=250, batch_size=128)


CURVE = [
    {"pairs": 0, "recall@1": 0.1, "recall@5": 0.2},
    {"pairs": 100, "recall@1": 0.3, "recall@5": 0.4},
    {"pairs": 200, "recall@1": 0.2, "recall@5": 0.6},
    {"pairs": 300, "recall@1": 0.4, "recall@5": 0.5},
]


@pytest.mark.parametrize(
    "target, pairs", [(0.05, 0), (0.1, 0), (0.2, 50), (0.3, 100), (0.35, 275), (0.4, 300), (0.41, math.inf)]
)
def test_pairs_to_reach_are_those_of_the_first_crossing(study, target, pairs):
    assert study.curves.pairs_to_reach(CURVE, "recall@1", target) == pytest.approx(pairs)


def test_values_between_evaluations_lie_on_a_line(study):
    assert study.curves.value_at(CURVE, "recall@5", 150) == pytest.approx(0.5)


def test_spread_shows_no_number_that_some_seed_lacks(study):
    assert study.tables.spread([1.0, 3.0]) == "2.0 ± 1.4"
    assert study.tables.spread([1.0]) == "1.0"
    assert study.tables.spread([1.0, math.inf]) == study.tables.spread([]) == "–"


def test_reference_needs_its_own_pairs(study):
    runs = [{"settings": {"seed": seed}, "curve": CURVE} for seed in (0, 1)]
    row = study.report.lead_row("1 %", "manual inheritance", runs, runs)
    assert row["factor R@1"] == "1.00 ± 0.00"
    assert row["R@1 ratio at 50%"] == "1.00 ± 0.00"


def test_every_trained_row_has_the_whole_budget(study, arguments):
    for part in study.initializers.PARTS.keys() - {"lambda", "untrained"}:
        for _, _, settings in study.initializers.planned(arguments, part, seed=0):
            assert sum(settings[stage]["steps"] for stage in ("mapping", "distillation") if settings[stage]) == 250


def test_parts_share_the_runs_that_they_have_in_common(study, arguments):
    names = {
        part: {
            study.runs.result_file(arguments.output_dir, settings)
            for _, _, settings in study.initializers.planned(arguments, part, seed=0)
        }
        for part in ("table", "ablations", "splits", "curves")
    }
    assert len(names["table"] & names["splits"]) == 4  # `diagonal` and `calibrated` of both sizes
    assert len(names["splits"] & names["curves"]) == 6  # also without mapping
    assert len(names["ablations"] & names["curves"]) == 2


def test_best_method_is_that_of_validation(study, arguments):
    with pytest.raises(ValueError, match="run --parts tune"):
        study.initializers.planned(arguments, "lambda", seed=0)
    rates = {"mapping_rate": 1e-3, "distillation_rate": 4e-3, "mapping": 0, "recall": 0.2}
    tuned = {"1 %": {"xavier": {"mapped": {**rates, "recall": 0.1, "mapping": 80}}, "diagonal": {"direct": rates}}}
    assert study.initializers.best_in_validation(tuned, "1 %") == {"method": "diagonal", "mapping": 0}


def test_every_ingredient_can_be_left_out(study):
    ingredients = {change["without"] for change in study.initializers.ABLATIONS.values() if "without" in change}
    for ingredient in ingredients:
        with study.ablations.without(ingredient):  # fails where the package has nothing of a replaced name
            pass
    assert study.ablations.REPLACEMENTS.keys() == ingredients - {"captions"}

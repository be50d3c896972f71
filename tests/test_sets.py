"""The table of evaluation sets, and every one of them in small."""

import re
from pathlib import Path

import pytest
from set_folders import ColorModel, rows_for, write_set

from clipmap_hf.evaluation.sets import EVAL_SETS, SUITES, EvalSet, chosen_sets
from clipmap_hf.evaluation.suite import evaluate_sets


def test_the_suite_of_the_paper_has_its_table_2_and_both_retrieval_sets():
    tasks = [EVAL_SETS[name].task for name in SUITES["paper"]]
    assert (len(tasks), tasks.count("retrieval"), tasks.count("multilabel")) == (23, 2, 1)
    assert list(SUITES["paper"][:3]) == ["food101", "cifar10", "cifar100"]


def test_metrics_are_those_of_the_literature():
    per_class = {name for name, one in EVAL_SETS.items() if one.metrics == ("mean_per_class_recall",)}
    assert per_class == {"fgvc_aircraft", "pets", "caltech101", "flowers102"}
    assert EVAL_SETS["voc2007"].metrics == ("map_11_point",)


def test_sets_lie_in_repositories_of_their_own_at_a_branch_or_a_whole_commit():
    assert len({one.hub_id for one in EVAL_SETS.values()}) == len(EVAL_SETS)
    assert all(re.fullmatch(r"main|[0-9a-f]{40}", one.revision) for one in EVAL_SETS.values())


def test_the_documentation_lists_every_set_in_order():
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = [
        f"| `{name}` | `{one.folder}` | {', '.join(f'`{metric}`' for metric in one.metrics)} | {one.license} |"
        for name, one in EVAL_SETS.items()
    ]
    assert "\n".join(rows) in text


@pytest.mark.parametrize("name", EVAL_SETS)
def test_a_model_that_knows_the_classes_is_perfect_on_a_set(name, tiny_processor, tiny_config, tmp_path):
    eval_set = EVAL_SETS[name]
    write_set(tmp_path / eval_set.folder, rows_for(eval_set.task, 12), eval_set.task, split=eval_set.split)
    model = ColorModel(tiny_processor, tiny_config())
    options = {"model_id": "colors", "sets_dir": tmp_path}
    result = evaluate_sets(model, tiny_processor, {name: eval_set}, tmp_path / "results", **options)[name]
    assert {result["metrics"][metric] for metric in eval_set.metrics} == {1.0}


def test_chosen_sets_come_by_names_by_commas_and_by_suite_each_once():
    assert list(chosen_sets(["mnist,dtd", "cars"])) == ["mnist", "dtd", "cars"]
    assert list(chosen_sets(["mnist"], "paper")) == ["mnist", *(one for one in EVAL_SETS if one != "mnist")]
    assert chosen_sets(["mnist"])["mnist"] == EvalSet(
        "clip-benchmark/wds_mnist", revision="ba1491816962d0a3e81e178cf5f857f8ea5ebe1b"
    )


@pytest.mark.parametrize(
    ("names", "suite", "message"),
    [
        (["imagenet", "mnist"], None, r"Evaluation sets \['imagenet'\] are unknown; choose from \['caltech101', .*\]"),
        ([], None, r"No evaluation set is named; choose from \['caltech101', .*\]"),
        (["mnist"], "vtab", r"suite='vtab' is unknown; the suites are \['paper'\]"),
    ],
)
def test_unknown_names_are_errors_that_list_the_known(names, suite, message):
    with pytest.raises(ValueError, match=message):
        chosen_sets(names, suite)

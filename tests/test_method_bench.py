"""What the bench of methods plans, and what it reads from logs."""

import argparse
import json
import sys
from types import SimpleNamespace

import pytest
from test_benchmarks import BENCHMARKS, forget_modules

from clipmap_hf.losses import check_losses
from clipmap_hf.starts import STARTS


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import methods
    from method_bench import cells, report

    yield SimpleNamespace(methods=methods, cells=cells, report=report)
    forget_modules("methods", "method_bench", "study")


@pytest.fixture
def cell(bench):
    """A function that makes the cell of a method at a size."""
    arguments = argparse.Namespace(steps=250, batch_size=128)
    return lambda name, size="1 %": bench.methods.make_cell(arguments, size, name, 1e-3, seed=0)


def test_methods_are_known_to_the_package(bench):
    known = {*STARTS, "scratch", None}
    for method in bench.methods.METHODS.values():
        assert method["initializer"] in known
        check_losses(method["losses"])
    assert {bench.methods.REFERENCE, bench.methods.PAPER} < bench.methods.METHODS.keys()


def test_only_a_progressive_compression_has_sizes_on_its_way(bench, cell):
    widths = {
        name: [config.vision.hidden_size for config in bench.cells.configs(cell(name))]
        for name in bench.methods.METHODS
    }
    assert widths.pop("TinyCLIP, progressive") == [96, 32]
    assert all(found == [32] for found in widths.values())


def test_cells_of_other_settings_lie_elsewhere(bench, cell, tmp_path):
    made = [cell("MoPE"), cell("MoPE-CLIP"), cell("MoPE", "10 %"), cell("MoPE") | {"rate": 2e-3}]
    assert len({bench.cells.cell_file(tmp_path, of_method) for of_method in made}) == len(made)
    assert bench.cells.cell_file(tmp_path, made[0]).name.startswith("1-MoPE-seed-0-")


def test_trials_of_a_size_are_equally_long_for_all_methods(bench):
    arguments = argparse.Namespace(steps=250, batch_size=128)
    for size, shape in bench.methods.SIZES.items():
        trials = [
            bench.methods.make_cell(arguments, size, name, 1e-3, 0, validation=True) for name in bench.methods.METHODS
        ]
        assert {trial["steps"] for trial in trials} == {round(250 * shape["trial"])}


def write_log(folder, *lines: tuple[int, float, float | None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    keys = ("pairs", "seconds", "eval_mean_recall")
    rows = [{key: value for key, value in zip(keys, line, strict=True) if value is not None} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_pairs_of_all_stages_count_and_recall_of_the_last_size_does(bench, tmp_path):
    write_log(tmp_path / "1" / "mapped", (0, 0.0, 0.05))
    write_log(tmp_path / "1", (100, 3.0, 0.5))
    write_log(tmp_path / "mapped", (40, 1.0, None), (40, 1.0, 0.1))
    write_log(tmp_path, (50, 2.0, 0.2), (60, 2.5, 0.3))
    curve, seconds = bench.cells._read(tmp_path, before=1)
    assert [(point["pairs"], point["mean_recall"]) for point in curve] == [(140, 0.1), (190, 0.2), (200, 0.3)]
    assert seconds == 6.5


def result(seed: int, *recalls: float) -> dict:
    """A cell's result whose recalls are all equal at each point of its way."""
    names = [f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    curve = [{"pairs": 100 * index} | dict.fromkeys(names, recall) for index, recall in enumerate(recalls)]
    cell = {"seed": seed, "rate": 1e-3, "method": {"losses": {"affinity": 1.0, "feature": 500.0}}}
    return {"cell": cell, "curve": curve, "recall": curve[-1], "seconds": 2.0, "parameters": 10**6, "macs": 10**7}


def test_a_report_makes_no_cells(bench, cell, monkeypatch, tmp_path):
    path = bench.cells.cell_file(tmp_path, cell("MoPE"))
    path.parent.mkdir()
    path.write_text(json.dumps(result(0, 0.1, 0.2)))
    (tmp_path / "tuned.json").write_text('{"1 %": {"MoPE": 0.001, "CLIP-Map": 0.001}}')
    monkeypatch.setattr(sys, "argv", ["methods.py", "--output_dir", str(tmp_path), "--report_only"])
    bench.methods.main()
    assert json.loads((tmp_path / "results.json").read_text()) == [result(0, 0.1, 0.2)]
    assert list(path.parent.iterdir()) == [path]


def test_a_row_says_when_the_reference_is_reached(bench):
    reference = [result(0, 0.0, 0.1, 0.2), result(1, 0.0, 0.1, 0.4)]
    row = bench.report.method_row("ours", [result(0, 0.1, 0.3, 0.5), result(1, 0.2, 0.4, 0.6)], reference)
    assert row["pairs to manual's R@5"] == "75 ± 35"  # 50 and 100
    assert row["R@1"] == "55.0 ± 7.1 / 55.0 ± 7.1" and row["loss"] == "affinity + 500 feature"


def test_a_claim_is_judged_seed_by_seed(bench):
    row = bench.report.claim_row("1 %", [result(0, 0.2), result(1, 0.1)], [result(1, 0.2), result(0, 0.1)])
    assert row["gain in R@5"] == "0.00 ± 14.14" and row["seeds ahead, R@5"] == "1 of 2"

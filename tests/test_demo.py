"""The embedded example and the demo's report."""

import json

import datasets
import pytest
import torch
from datasets import Dataset
from PIL import Image

from clipmap_hf.config import ClipMapConfig, TowerConfig
from clipmap_hf.data.arguments import CalibrationArguments, DataArguments
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.demo import TEACHER, TEST_PAIRS, TRAIN_PAIRS
from clipmap_hf.demo.arguments import ContestArguments
from clipmap_hf.demo.charts import Series, bars, learning_curves
from clipmap_hf.demo.contest import Contest
from clipmap_hf.demo.page import retrieval_page
from clipmap_hf.demo.report import Contestant, Report, learning_curve
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.models.loading import load_model, load_processor
from clipmap_hf.models.model_id import ModelId
from clipmap_hf.pipeline.context import RunContext
from clipmap_hf.training.arguments import DistillationStageArguments
from clipmap_hf.training.run_arguments import RunArguments


def test_embedded_files_fit_in_25_megabytes():
    files = [path for path in TEACHER.parent.rglob("*") if path.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 25e6


def test_test_style_is_not_among_the_training_styles():
    train, test = (
        set(load_pairs(str(path), caption_columns=["style"])["style"]) for path in (TRAIN_PAIRS, TEST_PAIRS)
    )
    assert train == {"noto", "noto-v1", "fxemoji", "fluent-emoji", "fluent-emoji-flat", "emojione"}
    assert test == {"twemoji"}


def test_embedded_teacher_finds_captions_of_an_unseen_style():
    model, processor = load_model(str(TEACHER)), load_processor(str(TEACHER))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    pairs = load_pairs(str(TEST_PAIRS)).select(range(0, 1911, 8))
    collate = PairCollator(processor.tokenizer, processor.image_processor)
    recall = evaluate_retrieval(model, [collate([pairs[i] for i in range(len(pairs))])])
    # Among 239 pairs chance is 4 %; the bound is far below what the full set's README says and far above chance.
    assert min(recall["image_to_text_recall@10"], recall["text_to_image_recall@10"]) > 0.5


REST = {"lead": ["a<b"], "charts": ("<svg></svg>", '<div class="bars"></div>'), "table": [["model", "c<d"]]}


def test_page_marks_the_right_results_and_escapes_captions():
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    good, bad = torch.eye(3), torch.eye(3).roll(1, 0)
    page = retrieval_page(images, ["red", "blue", "<green>"], {"right": (good, good)}, picks=[0, 2], **REST, k=1)
    assert page.count('<li class="right">') == 2 and page.count('<img class="right"') == 2
    assert "&lt;green&gt;" in page and "<green>" not in page and "a&lt;b" in page and "c&lt;d" in page
    wrong = retrieval_page(images, ["r", "b", "g"], {"wrong": (good, bad)}, picks=[0], **REST, k=1)
    assert 'class="right"' not in wrong.split("<article")[1]


def test_page_shows_pictures_then_the_curve_then_sizes_then_the_table(report):
    page = report[1]["index.html"]
    found = [page.index(element) for element in ("<article", "<svg", '<div class="bars"', "<table")]
    assert found == sorted(found)


def test_page_needs_no_other_file_and_fits_a_phone_and_the_dark(report):
    page = report[1]["index.html"]
    assert "http" not in page and "<script" not in page and "<link" not in page and "url(" not in page
    assert page.count("<img") == page.count('src="data:image/png;base64,')
    assert '<meta name="viewport" content="width=device-width' in page and "prefers-color-scheme: dark" in page


@pytest.fixture
def report(tiny_teacher, tiny_processor, pairs_parquet, tmp_path) -> tuple[list[str], dict]:
    """The printed lines, and the written files."""
    data = DataArguments(train_data=str(pairs_parquet), eval_data=str(pairs_parquet))
    curve = [(32, 0.25), (64, 0.5)]
    contestants = {
        "teacher": Contestant(tiny_teacher),
        "start": Contestant(tiny_teacher, pairs=8, seconds=1.0),
        "student": Contestant(tiny_teacher, pairs=64, seconds=2.0, curve=curve, after="start"),
    }
    report = Report(tmp_path, list(contestants), data, tiny_processor)
    rows = [report.header, *(report.add(name, contestant) for name, contestant in contestants.items())]
    assert report.write(["teacher", "student"]) == tmp_path / "index.html"
    return rows, {name: (tmp_path / name).read_text() for name in ("results.json", "results.md", "index.html")}


def test_report_writes_the_rows_that_it_gave_one_by_one(report):
    rows, files = report
    assert files["results.md"].strip() == "\n".join(rows)
    assert len({len(line) for row in rows for line in row.splitlines()}) == 1  # columns keep their widths
    results = json.loads(files["results.json"])
    assert list(results) == ["teacher", "start", "student"]
    assert results["student"]["training_pairs"] == 64 and results["teacher"]["training_pairs"] is None
    assert 0 <= results["student"]["image_to_text_recall@1"] <= results["student"]["image_to_text_recall@10"] <= 1
    assert f"{100 * results['student']['image_to_text_recall@10']:.1f}" in rows[-1]


def test_the_line_of_a_student_begins_where_its_start_is(report):
    page = report[1]["index.html"]
    assert page.count("<polyline") == 1  # the start has none of its own
    assert page.count("<circle") == 3  # the start, and two evaluations, of which the last is the table's


def test_a_learning_curve_counts_the_pairs_seen_before(tmp_path):
    recalls = {"eval_image_to_text_recall@10": 0.2, "eval_text_to_image_recall@10": 0.4, "eval_mean_recall": 0.1}
    lines = [{"pairs": 8, "loss": 1.0}, {"pairs": 8, **recalls}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert learning_curve(tmp_path, seen=100) == [(108, pytest.approx(0.3))]


def test_charts_are_drawn_to_scale_and_escape_names():
    drawing = learning_curves([Series("a<b", [(500, 0.2), (1000, 0.4)])], {"te<acher": 0.6})
    middle, end = (tuple(map(float, point.split(","))) for point in drawing.split('points="')[1].split('"')[0].split())
    level = float(drawing.split('class="level"')[1].split('y1="')[1].split('"')[0])
    zero = 2 * middle[1] - end[1]  # 0.2 lies halfway between 0 and 0.4
    assert zero - level == pytest.approx(1.5 * (zero - end[1]), abs=0.2)
    assert "a&lt;b" in drawing and "te&lt;acher" in drawing and "<b" not in drawing
    drawn = bars(["<one>", "two"], {"MB": [4.0, 1.0]})
    assert "* 1.0000)" in drawn and "* 0.2500)" in drawn and "&lt;one&gt;" in drawn


def test_what_the_contest_cannot_do_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"methods=\['magic'\] are unknown; choose from \['calibrated', "):
        ContestArguments(methods=["magic", "manual"])
    with pytest.raises(ValueError, match="views"):
        ContestArguments(views=0)


def test_too_few_pairs_for_a_student_are_an_error_before_it_is_trained(teacher_folder, pairs_parquet, tmp_path):
    context = RunContext(RunArguments(str(tmp_path)), DataArguments(str(pairs_parquet)))
    teacher, size = context.teacher(ModelId(str(teacher_folder))), ClipMapConfig(TowerConfig(32), TowerConfig(16))
    arguments, stages = ContestArguments(["manual"], pairs=15), {"manual": DistillationStageArguments(batch_size=16)}
    contest = Contest(teacher, size, CalibrationArguments(), arguments, stages, context).contestants()
    assert next(contest)[0] == "teacher"
    with pytest.raises(ValueError, match="Of pairs=15, 0 were seen before 'manual', which leaves no batch of 16"):
        next(contest)


def test_a_report_of_pairs_that_repeat_an_image_counts_it_once(tiny_teacher, tiny_processor, tiny_pairs, tmp_path):
    rows = [*tiny_pairs[:8], {**tiny_pairs[0], "caption": "another"}]
    columns = {name: [row[name] for row in rows] for name in ("image", "caption")}
    path = str(tmp_path / "pairs.parquet")
    Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(path)
    report = Report(tmp_path, ["teacher"], DataArguments(path, eval_data=path), tiny_processor)
    report.add("teacher", Contestant(tiny_teacher))
    report.write(["teacher"])
    results = json.loads((tmp_path / "results.json").read_text())["teacher"]
    expected = evaluate_retrieval(tiny_teacher, path, processor=tiny_processor)
    assert {name: results[name] for name in expected if name != "mean_recall"} == {
        name: value for name, value in expected.items() if name != "mean_recall"
    }

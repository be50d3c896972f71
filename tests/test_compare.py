import json
import shutil

import pytest

from clipmap_hf.costs import compare
from clipmap_hf.costs.compare import Contender, Measured, contenders, measure
from clipmap_hf.costs.compare_report import quality_plot, write_comparison
from clipmap_hf.costs.cost import model_cost
from clipmap_hf.costs.memory import PeakMemory
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.pairs import load_pairs
from clipmap_hf.evaluation.retrieval import evaluate_retrieval
from clipmap_hf.models.loading import load_config


@pytest.fixture
def with_export(teacher_folder, tmp_path):
    """A folder whose `onnx/` holds files of the right names."""
    folder = shutil.copytree(teacher_folder, tmp_path / "student")
    (folder / "onnx").mkdir()
    for name in ("vision_model.onnx", "text_model.onnx"):
        (folder / "onnx" / name).touch()
    return folder


def test_each_runtime_that_finds_files_is_a_row(teacher_folder, with_export):
    rows = contenders([str(teacher_folder), str(with_export)], ["transformers", "onnx"])
    assert rows == {
        teacher_folder.name: Contender(teacher_folder, "transformers"),
        "student": Contender(with_export, "transformers"),
        "student (onnx)": Contender(with_export, "onnx"),
    }


def test_models_of_one_name_are_told_apart_by_their_paths(teacher_folder, tmp_path):
    models = [str(shutil.copytree(teacher_folder, tmp_path / parent / "student")) for parent in ("a", "b")]
    assert list(contenders(models)) == models
    with pytest.raises(ValueError, match="named twice"):
        contenders([models[0], models[0]])


def test_what_cannot_be_run_is_said_before_anything_is_measured(teacher_folder, with_export):
    with pytest.raises(ValueError, match=r"Unknown runtimes \['tensorrt'\]; allowed are \['transformers', 'onnx'"):
        contenders([str(teacher_folder)], ["tensorrt"])
    with pytest.raises(ValueError, match=r"can be run by \['onnx_int8'\]: there must be .*vision_model_int8.onnx"):
        contenders([str(with_export)], ["transformers", "onnx_int8"])
    with pytest.raises(ValueError, match=r"holds no weights that can be run; looked for .*onnx/text_model.onnx"):
        contenders([str(teacher_folder)], ["onnx"])
    with pytest.raises(OSError, match="There is no file or folder '/nowhere'"):
        contenders(["/nowhere"])


def test_a_row_holds_quality_cost_times_and_memory(
    teacher_folder, tiny_teacher, pairs_parquet, tiny_processor, monkeypatch
):
    memory = PeakMemory(300, 100)
    monkeypatch.setattr(compare, "peak_memory", lambda *given: memory if given[2:] == (2, "cpu") else given)
    collate = PairCollator(tiny_processor.tokenizer, tiny_processor.image_processor)
    batches = [collate(load_pairs(str(pairs_parquet)).to_list())]
    rows = contenders([str(teacher_folder)])
    measured = measure(rows, lambda _: batches, rounds=2, batch_sizes=(1, 2))[teacher_folder.name]
    assert measured.recall == evaluate_retrieval(tiny_teacher, batches)
    assert measured.cost == model_cost(load_config(str(teacher_folder))) and measured.memory == memory
    assert measured.file_bytes == (teacher_folder / "model.safetensors").stat().st_size
    assert set(measured.milliseconds) == {(tower, size) for tower in ("vision", "text") for size in (1, 2)}
    assert all(len(times) == 2 and min(times) > 0 for times in measured.milliseconds.values())


def row(tiny_config, factor: float) -> Measured:
    """A model of which everything is `factor` times as much."""
    recall = {f"{way}_recall@{k}": 0.2 * factor for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    times = {
        (tower, size): [factor * size * one for one in (10.0, 20.0, 60.0)]
        for tower in ("vision", "text")
        for size in (1, 32)
    }
    memory = PeakMemory(int(500e6 * factor), int(200e6))
    return Measured(
        recall | {"mean_recall": 0.2 * factor}, model_cost(tiny_config()), int(4e6 * factor), times, memory
    )


@pytest.fixture
def report(tiny_config, tmp_path):
    rows = {"teacher": row(tiny_config, 1.0), "a<b": row(tiny_config, 0.5)}
    return write_comparison(tmp_path / "out", rows, "pairs.parquet", "cpu"), tmp_path / "out"


def test_the_table_has_a_row_for_each_model(report):
    markdown, folder = report
    header, _, teacher, student = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()[:4]
    )
    first, second = (dict(zip(header, cells, strict=True)) for cells in (teacher, student))
    assert first["R@1 i→t / t→i"] == "20.0 / 20.0" and second["mean recall"] == "10.0"
    assert first["weight files (MB)"] == "4.00" and second["weight files (MB)"] == "2.00"
    assert first["pairs/s at batch 1"] == "25.0 (1.00×)"  # 20 ms for an image, and as many for a text
    assert second["pairs/s at batch 32"] == "50.0 (2.00×)"
    assert (second["peak memory (MB)"], second["without libraries"]) == ("250", "50")
    last = [cell.strip() for cell in markdown.splitlines()[-3].strip("|").split("|")]
    assert last[:5] == ["a<b", "32", "320.00", "240.00 – 640.00", "100.0"]
    assert (folder / "results.md").read_text().strip() == markdown


def test_results_are_json_with_their_conditions(report):
    results = json.loads((report[1] / "results.json").read_text())
    assert results["conditions"].keys() == {"pairs", "device", "threads", "torch", "transformers"}
    student = results["models"]["a<b"]
    assert student["milliseconds"][0] == {
        "tower": "vision",
        "batch_size": 1,
        "median": 10.0,
        "lower": 7.5,
        "upper": 20.0,
        "rounds": [5.0, 10.0, 30.0],
    }
    assert student["file_bytes"] == 2e6 and student["peak_memory_bytes"] == 250e6


def test_the_page_holds_the_picture_and_needs_nothing_else(report):
    page = (report[1] / "index.html").read_text()
    assert 'src="data:image/png;base64,iVBOR' in page and "a&lt;b" in page and "a<b" not in page
    assert "http" not in page and "<script" not in page
    assert (report[1] / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_every_model(tiny_config, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *_, **options: drawn.append((options["label"], x, y)))
    quality_plot({"teacher": row(tiny_config, 1.0), "student": row(tiny_config, 0.5)})
    assert len(drawn) == 8 and {name for name, *_ in drawn} == {"teacher", "student"}
    assert ("student", 2.0, 10.0) in drawn and ("teacher", 40.0, 20.0) in drawn  # MB, ms of a pair, percent

"""Several processes do what one does. What is measured stands in distributed_checks.py, one launch for all of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from conftest import COLORS, SHAPES
from distributed_checks import BATCH, CASES, STAGES, STARTS, STEPS
from distributed_processes import RECIPES, command, environment, finish
from filelock import FileLock
from safetensors.torch import load_file
from set_folders import rows_for, write_set

from clipmap_hf.evaluation.sets import EVAL_SETS
from clipmap_hf.teacher_cache.lookup import TeacherCache


pytestmark = pytest.mark.distributed
CHECKS = Path(__file__).parent / "distributed_checks.py"
each_stage = pytest.mark.parametrize("stage", STAGES)
each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder that pytest's own processes share, so that each launch takes place once."""
    root = tmp_path_factory.getbasetemp()
    return (root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root) / "distributed"


@pytest.fixture(scope="session")
def workshop(folder, tiny_pairs, shared_teacher, tiny_processor) -> Path:
    """What distributed_checks.py reads."""
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return folder
        folder.mkdir()
        shared_teacher.save_pretrained(folder / "teacher")
        tiny_processor.save_pretrained(folder / "teacher")
        rows = datasets.Dataset.from_dict({name: [row[name] for row in tiny_pairs] for name in ("image", "caption")})
        rows = rows.cast_column("image", datasets.Image()).cast_column("image", datasets.Image(decode=False))
        broken = rows.map(lambda row, index: row | {"image": None} if index % 5 == 0 else row, with_indices=True)
        captions = [[row["caption"], *row["keywords"][: index % 3]] for index, row in enumerate(tiny_pairs[:21])]
        files = {
            "pairs": rows,
            "bad": broken,
            "odd": rows.select(range(23)),
            "one": rows.select(range(1)),
            "captions": rows.select(range(21)).remove_columns("caption").add_column("caption", captions),
        }
        for name, table in files.items():
            table.to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="session")
def reports(workshop) -> dict[int, dict]:
    """The report of one process and that of two."""
    for processes in (1, 2):
        file = workshop / f"report-{processes}.pt"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                finish(CHECKS, workshop, file, processes=processes)
    return {processes: torch.load(workshop / f"report-{processes}.pt") for processes in (1, 2)}


def test_the_reports_are_of_one_process_and_of_two(reports):
    assert {count: report["processes"] for count, report in reports.items()} == {1: 1, 2: 2}


# Exchanges of tensors


def test_gather_puts_unequal_numbers_of_rows_in_the_order_of_ranks(reports):
    for report in reports.values():
        assert report["gathered"]["rows"].tolist() == list(range(8))
        assert report["gathered"]["rest"].tolist() == [0, 1, 2]


def test_the_gradient_through_gather_is_that_of_one_process(reports):
    one, two = (reports[count]["gathered"] for count in (1, 2))
    for name in ("weight", "scale"):
        torch.testing.assert_close(two[name], one[name], atol=0, rtol=1e-12)


def test_average_gradients_leaves_values_and_averages_gradients(reports):
    one, two = (reports[count]["averaged"] for count in (1, 2))
    for name, factor in (("values", 1), ("first", 1.5), ("second", 1.5)):  # the mean of one and two times the loss
        torch.testing.assert_close(two[name], factor * one[name], atol=0, rtol=1e-6)


# Starts


def assert_same_weights(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, weight in expected.items():
        if not name.endswith("k_proj.bias"):  # adds the same to all scores of a query
            assert (given[name] - weight).norm() <= tolerance * weight.norm(), name


@pytest.mark.parametrize("name", ["mapped", "refitted", "importance", "within a budget"])
def test_two_processes_start_the_student_that_one_does(reports, name):
    one, two = (reports[count]["started"][name] for count in (1, 2))
    assert one["batches"] == [[11, 11, 1]] and two["batches"] == [[11, 1], [11]]
    assert_same_weights(two["weights"], one["weights"], 1e-4)


def test_gradient_steps_take_the_mean_gradient_of_all_processes(reports):
    """It is that of one process, if both have the same pairs."""
    one, two = (reports[count]["started"]["the same pairs in steps"]["weights"] for count in (1, 2))
    assert_same_weights(two, one, 1e-4)
    unlike = reports[2]["started"]["refitted in steps"]["weights"]
    with pytest.raises(AssertionError):
        assert_same_weights(unlike, one, 1e-4)


@pytest.mark.parametrize("name", STARTS)
def test_every_process_starts_from_the_same_bits(reports, name):
    assert reports[2]["started"][name]["equal"]


# Training


@each_case
@each_stage
def test_two_processes_log_what_one_does(reports, stage, case):
    one, two = (reports[count]["trained"][stage, case]["log"] for count in (1, 2))
    assert len(one) == len(two) == STEPS
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys() and {"loss", "grad_norm", "logit_scale"} <= left.keys()
        for name in left.keys() - {"seconds", "bad_rows", "stage"}:
            assert right[name] == pytest.approx(left[name], rel=1e-5), name
        assert right["bad_rows"] == left["bad_rows"]


@each_case
@each_stage
def test_two_processes_train_the_weights_that_one_does(reports, stage, case):
    one, two = (reports[count]["trained"][stage, case]["weights"] for count in (1, 2))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        # A key's bias adds the same to all scores of a query. Its gradient is rounding noise, of which AdamW makes
        # whole steps, in one process others than in two; no output changes by them.
        if not name.endswith("k_proj.bias"):
            assert (two[name] - weight).norm() <= 1e-5 * weight.norm(), name


@each_stage
def test_the_comparison_sees_a_step(reports, stage):
    """Weights that were trained on other rows differ by far more than what the comparison allows."""
    one, other = (reports[1]["trained"][stage, case]["weights"] for case in (list(CASES)[0], list(CASES)[-1]))
    far = [name for name, weight in one.items() if (other[name] - weight).norm() > 1e-4 * weight.norm()]
    assert len(far) > len(one) / 2


@each_case
@each_stage
def test_every_process_holds_the_same_bits_in_the_end(reports, stage, case):
    assert reports[2]["trained"][stage, case]["equal"]


@each_stage
def test_bad_rows_leave_the_processes_unequal_shares(reports, stage):
    """Or the cases above would not show what they are there for."""
    for case, (micro, _, data) in CASES.items():
        first, second = reports[2]["trained"][stage, case]["rows"]
        totals = [(sum(left), sum(right)) for left, right in zip(first, second, strict=True)]
        assert any(left != right for left, right in totals) == (data == "bad")
        if micro:
            chunks = [len(chunks) for chunks in (*first, *second)]
            assert max(chunks) == BATCH // 2 // micro
        assert [sum(step) for step in reports[1]["trained"][stage, case]["rows"][0]] == [sum(pair) for pair in totals]


@each_case
def test_mapping_sends_gradients_of_the_students_size_and_no_teacher(reports, case):
    report = reports[2]["trained"]["mapping", case]
    sent = report["sent"]
    trained = report["student_bytes"] - (0 if CASES[case][1] else 4)  # a scale that is not learned has no gradient
    assert sent["all_reduce"] == STEPS * trained
    assert sent.keys() == {"all_reduce", "all_gather"}
    assert sent["all_gather"] < STEPS * 10_000  # embeddings, token ids, counts
    assert sum(sent.values()) / STEPS < report["teacher_bytes"] / 3
    assert "reduced_by_ddp" not in report


@pytest.mark.parametrize("stage", ["contrastive", "distillation", "cached"])
def test_the_other_stages_send_the_student_and_no_teacher(reports, stage):
    for case in CASES:
        report = reports[2]["trained"][stage, case]
        size = report["student_bytes"]
        assert report["reduced_by_ddp"] == size - (0 if CASES[case][1] else 4)  # per step
        assert report["sent"]["_broadcast_coalesced"] <= size + 1000  # once, at the start; buffers with it
        assert report["sent"]["all_gather"] < STEPS * 10_000
        assert sum(report["sent"].values()) < report["teacher_bytes"] / 2


# Evaluation and recipes


@pytest.mark.parametrize("name", ["pairs", "odd", "captions"])
def test_two_processes_evaluate_as_one_does(reports, name):
    one, two = (reports[count]["evaluated"][name] for count in (1, 2))
    assert one == pytest.approx(two, abs=1e-6)
    assert 0 < one["mean_recall"] < 1


def test_fewer_evaluation_pairs_than_processes_are_refused(reports):
    assert reports[1]["evaluated"]["one"] is None
    assert "has 1 pairs, fewer than the 2 processes" in reports[2]["evaluated"]["one"]


@pytest.fixture(scope="module")
def results_of_sets(workshop, tmp_path_factory) -> dict[int, dict]:
    """What evaluate.py finds on three sets, in one process and in two; of 23 images, they have 11 and 12."""
    folder, found = tmp_path_factory.mktemp("sets"), {}
    for name in ("cifar10", "voc2007", "flickr30k"):
        eval_set = EVAL_SETS[name]
        write_set(folder / eval_set.folder, rows_for(eval_set.task, 23), eval_set.task, shards=3)
    for processes in (1, 2):
        output = folder / f"results-{processes}"
        argv = ("--model", workshop / "teacher", "--sets", "cifar10", "voc2007,flickr30k", "--batch_size", 8)
        finish(RECIPES / "evaluate.py", *argv, "--sets_dir", folder, "--output", output, processes=processes)
        found[processes] = {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}
    return found


@pytest.mark.parametrize("name", ["cifar10", "voc2007", "flickr30k"])
def test_two_processes_score_a_set_as_one_does(results_of_sets, name):
    one, two = (results_of_sets[count][name] for count in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["images"] == two["images"] == (6 if name == "flickr30k" else 23)
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-6)
    assert two["settings"] == one["settings"]
    assert results_of_sets[2]["summary"][name] == two["metrics"]


def test_two_processes_classify_labeled_images_as_one_does(workshop, tmp_path):
    metrics = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.json"
        argv = ("--model", workshop / "teacher", "--eval_data", workshop / "odd.parquet", "--label_column", "caption")
        finish(RECIPES / "evaluate.py", *argv, "--output", output, processes=processes)
        metrics.append(json.loads(output.read_text())["metrics"])
    assert metrics[1] == pytest.approx(metrics[0], abs=1e-6)


def test_two_processes_make_the_student_for_labels_that_one_does(workshop, tmp_path):
    (tmp_path / "names.txt").write_text("red circle\nblue bar\na dog\n")
    for processes in (1, 2):
        argv = ["--teacher", workshop / "teacher", "--vision_hidden_size", 32, "--initializer", "diagonal"]
        argv += ["--train_data", workshop / "pairs.parquet", "--labels", tmp_path / "names.txt"]
        argv += ["--distillation_steps", 3, "--distillation_batch_size", 8, "--distillation_losses", "labels=1"]
        argv += ["--distillation_learning_rate", 1e-3, "--output_dir", tmp_path / str(processes)]
        finish(RECIPES / "compress.py", *argv, processes=processes)
    one, two = (load_file(tmp_path / str(processes) / "model.safetensors") for processes in (1, 2))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)


def test_a_cache_of_two_processes_answers_as_that_of_one(reports, workshop):
    one, two = (TeacherCache.open(workshop / f"recipes-{count}" / "cache") for count in (1, 2))
    assert one.views == two.views == 2
    summaries = [
        json.loads((workshop / f"recipes-{count}" / "cache" / "summary.json").read_text()) for count in (1, 2)
    ]
    assert summaries[0]["rows"] == summaries[1]["rows"] == 23
    assert len(summaries[0]["blocks"]) == 1 and len(summaries[1]["blocks"]) == 2
    keys = [load_file(workshop / f"recipes-{count}" / "cache" / "index.safetensors") for count in (1, 2)]
    for kind in ("image", "text"):
        assert torch.equal(keys[0][f"{kind}_keys"], keys[1][f"{kind}_keys"])


def test_recipes_of_two_processes_end_where_those_of_one_do(reports, workshop):
    for name in ("mapped", "student"):
        one, two = (load_file(workshop / f"recipes-{count}" / name / "model.safetensors") for count in (1, 2))
        for key, weight in one.items():
            if not key.endswith("k_proj.bias"):
                # the distillation's teacher is a cache in half precision, in which rounding may end a unit apart
                assert (two[key] - weight).norm() <= (1e-5 if name == "mapped" else 1e-3) * weight.norm(), key
    one, two = (json.loads((workshop / f"recipes-{count}" / "results.json").read_text()) for count in (1, 2))
    assert one["metrics"].keys() == two["metrics"].keys()
    assert one["metrics"]["mean_recall"] == pytest.approx(two["metrics"]["mean_recall"], abs=0.05)


def test_two_processes_without_pairs_end_with_the_start_as_one_does(workshop, tmp_path):
    (tmp_path / "queries.txt").write_text("\n".join(f"{color} {shape}" for color in COLORS for shape in SHAPES))
    argv = ["--teacher", workshop / "teacher", "--train_data", workshop / "odd.parquet", "--initializer", "diagonal"]
    argv += ["--vision_hidden_size", 32, "--vision_num_hidden_layers", 2, "--text_hidden_size", 16]
    argv += ["--train_texts", tmp_path / "queries.txt", "--validation_fraction", 0.3, "--distillation_losses"]
    argv += ["feature=2000", "--distillation_learning_rate", 10, "--distillation_warmup_steps", 0]
    argv += ["--distillation_steps", 4, "--distillation_batch_size", 8, "--metric_for_best_model", "text_neighbors"]
    outputs, logs = [tmp_path / str(processes) for processes in (1, 2)], []
    for processes, output in enumerate(outputs, 1):
        finish(RECIPES / "compress.py", *argv, "--output_dir", output, processes=processes)
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        logs.append([line for line in lines if "eval_decisions" in line])
    one, two = ({name: log[0][name] for name in log[0] if name.startswith("eval_")} for log in logs)
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == [0, 4]
    assert two == pytest.approx(one, abs=1e-6)
    assert_same_weights(*(load_file(output / "model.safetensors") for output in outputs), 0.0)
    assert all("the weights are those of the start" in (output / "README.md").read_text() for output in outputs)


def test_two_processes_measure_agreement_beside_recall_as_one_does(workshop, tmp_path):
    argv = ["--teacher", workshop / "teacher", "--student_model", workshop / "teacher", "--train_data"]
    argv += [workshop / "odd.parquet", "--eval_data", workshop / "captions.parquet", "--distillation_batch_size", 8]
    argv += ["--distillation_steps", 1, "--distillation_learning_rate", 1e-2, "--distillation_warmup_steps", 0]
    found = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        finish(RECIPES / "distill.py", *argv, "--output_dir", output, processes=processes)
        line = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
        found.append({name: value for name, value in line.items() if name.startswith("eval_")})
    assert found[1] == pytest.approx(found[0], abs=1e-4) and found[0]["eval_mean_agreement"] < 1


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1)], ids=["one to two", "two to one"])
@pytest.mark.parametrize("recipe", ["map.py", "mask.py"])
def test_a_run_is_gone_on_with_by_another_number_of_processes(workshop, tmp_path, recipe, numbers):
    stage = {"map.py": "mapping", "mask.py": "masking"}[recipe]
    output = tmp_path / "out"
    argv = ["--teacher", workshop / "teacher", "--train_data", workshop / "pairs.parquet", "--output_dir", output]
    argv += ["--vision_hidden_size", 32, "--vision_num_hidden_layers", 2, "--text_hidden_size", 16]
    argv += [f"--{stage}_steps", 4, f"--{stage}_batch_size", 8, f"--{stage}_learning_rate", 1e-4]
    argv += ["--checkpoint_every", 2, "--log_every", 1]
    argv += ["--initializer", "diagonal"] if recipe == "map.py" else []
    finish(RECIPES / recipe, *argv, processes=numbers[0])
    whole, log = load_file(output / "model.safetensors"), (output / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(output / "checkpoints" / "step-00000004")  # so that the run goes on from its second step
    finish(RECIPES / recipe, *argv, processes=numbers[1])
    assert_same_weights(load_file(output / "model.safetensors"), whole, 1e-5)
    again = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in again] == [1, 2, 3, 4]
    assert again[:2] == log[:2] and again[2:] != log[2:]  # down to the seconds


# How processes end

ENDS = """
import atexit, os, sys
import torch.distributed as dist

def say():
    sys.stdout.write(f"group at the end of {os.environ['RANK']}: {dist.is_initialized()}\\n")  # at once

atexit.register(say)  # called after what is registered later
if sys.argv[1] == "own group":
    dist.init_process_group("gloo")
from clipmap_hf.distributed import gather, join_processes

join_processes(), join_processes()
import torch

gather(torch.ones(1))
if sys.argv[1] == "error" and os.environ["RANK"] == "1":
    raise RuntimeError("one of two")
sys.exit(0 if sys.argv[1] != "exit code" else 75)
"""


@pytest.fixture
def ended(tmp_path):
    """A function that lets two processes end in a way; their exit code, and whether each had a group to the end."""

    def run(way: str) -> tuple[int, list[str], str]:
        (tmp_path / "ends.py").write_text(ENDS)
        argv = command(tmp_path / "ends.py", way, processes=2)
        result = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=120)
        return result.returncode, sorted(re.findall(r"group at the end of (\d: \w+)", result.stdout)), result.stderr

    return run


@pytest.mark.parametrize("way", ["success", "exit code"])
def test_processes_leave_the_group_that_they_joined(ended, way):
    """What torch leaves to its destructors may abort a process whose work is done."""
    code, groups, errors = ended(way)
    assert (code == 0) == (way == "success"), errors
    if way == "success":
        assert groups == ["0: False", "1: False"]
    else:  # the launcher kills the other
        assert groups and set(groups) <= {"0: False", "1: False"}


def test_a_group_that_the_caller_made_is_the_callers(ended):
    code, groups, errors = ended("own group")
    assert code == 0 and groups == ["0: True", "1: True"], errors


def test_a_process_that_fails_waits_for_no_other(ended):
    """To leave a group of NCCL may need all; the launcher ends those that are left."""
    code, groups, errors = ended("error")
    assert code != 0 and "1: True" in groups and "one of two" in errors


# What goes wrong


def test_processes_that_accelerate_cannot_see_are_refused(workshop, tmp_path):
    argv = ("--model", workshop / "teacher", "--eval_data", workshop / "pairs.parquet", "--output", tmp_path / "out")
    result = subprocess.run(
        command(RECIPES / "evaluate.py", *argv, processes=2),
        env=environment(ACCELERATE_USE_CPU="false"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode != 0 and not (tmp_path / "out").exists()
    assert "2 processes were started, but Accelerate sees 1." in result.stderr
    assert "set ACCELERATE_USE_CPU=true" in result.stderr


STOPPED = re.compile(r"Stopped by SIGTERM at step (\d+)")


@pytest.fixture
def stopped(tmp_path):
    """A function that starts two processes, sends SIGTERM when the log has lines of `stage`, and waits for the end."""

    def run(argv: list, log: Path, stage: str, to: str) -> list[int]:
        """To `one` of the two processes or to their `launcher`; the steps at which they say that they stop."""
        errors = tmp_path / f"stopped-{to}.log"
        with errors.open("w") as file:
            launcher = subprocess.Popen(
                command(RECIPES / "compress.py", *argv, processes=2), env=environment(), stdout=file, stderr=file
            )
        try:
            deadline = time.monotonic() + 240
            while not (log.exists() and log.read_text().count(f'"stage": "{stage}"') >= 2):
                assert launcher.poll() is None and time.monotonic() < deadline, errors.read_text()[-4000:]
                time.sleep(0.02)
            workers = [one for one in psutil.Process(launcher.pid).children() if "compress.py" in one.cmdline()[2]]
            assert len(workers) == 2
            (launcher if to == "launcher" else workers[1]).send_signal(signal.SIGTERM)
            assert launcher.wait(timeout=120) != 0
        finally:
            launcher.kill()
        gone, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
        return [int(step) for step in STOPPED.findall(errors.read_text())]

    return run


def test_processes_that_are_terminated_stop_at_one_step_and_go_on_to_the_same_bits(stopped, workshop, tmp_path):
    sizes = ("--vision_hidden_size", 32, "--vision_num_hidden_layers", 2, "--text_hidden_size", 16)
    argv = ["--teacher", workshop / "teacher", "--train_data", workshop / "pairs.parquet", *sizes, "--log_every", 1]
    argv += ["--refit_steps", 3]
    for stage in ("mapping", "distillation"):
        argv += [f"--{stage}_steps", 150, f"--{stage}_batch_size", 8, f"--{stage}_learning_rate", 1e-3]
    straight, output = tmp_path / "straight", tmp_path / "stopped"
    argv += ["--checkpoint_every", 1000]
    finish(RECIPES / "compress.py", *argv, "--output_dir", straight, processes=2)

    argv += ["--output_dir", output]
    for stage, folder, to in (("mapping", output / "mapped", "one"), ("distillation", output, "launcher")):
        first, second = stopped(argv, folder / "metrics.jsonl", stage, to)
        assert first == second and 2 <= first < 150
        assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{first:08d}"]
        assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == first
    finish(RECIPES / "compress.py", *argv, processes=2)
    for name in ("mapped/map/clipmap.safetensors", "mapped/model.safetensors", "model.safetensors"):
        assert (output / name).read_bytes() == (straight / name).read_bytes(), name
    for folder in ("mapped", "."):
        lines = [[json.loads(one) for one in (run / folder / "metrics.jsonl").open()] for run in (straight, output)]
        assert [one | {"seconds": 0} for one in lines[0]] == [one | {"seconds": 0} for one in lines[1]]

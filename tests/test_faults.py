"""What goes wrong around a run: no place to write, a process that ends; it says so, ends, and loses nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from distributed_processes import RECIPES, environment
from distributed_runs import Run


pytestmark = pytest.mark.recipes
STEPS = 80
SIZES = ("--vision_hidden_size", 32, "--vision_num_hidden_layers", 2, "--text_hidden_size", 16, "--refit_steps", 3)
FILES = ("model.safetensors", "map/clipmap.safetensors")
# Raises in the loop, at its third step, while workers run.
# Runs a recipe that starts its own processes by the named method.
STARTING = """
import multiprocessing, runpy, sys
multiprocessing.set_start_method(sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FAILING = """
import runpy, sys
from clipmap_hf.training import trainer
rate = trainer.learning_rate_at
def failing(step, *numbers):
    if step == 2:
        raise RuntimeError("a mishap at step 2")
    return rate(step, *numbers)
trainer.learning_rate_at = failing
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def argv(teacher_folder, pairs_parquet) -> list:
    numbers = ("--mapping_steps", STEPS, "--mapping_batch_size", 8, "--mapping_learning_rate", 1e-3, "--log_every", 1)
    return ["--teacher", teacher_folder, *SIZES, "--train_data", pairs_parquet, *numbers, "--checkpoint_every", 20]


@pytest.fixture(scope="module")
def undisturbed(argv, place) -> Path:
    output = place / "undisturbed"
    assert Run("map.py", [*argv, "--output_dir", output], place / "undisturbed.log").wait() == 0
    return output


@pytest.fixture
def finishes_as(undisturbed, argv, place):
    """A function that runs the same once more and compares what comes out with the undisturbed run."""

    def check(output: Path) -> None:
        log = place / f"{output.name}.log"
        assert Run("map.py", [*argv, "--output_dir", output], log).wait() == 0, log.read_text()[-4000:]
        for name in FILES:
            assert (output / name).read_bytes() == (undisturbed / name).read_bytes(), name
        assert lines_of(output) == lines_of(undisturbed)

    return check


@pytest.fixture
def working(argv, place):
    """A function that starts a run, in a group of its own, and returns it and its workers when it has made steps."""
    started = []

    def start(output: Path, *more, workers: int = 2, method: str = "fork") -> tuple[subprocess.Popen, list, Path]:
        log = place / f"{output.name}.txt"
        own = ("--output_dir", output, "--num_workers", workers, *more)
        with log.open("w") as file:
            process = subprocess.Popen(
                list(map(str, [sys.executable, "-c", STARTING, method, RECIPES / "map.py", *argv, *own])),
                env=environment(),
                stderr=file,
                start_new_session=True,
            )
        started.append(process)
        wait_for(lambda: len(lines_of(output)) >= 3 or process.poll() is not None, 240)
        assert process.poll() is None, log.read_text()[-4000:]
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= workers
        return process, children, log

    yield start
    for process in started:
        process.kill()


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def lines_of(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) | {"seconds": 0} for line in lines]


def error_in(log: Path) -> str:
    """The last line that names an error; a progress bar may stand behind it."""
    return [line for line in log.read_text().splitlines() if line.partition(":")[0].endswith("Error")][-1]


def steps_of(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted((folder / "checkpoints").glob("step-*"))]


def running(argument: str) -> list:
    """The processes that have this argument."""
    return [one for one in psutil.process_iter(["cmdline"]) if argument in (one.info["cmdline"] or [])]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# No place to write


def test_a_file_in_place_of_the_output_folder_is_an_error_that_names_it(argv, place):
    blocked, log = place / "file", place / "file.log"
    blocked.write_text("kept")
    assert Run("map.py", [*argv, "--output_dir", blocked / "run"], log).wait() == 1
    error = error_in(log)
    assert str(blocked) in error and blocked.read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable to root")
def test_an_unwritable_output_folder_is_an_error_that_names_it(argv, place):
    closed, log = place / "closed", place / "closed.log"
    closed.mkdir(mode=0o500)
    assert Run("map.py", [*argv, "--output_dir", closed], log).wait() == 1
    assert str(closed) in error_in(log)


# Of the files of a checkpoint, the optimizer's is the largest and the model's next.
@pytest.mark.parametrize("file_size", [30_000, 400_000], ids=["model", "optimizer"])
def test_a_disk_that_is_full_at_a_checkpoint_leaves_the_last_one(argv, place, finishes_as, file_size):
    output = place / f"full-{file_size}"
    log = place / f"{output.name}.log"
    argv = [*argv, "--output_dir", output]
    killed = ("accelerate:Accelerator.save_state", "before", 2)
    assert Run("map.py", argv, log, kill=killed).wait() == -9
    before = contents(output / "checkpoints" / "step-00000020")
    sizes = sorted(len(content) for content in before.values())
    assert file_size < sizes[-1]
    log.unlink()
    assert Run("map.py", argv, log, file_size=file_size).wait() == 1
    error = error_in(log)
    assert error.startswith("OSError") and str(output / "checkpoints") in error and "make room" in error
    assert steps_of(output) == [20] and contents(output / "checkpoints" / "step-00000020") == before
    assert not list((output / "checkpoints").glob(".*"))
    finishes_as(output)
    steps = [line.split()[0] for line in (place / f"{output.name}.resumed").read_text().splitlines()]
    assert steps == ["0", "20", "20"]


def test_a_disk_that_is_full_when_the_student_is_saved_leaves_the_one_before(argv, place, finishes_as):
    output, log = place / "full-student", place / "full-student.log"
    assert Run("map.py", [*argv, "--output_dir", output], log).wait() == 0
    before = contents(output)
    assert Run("map.py", [*argv, "--output_dir", output], log, file_size=50_000).wait() == 1
    error = error_in(log)
    assert error.startswith("OSError") and str(output) in error and "make room" in error
    after = contents(output)
    assert {name for name in before if after.get(name) != before[name]} <= {"metrics.jsonl"}
    finishes_as(output)


# Processes that end


@pytest.mark.parametrize("whom", ["process", "group"])
def test_a_terminated_run_with_workers_leaves_a_checkpoint_and_no_process(working, finishes_as, place, whom):
    output = place / f"terminated-{whom}"
    process, workers, log = working(output)
    (os.kill if whom == "process" else os.killpg)(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 75, log.read_text()[-4000:]
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    (step,) = steps_of(output)[-1:]
    assert 3 <= step < STEPS and f"Stopped by SIGTERM at step {step}" in log.read_text()
    assert "Traceback" not in log.read_text()
    finishes_as(output)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_killed_run_leaves_no_process(working, place, method):
    process, workers, log = working(place / f"killed-{method}", method=method)
    process.kill()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_a_run_terminated_while_it_evaluates_with_workers_ends_as_well(working, pairs_parquet, place):
    """Its workers were started under the trainer's own answer to SIGTERM, and shall not wait for anything."""
    output = place / "terminated-evaluating"
    process, workers, log = working(output, "--eval_data", pairs_parquet, "--eval_every", 1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 75, log.read_text()[-4000:]
    assert steps_of(output)
    wait_for(lambda: not [one for one in workers if one.is_running() and one.status() != "zombie"], 10)


@pytest.mark.parametrize("source", ["map", "stream"])
def test_an_error_while_workers_run_ends_the_process(argv, place, pairs_tar, source):
    output, log = place / f"mishap-{source}", place / f"mishap-{source}.log"
    own = ["--output_dir", output, "--num_workers", 1]
    if source == "stream":
        own += ["--train_data", pairs_tar, "--image_column", "png", "--caption_column", "txt", "--streaming", "true"]
    started = [sys.executable, "-c", FAILING, RECIPES / "map.py", *argv, *own]
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, started)), env=environment(), stderr=file, start_new_session=True)
    try:
        assert process.wait(timeout=120) == 1
    finally:
        process.kill()
    assert "a mishap at step 2" in log.read_text()
    wait_for(lambda: not running(str(output)), 10)


def test_a_worker_that_is_killed_ends_the_run_with_an_error(working, place):
    process, workers, log = working(place / "without-worker")
    workers[0].kill()
    assert process.wait(timeout=60) == 1
    assert re.search(r"DataLoader worker .*(exited unexpectedly|is killed by signal)", log.read_text())
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive

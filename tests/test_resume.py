"""
Runs that are killed, anywhere, and started again by the same command end as if nothing had happened.

    pytest -m recipes -s tests/test_resume.py

prints every kill: which run, where, at which step it was taken up again, and whether the result has the same bits.
"""

import io
import json
import random
import tarfile
from pathlib import Path

import pytest
from distributed_runs import Run


pytestmark = pytest.mark.recipes
STEPS = 8
TIMED_KILLS = 5
SIZES = ("--vision_hidden_size", 32, "--vision_num_hidden_layers", 2, "--text_hidden_size", 16, "--refit_steps", 3)
# Where a run kills itself, one start after the other. Calls are counted anew each time.
DELIBERATE_KILLS = [
    ("os.replace", "before", 3),
    ("os.replace", "after", 4),
    ("os.fsync", "before", 14),
    ("os.fsync", "after", 21),
    ("torch.save", "before", 2),
    ("torch.save", "after", 3),
    ("shutil.rmtree", "before", 6),
    ("shutil.rmtree", "after", 7),
    ("accelerate:Accelerator.save_state", "before", 2),
    ("accelerate:Accelerator.save_state", "after", 1),
    ("pathlib:Path.write_text", "half", 1),
    ("pathlib:Path.write_text", "half", 2),
]
CACHE_KILLS = [("pathlib:Path.write_bytes", "half", 1), ("pathlib:Path.write_bytes", "half", 2)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def shards(tiny_pairs, place) -> str:
    """Four tars of six pairs."""
    for number in range(4):
        with tarfile.open(place / f"shard-{number}.tar", "w") as tar:
            for index, row in enumerate(tiny_pairs[number::4]):
                png = io.BytesIO()
                row["image"].save(png, "PNG")
                for extension, content in (("png", png.getvalue()), ("txt", row["caption"].encode())):
                    member = tarfile.TarInfo(f"{index:03d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(place / "shard-*.tar")


@pytest.fixture(scope="module")
def student_folder(teacher_folder, pairs_parquet, place) -> Path:
    """A student to distill."""
    argv = ["--teacher", teacher_folder, *SIZES, "--train_data", pairs_parquet, "--output_dir", place / "given"]
    assert Run("map.py", [*argv, "--mapping_steps", 0, "--mapping_batch_size", 8], place / "given.log").wait() == 0, (
        told(place / "given.log")
    )
    return place / "given"


@pytest.fixture(scope="module")
def recipes(teacher_folder, student_folder, pairs_parquet, shards, place) -> dict[str, tuple]:
    """Each run by its name: recipe, options, files of the result."""
    teacher = ("--teacher", teacher_folder)
    rows = ("--train_data", pairs_parquet, "--eval_data", pairs_parquet)
    tars = ("--train_data", shards, "--image_column", "png", "--caption_column", "txt", "--streaming", "true")
    common = ("--log_every", 1, "--checkpoint_every", 1, "--eval_every", 3)
    workers = ("--num_workers", 2)

    def steps(prefix: str, *more) -> tuple:
        numbers = {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 2}
        return (*(item for name, value in numbers.items() for item in (f"--{prefix}{name}", value)), *common, *more)

    distill = (*teacher, "--student_model", student_folder, *rows, *steps("distillation_"))
    mapped = ("model.safetensors", "config.json", "map/clipmap.safetensors", "best/model.safetensors")
    student = ("model.safetensors", "config.json", "best/model.safetensors")
    return {
        "pretrain": ("pretrain.py", ("--config_from", teacher_folder, *rows, *steps("")), student),
        "map": ("map.py", (*teacher, *SIZES, *rows, *steps("mapping_", "--mapping_micro_batch_size", 4)), mapped),
        "map, 2 workers": ("map.py", (*teacher, *SIZES, *rows, *steps("mapping_"), *workers), mapped),
        "map, streaming, 2 workers": (
            "map.py",
            (*teacher, *SIZES, *tars, *steps("mapping_"), *workers, "--shuffle_buffer", 4),
            mapped[:3],
        ),
        "distill": ("distill.py", distill, student),
        "distill, cached teacher": ("distill.py", (*distill, "--teacher_cache", "CACHE", "--views", 2), student),
        "ternarize": ("ternarize.py", (*teacher, *rows, *steps("ternary_", "--ternary_ramp_steps", 0.5)), student),
    }


@pytest.fixture(scope="module")
def uninterrupted(recipes, place):
    """A function that runs what it is named to its end; its folder, its processor seconds before and in training."""
    done = {}

    def run(name: str) -> tuple[Path, float, float]:
        if name not in done:
            recipe, argv, _ = recipes[name]
            output = place / f"{name} uninterrupted"
            run = Run(recipe, options(argv, output), place / f"{name}.log")
            assert run.wait() == 0, told(place / f"{name}.log")
            before = run.resumptions()[0][1]
            done[name] = output, before, float((place / f"{name}.seconds").read_text()) - before
        return done[name]

    return run


@pytest.fixture(scope="module")
def killed(recipes, place):
    """A function that runs what it is named, is told how to kill each start, and starts it until it is finished."""

    def run(name: str, kills: list, output: Path) -> list[int]:
        recipe, argv, _ = recipes[name]
        log, codes = place / f"{output.name}.log", []
        for kill in [*kills, None]:
            deliberate = kill if kill and isinstance(kill[0], str) else None
            one = Run(recipe, options(argv, output), log, kill=deliberate)
            code = one.kill_after(*kill) if kill and not deliberate else one.wait()
            assert code in (0, -9), told(log)
            codes.append(code)
            print(f"{name}: {begun(one)}, {killed_how(kill) if code else 'finished'}")
            if not code:
                break
        assert codes[-1] == 0
        return codes

    return run


def begun(run: Run) -> str:
    steps = [step for step, _ in run.resumptions()[run.known_resumptions :]]
    return f"taken up at step {steps[-1]}" if steps else "not as far as its training"


def killed_how(kill: tuple) -> str:
    if isinstance(kill[0], str):
        return f"killed {kill[1]} call {kill[2]} of {kill[0]}"
    return f"killed after {kill[0]:.2f} s {'of training' if kill[1] else 'from its start'}"


def options(argv: tuple, output: Path) -> list:
    cache = output.with_name(f"{output.name} cache")
    return [*(cache if one == "CACHE" else one for one in argv), "--output_dir", output]


def resumed_at(notes: Path) -> list[int]:
    return [int(line.split()[0]) for line in notes.read_text().splitlines()]


def told(log: Path) -> str:
    return log.read_text()[-4000:]


def log_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def check_same(expected: Path, output: Path, files: tuple[str, ...]) -> None:
    different = [name for name in files if (expected / name).read_bytes() != (output / name).read_bytes()]
    print(
        f"{output.name}: bit-equal to the uninterrupted run: {'no: ' + ', '.join(different) if different else 'yes'}"
    )
    assert not different
    assert log_of(output) == log_of(expected)
    assert len([line for line in log_of(output) if "loss" in line]) == STEPS
    left = {path.name for path in output.rglob(".*")} | {path.name for path in output.rglob("*.tmp")}
    assert not left, f"of the killed processes, {left} is left over"
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-00000007", "step-00000008"]


CASES = (
    *("pretrain", "map", "map, 2 workers", "map, streaming, 2 workers", "distill", "distill, cached teacher"),
    "ternarize",
)
each_case = pytest.mark.parametrize("name", CASES)


@each_case
def test_a_run_killed_at_random_times_ends_with_the_same_bits(uninterrupted, killed, recipes, place, name):
    expected, before, training = uninterrupted(name)
    rng = random.Random(name)
    kills = [(rng.uniform(0.3, 1) * before, False)]
    kills += [(rng.uniform(0.02, 0.4) * training, True) for _ in range(TIMED_KILLS)]
    output = place / f"{name} killed at random"
    assert killed(name, kills, output).count(-9) >= 3
    check_same(expected, output, recipes[name][2])


@each_case
def test_a_run_killed_while_it_writes_ends_with_the_same_bits(uninterrupted, killed, recipes, place, name):
    expected, _, _ = uninterrupted(name)
    output = place / f"{name} killed while writing"
    first = 2 * CASES.index(name)  # a run is finished before the list is, so each begins elsewhere
    kills = [*(CACHE_KILLS if "cached" in name else []), *DELIBERATE_KILLS[first:], *DELIBERATE_KILLS[:first]]
    assert killed(name, kills, output).count(-9) >= 5
    check_same(expected, output, recipes[name][2])


def test_a_damaged_checkpoint_is_left_for_the_one_before_it(uninterrupted, killed, recipes, place):
    expected, _, _ = uninterrupted("map")
    output = place / "map with damage"
    killed_at = ("accelerate:Accelerator.save_state", "before", 6)
    recipe, argv, files = recipes["map"]
    log = place / "damage.log"
    assert Run(recipe, options(argv, output), log, kill=killed_at).wait() == -9
    newest = output / "checkpoints" / "step-00000005"
    optimizer = newest / "optimizer.bin"
    optimizer.write_bytes(optimizer.read_bytes()[:1000])  # as after a crash of the machine
    killed("map", [("accelerate:Accelerator.save_state", "after", 1)], output)
    assert resumed_at(place / "map with damage.resumed") == [4, 4]
    assert f"{newest} is damaged" in (place / "map with damage.log").read_text()
    check_same(expected, output, files)


def test_a_run_that_starts_anew_takes_nothing_of_the_old_one(uninterrupted, recipes, place):
    """Its own checkpoints count, also those with lower numbers than what was left there before."""
    output, log = place / "map anew", place / "map anew.log"
    recipe, argv, files = recipes["map"]
    assert Run(recipe, options(argv, output), log).wait() == 0, told(log)
    never = (*options(argv, output), "--resume", "never")
    assert Run(recipe, never, log, kill=("accelerate:Accelerator.save_state", "before", 4)).wait() == -9
    assert sorted(path.name for path in (output / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000003"]
    assert Run(recipe, options(argv, output), log).wait() == 0, told(log)
    assert resumed_at(place / "map anew.resumed") == [0, 0, 3]
    check_same(uninterrupted("map")[0], output, files)

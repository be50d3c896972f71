"""The launch configurations in recipes/accelerate_configs, and what the backends that they name make of a stage."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from distributed_backends import ENVIRONMENTS
from distributed_checks import CASES, STEPS
from distributed_processes import RECIPES, REPOSITORY, environment, finish
from filelock import FileLock
from test_distributed import folder, reports, workshop  # noqa: F401 (fixtures)


CONFIGS = RECIPES / "accelerate_configs"
NAMES = ("cpu", "deepspeed_zero1", "fsdp2", "multi_gpu", "single_gpu")
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file")
BACKENDS = REPOSITORY / "tests" / "distributed_backends.py"
each_config = pytest.mark.parametrize("name", NAMES)
each_backend = pytest.mark.parametrize("backend", ["fsdp", "deepspeed"])


def launch_arguments(name: str, *argv: str):
    """What `accelerate launch` makes of a configuration and the rest of the command line."""
    parsed = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), *argv, "script.py"])
    return _validate_launch_command(parsed)[0]


# The files


def test_every_configuration_is_checked():
    assert sorted(path.stem for path in CONFIGS.iterdir()) == sorted(NAMES)


@each_config
def test_accelerate_knows_every_key(name):
    path = CONFIGS / f"{name}.yaml"
    given = yaml.safe_load(path.read_text())
    loaded = load_config_from_file(str(path)).to_dict()  # raises for unknown keys, though only for those of the top
    for key, value in given.items():
        assert loaded[key] == value, key
    options = {action.dest for action in launch_command_parser()._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        assert given.get(section, {}).keys() <= options


@each_config
def test_a_configuration_says_when_and_how_to_use_it(name):
    comment = [line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    (line,) = (line for line in comment if "accelerate launch" in line)
    config, recipe = re.search(r"--config_file recipes/(\S+) .*recipes/(\S+\.py)", line).groups()
    assert config == f"accelerate_configs/{name}.yaml" and (RECIPES / recipe).is_file()
    assert all(len(line) < 120 for line in comment if "accelerate launch" not in line)


@pytest.mark.parametrize("name", ["multi_gpu", "fsdp2", "deepspeed_zero1"])
def test_the_number_of_processes_must_be_said(name):
    with pytest.raises(ValueError, match="num_processes"):
        launch_arguments(name)
    assert launch_arguments(name, "--num_processes", "4").num_processes == 4


def test_the_sharded_runs_below_are_launched_as_the_configuration_says():
    sent = prepare_multi_gpu_env(launch_arguments("fsdp2", "--num_processes", "2"))
    assert {name: sent[name] for name in ENVIRONMENTS["fsdp"]} == ENVIRONMENTS["fsdp"]
    assert sent["ACCELERATE_MIXED_PRECISION"] == "bf16"
    arguments = launch_arguments("deepspeed_zero1", "--num_processes", "2")
    assert arguments.use_deepspeed
    assert str(arguments.zero_stage) == ENVIRONMENTS["deepspeed"]["ACCELERATE_DEEPSPEED_ZERO_STAGE"]


# Launches


@pytest.mark.recipes
def test_a_recipe_runs_under_the_cpu_configuration(teacher_folder, pairs_parquet, tmp_path):
    sizes = ("--vision_hidden_size", 32, "--vision_num_hidden_layers", 2, "--text_hidden_size", 16)
    argv = ("--teacher", teacher_folder, *sizes, "--train_data", pairs_parquet, "--output_dir", tmp_path)
    launcher = [sys.executable, *LAUNCH, CONFIGS / "cpu.yaml", RECIPES / "map.py"]
    command = [*launcher, *argv, "--mapping_steps", 2, "--mapping_batch_size", 8]
    subprocess.run(list(map(str, command)), env=environment(), check=True, timeout=240)
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.recipes
@pytest.mark.parametrize(("name", "number"), [("cpu", 1), ("multi_gpu", 2)])
def test_how_many_processes_start_without_a_gpu(tmp_path, name, number):
    """What cpu.yaml says of Accelerate: one. Under another launcher, all are there, and find each other."""
    script = tmp_path / "count.py"
    counting = "import sys\nfrom clipmap_hf.distributed import join_processes\n"
    script.write_text(counting + 'sys.stdout.write(f"{join_processes().num_processes}\\n")\n')  # at once, as they race
    own = ("--num_processes", 2, "--mixed_precision", "no")
    command = [sys.executable, *LAUNCH, CONFIGS / f"{name}.yaml", *own, script]
    result = subprocess.run(
        list(map(str, command)), env=environment(), capture_output=True, text=True, timeout=240, check=True
    )
    assert result.stdout.split() == [str(number)] * number


# Backends


@pytest.fixture(scope="session")
def backend_report(workshop):  # noqa: F811
    """A function that gives what two processes do under a backend, launched once; skips without DeepSpeed."""

    def report(backend: str) -> dict:
        if backend == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed")
        file = workshop / f"report-{backend}.pt"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                finish(BACKENDS, backend, workshop, file, processes=2, timeout=600)
        return torch.load(file)

    return report


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.distributed
@each_backend
def test_a_backend_trains_what_two_processes_without_it_do(backend_report, reports, backend):  # noqa: F811
    compared = 0
    for (stage, case), report in backend_report(backend).items():
        if isinstance(report, str) or report["log"][-1]["skipped"]:
            continue
        expected = reports[2]["trained"][stage, case]
        assert report["backend"] == backend.upper()
        for name, weight in expected["weights"].items():
            if not name.endswith("k_proj.bias"):  # see test_distributed.py
                assert (report["weights"][name] - weight).norm() <= 1e-5 * weight.norm(), (stage, case, name)
        lines = [line for line in report["log"] if "loss" in line]
        assert len(lines) == len(expected["log"])
        for line, other in zip(lines, expected["log"], strict=True):
            for name in ("loss", "grad_norm", "learning_rate", "pairs", "bad_rows"):
                assert line[name] == pytest.approx(other[name], rel=1e-5)
        compared += 1
    assert compared >= 6


@pytest.mark.distributed
@each_backend
def test_a_backend_saves_the_whole_student_and_resumes_to_the_same_bits(backend_report, backend):
    for report in backend_report(backend).values():
        if not isinstance(report, str):
            assert same(report["saved"], report["weights"]) and same(report["resumed"], report["weights"])
            assert 0 < report["metrics"]["mean_recall"] < 1


@pytest.mark.distributed
@each_backend
def test_a_backend_refuses_the_mapping_stage(backend_report, backend):
    refused = {key: report for key, report in backend_report(backend).items() if isinstance(report, str)}
    assert list(refused) == [("mapping", "plain")]
    assert f"exchanges gradients itself and cannot run under {backend.upper()}" in refused["mapping", "plain"]


@pytest.mark.distributed
@each_backend
def test_steps_for_which_the_processes_have_not_equally_many_chunks_are_skipped_under_fsdp(backend_report, backend):
    """It exchanges weights in every chunk, and a chunk without a good row is left out."""
    skipped = {
        key: report["log"][-1]["skipped"]
        for key, report in backend_report(backend).items()
        if not isinstance(report, str) and report["log"][-1]["skipped"]
    }
    chunked = {(stage, list(CASES)[-1]) for stage in ("contrastive", "distillation")}
    assert skipped.keys() == (chunked if backend == "fsdp" else set())
    assert all(0 < number < STEPS for number in skipped.values())

"""The command `clipmap-hf`: recipes as subcommands, shipped configurations by name, and `env`."""

import getpass
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from distributed_processes import RECIPES, REPOSITORY, finish
from safetensors.torch import load_file

import clipmap_hf
from clipmap_hf.cli import environment as environment_module
from clipmap_hf.cli.main import main
from clipmap_hf.cli.parsing import parse_arguments
from clipmap_hf.cli.shipped import load_recipe, recipe_summaries, recipes_folder, shipped_configs
from clipmap_hf.cli.student import map_config
from clipmap_hf.cli.yaml_file import read_yaml, yaml_path
from clipmap_hf.config import PRESETS
from clipmap_hf.demo import TEACHER, TEST_PAIRS


NAMES = sorted(path.stem for path in RECIPES.glob("[a-z]*.py"))


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs `clipmap-hf` in this process, and returns its exit code, output and errors."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/anywhere/bin/clipmap-hf", *words])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


# Subcommands


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)], ids=str)
def test_the_overview_lists_every_recipe_with_the_first_line_of_its_docstring(command, words):
    code, printed, errors = command(*words)
    assert (code, errors) == (0, "")
    rows = dict(
        line.strip().split(maxsplit=1) for line in printed.split("commands:\n")[1].split("\n\n")[0].splitlines()
    )
    assert sorted(rows) == sorted([*NAMES, "env"])
    for name in NAMES:
        head, first = (RECIPES / f"{name}.py").read_text(encoding="utf-8").splitlines()[:2]
        assert head in ('"""', 'r"""') and rows[name] == first


@pytest.mark.parametrize("name", NAMES)
def test_the_first_line_of_a_recipe_is_a_sentence_that_fits_the_overview(name):
    line = recipe_summaries()[name]
    assert line.endswith(".") and len(line) < 100


@pytest.mark.parametrize("words", [(), ("--help",), ("--version",), ("compress", "--help")], ids=str)
def test_what_only_prints_waits_for_no_library(words):
    """The list and the version need none at all, the help of a recipe the parser of transformers."""
    heavy = {"torch", "datasets", "accelerate"} | (set() if words[1:] else {"transformers", "yaml"})
    code = (
        "import atexit, sys\n"
        "from clipmap_hf.cli.main import main\n"
        f"atexit.register(lambda: sys.stderr.write(str(sorted({heavy} & set(sys.modules)))))\n"
        "main()\n"
    )
    process = [sys.executable, "-c", code, *words]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(process, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "[]") and result.stdout


def test_the_version_is_printed(command):
    assert command("--version") == (0, f"clipmap-hf {clipmap_hf.__version__}\n", "")


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_recipe_is_about_the_command(command, name):
    code, printed, errors = command(name, "--help")
    assert (code, errors) == (0, "")
    assert printed.startswith(f"usage: clipmap-hf {name} ")
    assert f"\n    clipmap-hf {name}" in printed  # the example of its docstring
    description = printed.split("\noptions:")[0]
    assert "recipes/" not in description and "python " not in description


def test_help_shows_how_several_processes_are_launched(command):
    printed = command("compress", "--help")[1]
    assert "accelerate launch -m clipmap_hf compress --config small --train_data …" in printed


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("compres", "--help"), "unknown command compres; did you mean compress?"),
        (("export-onnx",), "unknown command export-onnx; did you mean export_onnx?"),
        (("--versoin",), "unknown command --versoin; did you mean --version?"),
        (("__init__",), "unknown command __init__; --help lists all"),
        (("../evaluate",), "unknown command ../evaluate; did you mean evaluate?"),
    ],
    ids=str,
)
def test_an_unknown_command_is_one_line_with_the_nearest_name(command, words, line):
    assert command(*words) == (2, "", f"clipmap-hf: error: {line}\n")


def test_errors_of_a_recipe_name_the_command(command):
    code, printed, errors = command("map", "--stepps", "3")
    assert (code, printed) == (2, "")
    assert errors.startswith("clipmap-hf map: error: unknown option --stepps; did you mean ")
    code, _, errors = command("map", "--config", "smal")
    assert code == 2 and errors.startswith("clipmap-hf map: error: --config smal is neither ")


def test_recipes_are_those_beside_the_package(tmp_path, monkeypatch):
    """And not those of another checkout, which may be the one that is installed."""
    assert recipes_folder() == REPOSITORY / "recipes"
    assert Path(load_recipe("mope").__file__) == RECIPES / "mope.py"
    installed = tmp_path / "site-packages" / "clipmap_hf"
    (installed / "cli").mkdir(parents=True)
    (installed / "recipes").mkdir()
    monkeypatch.setattr("clipmap_hf.cli.shipped.__file__", str(installed / "cli" / "shipped.py"))
    assert recipes_folder() == installed / "recipes"


# Configurations by name


def test_a_shipped_configuration_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = RECIPES / "configs"
    for path in configs.rglob("*.yaml"):
        name = path.relative_to(configs).with_suffix("").as_posix()
        assert yaml_path(Path(name)) == path
    assert yaml_path(Path("paper/small")) != yaml_path(Path("small"))


def test_a_file_of_the_working_folder_goes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small").write_text("student: tiny\n", encoding="utf-8")
    assert yaml_path(Path("small")) == Path("small")


def test_an_output_folder_does_not_hide_a_shipped_configuration(tmp_path, monkeypatch):
    """The second run of `--config small --output_dir small` reads what the first one read."""
    monkeypatch.chdir(tmp_path)
    Path("small").mkdir()
    assert yaml_path(Path("small")) == RECIPES / "configs" / "small.yaml"


@pytest.mark.parametrize("given", ["smal", "small.yaml", "nothing/small", "paper", "../configs/small", ""])
def test_a_name_of_nothing_is_an_error_that_lists_the_shipped(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a file nor the name of a shipped") as error:
        yaml_path(Path(given))
    message = str(error.value)
    assert f"--config {Path(given)} is" in message and "'paper/small'" in message and "'tiny'" in message


def test_recipes_read_a_shipped_configuration_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    types = load_recipe("compress").SHARED
    stages = load_recipe("compress").COMPRESSION_STAGES
    argv = ["--config", "small", "--train_data", "p.parquet", "--output_dir", "out"]
    student = parse_arguments(*types, stages=stages, argv=argv)[3]
    assert map_config(student).vision == PRESETS["small"].vision


def test_a_shipped_configuration_finds_the_embedded_data_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [value for name in shipped_configs() for value in read_yaml(Path(name))[1].values()]
    paths = [Path(value) for value in found if isinstance(value, str) and "demo/" in value]
    assert TEACHER in paths and TEST_PAIRS in paths and all(path.exists() for path in paths)
    copy = Path("own.yaml")
    copy.write_text("teacher: clipmap_hf/demo/teacher\n", encoding="utf-8")
    assert read_yaml(copy) == (copy, {"teacher": "clipmap_hf/demo/teacher"})  # a file's own paths stay


# Versions and devices


def lines_of(printed: str) -> dict[str, str]:
    return dict(line.removeprefix("- ").split(": ", 1) for line in printed.splitlines())


def test_env_prints_versions_and_devices(command):
    import transformers

    code, printed, errors = command("env")
    assert (code, errors) == (0, "")
    found = lines_of(printed)
    assert found["clipmap_hf"] == clipmap_hf.__version__ and found["Python"] == platform.python_version()
    assert found["torch"] == torch.__version__ and found["transformers"] == transformers.__version__
    wanted = {"platform", "accelerate", "datasets", "safetensors", "huggingface_hub", "evaluate", "Pillow", "numpy"}
    assert wanted <= found.keys() and "not installed" not in printed
    assert found["CPU"] == f"{os.cpu_count()} logical cores, {torch.get_num_threads()} torch threads"


def test_env_tells_nothing_about_its_user(command, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    printed = command("env")[1]
    private = ["hf_secret", str(Path.home()), str(Path.cwd()), sys.prefix, platform.node(), getpass.getuser()]
    assert not [word for word in private if word and word in printed]


def test_env_says_what_is_missing_and_leaves_out_what_is_optional(monkeypatch):
    def version(name: str) -> str:
        if name in ("evaluate", "onnx"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(environment_module, "version", version)
    found = environment_module.environment()
    assert found["evaluate"] == "not installed" and "onnx" not in found and found["gguf"] == "1.0"


def test_env_names_gpus_with_their_memory(monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=150 * 2**30 - 2**29)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = environment_module.environment()
    assert found["cuda:0"] == found["cuda:1"] == "NVIDIA H200, 149.5 GiB" and found["GPU runtime"] == "CUDA 13.0"
    assert "mps" not in found


def test_env_names_apple_s_gpu_with_its_memory(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * 2**30)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert environment_module.environment()["mps"] == "arm64, 12.0 GiB"


def test_env_works_where_torch_does_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = environment_module.environment()
    assert found["devices"] == "unknown, torch cannot be imported (ModuleNotFoundError)"
    assert found["transformers"]


def test_env_takes_no_options(command):
    assert command("env", "--help")[1].startswith("usage: clipmap-hf env ")
    code, _, errors = command("env", "now")
    assert code == 2 and "clipmap-hf env: error: unrecognized arguments: now" in errors


# Whole runs


@pytest.fixture(scope="module")
def options(teacher_folder, pairs_parquet) -> list:
    """Two steps of eight pairs."""
    sizes = ["--vision_hidden_size", 32, "--vision_num_hidden_layers", 2, "--text_hidden_size", 16]
    steps = ["--distillation_steps", 2, "--distillation_batch_size", 8, "--initializer", "diagonal"]
    return ["--teacher", teacher_folder, "--train_data", pairs_parquet, *sizes, *steps, "--output_dir"]


@pytest.mark.recipes
def test_the_command_does_what_the_script_does(options, tmp_path):
    finish(RECIPES / "compress.py", *options, tmp_path / "script")
    finish("-m", "clipmap_hf", "compress", *options, tmp_path / "command")
    script, command = (load_file(tmp_path / name / "model.safetensors") for name in ("script", "command"))
    torch.testing.assert_close(command, script, atol=0, rtol=0)
    script, command = (
        yaml.safe_load((tmp_path / name / "arguments.yaml").read_text()) for name in ("script", "command")
    )
    assert command | {"output_dir": None} == script | {"output_dir": None}


@pytest.mark.distributed
def test_accelerate_launches_the_command_in_several_processes(options, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0, "-m", "clipmap_hf"]
    printed = finish(*launch, "compress", *options, tmp_path / "two")
    assert printed.count("from_pretrained") <= 1  # one process speaks
    finish("-m", "clipmap_hf", "compress", *options, tmp_path / "one")
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-3)  # sums of gradients in another order

"""Every YAML under recipes/configs is read by its recipes, and those of the paper hold the paper's numbers."""

import dataclasses
import importlib.util
import os
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import clipmap_hf
from clipmap_hf.cli.arguments import StudentArguments
from clipmap_hf.cli.parsing import arguments_yaml
from clipmap_hf.cli.student import map_config
from clipmap_hf.config import PRESETS, ClipMapConfig, TowerConfig, student_config
from clipmap_hf.demo.arguments import METHODS
from clipmap_hf.models.loading import load_config
from clipmap_hf.training.arguments import DistillationStageArguments, MappingStageArguments, StageArguments


RECIPES = Path(clipmap_hf.__file__).parents[1] / "recipes"
CONFIGS = RECIPES / "configs"
PAPER = CONFIGS / "paper"
SIZES = ("base", "small", "tiny")
# The recipes that each file is for, and the options that are left to the command line.
READERS = {
    **{
        f"{name}.yaml": {
            "map": ["--train_data", "pairs.parquet", "--output_dir", "out"],
            "compress": ["--train_data", "pairs.parquet", "--output_dir", "out"],
            "distill": ["--train_data", "pairs.parquet", "--output_dir", "out", "--student_model", "mapped"],
            "cache": ["--train_data", "pairs.parquet", "--teacher_cache", "cache"],
        }
        for size in SIZES
        for name in (size, f"paper/{size}")
    },
    "mope/pretrain.yaml": {"compress": ["--train_data", "pairs.parquet", "--output_dir", "out"]},
    "mope/finetune.yaml": {
        "progressive": ["--teacher", "tuned", "--train_data", "pairs.parquet", "--output_dir", "out"]
    },
    "few.yaml": {
        "compress": ["--teacher", "t", "--student", "tiny", "--train_images", "photos", "--output_dir", "out"],
        "distill": ["--teacher", "t", "--student_model", "s", "--train_data", "pairs.parquet", "--output_dir", "out"],
        "cache": ["--teacher", "t", "--train_images", "photos", "--teacher_cache", "cache"],
    },
    "demo.yaml": {"demo": []},
    "demo_all.yaml": {"demo": []},
    "emoji_student.yaml": {"compress": ["--output_dir", "out"]},
    "emoji_teacher.yaml": {"pretrain": ["--train_data", "pairs.parquet", "--output_dir", "out"]},
}
READINGS = [(file, recipe) for file, recipes in READERS.items() for recipe in recipes]


class Parsed(Exception):
    """Ends a recipe's `main` as soon as its arguments are read."""


def load_recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def read(monkeypatch):
    """A function that starts a recipe's `main` with a command line and returns its arguments by class name."""

    def run(recipe: str, *argv: str) -> dict[str, object]:
        module, results = load_recipe(recipe), []
        name = "parse_recipe" if hasattr(module, "parse_recipe") else "parse_arguments"
        parse_all = getattr(module, name)

        def parse(*args, **kwargs):
            results.extend(parse_all(*args, **kwargs))
            raise Parsed

        monkeypatch.setattr(module, name, parse)
        monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *argv])
        with pytest.raises(Parsed):
            module.main()
        named = {}
        for one in results:  # the demo has two sections of one class; the paper's stages come first
            name = "MappingStageArguments" if isinstance(one, MappingStageArguments) else type(one).__name__
            named.setdefault(name, one)
        return named

    return run


def test_every_config_is_read_by_a_recipe():
    assert sorted(READERS) == sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize(("file", "recipe"), READINGS, ids=lambda value: value)
def test_a_config_is_read_by_its_recipe(read, file, recipe):
    arguments = read(recipe, "--config", str(CONFIGS / file), *READERS[file][recipe])
    content = yaml.safe_load((CONFIGS / file).read_text(encoding="utf-8"))
    checked = 0
    for one in arguments.values():
        for key in content.keys() & vars(one).keys():
            value, expected = getattr(one, key), content[key]
            if isinstance(value, list) and not isinstance(expected, list):
                expected = [expected]
            if key == "sizes":
                expected = [",".join(f"{option}={one}" for option, one in size.items()) for size in expected]
            assert value == expected and type(value) is type(expected), key
            checked += 1
    for section, cls in (("mapping", MappingStageArguments), ("distillation", DistillationStageArguments)):
        if cls.__name__ in arguments and section in content:
            assert_section(arguments[cls.__name__], content[section])
            checked += 1
    assert checked


@pytest.mark.parametrize("recipe", ["compress", "map", "distill", "cache", "mask", "mope"])
def test_what_compress_wrote_is_read_by_the_other_recipes(read, recipe, tmp_path):
    own = read("compress", "--teacher", "t", "--student", "tiny", "--train_data", "pairs", "--output_dir", "out")
    stages = {"masking": own["OptionalMaskingStageArguments"], "mapping": own["MappingStageArguments"]}
    stages["distillation"] = own["DistillationStageArguments"]
    plain = [one for one in own.values() if one not in stages.values()]
    (tmp_path / "arguments.yaml").write_text(arguments_yaml(*plain, **stages))
    more = {"distill": ["--student_model", "mapped"], "cache": ["--teacher_cache", "cache"]}
    given = read(recipe, "--config", str(tmp_path / "arguments.yaml"), *more.get(recipe, []))
    assert given["DataArguments"].train_data == "pairs"


def assert_section(stage: StageArguments, content: dict) -> None:
    for key, value in content.items():
        assert getattr(stage, key) == (float(value) if isinstance(value, str) else value), key


TABLE_8 = {  # mapping: batch, length, rate, decay, warm-up
    "base": (4096, {"max_steps": 1000}, 2e-3, 0.2, 1000),
    "small": (4096, {"num_train_epochs": 5}, 8e-4, 0.2, 2000),
    "tiny": (4096, {"num_train_epochs": 5}, 8e-4, 0.2, 2000),
}
TABLE_9 = {  # retraining
    "base": (8192, {"num_train_epochs": 25}, 3e-4, 1e-4, 2000),
    "small": (4096, {"num_train_epochs": 25}, 1e-4, 0.2, 2000),
    "tiny": (4096, {"num_train_epochs": 25}, 1e-4, 0.2, 2000),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_paper_s_configs_hold_its_tables_8_and_9(read, name):
    arguments = read("compress", "--config", str(PAPER / f"{name}.yaml"), *READERS[f"paper/{name}.yaml"]["compress"])
    for table, cls in ((TABLE_8, "MappingStageArguments"), (TABLE_9, "DistillationStageArguments")):
        stage = arguments[cls]
        batch_size, length, learning_rate, weight_decay, warmup_steps = table[name]
        assert (stage.batch_size, stage.warmup_steps) == (batch_size, warmup_steps)
        assert (stage.learning_rate, stage.weight_decay) == (learning_rate, weight_decay)
        assert {key: getattr(stage, key) for key in length} == length
        assert stage.max_steps == length.get("max_steps", -1)  # steps would win over epochs
        assert (stage.adam_beta1, stage.adam_beta2, stage.max_grad_norm) == (0.9, 0.98, 5.0)
        assert (stage.logit_scale, stage.learn_logit_scale) == (50.0, False)
    assert arguments["DistillationStageArguments"].losses == {"affinity": 1.0}


def test_a_list_of_labels_decides_the_losses_of_distillation_alone(read):
    arguments = read(
        *("compress", "--teacher", "t", "--student", "tiny", "--train_images", "photos", "--labels", "queries.txt"),
        *("--output_dir", "out"),
    )
    assert arguments["DistillationStageArguments"].losses == {"labels": 1.0, "feature": 2000.0}
    assert arguments["MappingStageArguments"].losses == {"feature": 2000.0}
    assert arguments["DataArguments"].train_texts == []


@pytest.mark.parametrize("name", SIZES)
def test_the_paper_s_values_stand_in_the_file_itself(name):
    """A default that changes must not change a reproduction."""
    content = yaml.safe_load((PAPER / f"{name}.yaml").read_text(encoding="utf-8"))
    expected = {
        "batch_size",
        "learning_rate",
        "weight_decay",
        "warmup_steps",
        "adam_beta1",
        "adam_beta2",
        "max_grad_norm",
        "logit_scale",
        "learn_logit_scale",
    }
    for section in ("mapping", "distillation"):
        assert expected <= content[section].keys()
        assert {"max_steps", "num_train_epochs"} & content[section].keys()


@pytest.mark.parametrize("name", SIZES)
def test_the_paper_s_configs_make_its_students(read, name):
    arguments = read("map", "--config", str(PAPER / f"{name}.yaml"), *READERS[f"paper/{name}.yaml"]["map"])
    assert arguments["TeacherArguments"].teachers == [("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", None)]
    assert map_config(arguments["StudentArguments"]) == dataclasses.replace(PRESETS[name], initializer="diagonal")


@pytest.mark.parametrize("name", SIZES)
def test_our_configs_make_the_same_students_from_the_teachers_activations(read, name):
    arguments = read("compress", "--config", str(CONFIGS / f"{name}.yaml"), *READERS[f"{name}.yaml"]["compress"])
    assert arguments["TeacherArguments"].teachers == [("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", None)]
    assert map_config(arguments["StudentArguments"]) == dataclasses.replace(PRESETS[name], initializer="calibrated")


@pytest.mark.parametrize("file", ["demo.yaml", "demo_all.yaml"])
def test_the_demo_s_student_is_cut_from_the_embedded_teacher(read, file):
    arguments = read("demo", "--config", str(CONFIGS / file))
    teacher = load_config(arguments["TeacherArguments"].teacher[0])
    student = student_config(teacher, map_config(arguments["StudentArguments"]))
    assert student.vision_config.num_hidden_layers < teacher.vision_config.num_hidden_layers


def test_the_short_demo_leaves_out_what_needs_more_pairs(read):
    short, whole = (read("demo", "--config", str(CONFIGS / name)) for name in ("demo.yaml", "demo_all.yaml"))
    assert whole["ContestArguments"].methods == list(METHODS)
    assert short["ContestArguments"].methods == ["calibrated", "ternary", "manual", "scratch"]
    assert short["ContestArguments"].pairs < whole["ContestArguments"].pairs == 32000
    assert short["StudentArguments"] == whole["StudentArguments"]
    assert short["RunArguments"].output_dir != whole["RunArguments"].output_dir  # or one would go on with the other's


def test_the_line_that_the_demo_ends_with_is_read_by_its_recipe(read):
    command, recipe, *options = shlex.split(load_recipe("demo").NEXT)
    assert (command, recipe) == ("{command}", "compress")
    arguments = read("compress", *options)
    assert arguments["DistillationStageArguments"].trains and arguments["DataArguments"].validation_fraction


def test_the_demo_computes_on_one_core_and_decodes_on_the_other(read, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that it is put back in the end
    monkeypatch.delenv("OMP_NUM_THREADS")
    arguments = read("demo", "--config", str(CONFIGS / "demo.yaml"))
    assert os.environ["OMP_NUM_THREADS"] == "1" and arguments["RunArguments"].dataloader_num_workers == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # the user's own
    read("demo", "--config", str(CONFIGS / "demo.yaml"))
    assert os.environ["OMP_NUM_THREADS"] == "4"


def test_the_command_line_wins_over_the_file(read):
    arguments = read(
        "compress",
        "--config",
        str(CONFIGS / "small.yaml"),
        *READERS["small.yaml"]["compress"],
        *("--mapping_batch_size", "64", "--student", "tiny"),
    )
    assert arguments["MappingStageArguments"].batch_size == 64
    assert arguments["DistillationStageArguments"].batch_size == 4096
    assert arguments["StudentArguments"].student == "tiny"


def test_options_make_a_config(read):
    required = ("--teacher", "clip", *READERS["base.yaml"]["map"])
    options = "--vision_hidden_size 32 --text_num_hidden_layers 2 --projection_dim 16 --initializer xavier"
    options += " --depth spread --depth_per kind --tie_ffn true --decay_towards zero"
    student = read("map", *required, *options.split())["StudentArguments"]
    expected = ClipMapConfig(
        vision=TowerConfig(hidden_size=32),
        text=TowerConfig(num_hidden_layers=2),
        projection_dim=16,
        initializer="xavier",
        depth="spread",
        depth_per="kind",
        tie_ffn=True,
        decay_towards="zero",
        seed=3,
    )
    assert map_config(student, seed=3) == expected


def test_options_are_put_over_the_preset(read):
    required = ("--teacher", "clip", *READERS["base.yaml"]["map"])
    student = read("map", *required, "--student", "small", "--vision_num_hidden_layers", "6")["StudentArguments"]
    assert map_config(student) == dataclasses.replace(PRESETS["small"], vision=TowerConfig(256, num_hidden_layers=6))


def test_no_options_make_no_config(read):
    assert map_config(read("map", "--teacher", "clip", *READERS["base.yaml"]["map"])["StudentArguments"]) is None


def test_an_unknown_preset_is_an_error_that_lists_the_presets():
    with pytest.raises(ValueError, match="'medium' is unknown; the presets are .*'resnet-30m', 'small', 'tiny'"):
        map_config(StudentArguments(student="medium"))


def test_the_embedded_student_is_the_demo_s():
    student, demo = (yaml.safe_load((CONFIGS / name).read_text()) for name in ("emoji_student.yaml", "demo_all.yaml"))
    own = {
        "output_dir",
        "methods",
        "pairs",
        "eval_steps",
        "dataloader_num_workers",
        "mapping",
        "distillation",
        *METHODS,
    }
    for key in demo.keys() - own:
        assert student[key] == demo[key], key
    steps = (demo["pairs"] - student["calibration_pairs"]) // demo["calibrated"]["batch_size"]
    assert student["distillation"] == {**demo["calibrated"], "max_steps": steps}

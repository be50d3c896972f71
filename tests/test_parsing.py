"""From a command line and a YAML file to dataclasses, and back."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from clipmap_hf.cli.arguments import StudentArguments, TeacherArguments
from clipmap_hf.cli.parsing import arguments_yaml, parse_arguments
from clipmap_hf.data.arguments import DataArguments
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.training.arguments import DistillationStageArguments, MappingStageArguments, StageArguments
from clipmap_hf.training.run_arguments import RunArguments


@dataclass
class Simple:
    name: str = field(metadata={"help": "Required."})
    rate: float = 0.5
    count: int | None = None
    words: list[str] = field(default_factory=lambda: ["a"])
    way: Literal["left", "right"] = "left"
    fast: bool = False


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file and returns the options that read it."""

    def write(text: str) -> list[str]:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def parse(argv: list[str]) -> Simple:
    return parse_arguments(Simple, argv=argv)[0]


def test_defaults_without_a_file():
    assert parse(["--name", "x"]) == Simple("x")


def test_a_file_gives_values_of_every_type(config):
    options = config("name: x\nrate: 0.25\ncount: 3\nwords: [b, c d]\nway: right\nfast: true\n")
    assert parse(options) == Simple("x", 0.25, 3, ["b", "c d"], "right", True)


@pytest.mark.parametrize("first", [True, False], ids=["options first", "file first"])
def test_the_command_line_wins_over_the_file(config, first):
    file = config("name: from file\nrate: 0.25\nwords: [b, c]\nfast: true\n")
    options = ["--rate", "0.75", "--words", "d", "--fast", "false"]
    assert parse(options + file if first else file + options) == Simple("from file", 0.75, None, ["d"], fast=False)


def test_scientific_notation_in_a_file_is_a_float(config):
    arguments = parse(config("name: x\nrate: 1e-4\n"))
    assert isinstance(arguments.rate, float) and arguments.rate == 1e-4


def test_null_and_an_empty_file_mean_the_default(config):
    assert parse(config("name: x\ncount: null\nrate:\n")) == Simple("x")
    assert parse([*config(""), "--name", "x"]) == Simple("x")


def test_an_unknown_key_of_a_file_is_an_error_that_lists_the_known(config):
    with pytest.raises(ValueError, match=r"config\.yaml: unknown keys \['speed'\]; allowed are .*'count'.*'rate'"):
        parse(config("name: x\nspeed: 3\n"))


def test_a_file_without_keys_is_an_error(config):
    with pytest.raises(ValueError, match="must hold `key: value` lines, got a list"):
        parse(config("- name\n- rate\n"))


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        parse(["--config", str(tmp_path / "nothing.yaml")])


@pytest.fixture
def refused(capsys):
    """A function that reads a command line that is refused, and returns the line that says why."""

    def read(*argv: str, **parsing) -> str:
        with pytest.raises(SystemExit, match="2"):
            parse_arguments(Simple, argv=[*argv], **parsing)
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return read


def test_an_unknown_option_is_an_error_of_one_line(refused):
    assert refused("--name", "x", "--zzz", "3").endswith(": error: unknown option --zzz; --help lists all")
    assert refused("--nmae", "x").endswith("unknown option --nmae; did you mean --name?")
    assert refused("--name", "x", "--rate=much").endswith("argument --rate: invalid float value: 'much'")


def test_an_option_of_a_stage_is_named_where_its_prefix_is_missing(refused):
    stages = {"mapping": MappingStageArguments}
    assert refused("--name", "x", "--steps", "3", stages=stages).endswith("did you mean --mapping_steps?")


def test_on_a_real_command_line_every_error_is_one_line(config, capsys, monkeypatch):
    file = config("name: x\nspeed: 3\n")
    monkeypatch.setattr(sys, "argv", ["recipes/map.py", *file])
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(Simple)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("map.py: error: ") and "config.yaml: unknown keys ['speed']" in line


def test_an_unknown_key_of_yaml_is_answered_with_the_nearest(config):
    with pytest.raises(ValueError, match=r"config\.yaml: unknown keys \['nmae'\]; did you mean 'name'\?"):
        parse(config("nmae: x\n"))


def test_help_shows_the_options_of_a_class_together(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_arguments(Simple, stages={"mapping": MappingStageArguments}, argv=["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage:") and "mapping: The mapping stage" in printed
    assert printed.index("--name") < printed.index("mapping: The mapping stage") < printed.index("--mapping_steps")


@pytest.mark.parametrize("option", ["--nam", "--rat", "--conf"])
def test_options_cannot_be_abbreviated(option, refused):
    assert f"unknown option {option}" in refused("--name", "x", option, "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nway: up\n", "--way: invalid choice: 'up'"),
        ("name: x\ncount: many\n", "--count: invalid int value: 'many'"),
        ("rate: 1\n", "required: --name"),
    ],
)
def test_wrong_values_of_a_file_are_reported_like_options(config, capsys, text, message):
    with pytest.raises(SystemExit):
        parse(config(text))
    assert message in capsys.readouterr().err


STAGES = {"mapping": MappingStageArguments, "distillation": DistillationStageArguments}


def test_stage_sections_and_prefixed_options(config):
    numbers = "losses: {affinity: 0.5, feature: 2e3}"
    file = config(f"name: x\nmapping:\n  steps: 7\n  learning_rate: 1e-3\ndistillation:\n  {numbers}\n")
    simple, mapping, distillation = parse_arguments(
        Simple, stages=STAGES, argv=[*file, "--mapping_steps", "9", "--distillation_learn_logit_scale", "true"]
    )
    assert simple == Simple("x")
    assert mapping == MappingStageArguments(max_steps=9, learning_rate=1e-3)
    assert distillation == DistillationStageArguments(
        losses={"affinity": 0.5, "feature": 2000.0}, learn_logit_scale=True
    )


def test_losses_on_the_command_line_win(config):
    file = config("name: x\ndistillation:\n  losses: {affinity: 0.5}\n")
    words = ["--distillation_losses", "feature=2e3", "contrastive=1"]
    _, _, distillation = parse_arguments(Simple, stages=STAGES, argv=[*file, *words])
    assert distillation.losses == {"feature": 2000.0, "contrastive": 1.0}
    written = yaml.safe_load(arguments_yaml(distillation=distillation))
    assert written["distillation"]["losses"] == distillation.losses


@pytest.mark.parametrize("word", ["affinity", "affinity=", "affinity=much"])
def test_a_loss_without_a_weight_is_an_error(word):
    with pytest.raises(ValueError, match=f"losses takes words like name=0.5, got '{word}'"):
        parse_arguments(Simple, stages=STAGES, argv=["--name", "x", "--distillation_losses", word])


def test_each_stage_keeps_its_own_defaults():
    _, mapping, distillation = parse_arguments(Simple, stages=STAGES, argv=["--name", "x"])
    assert mapping == MappingStageArguments() and distillation == DistillationStageArguments()
    assert mapping.learning_rate != distillation.learning_rate


def test_an_empty_section_means_the_defaults(config):
    assert parse_arguments(Simple, stages=STAGES, argv=config("name: x\nmapping:\n"))[1] == MappingStageArguments()


def test_an_unknown_key_of_a_section_is_an_error(config):
    file = config("name: x\nmapping:\n  learning_rat: 1\n")
    with pytest.raises(
        ValueError, match=r"unknown keys \['learning_rat'\] in section 'mapping'; did you mean 'learning_rate'"
    ):
        parse_arguments(Simple, stages=STAGES, argv=file)


def test_a_section_of_no_stage_is_an_error(config):
    with pytest.raises(ValueError, match=r"unknown keys \['pretraining'\]"):
        parse_arguments(Simple, stages=STAGES, argv=config("name: x\npretraining:\n  steps: 1\n"))


def test_sections_of_other_recipes_are_checked_then_left_alone(config):
    own, other = {"mapping": MappingStageArguments}, {"distillation": DistillationStageArguments}
    file = config("name: x\nmapping:\n  steps: 7\ndistillation:\n  steps: 100\n")
    assert parse_arguments(Simple, stages=own, other_stages=other, argv=file) == (
        Simple("x"),
        MappingStageArguments(max_steps=7),
    )
    wrong = config("name: x\ndistillation:\n  stepps: 100\n")
    with pytest.raises(ValueError, match=r"unknown keys \['stepps'\] in section 'distillation'"):
        parse_arguments(Simple, stages=own, other_stages=other, argv=wrong)


def test_saved_arguments_come_back_through_config(tmp_path):
    types = (DataArguments, TeacherArguments, StudentArguments, RunArguments)
    first = parse_arguments(
        *types,
        stages=STAGES,
        argv=[
            *("--train_data", "pairs-{0..9}.tar", "--caption_column", "text", "keywords", "--crop_scale", "0.5", "1"),
            *("--teacher", "me/teacher", "--student", "small", "--tie_ffn", "true", "--output_dir", "out dir"),
            *("--mixed_precision", "no", "--mapping_learning_rate", "1e-7", "--mapping_weight_decay", "0"),
            *("--distillation_steps", "12", "--distillation_learn_logit_scale", "true"),
        ],
    )
    path = tmp_path / "arguments.yaml"
    path.write_text(arguments_yaml(*first[:4], mapping=first[4], distillation=first[5]))
    second = parse_arguments(*types, stages=STAGES, argv=["--config", str(path)])
    assert second == first
    assert first[0].caption_column == ["text", "keywords"] and first[0].crop_scale == [0.5, 1.0]
    assert first[2].tie_ffn is True and first[4].learning_rate == 1e-7 and first[3].mixed_precision == "no"


@pytest.mark.parametrize(
    ("kind", "required"),
    [
        (RunArguments, {"output_dir": "o"}),
        (DataArguments, {"train_data": "t"}),
        (TeacherArguments, {"teacher": ["t"]}),
        (TeacherCacheArguments, {}),
        (StudentArguments, {}),
        (StageArguments, {}),
    ],
)
def test_every_default_survives_saving_and_reading(tmp_path, kind, required):
    path = Path(tmp_path / "arguments.yaml")
    path.write_text(arguments_yaml(kind(**required)))
    assert parse_arguments(kind, argv=["--config", str(path)]) == (kind(**required),)


@pytest.mark.parametrize("kind", [MappingStageArguments, DistillationStageArguments])
def test_every_default_of_a_section_survives_saving_and_reading(tmp_path, kind):
    path = Path(tmp_path / "arguments.yaml")
    path.write_text(arguments_yaml(training=kind()))
    assert parse_arguments(stages={"training": kind}, argv=["--config", str(path)]) == (kind(),)


def test_several_teachers_are_a_list_in_a_file_and_on_the_command_line(config):
    (teacher,) = parse_arguments(TeacherArguments, argv=config("teacher: [me/a, me/b]\nteacher_revision: [v1, v2]\n"))
    assert teacher.teachers == [("me/a", "v1"), ("me/b", "v2")]
    assert parse_arguments(TeacherArguments, argv=config("teacher: me/a\n"))[0].teachers == [("me/a", None)]
    argv = [*config("teacher: me/a\n"), "--teacher", "me/b", "me/c"]
    assert parse_arguments(TeacherArguments, argv=argv)[0].teacher == ["me/b", "me/c"]


def test_keys_of_other_recipes_are_known_and_left_alone(config, refused):
    file = config("name: x\nteacher_cache: folder\nviews: 3\n")
    assert parse_arguments(Simple, others=(TeacherCacheArguments,), argv=file) == (Simple("x"),)
    with pytest.raises(ValueError, match=r"unknown keys \['teacher_cache'\]"):
        parse_arguments(Simple, argv=file)
    line = refused(*file, "--views", "3", others=(TeacherCacheArguments,))  # known in the file alone
    assert "unknown option --views" in line


def test_an_option_of_one_value_does_not_take_a_mapping(config):
    with pytest.raises(ValueError, match="'rate' takes a value or a list, got the mapping"):
        parse(config("name: x\nrate: {a: 1}\n"))


def test_a_section_that_is_no_mapping_is_an_error(config):
    with pytest.raises(ValueError, match="section 'mapping' must hold `key: value` lines, got '7'"):
        parse_arguments(Simple, stages=STAGES, argv=config("name: x\nmapping: 7\n"))


def student(argv: list[str]) -> str | dict | None:
    return parse_arguments(StudentArguments, argv=argv)[0].student


def test_a_student_is_a_name_or_values_by_name(config):
    latency = {"latency_ms": "20", "batch_size": "8", "device": "cpu"}
    assert student(["--student", "latency_ms=20", "batch_size=8", "device=cpu"]) == latency
    assert student(config("student: {latency_ms: 20, batch_size: 8, device: cpu}\n")) == latency
    assert student(config("student: {params: 30M}\n")) == {"params": "30M"}
    assert student([*config("student: {params: 30M}\n"), "--student", "small"]) == "small"
    assert student([*config("student: small\n"), "--student", "macs=2G"]) == {"macs": "2G"}
    assert student([]) is None


@pytest.mark.parametrize("words", [["small", "tiny"], ["small", "params=30M"]])
def test_a_name_among_values_is_an_error(words):
    with pytest.raises(ValueError, match=rf"student takes one name, or words like name=value, got \['{words[0]}'"):
        student(["--student", *words])


@pytest.mark.parametrize("given", ["small", {"params": "30M"}])
def test_a_student_survives_saving_and_reading(tmp_path, given):
    path = Path(tmp_path / "arguments.yaml")
    path.write_text(arguments_yaml(StudentArguments(student=given)))
    assert student(["--config", str(path)]) == given


@pytest.mark.parametrize("word", ["no", "off", "on", "yes", "y"])
def test_a_word_of_a_file_is_what_it_is_on_the_command_line(config, word):
    assert parse(config(f"name: {word}\nwords: [{word}, a]\n")) == Simple(word, words=[word, "a"])


@pytest.mark.parametrize("word", ["2024_01_02", "007", "1.10", "0x10", "12:30:00", "2024-01-02", "1e3", "~x"])
def test_what_looks_like_a_number_or_a_date_stays_a_word(config, word):
    assert parse(config(f"name: {word}\n")).name == word


def test_an_empty_entry_of_a_list_is_an_error(config):
    with pytest.raises(ValueError, match=r"list of 'words' has an entry that is null: \[None, 'a'\]"):
        parse(config("name: x\nwords: [null, a]\n"))


@pytest.mark.parametrize("option", ["mixed_precision", "eval_strategy", "save_strategy"])
def test_no_is_a_choice_in_a_file_too(config, option):
    (run,) = parse_arguments(RunArguments, argv=config(f"output_dir: out\n{option}: no\n"))
    assert getattr(run, option) == "no"


@pytest.mark.parametrize(
    ("word", "value"), [("yes", True), ("No", False), ("TRUE", True), ("off", False), ("on", True), ("false", False)]
)
def test_a_switch_of_a_file_is_turned_by_any_word_for_it(config, word, value):
    assert parse(config(f"name: x\nfast: {word}\n")).fast is value

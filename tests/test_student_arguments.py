"""From a recipe's arguments to the student that they ask for."""

import dataclasses

import pytest

from clipmap_hf import PRESETS, Budget, ClipMapConfig, TowerConfig
from clipmap_hf.cli.arguments import StudentArguments
from clipmap_hf.cli.student import map_config, with_size


def test_a_preset_is_taken_as_it_is():
    assert map_config(StudentArguments(student="small")) == PRESETS["small"]


def test_sizes_and_options_are_put_over_a_preset():
    config = map_config(StudentArguments(student="tiny", vision_hidden_size=192, tie_ffn=True, depth="spread"), seed=3)
    assert config.vision == TowerConfig(hidden_size=192, num_hidden_layers=4) and config.text == PRESETS["tiny"].text
    assert (config.tie_ffn, config.depth, config.seed, config.initializer) == (True, "spread", 3, None)


def test_how_a_calibrated_start_is_refitted_is_put_over_a_preset():
    config = map_config(StudentArguments(student="tiny", initializer="calibrated", refit=False, refit_steps=7))
    assert (config.initializer, config.refit, config.refit_steps) == ("calibrated", False, 7)
    assert map_config(StudentArguments(student="tiny", refit=True)) == PRESETS["tiny"]


def test_a_budget_leaves_sizes_open_that_are_not_given():
    arguments = StudentArguments(student={"params": "30M"}, text_num_hidden_layers=2, depth="spread")
    expected = ClipMapConfig(text=TowerConfig(num_hidden_layers=2), budget=Budget(params="30M"), depth="spread")
    assert map_config(arguments) == expected


def test_sizes_alone_are_a_student_too():
    config = map_config(StudentArguments(text_num_hidden_layers=2))
    assert config == ClipMapConfig(text=TowerConfig(num_hidden_layers=2))


def test_nothing_said_is_no_student():
    assert map_config(StudentArguments()) is None


def test_an_unknown_preset_is_an_error_that_names_the_presets():
    with pytest.raises(
        ValueError,
        match="student='huge' is unknown; the presets are .*'resnet-30m', 'small', 'tiny'",
    ):
        map_config(StudentArguments(student="huge"))


def test_a_size_is_a_preset_or_options_over_what_all_have_in_common():
    common = StudentArguments(initializer="mope", vision_num_hidden_layers=3)
    assert with_size(common, "tiny") == dataclasses.replace(common, student="tiny")
    given = with_size(common, "vision_num_hidden_layers=2,text_hidden_size=64,depth=score,tie_ffn=true")
    changes = {"vision_num_hidden_layers": 2, "text_hidden_size": 64, "depth": "score", "tie_ffn": True}
    assert given == dataclasses.replace(common, **changes)
    within = with_size(common, "params=30M,text_num_hidden_layers=2")
    assert within == dataclasses.replace(common, student={"params": "30M"}, text_num_hidden_layers=2)


def test_a_size_has_a_preset_or_a_budget():
    with pytest.raises(ValueError, match="a preset and a budget; give one"):
        with_size(StudentArguments(), "student=small,params=30M")


@pytest.mark.parametrize("size", ["vision_depth=2", "vision_hidden_size=", "text_hidden_size=64,tiny"])
def test_a_size_that_says_nothing_known_is_an_error(size):
    with pytest.raises(ValueError, match="it takes option=value, with an option of .'student', 'vision_hidden_size'"):
        with_size(StudentArguments(), size)

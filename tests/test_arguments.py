"""Arguments without sense are refused when they are made."""

import dataclasses

import pytest

from clipmap_hf.cli.arguments import StudentArguments, TeacherArguments
from clipmap_hf.data.arguments import CalibrationArguments, DataArguments
from clipmap_hf.teacher_cache.arguments import TeacherCacheArguments
from clipmap_hf.training.arguments import DistillationStageArguments, MappingStageArguments, StageArguments
from clipmap_hf.training.run_arguments import RunArguments


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (StageArguments, {"num_train_epochs": -1}, "num_train_epochs=-1 must be at least 0"),
        (StageArguments, {"batch_size": 0}, "batch_size=0 must be above 0"),
        (StageArguments, {"max_grad_norm": 0.0}, "max_grad_norm=0.0 must be above 0"),
        (StageArguments, {"logit_scale": 150.0}, "must not exceed 100"),
        (StageArguments, {"micro_batch_size": 0}, "micro_batch_size=0 must be above 0"),
        (RunArguments, {"output_dir": "out", "eval_steps": 0}, "eval_steps=0 must be above 0"),
        (RunArguments, {"output_dir": "out", "save_steps": 0}, "save_steps=0 must be above 0"),
        (RunArguments, {"output_dir": "out", "max_skipped": -1}, "max_skipped=-1 must be at least 0"),
        (DataArguments, {"train_data": "x", "shuffle_buffer": 0}, "shuffle_buffer=0 must be above 0"),
        (CalibrationArguments, {"calibration_pairs": 0}, "calibration_pairs=0 must be above 0"),
        (TeacherCacheArguments, {"teacher_cache": "x", "views": 0}, "views=0 must be above 0"),
        (TeacherCacheArguments, {"views": 2}, "views=2 is for a teacher_cache; name its folder, or leave views out"),
        (
            TeacherArguments,
            {"teacher": ["a", "b"], "teacher_revision": ["v1"]},
            r"2 teachers need as many revisions, or none; got \['v1'\]",
        ),
        (DataArguments, {"train_data": "x", "validation_fraction": 1.0}, "must be at least 0 and below 1"),
        (DataArguments, {"train_data": "x", "validation_fraction": 0.1, "eval_data": "y"}, "leave out either"),
        (DataArguments, {"train_data": "x", "validation_fraction": 0.1, "streaming": True}, "name eval_data"),
        (DataArguments, {"train_data": "x", "crop_scale": [0.9]}, "two ascending shares"),
        (DataArguments, {"train_data": "x", "crop_scale": [1.0, 0.5]}, "two ascending shares"),
    ],
)
def test_numbers_without_sense_are_errors_that_say_what_is_allowed(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


def test_a_cache_has_four_views_unless_another_number_is_given():
    assert [one.views for one in (TeacherCacheArguments("x"), TeacherCacheArguments("x", 2))] == [4, 2]
    assert TeacherCacheArguments().views is None


def test_each_teacher_has_its_revision_or_none():
    assert TeacherArguments(["a", "b"]).teachers == [("a", None), ("b", None)]
    assert TeacherArguments(["a", "b"], ["v1", "v2"]).teachers == [("a", "v1"), ("b", "v2")]


@pytest.mark.parametrize(
    "cls",
    [
        CalibrationArguments,
        DataArguments,
        DistillationStageArguments,
        MappingStageArguments,
        RunArguments,
        StageArguments,
        StudentArguments,
        TeacherArguments,
        TeacherCacheArguments,
    ],
)
def test_every_argument_is_explained(cls):
    for field in dataclasses.fields(cls):
        assert field.metadata.get("help", "").endswith("."), field.name

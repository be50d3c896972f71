"""A recipe ends with where its result is, how it is loaded, and its recall beside the teacher's."""

import pytest

from clipmap_hf.cli.summary import print_summary
from clipmap_hf.training.result import TrainResult


RESULT = TrainResult(1200, 38400, 12.3, {}, 0, {"mean_recall": 0.25}, {"mean_recall": 0.5})


def test_a_summary_says_where_how_and_how_good(teacher_folder, capsys):
    print_summary(teacher_folder, RESULT)
    assert capsys.readouterr().out.splitlines() == [
        f"The result is in {teacher_folder} (1,200 steps, 38,400 pairs, 12 s). Load it:",
        "    from transformers import CLIPModel",
        f"    model = CLIPModel.from_pretrained('{teacher_folder}')",
        "mean_recall: 0.2500 (teacher 0.5000)",
    ]


@pytest.mark.parametrize("teacher", [None, {}])
def test_without_the_teachers_recall_the_students_stands_alone(teacher_folder, capsys, teacher):
    print_summary(teacher_folder, TrainResult(1, 8, 0.1, {}, 0, {"mean_recall": 0.25}, teacher))
    assert capsys.readouterr().out.endswith("mean_recall: 0.2500\n")


def test_agreement_with_the_teacher_stands_without_the_teachers_own(teacher_folder, capsys):
    print_summary(teacher_folder, TrainResult(1, 8, 0.1, {}, 0, {"decisions": 0.25}, {"decisions": 1.0}))
    assert capsys.readouterr().out.splitlines()[-1] == "decisions: 0.2500"


def test_packed_weights_say_what_loads_them(teacher_folder, tmp_path, capsys):
    config = (teacher_folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("{", '{"quantization_config": {},', 1))
    print_summary(tmp_path, RESULT)
    assert "import clipmap_hf  # lets transformers load packed weights" in capsys.readouterr().out

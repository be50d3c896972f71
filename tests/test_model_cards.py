"""The cards in model_cards/ are what their commands make."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from test_recipe_configs import CONFIGS, load_recipe

import clipmap_hf
from clipmap_hf.cli.arguments import StudentArguments
from clipmap_hf.cli.student import map_config
from clipmap_hf.config import student_config
from clipmap_hf.costs.cost import CostReport, model_cost
from clipmap_hf.demo import TEACHER
from clipmap_hf.models.loading import load_config


ROOT = Path(clipmap_hf.__file__).parents[1]
CARDS = ROOT / "model_cards"
STUDENT = CARDS / "emoji_student.md"
POINTS = 2.0  # by which scores may differ between machines


@pytest.mark.parametrize("name", ["base", "small", "tiny"])
def test_a_preset_s_card_is_the_one_that_the_command_renders(name):
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert load_recipe("cards").card(name) == text
    data = ModelCard(text).data
    assert "weights not yet published" in text and data.eval_results is None  # no score of ours
    assert data.base_model == yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["teacher"]


def recipe_of(card: str) -> dict:
    return yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])


def test_the_student_s_card_holds_its_recipe_and_size():
    card = STUDENT.read_text(encoding="utf-8")
    config, shown = yaml.safe_load((CONFIGS / "emoji_student.yaml").read_text()), recipe_of(card)
    for key, value in config.items():
        if isinstance(value, dict):  # YAML reads 2e-3 as a string
            value = {**shown[key], **{k: float(v) if isinstance(v, str) else v for k, v in value.items()}}
        assert shown[key] in (value, [value]), key
    sizes = {key: value for key, value in config.items() if key.startswith(("vision_", "text_"))}
    teacher = load_config(str(TEACHER))
    student = student_config(teacher, map_config(StudentArguments(**sizes)))
    assert str(CostReport(teacher=model_cost(teacher), student=model_cost(student))) in card
    assert ModelCard(card).data.license == "apache-2.0"


def scores(card: str) -> dict[str, list[float]]:
    rows = re.findall(r"^\| (\S+: \S+) +\| +([\d.]+) \| +([\d.]+) \|$", card, re.MULTILINE)
    return {name: [float(teacher), float(student)] for name, teacher, student in rows}


def test_the_student_s_scores_are_one_set_s_in_table_and_metadata():
    card = STUDENT.read_text(encoding="utf-8")
    found = scores(card)
    assert len(found) == 7
    for one in ModelCard(card).data.eval_results:
        assert 100 * one.metric_value == pytest.approx(found[f"{one.dataset_name}: {one.metric_type}"][1], abs=0.06)


@pytest.mark.recipes
def test_the_student_s_card_is_what_its_command_writes(tmp_path):
    command = [sys.executable, "recipes/compress.py", "--config", "recipes/configs/emoji_student.yaml"]
    command += ["--output_dir", str(tmp_path / "emoji_student")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kept, made = STUDENT.read_text(), (tmp_path / "emoji_student" / "README.md").read_text()
    before, now = scores(kept), scores(made)
    assert before.keys() == now.keys()
    for name in before:
        assert now[name] == pytest.approx(before[name], abs=POINTS), name

    def without_scores(card: str) -> str:
        return re.sub(r"(?m)^ *value: .*$|(?<=[|]) +[\d.]+ (?=[|])", "", card)

    assert without_scores(made) == without_scores(kept)

"""A student has its teacher's temperature, and SigLIP's bias, unless they were learned: from every recipe."""

import copy
import math
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import randomize
from test_recipe_configs import load_recipe
from transformers import SiglipModel

from clipmap_hf.models.loading import load_model


pytestmark = pytest.mark.usefixtures("fresh_accelerator")

SCALE, BIAS = math.log(117), -16.8
START = ("--initializer", "diagonal")
SIZES = ("--vision_hidden_size", 32, "--text_hidden_size", 32)


@pytest.fixture(params=["clip", "siglip"])
def teacher(request, shared_teacher, siglip, tiny_processor, tmp_path):
    """A folder with a teacher whose scale and bias are those of a released SigLIP."""
    model = copy.deepcopy(shared_teacher) if request.param == "clip" else randomize(copy.deepcopy(siglip))
    model.logit_scale.data.fill_(SCALE)
    if isinstance(model, SiglipModel):
        model.logit_bias.data.fill_(BIAS)
    model.save_pretrained(tmp_path / "teacher")
    tiny_processor.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def run(monkeypatch, teacher, pairs_parquet, tmp_path):
    """A function that runs a recipe on the teacher, and returns the model that it wrote."""

    def start(recipe: str, *argv):
        AcceleratorState._reset_state(reset_partial_state=True)
        paths = ("--teacher", teacher, "--train_data", pairs_parquet, "--output_dir", tmp_path / "out")
        monkeypatch.setattr(sys, "argv", [recipe, *map(str, (*paths, *argv))])
        load_recipe(recipe).main()
        return load_model(str(tmp_path / "out"))

    return start


def stage(name: str, steps: int = 2) -> tuple:
    return f"--{name}_steps", steps, f"--{name}_batch_size", 8


RECIPES = {
    "compress without training": ("compress", *SIZES, *START, *stage("distillation", 0)),
    "compress": ("compress", *SIZES, *START, *stage("mapping"), *stage("distillation")),
    "map": ("map", *SIZES, *START, *stage("mapping")),
    "mask": ("mask", *SIZES, *stage("masking")),
    "distill": ("distill", "--student_model", "teacher", *stage("distillation")),
    "ternarize": ("ternarize", *stage("ternary")),
    "progressive": (
        "progressive",
        "--sizes",
        "vision_hidden_size=32",
        "--initializer",
        "diagonal",
        *stage("distillation"),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_keeps_the_teacher_s_temperature(run, teacher, name, request):
    if name == "mask" and "siglip" in request.node.name:
        pytest.skip("models of type 'siglip' cannot be masked")
    recipe, *argv = (teacher if word == "teacher" else word for word in RECIPES[name])
    model = run(recipe, *argv)
    torch.testing.assert_close(model.logit_scale.item(), SCALE, atol=1e-5, rtol=0)
    if hasattr(model, "logit_bias"):
        torch.testing.assert_close(model.logit_bias.item(), BIAS, atol=1e-5, rtol=0)


def test_a_scale_that_is_learned_is_exported(run, teacher):
    argv = ("--student_model", teacher, *stage("distillation"), "--distillation_learn_logit_scale", "true")
    learned = run("distill", *argv, "--distillation_learning_rate", 1e-2).logit_scale.item()
    assert learned != pytest.approx(SCALE, abs=0.1) and learned != pytest.approx(math.log(50), abs=1e-6)
    assert learned == pytest.approx(math.log(50), abs=0.1)


@pytest.mark.parametrize("teacher", ["siglip"], indirect=True)
def test_a_bias_that_is_learned_has_the_scale_it_was_learned_with(run, teacher):
    argv = ("--student_model", teacher, *stage("distillation"), "--distillation_losses", "sigmoid=1")
    model = run("distill", *argv, "--distillation_learning_rate", 1e-2)
    torch.testing.assert_close(model.logit_scale.item(), math.log(50), atol=1e-5, rtol=0)
    assert abs(model.logit_bias.item() - BIAS) > 1e-4

"""Optional packages that are missing."""

import subprocess
import sys
from pathlib import Path

import pytest

from clipmap_hf.files.extras import require


RECIPES = Path(__file__).parents[1] / "recipes"


def test_what_is_installed_passes_and_what_is_missing_is_named_with_its_extra():
    require("plots", "json")
    with pytest.raises(ImportError, match=r"nosuch cannot be imported; install it: pip install 'clipmap_hf\[plots\]'"):
        require("plots", "json", "nosuch")


@pytest.mark.parametrize(
    ("recipe", "missing", "extra", "argv"),
    [
        ("compare.py", "matplotlib", "plots", ["a", "b", "--eval_data", "x"]),
        ("compare.py", "onnxruntime", "onnx", ["a", "--eval_data", "x", "--runtimes", "onnx"]),
        ("export_onnx.py", "onnxruntime", "onnx", ["--model", "."]),
    ],
)
def test_a_recipe_that_misses_a_package_ends_with_one_line(recipe, missing, extra, argv):
    hide = f"import sys, runpy; sys.modules[{missing!r}] = None; sys.argv = sys.argv[1:]; "
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            hide + "runpy.run_path(sys.argv[0], run_name='__main__')",
            str(RECIPES / recipe),
            *argv,
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == (
        f"{recipe}: error: {missing} cannot be imported; install it: pip install 'clipmap_hf[{extra}]'.\n"
    )

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import clipmap_hf


REPOSITORY = Path(clipmap_hf.__file__).parents[1]


@pytest.mark.parametrize("name", clipmap_hf.__all__)
def test_a_public_name_is_there(name):
    value = getattr(clipmap_hf, name)
    module = importlib.import_module(clipmap_hf._PUBLIC[name])
    assert value is getattr(module, name) and name in module.__all__
    assert name in dir(clipmap_hf)


def test_public_names_are_the_lazy_ones_in_order():
    assert set(clipmap_hf.__all__) == set(clipmap_hf._PUBLIC)
    constants_first = sorted(clipmap_hf.__all__, key=lambda name: (not name.isupper(), name))
    assert clipmap_hf.__all__ == list(clipmap_hf._PUBLIC) or clipmap_hf.__all__ == constants_first


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'clipmap_hf' has no attribute 'ClipMapModel'"):
        _ = clipmap_hf.ClipMapModel


@pytest.mark.parametrize("name", clipmap_hf.__all__)
def test_a_public_name_is_explained_in_the_docs(name):
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    assert any(re.search(rf"\b{name}\b", page.read_text(encoding="utf-8")) for page in pages)


def test_importing_the_package_is_instant():
    """It waits for neither torch nor transformers."""
    code = "import sys, clipmap_hf; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_changelog_begins_with_this_version():
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    top = re.search(r"^## \[([^\]]+)\]", changelog, re.MULTILINE).group(1)
    assert top in ("Unreleased", clipmap_hf.__version__)


def test_the_version_is_one_that_pip_understands():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", clipmap_hf.__version__)

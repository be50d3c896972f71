"""What the site generates covers every public name and every option, and its notebook shows what its cells print."""

import ast
import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

import clipmap_hf


REPOSITORY = Path(clipmap_hf.__file__).parents[1]
DOCS = REPOSITORY / "docs"
RECIPES = sorted(path.stem for path in (REPOSITORY / "recipes").glob("[a-z]*.py"))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return load(DOCS / "generated.py").pages()


def listed(path: Path) -> list[str]:
    """What a module's `__all__` holds."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return ast.literal_eval(node.value)
    return []


@pytest.mark.parametrize("name", clipmap_hf.__all__)
def test_a_public_name_has_its_reference(pages, name):
    defined_in = getattr(clipmap_hf, name).__module__ if name != "PRESETS" else "clipmap_hf.config.presets"
    assert f"::: {defined_in}.{name}\n" in pages["reference/python.md"]


def test_every_name_of_every_module_has_its_reference_once(pages):
    shown = re.findall(r"^::: [\w.]+\.(\w+)$", "\n".join(pages.values()), re.MULTILINE)
    names = {name for path in Path(clipmap_hf.__file__).parent.rglob("*.py") for name in listed(path)}
    assert names <= set(shown)
    objects = re.findall(r"^::: ([\w.]+)$", "\n".join(pages.values()), re.MULTILINE)
    assert len(objects) == len(set(objects))


def test_what_the_site_collects_is_defined_by_a_statement_of_its_own():
    """The reader of the sources does not see names that are assigned several at a time."""
    unseen = []
    for path in Path(clipmap_hf.__file__).parent.rglob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        several = [node.targets[0] for node in body if isinstance(node, ast.Assign)]
        names = {one.id for target in several if isinstance(target, ast.Tuple) for one in target.elts}
        unseen += [(path.name, name) for name in names & set(listed(path))]
    assert not unseen


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option_of_a_recipe_has_its_reference(pages, recipe, monkeypatch, capsys):
    """The options are those that the recipe's own parser has."""
    monkeypatch.setattr("sys.argv", [f"{recipe}.py", "--help"])
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit):
        load(REPOSITORY / "recipes" / f"{recipe}.py").main()
    options = set(re.findall(r"^  (?:-h, )?(--\w+)", capsys.readouterr().out, re.MULTILINE)) - {"--help", "--config"}
    page = pages[f"reference/recipes/{recipe}.md"]
    assert options and not {option for option in options if f"`{option}`" not in page}


def test_a_recipe_says_defaults_choices_and_short_names(pages):
    page = pages["reference/recipes/distill.md"]
    assert "| `--distillation_learning_rate` | number | `0.0001` | Peak learning rate. |" in page
    assert "| `--student_model` | text | required | Hub id or folder of the CLIPModel to train. |" in page
    assert re.search(r"\| `--distillation_max_steps`, `--distillation_steps` \| whole number \| `-1` \|", page)
    assert re.search(r"\| `--image_backend` \| `pil`, `torchvision` \| `pil` \|", page)


def test_arguments_of_python_have_a_row_for_every_field(pages):
    page = pages["reference/python.md"]
    section = page[page.index("::: clipmap_hf.pipeline.arguments.DistillationArguments") :]
    assert "| `teacher_cache` | text | none |" in section and "| `output_dir` | text | required |" in section


def texts() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}


def test_imports_name_what_exists():
    seen = 0
    for name, text in texts().items():
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for node in ast.walk(ast.parse(block.replace("…", "_"), filename=name)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("clipmap_hf"):
                    module = importlib.import_module(node.module)
                    assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], (name, block)
                    seen += 1
    assert seen > 10


def test_the_notebook_shows_what_its_cells_print():
    notebook = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    text = json.dumps(outputs)
    assert all(cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert "mean_recall" in text and "error" not in {output["output_type"] for output in outputs}
    assert not re.search(r"/(home|root|tmp|usr|work)/", text)
    page = load(DOCS / "generated.py").notebook_page(notebook)
    assert "# A smaller CLIP in two minutes" in page and "mean_recall: " in page
    assert not re.search(r"^ +<|<p>$", page, re.MULTILINE)  # HTML that Markdown shows as code, or that never ends


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 220

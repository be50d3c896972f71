"""What the site has besides the pages in this folder: the reference, and the notebook with its output (mkdocs.yml)."""

import ast
import importlib
import importlib.util
import json
import types
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin
from unittest.mock import patch


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "clipmap_hf"
RECIPES = ROOT / "recipes"
NOTEBOOK = Path(__file__).parent / "quickstart.ipynb"

PYTHON_INTRODUCTION = """\
# The public names

These names come from `clipmap_hf` itself: `from clipmap_hf import compress`. They stay, or change with a line in the
changelog. The pages after this one list what the package is made of, folder by folder.
"""
RECIPES_INTRODUCTION = """\
# Recipes

A recipe is a script that does one thing from beginning to end. All of them print their options with `--help`.

* An option may be written with dashes or underscores: `--output_dir` and `--output-dir` are the same.
* Every recipe takes `--config FILE`, a YAML file with the same names. The command line wins over the file.
* Options of a stage carry its name in front, as in `--distillation_max_steps`. In the file they stand in a section of
  that name:

```yaml
output_dir: small
distillation:
  max_steps: 1000
```

| recipe | what it does |
|---|---|
"""


# ---- hooks of mkdocs


def on_config(config):
    """Puts the generated pages into the navigation, in place of `Reference`."""
    sections = [
        {"Public names": "reference/python.md"},
        {"Recipes": ["reference/recipes/index.md", *(f"reference/recipes/{name}.md" for name in recipe_names())]},
        {"Inside the package": [f"reference/package/{folder}.md" for folder in folders()]},
    ]
    place = next(index for index, entry in enumerate(config.nav) if "Reference" in entry)
    config.nav[place] = {"Reference": sections}
    return config


def on_files(files, config):
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    notebook = notebook_page(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    for uri, content in {**pages(), "quickstart.md": notebook}.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Gives the wide tables of results the whole page."""
    if page.parent is not None and page.parent.title == "Results":
        page.meta["hide"] = ["toc"]
    return markdown


# ---- pages


def pages() -> dict[str, str]:
    """Every page of the reference, by its path on the site."""
    shown = public_objects()
    made = {"reference/python.md": PYTHON_INTRODUCTION + "".join(reference(path, "##") for path in shown)}
    for folder, modules in folders().items():
        made[f"reference/package/{folder}.md"] = folder_page(folder, modules, set(shown))
    made["reference/recipes/index.md"] = RECIPES_INTRODUCTION
    for name in recipe_names():
        recipe = load_recipe(name)
        made[f"reference/recipes/{name}.md"] = recipe_page(name, recipe)
        made["reference/recipes/index.md"] += f"| [`{name}`]({name}.md) | {first_sentence(recipe.__doc__)} |\n"
    return made


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: its texts, its code, and what that printed when it was run last."""
    blocks = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        blocks.append(source if cell["cell_type"] == "markdown" else fenced(source, "python"))
        blocks += [shown_output(output) for output in cell.get("outputs", ())]
    return "\n\n".join(blocks) + "\n\n[Download this notebook](quickstart.ipynb).\n"


def shown_output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "text/html" in data:  # without what would end it in Markdown: blank lines, indents, and a last open paragraph
        lines = "".join(data["text/html"]).replace(' border="1" class="dataframe"', "").splitlines()
        return "".join(line.strip() for line in lines).removesuffix("<p>")
    return fenced("".join(output["text"] if "text" in output else data["text/plain"]).rstrip(), "text")


def fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"


# ---- public names, read from the source: nothing is imported


def folders() -> dict[str, list[str]]:
    """The modules of each folder of the package that list public names; those of the root are `clipmap_hf`."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if module != "clipmap_hf" and defined_names(module):
            found.setdefault(parts[1] if len(parts) > 2 else "clipmap_hf", []).append(module)
    return dict(sorted(found.items(), key=lambda item: (item[0] != "clipmap_hf", item[0])))


def source_of(module: str) -> Path:
    folder = ROOT.joinpath(*module.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def assigned(module: str, name: str) -> Any:
    """The literal that a module assigns to a name; an empty list, if it assigns none."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    return []


def tree(module: str) -> ast.Module:
    return ast.parse(source_of(module).read_text(encoding="utf-8"))


def origin(module: str, name: str) -> str:
    """The module that defines a name which `module` may only import."""
    for node in tree(module).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return origin(node.module, name)
    return module


def defined_names(module: str) -> list[str]:
    """The public names that a module defines, without those that it takes from others."""
    return [name for name in assigned(module, "__all__") if origin(module, name) == module]


def public_objects() -> list[str]:
    """Where the names that `clipmap_hf` itself offers are defined, in its order."""
    modules = assigned("clipmap_hf", "_PUBLIC")
    return [f"{origin(modules[name], name)}.{name}" for name in assigned("clipmap_hf", "__all__")]


def folder_page(folder: str, modules: list[str], shown: set[str]) -> str:
    package = "clipmap_hf" if folder == "clipmap_hf" else f"clipmap_hf.{folder}"
    text = f"# `{package}`\n\n{ast.get_docstring(tree(package)).splitlines()[0]}\n"
    for module in modules:
        names = [name for name in defined_names(module) if f"{module}.{name}" not in shown]
        elsewhere = sorted(set(defined_names(module)) - set(names))
        text += f"\n## `{module}`\n\n{ast.get_docstring(tree(module)).strip()}\n"
        if elsewhere:
            text += f"\nAmong the [public names](../python.md): {', '.join(f'`{name}`' for name in elsewhere)}.\n"
        text += "".join(reference(f"{module}.{name}", "###") for name in names)
    return text


def reference(path: str, heading: str) -> str:
    """The place where mkdocstrings puts a docstring, and a row for each field of a class of options."""
    module, _, name = path.rpartition(".")
    text = f"\n::: {path}\n    options:\n      heading_level: {len(heading)}\n"
    if not (module.endswith("arguments") and name.endswith("Arguments")):
        return text
    rows = [row(f, f"`{f.name}`") for f in fields(getattr(importlib.import_module(module), name))]
    return (
        text
        + "      show_signature: false\n      members: false\n      inherited_members: false\n\n"
        + table("field", rows)
    )


# ---- options of recipes, from their dataclasses


class Asked(Exception):
    """Ends a recipe as soon as it has said what it asks for."""


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("[a-z]*.py"))


def load_recipe(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", RECIPES / f"{name}.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def recipe_page(name: str, recipe: types.ModuleType) -> str:
    with patch("clipmap_hf.cli.parsing._read", side_effect=Asked) as read, suppress(Asked):
        recipe.main()
    kinds, stages = read.call_args.args[:2]
    text = f"# `{name}`\n\n{recipe.__doc__.strip()}\n"
    for prefix, kind in [*(("", kind) for kind in kinds), *((f"{stage}_", kind) for stage, kind in stages.items())]:
        rows = [row(f, ", ".join(f"`--{prefix}{option}`" for option in option_names(f))) for f in fields(kind)]
        heading = f"The stage `{prefix[:-1]}`\n\n{title(kind)}." if prefix else title(kind)
        text += f"\n## {heading}\n\n{table('option', rows)}"
    return text


def option_names(of: Field) -> list[str]:
    aliases = of.metadata.get("aliases", [])
    return [of.name, *(alias.removeprefix("--") for alias in ([aliases] if isinstance(aliases, str) else aliases))]


def title(kind: type) -> str:
    """The first sentence of the docstring of a dataclass, or of what it inherits from; dataclasses make up others."""
    written = (base.__doc__ for base in kind.__mro__ if is_dataclass(base))
    documented = (doc for doc in written if doc and "(" not in doc.split(maxsplit=1)[0])
    return first_sentence(next(documented, "This recipe's own options")).rstrip(".")


def first_sentence(doc: str) -> str:
    return " ".join(doc.strip().split("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."


# ---- tables of fields


def table(first: str, rows: list[str]) -> str:
    return "\n".join([f"| {first} | takes | default | |", "|---|---|---|---|", *rows]) + "\n"


def row(of: Field, names: str) -> str:
    text = " ".join(of.metadata.get("help", "").split()).replace("|", "\\|")
    return f"| {names} | {taken(of.type)} | {default(of)} | {text} |"


def taken(kind: Any) -> str:
    """What a field of this type takes, in words."""
    words = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}
    if kind in words:
        return words[kind]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is list:
        return f"{taken(get_args(kind)[0])}, several"
    if get_origin(kind) is dict:
        return "`name=value`, several"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(taken(one) for one in get_args(kind) if one is not type(None)))
    raise TypeError(f"The site has no words for a field of the type {kind}; add them to `taken`.")


def default(of: Field) -> str:
    if of.default is MISSING and of.default_factory is MISSING:
        return "required"
    value = of.default if of.default is not MISSING else of.default_factory()
    return "none" if value is None or value in ([], {}) else f"`{plain(value)}`"


def plain(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return " ".join(f"{name}={number}" for name, number in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

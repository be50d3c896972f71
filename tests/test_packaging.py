"""What stands around the code: metadata, citation, templates of issues, hosted CI and hooks."""

import ast
import importlib
import re

import pytest
import yaml
from distributed_processes import REPOSITORY

import clipmap_hf


PYTHONS = ["3.11", "3.12", "3.13"]


def read(path: str) -> str:
    return (REPOSITORY / path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def setup() -> dict[str, ast.expr]:
    """The arguments of `setup` in setup.py."""
    (call,) = (
        node.value
        for node in ast.parse(read("setup.py")).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    )
    return {keyword.arg: keyword.value for keyword in call.keywords}


def test_the_command_is_installed_under_its_name(setup):
    ((name, _, target),) = (
        script.partition(" = ") for script in ast.literal_eval(setup["entry_points"])["console_scripts"]
    )
    module, _, function = target.partition(":")
    assert name == "clipmap-hf" and callable(getattr(importlib.import_module(module), function))


def test_the_supported_pythons_are_the_same_everywhere(setup):
    classifiers = ast.literal_eval(setup["classifiers"])
    versions = [word.rpartition(" ")[2] for word in classifiers if re.search(r"Python :: 3\.\d", word)]
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    assert versions == PYTHONS == workflow["jobs"]["check"]["strategy"]["matrix"]["python"]
    assert ast.literal_eval(setup["python_requires"]) == f">={PYTHONS[0]}"
    assert f'target-version = "py{PYTHONS[0].replace(".", "")}"' in read("pyproject.toml")


def test_hosted_ci_runs_what_ci_runs_and_names_no_index():
    text = read(".github/workflows/ci.yml")
    steps = yaml.safe_load(text)["jobs"]["check"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert "://" not in text
    for script in (".ci/run", ".ci/wheel"):
        assert (REPOSITORY / script).stat().st_mode & 0o111


def test_the_citation_is_of_this_version_and_names_its_authors():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == clipmap_hf.__version__ and citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": "The clipmap_hf authors"}]
    (paper,) = citation["references"]
    bibtex = read("README.md").split("```bibtex")[1].split("```")[0]
    names = re.search(r"author = {(.*?)}", bibtex, re.DOTALL)[1]
    expected = [
        dict(zip(("family-names", "given-names"), name.split(", "), strict=True))
        for name in re.split(r"\s+and\s+", names)
    ]
    assert paper["authors"] == expected and paper["title"] in bibtex
    assert str(paper["year"]) in bibtex and paper["identifiers"][0]["value"] in bibtex


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_issue_templates_are_forms(name):
    form = yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{name}.yml"))
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)


def test_a_bug_report_asks_for_the_environment():
    form = yaml.safe_load(read(".github/ISSUE_TEMPLATE/bug_report.yml"))
    (field,) = (field for field in form["body"] if field.get("id") == "environment")
    assert "`clipmap-hf env`" in field["attributes"]["description"] and field["validations"] == {"required": True}


def test_vulnerabilities_are_reported_in_private_and_to_no_address():
    text = read("SECURITY.md")
    assert "Report a vulnerability" in text and "private advisory" in text and "@" not in text and "://" not in text


def test_hooks_call_the_ruff_of_the_environment():
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"].split()[:2] for hook in repository["hooks"]] == [
        [".venv/bin/ruff", "check"],
        [".venv/bin/ruff", "format"],
    ]
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}

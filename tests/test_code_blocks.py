"""The commands and the Python of the README and the docs: parsed by their own programs, and run on small data."""

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from code_blocks import LAUNCHERS, PAGES, REPOSITORY, blocks, commands, parse
from datasets import Dataset
from PIL import Image

import clipmap_hf
from clipmap_hf import ClipMapConfig, TowerConfig
from clipmap_hf.demo import TEACHER
from clipmap_hf.models.features import ClipFeatures
from clipmap_hf.models.loading import load_model, load_processor
from clipmap_hf.ternary.config import TernaryConfig
from clipmap_hf.ternary.model import pack_model


# What stands for what needs the network, a GPU or hours, in Python that is run.
SUBSTITUTES = {
    '"openai/clip-vit-base-patch16"': repr(str(TEACHER)),
    '{"params": "30M"}': '{"params": "1M"}',
    'student="small"': "student=SMALL",
    '"small",  # a preset': "SMALL,  # a preset",
    '(teacher, "small"': "(teacher, SMALL",
    "hidden_size=384, num_hidden_layers=8": "hidden_size=96, num_hidden_layers=2",
    "hidden_size=256, num_hidden_layers=6": "hidden_size=64, num_hidden_layers=2",
    "hidden_size=384": "hidden_size=96",
    "num_train_epochs=4": "num_train_epochs=1",
    "num_train_epochs=3": "num_train_epochs=1, per_device_train_batch_size=8",
    "per_device_train_batch_size=128": "per_device_train_batch_size=8",
    "trainer.push_to_hub()": "",
}
# Python that is not run but compiled, and why.
COMPILED = {
    ("docs/hub.md", 1): "pushes to the Hub; tests/test_push.py does so to a server of its own",
    ("docs/extending.md", 1): "an excerpt of clipmap_hf/families/siglip.py",
    ("docs/families.md", 1): "compresses an RN50; tests/test_batch_norms.py does so with a tiny one",
    ("docs/python.md", 6): "leaves arguments out",
    ("docs/evaluation.md", 3): "reads a set of the reader's own",
}

PROGRAMS = [(page, words) for page in PAGES for words in commands(page)]


def program_of(words: list[str]) -> list[str]:
    """A program of ours and its arguments, behind variables, launchers and what they take; otherwise nothing."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0] == "clipmap-hf" and len(words) > 1 and (REPOSITORY / "recipes" / f"{words[1]}.py").exists():
        return [f"recipes/{words[1]}.py", *words[2:]]
    if words[0].startswith("--"):  # options by themselves
        return ["recipes/compress.py", *words, "…"]
    if "-m" in words and words[words.index("-m") + 1] == "clipmap_hf":
        return program_of(["clipmap-hf", *words[words.index("-m") + 2 :]])
    if words[0] in ("python", *LAUNCHERS):
        start = next((i for i, word in enumerate(words) if re.fullmatch(r"recipes/\S+\.py", word)), None)
        return [] if start is None else words[start:]
    return []


OURS = [(page, program) for page, words in PROGRAMS if (program := program_of(words))]
OTHERS = [(page, words) for page, words in PROGRAMS if not program_of(words)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder as a reader has it: the repository's files, and the student `small` of an earlier command."""
    for name in ("recipes", "clipmap_hf", "docs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "small").mkdir()
    (tmp_path / "queries.txt").write_text("a red circle\na blue square\na small green triangle\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "words"), OURS, ids=[f"{page}: {shlex.join(words)[:60]}" for page, words in OURS])
def test_a_command_is_one_that_its_program_takes(page, words, folder, monkeypatch, capsys):
    given = [word for word in words if word != "…"]
    if given != words or "--help" in given or len(given) == 1:  # some arguments are the reader's
        with pytest.raises(SystemExit) as end:
            parse([given[0], "--help"], monkeypatch)
        printed = capsys.readouterr().out
        assert end.value.code == 0 and not [word for word in given if word.startswith("--") and word not in printed]
    else:
        parse(given, monkeypatch)


# Of commands that are not ours: what their words are checked against.
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
EXTRAS = set(
    re.findall(r'^    "([a-z-]+)": \[|^EXTRAS\["([a-z]+)"\]', (REPOSITORY / "setup.py").read_text(), re.MULTILINE)
)
EXTRAS = {name for names in EXTRAS for name in names if name}


@pytest.mark.parametrize(
    ("page", "words"), OTHERS, ids=[f"{page}: {shlex.join(words)[:60]}" for page, words in OTHERS]
)
def test_another_command_names_what_exists(page, words):
    words = words[[bool(re.fullmatch(r"[A-Z_]+=\S*", word)) for word in words].index(False) :]
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= MAKE_TARGETS
    elif words[:2] == ["pip", "install"]:
        named = re.findall(r"\[([\w,-]+)\]", " ".join(words))
        assert {extra for names in named for extra in names.split(",")} <= EXTRAS
    else:
        assert words[0] in ("clipmap-hf", "git", "npm", "cd", "python", "pytest", "pre-commit"), words


PYTHON = {page: blocks(page, "python") for page in PAGES}


@pytest.mark.parametrize("page", [page for page, found in PYTHON.items() if found])
def test_python_is_python(page):
    for block in PYTHON[page]:
        compile(block.code.replace("…", "..."), f"{page}, block {block.number}", "exec")


@pytest.fixture
def names(folder, pairs_parquet):
    """What a reader of any page has: files, a teacher, pairs, and names that the pages before have made."""
    for name in ("pairs.parquet", "test.parquet"):
        (folder / name).write_bytes(pairs_parquet.read_bytes())
    for name in ("small", "student"):
        shutil.copytree(TEACHER, folder / name, dirs_exist_ok=True)
    teacher = load_model(str(TEACHER))
    pack_model(load_model(str(TEACHER)), TernaryConfig()).save_pretrained(folder / "ternary")
    image = Image.new("RGB", (64, 64), "red")
    image.save(folder / "bird.jpg")
    pairs = Dataset.from_parquet(str(pairs_parquet))
    processor = load_processor(str(TEACHER))
    return {name: getattr(clipmap_hf, name) for name in clipmap_hf.__all__} | {
        "SMALL": ClipMapConfig(vision=TowerConfig(hidden_size=64), text=TowerConfig(hidden_size=64)),
        "teacher": str(TEACHER),
        "model": teacher,
        "processor": processor,
        "image": image,
        "pairs": pairs,
        "test": pairs,
        "photos": pairs.rename_column("caption", "label"),
        "batch": dict(processor(text=["a", "b"], images=[image, image], padding=True, return_tensors="pt")),
        "torch": torch,
        "F": torch.nn.functional,
        "ClipFeatures": ClipFeatures,
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, found in PYTHON.items() if found])
def test_python_runs_in_the_order_of_its_page(page, names):
    """Where a block prints at its end and a table follows it, that is what it prints."""
    for block in PYTHON[page]:
        if (page, block.number) in COMPILED:
            continue
        code = block.code
        for given, small in SUBSTITUTES.items():
            code = code.replace(given, small)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, f"{page}, block {block.number}", "exec"), names)
        if block.printed and code == block.code:
            assert block.printed.strip() in printed.getvalue()


# Commands of the README that are run, in this order, on a student of the embedded teacher.
RUN = ("compress", "export_onnx", "convert_open_clip", "compare")
SMALL_DATA = {
    "openai/clip-vit-base-patch16": str(TEACHER),
    "params=30M": "params=1M",
    "128": "8",
    "other": "small-open-clip-back",
}


@pytest.mark.recipes
def test_the_commands_of_the_readme_run_one_after_another(folder, pairs_parquet):
    (folder / "small").rmdir()
    for name in ("pairs.parquet", "test.parquet"):
        (folder / name).write_bytes(pairs_parquet.read_bytes())
    for name in RUN:
        words = documented(name)[0]
        if name == "compare":  # with another student: what open_clip's folder becomes
            back = ["--model", "small-open-clip", "--to", "transformers", "--output_dir", SMALL_DATA["other"]]
            finish("convert_open_clip", *back)
        finish(*words)
    assert (folder / "comparison" / "index.html").exists() and (folder / "small" / "onnx" / "model.onnx").exists()


@pytest.mark.recipes
def test_the_readme_s_command_for_a_folder_of_images_runs(folder, images):
    (folder / "photos").symlink_to(images)
    finish(*documented("compress")[1], "--distillation_max_steps", "2")
    assert (folder / "tiny" / "config.json").exists()


def documented(name: str) -> list[list[str]]:
    """The arguments of each `clipmap-hf name …` of the README, on small data."""
    found = [words[1:] for page, words in PROGRAMS if page == "README.md" and words[:2] == ["clipmap-hf", name]]
    return [[SMALL_DATA.get(word, word) for word in words] for words in found]


def finish(*words: str) -> None:
    run = subprocess.run([sys.executable, "-m", "clipmap_hf", *words], capture_output=True, text=True)
    assert run.returncode == 0, f"{shlex.join(words)}\n{run.stdout}\n{run.stderr}"


def test_what_is_only_compiled_is_there():
    assert COMPILED.keys() <= {(page, block.number) for page, found in PYTHON.items() for block in found}

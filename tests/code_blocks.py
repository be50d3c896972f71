"""Code blocks of Markdown pages: splits commands, and parses each by the parser that it would meet."""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple

import pytest

import clipmap_hf
from clipmap_hf.cli import parsing


REPOSITORY = Path(clipmap_hf.__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")))
LAUNCHERS = ("accelerate", "torchrun")


class Block(NamedTuple):
    """A fenced block: where it stands, its code, and if it prints at its end, the table that follows it."""

    page: str
    number: int
    code: str
    printed: str


def blocks(page: str, language: str) -> list[Block]:
    """The blocks of a page in a language, numbered from 1."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    pattern = rf"^( *)```{language}\n(.*?)^ *```\n(?:\n(?:>[^\n]*\n)*\n*((?:\|[^\n]*\n)+))?"
    found = re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    return [_block(page, number, dedented(one[2], one[1]), one[3]) for number, one in enumerate(found, 1)]


def _block(page: str, number: int, code: str, table: str | None) -> Block:
    prints = code.rstrip().splitlines()[-1].startswith("print(")
    return Block(page, number, code, table if prints and table else "")


def dedented(code: str, indent: str) -> str:
    return "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))


def commands(page: str) -> Iterator[list[str]]:
    """The words of every command of a page, in its blocks and in its text."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    for block in blocks(page, "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for inline in re.findall(
        r"`((?:python recipes/|accelerate launch |torchrun |make |clipmap-hf |pip install )[^`]+)`", prose
    ):
        yield shlex.split(inline.replace("\n", " "))


class Parsed(BaseException):
    """Ends a program when its arguments have been parsed."""


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Parses the arguments of one of our programs as it would itself, and stops there.

    Args:
        words: The program's path, then its arguments. Of arguments that are left out as `…`, those before are looked
            for in its help.
        monkeypatch: Undoes what stops it.
    """
    program = REPOSITORY / words[0]
    monkeypatch.setattr(sys, "argv", [str(program), *words[1:]])
    monkeypatch.setattr(sys, "path", [str(program.parent), *sys.path])
    read, parse_known_args = parsing._read, argparse.ArgumentParser.parse_known_args

    def stop_after_reading(*arguments):
        read(*arguments)
        raise Parsed

    def stop_after_parsing(self, args=None, namespace=None):
        found = parse_known_args(self, args, namespace)
        if args is None:  # a script's own parser; ours passes the words on
            assert not found[1], f"unknown arguments {found[1]}"
            raise Parsed
        return found

    monkeypatch.setattr(parsing, "_read", stop_after_reading)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop_after_parsing)
    spec = spec_from_file_location(f"documented_{program.stem}", program)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for the types of their fields
    spec.loader.exec_module(module)
    with pytest.raises(Parsed):
        module.main()

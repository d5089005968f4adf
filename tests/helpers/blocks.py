"""Code blocks of the README and of docs/, to run them or to parse their commands.

A block is run, at toy size, unless the line before it is ``<!-- not run: REASON -->``. A block that is not run is
parsed: each command of ours by its own argument parser, each ``make`` target, extra and script by what is in the
repository.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "export/README.md", "plugins/README.md")
SHELL, CODE = ("sh", "bash"), ("sh", "bash", "python")

_BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>[^>]+) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)^```$", re.S | re.M)

#: Programs of others, which a block may name where it is not run.
OTHERS = {
    "sudo", "apt", "python3", "source", "export", "scp", "cmake", "git", "trtexec", "polygraphy", "engine/compare.sh",
    "openssl", "graphs/build.sh", "/usr/src/tensorrt/bin/trtexec", "shapes", "curl", "umask", "echo", "npm", "node",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One fenced block: where it is, its language, its text, and why it is not run ("" where it is)."""

    page: str
    line: int
    language: str
    text: str
    why: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    """Every shell and Python block of the public pages."""
    for page in (p for pattern in PAGES for p in sorted(ROOT.glob(pattern))):
        text = page.read_text()
        for found in _BLOCK.finditer(text):
            if found["language"] in CODE:
                line = text.count("\n", 0, found.start("body")) + 1
                name = page.relative_to(ROOT).as_posix()
                yield Block(name, line, found["language"], found["body"], (found["why"] or "").strip())


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell block, with comments gone and continued lines joined."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s&&\s", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # an environment variable for the command
                words = words[1:]
            if words:
                found.append(words)
    return found


def parse(words: list[str]) -> None:
    """Fails unless a command is one that the repository, or one of `OTHERS`, knows with these arguments."""
    program, arguments = words[0], words[1:]
    if program == "torchrun":
        at = arguments.index("nformer_edge.cli")
        program, arguments = "nformer-edge", arguments[at + 1 :]
    if program == "nformer-edge":
        from nformer_edge import cli

        _quietly(lambda: cli.parser().parse_args(arguments), words)
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.M), f"no target {arguments[0]}"
    elif program == "pip":
        extras = re.findall(r"(?:nformer-edge|\.)\[([\w,-]+)\]", " ".join(arguments))
        known = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
        assert all(extra in known for names in extras for extra in names.split(",")), words
    elif program == "python" and arguments[0].endswith(".py"):
        _parse_script(ROOT / arguments[0], arguments[1:], words)
    else:
        assert program.partition("=")[0] in OTHERS, f"unknown program in a block: {' '.join(words)}"


class _ParsedError(Exception):
    """A script's arguments were parsed."""


def _parse_script(script: Path, arguments: list[str], words: list[str]) -> None:
    real = argparse.ArgumentParser.parse_args

    def stop(self, *given, **settings):
        real(self, *given, **settings)
        raise _ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.syspath_prepend(str(script.parent))
        try:
            _quietly(lambda: runpy.run_path(str(script), run_name="__main__"), words)
        except _ParsedError:
            return
    pytest.fail(f"{script.name} parses no arguments: {' '.join(words)}")


def _quietly(work, words: list[str]) -> None:
    try:
        work()
    except SystemExit as e:
        if e.code:
            pytest.fail(f"not accepted: {' '.join(words)}")

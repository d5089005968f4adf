"""The public pages name what exists: paths of the repository, and names of the package."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator

import pytest
from helpers.blocks import PAGES, ROOT

from nformer_edge.cli import COMMANDS

NAMES = [
    (page.relative_to(ROOT).as_posix(), name)
    for pattern in PAGES
    for page in sorted(ROOT.glob(pattern))
    if page.name != "api.md"  # generated from the code
    for name in dict.fromkeys(re.findall(r"`([^`\s]+)`", page.read_text()))
]
_PATH = re.compile(r"(?:nformer_edge|tests|benchmarks|plugins|export|docs)/[\w./-]+")
_DOTTED = re.compile(r"nformer_edge(?:\.\w+)+")

#: What a reader is to write, so that it does not exist yet.
_NEW = re.compile(r"\bNAME\b")


def missing(name: str) -> Iterator[str]:
    """What a backticked name names and the repository does not have."""
    if _NEW.search(name):
        return
    if _PATH.fullmatch(name) and not (ROOT / name).exists():
        yield f"no file {name}"
    if _DOTTED.fullmatch(name) and not _exists(name):
        yield f"no {name}"


def _exists(name: str) -> bool:
    """Attributes come before modules: to import a folder over a function of its name would replace the function."""
    first, *rest = name.split(".")
    found = importlib.import_module(first)
    for part in rest:
        if not hasattr(found, part) and not inspect.ismodule(found):
            return False
        if not hasattr(found, part):
            try:
                importlib.import_module(f"{found.__name__}.{part}")
            except ModuleNotFoundError as e:
                if not (e.name or "").startswith("nformer_edge"):
                    pytest.skip(f"needs {e.name}")
                return False
        found = getattr(found, part)
    return True


def test_every_path_and_name_of_the_pages_exists() -> None:
    assert len(NAMES) > 200
    found = [f"{page}: {line}" for page, name in NAMES for line in missing(name)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "name", ["tests/unit/nothing.py", "nformer_edge.core.nothing", "nformer_edge.core.errors.Error.nothing"]
)
def test_a_name_that_does_not_exist_is_found(name: str) -> None:
    assert list(missing(name))


def test_every_link_between_the_pages_leads_somewhere() -> None:
    broken = []
    for page in (p for pattern in PAGES for p in sorted(ROOT.glob(pattern))):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            there = (page.parent / path).resolve() if path else page
            if not there.exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
            elif anchor and anchor not in _anchors(there.read_text()):
                broken.append(f"{page.relative_to(ROOT)}: no heading {target}")
    assert not broken, "\n".join(broken)


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_every_command_stands_in_the_readmes_table() -> None:
    rows = re.findall(r"^\| `(\w[\w-]*)", (ROOT / "README.md").read_text(), re.M)
    assert not {name.split()[0] for name in COMMANDS} - {*rows}

"""The generated reference in docs/ is that of this code."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs"


def generator():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_error_says_what_to_do() -> None:
    found = generator().errors()
    assert len(found) > 300
    assert [t for t in found if not t.hint] == []


def test_no_hint_asks_for_labels_that_nobody_has() -> None:
    hints = " ".join(t.hint.lower() for t in generator().errors())
    for word in ("pid -1", "give people", "number the people"):
        assert word not in hints


def test_the_reference_and_the_schemas_are_those_that_make_docs_writes() -> None:
    module = generator()
    written = {
        p.relative_to(DOCS).as_posix(): p.read_text()
        for p in (DOCS / "api.md", DOCS / "errors.md", *DOCS.glob("schemas/*"))
    }
    generated = module.generate()
    stale = sorted(name for name in written.keys() | generated if written.get(name) != generated.get(name))
    assert stale == [], "run `make docs`"

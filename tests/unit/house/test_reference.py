"""The generated reference in docs/ is that of this code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs"


def test_the_reference_and_the_schemas_are_those_that_make_docs_writes() -> None:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = {p.relative_to(DOCS).as_posix(): p.read_text() for p in (DOCS / "api.md", *DOCS.glob("schemas/*"))}
    generated = module.generate()
    stale = sorted(name for name in written.keys() | generated if written.get(name) != generated.get(name))
    assert stale == [], "run `make docs`"

"""A backend is one folder and one line in the table."""

from __future__ import annotations

from nformer_edge.backends import base
from nformer_edge.backends.build import build_engine, describe_engine
from nformer_edge.backends.open import open_model, self_test
from nformer_edge.backends.spec import EngineSpec


def test_a_backend_from_outside_builds_and_runs_an_engine(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "PACKAGES", [*base.PACKAGES[:-1], "helpers.toy_backend", base.PACKAGES[-1]])
    engine = build_engine(tiny_bundle, tmp_path / "engine", EngineSpec(backend="toy-backend"))
    assert describe_engine(engine).backend == "toy-backend"
    with open_model(engine) as runner:
        assert set(self_test(runner)) == {"backbone", "head"}
